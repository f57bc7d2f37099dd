"""A pool of Ray Data actors that each hold the same detector: what batch prediction and evaluation run on.

Runs in: the driver (``read_facts``, ``DetectorPool.map``) and the actors (``DetectorPool.load``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raypar.weights import Weights

if TYPE_CHECKING:
    from raypar.detector import Detector

MAX_BLOCKS = 1000  # more would cost Ray Data more than they spread the work


def read_facts(
    weights: Weights,
    imgsz: int | None,
    task: str = "detect",
    *,
    precision: str = "fp32",
    trusted: bool = False,
) -> tuple[list[str], int, str]:
    """Class names, image size in px and checksum: read by the driver, which fails at once.

    Args:
        weights: of any format.
        imgsz: px; None: as trained or exported.
        task: that they must be for.
        precision: as set for the actors. What a ``.pt`` can do depends on their devices; an export's is its own.
        trusted: whether code that a ``.pt`` holds may run.

    Raises:
        ValueError: the weights cannot be read, or are for another task, size or precision.
    """
    from raypar.detector import Detector

    is_pt = weights.name.endswith(".pt")
    with weights.local() as path:
        try:
            detector = Detector.load(
                path, imgsz=imgsz, task=task, precision="fp32" if is_pt else precision, trusted=trusted
            )
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), weights.uri)) from error
    return detector.class_names, detector.imgsz, detector.sha256


@dataclass(frozen=True)
class DetectorPool:
    """How the actors get their detector.

    Attributes:
        weights: where every node can read them.
        sha256: of the weights, when the driver read them.
        options: arguments of ``Detector.load``.
        num_actors: 1 or more.
        use_gpu: ``auto``: if the cluster has one for each actor.
    """

    weights: Weights
    sha256: str
    options: dict[str, Any]
    num_actors: int
    use_gpu: bool | str

    def map(
        self, items: list[dict[str, Any]], worker: type, *args: object, before: Any = None
    ) -> Iterator[dict[str, Any]]:
        """Rows that the workers make of the items, as they come.

        Args:
            items: each goes to one actor, alone in its batch.
            worker: a class; an actor is ``worker(pool, *args)``, called with a batch of one row (numpy columns).
            args: pickled once for each actor.
            before: a function and the arguments of ``map_batches`` that items go through first.
        """
        import ray
        import ray.data

        has_gpus = ray.cluster_resources().get("GPU", 0) >= self.num_actors  # type: ignore[no-untyped-call]
        num_gpus = 1 if self.use_gpu is True or (self.use_gpu == "auto" and has_gpus) else 0
        pool = DetectorPool(self.weights, self.sha256, self.options, self.num_actors, bool(num_gpus))
        dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
        if before is not None:
            function, options = before
            dataset = dataset.map_batches(function, batch_size=1, batch_format="numpy", **options)
        dataset = dataset.map_batches(
            worker, batch_size=1, batch_format="numpy", compute=ray.data.ActorPoolStrategy(size=self.num_actors),
            fn_constructor_args=(pool, *args), num_cpus=1, num_gpus=num_gpus)  # fmt: skip
        dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
        yield from dataset.iter_rows()

    def load(self) -> Detector:
        """An actor's detector, on its share of the node's cores.

        Raises:
            RuntimeError: the weights are no longer those that the driver read.
        """
        import torch

        from raypar.detector import Detector
        from raypar.precision import pick_device

        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.num_actors))
        with self.weights.local() as path:
            detector = Detector.load(path, device=pick_device(bool(self.use_gpu)), **self.options)
        if detector.sha256 != self.sha256:
            raise RuntimeError(f"{self.weights.uri} changed meanwhile: start again")
        return detector
