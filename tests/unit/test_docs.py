"""The documents say what the code does: generated pages are current, links lead somewhere, commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from raypar.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "jobs" / "README.md"]


def test_the_run_file_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (ROOT / "docs" / "run_file.md").read_text() == generate.page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_real_verbs_and_files(page: Path) -> None:
    for verb, run_file in re.findall(r"^(?:\$ )?raypar (\w+) (jobs/\S+|RUN_FILE)", page.read_text(), re.MULTILINE):
        if verb == "VERB":
            continue
        assert verb in VERBS, f"{page.name}: raypar {verb}"
        if run_file.startswith("jobs/"):
            assert (ROOT / run_file).exists(), f"{page.name}: {run_file}"
    for target in re.findall(r"`make ([a-z-]+)`", page.read_text()):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"{page.name}: make {target}"


def test_every_verb_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"`{verb}`" in text for verb in VERBS)
