"""What a training costs and keeps when it is disturbed.

    python benchmarks/resume.py exact [--source BCCD] [--imgsz 160]     # killed worker, killed job: the last bit
    python benchmarks/resume.py elastic [--epochs 12]                   # 4 workers -> 2 -> 4 within one run
    python benchmarks/resume.py preempted [--notice 30]                 # a node of the run is drained, and gone after the notice

``exact``: fp32, 2 workers, 4 epochs. One run is left alone; of a second one a worker is killed with SIGKILL in the middle of epoch
3; of a third one the whole job, which is then started again. Weights, EMA and optimizer state are compared bit by bit.

``elastic``: a cluster of three nodes on this machine, of which one with two of the four workers dies and comes back. Every epoch
must show every image once; the final mAP is set against runs left alone, with two seeds.

``preempted``: a cluster of three nodes on this machine. Both workers are on one of them, which Ray is told to drain as a cloud does before it
takes a spot machine back; when the notice is over, that node is killed. The run has ``max_failures: 0`` and saves by itself only at its end.
It is compared bit by bit with a run left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from raypar.config import RunConfig
from raypar.storage import Folder
from raypar.train import checkpoint

PREEMPTION = 2  # ray.core.generated.autoscaler_pb2.DRAIN_NODE_REASON_PREEMPTION
QUIET = {
    "YOLO_OFFLINE": "1",
    "YOLO_AUTOINSTALL": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "PYTHONPATH": str(Path(__file__).parents[1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("exact", "elastic", "preempted"))
    parser.add_argument("--source", help="a Pascal VOC folder; nothing: generated shapes")
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--epochs", type=int, default=12, help="of the elastic runs")
    parser.add_argument(
        "--notice", type=float, default=30.0, help="seconds between the drain and the node's end"
    )
    options = parser.parse_args()
    os.environ.update(QUIET)
    with tempfile.TemporaryDirectory(prefix="raypar-resume-") as storage:
        {"exact": exact, "elastic": elastic, "preempted": preempted}[options.what](options, Path(storage))


def run_file(options: argparse.Namespace, storage: Path, name: str, seed: int = 0, **train: Any) -> RunConfig:
    """A run over the dataset of the run ``data``, which is linked."""
    prepare: dict[str, Any] = {
        "format": "shapes",
        "shapes": {"train": 200, "val": 60, "height": 160, "width": 160},
    }
    if options.source:
        prepare = {"format": "voc", "source": str(Path(options.source).absolute())}
    config = RunConfig.model_validate(
        {"name": name, "storage": str(storage), "seed": seed, "prepare": prepare,
         "train": {"model": "yolov8n.yaml", "use_gpu": False, "batch": 16, "threads_per_worker": 1, **train}}
    )  # fmt: skip
    if name != "data":
        (storage / name).mkdir()
        (storage / name / "dataset").symlink_to(storage / "data" / "dataset")
    return config


class Job:
    """A verb of the command line, in a session of its own."""

    def __init__(self, verb: str, config: RunConfig):
        folder = Path(config.storage)
        path = folder / f"{config.name}.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        self.config, self.train = config, folder / config.name / "train"
        self.log = folder / f"{config.name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "raypar", verb, str(path)],
                start_new_session=True,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        if self.process.wait() != 0:
            sys.exit(self.log.read_text()[-3000:])

    def wait_until(self, what: Callable[[], bool]) -> None:
        while not what():
            if self.process.poll() is not None:
                sys.exit(self.log.read_text()[-3000:])
            time.sleep(0.02)

    def cursor(self) -> int:
        return max(
            (int(p.parent.name.split("_")[1]) for p in self.train.glob("checkpoint_*/state.pt")), default=0
        )

    def workers(self) -> list[psutil.Process]:
        family = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in family if p.is_running() and "RayTrainWorker" in " ".join(p.cmdline())]

    def kill(self) -> None:
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for process in family:
            if process.is_running():
                process.kill()


def exact(options: argparse.Namespace, storage: Path) -> None:
    """The killed runs against the one left alone."""
    Job("prepare", run_file(options, storage, "data")).wait()
    images = json.loads((storage / "data" / "dataset" / "manifest.json").read_text())["splits"]["train"][
        "num_images"
    ]
    per_epoch = -(-images // 16) * 16
    middle = 2 * per_epoch + per_epoch // 2  # of epoch 3
    train: dict[str, Any] = {
        "num_workers": 2,
        "precision": "fp32",
        "checkpoint_every_s": 1,
        "yolo": {"epochs": 4, "imgsz": options.imgsz},
    }
    alone = Job("train", run_file(options, storage, "alone", **train))
    alone.wait()
    for name in ("worker", "job"):
        config = run_file(options, storage, name, **train)
        job = Job("train", config)
        job.wait_until(lambda job=job: middle - per_epoch // 3 < job.cursor() < 3 * per_epoch)
        before = job.cursor()
        if name == "worker":
            job.workers()[-1].send_signal(signal.SIGKILL)
            job.wait()
        else:
            job.kill()
            job = Job("train", config)
            job.wait()
        resumed = [
            line.split("train: ", 1)[1].split(";")[0]
            for line in job.log.read_text().splitlines()
            if "resuming after" in line
        ]
        print(
            f"{name} killed with a checkpoint after {before} of {4 * per_epoch} images; {resumed[-1]}; {differing(alone.train, job.train)}",
            flush=True,
        )


def differing(a: Path, b: Path) -> str:
    """Where the final states of two runs, by their ``train`` folders, differ."""
    states = [checkpoint.load(out, checkpoint.names(out)[0], 1.0) for out in (Folder.at(a), Folder.at(b))]
    found: list[str] = []
    count = [0]
    for part in ("model", "ema", "ema_updates", "optimizer", "gradients", "scaler", "best_fitness", "cursor"):
        _compare(states[0][part], states[1][part], part, found, count)
    return f"{count[0]} numbers of weights, EMA and optimizer: " + (
        "equal to the last bit" if not found else f"DIFFER in {found[:5]}"
    )


def _compare(a: Any, b: Any, path: str, found: list[str], count: list[int]) -> None:
    if isinstance(a, torch.Tensor):
        count[0] += a.numel()
        if not torch.equal(a, b):
            found.append(path)
    elif isinstance(a, dict | list | tuple):
        pairs = (
            [(k, a[k], b[k]) for k in a]
            if isinstance(a, dict)
            else [(i, x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        )
        for key, x, y in pairs:
            _compare(x, y, f"{path}.{key}", found, count)
    elif a != b:
        found.append(path)


def elastic(options: argparse.Namespace, storage: Path) -> None:
    """4 -> 2 -> 4 workers; then two runs left alone."""
    import ray
    from ray.cluster_utils import Cluster

    import raypar.prepare
    import raypar.train

    raypar.train.GROW_EVERY_S = 10.0
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20})  # fmt: skip
    add = lambda: cluster.add_node(num_cpus=2, object_store_memory=100 << 20)  # noqa: E731
    nodes = [add(), add()]
    cluster.wait_for_nodes()
    raypar.prepare.run(run_file(options, storage, "data"))
    train: dict[str, Any] = {
        "num_workers": {"min": 1, "max": 4},
        "checkpoint_every_s": 5,
        "yolo": {"epochs": options.epochs, "imgsz": options.imgsz},
    }
    config = run_file(options, storage, "elastic", **train)
    # a node can only be started in the main thread
    thread = threading.Thread(target=raypar.train.run, args=(config,))
    began = time.monotonic()
    thread.start()
    metrics = storage / "elastic" / "train" / "metrics.jsonl"
    shown = _until(metrics, thread, lambda sizes: len(sizes) >= 2)
    print(
        f"{time.monotonic() - began:6.1f} s  epochs with {shown} workers; a node with two workers dies",
        flush=True,
    )
    cluster.remove_node(nodes.pop(), allow_graceful=False)
    at = time.monotonic()
    shown = _until(metrics, thread, lambda sizes: sizes[-1] == 2)
    print(
        f"{time.monotonic() - began:6.1f} s  epochs with {shown} workers; {time.monotonic() - at:.1f} s after the loss; the node is back",
        flush=True,
    )
    nodes.append(add())
    at = time.monotonic()
    shown = _until(metrics, thread, lambda sizes: sizes[-1] == 4)
    print(
        f"{time.monotonic() - began:6.1f} s  epochs with {shown} workers; {time.monotonic() - at:.1f} s after its return",
        flush=True,
    )
    thread.join()
    found = [("elastic", _lines(metrics))]
    for seed in (0, 1):
        train["num_workers"] = 4
        name = f"alone-{seed}"
        raypar.train.run(run_file(options, storage, name, seed, **train))
        found.append((name, _lines(storage / name / "train" / "metrics.jsonl")))
    for name, lines in found:
        wrong = [
            line["epoch"]
            for line in lines
            if line["images_missed"] or line["images_repeated"] != -(-200 // 16) * 16 - 200
        ]
        print(f"{name:10} workers {[x['world_size'] for x in lines]}, best mAP50 {max(x['map50'] for x in lines):.3f}, mAP50-95 "
              f"{max(x['map50_95'] for x in lines):.3f}; epochs that did not show every image exactly as planned: {wrong or 'none'}", flush=True)  # fmt: skip
    ray.shutdown()
    cluster.shutdown()


def preempted(options: argparse.Namespace, storage: Path) -> None:
    """A drained node, seen from outside: what was saved, when, where it went on, and what that cost."""
    import ray
    from ray.cluster_utils import Cluster

    import raypar.prepare
    import raypar.train
    from raypar.train import pulse

    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20})  # fmt: skip
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    raypar.prepare.run(run_file(options, storage, "data"))
    train: dict[str, Any] = {
        "num_workers": 2,
        "precision": "fp32",
        "max_failures": 0,
        "yolo": {"epochs": 3, "imgsz": options.imgsz},
    }
    config = run_file(options, storage, "preempted", **train)
    out = storage / "preempted" / "train"
    thread = threading.Thread(target=raypar.train.run, args=(config,), kwargs={"run_id": "preempted"})
    thread.start()
    saved, last_seen = (
        dict[int, float](),
        dict[int, int](),
    )  # when each checkpoint was first there; the last cursor of each process of rank 0

    def beat_when(holds: Callable[[pulse.Beat], bool]) -> pulse.Beat:
        while thread.is_alive():
            for name in checkpoint.names(Folder.at(out)):
                saved.setdefault(int(name.split("_")[1]), time.monotonic())
            for beat in pulse.beats("preempted")[:1]:
                last_seen[beat.pid] = beat.cursor
                if holds(beat):
                    return beat
            time.sleep(0.05)
        sys.exit("the training ended before")

    before = beat_when(lambda beat: beat.cursor > 208 and beat.stage.startswith("step"))  # in epoch 2
    tables = [table for table in ray.util.placement_group_table().values() if table["state"] == "CREATED"]
    drained = {node for table in tables for node in table["bundles_to_node_id"].values()}
    assert len(drained) == 1, "both workers are on one node"
    began = time.monotonic()
    ray._raylet.GcsClient(address=cluster.address).drain_node(
        *drained, PREEMPTION, "taken back", int((time.time() + options.notice) * 1000)
    )
    beat_when(lambda beat: beat.pid != before.pid)
    cursor = max(saved)
    beat_when(lambda beat: beat.pid != before.pid and beat.cursor > cursor)
    back_s, saved_s = time.monotonic() - began, saved[cursor] - began
    print(f"drained after {before.cursor} images, with {options.notice:g} s left; a checkpoint after {cursor} images was there {saved_s:.1f} s later; "
          f"images redone: {max(0, last_seen[before.pid] - cursor)}; {back_s - saved_s:.1f} s after it the first step on another node", flush=True)  # fmt: skip
    time.sleep(max(0.0, options.notice - (time.monotonic() - began)))
    cluster.remove_node(next(node for node in nodes if node.node_id in drained), allow_graceful=False)
    print("the drained node is gone", flush=True)
    thread.join()
    for event in (json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()):
        print(f"  events.jsonl: {event['what']}")
    raypar.train.run(run_file(options, storage, "alone", **train))
    lines = _lines(out / "metrics.jsonl")
    print(f"images missed {[x['images_missed'] for x in lines]}, repeated {[x['images_repeated'] for x in lines]} (padding of the last step "
          f"alone: {-(-200 // 16) * 16 - 200}); against a run left alone: {differing(out, storage / 'alone' / 'train')}", flush=True)  # fmt: skip
    ray.shutdown()
    cluster.shutdown()


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _until(metrics: Path, thread: threading.Thread, holds: Callable[[list[int]], bool]) -> list[int]:
    """Waits until it holds for the worker counts of the epochs so far, and returns these."""
    while not (sizes := [line["world_size"] for line in _lines(metrics)]) or not holds(sizes):
        if not thread.is_alive():
            sys.exit(f"the training ended with epochs of {sizes} workers")
        time.sleep(0.1)
    return sizes


if __name__ == "__main__":
    main()
