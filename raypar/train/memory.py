"""Out of memory: how many images would fit, found by trying. Runs in: every training worker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from raypar.train.failure import OutOfMemoryError, is_out_of_memory

STATES_PER_WEIGHT = 2  # AdamW's; made at the first update, so not yet there when the first step fails


@contextmanager
def advice(loop: Any, batch: dict[str, Tensor], *, world_size: int, who: str) -> Iterator[None]:
    """Turns a step's lack of memory into an error that names the batch that fits.

    Args:
        loop: whose step it is.
        batch: this rank's share.
        world_size: ranks.
        who: the rank, for the message.

    Raises:
        OutOfMemoryError: the step did not fit.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the handler, so that nothing of the failed step is held by its traceback.
    num_images = len(batch["img"])
    what = f"{who}: out of memory on {loop.device} with {num_images} images a worker (train.batch={num_images * world_size})"
    if loop.is_sharded:  # trying would need the other ranks
        raise OutOfMemoryError(f"{what}: take a smaller train.batch, or more workers")
    fits = largest_that_fits(loop, batch)
    if not fits:
        raise OutOfMemoryError(
            f"{what}; not even one image fits: take a smaller train.yolo.imgsz or a smaller train.model"
        )
    raise OutOfMemoryError(
        f"{what}; {fits} fit: train.batch={fits * world_size}, more workers, or a smaller train.yolo.imgsz"
    )


def largest_that_fits(loop: Any, batch: dict[str, Tensor]) -> int:
    """The largest half, quarter ... of a batch whose forward and backward pass fit beside the optimizer's state; 0 when none does."""
    num_images = len(batch["img"]) // 2
    while num_images:
        loop.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if loop.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            _try(loop, first_images(batch, num_images))
            return num_images
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                return 0  # whatever it is, it is no answer
        num_images //= 2
    return 0


def first_images(batch: dict[str, Tensor], num_images: int) -> dict[str, Tensor]:
    """A batch's first images, with what belongs to them."""
    if "batch_idx" not in batch:
        return {name: value[:num_images] for name, value in batch.items()}
    mine = batch["batch_idx"] < num_images
    per_image = {"img", "masks", "sem_masks"}
    return {name: value[:num_images] if name in per_image else value[mine] for name, value in batch.items()}


def _try(loop: Any, batch: dict[str, Tensor]) -> None:
    states = [torch.empty_like(p) for p in loop.lender.model.parameters() for _ in range(STATES_PER_WEIGHT)]
    batch = loop.lender.preprocess_batch(batch, loop.precision)
    with torch.autocast(loop.device.type, loop.precision, enabled=loop.precision != torch.float32):
        loss, _ = loop.lender.model.loss(batch)
    loss.sum().backward()
    del states
