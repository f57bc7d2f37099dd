"""The cache of decoded images: what was put comes back, bounded, whole or not at all, and nothing stays behind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import raypar.dataset.stream
from raypar.augment.geometry import Recipe
from raypar.dataset.batch import pack
from raypar.dataset.cache import PREFIX, Cache, CacheSpec, drop, node_cache, sweep
from raypar.dataset.formats import Record
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Split
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, render
from raypar.storage import Folder


@pytest.fixture(params=["ram", "disk"])
def spec(request: pytest.FixtureRequest) -> Iterator[CacheSpec]:
    made = CacheSpec(request.param, uuid.uuid4().hex, 1 << 20)
    yield made
    drop(made)
    assert not made.folder.exists()


@given(
    st.lists(st.none() | st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=6),
    st.integers(0, 2**32 - 1),
)
def test_what_was_put_comes_back(sizes: list[tuple[int, int] | None], seed: int) -> None:
    rng = np.random.default_rng(seed)
    images = [None if hw is None else rng.integers(0, 256, (*hw, 3), np.uint8) for hw in sizes]
    spec = CacheSpec("ram", uuid.uuid4().hex, 1 << 20)
    try:
        cache = Cache(spec)
        assert cache.put("a", images)
        found = Cache(spec).get("a")
    finally:
        drop(spec)
    assert found is not None
    assert len(found) == len(images)
    for image, other in zip(images, found, strict=True):
        assert (image is None) == (other is None)
        if image is not None:
            assert np.array_equal(image, other)
            assert not other.flags.writeable


def test_the_limit_holds(spec: CacheSpec) -> None:
    cache, image = Cache(spec), np.zeros((100, 1000, 3), np.uint8)
    kept = [cache.put(str(i), [image]) for i in range(8)]
    assert kept == [True] * 3 + [False] * 5
    assert cache.used_bytes() <= spec.limit_bytes
    assert cache.get("2") is not None
    assert cache.get("5") is None


def test_readers_outlive_a_drop(spec: CacheSpec) -> None:
    cache = Cache(spec)
    cache.put("a", [np.full((3, 4, 3), 7, np.uint8)])
    found = cache.get("a")
    drop(spec)
    assert found is not None
    assert (found[0] == 7).all()
    assert cache.get("a") is None
    assert not cache.put("b", [np.zeros((1, 1, 3), np.uint8)]), (
        "one that was still running leaves nothing behind"
    )
    assert not spec.folder.exists()


def test_caches_of_dead_processes_are_swept_and_those_of_live_ones_stay(spec: CacheSpec) -> None:
    cache = Cache(spec)
    cache.put("a", [np.zeros((1, 1, 3), np.uint8)])
    dead = CacheSpec(spec.kind, uuid.uuid4().hex, 1 << 20)
    code = f"""
import os, signal, numpy
from raypar.dataset.cache import Cache, CacheSpec
Cache(CacheSpec({dead.kind!r}, {dead.key!r}, 1 << 20)).put("a", [numpy.zeros((2, 2, 3), numpy.uint8)])
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ))
    assert dead.folder.is_dir()
    sweep(spec.folder.parent)
    assert not dead.folder.exists()
    assert cache.get("a") is not None
    assert dead.folder.name.startswith(PREFIX)
    dead.folder.mkdir()  # without a lock: half made, or half dropped
    sweep(spec.folder.parent)
    assert not dead.folder.exists()


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> StreamSpec:
    """20 generated images, one of which cannot be decoded, without a cache."""
    folder = Folder.at(str(tmp_path_factory.mktemp("dataset")))
    records = tuple(Record(f"{i:06d}", "", i) for i in range(20))
    report = write_shard(
        ShardJob(folder, "train/0.parquet", "train", "shapes", 4, records, 6, 10**6, 0, (48, 64))
    )
    assert report.shard is not None
    with folder.open(report.shard.path) as file:
        table = pq.read_table(file)
    broken = table.set_column(
        1, table.schema.field(1), pa.array([b"broken", *table["image"].to_pylist()[1:]], pa.binary())
    )
    sink = pa.BufferOutputStream()
    pq.write_table(broken, sink, row_group_size=6)
    folder.write(report.shard.path, sink.getvalue().to_pybytes())
    split = Split(shards=(report.shard,), num_images=20)
    plan = Plan(report.shard.row_groups, seed=0, global_batch=4, epochs=2, window_images=8)
    recipe = Recipe(imgsz=32, mosaic=1.0, scale=0.5, translate=0.1, hsv_h=0.01, hsv_s=0.5, hsv_v=0.4)
    return StreamSpec.of(
        folder, split, plan, recipe, mosaic_epochs=1, albumentations=[{"Blur": {"p": 0.5}}], world_size=1
    )


def whole(stream: StreamSpec) -> list[dict[str, bytes]]:
    return [pack([batch]).to_pylist()[0] for item in stream.plan.items() for batch in render(stream, item)]


def test_the_stream_is_the_same_with_a_cache_and_the_second_epoch_decodes_nothing(
    spec: CacheSpec, stream: StreamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_decoded, real = 0, raypar.dataset.stream.decode_shrunk

    def counted(data: object, side: int) -> np.ndarray:
        nonlocal num_decoded
        num_decoded += 1
        return real(data, side)

    monkeypatch.setattr(raypar.dataset.stream, "decode_shrunk", counted)
    plain = whole(stream)
    without, num_decoded = num_decoded, 0
    cached = dataclasses.replace(stream, cache=spec)
    assert whole(cached) == plain
    assert (without, num_decoded) == (40, 20)
    assert whole(cached) == plain
    assert num_decoded == 20

    drop(spec)
    node_cache.cache_clear()
    # room for two of the four row groups
    small = dataclasses.replace(stream, cache=dataclasses.replace(spec, limit_bytes=20_000))
    assert whole(small) == plain
    assert 0 < Cache(small.cache).used_bytes() <= 20_000 if small.cache else False
    node_cache.cache_clear()
