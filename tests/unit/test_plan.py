"""The epoch plan: every image once an epoch, the same answer everywhere, and nothing but the cursor as state."""

from __future__ import annotations

import pickle
import time
import tracemalloc
import zlib
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.dataset.manifest import RowGroups, Shard, Split
from raypar.dataset.plan import Item, Plan, contiguous_share, first_images, first_strata


@st.composite
def drawn_plans(draw: st.DrawFn) -> Plan:
    """Of datasets that were never appended to, once, or several times."""
    strata = draw(st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=12), min_size=1, max_size=3))
    return Plan(
        row_groups=tuple(n for groups in strata for n in groups),
        seed=draw(st.integers(0, 2**32)),
        global_batch=draw(st.sampled_from([1, 2, 4, 8, 12, 16])),
        epochs=draw(st.integers(1, 4)),
        window_images=draw(st.integers(1, 300)),
        strata=tuple(map(len, strata)) if len(strata) > 1 else (),
    )


plans = drawn_plans()


def rows_seen(plan: Plan, epoch: int, window: int) -> np.ndarray:
    """Global row numbers that a window shows, one for each position."""
    starts = np.concatenate([[0], np.cumsum(plan.row_groups)])
    w = plan.window(epoch, window)
    laid = np.concatenate([np.arange(starts[g] + rows.start, starts[g] + rows.stop) for g, rows in w.rows()])
    return laid[w.order]


def epoch_order(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([rows_seen(plan, epoch, w) for w in range(plan.windows_per_epoch)])


@given(plans)
def test_every_epoch_shows_every_image_once_plus_the_top_up(plan: Plan) -> None:
    for epoch in range(plan.epochs):
        order = epoch_order(plan, epoch)
        assert len(order) == plan.positions_per_epoch
        assert sorted(order[: plan.num_images]) == list(range(plan.num_images))
        assert 0 <= len(order) - plan.num_images < plan.global_batch


@given(plans, st.sampled_from([1, 2, 4]))
def test_ranks_share_each_step_without_overlap_whatever_the_world_size(plan: Plan, world_size: int) -> None:
    if plan.global_batch % world_size:
        return
    step = np.arange(plan.global_batch)
    joined = np.concatenate([step[plan.share(r, world_size)] for r in range(world_size)])
    assert joined.tolist() == step.tolist()


@given(plans, st.data())
def test_a_resumed_plan_is_the_tail_of_the_whole(plan: Plan, data: st.DataObject) -> None:
    steps = data.draw(st.integers(0, plan.epochs * plan.steps_per_epoch))
    whole = np.concatenate([epoch_order(plan, e) for e in range(plan.epochs)])
    tail = [
        rows_seen(plan, i.epoch, i.window)[i.skip_steps * plan.global_batch :]
        for i in plan.items(steps * plan.global_batch)
    ]
    resumed = np.concatenate(tail) if tail else np.empty(0, int)
    assert resumed.tolist() == whole[steps * plan.global_batch :].tolist()


@given(plans)
@settings(max_examples=30)
def test_windows_cover_the_steps_and_stay_bounded(plan: Plan) -> None:
    covered = [s for w in range(plan.windows_per_epoch) for s in plan.steps_of(w)]
    assert covered == list(range(plan.steps_per_epoch))
    assert all(len(plan.steps_of(w)) < 2 * plan.steps_per_window for w in range(plan.windows_per_epoch))


def test_epochs_and_seeds_differ() -> None:
    plan = Plan(row_groups=(64,) * 20, seed=0, global_batch=16, epochs=2)
    other = Plan(row_groups=(64,) * 20, seed=1, global_batch=16, epochs=2)
    assert epoch_order(plan, 0).tolist() != epoch_order(plan, 1).tolist()
    assert epoch_order(plan, 0).tolist() != epoch_order(other, 0).tolist()


@given(st.integers(0, 500), st.integers(1, 9))
def test_validation_shares_cover_the_split_in_order(num_images: int, world_size: int) -> None:
    shares = [i for r in range(world_size) for i in contiguous_share(num_images, r, world_size)]
    assert shares == list(range(num_images))


def test_the_order_of_a_dataset_that_was_never_appended_to_stays_for_ever() -> None:
    """A run that was begun with an older raypar resumes to the same bits; the numbers are those of raypar 0.1."""
    plan = Plan((64, 30, 7, 64, 64, 11, 64), seed=5, global_batch=16, epochs=2, window_images=64)
    assert [zlib.crc32(epoch_order(plan, e).astype(np.int64).tobytes()) for e in range(2)] == [
        1081828995,
        509453082,
    ]


@pytest.mark.parametrize("window_images", [64, 256, 1024])
@pytest.mark.parametrize("global_batch", [16, 64, 256])
def test_appended_images_are_in_each_batch_as_after_one_shuffle(
    window_images: int, global_batch: int
) -> None:
    """A batch's number of new images has the mean, the deviation and the share of zeros of the hypergeometric distribution."""
    old, new = 300, 30  # row groups of 64 images
    groups, epochs = (64,) * (old + new), 12
    plan = Plan(groups, 1, global_batch, epochs, window_images, strata=(old, new))
    whole = plan.num_images // global_batch * global_batch
    found = np.concatenate(
        [(epoch_order(plan, e)[:whole] >= 64 * old).reshape(-1, global_batch).sum(1) for e in range(epochs)]
    )
    share = new / (old + new)
    deviation = (
        global_batch * share * (1 - share) * (plan.num_images - global_batch) / (plan.num_images - 1)
    ) ** 0.5
    num_batches = len(found)
    assert abs(found.mean() - global_batch * share) < 4 * deviation / num_batches**0.5
    assert abs(found.std() / deviation - 1) < 4 / (2 * num_batches) ** 0.5 + 0.02, found.std() / deviation
    has_none = (1 - share) ** global_batch  # about: the draws are without replacement
    expected = num_batches * has_none
    assert abs((found == 0).sum() - expected) < 5 * (expected + 1) ** 0.5


@given(plans)
def test_a_window_reads_one_row_group_more_for_each_append_at_most(plan: Plan) -> None:
    groups_of = np.repeat(np.arange(max(1, len(plan.strata))), plan.strata or (len(plan.row_groups),))
    for window in range(plan.windows_per_epoch):
        w = plan.window(0, window)
        assert (w.stops > w.starts).all(), "none is read in vain"
        for i in range(len(plan.strata) or 1):
            mine = groups_of[w.row_groups] == i
            is_cut = (w.stops - w.starts)[mine] < np.array(plan.row_groups)[w.row_groups[mine]]
            assert is_cut.sum() <= 2, "the first and the last of a line"


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4), st.floats(0.01, 1)
)
def test_a_fraction_cuts_the_strata_where_it_cuts_the_row_groups(
    strata: list[list[int]], fraction: float
) -> None:
    groups = first_images([n for each in strata for n in each], fraction)
    cut = first_strata([len(each) for each in strata], len(groups))
    assert sum(cut) == len(groups)
    assert all(0 < n <= len(each) for n, each in zip(cut, strata, strict=False))
    Plan(groups, 0, 1, 1, strata=cut)


def test_strata_follow_from_the_shards() -> None:
    shards = tuple(
        Shard(path=str(i), row_groups=(4,) * n, num_bytes=1, sha256="") for i, n in enumerate((3, 1, 2, 5))
    )
    assert Split(shards=shards).strata == (11,)
    assert Split(shards=shards, appended=(2, 3)).strata == (4, 2, 5)


def test_a_plan_for_ten_million_images_is_small() -> None:
    shards = tuple(
        Shard(path=f"train/{i:05d}.parquet", row_groups=(64,) * 50, num_bytes=1, sha256="")
        for i in range(3_125)
    )
    split = Split(shards=shards, num_images=10_000_000)
    tracemalloc.start()
    began = time.process_time()
    plan = Plan(
        row_groups=tuple(n for shard in shards for n in shard.row_groups),
        seed=0,
        global_batch=512,
        epochs=300,
    )
    groups = RowGroups(split)
    first = list(islice(plan.items(), 4096))
    last = plan.window(299, plan.windows_per_epoch - 1)
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(groups) == 156_250
    assert groups[156_249] == ("train/03124.parquet", 49)
    assert (first[0], first[-1]) == (Item(0, 0), Item(0, 4095))
    assert last.num_rows > 0
    assert len(last.row_groups) < 20
    assert peak < 100e6, peak
    assert seconds < 1, seconds  # CPU seconds
    assert len(pickle.dumps((plan, groups))) < 2_000_000

    began = time.process_time()
    for window in range(2000):
        plan.window(299, window)
    # a row group's place is worked out once an epoch, not once a window
    assert time.process_time() - began < 2


@given(st.lists(st.integers(1, 5), max_size=8))
def test_row_groups_are_found_in_their_shards(counts: list[int]) -> None:
    shards = tuple(
        Shard(path=str(i), row_groups=(4,) * count, num_bytes=1, sha256="") for i, count in enumerate(counts)
    )
    groups = RowGroups(Split(shards=shards))
    assert list(groups) == groups[:] == [(str(i), n) for i, count in enumerate(counts) for n in range(count)]


@given(plans, st.sampled_from([1, 2, 4]), st.data())
def test_ranks_shares_are_disjoint_and_cover_what_is_left_of_the_run(
    plan: Plan, world_size: int, data: st.DataObject
) -> None:
    if plan.global_batch % world_size:
        return
    cursor = plan.global_batch * data.draw(st.integers(0, plan.epochs * plan.steps_per_epoch))
    whole = np.concatenate([epoch_order(plan, epoch) for epoch in range(plan.epochs)])[cursor:].reshape(
        -1, plan.global_batch
    )
    seen = [
        rows_seen(plan, item.epoch, item.window)[item.skip_steps * plan.global_batch :]
        for item in plan.items(cursor)
    ]
    steps = (
        np.concatenate(seen).reshape(-1, plan.global_batch)
        if seen
        else np.zeros((0, plan.global_batch), np.int64)
    )
    ranks = [steps[:, plan.share(rank, world_size)] for rank in range(world_size)]
    assert all(rank.shape[1] == plan.global_batch // world_size for rank in ranks)
    assert np.array_equal(np.concatenate(ranks, axis=1), whole)


def test_a_plan_gives_the_same_windows_after_travelling_and_in_any_order() -> None:
    plan = Plan(row_groups=(3, 5, 7, 2, 6) * 9, seed=3, global_batch=4, epochs=3, window_images=12)
    asked = [(epoch, window) for epoch in range(3) for window in range(plan.windows_per_epoch)]
    answers = {place: rows_seen(plan, *place).tolist() for place in asked}
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    for place in np.random.default_rng(0).permutation(asked):
        assert rows_seen(again, *map(int, place)).tolist() == answers[tuple(map(int, place))]
