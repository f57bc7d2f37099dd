"""How far a long piece of work is: a line that is rewritten on a terminal, a line every few seconds elsewhere (logs, CI).

Runs in: the driver.
"""

from __future__ import annotations

import sys
import time

LINE_EVERY_S = 10.0
REWRITE_EVERY_S = 0.2


class Progress:
    """Counts what is done.

    Args:
        total: how much there is.
        unit: of the count, in the plural (``images``).
        label: what is being done.
    """

    def __init__(self, total: int, unit: str, label: str):
        self.total, self.unit, self.label = total, unit, label
        self.done, self.began = 0, time.monotonic()
        self.is_terminal = sys.stderr.isatty()
        self.every_s = REWRITE_EVERY_S if self.is_terminal else LINE_EVERY_S
        self.said, self.said_done = self.began, -1

    def update(self, num: int) -> None:
        """Adds to the count, and says so when it is time to."""
        self.done += num
        if time.monotonic() - self.said >= self.every_s:
            self._say()

    def close(self) -> None:
        """Says the final state."""
        if self.is_terminal or self.done != self.said_done:
            self._say()
        if self.is_terminal:
            print(file=sys.stderr)

    @property
    def per_s(self) -> float:
        return self.done / max(time.monotonic() - self.began, 1e-9)

    def _say(self) -> None:
        self.said, self.said_done = time.monotonic(), self.done
        left = (self.total - self.done) / self.per_s if self.done else 0.0
        state = f"{left:.0f} s left" if self.done < self.total else f"in {self.said - self.began:.1f} s"
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {self.per_s:.1f}/s, {state}"
        if self.is_terminal:
            print(f"\r{line:<79}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
