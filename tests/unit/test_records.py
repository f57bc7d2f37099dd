"""Packed records: the same ones come back, in any order, and they are small."""

from __future__ import annotations

import pickle
import tracemalloc
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from raypar.config import PrepareConfig
from raypar.dataset import shards
from raypar.dataset.formats import Record
from raypar.dataset.formats.yolo import label_path
from raypar.dataset.ingest import ShardJob
from raypar.dataset.records import Records
from raypar.storage import Folder

# lone surrogates too: bytes of a name that are no text
names = st.text(st.characters(exclude_categories=[]), max_size=8)
labels: st.SearchStrategy[Any] = st.one_of(
    st.none(), names, st.integers(), st.tuples(names, st.lists(st.integers()))
)
records = st.lists(st.builds(Record, names, names, labels), max_size=20)


@given(records, st.booleans())
def test_what_is_packed_comes_back(some: list[Record], derives: bool) -> None:
    packed = Records.of(some, len if derives else None)
    for copy in (packed, pickle.loads(pickle.dumps(packed))):
        assert list(copy) == some
        assert copy[:] == some
        assert [copy[i] for i in range(len(copy))] == some
        assert copy.take(np.arange(len(some))[::-1]) == some[::-1]


@given(st.lists(st.sampled_from(["a", "b", "a#2", "a#2#2", "\u00e9", "\U0001f600"]), max_size=30))
def test_an_image_that_is_listed_again_gets_an_id_of_its_own(ids: list[str]) -> None:
    packed = Records.of(Record(image_id, str(i), i) for i, image_id in enumerate(ids))
    apart, num_again = packed.told_apart()
    found = [record.image_id for record in apart]
    assert len(set(found)) == len(ids)
    assert (num_again == 0) == (len(set(ids)) == len(ids))
    assert [(r.image_path, r.labels) for r in apart] == [(str(i), i) for i in range(len(ids))]
    for i, image_id in enumerate(ids):
        is_again = image_id in ids[:i]
        assert found[i].startswith(f"{image_id}#") or (found[i] == image_id and not is_again)
        if "#" not in image_id:
            again = f"{image_id}#{ids[:i].count(image_id) + 1}"
            assert found[i].startswith(again) if is_again else found[i] == image_id
    assert [found[i] for i in apart.in_order()] == sorted(found)
    assert apart.told_apart() == (apart, 0)


@given(records, st.booleans(), st.data())
def test_some_are_selected(some: list[Record], derives: bool, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(some) - 1)) if some else st.just([]))
    assert list(Records.of(some, len if derives else None).select(rows)) == [some[i] for i in rows]


@given(records, records)
def test_digests_tell_records_apart(some: list[Record], others: list[Record]) -> None:
    one, other = (Records.of(x).digest(np.arange(len(x))) for x in (some, others))
    assert (one == other) == ([repr(r) for r in some] == [repr(r) for r in others])


def test_a_million_images_would_take_little_memory() -> None:
    def listed(count: int) -> Any:
        for i in range(count):
            path = f"/data/somewhere/images/train/part{i // 1000:04d}/{i:09d}.jpg"
            yield Record(path[29:], path, label_path(path))

    def peak(count: int) -> float:
        pool = pa.default_memory_pool()
        before = pool.bytes_allocated()
        tracemalloc.start()
        packed = Records.of(listed(count), label_path)
        template = ShardJob(Folder("/nowhere"), "", "", "yolo", 80, (), 64, 10**8)
        made = shards.portions({"train": packed}, template, PrepareConfig(source="x"), taken={}, first={})
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(len(portion.rows) for portion in made) == count
        return peak_bytes + pool.bytes_allocated() - before

    small, large = peak(20_000), peak(80_000)
    assert (large - small) / 60_000 < 250, (small, large)  # bytes an image
