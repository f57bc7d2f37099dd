"""How the ranks agree, without waiting for one another: what one rank wishes, all do at the same step.

Runs in: every training worker. A wish travels on a process group of its own (gloo, on CPUs), as a collective that is started at
one step and read at the next: so no step waits for it, and no device is synchronised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WISHES = ("save", "stop", "preempted", "grow", "nan")


class Agreement:
    """One rank's end of it.

    Args:
        world_size: ranks; above 1 a process group must be up.
        timeout_s: how long a rank waits for the others.
    """

    def __init__(self, world_size: int, timeout_s: float):
        self.world_size = world_size
        self.group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if world_size > 1 else None
        )
        self._under_way: tuple[Any, Tensor] | None = None

    def step(self, wishes: Collection[str]) -> set[str]:
        """Posts this rank's wishes; returns those that any rank had one step ago, the same on every rank."""
        agreed = self.last()
        flags = torch.tensor([int(name in wishes) for name in WISHES], dtype=torch.int32)
        work = (
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
            if self.world_size > 1
            else None
        )
        self._under_way = work, flags
        return agreed

    def last(self) -> set[str]:
        """What was posted last, by any rank; nothing when it was read before."""
        if self._under_way is None:
            return set()
        work, flags = self._under_way
        self._under_way = None
        if work is not None:
            work.wait()
        return {name for name, flag in zip(WISHES, flags.tolist(), strict=True) if flag}

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the CPU, in place. Waits."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank. Waits."""
        return bool(self.sum(torch.tensor([int(flag)])).item())

    def from_rank_zero(self, value: Any) -> Any:
        """Rank 0's value, on every rank. Waits."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]


class FiniteWatch:
    """Notices numbers that are not finite, some steps later on a GPU: the device is asked and not waited for.

    Args:
        patience: how many in a row it takes.
    """

    def __init__(self, patience: int = 1) -> None:
        self.patience = patience
        self.is_broken = False
        self._in_a_row = 0
        self._asked: deque[tuple[Any, Tensor]] = deque()

    def push(self, values: Mapping[str, Tensor]) -> None:
        """Takes in what belongs to one step, e.g. its losses (0-d, on the device)."""
        total = torch.stack([value.float() for value in values.values()]).sum()
        if not total.is_cuda:
            self._judge(total)
            return
        copy = torch.empty((), pin_memory=True)
        copy.copy_(total, non_blocking=True)
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._asked.append((event, copy))
        while self._asked and self._asked[0][0].query():
            self._judge(self._asked.popleft()[1])

    def _judge(self, total: Tensor) -> None:
        self._in_a_row = 0 if bool(torch.isfinite(total)) else self._in_a_row + 1
        self.is_broken |= self._in_a_row >= self.patience
