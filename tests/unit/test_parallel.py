"""Two ranks (gloo): DDP reduces once an update, FSDP trains as DDP does, batch norm over ranks is that of the whole batch."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from ultralytics.nn.tasks import PoseModel

import raypar.train
from raypar.config import RunConfig, TrainConfig
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.train import checkpoint, parallel
from raypar.train.loop import Loop
from raypar.train.recipe import Lender, optimizer_of, settings

BATCH, IMGSZ, STEPS = 4, 64, 4
YOLO = {
    "epochs": 10,
    "imgsz": IMGSZ,
    "nbs": 4,
    "optimizer": "SGD",
    "lr0": 0.002,
    "warmup_epochs": 0.0,
    "deterministic": False,
}

# the smallest YOLO: a layer for each stride
TINY = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [width, 3, 2]] for width in (4, 8, 16, 16, 16)],
    "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
}


def make_loop(
    world_size: int = 1, spread: str = "ddp", sync_bn: bool = False, model: Any = "yolov8n.yaml", **yolo: Any
) -> Loop:
    manifest = Manifest(
        task="detect", class_names=("a", "b"), splits={"train": Split(num_images=BATCH * STEPS)}, source=""
    )
    device = torch.device("cpu")
    lender = Lender({**YOLO, **yolo}, model=model, manifest=manifest, batch=BATCH, seed=0, device=device)
    torch.set_num_threads(1)
    loop = Loop(
        lender,
        num_images=BATCH * STEPS,
        steps_per_epoch=STEPS,
        world_size=world_size,
        spread=spread,
        sync_bn=sync_bn,
    )
    loop.start_epoch()
    return loop


def make_batch(step: int, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    """A rank's share of a step's images, two boxes each."""
    rng = np.random.default_rng(step)
    share = BATCH // world_size
    mine = slice(rank * share, (rank + 1) * share)
    wh = rng.uniform(0.2, 0.5, (BATCH, 2, 2))
    boxes = np.concatenate([rng.uniform(wh / 2, 1 - wh / 2), wh], 2).astype(np.float32)
    return {
        "img": torch.from_numpy(rng.integers(0, 256, (BATCH, 3, IMGSZ, IMGSZ), np.uint8)[mine].copy()),
        "cls": torch.from_numpy(rng.integers(0, 2, (BATCH, 2))[mine].reshape(-1, 1)).float(),
        "bboxes": torch.from_numpy(boxes[mine].reshape(-1, 4)),
        "batch_idx": torch.arange(share).repeat_interleave(2).float(),
    }


def trained(loop: Loop, rank: int, steps: range) -> list[float]:
    losses = []
    for step in steps:
        total = sum(loop.step(make_batch(step, rank, loop.world_size), step).values())
        losses.append(float(total))
    return losses


def _ranks(rank: int, folder: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    counts = {"reductions": 0, "bytes": 0}

    def counting(_: None, bucket: dist.GradBucket) -> Any:
        counts["reductions"] += 1
        counts["bytes"] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]

    counting.__annotations__.clear()  # torch wants the types themselves, or none
    ddp = make_loop(2)
    ddp.model.register_comm_hook(None, counting)
    found["ddp losses"] = trained(ddp, rank, range(STEPS))
    found["ddp"] = checkpoint.capture(ddp, has_gradients=False)
    found["gradient bytes"] = sum(p.numel() * 4 for p in ddp.lender.model.parameters() if p.requires_grad)
    counts["bytes"] = 0
    ddp.accumulate = ddp.nominal_accumulate = 2
    trained(ddp, rank, range(STEPS, STEPS + 2))
    found["bytes of an update after two steps"] = counts["bytes"]

    fsdp = make_loop(2, "fsdp")
    share = sum(p.to_local().numel() for p in fsdp.lender.model.parameters())  # type: ignore[attr-defined]
    found["share"] = share / sum(p.numel() for p in fsdp.lender.model.parameters())
    found["fsdp losses"] = trained(fsdp, rank, range(STEPS))
    states = [checkpoint.capture(fsdp, has_gradients=False)]
    dist.broadcast_object_list(states, 0)  # in a training each rank reads it from storage
    found["fsdp"] = states[0]
    found["fsdp goes on"] = trained(fsdp, rank, range(STEPS, STEPS + 2))
    again = make_loop(2, "fsdp")
    checkpoint.restore(again, states[0])
    found["fsdp resumes"] = trained(again, rank, range(STEPS, STEPS + 2))

    over_ranks = make_loop(2, sync_bn=True)
    found["sync losses"] = trained(over_ranks, rank, range(2))
    found["sync"] = checkpoint.capture(over_ranks, has_gradients=False)
    found["fsdp sync losses"] = trained(make_loop(2, "fsdp", sync_bn=True), rank, range(2))
    results[rank] = found
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_ranks, (str(tmp_path_factory.mktemp("store")), results), nprocs=2)
        return [results[rank] for rank in (0, 1)]


def test_weights_that_only_the_loss_uses_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match=r"train\.parallel=ddp"):
        parallel.spread_fsdp(
            PoseModel("yolo26n-pose.yaml", data_kpt_shape=(3, 3), verbose=False), torch.device("cpu")
        )


def assert_close(mine: dict[str, Tensor], other: dict[str, Tensor], atol: float) -> None:
    assert list(mine) == list(other)
    for name, value in mine.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-3, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradients_are_reduced_once_an_update(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["bytes of an update after two steps"] == found["gradient bytes"]


def test_fsdp_trains_as_ddp_does_and_each_rank_holds_half(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["fsdp losses"] == pytest.approx(found["ddp losses"], rel=1e-4)
        assert found["ddp losses"][0] != found["ddp losses"][-1]
    assert sum(found["share"] for found in two) == pytest.approx(1.0)
    assert 0.4 < two[0]["share"] < 0.6
    for part in ("model", "ema"):
        assert_close(two[0]["fsdp"][part], two[0]["ddp"][part], 1e-5)


def test_fsdp_resumes_with_the_same_bits_and_on_one_rank(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["fsdp resumes"] == found["fsdp goes on"]
    alone = make_loop(1, "fsdp")
    checkpoint.restore(alone, two[0]["fsdp"])
    state = checkpoint.capture(alone, has_gradients=False)
    for part in ("model", "ema"):
        assert_close(state[part], two[0]["fsdp"][part], 0.0)
    for name, value in two[0]["fsdp"]["optimizer"]["state"].items():
        assert torch.equal(state["optimizer"]["state"][name]["momentum_buffer"], value["momentum_buffer"]), (
            name
        )
    assert all(np.isfinite(trained(alone, 0, range(STEPS, STEPS + 1))))


def test_batch_norm_over_two_ranks_is_that_of_the_whole_batch(two: list[dict[str, Any]]) -> None:
    whole = make_loop(1)
    trained(whole, 0, range(2))
    assert two[0]["sync losses"] != two[1]["sync losses"]
    for found in two:
        assert found["fsdp sync losses"] == pytest.approx(found["sync losses"], rel=1e-4)
    state = checkpoint.capture(whole, has_gradients=False)
    names = [name for name in state["model"] if "running" in name]
    for name in names:
        torch.testing.assert_close(two[1]["sync"]["model"][name], state["model"][name], rtol=1e-3, atol=1e-4)
        assert torch.equal(two[0]["sync"]["model"][name], two[1]["sync"]["model"][name])
    name = names[0]
    # each rank's own, without it
    assert not torch.allclose(two[0]["ddp"]["model"][name], two[1]["ddp"]["model"][name], rtol=1e-3)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_the_fused_optimizer_takes_the_same_steps(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make_loop(optimizer=optimizer)
    assert mine.optimizer.defaults["fused"]
    monkeypatch.setattr(parallel, "fused", lambda plain, **_: plain)
    plain = make_loop(optimizer=optimizer)
    assert not plain.optimizer.defaults["fused"]
    keys = ("lr", "momentum", "betas", "weight_decay", "nesterov", "param_group", "initial_lr")
    assert [[g.get(k) for k in keys] for g in mine.optimizer.param_groups] == [
        [g.get(k) for k in keys] for g in plain.optimizer.param_groups
    ]
    assert trained(mine, 0, range(3)) == pytest.approx(trained(plain, 0, range(3)), rel=1e-4)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_that_overflows_leaves_no_trace(kind: type[torch.optim.Optimizer]) -> None:
    """fp16's first steps overflow on purpose: torch's fused SGD would go on with momentum that nobody has set."""
    how: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
    layers = [nn.Linear(64, 64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [kind(layer.parameters(), lr=0.1, **how) for layer in layers]  # type: ignore[call-arg]
    optimizers[0] = parallel.fused(optimizers[0], is_scaled=True)
    for values in ((float("inf"), 1.0, -2.0), (1.0, -2.0)):  # only one of the two sees the overflow
        layer, optimizer = layers.pop(0), optimizers.pop(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for value in values:
            before = layer.weight.clone()
            scaler.scale(layer(torch.full((1, 64), value)).sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(layer.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(before, layer.weight) == (value == float("inf"))
        layers.append(layer)
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_compiling_leaves_names_and_losses_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_model, asked = torch.compile, []

    # the graph is captured; no machine code, which takes a minute
    def eagerly(model: nn.Module, **how: Any) -> Any:
        asked.append(how)
        return compile_model(model, backend="eager", dynamic=how["dynamic"])

    monkeypatch.setattr(torch, "compile", eagerly)
    plain, compiled = make_loop(), make_loop(compile=True)
    assert asked == [{"mode": "default", "dynamic": False}]
    assert type(compiled.model).__name__ == "OptimizedModule"
    assert trained(compiled, 0, range(2)) == pytest.approx(trained(plain, 0, range(2)), rel=1e-3)
    state = checkpoint.capture(compiled, has_gradients=False)
    assert list(state["model"]) == list(checkpoint.capture(plain, has_gradients=False)["model"])


def test_no_compiler_and_what_does_not_go_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor.cpp_builder as builder

    monkeypatch.setattr(builder, "get_cpp_compiler", lambda: (_ for _ in ()).throw(RuntimeError("none")))
    with pytest.raises(ValueError, match=r"train\.yolo\.compile.*install g\+\+"):
        parallel.compiled(nn.Linear(1, 1), True, is_multi_scale=False, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"yolo\.compile goes with neither"):
        TrainConfig(parallel="fsdp", yolo={"compile": True})


# 4 steps each
@pytest.mark.parametrize(("name", "epochs"), [("musgd", 10), ("SGD", 10), ("auto", 2500), ("auto", 2501)])
def test_the_driver_knows_which_optimizer_the_workers_get(name: str, epochs: int) -> None:
    loop = make_loop(optimizer=name, epochs=epochs)
    args = settings({**YOLO, "optimizer": name, "epochs": epochs}, batch=BATCH)
    assert optimizer_of(args, BATCH * STEPS) is type(loop.optimizer)
    assert (args.optimizer, args.lr0) == (name, YOLO["lr0"]), "it only asks"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"yolo": {"optimizer": "MuSGD"}}, r"optimizer=MuSGD, and that .*: write train\.yolo\.optimizer=SGD"),
        (
            {"yolo": {"epochs": 1001}},
            r"optimizer=auto takes MuSGD for 10,010 steps, and that needs whole matrices: write",
        ),
        ({"yolo": {"epochs": 1001}, "num_workers": {"min": 1, "max": 2}}, "optimizer=auto takes MuSGD"),
        ({"yolo": {"epochs": 1000}}, None),
        ({"yolo": {"epochs": 1001, "fraction": 0.5}}, None),
        ({"yolo": {"epochs": 1001}, "num_workers": 1}, None),
        ({"yolo": {"epochs": 1001, "optimizer": "AdamW"}}, None),
        ({"yolo": {"epochs": 1001}, "parallel": "ddp"}, None),
        (
            {"yolo": {"optimizer": "Adma"}, "parallel": "ddp"},
            r"train\.yolo\.optimizer: Optimizer 'Adma' not found",
        ),
    ],
)
def test_what_fsdp_cannot_do_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], said: str | None
) -> None:
    section = {"model": "yolov8n.yaml", "parallel": "fsdp", "num_workers": 2, **train}
    config = RunConfig.model_validate({"name": "x", "storage": str(tmp_path), "train": section})
    shard = Shard(path="train/00000.parquet", num_bytes=1, sha256="", row_groups=(320, 320))
    Manifest(
        task="detect", class_names=("a",), splits={"train": Split(shards=(shard,), num_images=640)}, source=""
    ).save(config.dataset_folder)
    monkeypatch.setattr(raypar.train.verify, "check_sizes", lambda *_: None)
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        raypar.train.check(config)
