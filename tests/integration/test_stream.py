"""The stream through Ray: every rank gets what the plan says, once each, byte for byte, from any cursor."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raypar.prepare
from raypar.augment.geometry import Recipe
from raypar.config import RunConfig
from raypar.dataset.batch import Batch, pack, unpack
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, render
from tests.runs import fit

EPOCHS, GLOBAL_BATCH = 3, 8
RECIPE = Recipe(imgsz=64, mosaic=1.0, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5)
pytestmark = pytest.mark.usefixtures("ray_4_cpus")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, ray_4_cpus: None) -> RunConfig:
    config = RunConfig.model_validate(
        {
            "name": "stream",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "prepare": {
                "format": "shapes",
                "shapes": {"train": 45, "val": 4, "height": 48, "width": 64},
                "rows_per_group": 6,
            },
        }
    )
    raypar.prepare.run(config)
    return config


def make_spec(config: RunConfig, world_size: int, window_images: int = 16) -> StreamSpec:
    folder = config.folder / "dataset"
    split = Manifest.load(folder).split("train")
    groups = tuple(n for shard in split.shards for n in shard.row_groups)
    plan = Plan(groups, seed=1, global_batch=GLOBAL_BATCH, epochs=EPOCHS, window_images=window_images)
    return StreamSpec.of(
        folder, split, plan, RECIPE, mosaic_epochs=2, albumentations=None, world_size=world_size
    )


def whole(spec: StreamSpec, cursor: int = 0) -> list[Batch]:
    """The whole stream, rendered in this process, in the order of steps and ranks."""
    batches = (batch for item in spec.plan.items(cursor) for batch in render(spec, item))
    return sorted(batches, key=lambda b: (b.epoch, b.step, b.rank))


def through_ray(spec: StreamSpec, cursor: int, storage: Path, loop: Any = None) -> Any:
    """For each rank, the batches that its training worker was dealt; or what another ``loop`` returns."""

    def train_loop(config: dict[str, Any]) -> Any:
        import zlib

        import ray.train
        import torch.distributed as dist

        from raypar.dataset.stream import batches

        rank = ray.train.get_context().get_world_rank()
        mine = [
            {"epoch": b.epoch, "step": b.step, "rows": b.rows.tolist(), "crc": zlib.crc32(b.images.copy())}
            for b in batches(config["spec"], rank, config["cursor"])
        ]
        every: list[Any] = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
        return every if rank == 0 else None

    return fit(loop or train_loop, {"spec": spec, "cursor": cursor}, spec.world_size, storage)


def crc(batch: Batch) -> int:
    return zlib.crc32(batch.images.copy())


def test_two_ranks_see_the_split_once_an_epoch_exactly_as_planned(dataset: RunConfig, tmp_path: Path) -> None:
    spec = make_spec(dataset, world_size=2)
    dealt = through_ray(spec, 0, tmp_path)
    expected = whole(spec)
    assert len(dealt) == 2
    for rank in range(2):
        planned = [b for b in expected if b.rank == rank]
        assert [(b["epoch"], b["step"], b["rows"], b["crc"]) for b in dealt[rank]] == [
            (b.epoch, b.step, b.rows.tolist(), crc(b)) for b in planned
        ]
    for epoch in range(EPOCHS):
        steps = [[b["rows"] for b in dealt[rank] if b["epoch"] == epoch] for rank in range(2)]
        rows = np.concatenate([np.concatenate([*pair]) for pair in zip(*steps, strict=True)])
        assert sorted(rows[:45]) == list(range(45))
        assert len(rows) == 48


def test_a_stream_from_a_cursor_is_the_tail_of_the_whole(dataset: RunConfig, tmp_path: Path) -> None:
    spec = make_spec(dataset, world_size=1)
    # in the middle of the second epoch's second window
    cursor = GLOBAL_BATCH * (spec.plan.steps_per_epoch + 3)
    (dealt,) = through_ray(spec, cursor, tmp_path)
    tail = whole(spec)[cursor // GLOBAL_BATCH :]
    assert [(b["epoch"], b["step"], b["crc"]) for b in dealt] == [(b.epoch, b.step, crc(b)) for b in tail]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_workers_sees_the_same_global_batches(dataset: RunConfig, world_size: int) -> None:
    alone, shared = whole(make_spec(dataset, 1)), whole(make_spec(dataset, world_size))
    for step, one in enumerate(alone):
        parts = shared[step * world_size : (step + 1) * world_size]
        assert np.array_equal(one.images, np.concatenate([p.images for p in parts]))
        assert np.array_equal(one.boxes_xywhn, np.concatenate([p.boxes_xywhn for p in parts]))
        assert np.array_equal(one.class_ids, np.concatenate([p.class_ids for p in parts]))


def test_a_batch_survives_packing(dataset: RunConfig) -> None:
    spec = make_spec(dataset, 1)
    batch = next(render(spec, next(spec.plan.items())))
    (again,) = unpack(pack([batch]))
    assert (again.epoch, again.step, again.rank) == (batch.epoch, batch.step, batch.rank)
    for name in ("images", "class_ids", "boxes_xywhn", "image_index", "rows"):
        assert np.array_equal(getattr(again, name), getattr(batch, name)), name


def test_epochs_are_augmented_differently_and_mosaic_closes(dataset: RunConfig) -> None:
    spec = make_spec(dataset, 1)
    batches, steps = whole(spec), spec.plan.steps_per_epoch
    assert crc(batches[0]) != crc(batches[steps])
    boxes = [sum(len(b.class_ids) for b in batches[e * steps : (e + 1) * steps]) for e in range(EPOCHS)]
    assert boxes[0] > 1.2 * boxes[2]  # four images' boxes, or one's


def test_a_task_killed_in_the_middle_is_redone_without_a_change_to_the_stream(
    dataset: RunConfig, tmp_path: Path
) -> None:
    def killing_loop(config: dict[str, Any]) -> Any:
        """Takes all batches, and twice on the way kills a process in which a window is being rendered."""
        import os
        import signal
        import time
        import zlib

        import psutil

        from raypar.dataset.stream import batches

        raylet = psutil.Process(os.getpid()).parent()
        assert raylet is not None
        killed, mine = [], []
        for number, batch in enumerate(batches(config["spec"], 0, config["cursor"])):
            mine.append((batch.epoch, batch.step, zlib.crc32(batch.images.copy())))
            deadline = time.monotonic() + 5
            while number in (3, 60) and time.monotonic() < deadline:
                running = [p.pid for p in raylet.children() if "ray::Read" in " ".join(p.cmdline())]
                if running:
                    os.kill(running[0], signal.SIGKILL)
                    killed.append(running[0])
                    break
        return [(killed, mine)]

    spec = make_spec(dataset, world_size=1)
    spec = replace(spec, plan=replace(spec.plan, epochs=30), recipe=replace(RECIPE, imgsz=320))
    ((killed, dealt),) = through_ray(spec, 0, tmp_path, loop=killing_loop)
    assert len(killed) == 2
    assert dealt == [(b.epoch, b.step, crc(b)) for b in whole(spec)]


def test_encoded_images_reach_two_ranks_and_are_rendered_as_planned_from_any_cursor(
    dataset: RunConfig, tmp_path: Path
) -> None:
    from raypar.dataset.encoded import encoded_blocks
    from raypar.dataset.rendered import Feed

    def rendering_loop(config: dict[str, Any]) -> Any:
        import zlib

        import torch
        import torch.distributed as dist

        from raypar.dataset.rendered import rendered_batches

        rank = dist.get_rank()
        made = rendered_batches(
            config["spec"],
            rank,
            config["cursor"],
            "cpu",
            lambda b: {"cls": torch.from_numpy(b.class_ids.copy())},
        )
        mine = [
            (b.epoch, b.step, b.rank, b.rows.tolist(), len(t["cls"]), zlib.crc32(t["img"].numpy()))
            for b, t in made
        ]
        every: list[Any] = [None, None]
        dist.all_gather_object(every, mine)
        return every if rank == 0 else None

    spec = make_spec(dataset, world_size=2)
    first = spec.plan.steps_per_epoch + 3
    dealt = through_ray(spec, GLOBAL_BATCH * first, tmp_path, loop=rendering_loop)
    expected: list[list[Any]] = [[], []]
    feeds = [Feed(spec, "cpu", lambda batch: {}) for _ in range(2)]
    for item in spec.plan.items():
        for b in sorted(
            (b for block in encoded_blocks(spec, item) for b in block), key=lambda b: (b.step, b.rank)
        ):
            batch, tensors = feeds[b.rank](b)
            crc = zlib.crc32(tensors["img"].numpy())
            expected[b.rank].append((b.epoch, b.step, b.rank, batch.rows.tolist(), len(batch.class_ids), crc))
    assert dealt == [planned[first:] for planned in expected]
