"""``train_loop_per_worker``: device, data, resume, steps, epochs, checkpoints, reports.

Runs in: every Ray Train worker. Ultralytics reads RANK and WORLD_SIZE once, when it is imported: so this module is imported
only inside the worker, and it checks that they are right.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import ray.train
import ray.train.torch
import ray.train.v2._internal.execution.context
import torch
import ultralytics.utils
from torch import Tensor

from raypar.dataset.batch import Batch
from raypar.dataset.cache import CacheSpec, node_cache
from raypar.dataset.manifest import MANIFEST, Manifest
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, batches, recipe_of
from raypar.precision import pick_precision
from raypar.prefetch import sent
from raypar.quiet import quiet_ray
from raypar.storage import Folder, patiently
from raypar.train import budget, checkpoint, failure, memory, parallel, pictures, say
from raypar.train.agree import Agreement, FiniteWatch
from raypar.train.epoch import Epoch, summary
from raypar.train.loop import Loop, to_tensors
from raypar.train.prime import settle_buckets
from raypar.train.pulse import Pulse
from raypar.train.recipe import Lender, settings, staged, weights_file
from raypar.train.saver import Saver
from raypar.train.validate import make_validator
from raypar.train.watch import Watch
from raypar.weights import read_model, restricted

if TYPE_CHECKING:
    from raypar.dataset.rendered import Rendered

NAN_RESTARTS = "nan_restarts.json"  # where and how often the loss was not finite


class Worker:
    """One rank."""

    def __init__(self, config: dict[str, Any], pulse: Pulse):  # noqa: PLR0915
        quiet_ray()
        # it names it so: each report
        logging.getLogger(ray.train.v2._internal.execution.context.__file__).setLevel(logging.WARNING)
        context = ray.train.get_context()
        self.pulse = pulse
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        cached = ultralytics.utils.RANK
        assert cached == (self.rank if self.world_size > 1 else -1), (
            f"Ultralytics was imported too early: it took rank {cached}"
        )
        ultralytics.utils.LOGGER.setLevel("WARNING")
        self.train, self.label = config["train"], config["label"]
        train = self.train
        self.device = ray.train.torch.get_device()

        patience_s = train["storage_timeout_s"]
        self.out, dataset = (
            Folder(config["folder"], patience_s) / "train",
            Folder(config["dataset"], patience_s),
        )
        manifest = patiently(lambda: Manifest.load(dataset), f"read {dataset.shown(MANIFEST)}", patience_s)
        self.args = settings(train["yolo"], batch=train["batch"], seed=config["seed"], task=manifest.task)
        self.plan = Plan(epochs=budget.ENDLESS if self.args.time else self.args.epochs, **config["plan"])
        cache = CacheSpec(**config["cache"]) if config["cache"] else None
        # held open: as long as a worker lives, nobody sweeps it away
        self.cache = None if cache is None else node_cache(cache)
        self.spec = StreamSpec.of(
            dataset, manifest.split("train"), self.plan, recipe_of(vars(self.args), manifest),
            mosaic_epochs=self.args.epochs - self.args.close_mosaic, albumentations=train["albumentations"],
            world_size=self.world_size, cache=cache)  # fmt: skip
        self.agreement = Agreement(self.world_size, train["collective_timeout_s"])
        state = self._find_state()
        # first: its processes start while the model is built
        self.stream = iter(()) if self.is_finished else self._stream(self.spec)

        trusted = config["weights_trusted"]
        with staged(config["model"], self.out) as model, restricted(trusted=trusted):
            lender = Lender(
                train["yolo"],
                model=model,
                manifest=manifest,
                batch=train["batch"],
                seed=config["seed"],
                device=self.device,
            )
        if config["init_from"]:
            with staged(config["init_from"], self.out) as weights:
                lender.model.load(read_model(str(weights), trusted=trusted), verbose=False)
        # set now: building Ultralytics' trainer sets the number of threads too
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(train["threads_per_worker"] or max(1, cores // context.get_local_world_size()))
        epochs, self.args, self.class_names = (
            self.args.epochs,
            lender.args,
            list(lender.data["names"].values()),
        )
        self.precision = pick_precision(
            train["precision"], self.device, is_sharded=train["parallel"] == "fsdp"
        )
        self.loop = Loop(lender, num_images=self.plan.num_images, steps_per_epoch=self.plan.steps_per_epoch,
                         world_size=self.world_size, precision=self.precision, spread=train["parallel"], sync_bn=train["sync_bn"])  # fmt: skip
        # of `time`: now, for the optimizer and the warm-up follow from those that were asked for
        self.args.epochs = epochs
        self.validator = make_validator(lender, dataset, rank=self.rank, world_size=self.world_size,
                                        batch=max(1, 2 * train["batch"] // self.world_size))  # fmt: skip
        self.saver = Saver(patience_s) if self.rank == 0 else None
        self.finite = FiniteWatch()
        self.saved_at, self.saved_cursor = time.monotonic(), -1
        self.asked: set[str] = set()  # wishes that all ranks know of and that wait for an optimizer step
        self.pulse.stage = "resume"
        settle_buckets(self.loop)
        if state is not None:
            checkpoint.restore(self.loop, state)
        self.loop.lr_scale = 0.5 ** len(self.broken)
        import torchvision  # noqa: F401  # validation needs it: now, while the first images are made

    def _find_state(self) -> dict[str, Any] | None:
        """The newest checkpoint's content, which rank 0 chooses, and where the run goes on from there."""
        self.pulse.stage = "resume"
        found = checkpoint.newest(self.out, self.out.patience_s) if self.rank == 0 else None
        state: dict[str, Any] | None = None
        name = self.agreement.from_rank_zero(found[0] if found else None)
        if name is not None:
            state = found[1] if found else checkpoint.load(self.out, name, self.out.patience_s)
        self.broken = self.agreement.from_rank_zero(self._read_broken() if self.rank == 0 else None)
        self.cursor, self.history, self.is_finished = (
            (state[k] for k in ("cursor", "history", "is_finished")) if state else (0, [], False)
        )
        self.pulse.cursor = self.cursor
        self.epoch = Epoch(self.plan.num_images, state["epoch"] if state else None)
        self._keep_time(self.history)
        return state

    def _keep_time(self, history: list[dict[str, Any]]) -> None:
        """With ``time``: how many epochs there will be, and when mosaic is closed, as rank 0 counts it. All ranks must call."""
        if hours := self.args.time:
            self.args.epochs, mosaic_epochs = self.agreement.from_rank_zero(
                (
                    budget.epochs_within(hours, history, self.args.epochs),
                    budget.mosaic_within(hours, history, self.args.close_mosaic),
                )
            )
            if mosaic_epochs != self.spec.mosaic_epochs:
                self.spec = replace(self.spec, mosaic_epochs=mosaic_epochs)
            self.pulse.total = self.total

    @property
    def total(self) -> int:
        """The cursor at the run's end, as far as is known."""
        return int(self.args.epochs) * self.plan.positions_per_epoch

    def run(self) -> dict[str, Any] | None:
        """Trains until nothing is left or somebody asks for an end. However that comes, what waits is written first, then loggers are closed."""
        say.introduce(self)
        self.watch = Watch(self, self.pulse.run_id)
        ended = "failed"
        try:
            is_stopped = self._train()
            if self.saver is not None:
                self.saver.flush()
            ended = "stopped" if is_stopped else "finished"
        finally:
            if self.saver is not None:
                self.saver.end()
            self.watch.end(ended)
        if self.rank != 0:
            return None
        return {"stopped": self.cursor} if is_stopped else self.history[-1] if self.history else None

    def _train(self) -> bool:
        """All steps and epochs that are left. Returns whether it was asked to stop before the end."""
        self.loop.start_epoch()
        first_cursor = self.cursor
        self.pulse.stage = "wait for data"
        for batch, tensors in self._batches():
            self.epoch.waited()
            compiles = ", the model is compiled" if self.args.compile and self.cursor == first_cursor else ""
            self.pulse.stage = f"step {batch.step + 1} of epoch {batch.epoch + 1}{compiles}"
            step = batch.epoch * self.plan.steps_per_epoch + batch.step
            parts = self._step(batch, tensors, step)
            if (
                self.cursor == first_cursor + self.plan.global_batch
                and self.world_size > 1
                and not self.loop.is_sharded
            ):
                parallel.assert_synchronised(self.loop.lender.model, self.rank)
            say.progress(self, batch)
            learnt = self.agreement.step(self._wishes(parts))  # what was wished a step ago
            self.asked |= (
                learnt - {"save"} if self.saved_cursor == self.cursor - self.plan.global_batch else learnt
            )
            if "nan" in self.asked:
                self._go_back()
            if batch.step == self.plan.steps_per_epoch - 1:
                if self._end_epoch(batch.epoch, step):
                    break
                self.epoch = Epoch(self.plan.num_images)
                self.loop.start_epoch()
            elif self.asked and self.loop.last_optimizer_step == step:
                self._save(self.epoch.reduced(self.agreement), is_finished=False, has_gradients=False)
            if self._must_leave():
                return True
            self.pulse.stage = "wait for data"
        return False

    def _batches(self) -> Iterator[Rendered]:
        """This rank's batches from the cursor on, and what the loss wants of them; from a new stream when mosaic was closed meanwhile."""
        while True:
            spec = self.spec
            for found in self.stream:
                yield found
                if self.spec is not spec:
                    break
            else:
                return
            self.stream = iter(())  # first: a ring on a GPU is given back
            self.stream = self._stream(self.spec)

    def _stream(self, spec: StreamSpec) -> Iterator[Rendered]:
        if self.train["augment"] == "gpu":
            from raypar.dataset.rendered import rendered_batches  # here: Triton takes a while to import

            return rendered_batches(spec, self.rank, self.cursor, self.device, to_tensors)
        return sent(batches(spec, self.rank, self.cursor), to_tensors, self.device)

    def _step(self, batch: Batch, tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        if self.args.single_cls:
            for name in {"cls", "sem_masks"} & tensors.keys():
                tensors[name].zero_()
        if self.rank == 0 and pictures.wants(batch, self.plan, self.spec.mosaic_epochs):
            shown = batch if batch.images.size else replace(batch, images=tensors["img"].cpu().numpy())
            sheet = pictures.training_batch(shown, self.class_names)
            self.watch.aside.submit(f"batch_{step}.png", partial(self.out.write, f"batch_{step}.png", sheet))
        # for models that draw (dropout): a resume draws alike
        torch.manual_seed(hash((self.args.seed, step, self.rank)))
        with memory.advice(self.loop, tensors, world_size=self.world_size, who=str(self.pulse)):
            parts = self.loop.step(tensors, step)
        self.epoch.stepped(parts, batch)
        self.cursor += self.plan.global_batch
        self.pulse.cursor = self.cursor
        return parts

    def _wishes(self, parts: dict[str, Tensor]) -> set[str]:
        """What this rank would have all ranks do: ``save``, ``stop``, ``preempted``, ``grow``, ``nan``."""
        wishes = set(self.pulse.wishes())
        self.finite.push(parts)
        if self.finite.is_broken:
            wishes.add("nan")
        if self.saver is not None:
            self.saver.check()
            if time.monotonic() - self.saved_at > self.train["checkpoint_every_s"] and not self.saver.is_busy:
                wishes.add("save")
        return wishes

    def _end_epoch(self, number: int, step: int) -> bool:
        """Validates, saves, reports. Returns whether training ends here; the same on every rank."""
        loop, is_last = self.loop, number + 1 >= self.args.epochs
        has_gradients = loop.last_optimizer_step != step
        if has_gradients:
            checkpoint.fold_gradients(loop)
        reduced = self.epoch.reduced(self.agreement)
        sums = summary(reduced)
        if not all(map(torch.isfinite, map(torch.tensor, reduced["losses"].values()))):
            self._go_back()
        loop.end_epoch()
        self.pulse.stage = f"validation after epoch {number + 1}"
        began = time.monotonic()
        metrics: dict[str, Any] = {}
        if self.args.val or self.args.time or is_last or loop.stopper.possible_stop:
            metrics = self.validator(loop.ema.ema, loop.lender.model, loop.device)
            fitness = metrics["fitness"]
            is_best = loop.best_fitness is None or fitness > loop.best_fitness
            loop.best_fitness = max(fitness, loop.best_fitness or 0.0)
            stop = bool(loop.stopper(number + 1, fitness)) or is_last
        else:
            is_best, stop = False, is_last
        line = {
            "epoch": number + 1, **{k: v for k, v in sums.items() if k.startswith("train/")},
            **{k: v for k, v in metrics.items() if k != "per_class"}, **loop.learning_rates(), **self.watch.line(),
            "images_per_s": self.plan.positions_per_epoch / reduced["seconds"], **sums,
            "validate_s": time.monotonic() - began, "world_size": self.world_size, "images_seen": self.cursor,
            "compute_dtype": str(self.precision).removeprefix("torch."),
        }  # fmt: skip
        self._keep_time([*self.history, line])
        stop = stop or number + 1 >= self.args.epochs
        self._save_epoch(line, is_best, is_finished=stop, has_gradients=has_gradients)
        self.watch.epoch(line, self.history, metrics["per_class"] if is_best else None)
        say.epoch(self, line, is_best)
        return stop

    def _save_epoch(
        self, line: dict[str, Any], is_best: bool, *, is_finished: bool, has_gradients: bool
    ) -> None:
        """Weights, metrics and a checkpoint, written beside the next epoch's first steps; then Ray Train is told."""
        history, files = [*self.history, line], dict[str, Any]()
        if self.rank == 0:
            weights = weights_file(
                self.loop.ema.ema,
                self.args,
                epoch=line["epoch"] - 1,
                metrics={k: line[k] for k in line if "map" in k},
            )
            names = ("last.pt", "best.pt")[: 1 + is_best]
            files = {
                f"write {self.out.shown(name)}": partial(self.out.write, name, weights) for name in names
            }
            files[f"write {self.out.shown('metrics.jsonl')}"] = lambda: pictures.tables(self.out, history)
        self._save(None, is_finished=is_finished, has_gradients=has_gradients, line=line, before=files)
        self.pulse.stage = "report"
        ray.train.report({k: v for k, v in line.items() if isinstance(v, int | float)})

    def _save(self, epoch: dict[str, Any] | None, *, is_finished: bool, has_gradients: bool, line: dict[str, Any] | None = None,
              before: dict[str, Any] | None = None) -> None:  # fmt: skip
        """Copies the state; rank 0 writes it beside the training. All ranks must call.

        Args:
            epoch: sums of the epoch so far; nothing at its end.
            is_finished: whether nothing is left to train.
            has_gradients: whether gradients wait for more steps.
            line: of the epoch that ended; it is told how long training waited, and joins the history.
            before: what to write before the checkpoint, so that whoever resumes from it finds these too.
        """
        self.pulse.stage = "checkpoint"
        began = time.monotonic()
        state = checkpoint.capture(self.loop, has_gradients=has_gradients)
        if self.agreement.any(self.rank == 0 and not checkpoint.is_finite(state)):
            self._go_back()
        if line is not None:
            line["checkpoint_s"] = time.monotonic() - began
            self.history = [*self.history, line]  # a new list: the old one may be being written
        if self.saver is not None:
            for what, do in (before or {}).items():
                self.saver.submit(what, do)
            state |= {
                "cursor": self.cursor,
                "history": self.history,
                "is_finished": is_finished,
                "epoch": epoch,
            }
            self.saver.submit(f"write {self.out.shown(checkpoint.name_of(self.cursor))}",
                              partial(checkpoint.write, self.out, state, keep=self.train["keep_checkpoints"]))  # fmt: skip
        self.saved_at, self.saved_cursor = time.monotonic(), self.cursor
        self.asked.discard("save")

    def _must_leave(self) -> bool:
        """After a checkpoint that somebody asked for in order to end: whether training stops here.

        Raises:
            Restart: the workers are to be placed anew.
        """
        reasons = self.asked & {"stop", "preempted", "grow"}
        if not reasons or self.saved_cursor != self.cursor:
            return False
        if self.saver is not None:
            self.saver.flush()
        self.watch.end("stopped")
        # nobody leaves before everything is written: the first who does ends them all
        self.agreement.any(False)
        if "stop" in reasons:
            return True
        raise failure.Restart("preempted" if "preempted" in reasons else "grow")

    def _go_back(self) -> NoReturn:
        """Ends this attempt: the loss or the weights are no numbers any more. All ranks must call.

        Raises:
            NotFiniteError: training is to go on from the newest checkpoint, at half the learning rate.
            DivergedError: that was done too often.
        """
        limit, epoch = self.train["max_nan_restarts"], (self.cursor - 1) // self.plan.positions_per_epoch + 1
        self.broken.append({"epoch": epoch, "images_seen": self.cursor})
        if self.saver is not None:
            self.saver.flush()
            written = f"write {self.out.shown(NAN_RESTARTS)}"
            patiently(lambda: self.out.write_json(NAN_RESTARTS, self.broken), written, self.out.patience_s)
        self.agreement.any(False)
        what = f"the loss is not finite in epoch {epoch}, after {self.cursor} images"
        if len(self.broken) > limit:
            raise failure.DivergedError(
                f"{what}; that makes {len(self.broken)} times, train.max_nan_restarts={limit}, each at half the learning rate: lower "
                f"train.yolo.lr0 (now {self.args.lr0:g}), raise train.yolo.warmup_epochs, or use train.precision=fp32, and add train.overwrite=true"
            )
        raise failure.NotFiniteError(
            f"{what}: restart {len(self.broken)} of {limit}, at half the learning rate"
        )

    def _read_broken(self) -> list[dict[str, Any]]:
        out, what = self.out, f"read {self.out.shown(NAN_RESTARTS)}"
        return patiently(
            lambda: out.read_json(NAN_RESTARTS) if out.exists(NAN_RESTARTS) else [], what, out.patience_s
        )
