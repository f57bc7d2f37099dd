"""`ray job submit` from a checkout that is not installed on the node: prepare, train, and what a finished run leaves.

    {storage}/job/
        run.yaml
        dataset/manifest.json  dataset/{train,val}/*.parquet
        train/best.pt  train/last.pt  train/metrics.jsonl  train/results.csv  train/checkpoint_*/

The cluster is this test's own, with ports and a folder of its own, and is ended by process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
TINY = [
    "name=job", "prepare.shapes.train=32", "prepare.shapes.val=8", "prepare.shapes.height=96", "prepare.shapes.width=128", "train.use_gpu=false",
    "train.batch=8", "train.yolo.epochs=1", "train.yolo.imgsz=64", "train.yolo.close_mosaic=0",
]  # fmt: skip


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def environment() -> dict[str, str]:
    """Without PYTHONPATH: raypar must come with the job."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("RAY_") and k not in ("PYTHONPATH", "YOLO_OFFLINE")
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return {**kept, "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The job address of a head with 4 logical CPUs."""
    gcs, dashboard, agent, agent_grpc, client, metrics = free_ports(6)
    folder = Path(tempfile.mkdtemp(prefix="rp-", dir="/tmp"))  # short: it holds Unix sockets
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--port={gcs}", f"--temp-dir={folder}/ray", "--num-cpus=4", "--num-gpus=0", "--node-ip-address=127.0.0.1",
             f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
             f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}", "--min-worker-port=0", "--max-worker-port=0",
             f"--object-store-memory={512 << 20}"],
            env=environment(), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    try:
        _wait_for(head, f"{url}/api/version", folder / "head.log")
        yield url
    finally:
        _end(head)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(head: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer from {url}: {log.read_text()}")


def _end(head: subprocess.Popen[bytes]) -> None:
    """SIGTERM lets `ray start --block` end its processes; what is left of its group is killed."""
    head.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(timeout=5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    head.wait(timeout=30)


def submit(address: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    """Submits as a user would, waits, and returns exit code and output."""
    command = [
        RAY,
        "job",
        "submit",
        "--address",
        address,
        "--working-dir",
        ".",
        "--runtime-env",
        "jobs/runtime_env.yaml",
        "--",
        *entrypoint,
    ]
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )


def test_the_checkout_travels(address: str) -> None:
    code = (
        "import ray; ray.init(); print(ray.get(ray.remote(lambda: __import__('raypar').__file__).remote()))"
    )
    done = submit(address, "python", "-c", code)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "working_dir_files" in done.stdout, "a worker took another raypar than the job's"


def test_prepare_and_train_as_jobs(address: str, tmp_path: Path) -> None:
    for verb in ("prepare", "train"):
        done = submit(address, "python", "-m", "raypar", verb, "jobs/demo.yaml", f"storage={tmp_path}", *TINY)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    run = tmp_path / "job"
    assert "ray 2." in (run / "run.yaml").read_text().splitlines()[-1]
    assert json.loads((run / "dataset/manifest.json").read_text())["splits"]["train"]["num_images"] == 32
    for name in ("best.pt", "last.pt", "results.csv"):
        assert (run / "train" / name).stat().st_size > 0
    (line,) = [json.loads(text) for text in (run / "train/metrics.jsonl").read_text().splitlines()]
    assert line["world_size"] == 2
    assert line["images_seen"] == 32
    assert list((run / "train").glob("checkpoint_*"))

    refused = submit(
        address,
        "python",
        "-m",
        "raypar",
        "train",
        "jobs/demo.yaml",
        f"storage={tmp_path}",
        *TINY,
        "train.use_gpu=true",
    )
    assert refused.returncode == 1, "a failed command is a failed job"
    assert "error: 2 GPUs are needed, the cluster (1 node(s)) has 0" in refused.stdout + refused.stderr
