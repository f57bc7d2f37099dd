"""A training step on a GPU: nothing of ours makes the host wait for the device (docs/decisions/0016-device-syncs.md lists what of Ultralytics does)."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from raypar.dataset.batch import Batch
from raypar.dataset.manifest import Manifest, Split
from raypar.prefetch import sent
from raypar.train.agree import FiniteWatch
from raypar.train.epoch import Epoch
from raypar.train.loop import Loop
from raypar.train.recipe import Lender

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_parallel import BATCH, YOLO, make_batch

DEVICE = torch.device("cuda", 0)
WARM, HEARD = 4, 4  # steps


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_waits_for_the_device_in_ultralytics_only(optimizer: str, precision: torch.dtype) -> None:
    manifest = Manifest(
        task="detect", class_names=("a", "b"), splits={"train": Split(num_images=BATCH * 8)}, source=""
    )
    lender = Lender(
        {**YOLO, "optimizer": optimizer},
        model="yolov8n.yaml",
        manifest=manifest,
        batch=BATCH,
        seed=0,
        device=DEVICE,
    )
    loop = Loop(lender, num_images=BATCH * 8, steps_per_epoch=8, precision=precision)
    loop.start_epoch()
    epoch, finite, rows = Epoch(BATCH * 8), FiniteWatch(), np.arange(BATCH)
    given = (
        Batch(0, step, 0, np.empty((BATCH, 3, 0, 0), np.uint8), *3 * [np.empty(0)], rows)
        for step in range(WARM + HEARD)
    )  # type: ignore[arg-type]
    places: list[str] = []

    def hear(message: Warning | str, *_: object) -> None:
        """Whose line it is that waits: the innermost one outside of torch."""
        if "called a synchronizing" in str(message):
            mine = [
                frame
                for frame in traceback.extract_stack()[:-1]
                if "/torch/" not in frame.filename and frame.filename != warnings.__file__
            ]
            places.append(f"{mine[-1].filename}:{mine[-1].lineno}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = hear  # type: ignore[assignment]
        try:
            for batch, tensors in sent(given, lambda batch: make_batch(batch.step), DEVICE):
                if batch.step == WARM:
                    torch.cuda.synchronize()
                    places.clear()
                    torch.cuda.set_sync_debug_mode("warn")
                parts = loop.step(tensors, batch.step)
                epoch.stepped(parts, batch)
                finite.push(parts)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    theirs = [place for place in places if "/ultralytics/" in place]
    print(
        f"{len(theirs) / HEARD:.0f} a step in Ultralytics: {sorted({'/'.join(place.split('/')[-2:]) for place in theirs})}"
    )
    assert theirs, "else nothing was heard"
    mine = [place for place in places if place not in theirs]
    # GradScaler asks, once an update, whether it may step
    if precision == torch.float16 and optimizer == "SGD":
        assert len(mine) <= HEARD
        assert len({*mine}) <= 1
    else:
        assert not mine
    torch.cuda.synchronize()
    finite.push(parts)
    assert not finite.is_broken
    assert all(bool(torch.isfinite(total)) for total in epoch.losses.values())
