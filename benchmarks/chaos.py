"""One training that is killed again and again: workers, data tasks, the driver, hosts.

    python benchmarks/chaos.py [--kills 20] [--seed 0] [--epochs 14] [--source BCCD] [--imgsz 64]

A cluster of three nodes on this machine: a head with the driver, and two hosts with a worker each. First a run is left alone. Then the same
run is killed at random places by a seeded script, always with SIGKILL: a training worker, a process that runs a data task, the driver (the
command is given again), or a host with all that runs on it (another one comes in its place). It must finish, with the weights, averaged
weights and optimizer state of the run that was left alone, to the last bit, and so with its metrics. For each kill it prints the work that
was done twice, and the seconds until training was again where it had been. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DEDUP_LOGS="0",
)

import contextlib

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_list
from resume import QUIET, Job, differing, run_file

from raypar.dataset.plan import WINDOW_IMAGES
from raypar.dataset.stream import LOOK_AHEAD_IMAGES
from raypar.train import pulse

KINDS = ("worker", "data task", "driver", "host")
PATIENCE_S = 300.0
# the last images of a run are rendered that early: no data task is left to kill
MADE_AHEAD = LOOK_AHEAD_IMAGES + 4 * WINDOW_IMAGES


class Hosts:
    """A head and two hosts on this machine."""

    def __init__(self) -> None:
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 200 << 20}
        self.cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
        self.nodes = [self._another(), self._another()]
        self.cluster.wait_for_nodes()

    def _another(self) -> Any:
        return self.cluster.add_node(num_cpus=2, object_store_memory=150 << 20)

    def replace(self, number: int) -> None:
        """SIGKILLs a host with everything on it; another one comes."""
        node = self.nodes.pop(number)
        for process in [
            psutil.Process(_raylet(node)),
            *psutil.Process(_raylet(node)).children(recursive=True),
        ]:
            _kill(process)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self._another())

    def processes(self, word: str, number: int | None = None) -> list[psutil.Process]:
        """What runs on the two hosts, or on one of them, and has a word in its title."""
        found = []
        for node in self.nodes if number is None else [self.nodes[number]]:
            for process in psutil.Process(_raylet(node)).children(recursive=True):
                try:
                    if word in " ".join(process.cmdline()):
                        found.append(process)
                except psutil.Error:
                    continue
        return found


def _raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def progress() -> int:
    """Images that rank 0 has seen, by the signs of life that ranks give once a second."""
    ids = {key.decode().partition(":")[0] for key in _internal_kv_list(b"", namespace=pulse.NAMESPACE)}
    return max((beat.cursor for each in ids for beat in pulse.beats(each)), default=0)


class Chaos:
    """The run that is killed.

    Args:
        job: it.
        hosts: where it runs.
        rng: of all choices.
    """

    def __init__(self, job: Job, hosts: Hosts, rng: random.Random):
        self.job, self.hosts, self.rng = job, hosts, rng

    def wait_until(self, what: Callable[[], bool], why: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            if self.job.process.poll() is not None:
                raise SystemExit(f"the run ended: {self.said()[-3000:]}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{why}: {self.said()[-3000:]}")
            time.sleep(0.05)

    def said(self) -> str:
        lines = self.job.log.read_text(errors="replace").splitlines()
        return "\n".join(line for line in lines if "train:" in line or "Error" in line)

    def resumes(self) -> list[int]:
        return [int(found) for found in re.findall(r"resuming after (\d+) of", self.said())]

    def kill(self, kind: str, place: int) -> dict[str, Any]:
        """Kills once the run has come to a place; returns what that cost."""
        self.wait_until(lambda: progress() >= place, f"it does not come to {place} images")
        before, seen = len(self.resumes()), progress()
        is_restart = self._strike(kind)
        began = time.monotonic()
        if is_restart:  # workers may live a moment longer than their driver
            self.wait_until(
                lambda: len(self.resumes()) > before, f"it does not resume after the {kind} was killed"
            )
        self.wait_until(lambda: progress() > seen, f"it does not go on after the {kind} was killed")
        seconds = time.monotonic() - began
        resumes = self.resumes()[before:]
        lost = max(0, seen - resumes[0]) if resumes else 0
        found = {
            "kind": kind,
            "images_seen": seen,
            "images_lost": lost,
            "restarts": len(resumes),
            "seconds": round(seconds, 1),
        }
        print(
            f"  after {seen:5d} images {kind:<9} killed: {lost:3d} images again, {len(resumes)} restart(s), {seconds:5.1f} s",
            flush=True,
        )
        return found

    def _strike(self, kind: str) -> bool:
        """Kills; whether a training worker went with it."""
        if kind == "driver":
            os.killpg(self.job.process.pid, signal.SIGKILL)
            self.job.process.wait()
            self.job = Job("train", self.job.config)
        elif kind == "host":
            number = self.rng.randrange(2)
            has_worker = bool(self.hosts.processes("RayTrainWorker", number))
            self.hosts.replace(number)
            return has_worker
        else:
            word = {"worker": "RayTrainWorker", "data task": "ReadWindows"}[kind]
            self.wait_until(lambda: bool(self.hosts.processes(word)), f"there is no {kind}")
            _kill(self.rng.choice(self.hosts.processes(word)))
        return kind != "data task"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--source", help="a Pascal VOC folder; nothing: generated shapes")
    parser.add_argument("--imgsz", type=int, default=64)
    options = parser.parse_args()
    os.environ.update(QUIET)
    rng = random.Random(options.seed)
    train = {"num_workers": 2, "precision": "fp32", "checkpoint_every_s": 1, "max_failures": options.kills,
             "yolo": {"epochs": options.epochs, "imgsz": options.imgsz}}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="raypar-chaos-") as folder:
        storage = Path(folder)
        hosts = Hosts()
        os.environ["RAY_ADDRESS"] = hosts.cluster.address
        Job("prepare", run_file(options, storage, "data")).wait()
        alone = Job("train", run_file(options, storage, "alone", **train))
        began = time.monotonic()
        alone.wait()
        alone_s = time.monotonic() - began
        total = (
            -(
                -json.loads((storage / "data/dataset/manifest.json").read_text())["splits"]["train"][
                    "num_images"
                ]
                // 16
            )
            * 16
            * options.epochs
        )
        kinds = [KINDS[i % len(KINDS)] for i in range(options.kills)]
        rng.shuffle(kinds)
        places = sorted(rng.randrange(total // 20, total - MADE_AHEAD) for _ in kinds)
        print(
            f"{total} images in {options.epochs} epochs take {alone_s:.0f} s alone; {options.kills} kills, seed {options.seed}",
            flush=True,
        )
        began = time.monotonic()
        chaos = Chaos(Job("train", run_file(options, storage, "chaos", **train)), hosts, rng)
        kills = [chaos.kill(kind, place) for kind, place in zip(kinds, places, strict=True)]
        chaos.job.wait()
        seconds = time.monotonic() - began
        found = differing(alone.train, chaos.job.train)
        print(
            f"it ends after {seconds:.0f} s; {sum(k['images_lost'] for k in kills)} of {total} images were trained with twice; {found}"
        )
        lines = [
            [json.loads(line) for line in (job.train / "metrics.jsonl").read_text().splitlines()]
            for job in (alone, chaos.job)
        ]
        metrics = [[(line["epoch"], line["map50"], line["map50_95"]) for line in each] for each in lines]
        missed = sum(line["images_missed"] for line in lines[1])
        ray.shutdown()
        hosts.cluster.shutdown()
    print(json.dumps({"benchmark": "chaos", "kills": kills, "seconds": seconds, "seconds_alone": alone_s, "images": total, "images_missed": missed,
                      "states": found, "equal_metrics": metrics[0] == metrics[1], "map50_95": metrics[1][-1][2]}))  # fmt: skip
    if "DIFFER" in found or metrics[0] != metrics[1] or missed:
        raise SystemExit("the run that was killed is not the one that was left alone")


if __name__ == "__main__":
    main()
