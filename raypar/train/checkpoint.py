"""A rank's exact state <-> a Ray Train checkpoint.

Runs in: every training worker; rank 0 writes, all ranks read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint

from raypar.train.loop import Loop

STATE = "state.pt"


@contextmanager
def saved(loop: Loop, *, cursor: int, history: list[dict[str, Any]], is_finished: bool) -> Iterator[Checkpoint]:
    """A local checkpoint directory with everything needed to go on exactly; it is removed when the context ends.

    Args:
        loop: whose state to keep: raw fp32 weights, EMA, optimizer, scaler, early stopping.
        cursor: positions of the plan that were seen.
        history: the lines of ``metrics.jsonl`` so far.
        is_finished: whether nothing is left to train (the last epoch, or early stopping).
    """
    state = {
        "cursor": cursor,
        "history": history,
        "is_finished": is_finished,
        "model": loop.lender.model.state_dict(),
        "ema": loop.ema.ema.state_dict(),
        "ema_updates": loop.ema.updates,
        "optimizer": loop.optimizer.state_dict(),
        "scaler": loop.scaler.state_dict(),
        "stopper": {k: v for k, v in vars(loop.stopper).items() if k != "patience"},
        "best_fitness": loop.best_fitness,
        "last_optimizer_step": loop.last_optimizer_step,
    }
    with tempfile.TemporaryDirectory(prefix="raypar-checkpoint-") as folder:
        torch.save(state, Path(folder) / STATE)
        yield Checkpoint.from_directory(folder)


def restore(loop: Loop, checkpoint: Checkpoint) -> tuple[int, list[dict[str, Any]], bool]:
    """Puts a checkpoint's state into a loop; returns the cursor, the history and whether training is finished."""
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / STATE, map_location=loop.device, weights_only=False)
    loop.lender.model.load_state_dict(state["model"])
    loop.ema.ema.load_state_dict(state["ema"])
    loop.ema.updates = state["ema_updates"]
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scaler.load_state_dict(state["scaler"])
    vars(loop.stopper).update(state["stopper"])
    loop.best_fitness = state["best_fitness"]
    loop.last_optimizer_step = state["last_optimizer_step"]
    return state["cursor"], state["history"], state["is_finished"]
