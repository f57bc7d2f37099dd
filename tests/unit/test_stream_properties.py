"""The stream as a pure function, for any seed, counts, cursor and number of workers: no Ray, every example a small split."""

from __future__ import annotations

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.augment.geometry import Recipe
from raypar.dataset.batch import Batch, pack, unpack
from raypar.dataset.formats import Record
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Split
from raypar.dataset.plan import Plan, first_images
from raypar.dataset.rows import cells
from raypar.dataset.stream import LOOK_AHEAD_IMAGES, StreamSpec, blocks, look_ahead_images
from raypar.storage import Folder

RECIPE = Recipe(imgsz=32, mosaic=0.7, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


@lru_cache
def split_of(folder: Path, num_images: int, rows_per_group: int) -> tuple[Folder, Split]:
    dataset = Folder.at(folder / f"{num_images}-{rows_per_group}")
    records = tuple(Record(f"{i}.jpg", "", i) for i in range(num_images))
    job = ShardJob(
        dataset, "train/00000.parquet", "train", "shapes", 4, records, rows_per_group, 10**6, 0, (24, 32)
    )
    report = write_shard(job)
    assert report.shard is not None
    return dataset, Split(shards=(report.shard,), num_images=num_images)


def spec_of(
    folder: Path,
    num_images: int,
    rows_per_group: int,
    world_size: int,
    percent: int = 100,
    appended: int = 0,
    **plan: int,
) -> StreamSpec:
    dataset, split = split_of(folder, num_images, rows_per_group)
    groups = first_images(split.shards[0].row_groups, percent / 100)
    # the last row groups count as appended ones
    strata = (len(groups) - appended, appended) if 0 < appended < len(groups) else ()
    made = Plan(groups, strata=strata, **plan)  # type: ignore[arg-type]
    return StreamSpec.of(
        dataset, split, made, RECIPE, mosaic_epochs=1, albumentations=[], world_size=world_size
    )


def stream(spec: StreamSpec, cursor: int = 0) -> list[Batch]:
    """What the workers are dealt, through packed blocks, in the order of steps and ranks."""
    batches = (
        batch
        for item in spec.plan.items(cursor)
        for block in blocks(spec, item)
        for batch in unpack(pack(block))
    )
    return sorted(batches, key=lambda b: (b.epoch, b.step, b.rank))


def content(batch: Batch) -> tuple[object, ...]:
    """All that a worker is given, as something that can be compared."""
    table = pack([batch])
    return tuple((name, zlib.crc32(table.column(name)[0].as_buffer())) for name in table.column_names)


cases = st.fixed_dictionaries(
    {
        "num_images": st.sampled_from([1, 5, 16, 23]),
        "rows_per_group": st.sampled_from([1, 4, 7]),
        "percent": st.sampled_from([100, 60]),
        "appended": st.sampled_from([0, 1, 3]),
        "seed": st.integers(0, 2**32),
        "global_batch": st.sampled_from([4, 8, 12]),
        "epochs": st.integers(1, 3),
        "window_images": st.sampled_from([1, 8, 20]),
    }
)


@settings(max_examples=25)
@given(cases, st.data())
def test_the_stream_from_a_cursor_is_the_tail_of_the_whole_byte_for_byte(
    folder: Path, case: dict[str, int], data: st.DataObject
) -> None:
    spec = spec_of(folder, world_size=1, **case)
    steps = data.draw(st.integers(0, spec.plan.epochs * spec.plan.steps_per_epoch))
    whole, tail = stream(spec), stream(spec, steps * spec.plan.global_batch)
    assert [content(batch) for batch in tail] == [content(batch) for batch in whole[steps:]]


@settings(max_examples=25)
@given(cases)
def test_one_two_and_four_workers_see_the_same_global_batches(folder: Path, case: dict[str, int]) -> None:
    alone = stream(spec_of(folder, world_size=1, **case))
    for world_size in (2, 4):
        dealt = stream(spec_of(folder, world_size=world_size, **case))
        assert len(dealt) == world_size * len(alone)
        for step, one in enumerate(alone):
            ranks = dealt[step * world_size : (step + 1) * world_size]
            assert [(b.epoch, b.step, b.rank) for b in ranks] == [
                (one.epoch, one.step, rank) for rank in range(world_size)
            ]
            per_rank = case["global_batch"] // world_size
            for name in ("images", "rows", "class_ids", "boxes_xywhn"):
                assert np.array_equal(
                    np.concatenate([getattr(b, name) for b in ranks]), getattr(one, name)
                ), name
            index = np.concatenate([b.image_index + rank * per_rank for rank, b in enumerate(ranks)])
            assert np.array_equal(index, one.image_index)


@settings(max_examples=25)
@given(cases)
def test_every_image_is_seen_once_an_epoch(folder: Path, case: dict[str, int]) -> None:
    spec = spec_of(folder, world_size=2, **case)
    batches = stream(spec)
    for epoch in range(spec.plan.epochs):
        rows = np.concatenate([batch.rows for batch in batches if batch.epoch == epoch])
        assert len(rows) == spec.plan.positions_per_epoch
        # the first ones, as Ultralytics' fraction
        num_images = max(1, round(case["num_images"] * case["percent"] / 100))
        counts = np.bincount(rows, minlength=num_images)
        assert len(counts) == num_images
        assert counts.min() >= 1
        assert counts.sum() - num_images < case["global_batch"]


@given(
    st.lists(st.lists(st.binary(max_size=5), max_size=4), max_size=3),
    st.integers(0, 4),
    st.sampled_from([pa.binary(), pa.large_binary()]),
)
def test_cells_are_the_values_of_a_column_and_not_copies(
    chunks: list[list[bytes]], start: int, dtype: pa.DataType
) -> None:
    column = pa.chunked_array([pa.array(chunk, dtype) for chunk in chunks], dtype).slice(start)
    assert [cell.to_pybytes() for cell in cells(column)] == column.to_pylist()
    whole = {chunk.buffers()[2].address: chunk.buffers()[2] for chunk in column.chunks if chunk.buffers()[2]}
    assert all(
        any(a <= cell.address <= a + b.size for a, b in whole.items()) for cell in cells(column) if cell.size
    )


@given(st.integers(1, 4096), st.integers(0, 2048), st.integers(0, 10**7))
def test_more_cpus_may_look_further_ahead_within_half_of_the_object_stores(
    window_images: int, cpus: int, store_images: int
) -> None:
    found = look_ahead_images(window_images, cpus, store_images)
    assert 1 <= found <= max(1, store_images // 2)
    assert found <= look_ahead_images(window_images, cpus + 1, store_images)
    if store_images > 10**6:
        assert found >= min(LOOK_AHEAD_IMAGES, store_images // 2)
    if 2 * 8 * cpus * window_images < store_images and cpus > 4:
        assert found / window_images / 2.7 >= cpus / 4, (
            "no CPU is idle for want of room, whatever Ray Data keeps back"
        )
