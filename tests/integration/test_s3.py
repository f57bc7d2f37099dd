"""Everything in a bucket: prepare, train, evaluate and predict against a server that speaks S3; errors of a store are one line, soon."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import ray.train
from moto.server import ThreadedMotoServer
from PIL import Image

import raypar.evaluate
import raypar.predict
import raypar.prepare
import raypar.train
from raypar import cli, lease
from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.formats import coco, voc, yolo
from raypar.dataset.manifest import Manifest
from raypar.dataset.remote import place_of
from raypar.storage import Folder, StorageError
from raypar.train import checkpoint, failure
from raypar.train.saver import Saver
from tests.conftest import start_ray
from tests.link import Link

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """To an S3 server with an empty bucket ``runs``; the environment names it, and Ray's workers inherit that."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    link = Link(*server.get_host_and_port())
    before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://{link.address}")
    boto3.client("s3").create_bucket(Bucket="runs")
    yield link
    link.close()
    server.stop()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def endpoint(link: Link) -> str:
    """host:port of the S3 server."""
    return link.address


@pytest.fixture(scope="module")
def ray_with_s3(endpoint: str) -> Iterator[None]:
    start_ray()
    yield
    ray.shutdown()


def run_of(storage: str, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "bucket",
            "storage": storage,
            "prepare": {
                "format": "shapes",
                "shapes": {"train": 24, "val": 8, "height": 64, "width": 80},
                "rows_per_group": 8,
            },
            "train": {
                "model": "yolov8n.yaml",
                "use_gpu": False,
                "batch": 8,
                "yolo": {"epochs": 1, "imgsz": 64},
                **train,
            },
            "evaluate": {"use_gpu": False},
            "predict": {"use_gpu": False},
        }
    )


class Outage(threading.Thread):
    """Cuts the link to the store once a checkpoint is there, and mends it when a worker has said that it cannot write."""

    def __init__(self, link: Link, out: Folder, capfd: pytest.CaptureFixture[str]):
        super().__init__(daemon=True)
        self.link, self.out, self.capfd, self.said = link, out, capfd, ""
        self.start()

    def run(self) -> None:
        while not any(name.endswith("state.pt") for name in self.out.list(recursive=True)):
            time.sleep(0.1)
        self.link.cut()
        while "storage: cannot write" not in self.said:
            self.said += "".join(self.capfd.readouterr())
            time.sleep(0.1)
        self.link.mend()


def test_a_store_that_does_not_come_back_is_named(link: Link, endpoint: str) -> None:
    """What rank 0's saver does with it, and what is said of that; a worker's start is not needed for it."""
    out = Folder.at(f"s3://runs/gone?endpoint_override={endpoint}&scheme=http") / "train"
    saver = Saver(0.0)  # one attempt: the client tries by itself for some seconds
    link.cut()
    try:
        saver.submit(
            f"write {out.shown('checkpoint_0000000008')}",
            lambda: checkpoint.write(out, {"cursor": 8}, keep=2),
        )
        with pytest.raises(StorageError) as caught:
            saver.flush()
    finally:
        link.mend()
        saver.end()
    error = failure.explained(caught.value, "rank 0 on a in stage 'step 1', after 8 images")  # type: ignore[arg-type]
    kind, cause = failure.diagnosis(ray.train.WorkerGroupError("x", {0: error}), {})
    assert kind == "final"
    assert cause.startswith(
        "worker 0: rank 0 on a in stage 'step 1', after 8 images: cannot write s3://runs/gone/train/checkpoint_0000000008, tried"
    )
    assert cause.endswith("; raise train.storage_timeout_s to wait longer")
    assert "\n" not in cause


def test_a_folder_is_a_folder_in_a_bucket_too(endpoint: str, tmp_path: Path) -> None:
    for uri in ("s3://runs/folder", f"s3://runs/folder?endpoint_override={endpoint}&scheme=http"):
        folder = Folder.at(uri) / "a"
        assert not folder.is_local
        assert not folder.exists()
        assert folder.list() == []
        folder.check_reachable()
        folder.check_writable()
        folder.write("b/one.txt", "one")
        folder.write("b/one.txt", "two")
        folder.write_json("c.json", {"x": 1})
        assert folder.list("b") == ["b/one.txt"]
        assert folder.list(recursive=True) == ["b/one.txt", "c.json"]
        assert (folder / "b").read("one.txt") == b"two"
        assert folder.read_json("c.json") == {"x": 1}
        (tmp_path / "big").write_bytes(os.urandom(12_000_000))  # several parts
        folder.upload(tmp_path / "big", "big")
        assert folder.download("big", tmp_path / "again").read_bytes() == (tmp_path / "big").read_bytes()
        with folder.open("big") as file:
            file.seek(11_000_000)
            assert file.read(10) == (tmp_path / "big").read_bytes()[11_000_000:11_000_010]
        holding, name = Folder.holding(folder.uri)
        assert (holding / name).read("c.json") == folder.read("c.json")
        folder.delete("b")
        assert folder.list(recursive=True) == ["big", "c.json"]
        folder.delete()
        folder.delete()
        assert not folder.exists()


def test_one_driver_at_a_time_works_on_a_run_in_a_bucket(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SETTLE_REMOTE_S", 0.0)
    out = Folder.at(f"s3://runs/leased?endpoint_override={endpoint}&scheme=http") / "train"
    with lease.Lease(out, "train", print) as mine:
        with pytest.raises(
            lease.HeldError, match=r"another driver works on s3://runs/leased/train: host .*, process "
        ):
            lease.refuse_if_held(out)
        out.write("best.pt", b"weights")
        mine.clear()
        mine.check()
        assert out.list() == [lease.LEASE]
        out.write_json(lease.LEASE, {**asdict(mine.mine), "nonce": "another", "host": "elsewhere"})
        with pytest.raises(RuntimeError, match=r"taken over by another driver \(host elsewhere"):
            mine.check()
    assert out.exists(lease.LEASE), "the other's"


@pytest.mark.usefixtures("ray_with_s3")
def test_prepare_train_evaluate_and_predict_in_a_bucket(
    link: Link, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, local = (
        run_of(
            "s3://runs/all", yolo={"epochs": 3, "imgsz": 64}, storage_timeout_s=60, checkpoint_every_s=0.1
        ),
        run_of(str(tmp_path)),
    )
    manifest = raypar.prepare.run(config)
    assert manifest == raypar.prepare.run(local)  # the same shards to the byte, by their checksums
    outage = Outage(link, config.folder / "train", capfd)
    summary = raypar.train.run(config)
    outage.join(60)
    assert "storage: cannot write s3://runs/all/bucket/train/" in outage.said
    assert "failure 1 of" not in outage.said + capfd.readouterr().out  # the first attempt waited it out
    assert summary["num_epochs"] == 3
    assert (config.folder / "train").exists("best.pt")
    assert raypar.train.run(config) == summary  # complete: nothing to do
    metrics = raypar.evaluate.run(config)
    assert metrics["num_images"] == 8
    assert np.isfinite(metrics["map50_95"])
    assert raypar.predict.run(config)["num_images"] == 8
    names = (config.folder).list(recursive=True)
    assert {
        "dataset/manifest.json",
        "train/metrics.jsonl",
        "train/results.png",
        "evaluate/metrics.json",
        "predict/00000.parquet",
    } <= {*names}
    assert not list(tmp_path.parent.glob("s3*"))

    dataset = config.folder / "dataset"
    shard = manifest.splits["train"].shards[0].path
    data = bytearray(dataset.read(shard))
    data[len(data) // 2] ^= 1
    dataset.write(shard, bytes(data))
    with pytest.raises(ValueError, match=f"shard {shard} is altered"):
        raypar.train.run(run_of("s3://runs/all", overwrite=True))
    dataset.write(shard, bytes(data[:-1]))
    with pytest.raises(ValueError, match=f"shard {shard} has {len(data) - 1} bytes"):
        raypar.train.check(config)


@pytest.mark.usefixtures("ray_with_s3")
def test_the_uri_may_name_the_server(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # the driver's: the workers' names the server
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    config = run_of(f"s3://runs/named?endpoint_override={endpoint}&scheme=http")
    manifest = raypar.prepare.run(config)
    dataset = config.folder / "dataset"
    assert Manifest.load(dataset) == manifest
    verify.check_sums(dataset, manifest, ("train", "val"))
    assert json.loads(dataset.read(verify.VERIFIED)).keys() == {
        s.path for split in manifest.splits.values() for s in split.shards
    }


def error_of(storage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says to a storage that does not work; within seconds, and on one line."""
    (tmp_path / "run.yaml").write_text(f"name: x\nstorage: {storage!r}\nprepare: {{format: shapes}}\n")
    began = time.monotonic()
    assert cli.main(["prepare", str(tmp_path / "run.yaml")]) == 2
    assert time.monotonic() - began < 30
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"error: storage {storage} cannot be reached: ")
    assert "\n" not in said
    return said


def test_a_missing_bucket_is_named(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no bucket 'nowhere'" in error_of("s3://nowhere/runs", tmp_path, capsys)


def test_a_server_that_is_not_there_is_said(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"s3://runs/x?endpoint_override=127.0.0.1:{unused.getsockname()[1]}&scheme=http"
        assert "connect" in error_of(uri, tmp_path, capsys)


class Refusal(BaseHTTPRequestHandler):
    """What S3 answers to a key that it does not know."""

    def answer(self) -> None:
        body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The AWS Access Key Id you provided does not exist.</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def test_a_wrong_key_is_said(endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = error_of(
            f"s3://runs/x?endpoint_override=127.0.0.1:{server.server_port}&scheme=http", tmp_path, capsys
        )
    finally:
        server.shutdown()
    assert "ACCESS_DENIED" in said or "INVALID_ACCESS_KEY" in said.upper()


# A source in a bucket


def source_tree(root: Path) -> Path:
    """Images with labels in three formats; one image is damaged, one has no labels."""
    annotations = []
    for i, split in enumerate(["train"] * 12 + ["val"] * 8):
        path = root / "JPEGImages" / split / f"{i:02d}.png"
        for folder in (
            path.parent,
            root / "images" / split,
            root / "labels" / split,
            root / "Annotations" / split,
            root / "annotations",
        ):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), 7 * i, np.uint8)).save(path)
        data = b"\x89PNG no image" if i == 5 else path.read_bytes()
        (root / "images" / split / path.name).write_bytes(data)
        if i != 3:
            (root / "labels" / split / f"{i:02d}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
        box = "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax>"
        xml = f"<annotation><object><name>cat</name><bndbox>{box}</bndbox></object></annotation>"
        (root / "Annotations" / split / f"{i:02d}.xml").write_text(xml)
        annotations.append({"id": i, "file_name": path.name})
    (root / "data.yaml").write_text("names: [cat]\npath: .\ntrain: images/train\nval: images/val\n")
    boxes = [{"image_id": i, "category_id": 1, "bbox": [1, 2, 9, 9]} for i in range(20)]
    for split, images in (("train", annotations[:12]), ("val", annotations[12:])):
        data = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
    return root


@pytest.fixture(scope="module")
def sources(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local folder that lies in the bucket too, as ``s3://runs/source``."""
    root = source_tree(tmp_path_factory.mktemp("source"))
    client = boto3.client("s3")
    for file in sorted(root.rglob("*.*")):
        client.put_object(
            Bucket="runs", Key=f"source/{file.relative_to(root).as_posix()}", Body=file.read_bytes()
        )
    return root


def sourced(source: str, storage: str, **prepare: Any) -> RunConfig:
    section = {"source": source, "max_rejected": 0.2, "rows_per_group": 4, "shard_mb": 0.0002, **prepare}
    return RunConfig.model_validate({"name": "x", "storage": storage, "prepare": section})


@pytest.mark.usefixtures("ray_with_s3")
def test_a_source_in_a_bucket_gives_the_shards_of_a_local_one(
    endpoint: str,
    sources: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    here = raypar.prepare.run(sourced(str(sources / "data.yaml"), str(tmp_path / "here")))
    config = sourced(
        f"s3://runs/source/data.yaml?endpoint_override={endpoint}&scheme=http", "s3://runs/sourced"
    )
    dataset = config.folder / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(raypar.prepare, "_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            raypar.prepare.run(config)
    assert not dataset.exists("manifest.json")
    dataset.delete("train/00000.parquet")
    capsys.readouterr()
    there = raypar.prepare.run(config)
    num_shards = sum(len(split.shards) for split in here.splits.values())
    assert f"in 1 shards -> {dataset.uri}; {num_shards - 1} are done already" in capsys.readouterr().out
    assert there.model_copy(update={"source": here.source}) == here
    assert len(here.splits["train"].shards) > 1
    assert there.source == "s3://runs/source/data.yaml"
    rejected = [json.loads(line) for line in dataset.read("rejected.jsonl").splitlines()]
    assert [line["file"] for line in rejected] == ["s3://runs/source/images/train/05.png"]
    voc_manifest = raypar.prepare.run(sourced("s3://runs/source", str(tmp_path / "voc"), format="voc"))
    assert sum(split.num_images for split in voc_manifest.splits.values()) == 20


@pytest.mark.parametrize(
    ("scan", "name"), [(yolo.scan, "data.yaml"), (coco.scan, ""), (lambda place: voc.scan(place, 0), "")]
)
def test_a_bucket_is_listed_as_a_folder_is(sources: Path, scan: Any, name: str) -> None:
    here, there = (
        scan(sources / name if name else sources),
        scan(place_of(f"s3://runs/source/{name}".rstrip("/"))),
    )
    assert (here.class_names, list(here.splits)) == (there.class_names, list(there.splits))
    for split, records in here.splits.items():
        found = list(there.splits[split])
        assert [r.image_id for r in found] == [r.image_id for r in records]
        assert [r.image_path for r in found] == [
            r.image_path.replace(str(sources), "s3://runs/source") for r in records
        ]


def source_error(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says to a source that does not work; within seconds, and on one line."""
    (tmp_path / "run.yaml").write_text(f"name: x\nstorage: {tmp_path}\nprepare: {{source: '{source}'}}\n")
    began = time.monotonic()
    assert cli.main(["prepare", str(tmp_path / "run.yaml")]) == 2
    assert time.monotonic() - began < 30
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://nowhere/data.yaml", "there is no bucket 'nowhere'"),
        ("s3://runs/source/none.yaml", "s3://runs/source/none.yaml does not exist"),
        ("s3://runs/source/images/train", "is a folder with 0 yaml files"),
        ("s3://runs/source/annotations/instances_val.json", "has no 'train'"),
    ],
)
def test_a_source_that_is_not_there_is_said(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, said: str
) -> None:
    assert said in source_error(source, tmp_path, capsys)


def test_a_key_that_may_not_read_the_source_is_said(
    endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = HTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = source_error(
            f"s3://runs/data.yaml?endpoint_override=127.0.0.1:{server.server_port}&scheme=http",
            tmp_path,
            capsys,
        )
    finally:
        server.shutdown()
    assert "ACCESS_DENIED" in said or "INVALID_ACCESS_KEY" in said.upper()
