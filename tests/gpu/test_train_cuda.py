"""`raypar.train.run` on one GPU, through Ray: both places of augmentation, and a resume."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

import raypar.prepare
import raypar.train
from raypar.config import RunConfig
from tests.runs import final_state, lines, train_folder, with_train


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        logging_level="warning",
        object_store_memory=512 << 20,
    )
    config = RunConfig.model_validate(
        {
            "name": "cuda",
            "storage": str(tmp_path_factory.mktemp("runs")),
            "prepare": {
                "format": "shapes",
                "shapes": {"train": 48, "val": 16, "height": 120, "width": 160},
                "rows_per_group": 16,
            },
            "train": {
                "model": "yolov8n.yaml",
                "num_workers": 1,
                "use_gpu": True,
                "batch": 8,
                "yolo": {"epochs": 2, "imgsz": 96},
            },
        }
    )
    raypar.prepare.run(config)
    yield config
    ray.shutdown()


@pytest.mark.parametrize("augment", ["cpu", "gpu"])
def test_a_training_runs_and_goes_on(prepared: RunConfig, augment: str) -> None:
    config = with_train(
        prepared, f"augment-{augment}", augment=augment, checkpoint_every_s=0.001, keep_checkpoints=99
    )
    raypar.train.run(config)
    folder, before = train_folder(config), lines(config)
    assert [line["images_missed"] for line in before] == [0, 0]
    assert all(np.isfinite(value) for line in before for value in line.values() if isinstance(value, float))
    for path in (sorted(folder.glob("checkpoint_0*"))[-1], folder / "summary.json"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    raypar.train.run(config)
    assert final_state(config)["is_finished"]
    assert lines(config)[1]["train/box_loss"] == pytest.approx(before[1]["train/box_loss"], rel=0.1)
    assert (folder / "best.pt").exists()
    assert Path(folder / "batch_0.png").exists()
