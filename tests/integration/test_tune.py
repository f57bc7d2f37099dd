"""Ray Tune over real trainings: a study that is killed in the middle and goes on, trials that are stopped early, and what each trial used.

{storage}/{name}/tune/
    trials.jsonl  trials.csv  trials.png  best.yaml  settings.json  summary.json
    trial_000/run.yaml  trial_000/train/...
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import raypar.tune
from raypar import runfile
from raypar.config import RunConfig
from raypar.tune import study

EPOCHS = 2
SPACE = {"train.yolo.lr0": {"loguniform": [1e-3, 1e-1]}, "train.batch": {"choice": [4, 8]}}


def study_of(trained_run: RunConfig, name: str, **tune: Any) -> RunConfig:
    value = trained_run.model_dump(mode="json") | {
        "name": name,
        "dataset": trained_run.dataset_folder.uri,
        "prepare": None,
    }
    value["train"]["yolo"] = {
        "epochs": EPOCHS,
        "imgsz": 32,
        "optimizer": "SGD",
        "warmup_epochs": 0,
        "lrf": 1.0,
        "close_mosaic": 0,
    }
    value["train"]["checkpoint_every_s"] = 0.2
    return RunConfig.model_validate(value | {"tune": {"space": SPACE, "search": "random", **tune}})


def folder_of(config: RunConfig) -> Path:
    return Path(config.folder.uri) / "tune"


def start(run_file: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, "-m", "raypar", "tune", str(run_file)], start_new_session=True, stdout=file, stderr=file,
                                cwd=run_file.parent, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILLs the driver and everything that it started."""
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for member in family:
        if member.is_running():
            member.kill()


def epochs_of(trial: Path) -> list[dict[str, Any]]:
    path = trial / "train" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_killed_study_goes_on_and_each_trial_used_its_own_settings(
    trained_run: RunConfig, tmp_path: Path
) -> None:
    config = study_of(trained_run, "killed", num_trials=2, max_concurrent=2, scheduler="none")
    run_file, log, out = tmp_path / "run.yaml", tmp_path / "log", folder_of(config)
    run_file.write_text(runfile.dump(config))
    process = start(run_file, log)
    deadline = time.monotonic() + 150
    while not [*out.glob("trial_*/train/checkpoint_*/state.pt")]:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)
    begun = study.read(config)
    kill(process)
    assert not (out / "summary.json").exists()
    assert start(run_file, log).wait(timeout=200) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "resuming after" in text, "a half-done trial goes on from its own checkpoint"
    assert "2 trials: 2 finished; each used its own settings" in text

    records = study.read(config)
    assert [r["params"] for r in records] == [r["params"] for r in begun]
    assert records[0]["params"] != records[1]["params"]
    for record in records:
        trial = out / record["trial"]
        params = record["params"]
        assert (record["state"], record["own_settings"], record["epochs"]) == ("finished", True, EPOCHS)
        run = runfile.load(trial / "run.yaml")
        assert (run.train.yolo["lr0"], run.train.batch) == (params["train.yolo.lr0"], params["train.batch"])
        used = json.loads((trial / "train" / "used.json").read_text())["train"]
        assert (used["yolo"]["lr0"], used["batch"]) == (params["train.yolo.lr0"], params["train.batch"])
        lines = epochs_of(trial)
        assert [line["images_seen"] for line in lines] == [48, 96]
        assert lines[-1]["lr/pg0"] == pytest.approx(params["train.yolo.lr0"]), "what the optimizer had"
        assert (
            torch.load(trial / "train" / "last.pt", weights_only=False)["train_args"]["lr0"]
            == params["train.yolo.lr0"]
        )
        assert not (trial / "dataset").exists(), "all trials read the one dataset"
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert [float(row["train.yolo.lr0"]) for row in rows] == [r["params"]["train.yolo.lr0"] for r in records]
    assert (out / "trials.png").read_bytes().startswith(b"\x89PNG")
    best = study.best_of(records)
    assert best is not None
    trained = runfile.load(run_file, [f"@{out}/best.yaml"])
    assert (trained.train.yolo["lr0"], trained.train.batch) == (
        best["params"]["train.yolo.lr0"],
        best["params"]["train.batch"],
    )
    assert trained.train.yolo["epochs"] == EPOCHS, "the rest is the run file's"


def test_asha_remembers_earlier_trials_and_a_stopped_trial_leaves_nothing(
    ray_4_cpus: None, trained_run: RunConfig
) -> None:
    import ray

    config = study_of(trained_run, "stopped", num_trials=2, grace_epochs=1, reduction_factor=2)
    out = folder_of(config)
    out.mkdir(parents=True)
    earlier = {"trial": "trial_000", "state": "finished", "params": {"train.yolo.lr0": 0.01, "train.batch": 8}, "score": 0.9, "best_epoch": 2,
               "epochs": 2, "began": 0.0, "seconds": 1.0, "own_settings": True, "error": None, "scores": [[1, 0.9], [2, 0.9]]}  # fmt: skip
    (out / "trials.jsonl").write_text(json.dumps(earlier) + "\n")
    raypar.tune.run(config)
    record = study.read(config)[1]
    assert (record["state"], record["own_settings"], len(record["scores"])) == ("stopped", True, 1)
    deadline = time.monotonic() + 15
    while (free := ray.available_resources().get("CPU")) != 4 or left_over():
        assert time.monotonic() < deadline, (free, left_over())
        time.sleep(0.2)
    assert raypar.tune.run(config)["num_trials"] == 2, "a complete study is kept"
    with pytest.raises(ValueError, match="other settings"):
        raypar.tune.run(study_of(trained_run, "stopped", num_trials=2, metric="map50"))


def left_over() -> list[str]:
    """Processes of a training that are still there."""
    names = ("RayTrainWorker", "TrainController", "SplitCoordinator")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            found += [name for name in names if any(name in word for word in process.cmdline())]
        except psutil.Error:
            continue
    return found
