"""Fed the same batches from the same weights, our loop and Ultralytics' own trainer give the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.torch_utils import init_seeds

from raypar.dataset.manifest import Manifest, Split
from raypar.train.loop import Loop
from raypar.train.recipe import Lender

STEPS_PER_EPOCH, BATCH, IMGSZ, CLASSES = 5, 4, 64, ("a", "b", "c")
# 4 epochs of 5 steps: 3 of warm-up, while accumulation rises from 1 to nbs / batch = 4
YOLO = {
    "epochs": 4,
    "imgsz": IMGSZ,
    "nbs": 16,
    "plots": False,
    "save": False,
    "warmup_epochs": 3.0,
    "deterministic": False,
}


def make_batches() -> list[dict[str, torch.Tensor]]:
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(STEPS_PER_EPOCH):
        counts = rng.integers(1, 5, BATCH)
        total = int(counts.sum())
        wh = rng.uniform(0.1, 0.5, (total, 2))
        xy = rng.uniform(wh / 2, 1 - wh / 2)
        batches.append(
            {
                "img": torch.from_numpy(rng.integers(0, 256, (BATCH, 3, IMGSZ, IMGSZ), np.uint8)),
                "cls": torch.from_numpy(rng.integers(0, len(CLASSES), (total, 1))).float(),
                "bboxes": torch.from_numpy(np.concatenate([xy, wh], 1)).float(),
                "batch_idx": torch.from_numpy(np.repeat(np.arange(BATCH), counts)).float(),
            }
        )
    return batches


class FixedLoader(list):  # type: ignore[type-arg]
    """The batches, behind what Ultralytics asks of a data loader."""

    batch_size, drop_last, num_workers = BATCH, False, 0
    sampler = dataset = range(STEPS_PER_EPOCH * BATCH)

    def __iter__(self) -> Any:
        return (dict(batch) for batch in list.__iter__(self))  # Ultralytics changes a batch in place

    def reset(self) -> None:
        pass


class Reference(DetectionTrainer):  # type: ignore[misc]
    """Ultralytics' trainer with its own loop, fixed batches, and no validation."""

    def get_dataset(self) -> dict[str, Any]:
        return {"train": "", "val": "", "names": dict(enumerate(CLASSES)), "nc": len(CLASSES), "channels": 3}

    def get_dataloader(self, *_: Any, **__: Any) -> FixedLoader:
        return FixedLoader(make_batches())

    def _build_train_pipeline(self) -> None:
        # not DetectionTrainer's: it counts labels of a real dataset
        super(DetectionTrainer, self)._build_train_pipeline()

    def setup_model(self) -> None:
        init_seeds(0)
        super().setup_model()

    def validate(self) -> tuple[dict[str, float], float]:
        return {}, 0.0

    def final_eval(self) -> None:
        pass


def reference_losses(tmp_path: Path, yolo: dict[str, Any]) -> list[dict[str, float]]:
    trainer = Reference(
        overrides={
            "model": "yolov8n.yaml",
            "data": "x",
            "device": "cpu",
            "batch": BATCH,
            "seed": 0,
            "project": str(tmp_path),
            **yolo,
        }
    )
    losses: list[dict[str, float]] = []
    trainer.add_callback(
        "on_train_batch_end", lambda t: losses.append({k: float(v) for k, v in t.loss_items.items()})
    )
    trainer.train()
    return losses


def our_losses(yolo: dict[str, Any]) -> list[dict[str, float]]:
    count = STEPS_PER_EPOCH * BATCH
    manifest = Manifest(
        task="detect", class_names=CLASSES, splits={"train": Split(num_images=count)}, source=""
    )
    lender = Lender(
        yolo, model="yolov8n.yaml", manifest=manifest, batch=BATCH, seed=0, device=torch.device("cpu")
    )
    loop = Loop(lender, num_images=count, steps_per_epoch=STEPS_PER_EPOCH)
    losses = []
    for epoch in range(lender.args.epochs):
        loop.start_epoch()
        for i, batch in enumerate(make_batches()):
            losses.append({k: float(v) for k, v in loop.step(batch, epoch * STEPS_PER_EPOCH + i).items()})
        loop.end_epoch()
    return losses


@pytest.mark.parametrize(
    "optimizer", [{"optimizer": "auto"}, {"optimizer": "SGD", "lr0": 0.01, "cos_lr": True}]
)
def test_losses_equal_ultralytics_own_over_20_steps(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    theirs, ours = reference_losses(tmp_path, YOLO | optimizer), our_losses(YOLO | optimizer)
    assert len(theirs) == len(ours) == 20
    for step, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert b == pytest.approx(a, rel=1e-4), step
    assert theirs[0] != theirs[-1]  # it did train


def test_the_reference_is_sensitive_to_the_recipe(tmp_path: Path) -> None:
    """A wrong schedule does show: the parity above is not parity of anything."""
    theirs, other = (
        reference_losses(tmp_path, YOLO | {"optimizer": "SGD"}),
        our_losses(YOLO | {"optimizer": "SGD", "warmup_epochs": 0.0}),
    )
    assert any(b != pytest.approx(a, rel=1e-4) for a, b in zip(theirs, other, strict=True))
