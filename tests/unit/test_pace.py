"""The pauses between turns of Ray Data's scheduling loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raypar.dataset import pace


def test_pauses_grow_while_no_block_moves_and_are_short_again_when_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(pace.time, "sleep", pauses.append)
    metrics = SimpleNamespace(num_task_outputs_generated=1, num_outputs_taken=0)
    executor: Any = SimpleNamespace(_topology=[SimpleNamespace(metrics=metrics)])
    one = pace.Pace()
    for _ in range(6):
        one.on_execution_step(executor)
    metrics.num_outputs_taken += 1  # the training took a block: there is room for another
    one.on_execution_step(executor)
    assert pauses == [0.02, 0.04, 0.08, 0.16, 0.16, 0.16, 0.02]
