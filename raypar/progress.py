"""How far a long piece of work is: a bar that is redrawn on a terminal, a line every few seconds elsewhere (logs, CI).

Runs in: the driver.
"""

from __future__ import annotations

import sys
import time

LINE_EVERY_S = 10.0
REWRITE_EVERY_S = 0.2
BAR, WIDTH = 20, 79  # characters


class Progress:
    """Counts what is done.

    Args:
        total: how much there is.
        unit: of the count, in the plural (``images``).
        label: what is being done.
        done: what was done before: no rate follows from it.
    """

    def __init__(self, total: int, unit: str, label: str, done: int = 0):
        self.total, self.unit, self.label = total, unit, label
        self.done, self.done_before, self.began = done, done, time.monotonic()
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
        return (self.done - self.done_before) / max(time.monotonic() - self.began, 1e-9)

    def _say(self) -> None:
        self.said, self.said_done = time.monotonic(), self.done
        state = f"{clock((self.total - self.done) / self.per_s)} left" if self.per_s else ""
        if self.done >= self.total:
            state = f"in {self.said - self.began:.1f} s"
        line = f"{self.label}: {self.done}/{self.total} {self.unit}, {self.per_s:.1f}/s, {state}"
        if self.is_terminal:
            full = round(BAR * self.done / self.total) if self.total else BAR
            bar = f"[{'#' * min(full, BAR):<{BAR}}]"
            line = f"{line.replace(': ', f' {bar} ', 1):<{WIDTH}}"[:WIDTH]
            # back to its start: what else is printed takes its place
            print(f"\r{line}\r", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A time as minutes and seconds, or hours, minutes and seconds."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
