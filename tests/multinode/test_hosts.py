"""Training across hosts that share nothing but a network and the storage on it; one of them dies, another one's cable is pulled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from raypar.storage import Folder
from raypar.train.network import interface_of
from tests.multinode import hosts
from tests.multinode.hosts import Host, Lan, wait_until

IMAGES, STEP, EPOCHS, TIMEOUT_S = 400, 8, 2, 25
RUN: dict[str, Any] = {
    "name": "far",
    "storage": "s3://runs",
    "prepare": {"format": "shapes", "shapes": {"train": IMAGES, "val": 8, "height": 64, "width": 80}, "rows_per_group": 16},
    "train": {
        "model": "yolov8n.yaml", "use_gpu": False, "num_workers": 4, "cpus_per_worker": 2, "batch": STEP, "threads_per_worker": 1,
        "precision": "fp32", "checkpoint_every_s": 0.01, "collective_timeout_s": TIMEOUT_S,
        "yolo": {"epochs": EPOCHS, "imgsz": 64, "close_mosaic": 1},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """A head that takes no workers, and three hosts with room for two workers each, one Ray; storage is an S3 server on their network."""
    if reason := hosts.missing():
        pytest.skip(reason)
    made = Lan()
    server = ThreadedMotoServer(ip_address=made.address, port=0, verbose=False)
    server.start()
    variables = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": f"http://{made.address}:{server.get_host_and_port()[1]}",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    boto3.client("s3").create_bucket(Bucket="runs")
    try:
        variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex()}
        head, *others = [made.host(name, variables) for name in ("head", "alpha", "beta", "gamma")]
        head.start_ray(num_cpus=1)
        head.variables["RAY_ADDRESS"] = f"{head.address}:6379"
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda host: host.start_ray(head.address, num_cpus=4), others))
        yield made
    finally:
        made.close()
        server.stop()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class Job:
    """``raypar train`` on the head."""

    def __init__(self, lan: Lan, log: Path):
        self.lan, self.log = lan, log
        self.out = Folder(f"s3://runs/{RUN['name']}/train")
        self.process: subprocess.Popen[bytes] = lan.hosts[0].start("python -m raypar train run.yaml", log)

    def text(self) -> str:
        return self.log.read_text()

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Until the log says it."""
        deadline = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.text())) is None:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, f"not said within {timeout_s} s: {pattern}\n{self.end()}"
            time.sleep(0.1)
        return found

    def end(self) -> str:
        """The log's end, without Ray's remarks."""
        return "\n".join(line for line in self.text().splitlines() if "train:" in line or "Error" in line)[
            -6000:
        ]

    def newest(self) -> int:
        """Images seen of the newest complete checkpoint."""
        names = [name for name in self.out.list(recursive=True) if name.endswith("/state.pt")]
        return max((int(name.split("/")[0].split("_")[1]) for name in names), default=0)

    def wait_for_middle(self, epoch: int) -> int:
        """Until a checkpoint lies in an epoch's first three quarters (counted from 1); returns its images."""
        first = (epoch - 1) * IMAGES
        deadline = time.monotonic() + 180
        while not first < (cursor := self.newest()) < first + 3 * IMAGES // 4:
            assert self.process.poll() is None, self.end()
            assert time.monotonic() < deadline, f"at {cursor} images: {self.end()}"
            time.sleep(0.3)
        return cursor

    def workers(self) -> dict[str, list[int]]:
        """Local ranks by host, as the run's environment.json has them."""
        found: dict[str, list[int]] = {}
        for line in self.out.read_json("environment.json")["workers"]:
            host, address, local_rank = re.fullmatch(
                r"rank \d: (\w+) \((.*)\), local rank (\d)", line
            ).groups()  # type: ignore[union-attr]
            assert address == self.host(host).address
            found.setdefault(host, []).append(int(local_rank))
        return found

    def host(self, name: str) -> Host:
        return next(host for host in self.lan.hosts if host.name == name)


def test_two_hosts_train_one_dies_and_a_link_is_cut(lan: Lan, tmp_path: Path) -> None:
    head = lan.hosts[0]
    head.run(f"cat > run.yaml <<'END'\n{yaml.safe_dump(RUN)}END")
    head.run("python -m raypar prepare run.yaml")
    job = Job(lan, tmp_path / "train.log")
    try:
        saved = job.wait_for_middle(1)
        first = job.workers()
        assert sorted(first.values()) == [[0, 1], [0, 1]], first
        dying = job.host(sorted(first)[0])
        dying.kill()
        # Ray notices the dead host first, or a rank that loses its connection to it does: both name it.
        lost = job.wait_for(rf"(?:train: worker|no sign of life from rank) \d on {dying.name} \(\S+?\),? in stage '[^']*'.*? after (\d+) images"
                            r".*; failure 1 of 3", 120)  # fmt: skip
        resumed = int(job.wait_for(r"resuming after (\d+) of", 180)[1])
        assert saved <= resumed <= int(lost[1]) + 2 * STEP
        assert resumed % IMAGES

        saved = job.wait_for_middle(2)
        wait_until(lambda: set(job.workers()) != set(first), 10, "environment.json is not written anew")
        second = job.workers()
        assert sorted(second.values()) == [[0, 1], [0, 1]], second
        lonely = job.host(sorted(second)[0])
        lonely.cut()
        began = time.monotonic()
        stuck = job.wait_for(r"rank \d on (\w+) \(\S+\) in stage '(.*)', after \d+ images: waited too long for the others: .*"
                             r"no sign of life from (.*); failure 2 of 3", TIMEOUT_S + 60)  # fmt: skip
        assert time.monotonic() - began < TIMEOUT_S + 30
        assert stuck[1] == next(name for name in second if name != lonely.name)
        assert re.match(
            rf"rank \d on {lonely.name} \({re.escape(lonely.address)}\) in stage '\w.*' for \d+ s", stuck[3]
        ), stuck[3]
        # Ray gives a host up that it has not heard of for half a minute, more or less: another one comes in
        # its place
        lonely.kill()
        delta = lan.host("delta", head.variables)
        delta.start_ray(head.address, num_cpus=4)
        assert job.process.wait(300) == 0, job.end()
    finally:
        if job.process.poll() is None:
            job.process.kill()

    again = [int(cursor) for cursor in re.findall(r"resuming after (\d+) of", job.text())]
    assert len(again) == 2
    assert again[1] >= saved
    lines = [json.loads(line) for line in job.out.read("metrics.jsonl").splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    for line in lines:
        assert (line["world_size"], line["images_missed"], line["images_repeated"]) == (4, 0, 0)
    assert lines[-1]["images_seen"] == IMAGES * EPOCHS


def test_an_interface_is_found_by_its_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.77") is None
