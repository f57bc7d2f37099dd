"""How long good requests take while a service is attacked, over how long they take without: at most 1.5 times at the 99th percentile.

    python benchmarks/attack.py [--seconds 30] [--rate 4] [--weights FILE.pt]

The service is the real routes and replica on uvicorn, without Ray. One client sends good images one after the other, first alone, then while
another process sends the attacks of tests/attack/hostile.py in turn, so many a second. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("YOLO_OFFLINE", "1")
os.environ.setdefault("YOLO_AUTOINSTALL", "0")

import httpx
import numpy as np

from tests.attack.hostile import ATTACKS, photo
from tests.attack.serving import served

LIMIT = 1.5
JPEG = {"Content-Type": "image/jpeg"}


def untrained(path: Path) -> Path:
    """Weights of a yolov8n at 320 px."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", nc=4, verbose=False)
    model.args = {"imgsz": 320, "task": "detect"}
    torch.save({"model": model, "ema": None, "epoch": -1, "train_args": model.args}, path)
    return path


def attack(url: str, rate: float, count: multiprocessing.sharedctypes.Synchronized[int]) -> None:
    """Sends attacks until the process is ended."""
    bodies = [(each, each.content()) for each in ATTACKS if not each.name.startswith("64 MB")]
    begin = time.monotonic()
    with httpx.Client(timeout=60) as client:
        for sent, (each, body) in enumerate(itertools.cycle(bodies)):
            time.sleep(max(begin + sent / rate - time.monotonic(), 0))
            content = body if isinstance(body, bytes) else each.content()
            with contextlib.suppress(httpx.TransportError):  # answered before all was sent
                client.post(f"{url}/v1/detect", content=content, headers=each.headers)
            count.value += 1


def latencies_s(url: str, seconds: float) -> list[float]:
    """Of good requests, one after the other."""
    found, end, data = [], time.monotonic() + seconds, photo()
    with httpx.Client(timeout=60) as client:
        while time.monotonic() < end:
            begin = time.perf_counter()
            client.post(f"{url}/v1/detect", content=data, headers=JPEG).raise_for_status()
            found.append(time.perf_counter() - begin)
    return found


def row(latencies: list[float]) -> dict[str, float]:
    p50, p99 = (round(1000 * float(q), 2) for q in np.quantile(latencies, (0.5, 0.99)))
    return {"requests": len(latencies), "p50_ms": p50, "p99_ms": p99}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=4, help="attacks a second")
    parser.add_argument("--weights", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = options.weights or untrained(Path(folder) / "untrained.pt")
        with served(weights) as service:
            latencies_s(service.url, 3)
            before_mb = service.peak_mb()
            quiet = row(latencies_s(service.url, options.seconds))
            context = multiprocessing.get_context("spawn")
            count = context.Value("q", 0)
            attacker = context.Process(target=attack, args=(service.url, options.rate, count))
            attacker.start()
            while count.value == 0:
                time.sleep(0.1)
            attacked = row(latencies_s(service.url, options.seconds))
            attacker.terminate()
            attacker.join()
            growth_mb = round(service.peak_mb() - before_mb)
    ratio = round(attacked["p99_ms"] / quiet["p99_ms"], 2)
    print(f"{'held' if ratio <= LIMIT else 'NOT HELD'}: p99 {ratio} times the quiet one, at most {LIMIT}")
    print(
        json.dumps(
            {
                "benchmark": "attack",
                "quiet": quiet,
                "attacked": attacked,
                "ratio_p99": ratio,
                "limit": LIMIT,
                "attacks": count.value,
                "attacks_per_s": options.rate,
                "growth_mb": growth_mb,
            }
        )
    )
    sys.exit(ratio > LIMIT)


if __name__ == "__main__":
    main()
