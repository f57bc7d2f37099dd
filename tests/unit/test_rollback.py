"""Rollbacks are counted in a row and the learning rate recovers; both follow from what is on the disk. Pure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar.train.rollback import Standing, standing


def test_each_rollback_halves_and_each_good_epoch_takes_one_halving_back() -> None:
    assert standing([], 7) == (0, 0)
    assert standing([3], 2) == (1, 1)
    assert standing([3, 3], 2) == (2, 2)
    assert [standing([3, 3], ended).lr_scale for ended in (0, 2, 3, 4, 5)] == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert standing([3, 3], 3).in_a_row == 0, "one good epoch is enough"


def test_four_events_in_a_week_do_not_end_a_run() -> None:
    week = [10, 200, 390, 700]
    for n in range(1, 5):
        assert standing(week[:n], week[n - 1] - 1) == Standing(in_a_row=1, halvings=1)


def test_epochs_before_the_trouble_prove_nothing() -> None:
    """Training went back from epoch 6 to epoch 2: epochs 2 to 5, trained again, are not past it."""
    assert standing([6], 5) == (1, 1)
    assert standing([6, 5], 4).in_a_row == 2
    assert standing([6, 5, 6], 5).in_a_row == 3
    assert standing([6, 5, 6], 6).in_a_row == 0


@given(st.integers(1, 6), st.integers(0, 4), st.data())
def test_a_run_comes_to_an_end(num_epochs: int, limit: int, data: st.DataObject) -> None:
    """Whatever happens, no more than ``limit + 1`` rollbacks an epoch are made before a run ends, one way or the other."""
    epochs: list[int] = []
    while standing(epochs, epochs[-1] - 1 if epochs else 0).in_a_row <= limit:
        furthest = max(epochs, default=0)
        epochs.append(data.draw(st.integers(1, min(num_epochs, furthest + 1))))
        assert len(epochs) <= num_epochs * (limit + 1)


@given(st.lists(st.integers(1, 20), max_size=8), st.integers(0, 20))
def test_the_rate_only_rises_while_epochs_end_well(epochs: list[int], ended: int) -> None:
    now, later = standing(epochs, ended), standing(epochs, ended + 1)
    assert 0 < now.lr_scale <= later.lr_scale <= 1
    assert standing(epochs, ended + 40) == (0, 0)
    assert now.in_a_row >= later.in_a_row


@pytest.mark.parametrize("epochs", [[1], [1, 1], [4, 2]])
def test_trouble_in_the_first_epoch_counts_too(epochs: list[int]) -> None:
    assert standing(epochs, 0) == (len(epochs), len(epochs))
