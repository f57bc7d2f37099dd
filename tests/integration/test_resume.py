"""Training that survives: killed workers, killed jobs, Ctrl-C, a loss that is no number, workers that come and go.

One run is disturbed in every way there is, and ends with the bits of one that was left alone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

import raypar.train
from raypar.config import RunConfig
from tests.runs import assert_same_bits, cursors, final_state, lines, train_folder, with_train

IMAGES, STEP, EPOCHS = 48, 4, 5  # so many that a word to stop is heard before the end


class Job:
    """``raypar train`` in a session of its own."""

    def __init__(self, config: RunConfig, folder: Path):
        self.config = config
        run_file = folder / f"{config.name}.yaml"
        run_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.log = folder / f"{config.name}-{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raypar", "train", str(run_file)], start_new_session=True, stdout=log, stderr=log,
                cwd=folder, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip

    def text(self) -> str:
        return self.log.read_text()

    def wait_until(self, what: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def wait_for_middle(self, epoch: int) -> int:
        """Until a checkpoint lies in the first half of an epoch (counted from 1); returns the images seen."""
        first = (epoch - 1) * IMAGES
        self.wait_until(lambda: any(first < cursor < first + IMAGES // 2 for cursor in cursors(self.config)))
        return cursors(self.config)[-1]

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """SIGKILLs it and everything that it started, found by session and by parentage."""
        family = (
            psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        )
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in family:
            if process.is_running():
                process.kill()


def refuse_a_rival(job: Job, folder: Path) -> None:
    """While a driver starts its workers, a second one of the same run ends at once."""
    job.wait_until((train_folder(job.config) / "lease.json").exists)
    rival = Job(job.config, folder)
    assert rival.process.wait(60) == 2, rival.text()
    assert f"error: another driver works on {train_folder(job.config)}: host " in rival.text()
    assert f"process {job.process.pid}, " in rival.text()


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """Gradients of two steps are added up, so that some epochs end with one that waits."""
    return {"num_workers": 2, "threads_per_worker": 1, "precision": "fp32", "batch": STEP, "keep_checkpoints": 3,
            "yolo": {"epochs": EPOCHS, "imgsz": 64, "nbs": 12, "close_mosaic": 1}}  # fmt: skip


def test_a_run_disturbed_in_every_way_ends_with_the_bits_of_one_left_alone(
    ray_4_cpus: None, trained_run: RunConfig, settings: dict[str, Any], tmp_path: Path
) -> None:
    undisturbed = with_train(trained_run, "undisturbed", **settings)
    disturbed = with_train(trained_run, "disturbed", **settings, checkpoint_every_s=0.01)

    first = Job(disturbed, tmp_path)
    try:
        refuse_a_rival(first, tmp_path)
        at_kill = first.wait_for_middle(2)
        first.workers()[-1].send_signal(signal.SIGKILL)  # one rank
        first.wait_until(lambda: "resuming after" in first.text())
        first.wait_until(lambda: cursors(disturbed)[-1] >= at_kill + 3 * STEP)
    finally:
        first.kill()  # the whole job
    resumed = int(re.findall(r"resuming after (\d+) of", first.text())[0])
    assert resumed > IMAGES
    assert resumed % IMAGES
    assert re.search(
        r"worker \d on .*, in stage '.*' after \d+ images, is lost: its process died without a word.*; failure 1 of 3",
        first.text(),
    )

    second = Job(disturbed, tmp_path)
    try:
        before = cursors(disturbed)[-1]
        second.wait_until(lambda: cursors(disturbed)[-1] > before)
        assert re.search(f"process {first.process.pid}, .* has ended: taken over", second.text())
        os.killpg(second.process.pid, signal.SIGINT)  # as Ctrl-C does
        assert second.process.wait(60) == 130, second.text()[-3000:]
    finally:
        second.kill()
    stopped = int(re.findall(r"stopped after (\d+) images, all of it saved", second.text())[0])
    assert stopped == cursors(disturbed)[-1]
    assert not (train_folder(disturbed) / "summary.json").exists()

    raypar.train.run(disturbed)
    raypar.train.run(undisturbed)
    assert [e["epoch"] for e in lines(disturbed)] == list(range(1, EPOCHS + 1))
    a, b = final_state(undisturbed), final_state(disturbed)
    for part in (
        "model",
        "ema",
        "ema_updates",
        "optimizer",
        "gradients",
        "stopper",
        "best_fitness",
        "cursor",
    ):
        assert_same_bits(a[part], b[part], part)
    for name in ("best.pt", "last.pt"):
        ours, theirs = (
            torch.load(train_folder(run) / name, weights_only=False) for run in (disturbed, undisturbed)
        )
        assert ours["trained_epochs"] == theirs["trained_epochs"], name
        assert_same_bits(ours["model"].state_dict(), theirs["model"].state_dict(), name)
    for ours, theirs in zip(lines(disturbed), lines(undisturbed), strict=True):
        assert (ours["images_missed"], ours["images_repeated"]) == (0, 0)
        assert ours["map50_95"] == theirs["map50_95"]
        for loss in ("train/box_loss", "train/cls_loss", "train/dfl_loss"):
            assert ours[loss] == pytest.approx(theirs[loss], rel=1e-5), loss


def test_a_loss_that_is_no_number_goes_back_and_ends_with_advice(
    ray_4_cpus: None, trained_run: RunConfig, settings: dict[str, Any]
) -> None:
    yolo = settings["yolo"] | {"box": 1e39}  # more than fp32 holds
    config = with_train(
        trained_run,
        "diverging",
        **{**settings, "num_workers": 1, "yolo": yolo},
        max_nan_restarts=1,
        max_failures=0,
    )
    with pytest.raises(
        RuntimeError, match=r"not finite in epoch 1, .*; that makes 2 times.*lower train.yolo.lr0"
    ):
        raypar.train.run(config)
    assert len(json.loads((train_folder(config) / "nan_restarts.json").read_text())) == 2
