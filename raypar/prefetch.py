"""What a step needs is made one step ahead, in a thread; on a GPU on a stream of its own too, so that the model's never waits for a copy.

Runs in: training workers, for batches that Ray Data rendered (:func:`sent`) and for those that the device renders (:mod:`raypar.dataset.rendered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Made = TypeVar("Made")


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on a device; on a CPU they themselves.

    For a GPU each is copied once on the host, into pinned memory, and fetched from there by the caller's stream; the host waits for nothing. torch
    keeps pinned memory and gives it out again when the last copy from it has ended, so none is allocated after the first steps, and what was
    copied need not be kept.
    """
    if device.type != "cuda":
        return tensors
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in tensors.items()}


def sent(
    items: Iterable[Item], to_tensors: Callable[[Item], dict[str, Tensor]], device: torch.device
) -> Iterator[tuple[Item, dict[str, Tensor]]]:
    """Items with their tensors on the device: on a GPU one ahead of their use, on a CPU when they are asked for, by the caller."""

    def prepare(item: Item) -> tuple[Item, dict[str, Tensor]]:
        return item, to_device(to_tensors(item), device)

    return prefetched(items, prepare, device) if device.type == "cuda" else map(prepare, items)


def prefetched(  # noqa: C901
    items: Iterable[Item], prepare: Callable[[Item], Made], device: torch.device | str
) -> Iterator[Made]:
    """Prepares each item while the one before is in use: in a thread, and on a GPU on a stream of its own.

    Args:
        items: taken in the caller's thread, one ahead.
        prepare: makes a tensor, or a dict, list or tuple with tensors; runs in the thread, one item at a time and in order.
        device: of the tensors.

    Yields:
        What was made. On a GPU the caller's current stream waits for it; the host does not.
    """
    device = torch.device(device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if side is not None:
        # for what prepare will use: a ring that was just made
        side.wait_stream(torch.cuda.current_stream(device))

    def work(item: Item) -> tuple[Made, Any]:
        if side is None:
            return prepare(item), None
        with torch.cuda.device(device), torch.cuda.stream(side):
            made = prepare(item)
            return made, side.record_event()

    def hand_over(waiting: Future[tuple[Made, Any]]) -> Made:
        made, is_ready = waiting.result()
        if side is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(is_ready)
            for tensor in _tensors(made):
                # else its memory might be given away while the caller's stream still reads it
                tensor.record_stream(stream)
        return made

    waiting: Future[tuple[Made, Any]] | None = None
    try:
        with ThreadPoolExecutor(1, "prefetch") as thread:
            for item in items:
                following = thread.submit(work, item)
                if waiting is not None:
                    yield hand_over(waiting)
                waiting = following
            if waiting is not None:
                yield hand_over(waiting)
    finally:
        # what prepare used (a ring) may be freed now, and the caller's stream be given its memory
        if side is not None:
            torch.cuda.current_stream(device).wait_stream(side)


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        if made.is_cuda:
            yield made
    elif isinstance(made, dict | list | tuple):
        for part in made.values() if isinstance(made, dict) else made:
            yield from _tensors(part)
