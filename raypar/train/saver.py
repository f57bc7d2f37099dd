"""Writing to storage beside the training: in order, one thing at a time, and again when the storage fails for a while.

Runs in: rank 0 of the training workers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from raypar.storage import LONGEST_PAUSE_S, patiently

END_S = 2 * LONGEST_PAUSE_S
MAX_WAITING = 2  # what may wait in memory: then training waits too


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
        """Writes what waits, without patience, and ends the thread; waits for it half a minute. Never raises; a second call does nothing."""
        self._is_ending = True
        deadline = time.monotonic() + END_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            with suppress(queue.Full):  # something hangs: the thread goes with the process
                self._work.put(None, timeout=0.1)
                self._thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    patiently(work[1], work[0], self.patience_s, stop=lambda: self._is_ending)
            except BaseException as error:  # raised where training looks: a thread's error is seen by nobody
                self._error = error
            finally:
                self._work.task_done()
