"""Ranks that exchange no gradients are noticed, whatever the optimizer, the warm-up and what a run resumes from; ranks that do are left alone.

Two processes (gloo) train a small YOLO, once under DDP and once with a wrapper in its place that exchanges nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_parallel import TINY, make_batch
from test_parallel import make_loop as make_any_loop
from torch import Tensor, nn
from torch import distributed as dist

from raypar.train import checkpoint, parallel
from raypar.train.parallel import SynchronisationCheck

ADDS_UP, WARMS_UP = {"nbs": 16}, {"warmup_epochs": 3.0}
CASES: dict[str, dict[str, Any]] = {
    **{name: WARMS_UP for name in ("SGD", "AdamW", "Adam", "Adamax", "NAdam", "RAdam", "RMSProp")},
    "MuSGD": {**WARMS_UP, "optimizer": "MuSGD"},
    "auto, a short run": {**WARMS_UP, "optimizer": "auto"},
    "auto, a long run": {**WARMS_UP, "optimizer": "auto", "epochs": 2501},
    "SGD, no warm-up, four steps added up": {**ADDS_UP, "optimizer": "SGD"},
    "auto, four steps added up": {**WARMS_UP, **ADDS_UP, "optimizer": "auto"},
}
FINE = ("SGD", "auto, a long run", "auto, four steps added up")  # that are trained under DDP too
STEPS = 6


def make_loop(*arguments: Any, **more: Any) -> Any:
    return make_any_loop(*arguments, model=TINY, **more)


class Apart(nn.Module):
    """Where DDP should be: every rank keeps its gradients."""

    def __init__(self, model: nn.Module, _: torch.device):
        super().__init__()
        self.module = model
        self.no_sync = nullcontext

    def forward(self, images: Tensor) -> Any:
        return self.module(images)


def outcome(rank: int, first: int = 0, state: dict[str, Any] | None = None, **more: Any) -> str:
    """Whether a loop is found to train ``well`` or ``apart``; ``unknown`` when no step tells."""
    loop = make_loop(2, **more)
    if state is not None:
        checkpoint.restore(loop, state)
    check = SynchronisationCheck(loop)
    for step in range(first, first + STEPS):
        message = _message(lambda step=step: loop.step(make_batch(step, rank, 2), step))  # type: ignore[misc]
        if message:
            return "apart" if "gradients differ" in message else message
        if loop.inspect_gradients is None:
            check.compare_weights()
            return "well"
    return "unknown"


def _ranks(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    together = parallel.spread_ddp
    half_way = make_loop(2, **ADDS_UP)
    for step in range(5):  # an update, then gradients that wait
        half_way.step(make_batch(step, rank, 2), step)
    checkpoint.fold_gradients(half_way)
    waiting = checkpoint.capture(half_way, has_gradients=True)
    assert waiting["gradients"]
    for how, spread, names in (("well", together, FINE), ("apart", Apart, CASES)):
        parallel.spread_ddp = spread  # type: ignore[assignment]
        for name in names:
            found[how, name] = outcome(rank, **{"optimizer": name, **CASES[name]})
        found[how, "resumed"] = outcome(rank, 5, waiting, **ADDS_UP)
    parallel.spread_ddp = together

    found["well", "fsdp"] = outcome(rank, spread="fsdp", **WARMS_UP)
    sharded = make_loop(2, "fsdp")
    check = SynchronisationCheck(sharded)
    sharded.model.set_requires_gradient_sync(False)  # no share of a gradient ever arrives
    found["no gradients"] = _message(lambda: sharded.step(make_batch(0, rank, 2), 0))
    whole = make_loop(2)
    weights = SynchronisationCheck(whole).compare_weights, check.compare_weights
    for name, loop, compare in (
        ("weights", whole.lender.model, weights[0]), ("averages", sharded.ema.ema, weights[1]),
    ):  # fmt: skip
        largest = max(float(p.detach().abs().max()) for p in loop.parameters())
        for how, part in (("rounded", 1e-6), ("far", 0.1)):
            with torch.no_grad():
                next(loop.parameters()).view(-1)[0] += rank * part * largest
            found[name, how] = _message(compare)
    results[rank] = found
    dist.destroy_process_group()


def _message(do: Any) -> str:
    try:
        do()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two ranks found."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_ranks, (str(tmp_path_factory.mktemp("store")), results), nprocs=2)
        return [results[rank] for rank in (0, 1)]


@pytest.mark.parametrize("name", [*CASES, "resumed"])
def test_ranks_that_exchange_no_gradients_are_noticed(found: list[dict[Any, Any]], name: str) -> None:
    assert [each["apart", name] for each in found] == ["apart", "apart"]


@pytest.mark.parametrize("name", [*FINE, "resumed", "fsdp"])
def test_ranks_that_do_are_left_alone(found: list[dict[Any, Any]], name: str) -> None:
    assert [each["well", name] for each in found] == ["well", "well"]


@pytest.mark.parametrize("name", ["weights", "averages"])
def test_weights_may_differ_by_rounding_alone(found: list[dict[Any, Any]], name: str) -> None:
    """Averages: of a sharded model, the only ones that each rank holds whole."""
    for each in found:
        assert each[name, "rounded"] == ""
        assert "weights differ by" in each[name, "far"]


def test_gradients_that_never_arrive_are_noticed(found: list[dict[Any, Any]]) -> None:
    assert all("no gradients" in each["no gradients"] for each in found)
