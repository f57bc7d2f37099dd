"""What is installed, for the files that say what wrote them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from raypar import __version__


def versions(*packages: str) -> dict[str, str]:
    """raypar's version, and those of the packages that are installed; some have several names (opencv-python, opencv-python-headless)."""
    found = {"raypar": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
