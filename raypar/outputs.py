"""The folder of a verb's output: whose it is, whether it is complete, and with which settings it was made.

    {storage}/{name}/{verb, or VERB.name}/
        settings.json       written first: the verb and the settings that decide the result
        run.yaml            the run file that it was made with
        ...                 the result's last file says that it is complete

One rule for all verbs. A complete output with the same settings is kept, one that was begun with them goes on or starts again, one with
other settings is refused, and ``VERB.overwrite=true`` replaces it. Runs in: the driver, and export's task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raypar import runfile
from raypar.config import RunConfig
from raypar.differences import differences
from raypar.storage import Folder

SETTINGS, RUN_FILE = "settings.json", "run.yaml"
STAGED = "weights"  # where raypar.weights puts copies


@dataclass(frozen=True)
class Output:
    """A verb's output in a run.

    Attributes:
        verb: ``inspect``, ``evaluate``, ``predict`` or ``export``.
        config: of the run.
        result: the file that is written last.
    """

    verb: str
    config: RunConfig
    result: str

    @property
    def name(self) -> str:
        return str(getattr(self.config, self.verb).name)

    @property
    def folder(self) -> Folder:
        return self.config.folder / self.name

    def finished(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The result, when it is complete for these settings; it says so. Nothing when there is work to do.

        Args:
            settings: that decide the result.

        Raises:
            ValueError: the folder holds something else, or was made with other settings and is not to be replaced.
        """
        out, before = self.folder, self._before()
        if before is None:
            if self.name != self.verb and self._is_foreign():
                raise ValueError(
                    f"{out.shown()} holds files that are no output of {self.verb}: choose another {self.verb}.name"
                )
            return None
        if (owner := before.get("verb", self.verb)) != self.verb:
            raise ValueError(f"{out.shown()} is an output of {owner}: choose another {self.verb}.name")
        if getattr(self.config, self.verb).overwrite:
            return None
        is_complete = out.exists(self.result)
        if others := differing(before, settings):
            state = "is complete" if is_complete else "was begun"
            raise ValueError(
                f"{out.shown()} {state} with other settings ({others}): set them back, keep both with {self.verb}.name=..., "
                f"or replace it with {self.verb}.overwrite=true"
            )
        if not is_complete:
            return None
        print(
            f"{self.verb}: {out.uri} is complete for these settings; {self.verb}.overwrite=true replaces it",
            flush=True,
        )
        result: dict[str, Any] = out.read_json(self.result)
        return result

    def begin(self, settings: dict[str, Any], *, is_empty: bool = True) -> None:
        """Writes what the output is made with.

        Args:
            settings: see :meth:`finished`.
            is_empty: whether the output starts from nothing, so that what is there is removed first.
        """
        out = self.folder
        if is_empty:
            out.delete(self.result)  # first what makes it complete
            out.delete()
        out.write_json(SETTINGS, {"verb": self.verb, **settings})
        write_run_file(out, self.config)

    def _is_foreign(self) -> bool:
        """Whether files lie there that no killed run of the verb has left: export stages weights before it begins its output."""
        return any(not name.startswith(f"{STAGED}/") for name in self.folder.list(recursive=True))

    def _before(self) -> dict[str, Any] | None:
        """The settings of what is there. Before there was ``settings.json``, the result held them."""
        for name in (SETTINGS, self.result):
            if self.folder.exists(name):
                found: dict[str, Any] = self.folder.read_json(name)
                return found if name == SETTINGS else found.get("settings", found)
        return None


def write_run_file(folder: Folder, config: RunConfig) -> None:
    """Writes the resolved run file, and what wrote it."""
    folder.write(RUN_FILE, runfile.dump(config) + runfile.written_by())


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings are others now, in words; empty when none is. A setting that was not recorded then is not compared."""
    return differences(
        {name: value for name, value in before.items() if name in now},
        {name: value for name, value in now.items() if name in before},
    )
