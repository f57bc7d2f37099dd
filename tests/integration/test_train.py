"""Training through Ray: what it leaves, that ranks agree, and that a killed run goes on as if nothing had happened.

{storage}/{name}/train/
    settings.json  summary.json  metrics.jsonl  results.csv  results.png  batch_0.png ...
    best.pt  last.pt  checkpoint_0000000096/state.pt
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import raypar.train
from raypar.config import RunConfig
from raypar.dataset.cache import PREFIX, SHARED_MEMORY


def train_folder(config: RunConfig) -> Path:
    return Path(config.folder.uri) / "train"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def with_train(config: RunConfig, name: str, **train: Any) -> RunConfig:
    """The same dataset, another run: the dataset folder is linked."""
    value = config.model_dump(mode="json")
    value["name"] = name
    value["train"] |= train
    other = RunConfig.model_validate(value)
    Path(other.folder.uri).mkdir()
    (Path(other.folder.uri) / "dataset").symlink_to(Path(config.folder.uri) / "dataset")
    return other


def final_state(config: RunConfig) -> dict[str, Any]:
    newest = sorted(train_folder(config).glob("checkpoint_0*"))[-1]
    return torch.load(newest / "state.pt", weights_only=False)


def assert_same_bits(a: Any, b: Any, path: str = "state") -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def test_layout_and_metrics(ray_4_cpus: None, trained_run: RunConfig) -> None:
    folder = train_folder(trained_run)
    names = {p.name for p in folder.iterdir()}
    assert names >= {"settings.json", "summary.json", "metrics.jsonl", "results.csv", "results.png", "batch_0.png", "best.pt", "last.pt"}
    assert not [n for n in names if n.endswith(".part")]
    epochs = lines(folder)
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert [e["images_seen"] for e in epochs] == [48, 96]
    wanted = {
        "train/box_loss",
        "val/box_loss",
        "map50",
        "map50_95",
        "precision",
        "recall",
        "lr/pg0",
        "images_per_s",
        "wait_s",
        "step_s",
        "validate_s",
        "checkpoint_s",
        "world_size",
    }
    assert all(e.keys() >= wanted for e in epochs[:1])
    assert all(np.isfinite(v) for e in epochs for v in e.values() if isinstance(v, float))
    assert sorted(p.name for p in folder.glob("checkpoint_0*")) == ["checkpoint_0000000048", "checkpoint_0000000096"]


def test_ultralytics_loads_and_runs_the_weights(trained_run: RunConfig) -> None:
    from ultralytics import YOLO

    for name in ("best.pt", "last.pt"):
        model = YOLO(train_folder(trained_run) / name)
        assert list(model.names.values()) == ["circle", "square", "star", "triangle"] or set(model.names.values()) == {
            "circle",
            "square",
            "star",
            "triangle",
        }
        model.predict(np.zeros((96, 128, 3), np.uint8), imgsz=96, verbose=False)


def test_a_finished_run_is_kept_and_other_settings_are_refused(
    ray_4_cpus: None, trained_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (train_folder(trained_run) / "best.pt").stat().st_mtime_ns
    assert raypar.train.run(trained_run)["num_epochs"] == 2
    assert "complete" in capsys.readouterr().out
    assert (train_folder(trained_run) / "best.pt").stat().st_mtime_ns == before
    value = trained_run.model_dump(mode="json")
    value["train"]["yolo"]["lr0"] = 0.5
    with pytest.raises(ValueError, match="other settings"):
        raypar.train.run(RunConfig.model_validate(value))


def test_two_workers_hold_equal_weights_after_a_step(ray_4_cpus: None, trained_run: RunConfig, tmp_path: Path) -> None:
    import ray.train
    import ray.train.torch

    def train_loop(config: dict[str, Any]) -> Any:
        import torch
        import torch.distributed as dist

        from raypar.dataset.manifest import Manifest
        from raypar.storage import Folder
        from raypar.train.loop import Loop
        from raypar.train.recipe import Lender
        from raypar.train.worker import assert_synchronised

        rank = dist.get_rank()
        manifest = Manifest.load(Folder(config["dataset"]))
        lender = Lender(
            {"epochs": 1, "imgsz": 64, "nbs": 4}, model="yolov8n.yaml", manifest=manifest, batch=4, seed=0, device=torch.device("cpu")
        )
        loop = Loop(lender, num_images=48, steps_per_epoch=12, world_size=2)
        torch.manual_seed(rank)  # every rank sees other images
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        batch = {
            "img": images,
            "cls": torch.zeros(2, 1),
            "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]] * 2),
            "batch_idx": torch.tensor([0.0, 1.0]),
        }
        before = torch.cat([p.detach().reshape(-1) for p in lender.model.parameters()]).clone()
        loop.start_epoch()
        loop.step(batch, 3)
        assert_synchronised(lender.model, rank)
        after = torch.cat([p.detach().reshape(-1) for p in lender.model.parameters()])
        gathered = [torch.empty_like(after) for _ in range(2)]
        dist.all_gather(gathered, after)
        with torch.no_grad():
            next(lender.model.parameters()).view(-1)[0] += rank  # one weight of rank 1 goes astray
        try:
            assert_synchronised(lender.model, rank)
            noticed = False
        except RuntimeError:
            noticed = True
        return {"moved": bool((before != after).any()), "equal": torch.equal(*gathered), "noticed": noticed} if rank == 0 else None

    result = ray.train.torch.TorchTrainer(
        train_loop,
        train_loop_config={"dataset": (trained_run.folder / "dataset").uri},
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path)),
    ).fit()
    assert result.return_value == {"moved": True, "equal": True, "noticed": True}


KILL_AFTER = 1  # epochs


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(ray_4_cpus: None, trained_run: RunConfig, tmp_path: Path) -> None:
    """The whole driver, with its Ray, is killed by SIGKILL after the first epoch; the same command then finishes the run."""
    yolo = {"epochs": 3, "imgsz": 64, "close_mosaic": 1}
    settings = {"yolo": yolo, "precision": "fp32", "num_workers": 2, "threads_per_worker": 1, "keep_checkpoints": 1}
    undisturbed, killed = (with_train(trained_run, f"{name}-{tmp_path.name}", **settings) for name in ("undisturbed", "killed"))
    raypar.train.run(undisturbed)

    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(killed.model_dump(mode="json")))
    script = tmp_path / "drive.py"
    script.write_text(
        "import sys, yaml, ray, raypar.train\nfrom raypar.config import RunConfig\n"
        "ray.init(address='local', num_cpus=4, include_dashboard=False, object_store_memory=256 << 20)\n"
        "raypar.train.run(RunConfig.model_validate(yaml.safe_load(open(sys.argv[1]))))\n"
    )
    log = (tmp_path / "log").open("w")
    driver = subprocess.Popen([sys.executable, str(script), str(run_file)], start_new_session=True, stdout=log, stderr=log)
    metrics, deadline = train_folder(killed) / "metrics.jsonl", time.monotonic() + 240
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < KILL_AFTER:
            assert driver.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.02)
    finally:
        kill_session(driver)
    assert not (train_folder(killed) / "summary.json").exists()
    done_before = len(lines(train_folder(killed)))
    raypar.train.run(killed)
    assert [e["epoch"] for e in lines(train_folder(killed))] == [1, 2, 3]
    assert done_before < 3
    a, b = final_state(undisturbed), final_state(killed)
    for part in ("model", "ema", "ema_updates", "optimizer", "stopper", "best_fitness", "cursor"):
        assert_same_bits(a[part], b[part], part)


def kill_session(driver: subprocess.Popen[Any]) -> None:
    """SIGKILLs a process and everything it started, found by session and by parentage."""
    import psutil

    family = psutil.Process(driver.pid).children(recursive=True) if driver.poll() is None else []
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    for process in family:
        if process.is_running():
            process.kill()


def test_a_cache_changes_nothing_and_is_gone_afterwards(ray_4_cpus: None, trained_run: RunConfig) -> None:
    config = with_train(trained_run, "cached", cache="ram", cache_gb=0.5)
    raypar.train.run(config)
    for ours, theirs in zip(lines(train_folder(config)), lines(train_folder(trained_run)), strict=True):
        for key in ("train/box_loss", "train/cls_loss", "train/dfl_loss", "map50_95"):
            assert ours[key] == theirs[key], key
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}*"))
