"""Joins requests of many clients into batches, whenever the model is free.

Runs in: a Serve replica's event loop. ``ray.serve.batch`` closes a batch as soon as its wait is over, even while the model is still
busy with the last one: under load the batches that queue up behind the model stay small. Here a model that becomes free takes all
that came in meanwhile, and starts at once unless the oldest of them has not waited ``wait_s`` yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Waiting(Generic[T, R]):
    """An item in the queue, when it arrived (the loop's clock), and where its result goes."""

    item: T
    arrived: float
    future: asyncio.Future[R]


class Batcher(Generic[T, R]):
    """An awaitable function of one item, computed in batches by one worker thread.

    Args:
        run: items -> one result or exception each, in order; called on ``executor``, never twice at a time.
        executor: of one thread.
        max_size: the largest batch.
        wait_s: seconds after its arrival until which an item waits for others to fill its batch; 0: a free model starts at once.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R | Exception]],
        executor: Executor,
        max_size: int,
        wait_s: float,
    ) -> None:
        self._run, self._executor, self._max_size, self._wait_s = run, executor, max_size, wait_s
        self._waiting: deque[_Waiting[T, R]] = deque()
        self._arrived, self._full = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, item: T) -> R:
        """The item's result. Cancelling the call takes the item out of the queue.

        Raises:
            Exception: the one that ``run`` returned for this item.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()
        self._waiting.append(_Waiting(item, loop.time(), future))
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
            await self._fill()
            batch = self._take()
            if batch:
                await self._settle(batch)

    async def _fill(self) -> None:
        """Waits until there is a whole batch, or the oldest item has waited long enough."""
        deadline = self._waiting[0].arrived + self._wait_s
        if deadline <= asyncio.get_running_loop().time():
            return
        with contextlib.suppress(TimeoutError):  # then run what is there
            async with asyncio.timeout_at(deadline):
                await self._full.wait()

    def _take(self) -> list[_Waiting[T, R]]:
        batch: list[_Waiting[T, R]] = []
        while self._waiting and len(batch) < self._max_size:
            oldest = self._waiting.popleft()
            if not oldest.future.done():  # cancelled: nobody waits for it
                batch.append(oldest)
        if not self._waiting:
            self._arrived.clear()
        if len(self._waiting) < self._max_size:
            self._full.clear()
        return batch

    async def _settle(self, batch: Sequence[_Waiting[T, R]]) -> None:
        results: Sequence[R | Exception]
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._run, [waiting.item for waiting in batch]
            )
            assert len(results) == len(batch), f"{len(results)} results for {len(batch)} items"
        except Exception as error:
            results = [error] * len(batch)
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
