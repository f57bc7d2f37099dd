"""Weights of strangers: what they hold is not run, whichever verb reads them, and every verb says so before a cluster is busy."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ultralytics.nn import tasks as models
from ultralytics.utils import checks

import raypar.evaluate
import raypar.export
import raypar.predict
import raypar.serve
from raypar.cli import main
from raypar.config import RunConfig
from raypar.detector import Detector
from raypar.storage import Folder
from raypar.train import checkpoint, initial
from raypar.train.recipe import settings, weights_file
from raypar.weights import UntrustedCodeError, read_model, restricted
from tests import pictures

HINT = "write weights_trusted: true at the top of the run file"
TASKS = {
    "detect": (models.DetectionModel, "yolov8n.yaml"),
    "segment": (models.SegmentationModel, "yolov8n-seg.yaml"),
    "pose": (models.PoseModel, "yolov8n-pose.yaml"),
    "obb": (models.OBBModel, "yolov8n-obb.yaml"),
    "classify": (models.ClassificationModel, "yolov8n-cls.yaml"),
}


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def hostile_pickle(path: Path) -> None:
    torch.save({"model": Hostile(path.with_suffix(".ran"))}, path)


def hostile_pickle_of_old(path: Path) -> None:
    torch.save({"model": Hostile(path.with_suffix(".ran"))}, path, _use_new_zipfile_serialization=False)


def hostile_train_args(path: Path) -> None:
    model = models.DetectionModel("yolov8n.yaml", nc=1, verbose=False)
    torch.save({"model": model, "train_args": {"imgsz": Hostile(path.with_suffix(".ran"))}}, path)


def unknown_module(path: Path) -> None:
    """Ultralytics would install a package of this name."""
    module = types.ModuleType("no_such_package_of_raypar")
    kind = type("Head", (), {"__module__": module.__name__})
    module.Head = kind  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        torch.save({"model": kind()}, path)
    finally:
        del sys.modules[module.__name__]


HOSTILE = [hostile_pickle, hostile_pickle_of_old, hostile_train_args, unknown_module]


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.subprocess, "check_output", lambda *a, **_: pytest.fail(f"{a} is run"))


def run_of(tmp_path: Path, weights: Path, **more: Any) -> RunConfig:
    (tmp_path / "images").mkdir(exist_ok=True)
    (tmp_path / "images/a.jpg").write_bytes(pictures.encode(pictures.corners(), "JPEG"))
    section = {"weights": str(weights)}
    return RunConfig.model_validate(
        {"name": "run", "storage": str(tmp_path / "runs"), "predict": section | {"source": str(tmp_path / "images")},
         "export": section | {"format": "torchscript"}, "serve": section | {"port": 18_931}, "evaluate": section, **more}
    )  # fmt: skip


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[RunConfig], object]]:
    """The checks that read weights, without a dataset or a port."""
    manifest = types.SimpleNamespace(task="detect", class_names=("a",))
    monkeypatch.setattr(raypar.evaluate.Manifest, "load", lambda _: manifest)
    monkeypatch.setattr(raypar.evaluate.verify, "check_sizes", lambda *_: None)
    monkeypatch.setattr(raypar.serve, "_check_port", lambda *_: None)
    modules = (raypar.predict, raypar.export, raypar.serve, raypar.evaluate)
    return {module.__name__.removeprefix("raypar."): module.check for module in modules}


@pytest.mark.parametrize("make", HOSTILE)
def test_no_verb_runs_what_weights_hold(
    make: Callable[[Path], None], verbs: dict[str, Callable[[RunConfig], object]], tmp_path: Path
) -> None:
    path, mark = tmp_path / "bad.pt", tmp_path / "bad.ran"
    make(path)
    config = run_of(tmp_path, path)
    reads = {
        **{verb: lambda check=check: check(config) for verb, check in verbs.items()},
        "train": lambda: initial.find(str(path), "detect"),
        "actors": lambda: Detector.load(path),
    }
    for reader, read in reads.items():
        with pytest.raises(ValueError, match=HINT) as caught:
            read()
        assert str(path) in str(caught.value), reader
        assert "\n" not in str(caught.value), reader
        assert not mark.exists(), reader


def test_what_they_hold_is_named(tmp_path: Path) -> None:
    hostile_pickle(tmp_path / "a.pt")
    unknown_module(tmp_path / "b.pt")
    for name, code in {"a.pt": "posix.mkdir", "b.pt": "no_such_package_of_raypar.Head"}.items():
        with pytest.raises(UntrustedCodeError, match=rf"Python code \({code}\), which was not run"):
            read_model(tmp_path / name, trusted=False)


def test_trust_lets_them_run(tmp_path: Path) -> None:
    """Which shows that the attacks above are some."""
    for make in HOSTILE[:3]:
        path = tmp_path / f"{make.__name__}.pt"
        make(path)
        with pytest.raises(ValueError, match=r"cannot be read: (?!.*weights_trusted)"):
            Detector.load(path, trusted=True)
        assert path.with_suffix(".ran").exists()
    unknown_module(tmp_path / "unknown.pt")
    with pytest.raises(ValueError, match="No module named 'no_such_package_of_raypar'"):
        Detector.load(tmp_path / "unknown.pt", trusted=True)


def test_trust_ends_with_the_reading() -> None:
    for before in (True, False):
        with restricted(trusted=before):
            for trusted in (True, False):
                with restricted(trusted=trusted):
                    assert models.SAFE_LOAD is not trusted
            assert models.SAFE_LOAD is not before


def test_a_model_yaml_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = models.yaml_model_load("yolov8n.yaml") | {
        "activation": f"__import__('os').mkdir({str(mark)!r})"
    }
    with pytest.raises(TypeError, match="unsupported activation"), restricted(trusted=False):
        models.DetectionModel(content, verbose=False)
    assert not mark.exists()


@pytest.mark.parametrize("task", TASKS)
def test_weights_of_every_task_are_read(task: str, tmp_path: Path) -> None:
    kind, name = TASKS[task]
    model = kind(name, verbose=False)
    model.names, model.task = {0: "a"}, task
    args = settings({"imgsz": 64}, batch=4, seed=0, task=task)
    model.args = args
    ours = weights_file(model, args, epoch=1, metrics={"a": 0.5})
    (tmp_path / "best.pt").write_bytes(ours)
    # as Ultralytics' own trainer saves it, and its release files: more around the model
    theirs = {"epoch": 3, "best_fitness": np.float64(0.5), "model": None, "ema": model.half(), "updates": 7, "optimizer": None,
              "train_args": vars(args), "train_metrics": {"m": np.float64(1)}, "train_results": {"epoch": [1]}, "date": "", "version": "8.4.190",
              "git": {"root": "", "branch": None}, "license": "", "docs": ""}  # fmt: skip
    torch.save(theirs, tmp_path / "theirs.pt")
    for file in ("best.pt", "theirs.pt"):
        assert read_model(tmp_path / file, trusted=False).task == task
        assert Detector.load(tmp_path / file, task=task).imgsz == 64


@pytest.mark.parametrize("verb", ["predict", "serve", "export"])
def test_weights_of_another_task_are_one_line(
    verb: str,
    verbs: dict[str, Callable[[RunConfig], object]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kind, name = TASKS["pose"]
    model = kind(name, verbose=False)
    torch.save({"model": model, "train_args": {"imgsz": 64, "task": "pose"}}, tmp_path / "pose.pt")
    config = run_of(tmp_path, tmp_path / "pose.pt")
    with pytest.raises(ValueError, match=r"pose\.pt are for 'pose', not for 'detect'"):
        verbs[verb](config)
    (tmp_path / "run.yaml").write_text(raypar_file(config))
    for dry_run in ([], ["--dry-run"]):
        assert main([verb, str(tmp_path / "run.yaml"), *dry_run]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "are for 'pose', not for 'detect'" in said.err
    assert "nothing was started" in said.out


def raypar_file(config: RunConfig) -> str:
    from raypar import runfile

    return runfile.dump(config)


def test_what_a_dry_run_knows_of_weights(
    verbs: dict[str, Callable[[RunConfig], object]], tmp_path: Path, tiny_weights: Path
) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(tiny_weights.read_bytes()[:100_000])
    for name in ("weights.bin", "weights.onnx"):
        (tmp_path / name).write_bytes(b"nothing")
    for verb, check in verbs.items():
        if verb == "evaluate":  # the classes of these are others than the dataset's
            with pytest.raises(ValueError, match="knows 4 classes, the dataset has 1"):
                check(run_of(tmp_path, tiny_weights))
        else:
            check(run_of(tmp_path, tiny_weights))
        for path, reason in {cut: "cannot be read", tmp_path / "weights.bin": "the name ends with none of",
                             tmp_path / "weights.onnx": "not a .pt" if verb == "export" else "cannot be read"}.items():  # fmt: skip
            with pytest.raises(ValueError, match=reason) as caught:
                check(run_of(tmp_path, path))
            assert str(path) in str(caught.value)


def test_every_process_that_imports_raypar_is_safe(tmp_path: Path) -> None:
    code = "import raypar, ultralytics.utils as u; print(u.SAFE_LOAD, u.AUTOINSTALL)"
    variables = {
        k: v for k, v in os.environ.items() if k not in ("ULTRALYTICS_SAFE_LOAD", "YOLO_AUTOINSTALL")
    }
    said = subprocess.run(
        [sys.executable, "-c", code], env=variables, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said.stdout.split()[-2:] == ["True", "False"]


def test_checkpoints_run_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Folder(str(tmp_path))
    good = {"model": {"w": torch.zeros(2)}, "best_fitness": np.float64(0.5), "cursor": 96, "is_finished": False, "optimizer": {"state": {}},
            "epoch": {"times_seen": np.arange(3, dtype=np.uint8), "losses": {"box": np.float32(1)}}, "history": [{"epoch": 1}]}  # fmt: skip
    checkpoint.write(out, good, keep=2)
    bad = io.BytesIO()
    torch.save(good | {"cursor": 192, "extra": Hostile(tmp_path / "ran")}, bad)
    out.write(f"{checkpoint.name_of(192)}/{checkpoint.STATE}", bad.getvalue())
    found = checkpoint.newest(out, 1.0)
    assert found is not None
    assert found[0] == checkpoint.name_of(96)
    assert found[1]["epoch"]["times_seen"].tolist() == [0, 1, 2]
    assert found[1]["best_fitness"] == 0.5
    assert "is passed over" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(out, checkpoint.name_of(192), 1.0)
