"""``train_loop_per_worker``: device, data, resume, steps, epochs, reports.

Runs in: every Ray Train worker. Ultralytics reads RANK and WORLD_SIZE once, when it is imported: so this module is imported
only inside the worker, and it checks that they are right.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import ultralytics.utils
from torch import Tensor

from raypar.augment.geometry import Recipe
from raypar.dataset.batch import Batch
from raypar.dataset.cache import CacheSpec, node_cache
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, batches
from raypar.precision import pick_precision
from raypar.quiet import quiet_ray
from raypar.storage import Folder
from raypar.train import checkpoint, pictures
from raypar.train.loop import Loop, to_tensors
from raypar.train.recipe import Lender, weights_file
from raypar.train.validate import Validator

SAY_EVERY_S = 20.0


def train_loop(config: dict[str, Any]) -> dict[str, Any] | None:
    """Trains to the end. Rank 0 returns the last epoch's line of ``metrics.jsonl``.

    Args:
        config: plain values only: ``folder`` (the run's URI), ``seed``, ``model``, ``train`` (TrainConfig as a dict),
            ``plan`` (Plan's arguments but the epochs).
    """
    return Worker(config).run()


class Worker:
    """One rank."""

    def __init__(self, config: dict[str, Any]):
        quiet_ray()
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        cached = ultralytics.utils.RANK
        assert cached == (self.rank if self.world_size > 1 else -1), f"Ultralytics was imported too early: it took rank {cached}"
        ultralytics.utils.LOGGER.setLevel("WARNING")
        train = config["train"]
        device = ray.train.torch.get_device()

        run = Folder(config["folder"])
        self.out, dataset = run / "train", run / "dataset"
        manifest = Manifest.load(dataset)
        lender = Lender(train["yolo"], model=_staged(config["model"], self.out), manifest=manifest, batch=train["batch"],
                        seed=config["seed"], device=device)  # fmt: skip
        cores = len(os.sched_getaffinity(0))  # set now: building Ultralytics' trainer sets the number of threads too
        torch.set_num_threads(train["threads_per_worker"] or max(1, cores // context.get_local_world_size()))
        self.args, self.class_names = lender.args, list(lender.data["names"].values())
        self.plan = Plan(epochs=self.args.epochs, **config["plan"])
        self.precision = pick_precision(train["precision"], device)
        self.loop = Loop(lender, num_images=self.plan.num_images, steps_per_epoch=self.plan.steps_per_epoch,
                         world_size=self.world_size, precision=self.precision)  # fmt: skip
        recipe = Recipe.from_yolo(vars(self.args))
        cache = CacheSpec(**config["cache"]) if config["cache"] else None
        self.cache = None if cache is None else node_cache(cache)  # held open: as long as a worker lives, nobody sweeps it away
        self.spec = StreamSpec.of(
            dataset, manifest.split("train"), self.plan, recipe, mosaic_epochs=self.args.epochs - self.args.close_mosaic,
            albumentations=train["albumentations"], world_size=self.world_size, cache=cache)  # fmt: skip
        self.validator = Validator(
            dataset, manifest.split("val"), self.class_names, rank=self.rank, world_size=self.world_size, imgsz=self.args.imgsz,
            batch=max(1, 2 * train["batch"] // self.world_size), max_det=self.args.max_det, iou=self.args.iou,
            single_cls=self.args.single_cls)  # fmt: skip
        self.cursor, self.is_finished = 0, False
        self.history: list[dict[str, Any]] = []
        if (saved := ray.train.get_checkpoint()) is not None:
            self.cursor, self.history, self.is_finished = checkpoint.restore(self.loop, saved)

    def run(self) -> dict[str, Any] | None:
        self._introduce()
        epoch = _Epoch()
        is_first = True
        self.loop.start_epoch()
        for batch in () if self.is_finished else batches(self.spec, self.rank, self.cursor):
            epoch.waited()
            tensors = to_tensors(batch)
            if self.args.single_cls:
                tensors["cls"].zero_()
            step = batch.epoch * self.plan.steps_per_epoch + batch.step
            if self.rank == 0 and pictures.wants(batch, self.plan, self.spec.mosaic_epochs):
                pictures.training_batch(self.out, batch, self.class_names, step)
            parts = self.loop.step(tensors, step)
            epoch.stepped(parts, batch)
            self.cursor += self.plan.global_batch
            if is_first and self.world_size > 1:
                assert_synchronised(self.loop.lender.model, self.rank)
            is_first = False
            self._say(epoch, batch)
            if batch.step == self.plan.steps_per_epoch - 1:
                if self._end_epoch(batch.epoch, epoch):
                    break
                epoch = _Epoch()
                self.loop.start_epoch()
        return self.history[-1] if self.rank == 0 and self.history else None

    def _end_epoch(self, number: int, epoch: _Epoch) -> bool:
        """Validates, saves, reports. Returns whether training ends here; the same on every rank."""
        loop, is_last = self.loop, number + 1 >= self.args.epochs
        losses, num_replaced = epoch.means(self.world_size)
        if not all(map(torch.isfinite, map(torch.tensor, losses.values()))):
            raise RuntimeError(f"the loss is not finite in epoch {number + 1}: {losses}; lower train.yolo.lr0 or use precision=fp32")
        loop.end_epoch()
        began = time.monotonic()
        metrics: dict[str, Any] = {}
        if self.args.val or is_last or loop.stopper.possible_stop:
            metrics = self.validator(loop.ema.ema, loop.lender.model, loop.device)
            fitness = metrics["fitness"]
            is_best = loop.best_fitness is None or fitness > loop.best_fitness
            loop.best_fitness = max(fitness, loop.best_fitness or 0.0)
            stop = bool(loop.stopper(number + 1, fitness)) or is_last
        else:
            is_best, stop = False, is_last
        validated = time.monotonic()
        line = {
            "epoch": number + 1, **losses, **{k: v for k, v in metrics.items() if k != "per_class"}, **loop.learning_rates(),
            "images_per_s": self.plan.positions_per_epoch / epoch.seconds, "wait_s": epoch.wait_s, "step_s": epoch.step_s,
            "validate_s": validated - began, "world_size": self.world_size, "images_seen": self.cursor,
            "images_replaced": num_replaced, "compute_dtype": str(self.precision).removeprefix("torch."),
        }  # fmt: skip
        self._save(line, is_best, stop)
        if self.rank == 0:
            self._print_epoch(line, is_best)
        return stop

    def _save(self, line: dict[str, Any], is_best: bool, is_finished: bool) -> None:
        """Writes weights and metrics (rank 0), then reports the checkpoint (all ranks)."""
        began = time.monotonic()
        self.history.append(line)
        if self.rank != 0:
            ray.train.report({"epoch": line["epoch"]})
            return
        weights = weights_file(self.loop.ema.ema, self.args, epoch=line["epoch"] - 1, metrics={k: line[k] for k in line if "map" in k})
        for name in ("last.pt", "best.pt") if is_best else ("last.pt",):
            self.out.write(name, weights)
        with checkpoint.saved(self.loop, cursor=self.cursor, history=self.history, is_finished=is_finished) as saved:
            line["checkpoint_s"] = time.monotonic() - began
            pictures.tables(self.out, self.history)
            ray.train.report({k: v for k, v in line.items() if isinstance(v, int | float)}, checkpoint=saved,
                             checkpoint_dir_name=f"checkpoint_{self.cursor:010d}")  # fmt: skip

    def _introduce(self) -> None:
        if self.rank == 0:
            found = "starting" if self.cursor == 0 else f"resuming after {self.cursor} of {self.plan.total_positions} images"
            print(f"train: {found}; {self.plan.num_images} images, {self.plan.steps_per_epoch} steps of {self.plan.global_batch} an epoch, "
                  f"{self.args.epochs} epochs; {self.world_size} worker(s) on {self.loop.device.type}, {torch.get_num_threads()} threads, "
                  f"{str(self.precision).removeprefix('torch.')}, {type(self.loop.optimizer).__name__}", flush=True)  # fmt: skip

    def _say(self, epoch: _Epoch, batch: Batch) -> None:
        """A line every so often within long epochs."""
        if self.rank == 0 and epoch.is_time_to_speak():
            rate = (epoch.num_steps * self.plan.global_batch) / epoch.seconds
            left = (self.plan.total_positions - self.cursor) / rate
            print(f"train: epoch {batch.epoch + 1}/{self.args.epochs} step {batch.step + 1}/{self.plan.steps_per_epoch} "
                  f"{rate:.1f} images/s, {_clock(left)} left", flush=True)  # fmt: skip

    def _print_epoch(self, line: dict[str, Any], is_best: bool) -> None:
        losses = " ".join(f"{k.removeprefix('train/')} {v:.3f}" for k, v in line.items() if k.startswith("train/"))
        rate = line["images_per_s"]
        seconds = (self.plan.total_positions - self.cursor) / rate + (self.args.epochs - line["epoch"]) * line["validate_s"]
        scores = f"mAP50 {line['map50']:.3f} mAP50-95 {line['map50_95']:.3f}" if "map50" in line else "not validated"
        print(f"train: epoch {line['epoch']}/{self.args.epochs} {losses} {scores}{' (best)' if is_best else ''} "
              f"{rate:.1f} images/s, {_clock(seconds)} left", flush=True)  # fmt: skip
        if line["images_replaced"]:
            print(f"train: {line['images_replaced']} image(s) of epoch {line['epoch']} cannot be decoded; others were shown in their place",
                  flush=True)  # fmt: skip


class _Epoch:
    """Sums of an epoch: losses (kept on the device, so that no step waits for one) and where the time went."""

    def __init__(self) -> None:
        self.began = self.mark = self.spoke = time.monotonic()
        self.wait_s = self.step_s = 0.0
        self.num_steps = self.num_replaced = 0
        self.sums: dict[str, Tensor] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def waited(self) -> None:
        now = time.monotonic()
        self.wait_s, self.mark = self.wait_s + now - self.mark, now

    def stepped(self, parts: dict[str, Tensor], batch: Batch) -> None:
        now = time.monotonic()
        self.step_s, self.mark = self.step_s + now - self.mark, now
        self.num_steps += 1
        self.num_replaced += batch.num_replaced
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()

    def is_time_to_speak(self) -> bool:
        if time.monotonic() - self.spoke < SAY_EVERY_S:
            return False
        self.spoke = time.monotonic()
        return True

    def means(self, world_size: int) -> tuple[dict[str, float], int]:
        """Losses as means over the epoch's steps and the ranks, and the images replaced on all of them."""
        names = list(self.sums)
        values = torch.stack(
            [*(self.sums[n].float() for n in names), torch.tensor(float(self.num_replaced), device=self.sums[names[0]].device)]
        )
        if world_size > 1:
            dist.all_reduce(values)
        *sums, num_replaced = values.tolist()
        return {f"train/{n}": s / (self.num_steps * world_size) for n, s in zip(names, sums, strict=True)}, int(num_replaced)


def assert_synchronised(model: torch.nn.Module, rank: int) -> None:
    """Compares all ranks' weights bit for bit: a model that DDP does not wrap trains apart without any error.

    Raises:
        RuntimeError: they differ.
    """
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    mine = flat.view(torch.int32).to(torch.int64).sum().view(1)  # of the bit patterns, so order of summation is irrelevant
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    if any(int(other) != int(mine) for other in every):
        raise RuntimeError(f"rank {rank}: the ranks' weights differ after the first step: gradients are not synchronised")


def _staged(model: str | dict[str, Any], out: Folder) -> str | dict[str, Any]:
    """Weights that the driver put into storage come to this node; a yaml's content is used as it is."""
    if isinstance(model, dict):
        return model
    local = f"/tmp/raypar-{os.getpid()}-{model}"  # one a process: no two writers
    return str(out.download(model, local))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
