"""Rectangles of validation: Ultralytics' own, whoever shares the images; batches that leave a queue whole."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.data.base import BaseDataset

from raypar.dataset.plan import contiguous_share
from raypar.detector import Detector
from raypar.rectangles import BatchQueue, Rectangles, raised_max_det, rectangles, squares

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
