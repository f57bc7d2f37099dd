"""What training says on the terminal and in logs. Runs in: rank 0 of the training workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from raypar.dataset.batch import Batch
from raypar.progress import clock
from raypar.scores import scores_of

if TYPE_CHECKING:
    from raypar.train.worker import Worker


def introduce(worker: Worker) -> None:
    """What is about to be done."""
    if worker.rank == 0:
        found = (
            "starting" if worker.cursor == 0 else f"resuming after {worker.cursor} of {worker.total} images"
        )
        print(f"{worker.label}: {found}; {worker.plan.num_images} images, {worker.plan.steps_per_epoch} steps of {worker.plan.global_batch} an epoch, "
              f"{worker.args.epochs} epochs; {worker.world_size} worker(s) on {worker.loop.device.type}, {torch.get_num_threads()} threads, "
              f"{str(worker.precision).removeprefix('torch.')}, {type(worker.loop.optimizer).__name__}"
              f"{', augmented there' if worker.train['augment'] == 'gpu' else ''}", flush=True)  # fmt: skip


def progress(worker: Worker, batch: Batch) -> None:
    """A line every so often within long epochs."""
    if worker.rank == 0 and worker.epoch.is_time_to_speak():
        rate = (batch.step + 1) * worker.plan.global_batch / worker.epoch.seconds
        left = (worker.total - worker.cursor) / rate
        print(f"{worker.label}: epoch {batch.epoch + 1}/{worker.args.epochs} step {batch.step + 1}/{worker.plan.steps_per_epoch} "
              f"{rate:.1f} images/s, {clock(left)} left", flush=True)  # fmt: skip


def epoch(worker: Worker, line: dict[str, Any], is_best: bool) -> None:
    """What came of an epoch."""
    if worker.rank != 0:
        return
    losses = " ".join(
        f"{k.removeprefix('train/')} {v:.3f}" for k, v in line.items() if k.startswith("train/")
    )
    rate = line["images_per_s"]
    seconds = (worker.total - worker.cursor) / rate + (worker.args.epochs - line["epoch"]) * line[
        "validate_s"
    ]
    scores = scores_of(line) or "not validated"
    print(f"{worker.label}: epoch {line['epoch']}/{worker.args.epochs} {losses} {scores}{' (best)' if is_best else ''} "
          f"{rate:.1f} images/s, {clock(seconds)} left", flush=True)  # fmt: skip
    if line["images_replaced"]:
        instead = "grey ones without labels" if worker.train["augment"] == "gpu" else "others"
        print(f"{worker.label}: {line['images_replaced']} image(s) of epoch {line['epoch']} cannot be decoded; {instead} were shown in their place",
              flush=True)  # fmt: skip
