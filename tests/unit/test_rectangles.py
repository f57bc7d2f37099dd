"""Rectangles of validation: Ultralytics' own, whoever shares the images; batches that leave a queue whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.data.base import BaseDataset

import raypar.evaluate
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.dataset.plan import contiguous_share
from raypar.dataset.rows import read_sizes
from raypar.dataset.schema import row_schema
from raypar.detector import Detector
from raypar.images import encode_png
from raypar.rectangles import BatchQueue, Rectangles, raised_max_det, rectangles, squares
from raypar.storage import Folder
from raypar.train import validate
from raypar.train.validate import Group, Share

IMGSZ, STRIDE = 160, 32
# few sides, so that many ratios are equal; and any
SIDES = st.one_of(st.sampled_from([60, 80, 120, 160]), st.integers(1, 4000))
SIZES = st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=120)
NAMES = st.randoms(use_true_random=False)


def ultralytics_rectangles(
    names: list[str], sizes: list[tuple[int, int]], batch: int
) -> dict[str, tuple[int, ...]]:
    """Place, batch, height and width of each image's rectangle, by Ultralytics' own ``set_rectangle``."""
    by_name = dict(zip(names, sizes, strict=True))
    files = sorted(names)
    dataset = SimpleNamespace(
        ni=len(files), batch_size=batch, imgsz=IMGSZ, stride=STRIDE, pad=0.5, im_files=files,
        labels=[{"shape": by_name[name]} for name in files])  # fmt: skip
    BaseDataset.set_rectangle(dataset)
    return {
        name: (place, int(number), *map(int, dataset.batch_shapes[number]))
        for place, (name, number) in enumerate(zip(dataset.im_files, dataset.batch, strict=True))
    }


def our_rectangles(names: list[str], sizes: list[tuple[int, int]], batch: int) -> Rectangles:
    return rectangles(names, np.array(sizes, np.int32).reshape(-1, 2), batch)


@given(SIZES, st.integers(1, 40), NAMES)
def test_rectangles_are_ultralytics(sizes: list[tuple[int, int]], batch: int, random: object) -> None:
    names = [f"{'ab/'[i % 3]}{i}.jpg" for i in range(len(sizes))]
    random.shuffle(names)  # type: ignore[attr-defined]  # shards hold images in an order of their own
    found = our_rectangles(names, sizes, batch)
    detector = Detector(torch.nn.Identity(), ["a"], imgsz=IMGSZ, stride=STRIDE, pad=0.5)
    shapes = [detector.rectangle((height, width)) for height, width in found.sides.tolist()]
    expected = ultralytics_rectangles(names, sizes, batch)
    for i, name in enumerate(names):
        number = int(found.batch_of[i])
        assert (int(found.position_of[i]), number, *shapes[number]) == expected[name]


@given(SIZES, st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.sampled_from([0, 5, 10**9]))
def test_every_image_leaves_once_in_its_shape_for_any_number_of_ranks(
    sizes: list[tuple[int, int]], batch: int, world_size: int, most: int, limit: int
) -> None:
    found = our_rectangles([str(i) for i in range(len(sizes))], sizes, batch)
    detector = Detector(torch.nn.Identity(), ["a"], imgsz=IMGSZ, stride=STRIDE, pad=0.5)
    shapes = [detector.rectangle((height, width)) for height, width in found.sides.tolist()]
    left = []
    for rank in range(world_size):
        rows = contiguous_share(len(sizes), rank, world_size)
        queue = BatchQueue[int](found.batch_of, shapes, rows, most=most, limit=limit)
        for row in rows:
            for group in queue.push(row, row, 1.0):
                assert 1 <= len(group) <= most
                assert len({shapes[found.batch_of[i]] for i in group}) == 1
                left += group
    assert Counter(left) == Counter(range(len(sizes)))
    assert found.weights().sum() == pytest.approx(1)


def test_batches_leave_whole_where_there_is_room() -> None:
    """Then the loss of a batch is that of Ultralytics, which divides by the batch's targets."""
    sizes = [(60 + i % 50, 80) for i in range(96)]
    found = our_rectangles([f"{i:03d}" for i in range(96)], sizes, 16)
    shapes = [(1, number) for number in range(6)]
    queue = BatchQueue[int](found.batch_of, shapes, range(96), most=16, limit=10**9)
    groups = [group for row in range(96) for group in queue.push(row, row, 1.0)]
    assert sorted(map(len, groups)) == [16] * 6
    assert all(len(set(found.batch_of[group])) == 1 for group in groups)


def test_what_may_wait_no_longer_leaves_with_others_of_its_shape() -> None:
    batch_of = np.tile(np.arange(4), 16)  # images of four batches take turns
    queue = BatchQueue[int](batch_of, [(96, 96)] * 4, range(64), most=16, limit=31)
    groups = [group for row in range(64) for group in queue.push(row, row, 1.0)]
    assert [len(group) for group in groups[:2]] == [16, 16]
    assert len(set(batch_of[groups[0]])) == 2


def test_classify_has_batches_in_the_order_of_paths() -> None:
    found = squares(["b", "c", "a"], 2)
    assert (found.position_of.tolist(), found.batch_of.tolist()) == ([1, 2, 0], [0, 1, 0])
    assert found.sides.tolist() == [[1, 1], [1, 1]]


def test_max_det_follows_the_labels_unless_it_was_set() -> None:
    """As Ultralytics' own ``_check_max_det``."""
    from ultralytics.models.yolo.detect import DetectionValidator

    for max_det in (100, 300, 500):
        for num_labels in (0, 200, 300, 301, 700):
            args = SimpleNamespace(max_det=max_det)
            dataset = SimpleNamespace(labels=[{"cls": np.zeros((n, 1))} for n in (1, num_labels)])
            DetectionValidator._check_max_det(args, {"val": dataset})
            assert raised_max_det(max_det, num_labels) == args.max_det


def test_the_shapes_that_sizes_give_are_those_of_the_images() -> None:
    detector = Detector(torch.nn.Identity(), ["a"], imgsz=IMGSZ)
    sizes = [(120, 160), (240, 320), (160, 120), (97, 211)]
    images = [np.zeros((*hw, 3), np.uint8) for hw in sizes]
    made = {tuple(group.images.shape[2:]) for group in detector.letterbox(images)}
    assert detector.input_shapes(sizes) == sorted(made)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Manifest]:
    """Thirty images of seven sizes in two shards; one has 310 labels."""
    folder = Folder.at(str(tmp_path_factory.mktemp("mixed")))
    rng, sizes = (
        np.random.default_rng(0),
        [(40, 60), (60, 40), (50, 50), (30, 80), (80, 30), (45, 60), (64, 48)],
    )
    shards = []
    for number, ids in enumerate((range(18), range(18, 30))):
        rows = []
        for i in ids:
            height, width = sizes[i % len(sizes)]
            count = 310 if i == 20 else 2
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            rows.append({"image_id": f"{(7 * i) % 30:02d}.png", "image": encode_png(image), "height": height, "width": width,
                         "class_ids": [0] * count, "boxes_xywhn": [0.5, 0.5, 0.2, 0.2] * count})  # fmt: skip
        Path(folder.uri, "val").mkdir(exist_ok=True)
        path = f"val/{number}.parquet"
        table = pa.Table.from_pylist(rows, schema=row_schema("detect"))
        pq.write_table(table, Path(folder.uri) / path, row_group_size=6)
        shards.append(Shard(path=path, row_groups=(6,) * (len(ids) // 6), num_bytes=1, sha256=""))
    split = Split(shards=tuple(shards), num_images=30, num_boxes=368)
    splits = {"train": split, "val": split}
    return folder, Manifest(task="detect", class_names=("a",), splits=splits, source="")


def share_of(
    mixed: tuple[Folder, Manifest], rank: int, world_size: int, max_det: int = 300
) -> tuple[Share, list[Group]]:
    """A rank's share with batches of four images a rectangle, and its groups."""
    folder, manifest = mixed
    lender: Any = SimpleNamespace(manifest=manifest, args=SimpleNamespace(batch=2, max_det=max_det))
    share = Share(lender, folder, rank=rank, world_size=world_size, batch=4)
    share.prepare()
    return share, list(share.groups(Detector(torch.nn.Identity(), ["a"], imgsz=160, pad=0.5)))


def test_an_image_is_shown_alike_whatever_the_number_of_ranks(mixed: tuple[Folder, Manifest]) -> None:
    def shown(world_size: int) -> dict[str, torch.Tensor]:
        groups = [group for rank in range(world_size) for group in share_of(mixed, rank, world_size)[1]]
        assert sum(group.weight for group in groups) == pytest.approx(1)
        return {
            image_id: image
            for group in groups
            for image_id, image in zip(group.rows["image_id"].to_pylist(), group.images.images, strict=True)
        }

    alone = shown(1)
    assert len(alone) == 30
    assert len({tuple(image.shape) for image in alone.values()}) >= 4
    for world_size in (2, 3, 7):
        found = shown(world_size)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_what_does_not_fit_is_read_again_and_is_the_same(
    mixed: tuple[Folder, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validate, "CACHE_BYTES", 1_000_000)  # a dozen images
    share, groups = share_of(mixed, 0, 1)
    detector = Detector(torch.nn.Identity(), ["a"], imgsz=160, pad=0.5)
    again = list(share.groups(detector))
    for found in (groups, again):
        assert all(len(group.images.indices) <= 4 for group in found)
        ids = [image_id for group in found for image_id in group.rows["image_id"].to_pylist()]
        assert Counter(ids) == Counter(f"{i:02d}.png" for i in range(30))


def test_sizes_are_those_of_the_rows_of_a_part_of_a_split(mixed: tuple[Folder, Manifest]) -> None:
    folder, manifest = mixed
    whole = manifest.split("val")
    part = whole.model_copy(
        update={"shards": (whole.shards[0].model_copy(update={"row_groups": (6, 4)}),), "num_images": 10}
    )
    sizes = read_sizes(folder, part)
    assert sizes.image_ids == read_sizes(folder, whole).image_ids[:10]
    assert (sizes.hws.shape, sizes.num_labels) == ((10, 2), 2)


def test_validation_keeps_as_many_boxes_as_an_image_has_labels(mixed: tuple[Folder, Manifest]) -> None:
    assert share_of(mixed, 0, 1)[0].max_det == 310
    assert share_of(mixed, 0, 1, max_det=200)[0].max_det == 200
    folder, manifest = mixed
    items, num_labels = raypar.evaluate._items(folder, manifest.split("val"), "detect", 16)
    assert num_labels == 310
    assert [len(item["positions"]) for item in items] == [6] * 5
