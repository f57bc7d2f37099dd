# make demo
"""The whole tour on this machine: prepare, train on 2 workers, evaluate, predict, export, serve and one real HTTP request.

Types the commands that a user would type, and shows them. Takes minutes on two CPU cores; run again, it only repeats the request.
"""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parent.parent
RUN_FILE = "jobs/demo.yaml"
MIN_MAP50 = 0.5
READY_S = 180
JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8", b"\x89PNG"


def main() -> int:
    os.chdir(REPOSITORY)
    started, overrides = time.monotonic(), sys.argv[1:]
    run = Path(_setting(overrides, "storage", "runs")) / _setting(overrides, "name", "demo")
    for verb in ("prepare", "train", "evaluate", "predict", "export"):
        subprocess.run(_command(verb, *overrides), check=True)
    answer = _serve_once(run, overrides)
    metrics = json.loads((run / "evaluate/metrics.json").read_text())

    print(
        f"\none request to the service: {answer['image']}, {len(answer['detections'])} detections, the surest of them:"
    )
    for detection in answer["detections"][:3]:
        print(
            f"  {detection['class_name']:<9} {detection['confidence']:.2f}  {[round(x, 1) for x in detection['box_xyxy']]}"
        )
    print(
        f"\nvalidation: mAP50 {metrics['map50']:.3f}, mAP50-95 {metrics['map50_95']:.3f} over {metrics['num_images']} images"
    )
    print("pictures:")
    for folder in ("train", "evaluate"):
        for picture in sorted((run / folder).glob("*.[jp][pn]g")):
            print(f"  {picture}")
    print(f"everything: {run}/   ({time.monotonic() - started:.0f} s)")
    if metrics["map50"] < MIN_MAP50:
        print(f"error: mAP50 is below {MIN_MAP50}", file=sys.stderr)
        return 1
    return 0


def _command(verb: str, *overrides: str) -> list[str]:
    print(f"\n$ raypar {' '.join([verb, RUN_FILE, *overrides])}", flush=True)
    return [sys.executable, "-m", "raypar", verb, RUN_FILE, *overrides]


def _setting(overrides: list[str], key: str, default: str) -> str:
    return next((o.partition("=")[2] for o in reversed(overrides) if o.startswith(f"{key}=")), default)


def _serve_once(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Starts the service, sends it a validation image, stops it; returns the answer."""
    port = _free_port()
    service = subprocess.Popen(_command("serve", *overrides, f"serve.port={port}"), start_new_session=True)
    try:
        _wait_until_ready(service, f"http://127.0.0.1:{port}/readyz")
        image = _validation_image(run)
        content_type = "image/png" if image.startswith(PNG_MAGIC) else "image/jpeg"
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/detect", data=image, headers={"Content-Type": content_type}
        )
        print(f"$ curl --data-binary @image -H 'Content-Type: {content_type}' {request.full_url}", flush=True)
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
        return answer
    finally:
        service.send_signal(signal.SIGINT)
        try:
            service.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(service.pid, signal.SIGKILL)


def _wait_until_ready(service: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise RuntimeError(f"the service ended with exit code {service.returncode} before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise RuntimeError(f"the service was not ready within {READY_S} s")


def _validation_image(run: Path) -> bytes:
    shard = min((run / "dataset/val").glob("*.parquet"))
    rows = pq.read_table(io.BytesIO(shard.read_bytes()), columns=["image", "class_ids"]).to_pylist()
    image: bytes = next(row["image"] for row in rows if row["class_ids"])  # not one of the empty backgrounds
    assert image.startswith((JPEG_MAGIC, PNG_MAGIC))
    return image


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
