"""The worker's own decisions, without Ray: what is saved when, and what single_cls makes of a batch."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raypar.dataset.plan import Plan
from raypar.train import worker as module
from raypar.train.agree import Agreement
from raypar.train.worker import Worker

BATCH, STEPS = 4, 12


def make_worker(monkeypatch: pytest.MonkeyPatch, **args: Any) -> Worker:
    """Rank 0 of one, whose steps do nothing."""
    worker = object.__new__(Worker)
    worker.rank, worker.world_size, worker.cursor, worker.asked = 0, 1, 0, set()
    worker.plan = Plan((BATCH * STEPS,), seed=0, global_batch=BATCH, epochs=2)
    worker.args = SimpleNamespace(**{"seed": 0, "single_cls": False, "compile": False, "epochs": 2, **args})
    worker.pulse = SimpleNamespace(stage="", cursor=0, wishes=set)  # type: ignore[assignment]
    worker.precision = torch.float32
    worker.epoch = SimpleNamespace(lap=lambda _: None, stepped=lambda *_: None, reduced=lambda _: {})  # type: ignore[assignment]
    worker.agreement, worker.finite = (
        Agreement(1, 10.0),
        SimpleNamespace(push=lambda _: None, is_broken=False),
    )  # type: ignore[assignment]
    worker.saver = SimpleNamespace(check=lambda: None, is_busy=False)  # type: ignore[assignment]
    worker.saved_at, worker.saved_cursor = 0.0, -1
    monkeypatch.setattr(module.say, "progress", lambda *_: None)
    monkeypatch.setattr(module.memory, "advice", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module.pictures, "wants", lambda *_: False)
    return worker


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_checkpoint_by_time_is_written_once(monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """The clock is checked at each step, and what it says is known to all ranks a step later."""
    worker = make_worker(monkeypatch)
    now = iter(range(1000))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(now)))  # a second a look at the clock
    worker.train = {"checkpoint_every_s": 5.5}
    steps = [SimpleNamespace(epoch=0, step=step) for step in range(STEPS - 1)]
    worker.loop = SimpleNamespace(start_epoch=lambda: None, last_optimizer_step=-1, is_sharded=False)  # type: ignore[assignment]
    saved: list[int] = []

    def step(batch: Any, tensors: Any, number: int) -> dict[str, Any]:
        if number % accumulate == accumulate - 1:
            worker.loop.last_optimizer_step = number
        worker.cursor += BATCH
        return {}

    def save(*_: Any, **__: Any) -> None:
        saved.append(worker.cursor // BATCH)
        worker.saved_at, worker.saved_cursor = module.time.monotonic(), worker.cursor
        worker.asked.discard("save")

    monkeypatch.setattr(worker, "_batches", lambda: iter([(batch, {}) for batch in steps]))
    monkeypatch.setattr(worker, "_step", step)
    monkeypatch.setattr(worker, "_save", save)
    assert not worker._train()
    assert saved, "it was due"
    assert all(b - a > 1 for a, b in pairwise(saved)), saved
    assert all(step % accumulate == 0 for step in saved), saved
    assert len(saved) <= 2, saved


def test_single_cls_leaves_one_class_to_the_pixels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make_worker(monkeypatch, single_cls=True)
    worker.rank = 1  # rank 0 draws pictures
    seen: list[dict[str, torch.Tensor]] = []
    worker.loop = SimpleNamespace(step=lambda tensors, _: seen.append(tensors) or {}, last_optimizer_step=-1)  # type: ignore[assignment]
    tensors = {
        "cls": torch.tensor([[2.0], [1.0]]),
        "sem_masks": torch.full((1, 2, 2), 2.0),
        "masks": torch.ones(1, 2, 2),
    }
    worker._step(SimpleNamespace(epoch=0, step=0), tensors, 0)  # type: ignore[arg-type]
    assert not seen[0]["cls"].any()
    assert not seen[0]["sem_masks"].any()
    assert seen[0]["masks"].all()
