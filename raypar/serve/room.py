"""A bound on how much is held in memory at a time: what does not fit waits its turn.

Runs in: the event loop of a Serve replica.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Room:
    """Holds things while their sizes add up to no more than its own; the rest waits in the order of arrival.

    Args:
        size: of the room. A thing that is larger counts as so large, and is held alone.
    """

    def __init__(self, size: int) -> None:
        self._size = self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def hold(self, size: int) -> AsyncIterator[None]:
        """Waits until there is room, and keeps it until the context ends."""
        size = min(size, self._size)
        await self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    async def _enter(self, size: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        place = (size, turn)
        self._waiting.append(place)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(place)
                self._admit()
            else:  # let in, and cancelled before it knew
                self._leave(size)
            raise

    def _leave(self, size: int) -> None:
        self._free += size
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting[0]
            if turn.cancelled():  # who waited removes it
                return
            self._waiting.popleft()
            self._free -= size
            turn.set_result(None)
