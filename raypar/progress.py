"""How far a verb is: a bar on a terminal, a line every so often in a log. Runs in: the driver."""

from __future__ import annotations

import sys
import time

SAY_EVERY_S = 10.0
REDRAW_EVERY_S = 0.2
BAR = 30  # characters


class Progress:
    """Counts to a total.

    Args:
        total: what 100 % is.
        unit: of the count, as in ``images``.
        label: begins every line, as in ``evaluate``.
    """

    def __init__(self, total: int, unit: str, label: str):
        self.total, self.unit, self.label = total, unit, label
        self.done = 0
        self.began = self.spoke = time.monotonic()
        self.is_terminal = sys.stdout.isatty()

    def update(self, n: int) -> None:
        """``n`` more are done."""
        self.done += n
        now = time.monotonic()
        if now - self.spoke >= (REDRAW_EVERY_S if self.is_terminal else SAY_EVERY_S):
            self.spoke = now
            self._say(now)

    def close(self) -> None:
        """Shows the end of it."""
        self._say(time.monotonic())
        if self.is_terminal:
            print(flush=True)

    def _say(self, now: float) -> None:
        rate = self.done / max(now - self.began, 1e-9)
        share = self.done / self.total if self.total else 1.0
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s{left}"
        if self.is_terminal:
            filled = round(share * BAR)
            print(f"\r[{'#' * filled}{'.' * (BAR - filled)}] {text}\033[K", end="", flush=True)
        else:
            print(text, flush=True)
