"""Statistics of a split: those of the parts add up to those of the whole, and are what a plain count finds."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.dataset.schema import row_schema
from raypar.inspect import statistics
from raypar.inspect.statistics import Statistics, columns, merge

NUM_CLASSES, IMGSZ = 5, 320
Row = tuple[int, int, list[tuple[int, float, float, float, float]]]
share = st.floats(0, 1, width=32)
box = st.tuples(st.integers(0, NUM_CLASSES - 1), share, share, share, share)
row = st.tuples(st.integers(1, 5000), st.integers(1, 5000), st.lists(box, max_size=6))
rows_of_a_split = st.lists(row, max_size=12)


def table_of(rows: list[Row]) -> pa.Table:
    """Rows as they lie in a shard, but for the images."""
    values = [
        {
            "height": h,
            "width": w,
            "class_ids": [b[0] for b in boxes],
            "boxes_xywhn": [x for b in boxes for x in b[1:]],
        }
        for h, w, boxes in rows
    ]
    schema = pa.schema([row_schema("detect").field(name) for name in columns("detect")])
    return pa.Table.from_pylist(values, schema)


def statistics_of(rows: list[Row]) -> Statistics:
    return Statistics.of_table(table_of(rows), "detect", num_classes=NUM_CLASSES, imgsz=IMGSZ)


def assert_equal(a: Statistics, b: Statistics) -> None:
    assert a.sums.keys() == b.sums.keys()
    for name in a.sums:
        np.testing.assert_array_equal(a.sums[name], b.sums[name], err_msg=name)
        assert a.sums[name].dtype == np.int64, name
    np.testing.assert_array_equal(a.lows, b.lows)
    np.testing.assert_array_equal(a.highs, b.highs)


@given(rows_of_a_split, st.lists(st.integers(0, 12), max_size=4))
def test_parts_add_up_to_the_whole(rows: list[Row], cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [statistics_of(rows[a:b]) for a, b in itertools.pairwise(edges)]
    assert_equal(merge(parts), statistics_of(rows))
    assert_equal(merge(parts[::-1]), statistics_of(rows))
    assert_equal(Statistics.none(NUM_CLASSES) + merge(parts), statistics_of(rows))


@given(rows_of_a_split)
def test_numbers_are_those_of_a_plain_count(rows: list[Row]) -> None:
    found = statistics_of(rows)
    boxes = [b for _, _, boxes in rows for b in boxes]
    assert (found.num_images, found.num_boxes) == (len(rows), len(boxes))
    assert found.num_backgrounds == sum(not boxes for _, _, boxes in rows)
    per_class = Counter(b[0] for b in boxes)
    assert found.boxes_per_class.tolist() == [per_class[i] for i in range(NUM_CLASSES)]
    assert found.sums["images_per_class"].tolist() == [
        sum(any(b[0] == i for b in bs) for _, _, bs in rows) for i in range(NUM_CLASSES)
    ]
    assert found.sums["pixels"] == sum(h * w for h, w, _ in rows)
    per_image = Counter(len(bs) for _, _, bs in rows)
    assert {n: c for n, c in enumerate(found.sums["boxes_per_image"].tolist()) if c} == dict(per_image)
    if rows:
        assert found.lows.tolist() == [min(h for h, _, _ in rows), min(w for _, w, _ in rows)]
        assert found.highs.tolist() == [
            max(h for h, _, _ in rows),
            max(w for _, w, _ in rows),
            max(len(bs) for _, _, bs in rows),
        ]
    for name, total in {
        "sizes": len(boxes),
        "box_shapes": len(boxes),
        "centres": len(boxes),
        "image_sizes": len(rows),
        "aspects": len(rows),
    }.items():
        assert found.sums[name].sum() == total, name


@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.001, 1), st.floats(0.001, 1)),
        min_size=1,
        max_size=30,
    )
)
def test_median_size_is_within_a_bin(found: list[tuple[int, int, float, float]]) -> None:
    """To about a tenth: a bin is an eighth of an octave."""
    sides = sorted((w * width * h * height) ** 0.5 / max(width, height) for height, width, w, h in found)
    median = statistics_of(
        [(height, width, [(0, 0.5, 0.5, w, h)]) for height, width, w, h in found]
    ).median_side()
    exact = max(sides[(len(sides) - 1) // 2], 2.0**-statistics.OCTAVES)
    assert median == pytest.approx(exact, rel=2 ** (1 / statistics.FINE) - 1)


def test_places_of_bins() -> None:
    """One box of a quarter by an eighth in the upper left of a 640 x 320 image: 160 x 40 px, so 80 of 640 (40 at imgsz 320)."""
    found = statistics_of([(320, 640, [(2, 0.1, 0.9, 0.25, 0.125)])])
    assert found.sums["sizes"].tolist() == [0, 0, 0, 1, 0]  # between 32 and 96 px
    # y, x
    assert np.argwhere(found.sums["centres"]).tolist() == [
        [int(0.9 * statistics.HEAT_BINS), int(0.1 * statistics.HEAT_BINS)]
    ]
    wide = (statistics.OCTAVES - 2) * statistics.COARSE
    assert np.argwhere(found.sums["box_shapes"]).tolist() == [[wide, wide - statistics.COARSE]]
    # 2 : 1, an octave
    assert np.flatnonzero(found.sums["aspects"]).tolist() == [statistics.ASPECT_BINS // 2 + statistics.FINE]
    assert found.median_side(2) == pytest.approx(80 / 640, rel=0.1)
    assert found.median_side(0) is None


@given(st.lists(st.integers(0, NUM_CLASSES - 1), max_size=20))
def test_classify_counts_images(class_ids: list[int]) -> None:
    table = pa.table({"height": pa.array([10] * len(class_ids), pa.int32()), "width": pa.array([20] * len(class_ids), pa.int32()),
                      "class_id": pa.array(class_ids, pa.int32())})  # fmt: skip
    found = Statistics.of_table(table, "classify", num_classes=NUM_CLASSES, imgsz=IMGSZ)
    assert found.sums["images_per_class"].tolist() == [class_ids.count(i) for i in range(NUM_CLASSES)]
    assert (found.num_images, found.num_boxes) == (len(class_ids), 0)


def test_a_class_that_is_not_in_the_dataset() -> None:
    with pytest.raises(ValueError, match="a row has class 5, the dataset has 5 classes"):
        statistics_of([(10, 10, [(5, 0.5, 0.5, 0.1, 0.1)])])


def test_size_does_not_depend_on_the_data() -> None:
    def num_bytes(found: Statistics) -> int:
        return sum(array.nbytes for array in found.sums.values())

    many = statistics_of(
        [(i + 1, 2 * i + 1, [(i % 5, i / 3000, 0.5, 0.1, 0.1)] * (i % 7)) for i in range(3000)]
    )
    assert num_bytes(many) == num_bytes(Statistics.none(NUM_CLASSES)) < 200_000
    assert "image" not in columns("detect") + columns("segment") + columns("classify")
