"""make demo: the whole tour on generated images, by the commands that a user would type.

prepare -> train (2 workers) -> evaluate -> predict -> export -> serve with one real HTTP request. Ends with exit code 1 if the model did
not learn (mAP50 below 0.5).
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent.parent
RUN_FILE, RUN = "jobs/demo.yaml", ROOT / "runs" / "demo"
GOAL = 0.5
os.environ |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}


def main() -> int:
    began = time.monotonic()
    for verb in ("prepare", "train", "evaluate", "predict", "export"):
        run(verb)
    ask_service()
    metrics = json.loads((RUN / "evaluate" / "metrics.json").read_text())
    print(
        f"\nDone in {time.monotonic() - began:.0f} s: mAP50 {metrics['map50']:.3f}, mAP50-95 {metrics['map50_95']:.3f} on {metrics['num_images']} images."
    )
    print("Look at:")
    for name in (
        "train/batch_0.png",
        "train/results.png",
        "evaluate/detections.png",
        "evaluate/confusion_matrix.png",
        "predict/samples.png",
        "demo_request.jpg",
    ):
        if (RUN / name).exists():
            print(f"  {RUN / name}")
    if metrics["map50"] < GOAL:
        print(f"mAP50 is below {GOAL}: something is wrong", file=sys.stderr)
        return 1
    return 0


def run(verb: str, *overrides: str) -> None:
    print(f"\n$ raypar {verb} {RUN_FILE}", flush=True)
    subprocess.run([sys.executable, "-m", "raypar", verb, RUN_FILE, *overrides], cwd=ROOT, check=True)


def ask_service() -> None:
    """Serves the weights, posts one image of the validation split, and stops the service."""
    port, image = free_port(), first_image()
    print(f"\n$ raypar serve {RUN_FILE} serve.port={port}", flush=True)
    service = subprocess.Popen([sys.executable, "-m", "raypar", "serve", RUN_FILE, f"serve.port={port}"], cwd=ROOT)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}/readyz", service)
        print(f"\n$ curl --data-binary @image.jpg -H 'Content-Type: image/jpeg' http://127.0.0.1:{port}/v1/detect")
        answer = json.loads(post(f"http://127.0.0.1:{port}/v1/detect", image))
        print(json.dumps({**answer, "detections": answer["detections"][:2]}, indent=1), f"\n... {len(answer['detections'])} detections")
        (RUN / "demo_request.jpg").write_bytes(post(f"http://127.0.0.1:{port}/v1/annotate", image))
    finally:
        service.send_signal(signal.SIGINT)
        service.wait(timeout=60)


def first_image() -> bytes:
    import pyarrow.parquet as pq

    shard = sorted((RUN / "dataset" / "val").glob("*.parquet"))[0]
    return bytes(pq.ParquetFile(shard).read_row_group(0, columns=["image"])["image"][0].as_py())


def wait_until_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise SystemExit(f"the service ended with exit code {service.returncode}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"{url} did not answer within 180 s")


def post(url: str, image: bytes) -> bytes:
    request = urllib.request.Request(url, data=image, headers={"Content-Type": "image/jpeg"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return bytes(response.read())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
