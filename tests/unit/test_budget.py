"""``train.yolo.time`` and ``fraction``: how many epochs, when mosaic is closed, and which images. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypar.dataset.plan import first_images
from raypar.train import worker
from raypar.train.budget import ENDLESS, epochs_within, mosaic_within
from raypar.train.recipe import settings

epochs = st.lists(st.floats(1, 10_000), max_size=12)


def history_of(seconds: list[float]) -> list[dict[str, Any]]:
    return [{"wait_s": 0.1 * each, "step_s": 0.7 * each, "validate_s": 0.2 * each} for each in seconds]


def test_epochs_of_one_length_fill_the_time() -> None:
    assert [epochs_within(1.0, history_of([600.0] * n), 100) for n in range(8)] == [100, 6, 6, 6, 6, 6, 6, 7]
    assert epochs_within(1.0, history_of([600.0, 1200.0]), 100) == 4, "slower ones make it fewer"
    assert mosaic_within(1.0, history_of([600.0] * 3), 2) == ENDLESS
    assert mosaic_within(1.0, history_of([600.0] * 5), 2) == 4


@given(epochs, st.floats(0.001, 100), st.integers(0, 20))
def test_what_was_decided_stays_decided(seconds: list[float], hours: float, close_mosaic: int) -> None:
    """A resume, which knows the history alone, decides as the run did that was left alone."""
    history = history_of(seconds)
    decided = [mosaic_within(hours, history[:n], close_mosaic) for n in range(len(history) + 1)]
    closed = [value for value in decided if value < ENDLESS]
    assert len(set(closed)) <= 1, "closed once"
    assert decided == sorted(decided, reverse=True)
    for n in range(1, len(history) + 1):
        assert epochs_within(hours, history[:n], 100) >= n
        total = sum(seconds[:n])
        assert epochs_within(hours, history[:n], 100) * total / n <= max(total, hours * 3600) * (1 + 1e-9)


@given(st.lists(st.integers(1, 50), min_size=1), st.floats(0.001, 1))
def test_a_fraction_is_the_first_images(row_groups: list[int], fraction: float) -> None:
    found = first_images(row_groups, fraction)
    assert sum(found) == max(1, round(sum(row_groups) * fraction))
    assert list(found[:-1]) == row_groups[: len(found) - 1]
    assert 1 <= found[-1] <= row_groups[len(found) - 1]


@pytest.mark.parametrize("yolo", [{"fraction": 0.0}, {"fraction": 2.0}, {"time": 0.0}, {"time": -1.0}])
def test_nonsense_is_refused(yolo: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"train.yolo.*{next(iter(yolo))}"):
        settings(yolo)


@dataclass
class Spec:
    mosaic_epochs: int


def test_closing_mosaic_begins_a_new_stream_at_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def batches(spec: Spec, rank: int, cursor: int) -> Any:
        begun.append((spec.mosaic_epochs, cursor))
        return iter(range(cursor, 10))

    monkeypatch.setattr(worker, "batches", batches)
    monkeypatch.setattr(worker, "to_tensors", lambda batch: {"of": batch})
    one: Any = object.__new__(worker.Worker)
    one.spec, one.cursor, one.rank, one.train = Spec(ENDLESS), 0, 0, {"augment": "cpu"}
    one.device = torch.device("cpu")
    one.stream = one._stream(one.spec)
    seen = []
    for batch, tensors in one._batches():
        assert tensors == {"of": batch}
        seen.append(batch)
        one.cursor += 1
        if batch == 5:
            one.spec = replace(one.spec, mosaic_epochs=1)
    assert seen == list(range(10)), "none is lost, none comes twice"
    assert begun == [(ENDLESS, 0), (1, 6)]
