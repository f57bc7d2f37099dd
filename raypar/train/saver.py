"""Writing to storage beside the training: in order, one thing at a time, and again when the storage fails for a while.

Runs in: rank 0 of the training workers (:class:`Saver`), any process (:func:`patiently`).
"""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

MAX_WAITING = 2  # what may wait in memory: then training waits too
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 15.0
Result = TypeVar("Result")
# Trying again does not mend these.
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class OutOfDiskError(RuntimeError):
    """There is no room left to write in."""


def patiently(do: Callable[[], Result], what: str, patience_s: float, *, stop: Callable[[], bool] = lambda: False) -> Result:
    """Does something with storage; when that fails, again after 0.5, 1, 2 ... 15 seconds, and each failure is reported.

    Args:
        do: may be called again.
        what: for the reports, as "write checkpoint_0000000096".
        patience_s: from the first failure on.
        stop: ends the patience early.

    Raises:
        OutOfDiskError: the disk or the quota is full.
        OSError: the last failure, when patience is at its end, or one that no repetition mends.
    """
    failed_since: float | None = None
    pause = FIRST_PAUSE_S
    for attempt in range(1, 1_000_000):
        try:
            return do()
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason:
                raise OutOfDiskError(f"no space is left to {what}: {reason}") from error
            now = time.monotonic()
            failed_since = now if failed_since is None else failed_since
            left = patience_s - (now - failed_since)
            if isinstance(error, FINAL) or left <= 0 or stop():
                raise
            pause = min(pause, left)
            print(f"train: cannot {what} (attempt {attempt}; given up in {left:.0f} s): {reason}; again in {pause:.1f} s", flush=True)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    raise AssertionError


class Saver:
    """A thread that writes what it is given.

    Args:
        patience_s: how long each piece of work is tried again.
    """

    def __init__(self, patience_s: float):
        self.patience_s = patience_s
        self._work: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._is_ending = False
        self._thread = threading.Thread(target=self._run, name="raypar-saver", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether something is being written or waits to be."""
        return self._work.unfinished_tasks > 0

    def submit(self, what: str, do: Callable[[], object]) -> None:
        """Hands over a piece of work; waits while too many are waiting.

        Raises:
            OSError, OutOfDiskError: an earlier one failed for good.
        """
        self.check()
        self._work.put((what, do))

    def check(self) -> None:
        """Raises the error of a piece of work that failed for good."""
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError, OutOfDiskError: a piece of work failed for good.
        """
        self._work.join()
        self.check()

    def end(self) -> None:
        """Writes what waits, without patience, and ends the thread."""
        self._is_ending = True
        self._work.put(None)
        self._thread.join(timeout=LONGEST_PAUSE_S * 2)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    patiently(work[1], work[0], self.patience_s, stop=lambda: self._is_ending)
            except BaseException as error:  # raised where training looks: a thread's error is seen by nobody
                self._error = error
            finally:
                self._work.task_done()
