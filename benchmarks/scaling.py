"""How training scales: a model of a step, checked against two workers on this machine, and what it predicts for 2 to 64 GPUs.

    python benchmarks/scaling.py [--imgsz 320] [--pairs 3] [--step-ms 25] [--params 3.2e6]

A step of N workers takes its own compute, or, where that is longer, the part of the all-reduce that backward cannot hide; see docs/scaling.md.
Measured here: the step of one worker, the all-reduce of a model's gradients between two processes, and the step of two workers, which the model
must predict. --step-ms and --params describe the GPU step that the table is for; they are inputs, not measurements.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ.update(
    YOLO_OFFLINE="1",
    YOLO_AUTOINSTALL="0",
    YOLO_VERBOSE="false",
    NO_ALBUMENTATIONS_UPDATE="1",
    RAY_AUTH_MODE="disabled",
)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(REPOSITORY))

import _measure
import train as benchmark

BACKWARD = 2 / 3  # of a step: gradients are reduced while the rest of backward runs
# bytes a second each way and seconds of latency a hop, of one worker's link
LINKS = {
    "10 GbE": (1.25e9, 30e-6), "25 GbE": (3.1e9, 20e-6), "100 GbE": (12.5e9, 10e-6), "InfiniBand NDR": (50e9, 3e-6), "NVLink 4": (450e9, 2e-6),
}  # fmt: skip
SIZES = (2, 4, 8, 16, 32, 64)
REDUCES, WARM_REDUCES = 20, 3


def all_reduce_s(num_bytes: float, num_workers: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of a ring all-reduce: each worker sends and receives twice the buffer but one share of it."""
    return 2 * (num_workers - 1) / num_workers * num_bytes / bytes_per_s + 2 * (num_workers - 1) * latency_s


def step_s(own_s: float, reduce_s: float, hidden: float = BACKWARD) -> float:
    """Seconds of a step: compute, and what of the all-reduce does not fit under backward."""
    return own_s + max(0.0, reduce_s - hidden * own_s)


def measured_reduce(num_bytes: int) -> None:
    """What torchrun starts: seconds of an all-reduce between two ranks."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    buffer = torch.zeros(num_bytes // 4)
    for i in range(WARM_REDUCES + REDUCES):
        if i == WARM_REDUCES:
            began = time.perf_counter()
        dist.all_reduce(buffer)
    if dist.get_rank() == 0:
        print("rate", (time.perf_counter() - began) / REDUCES, flush=True)
    dist.destroy_process_group()


def _asked(arguments: list[str], *, ranks: int) -> float:
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        if ranks == 2
        else [sys.executable]
    )
    found = subprocess.run(
        [*launcher, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if found.returncode:
        raise SystemExit(found.stderr[-2000:])
    return float(next(line for line in found.stdout.splitlines() if line.startswith("rate ")).split()[1])


def table(own_s: float, num_bytes: float) -> list[dict[str, object]]:
    """Predicted efficiency by link and number of workers: the time of a step alone over its time among N."""
    rows: list[dict[str, object]] = []
    print(f"\npredicted efficiency, a step of {1000 * own_s:.0f} ms, {num_bytes / 1e6:.1f} MB of gradients\n  {'link':<16}"
          + "".join(f"{n:>7}" for n in SIZES))  # fmt: skip
    for link, (bandwidth, latency) in LINKS.items():
        found = [own_s / step_s(own_s, all_reduce_s(num_bytes, n, bandwidth, latency)) for n in SIZES]
        print(f"  {link:<16}" + "".join(f"{x:7.3f}" for x in found))
        rows.append({"link": link, **{str(n): round(x, 4) for n, x in zip(SIZES, found, strict=True)}})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=25.0, help="of the GPU that the table is for")
    parser.add_argument(
        "--params",
        type=float,
        default=3.2e6,
        help="of the model that the table is for; yolov8n has 3.2 million",
    )
    options = parser.parse_args()
    num_bytes = int(4 * options.params)
    with tempfile.TemporaryDirectory(prefix="raypar-scaling-") as name:
        base = Path(name)
        benchmark.prepared(base, None)
        run, here = str(base / "prepared/run"), str(Path(benchmark.__file__))
        pairs = []
        # half of the batch alone, and the whole batch of two: a rank's work is the same
        for _ in range(options.pairs):
            alone = 1 / _asked(
                [here, "--rank", run, str(options.imgsz), "1", str(benchmark.BATCH // 2)], ranks=1
            )
            two = 1 / _asked([here, "--rank", run, str(options.imgsz), "1", str(benchmark.BATCH)], ranks=2)
            reduce = _asked([__file__, "--reduce", str(num_bytes)], ranks=2)
            # on a CPU the same cores compute and reduce
            pairs.append((alone, reduce, step_s(alone, reduce, hidden=0.0), two))
    alone, reduce, predicted, two = (median(column) for column in zip(*pairs, strict=True))
    errors = [p / t - 1 for _, _, p, t in pairs]
    print(f"one worker, {benchmark.BATCH // 2} images: {1000 * alone:.0f} ms a step; all-reduce of {num_bytes / 1e6:.1f} MB between two "
          f"processes: {1000 * reduce:.1f} ms\ntwo workers: {1000 * two:.0f} ms measured, {1000 * predicted:.0f} ms predicted "
          f"({100 * median(errors):+.1f} %, {100 * min(errors):+.1f} to {100 * max(errors):+.1f}); efficiency {alone / two:.3f}")  # fmt: skip
    rows = table(options.step_ms / 1000, num_bytes)
    _measure.finish("scaling", rows, step_s=round(alone, 4), all_reduce_s=round(reduce, 5), two_workers_s=round(two, 4),
                    predicted_s=round(predicted, 4), error=round(median(errors), 4))  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reduce"]:
        measured_reduce(int(sys.argv[2]))
    else:
        main()
