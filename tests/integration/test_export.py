"""Export: what is kept detects what the weights detect, and what does not is not kept.

{storage}/{name}/export/   best.onnx  export.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import raypar.export
from raypar.config import RunConfig
from raypar.detector import Detector

pytestmark = pytest.mark.usefixtures("ray_4_cpus")


def config_for(storage: Path, weights: Path, **export: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "e", "storage": str(storage), "export": {"weights": str(weights), **export}}
    )


def pictures() -> list[Any]:
    rng = np.random.default_rng(3)
    return [
        rng.integers(0, 256, (h, w, 3), np.uint8).repeat(16, 0).repeat(16, 1)
        for h, w in ((7, 9), (12, 5), (10, 10))
    ]


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_onnx_detects_what_the_weights_detect(
    tiny_weights: Path, tmp_path: Path, is_dynamic: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, tiny_weights, dynamic=is_dynamic)
    result = raypar.export.run(config)
    folder = Path(config.folder.uri) / "export"
    assert {path.name for path in folder.iterdir()} == {"best.onnx", "export.json"}
    assert json.loads((folder / "export.json").read_text()) == result
    assert result["num_agreeing"] >= 0.99 * result["num_compared"] > 0
    ours, exported = Detector.load(tiny_weights), Detector.load(folder / "best.onnx")
    assert (exported.class_names, exported.imgsz, exported.square, exported.sha256) == (
        ours.class_names,
        160,
        not is_dynamic,
        result["sha256"],
    )
    ours.square = exported.square
    report = raypar.export.compare(ours, exported, pictures(), is_half=False)
    assert report["num_agreeing"] >= 0.99 * report["num_compared"] > 0
    assert raypar.export.run(config) == result
    assert "is complete" in capsys.readouterr().out


def test_an_export_that_differs_is_refused_and_nothing_is_left(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exporter is made to export other weights: the task must see it. Run in this process, where it can be replaced."""
    import torch
    from ultralytics import YOLO

    original = YOLO.export

    def spoiled(self: Any, **options: Any) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(1.05)
        return original(self, **options)

    monkeypatch.setattr(YOLO, "export", spoiled)
    config = config_for(tmp_path, tiny_weights)
    weights = raypar.export.find(str(tiny_weights), config.folder, "export")
    with pytest.raises(ValueError, match="boxes agree with the weights"):
        raypar.export._export(weights, config.export, None, config.folder / "export")
    assert not config.folder.exists("export")


def test_what_cannot_be_exported_is_said(tiny_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"x")
    for config, message in (
        (config_for(tmp_path, tmp_path / "none.pt"), "no weights at"),
        (config_for(tmp_path, tmp_path / "a.onnx"), r"not a \.pt"),
        (config_for(tmp_path, tiny_weights, format="engine"), "tensorrt"),
    ):
        with pytest.raises(ValueError, match=message):
            raypar.export.check(config)
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="broken"):
        raypar.export.run(config_for(tmp_path, tmp_path / "broken.pt"))
    assert not (tmp_path / "e" / "export").exists() or not any((tmp_path / "e" / "export").iterdir())
