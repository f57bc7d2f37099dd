"""A step of ours asks the device for nothing. Shown on a CPU by the operations whose answer the host needs; on a GPU, with copies, in tests/gpu."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_parallel import BATCH, make_batch, make_loop
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raypar.dataset.batch import Batch
from raypar.train.epoch import Epoch

ASKING = {
    "_local_scalar_dense",
    "nonzero",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "masked_select",
    "equal",
    "bincount",
}
TORCH = str(Path(torch.__file__).parent)


class Asked(TorchDispatchMode):
    """Notes who runs an operation that makes a GPU's host wait: the innermost file that is not torch's, and its line."""

    def __init__(self) -> None:
        super().__init__()
        self.by: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_masked = name in {"index", "index_put", "index_put_"} and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in ASKING or is_masked:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            self.by.append((frame.f_code.co_filename, frame.f_lineno))
        return func(*args, **(kwargs or {}))


def places(asked: Asked, package: str) -> list[str]:
    return sorted({f"{Path(file).name}:{line}" for file, line in asked.by if f"/{package}/" in file})


@pytest.mark.parametrize("more", [{}, {"optimizer": "AdamW", "multi_scale": 0.5, "cls_pw": 0.5}])
def test_only_the_loss_of_ultralytics_asks_the_device(more: dict[str, Any]) -> None:
    loop, epoch = make_loop(**more), Epoch(BATCH)
    batch = Batch(0, 0, 0, np.empty((BATCH, 3, 0, 0), np.uint8), *3 * [np.empty(0)], np.arange(BATCH))  # type: ignore[arg-type]
    for step in range(2):  # what is built at the first step may ask
        with Asked() as asked:
            parts = loop.step(make_batch(step), step)
            epoch.stepped(parts, batch)
    assert loop.last_optimizer_step == 1
    assert not places(asked, "raypar")
    found = places(asked, "ultralytics")
    assert [place for place in found if place.startswith("loss.py")], "else this test would hear nothing"
    assert {place.split(":")[0] for place in found} <= {"loss.py", "tal.py"}


def test_the_test_hears_what_it_is_to_hear() -> None:
    def asks(x: Tensor) -> list[Any]:
        return [
            x.sum().item(),
            bool(x.any()),
            x[x > 1],
            x.nonzero(),
            x.unique(),
            int(x[0]),
            torch.zeros(x[1].long()),
        ]

    with Asked() as asked:
        asks(torch.arange(3.0))
    assert len(asked.by) == 7
