"""The stream for `augment: gpu`, on CPU tensors: exact like the other one, whatever the workers, the cursor and the dataset. No Ray."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_stream_properties import RECIPE, cases, folder, spec_of, stream
from test_tasks import prepared

from raypar.augment.albu import make
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Recipe, draw, generator
from raypar.augment.labels import batch_labels
from raypar.config import RunConfig
from raypar.dataset import encoded as encoded_module
from raypar.dataset import rendered as rendered_module
from raypar.dataset.batch import Batch
from raypar.dataset.encoded import EncodedBatch, depth_of, encoded_blocks, in_lane, pack, refuse, unpack
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.plan import Plan
from raypar.dataset.rendered import Feed, Rendered, rendered, without
from raypar.dataset.stream import StreamSpec, _read, render
from raypar.storage import Folder
from raypar.train import where_to_augment
from raypar.train.loop import to_tensors as loss_tensors

__all__ = ["folder"]  # a fixture
EVERYTHING = {"mosaic": 0.7, "mixup": 0.5, "cutmix": 0.7, "scale": 0.5, "translate": 0.2, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
              "fliplr": 0.5, "flipud": 0.5, "bgr": 0.5}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _short_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that rings come round in small examples."""
    monkeypatch.setattr(encoded_module, "MIN_DEPTH", 5)
    monkeypatch.setattr(encoded_module, "RING_IMAGES", 0)


def encoded(spec: StreamSpec, cursor: int = 0) -> list[EncodedBatch]:
    """What the workers are dealt, through packed blocks, in the order of steps and ranks."""
    found = (
        batch
        for item in spec.plan.items(cursor)
        for block in encoded_blocks(spec, item)
        for batch in unpack(pack(block))
    )
    return sorted(found, key=lambda b: (b.epoch, b.step, b.rank))


def to_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        "cls": torch.from_numpy(batch.class_ids.copy()),
        "bboxes": torch.from_numpy(batch.boxes_xywhn.copy()),
    }


def shown(spec: StreamSpec, first_step: int = 0, dealt: list[EncodedBatch] | None = None) -> list[Rendered]:
    """What the workers render from a step on, in the order of steps and ranks; each begins with an empty ring."""
    dealt = (
        encoded(spec, max(0, first_step - depth_of(spec) + 1) * spec.plan.global_batch)
        if dealt is None
        else dealt
    )
    ranks = range(spec.world_size)
    made = [
        rendered([b for b in dealt if b.rank == rank], Feed(spec, "cpu", to_tensors), first_step)
        for rank in ranks
    ]
    return [one for step in zip(*made, strict=True) for one in step]


def content(batch: EncodedBatch) -> tuple[object, ...]:
    table = pack([batch])
    return tuple((name, zlib.crc32(table.column(name)[0].as_buffer())) for name in table.column_names)


def test_a_store_that_fails_is_asked_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(
        folder,
        num_images=12,
        rows_per_group=4,
        world_size=1,
        seed=0,
        global_batch=4,
        epochs=1,
        window_images=8,
    )
    expected, opened, fails = (
        [content(batch) for batch in encoded(spec)],
        Folder.open,
        iter([True, False] * 100),
    )

    def failing(self: Folder, name: str) -> BinaryIO:
        if next(fails):
            raise OSError("reset by peer")
        return opened(self, name)

    monkeypatch.setattr(Folder, "open", failing)
    monkeypatch.setattr(Folder, "is_local", False)
    monkeypatch.setattr("raypar.storage.FIRST_PAUSE_S", 0.0)
    spec.labels_kept.clear()
    assert [content(batch) for batch in encoded(spec)] == expected


@settings(max_examples=20)
@given(cases, st.data())
def test_the_stream_from_a_cursor_is_the_tail_of_the_whole_byte_for_byte(
    folder: Path, case: dict[str, int], data: st.DataObject
) -> None:
    spec = spec_of(folder, world_size=1, **case)
    steps = data.draw(st.integers(0, spec.plan.epochs * spec.plan.steps_per_epoch))
    whole, tail = encoded(spec), encoded(spec, steps * spec.plan.global_batch)
    assert [content(batch) for batch in tail] == [content(batch) for batch in whole[steps:]]


@settings(max_examples=10)
@given(cases, st.data())
def test_a_worker_that_starts_in_the_middle_renders_what_an_undisturbed_one_does(
    folder: Path, case: dict[str, int], data: st.DataObject
) -> None:
    spec = spec_of(folder, world_size=2, **case)
    steps = data.draw(st.integers(0, spec.plan.epochs * spec.plan.steps_per_epoch))
    whole, tail = shown(spec), shown(spec, steps)
    assert len(tail) == len(whole) - 2 * steps
    for (before, tensors), (batch, again) in zip(whole[2 * steps :], tail, strict=True):
        assert (before.epoch, before.step, before.rank) == (batch.epoch, batch.step, batch.rank)
        assert all(torch.equal(tensors[name], again[name]) for name in ("img", "cls", "bboxes"))


@settings(max_examples=10)
@given(cases)
def test_one_two_and_four_workers_see_the_same_global_batches(folder: Path, case: dict[str, int]) -> None:
    alone = shown(spec_of(folder, world_size=1, **case))
    for world_size in (2, 4):
        dealt = shown(spec_of(folder, world_size=world_size, **case))
        assert len(dealt) == world_size * len(alone)
        for step, (one, tensors) in enumerate(alone):
            ranks = dealt[step * world_size : (step + 1) * world_size]
            assert [(b.epoch, b.step, b.rank) for b, _ in ranks] == [
                (one.epoch, one.step, rank) for rank in range(world_size)
            ]
            assert torch.equal(torch.cat([t["img"] for _, t in ranks]), tensors["img"])
            for name in ("rows", "class_ids", "boxes_xywhn"):
                assert np.array_equal(
                    np.concatenate([getattr(b, name) for b, _ in ranks]), getattr(one, name)
                ), name
            per_rank = case["global_batch"] // world_size
            assert np.array_equal(
                np.concatenate([b.image_index + r * per_rank for r, (b, _) in enumerate(ranks)]),
                one.image_index,
            )


@settings(max_examples=10)
@given(cases)
def test_the_images_are_those_of_the_other_stream_in_its_order(folder: Path, case: dict[str, int]) -> None:
    """Whose shares are shown to be disjoint and to cover each epoch."""
    spec = spec_of(folder, world_size=2, **case)
    expected = [(b.epoch, b.step, b.rank, b.rows.tolist()) for b in stream(spec)]
    assert [(b.epoch, b.step, b.rank, b.labels.rows.tolist()) for b in encoded(spec)] == expected


def sources_of(spec: StreamSpec) -> list[Source]:
    """All images of the split by their rows, as the CPU stream reads them."""
    found: dict[int, Source] = {}
    for item in spec.plan.items():
        window = spec.plan.window(item.epoch, item.window)
        rows, sources, _ = _read(spec, item, window)
        found |= dict(zip(rows.tolist(), sources, strict=True))
    return [found[row] for row in range(len(found))]


@pytest.mark.parametrize("more", [{}, {"degrees": 20, "shear": 5}])
@pytest.mark.parametrize("imgsz", [32, 24])  # images are 24 x 32
def test_the_pixels_and_boxes_are_those_of_the_cpu_renderer_for_the_same_partners(
    folder: Path, more: dict[str, float], imgsz: int
) -> None:
    spec = spec_of(folder, 23, 7, 2, seed=3, global_batch=8, epochs=3, window_images=8)
    spec = replace(spec, recipe=Recipe(imgsz, **EVERYTHING, **more), mosaic_epochs=2)  # type: ignore[arg-type]
    sources, history, renderer, depth = sources_of(spec), [], Renderer(spec.recipe), depth_of(spec)  # type: ignore[arg-type]
    num_boxes = 0
    for number, (batch, tensors) in enumerate(shown(spec)):
        step, rank = divmod(number, 2)
        history.append(batch.rows)
        num_steps = min(step + 1, depth)
        ring = [
            sources[row] for k in range(num_steps) for row in history[2 * (step - (step - k) % depth) + rank]
        ]
        moved, expected = [], np.empty((4, 3, imgsz, imgsz), np.uint8)
        for lane in range(4):
            rng = generator(3, batch.epoch, batch.step * 8 + rank * 4 + lane)
            sample = in_lane(
                draw(spec.recipe, rng, step % depth, num_steps, mosaic_on=batch.epoch < 2), lane, 4, num_steps
            )  # type: ignore[arg-type]
            moved.append(renderer.render(sample, ring, expected[lane]))
        labels = batch_labels(moved)
        assert np.abs(tensors["img"].numpy().astype(float) - expected).mean() <= 2
        np.testing.assert_allclose(batch.boxes_xywhn, labels.boxes_xywhn, atol=1e-4)
        np.testing.assert_array_equal(batch.class_ids, labels.class_ids)
        np.testing.assert_array_equal(batch.image_index, labels.image_index)
        num_boxes += len(labels.class_ids)
    assert num_boxes > 20


def test_without_mosaic_the_two_streams_show_the_same(folder: Path) -> None:
    spec = spec_of(folder, 23, 7, 1, seed=3, global_batch=8, epochs=2, window_images=8)
    # albumentations act on the composed image in one, on its source in the other
    spec = replace(spec, recipe=replace(RECIPE, mosaic=0.0), albumentations=[])
    for item, (batch, tensors) in zip(
        [b for i in spec.plan.items() for b in render(spec, i)], shown(spec), strict=True
    ):
        assert np.abs(tensors["img"].numpy().astype(float) - item.images).mean() <= 2
        np.testing.assert_allclose(batch.boxes_xywhn, item.boxes_xywhn, atol=1e-4)
        np.testing.assert_array_equal(batch.class_ids, item.class_ids)


def test_partners_are_of_the_lane_and_different_ones() -> None:
    recipe = Recipe(32, mosaic=1.0, mixup=1.0)
    for position in range(50):
        sample = in_lane(draw(recipe, generator(0, 0, position), 3, 6, mosaic_on=True), 5, 16, 6)
        assert sample.mixed is not None
        for layer in (sample.layer, sample.mixed[0]):
            assert all(slot % 16 == 5 and slot // 16 < 6 for slot in layer.indices)
            assert len(set(layer.indices)) == 4
        assert sample.layer.indices[0] == 3 * 16 + 5
    early = in_lane(draw(recipe, generator(0, 0, 0), 1, 2, mosaic_on=True), 0, 4, 2)
    assert set(early.layer.indices) <= {0, 4}


def test_albumentations_of_the_pixels_are_those_of_the_other_stream(folder: Path) -> None:
    spec = spec_of(folder, 23, 7, 1, seed=3, global_batch=8, epochs=2, window_images=8)
    spec = replace(
        spec,
        recipe=replace(RECIPE, mosaic=0.0, hsv_h=0.0, hsv_s=0.0),
        albumentations=[{"ToGray": {"p": 0.5}}],
    )
    grey = []
    for item, (_, tensors) in zip(
        [b for i in spec.plan.items() for b in render(spec, i)], shown(spec), strict=True
    ):
        assert np.abs(tensors["img"].numpy().astype(float) - item.images).mean() <= 2
        grey += [bool((image.max(0) - image.min(0) <= 1).all()) for image in item.images.astype(int)]
    assert 0.25 < np.mean(grey) < 0.75


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_labels_of_every_task_follow_and_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, task: str
) -> None:
    manifest = prepared(tmp_path, task, 20)
    split, more = (
        manifest.split("train"),
        {"task": task, "num_keypoints": (manifest.keypoint_shape or (0,))[0]},
    )
    plan = Plan(split.shards[0].row_groups, seed=1, global_batch=4, epochs=2, window_images=8)

    def spec_with(recipe: Recipe, world_size: int) -> StreamSpec:
        return StreamSpec.of(
            Folder.at(tmp_path),
            split,
            plan,
            recipe,
            mosaic_epochs=2,
            albumentations=[],
            world_size=world_size,
        )

    still = spec_with(Recipe(64, scale=0.3, fliplr=0.5, **more), 1)  # type: ignore[arg-type]
    for expected, (batch, _) in zip(
        [b for i in plan.items() for b in render(still, i)], shown(still), strict=True
    ):
        assert batch.image_index.tolist() == expected.image_index.tolist()
        wanted, found = loss_tensors(expected), loss_tensors(batch)
        assert wanted.keys() == found.keys() >= {"cls", "bboxes"}
        assert all(torch.allclose(found[name], wanted[name], atol=1e-4) for name in wanted if name != "img")
    alone, shared = (shown(spec_with(Recipe(64, mosaic=1.0, scale=0.3, **more), n)) for n in (1, 2))  # type: ignore[arg-type]
    special = {"segment": "masks", "pose": "keypoints", "obb": "boxes_xywhr"}[task]
    for step, (batch, tensors) in enumerate(alone):
        pair = shared[2 * step : 2 * step + 2]
        assert torch.equal(torch.cat([t["img"] for _, t in pair]), tensors["img"])
        for name in ("class_ids", special):
            assert np.array_equal(
                np.concatenate([getattr(b, name) for b, _ in pair]), getattr(batch, name)
            ), name


def test_a_ring_that_does_not_fit_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")

    monkeypatch.setattr(rendered_module, "Ring", full)
    with pytest.raises(ValueError, match=r"last 40 images, 0\.0 GB, on cpu.*train\.augment=cpu"):
        Feed(spec_of(folder, 23, 7, 1, seed=0, global_batch=8, epochs=1), "cpu", to_tensors)


def damage(spec: StreamSpec, into: Path, row: int) -> StreamSpec:
    """The same split, with an image that cannot be decoded."""
    table = pq.read_table(f"{spec.dataset.uri}/train/00000.parquet")
    images = table["image"].to_pylist()
    images[row] = images[row][:40]
    table = table.set_column(
        table.column_names.index("image"), table.schema.field("image"), pa.array(images, pa.binary())
    )
    (into / "train").mkdir()
    pq.write_table(table, into / "train" / "00000.parquet", row_group_size=7)
    return replace(spec, dataset=Folder.at(into))


def test_an_image_that_cannot_be_decoded_is_counted_grey_and_without_labels(
    folder: Path, tmp_path: Path
) -> None:
    spec = spec_of(folder, 23, 7, 1, seed=3, global_batch=8, epochs=6, window_images=8)
    spec = replace(spec, recipe=replace(RECIPE, hsv_h=0.0, hsv_s=0.0, hsv_v=0.0), mosaic_epochs=5)
    damaged = damage(spec, tmp_path, row=4)
    sound, got, history, dropped = shown(spec), shown(damaged), [], 0
    for (before, _), (batch, tensors) in zip(sound, got, strict=True):
        history.append(batch.rows)
        assert batch.num_replaced == (batch.rows == 4).sum()
        assert len(tensors["cls"]) == len(batch.class_ids)
        for lane in range(8):
            labels, others = (b.boxes_xywhn[b.image_index == lane].tolist() for b in (batch, before))
            if all(rows[lane] != 4 for rows in history[-5:]):
                assert labels == others
            elif batch.epoch == 5 and batch.rows[lane] == 4:  # no mosaic
                assert set(tensors["img"][lane].unique().tolist()) == {114}
                assert not labels
            dropped += len(others) - len(labels)
    assert dropped > 3
    steps = spec.plan.steps_per_epoch + 1
    resumed = shown(damaged, steps)
    assert [(b.num_replaced, b.class_ids.tolist()) for b, _ in resumed] == [
        (b.num_replaced, b.class_ids.tolist()) for b, _ in got[steps:]
    ]


def test_labels_can_be_dropped_from_masks_too() -> None:
    masks = np.array([[[0, 1], [2, 3]], [[1, 1], [2, 0]]], np.uint8)
    index = np.array([0, 0, 0, 1, 1], np.int32)
    batch = Batch(0, 0, 0, np.empty((2, 3, 0, 0), np.uint8), np.arange(5, dtype=np.int32), np.zeros((5, 4), np.float32), index,
                  np.arange(2), masks=masks, boxes_xywhr=np.zeros((5, 5), np.float32))  # fmt: skip
    left = without(batch, np.array([False, True, False, True, False]))
    assert left.masks is not None
    assert left.masks.tolist() == [[[0, 1], [0, 2]], [[0, 0], [1, 0]]]
    assert left.class_ids.tolist() == [0, 2, 4]
    assert left.image_index.tolist() == [0, 0, 1]
    assert left.boxes_xywhr is not None
    assert len(left.boxes_xywhr) == 3


def test_the_depth_follows_from_batch_and_image_size_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    expected = {
        (4, 640): 32,
        (16, 640): 32,
        (32, 640): 16,
        (64, 640): 8,
        (256, 640): 8,
        (16, 1280): 20,
        (16, 4000): 8,
    }
    for (batch, imgsz), depth in expected.items():
        for world_size in (1, 4):
            spec = spec_of(folder, 23, 7, world_size, seed=0, global_batch=batch, epochs=1)
            assert depth_of(replace(spec, recipe=Recipe(imgsz))) == depth


def test_what_the_device_does_not_do_is_refused_in_one_line() -> None:
    fine = {"task": "detect", "cache": "none", "copy_paste": 0.5, "moves_pixels": False}
    refuse(**fine)  # copy_paste needs polygons: detect has none
    refuse(**fine | {"task": "pose"})
    with pytest.raises(ValueError, match=r"copy_paste=0\.5"):
        refuse(**fine, has_polygons=True)
    for change, word in (({"task": "classify"}, "classify"), ({"cache": "ram"}, "train.cache=ram"),
                         ({"task": "segment"}, "copy_paste=0.5"), ({"moves_pixels": True}, "albumentations")):  # fmt: skip
        with pytest.raises(ValueError, match=f"{word}.*train.augment=cpu"):
            refuse(**fine | change)
    assert make([{"HorizontalFlip": {"p": 0.5}}]).move_pixels
    assert not make(None).move_pixels


@pytest.mark.parametrize(
    ("num_gpus", "train", "task", "begun", "expected"),
    [
        (1, {}, "detect", None, "gpu"),
        (1, {"augment": "cpu"}, "detect", None, "cpu"),
        (0, {}, "detect", None, "cpu"),
        (1, {"use_gpu": False}, "detect", None, "cpu"),
        # `use_gpu: auto` takes GPUs when every worker can have one
        (1, {"num_workers": 2}, "detect", None, "cpu"),
        (1, {"cache": "ram"}, "detect", None, "cpu"),
        (1, {}, "classify", None, "cpu"),
        (0, {}, "detect", {"augment": "gpu"}, "gpu"),  # what it was begun with
        (1, {}, "detect", {"augment": None}, "cpu"),
        (0, {"augment": "gpu"}, "detect", None, "gpu"),
    ],
)
def test_auto_is_what_the_run_was_begun_with_or_the_gpus_that_workers_have(
    num_gpus: int,
    train: dict[str, object],
    task: str,
    begun: dict[str, object] | None,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0, "GPU": float(num_gpus)})
    config = RunConfig.model_validate({"name": "run", "storage": str(tmp_path), "train": train})
    if begun is not None:
        (config.folder / "train").write_json("settings.json", begun)
    manifest = Manifest(task=task, class_names=("a",), splits={"train": Split(num_images=8)}, source="")
    assert where_to_augment(config, manifest) == expected
