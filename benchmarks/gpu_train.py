"""Training on a GPU: raypar against ``yolo train``, and against its own loop on one batch that stays on the device.

    python benchmarks/gpu_train.py [--models n s m] [--batch 128] [--epochs 6] [--pairs 1] [--compile] [--train augment=cpu ...]

All train from scratch at 640 px on the same generated images (640x480 JPEGs of about 130 KB), each in a process of its own, in turn:
raypar; ``yolo train`` as it comes (batch 16, 8 loader processes, fp16); and ``yolo train`` at its best: raypar's batch, a loader process a core,
decoded images in RAM, bf16. --compile compiles the models of raypar and of the rival at its best. Rates are of whole epochs (data, steps, validation, saving), the first
one left out; seconds are of the whole command. Without a GPU there is nothing to measure: the last line says so.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _data
import _measure
import train as benchmark

ALIKE = {"warmup_epochs": 1, "close_mosaic": 0}
AS_IT_COMES, AT_ITS_BEST, CACHED = "yolo train as it comes", "yolo train at its best", "one cached batch"
# check_amp would download weights; results.csv is read for a picture and a record in the checkpoint, by polars, which a bare machine lacks
PATCH = """
import importlib.util, torch, ultralytics.engine.trainer as trainer
trainer.check_amp = lambda model: True
if importlib.util.find_spec("polars") is None:
    trainer.BaseTrainer.read_results_csv = lambda self: {}
"""
BF16 = 'torch.set_autocast_dtype("cuda", torch.bfloat16)\n'


def device_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cached(base: Path, model: str, options: argparse.Namespace) -> float:
    """Images a second of raypar's loop on one batch, in this process."""
    import torch

    rate = benchmark.steps_per_s(
        str(base / "prepared/run"), options.imgsz, 0, 1, benchmark.CORES, options.batch, model=model, on=options.device,
        yolo={"compile": options.compile},
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()  # the others need it
    return options.batch * rate


def sides(
    base: Path, data_yaml: Path, model: str, options: argparse.Namespace
) -> dict[str, Callable[[], Any]]:
    """What is measured of a model: two sides of it and raypar's loop on one batch."""

    def ours() -> benchmark.Trained:
        chosen = {
            "use_gpu": options.device == "cuda",
            "batch": options.batch,
            "model": model,
            **dict(one.split("=") for one in options.train),
        }
        yolo = {**ALIKE, "epochs": options.epochs, "imgsz": options.imgsz, "compile": options.compile}
        return benchmark.ours(base, options.imgsz, options.epochs, **chosen, yolo=yolo)

    def theirs(patch: str, **overrides: Any) -> benchmark.Trained:
        told = {"model": model, "device": options.device.replace("cuda", "0"), **ALIKE, **overrides}
        return benchmark.theirs(base, data_yaml, options.imgsz, options.epochs, patch=PATCH + patch, **told)

    best = {"batch": options.batch, "workers": benchmark.CORES, "cache": "ram", "compile": options.compile}
    return {
        "raypar": ours,
        AS_IT_COMES: lambda: theirs("", batch=16),
        AT_ITS_BEST: lambda: theirs(BF16, **best),
        CACHED: lambda: cached(base, model, options),
    }


def compared(
    model: str, turns: dict[str, Callable[[], Any]], num_images: int, pairs: int
) -> list[dict[str, Any]]:
    """Runs a model's sides in turn; a row for each rival."""
    found: dict[str, list[Any]] = {side: [] for side in turns}
    for i in range(pairs):
        for side in list(turns)[:: -1 if i % 2 else 1]:
            found[side].append(made := turns[side]())
            if side == CACHED:
                print(f"{model}, {side}: {made:.0f} images/s", flush=True)
                continue
            steps = f" ({made.images_per_s:.0f} without validation and saving)" if made.images_per_s else ""
            print(
                f"{model}, {side}: {num_images / made.epoch_s:.0f} images/s{steps}, whole command {made.wall_s:.0f} s",
                flush=True,
            )
    ours, rows = found.get("raypar", []), []
    for side in found if ours else ():
        if side in (AS_IT_COMES, AT_ITS_BEST):
            rates = [
                (num_images / a.epoch_s, num_images / b.epoch_s)
                for a, b in zip(ours, found[side], strict=True)
            ]
            rows.append(
                benchmark.row(
                    f"{model}, images/s of whole epochs, raypar / {side}",
                    rates,
                    1.0,
                    ("raypar", side),
                    "images/s",
                )
            )
        elif side == CACHED:
            rates = [(a.images_per_s, b) for a, b in zip(ours, found[side], strict=True)]
            rows.append(
                benchmark.row(
                    f"{model}, images/s of data and steps, raypar / {side}",
                    rates,
                    0.95,
                    ("raypar", side),
                    "images/s",
                )
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["n", "s", "m"], help="of YOLOv8")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--sides", nargs="+", help="only those whose names begin so")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--train",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="of raypar's section train, e.g. augment=gpu",
    )
    parser.add_argument(
        "--device", default="cuda", help="cpu only shows that the script works: its numbers mean nothing"
    )
    options = parser.parse_args()
    name = device_name()
    if options.device == "cuda" and name is None:
        print("no GPU on this machine: nothing was measured")
        _measure.finish("gpu_train", [], device=None)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="raypar-gpu-train-") as made:
        base = Path(made)
        data_yaml = _data.generated(base / "yolo", options.images, val=options.images // 16)
        benchmark.prepare(base, {"format": "yolo", "source": str(data_yaml)})
        for letter in options.models:
            turns = sides(base, data_yaml, f"yolov8{letter}.yaml", options)
            chosen = {
                side: turn
                for side, turn in turns.items()
                if not options.sides or side.startswith(tuple(options.sides))
            }
            rows += compared(f"YOLOv8{letter}", chosen, options.images, options.pairs)
    _measure.finish("gpu_train", rows, device=name or "cpu: not a measurement", cores=benchmark.CORES, batch=options.batch, imgsz=options.imgsz,
                    compile=options.compile)  # fmt: skip


if __name__ == "__main__":
    main()
