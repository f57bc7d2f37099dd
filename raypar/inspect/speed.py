"""How fast this machine makes augmented images, by stage; and how fast its device trains on them.

Runs in: actors, one a core, on one node; a task with the model. The pipeline that is timed is the one that trains
(:func:`raypar.dataset.stream.render`, packed and put into Ray's object store). Seconds are CPU seconds of the process unless they
are called wall.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from raypar.dataset.stream import StreamSpec

STAGES = ("read", "decode", "albumentations", "render", "pack")
PLACE_S = 60.0  # to wait for the actors: a busy cluster may not have room for all
MODEL_S = 120.0  # for the model, start of its process included
CPU_IMAGES = 4  # a step, when the model is timed on a CPU
STEPS_S = 6.0  # of timed steps


@dataclass(frozen=True)
class Rate:
    """What some cores did.

    Attributes:
        num_cores: actors that ran at once.
        images_per_s: over all of them, wall.
        cpu_ms_per_image: of each.
    """

    num_cores: int
    images_per_s: float
    cpu_ms_per_image: float


class Feeder:
    """An actor: one core of the pipeline, as a Ray Data task runs it."""

    def __init__(self, spec: StreamSpec):
        from raypar.dataset.stream import settle

        settle()
        self.spec, self.items = spec, list(_items(spec))

    def warm(self) -> tuple[int, float]:
        """Renders a batch, so that what is compiled or imported at first use is there; the node's cores, and how busy others keep them."""
        import psutil

        from raypar.dataset.batch import pack
        from raypar.dataset.stream import blocks

        pack(next(blocks(self.spec, self.items[0])))
        return len(os.sched_getaffinity(0)), psutil.cpu_percent(interval=0.5) / 100

    def feed(self, seconds: float, first: int) -> tuple[int, float, float]:
        """Makes batches for so long, from an item on: images, wall seconds, CPU seconds."""
        import ray

        from raypar.dataset.batch import pack
        from raypar.dataset.stream import blocks

        num_images, wall, cpu = 0, time.monotonic(), time.process_time()
        while time.monotonic() - wall < seconds:
            for block in blocks(self.spec, self.items[first % len(self.items)]):
                ray.put(pack(block))
                num_images += sum(len(batch.images) for batch in block)
            first += 1
        return num_images, time.monotonic() - wall, time.process_time() - cpu

    def stages(self) -> dict[str, dict[str, float]]:
        """Milliseconds an image of each of ``STAGES``, CPU and wall, over one window."""
        import ray

        from raypar.dataset.batch import pack
        from raypar.dataset.stream import blocks

        clock = _Clock()
        found = parts(self.spec, self.items[0], clock)
        rendered = blocks(self.spec, self.items[0])
        num_images, whole = 0, _Clock()
        while True:
            with whole("render"):
                block = next(rendered, None)
            if block is None:
                break
            with clock("pack"):
                ray.put(pack(block))
            num_images += sum(len(batch.images) for batch in block)
        for kind in ("cpu", "wall"):  # what is left of the whole: geometry, painting, labels
            used = sum(clock.seconds[kind].get(stage, 0.0) for stage in ("read", "decode", "albumentations"))
            clock.seconds[kind]["render"] = max(0.0, whole.seconds[kind]["render"] - used)
        assert found
        return {
            kind: {stage: 1000 * clock.seconds[kind].get(stage, 0.0) / num_images for stage in STAGES}
            for kind in ("cpu", "wall")
        }


def parts(spec: StreamSpec, item: Any, clock: Callable[[str], Any]) -> int:
    """Does parts of what ``render`` does, stage by stage; returns how many images the window has.

    Albumentations are timed on the images as they are decoded, about as large as the composed ones on which they act.
    """
    from raypar.augment.geometry import generator
    from raypar.dataset.rows import cells
    from raypar.dataset.stream import _decode, transform_of

    transform = transform_of(spec)
    window, num_images = spec.plan.window(item.epoch, item.window), 0
    for group, rows in window.rows():
        path, index = spec.groups[group]
        with clock("read"), spec.dataset.open(path) as file:
            encoded = pq.ParquetFile(file).read_row_group(index)["image"]
        for data in cells(encoded)[rows]:
            with clock("decode"):
                image = _decode(spec, data)
            if image is None:
                continue
            rng = generator(spec.plan.seed, item.epoch, num_images)
            with clock("albumentations"):
                transform(image, np.zeros(0, np.int32), np.zeros((0, 4), np.float32), rng)
            num_images += 1
    return num_images


class _Clock:
    """Adds up the time of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {"cpu": {}, "wall": {}}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.monotonic()
        yield
        for kind, spent in (("cpu", time.process_time() - cpu), ("wall", time.monotonic() - wall)):
            self.seconds[kind][stage] = self.seconds[kind].get(stage, 0.0) + spent


def _items(spec: StreamSpec) -> Iterator[Any]:
    """Windows of the first epoch, at most 64 of them."""
    for item in spec.plan.items():
        if item.epoch or item.window >= 64:
            break
        yield item


def measure_pipeline(spec: StreamSpec, seconds: float) -> dict[str, Any]:
    """Times one core of a node, then all that can be had of it.

    Returns:
        ``stages`` (CPU and wall ms an image on one core alone), ``one`` and ``all`` (:class:`Rate`), ``num_cores`` of the node, ``busy``: the
        share of them that had other work.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = _node()
    actor = ray.remote(
        num_cpus=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    )(Feeder)
    ref = ray.put(spec)
    first: Any = actor.remote(ref)
    feeders: list[Any] = [first]
    try:
        try:
            num_cores, busy = ray.get(first.warm.remote(), timeout=PLACE_S)
        except ray.exceptions.GetTimeoutError:
            raise ValueError(f"no CPU was free within {PLACE_S:.0f} s: run `raypar inspect` when the cluster is idle, "
                             "or with inspect.seconds=0, which measures no speed") from None  # fmt: skip
        stages = ray.get(first.stages.remote())
        one = _rate([ray.get(first.feed.remote(seconds, 0))])
        others = [actor.remote(ref) for _ in range(min(num_cores, int(node["Resources"].get("CPU", 1))) - 1)]
        feeders += others
        warm = {other.warm.remote(): other for other in others}
        ready, _ = ray.wait(list(warm), num_returns=len(warm), timeout=PLACE_S) if warm else ([], [])
        running = [first, *(warm[done] for done in ready)]
        together = _rate(ray.get([feeder.feed.remote(seconds, i) for i, feeder in enumerate(running)]))
    finally:
        for feeder in feeders:
            ray.kill(feeder)
    return {"stages": stages, "one": one, "all": together, "num_cores": num_cores, "busy": busy}


def _node() -> dict[str, Any]:
    """The node to measure: the driver's, or if that has no CPU for tasks the one with the most."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]  # type: ignore[no-untyped-call]
    here = ray.get_runtime_context().get_node_id()
    return max(nodes, key=lambda node: (node["NodeID"] == here, node["Resources"]["CPU"]))


def _rate(fed: list[tuple[int, float, float]]) -> Rate:
    num_images = sum(images for images, _, _ in fed)
    return Rate(
        len(fed),
        sum(images / wall for images, wall, _ in fed),
        1000 * sum(cpu for _, _, cpu in fed) / num_images,
    )


def measure_model(
    model: str, batch: int, imgsz: int, precision: str, *, use_gpu: bool, trusted: bool = False
) -> dict[str, Any]:
    """Times training steps (forward, loss, backward, optimizer) on one device of the cluster.

    Returns:
        ``device``, ``images_per_s``, ``batch``, ``precision``; or ``error``, one line.
    """
    import ray

    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0, max_retries=0)(train_steps)
    ref = task.remote(model, batch if use_gpu else min(batch, CPU_IMAGES), imgsz, precision, use_gpu=use_gpu,
                      trusted=trusted)  # fmt: skip
    try:
        found: dict[str, Any] = ray.get(ref, timeout=MODEL_S)
        return found
    except ray.exceptions.GetTimeoutError:
        ray.cancel(ref, force=True)
        return {"error": f"{model} took more than {MODEL_S:.0f} s to start and make its first steps"}
    except Exception as error:  # whatever Ultralytics says of a model: the rest of the report stands
        return {"error": f"{model}: {(str(error).strip().splitlines() or [type(error).__name__])[-1][:200]}"}


def train_steps(
    model: str, batch: int, imgsz: int, precision: str, *, use_gpu: bool, trusted: bool = False
) -> dict[str, Any]:
    """Runs in: a task. See :func:`measure_model`."""
    import torch
    from ultralytics import YOLO
    from ultralytics.cfg import get_cfg

    from raypar.precision import pick_precision
    from raypar.weights import restricted

    tree_map: Any = importlib.import_module("torch.utils._pytree").tree_map
    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    if not use_gpu:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    dtype = pick_precision(precision, device)
    with restricted(trusted=trusted):
        net: Any = YOLO(model).model.to(device).train()
    if dtype != torch.float32 or use_gpu:
        net.to(memory_format=torch.channels_last)
    net.args = get_cfg(overrides={"task": net.task} if hasattr(net, "task") else {})
    for parameter in net.parameters():
        parameter.requires_grad = True
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    data = {key: value.to(device) for key, value in _synthetic(net, batch, imgsz).items()}

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predictions = net(data["img"])
        loss = net.loss(
            data,
            tree_map(
                lambda x: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
                predictions,
            ),
        )[0]
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if use_gpu:
            torch.cuda.synchronize()

    step()
    if use_gpu:  # cuDNN chooses its kernels in the first steps
        step()
    began, times = time.monotonic(), list[float]()
    while not times or time.monotonic() - began < STEPS_S:
        before = time.monotonic()
        step()
        times.append(time.monotonic() - before)
    name = torch.cuda.get_device_name(0) if use_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "is_gpu": use_gpu,
        "images_per_s": batch / float(np.median(times)),
        "batch": batch,
        "precision": str(dtype).removeprefix("torch."),
    }


def _synthetic(net: Any, batch: int, imgsz: int) -> dict[str, Any]:
    """Noise with seven instances an image, in the form of each task's loss."""
    import torch

    kind, num = type(net).__name__, 7 * batch
    image = torch.rand(batch, 3, imgsz, imgsz)
    if kind == "ClassificationModel":
        return {"img": image, "cls": torch.zeros(batch, dtype=torch.long)}
    boxes = torch.rand(num, 4) * 0.4 + 0.3
    data = {
        "img": image,
        "cls": torch.zeros(num, 1),
        "bboxes": boxes,
        "batch_idx": torch.arange(num) // 7 * 1.0,
    }
    if kind == "OBBModel":
        data["bboxes"] = torch.cat([boxes, torch.rand(num, 1)], 1)
    if kind == "SegmentationModel":
        data["masks"] = torch.ones(batch, imgsz // 4, imgsz // 4)
    if kind == "PoseModel":
        data["keypoints"] = torch.rand(num, *net.kpt_shape)
    return data
