"""JPEG bytes -> augmented batch on the GPU: raypar's `augment: gpu` / Ultralytics' loader with all cores.   python benchmarks/gpu_ingest.py

Both read the same JPEG files (640x480, about 130 KB, 7 boxes each), draw Ultralytics' default augmentation and end with uint8 batches on the
device. raypar: processes read files and draw the geometry, as the stream's tasks do; the device decodes into a ring and renders.
Ultralytics: `build_dataloader` with a worker a core, and a copy to the device. Turns are alternated; what a loader has ready when its turn
begins is thrown away, and not counted. Without a GPU there is nothing to measure: the last line says so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}

import cv2
import numpy as np

CLASSES, BOXES, HW = 8, 7, (480, 640)
RING_IMAGES = 512
CORES = len(os.sched_getaffinity(0))


def make_dataset(folder: Path, num_images: int) -> None:
    """images/*.jpg and labels/*.txt, as Ultralytics reads them."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for i in range(num_images):
        image = np.full((*HW, 3), 120, np.float32)
        for cells, contrast in ((4, 60), (12, 35), (40, 20), (160, 11)):
            image += contrast * cv2.resize(
                rng.standard_normal((cells, cells, 3)).astype(np.float32), HW[::-1], interpolation=cv2.INTER_CUBIC
            )
        image += rng.normal(0, 5, image.shape).astype(np.float32)
        cv2.imwrite(str(folder / "images" / f"{i:05d}.jpg"), image.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 94])
        wh = rng.uniform(0.05, 0.4, (BOXES, 2))
        boxes = np.concatenate([rng.uniform(wh / 2, 1 - wh / 2), wh], 1)
        lines = [f"{c} " + " ".join(f"{v:.6f}" for v in box) for c, box in zip(rng.integers(CLASSES, size=BOXES), boxes, strict=True)]
        (folder / "labels" / f"{i:05d}.txt").write_text("\n".join(lines))


def settings(imgsz: int) -> Any:
    from ultralytics.cfg import get_cfg

    return get_cfg(overrides={"task": "detect", "mode": "train", "imgsz": imgsz})


def theirs(folder: Path, batch: int, imgsz: int, device: str) -> Iterator[int]:
    """Ultralytics' batches on the device, for ever; yields the number of images."""
    from ultralytics.data import build_dataloader, build_yolo_dataset

    data = {"nc": CLASSES, "names": {i: str(i) for i in range(CLASSES)}, "channels": 3, "train": str(folder / "images")}
    dataset = build_yolo_dataset(settings(imgsz), data["train"], batch, data, mode="train")
    loader = build_dataloader(dataset, batch, CORES, shuffle=True, drop_last=True, device=device)
    while True:
        for made in loader:
            yield len(made["img"].to(device, non_blocking=True))


@dataclass
class Labelled:
    """Labels of a source, which has no pixels yet."""

    class_ids: np.ndarray
    boxes_xywhn: np.ndarray
    hw: tuple[int, int]
    polygons: None = None
    keypoints: None = None


class Tasks:
    """What Ray Data tasks do for the stream: the encoded images of a step, and the numbers by which to render it."""

    def __init__(self, folder: Path, batch: int, imgsz: int):
        from raypar.augment.geometry import Recipe

        self.batch, self.recipe = batch, Recipe.from_yolo(vars(settings(imgsz)))
        self.images = sorted((folder / "images").iterdir())
        labels = [np.loadtxt(folder / "labels" / f"{path.stem}.txt", ndmin=2) for path in self.images]
        hw = tuple(min(side, round(side * imgsz / max(HW))) for side in HW)
        self.labels = [Labelled(table[:, 0].astype(np.int32), table[:, 1:].astype(np.float32), hw) for table in labels]

    def encoded(self, step: int) -> tuple[list[int], list[bytes]]:
        """The slots and the bytes of the images that a step shows for the first time."""
        positions = range(step * self.batch, (step + 1) * self.batch)
        return [p % RING_IMAGES for p in positions], [self.images[p % len(self.images)].read_bytes() for p in positions]

    def step(self, step: int) -> Any:
        """Mosaic partners are any of the ring's images: those of the steps before, and of this one."""
        from raypar.augment.geometry import draw, generator
        from raypar.augment.labels import batch_labels, move_labels
        from raypar.augment.pack import pack

        slots, encoded = self.encoded(step)
        last = (step + 1) * self.batch
        there = [self.labels[(last - 1 - (last - 1 - slot) % RING_IMAGES) % len(self.images)] for slot in range(RING_IMAGES)]
        samples = [draw(self.recipe, generator(0, step, slot), slot, RING_IMAGES, mosaic_on=True) for slot in slots]
        moved = [move_labels(self.recipe, sample, there) for sample in samples]
        table = pack(self.recipe, samples, [source.hw for source in there], range(RING_IMAGES), [m.cut for m in moved])
        return slots, encoded, table, batch_labels(moved)


_tasks: Tasks


def start(*how: Any) -> None:
    global _tasks
    cv2.setNumThreads(0)
    _tasks = Tasks(*how)


def run_step(step: int) -> Any:
    return _tasks.step(step)


def ours(folder: Path, batch: int, imgsz: int, device: str) -> Iterator[int]:
    """raypar's batches on the device, for ever; yields the number of images."""
    import torch

    from raypar.augment.gpu import GpuRenderer
    from raypar.augment.ring import Ring, decode_batch, prefetched

    tasks = Tasks(folder, batch, imgsz)
    ring, renderer = Ring(RING_IMAGES, imgsz, device), GpuRenderer(tasks.recipe, device)

    def fill(slots: list[int], encoded: list[bytes]) -> None:
        images, grey = decode_batch(encoded, [HW] * len(encoded), imgsz, device)
        assert not grey
        ring.put(slots, images)

    def prepare(item: Any) -> dict[str, torch.Tensor]:
        slots, encoded, table, labels = item
        fill(slots, encoded)
        flat = {name: torch.from_numpy(getattr(labels, name)) for name in ("class_ids", "boxes_xywhn", "image_index")}
        if device == "cuda":
            flat = {name: values.pin_memory().to(device, non_blocking=True) for name, values in flat.items()}
        return flat | {"img": renderer.render(table, ring)}

    first = RING_IMAGES // batch
    for step in range(first):  # as after a resume
        fill(*tasks.encoded(step))
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn"), start, (folder, batch, imgsz)) as pool:

        def steps() -> Iterator[Any]:
            waiting: deque[Future[Any]] = deque()
            for step in count(first):
                waiting.append(pool.submit(run_step, step))
                if len(waiting) > 2 * CORES:
                    yield waiting.popleft().result()

        for made in prefetched(steps(), prepare, device):
            yield len(made["img"])


def images_per_s(side: Callable[[], Iterator[int]], warm_up: int, measured: int, device: str) -> float:
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
        batches.close()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--measured", type=int, default=64, help="batches a turn")
    parser.add_argument("--device", default="cuda", help="cpu only shows that the script works: its numbers mean nothing")
    args = parser.parse_args()
    row: dict[str, Any] = {"benchmark": "gpu_ingest", "claim": ">= 4", "ratio": None, "cores": CORES}
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU on this machine: nothing was measured")
        print(json.dumps(row))
        return
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu: not a measurement"
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        make_dataset(folder, args.images)
        how = (folder, args.batch, args.imgsz, args.device)
        ready = CORES * 4 + 4  # Ultralytics' prefetch_factor
        pairs = []
        for i in range(args.pairs):
            turns = {"raypar": partial(ours, *how), "ultralytics": partial(theirs, *how)}
            order = list(turns) if i % 2 == 0 else list(turns)[::-1]
            rates = {side: images_per_s(turns[side], ready, args.measured, args.device) for side in order}
            pairs.append((rates["raypar"], rates["ultralytics"]))
            print(
                f"pair {i + 1}: raypar {pairs[-1][0]:.0f} images/s, Ultralytics {pairs[-1][1]:.0f} images/s, ratio {pairs[-1][0] / pairs[-1][1]:.2f}"
            )
    ratios = [mine / other for mine, other in pairs]
    medians = [round(statistics.median(side), 1) for side in zip(*pairs, strict=True)]
    print(f"{name}: median ratio {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
    row |= {"ratio": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3), "device": name,
            "raypar_images_per_s": medians[0], "ultralytics_images_per_s": medians[1], "batch": args.batch, "imgsz": args.imgsz}  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
