"""Joins requests of many clients into batches, whenever the model is free.

Runs in: a Serve replica's event loop. ``ray.serve.batch`` closes a batch as soon as its wait is over, even while the model is still
busy with the last one: under load the batches that queue up behind the model stay small. Here all that came in meanwhile is taken at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """An awaitable function of one item, computed in batches by one worker thread.

    Args:
        run: items -> one result or exception each, in order; called on ``executor``, never twice at a time.
        executor: of one thread.
        max_size: the largest batch.
        wait_s: how long a free model waits for a batch to fill, from its first item on.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R | Exception]],
        executor: Executor,
        max_size: int,
        wait_s: float,
    ) -> None:
        self._run, self._executor, self._max_size, self._wait_s = run, executor, max_size, wait_s
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        """The item's result. Cancelling the call takes the item out of the queue.

        Raises:
            Exception: the one that ``run`` returned for this item.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        self._arrived.set()
        if len(self._waiting) >= self._max_size:
            self._full.set()
        return await future

    @property
    def is_alive(self) -> bool:
        """Whether items that come in will be worked on."""
        return self._task is None or not self._task.done()

    async def _work(self) -> None:
        while True:
            await self._arrived.wait()
            with contextlib.suppress(TimeoutError):  # then run what is there
                await asyncio.wait_for(self._full.wait(), self._wait_s)
            batch = self._take()
            if batch:
                await self._settle(batch)

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting and len(batch) < self._max_size:
            item, future = self._waiting.popleft()
            if not future.done():  # cancelled: nobody waits for it
                batch.append((item, future))
        if not self._waiting:
            self._arrived.clear()
        if len(self._waiting) < self._max_size:
            self._full.clear()
        return batch

    async def _settle(self, batch: Sequence[tuple[T, asyncio.Future[R]]]) -> None:
        results: Sequence[R | Exception]
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._run, [item for item, _ in batch]
            )
            assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
        except Exception as error:
            results = [error] * len(batch)
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
