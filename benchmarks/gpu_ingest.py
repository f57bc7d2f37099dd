"""JPEG bytes -> augmented batch on the GPU: raypar's `augment: gpu` / Ultralytics' loader with all cores.   python benchmarks/gpu_ingest.py

Both read the same JPEG files (640x480, about 130 KB, 7 boxes each), draw Ultralytics' default augmentation and end with uint8 batches on the
device. raypar: the stream as it is in training: Ray Data tasks read shards and draw the geometry; the worker's device decodes into a ring and renders.
Ultralytics: `build_dataloader` with a worker a core, and a copy to the device. Turns are alternated; what a loader has ready when its turn
begins is thrown away, and not counted. Then YOLOv8n's steps a second on that stream, against the same loop on one batch that stays on the device.
Without a GPU there is nothing to measure: the last line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

os.environ.update(
    YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false", RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

import _data

from raypar.dataset.manifest import Split
from raypar.quiet import quiet_ray
from raypar.storage import Folder

CORES = len(os.sched_getaffinity(0))
JPEG_BYTES = 130_000


def settings(imgsz: int) -> Any:
    from ultralytics.cfg import get_cfg

    return get_cfg(overrides={"task": "detect", "mode": "train", "imgsz": imgsz})


def theirs(folder: Path, batch: int, imgsz: int, device: str) -> Iterator[int]:
    """Ultralytics' batches on the device, for ever; yields the number of images."""
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    data = check_det_dataset(str(folder / "data.yaml"))
    dataset = build_yolo_dataset(settings(imgsz), data["train"], batch, data, mode="train")
    loader = build_dataloader(dataset, batch, CORES, shuffle=True, drop_last=True, device=device)
    while True:
        for made in loader:
            yield len(made["img"].to(device, non_blocking=True))


def ours(
    folder: Path, split: Split, batch: int, imgsz: int, device: str, num_batches: int
) -> Iterator[dict[str, Any]]:
    """So many of raypar's batches on the device, as a training worker gets them."""
    from raypar.augment.geometry import Recipe
    from raypar.dataset.encoded import LOOK_AHEAD_BYTES, _task, unpack
    from raypar.dataset.plan import Plan
    from raypar.dataset.rendered import Feed, rendered
    from raypar.dataset.stream import StreamSpec, _start
    from raypar.train.loop import to_tensors

    dataset = Folder.at(str(folder / "shards"))
    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups),
        seed=0,
        global_batch=batch,
        epochs=100_000,
    )
    recipe = Recipe.from_yolo(vars(settings(imgsz)))
    spec = StreamSpec.of(
        dataset, split, plan, recipe, mosaic_epochs=plan.epochs, albumentations=None, world_size=1
    )
    items = list(islice(plan.items(), -(-num_batches // plan.steps_per_window)))
    (shard,) = _start(spec, items, _task, LOOK_AHEAD_BYTES)
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    for _, tensors in rendered(
        (one for table in tables for one in unpack(table)), Feed(spec, device, to_tensors), 0
    ):
        yield tensors


def steps_per_s(
    folder: Path, split: Split, batch: int, imgsz: int, device: str, warm_up: int, measured: int
) -> tuple[float, float]:
    """Of YOLOv8n, trained on the stream and on one batch of it."""
    import torch

    from raypar.dataset.manifest import Manifest
    from raypar.precision import pick_precision
    from raypar.train.loop import Loop
    from raypar.train.recipe import Lender

    names = tuple(f"c{i}" for i in range(_data.NUM_CLASSES))
    manifest = Manifest(
        task="detect", class_names=names, splits={"train": split, "val": split}, source="generated"
    )
    on = torch.device(device)
    lender = Lender(
        {"epochs": 100, "imgsz": imgsz},
        model="yolov8n.yaml",
        manifest=manifest,
        batch=batch,
        seed=0,
        device=on,
    )
    loop = Loop(
        lender,
        num_images=split.num_images,
        steps_per_epoch=max(1, split.num_images // batch),
        precision=pick_precision("auto", on),
    )
    loop.start_epoch()
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    batches = ours(folder, split, batch, imgsz, device, 1 + warm_up + measured)
    cached = {name: tensor.clone() for name, tensor in next(batches).items()}
    rates = []
    for source in (batches, repeat(cached, warm_up + measured)):
        for step, tensors in enumerate(source):
            if step == warm_up:
                wait()
                began = time.perf_counter()
            if step == warm_up + measured:
                break
            loop.step(dict(tensors), step)
        wait()
        rates.append(measured / (time.perf_counter() - began))
        for _ in source:  # what is left of a stream
            pass
    return rates[0], rates[1]


def images_per_s(
    side: Callable[[], Iterator[int]], warm_up: int, measured: int, device: str, *, batches_end: bool
) -> float:
    """Of a side that is started afresh, after so many batches as it may have ready by then."""
    import torch

    batches = side()
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    try:
        for _ in range(warm_up):
            next(batches)
        wait()
        began = time.perf_counter()
        num_images = sum(next(batches) for _ in range(measured))
        wait()
        return num_images / (time.perf_counter() - began)
    finally:
        if not batches_end:
            batches.close()  # type: ignore[attr-defined]
        for _ in batches:  # what is left of a stream, so that the next turn has the machine to itself
            pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measured", type=int, default=64, help="batches a turn")
    parser.add_argument(
        "--warm-up", type=int, help="batches before; nothing: as many as a side may have ready"
    )
    parser.add_argument(
        "--device", default="cuda", help="cpu only shows that the script works: its numbers mean nothing"
    )
    args = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "gpu_ingest", "claim": ">= 4", "ratio": None, "cores": CORES}
    import torch

    from raypar.dataset.encoded import LOOK_AHEAD_BYTES

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU on this machine: nothing was measured")
        print(json.dumps(row))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu: not a measurement"
    quiet_ray()
    import ray

    ray.init(
        address="local",
        num_cpus=CORES + 1,
        include_dashboard=False,
        logging_level="warning",
        object_store_memory=2 << 30,
    )
    with tempfile.TemporaryDirectory(prefix="raypar-gpu-ingest-") as made:
        folder = Path(made)
        split = _data.shards(_data.generated(folder, args.images), Folder.at(str(folder / "shards")))
        how = (args.batch, args.imgsz, args.device)
        # prefetch_factor; the stream's
        ready = {"ultralytics": CORES * 4 + 4, "raypar": 8 + LOOK_AHEAD_BYTES // (args.batch * JPEG_BYTES)}
        if args.warm_up is not None:
            ready = dict.fromkeys(ready, args.warm_up)
        turns = {
            "raypar": lambda: (
                len(made["img"]) for made in ours(folder, split, *how, ready["raypar"] + args.measured)
            ),
            "ultralytics": partial(theirs, folder, *how),
        }
        pairs = []
        for i in range(args.pairs):
            order = list(turns) if i % 2 == 0 else list(turns)[::-1]
            rates = {
                side: images_per_s(
                    turns[side], ready[side], args.measured, args.device, batches_end=side == "raypar"
                )
                for side in order
            }
            pairs.append((rates["raypar"], rates["ultralytics"]))
            print(
                f"pair {i + 1}: raypar {pairs[-1][0]:.0f} images/s, Ultralytics {pairs[-1][1]:.0f} images/s, ratio {pairs[-1][0] / pairs[-1][1]:.2f}"
            )
        steps = [steps_per_s(folder, split, *how, ready["raypar"], args.measured) for _ in range(args.pairs)]
    shares = [streamed / cached for streamed, cached in steps]
    row |= {"step_claim": ">= 0.95", "step_ratio": round(statistics.median(shares), 3),
            "steps_per_s": round(statistics.median(streamed for streamed, _ in steps), 2)}  # fmt: skip
    print(f"YOLOv8n's steps on the stream / on one batch: {', '.join(f'{share:.2f}' for share in shares)}")
    ratios = [mine / other for mine, other in pairs]
    medians = [round(statistics.median(side), 1) for side in zip(*pairs, strict=True)]
    print(
        f"{name}: median ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})"
    )
    row |= {"ratio": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3), "device": name,
            "raypar_images_per_s": medians[0], "ultralytics_images_per_s": medians[1], "batch": args.batch, "imgsz": args.imgsz}  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
