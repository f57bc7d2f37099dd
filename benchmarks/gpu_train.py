"""Training on a GPU: raypar against ``yolo train``, and against its own loop on one batch that stays on the device.

    python benchmarks/gpu_train.py [--models n s m] [--batch 128] [--epochs 6] [--pairs 1] [--compile] [--train train.augment=cpu ...]

All train from scratch at 640 px on the same generated images (640x480 JPEGs of about 130 KB), each in a process of its own, in turn:
raypar; ``yolo train`` as it comes (batch 16, 8 loader processes, fp16); and ``yolo train`` at its best: raypar's batch, a loader process a core,
decoded images in RAM, bf16. --compile compiles the models of raypar and of the rival at its best. Rates are of whole epochs (data, steps, validation, saving), the first
one left out; seconds are of the whole command. Without a GPU there is nothing to measure: the last line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import _data
import _measure
import train as benchmark

ALIKE = {"yolo": {"warmup_epochs": 1, "close_mosaic": 0}}
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


def prepared(base: Path, num_images: int) -> tuple[Path, int]:
    data_yaml = _data.generated(base / "yolo", num_images, val=num_images // 8)
    run = {"name": "run", "storage": str(base / "prepared"), "prepare": {"format": "yolo", "source": str(data_yaml)}}
    (base / "prepare.json").write_text(json.dumps(run))
    benchmark._call([sys.executable, "-m", "raypar", "prepare", str(base / "prepare.json")], base / "prepare.log")
    return data_yaml, num_images


def cached(base: Path, model: str, options: argparse.Namespace) -> float:
    """Images a second of raypar's loop on one batch."""
    how = {"model": model, "on": options.device, "yolo": {"compile": options.compile}, "global_batch": options.batch}
    told = [str(base / "prepared/run"), str(options.imgsz), "1", json.dumps(how)]
    return options.batch * benchmark._asked([sys.executable, __file__, "--cached", *told], 1)


def sides(base: Path, data_yaml: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """What is measured of a model; each gives images a second and seconds of the whole command."""
    num_images = options.images

    def ours() -> tuple[float, float]:
        chosen = {
            "use_gpu": options.device == "cuda",
            "batch": options.batch,
            "model": model,
            **dict(one.split("=") for one in options.train),
        }
        yolo = {**ALIKE["yolo"], "epochs": options.epochs, "imgsz": options.imgsz, "compile": options.compile}
        made = benchmark.ours(base, options.imgsz, options.epochs, **chosen, yolo=yolo)
        return num_images / made.epoch_s, made.wall_s

    def theirs(patch: str, **overrides: Any) -> tuple[float, float]:
        told = {"model": model, "device": options.device.replace("cuda", "0"), **ALIKE["yolo"], **overrides}
        made = benchmark.theirs(base, data_yaml, options.imgsz, options.epochs, patch=PATCH + patch, **told)
        return num_images / made.epoch_s, made.wall_s

    best = {"batch": options.batch, "workers": benchmark.CORES, "cache": "ram", "compile": options.compile}
    return {
        "raypar": ours,
        "yolo train as it comes": lambda: theirs("", batch=16),
        "yolo train at its best": lambda: theirs(BF16, **best),
        "cached batch": lambda: (cached(base, model, options), 0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["n", "s", "m"], help="of YOLOv8")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--sides", nargs="+", help="only those whose names begin so")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--train", nargs="*", default=[], metavar="KEY=VALUE", help="of raypar's section train, e.g. augment=gpu")
    parser.add_argument("--device", default="cuda", help="cpu only shows that the script works: its numbers mean nothing")
    options = parser.parse_args()
    name = device_name()
    if options.device == "cuda" and name is None:
        print("no GPU on this machine: nothing was measured")
        _measure.finish("gpu_train", [], device=None)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="raypar-gpu-train-") as made:
        base = Path(made)
        data_yaml, _ = prepared(base, options.images)
        for letter in options.models:
            turns = sides(base, data_yaml, f"yolov8{letter}.yaml", options)
            chosen = [side for side in turns if not options.sides or side.startswith(tuple(options.sides))]
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in chosen}
            for i in range(options.pairs):
                for side in chosen if i % 2 == 0 else chosen[::-1]:
                    found[side].append(turns[side]())
                    rate, wall_s = found[side][-1]
                    print(
                        f"YOLOv8{letter}, {side}: {rate:.0f} images/s" + (f", whole command {wall_s:.0f} s" if wall_s else ""), flush=True
                    )
            rates = {side: [rate for rate, _ in runs] for side, runs in found.items()}
            for rival in [side for side in chosen if side != "raypar" and "raypar" in rates]:
                claim = f"YOLOv8{letter}, images/s, raypar / {rival}"
                pairs = list(zip(rates["raypar"], rates[rival], strict=True))
                rows.append(benchmark.row(claim, pairs, 0.95 if rival == "cached batch" else 1.0, ("raypar", rival), "images/s"))
    _measure.finish("gpu_train", rows, device=name or "cpu: not a measurement", cores=benchmark.CORES, batch=options.batch, imgsz=options.imgsz,
                    compile=options.compile)  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--cached"]:
        prepared_run, imgsz, threads, how = sys.argv[2:]
        print("rate", benchmark.steps_per_s(prepared_run, int(imgsz), 0, 1, int(threads), **json.loads(how)))
    else:
        main()
