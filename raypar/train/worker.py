"""``train_loop_per_worker``: device, data, resume, steps, epochs, checkpoints, reports.

Runs in: every Ray Train worker. Ultralytics reads RANK and WORLD_SIZE once, when it is imported: so this module is imported
only inside the worker, and it checks that they are right.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from copy import copy, deepcopy
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
from raypar.train import (
    budget,
    checkpoint,
    failure,
    identity,
    memory,
    parallel,
    pictures,
    report,
    rollback,
    say,
)
from raypar.train.agree import Agreement, FiniteWatch
from raypar.train.epoch import Epoch, summary
from raypar.train.loop import Loop, to_tensors
from raypar.train.prime import settle_buckets
from raypar.train.pulse import Pulse
from raypar.train.recipe import (
    Lender,
    counted_classes,
    initial_weights,
    settings,
    staged,
    validated_part,
    weights_file,
)
from raypar.train.saver import Saver
from raypar.train.validate import make_validator
from raypar.train.watch import Watch
from raypar.weights import restricted

if TYPE_CHECKING:
    from raypar.dataset.rendered import Rendered

NAN_RESTARTS = "nan_restarts.json"  # where and how often the loss was not finite
# Updates in a row that fp16's GradScaler may skip. It starts at a scale of 65,536 and halves it at each: after 16 the scale is 1, and gradients
# that still overflow are no matter of the scale.
MAX_SKIPPED = 20


def stream_spec(
    config: dict[str, Any], args: Any, manifest: Manifest, dataset: Folder, world_size: int
) -> StreamSpec:
    """Which images the run shows, and how they are augmented.

    Args:
        config: of :func:`raypar.train.entry.train_loop`.
        args: Ultralytics' whole settings.
        manifest: of the dataset.
        dataset: where it is.
        world_size: ranks.
    """
    plan = Plan(epochs=budget.ENDLESS if args.time else args.epochs, **config["plan"])
    cache = CacheSpec(**config["cache"]) if config["cache"] else None
    return StreamSpec.of(
        dataset, manifest.split("train"), plan, recipe_of(vars(args), manifest), mosaic_epochs=args.epochs - args.close_mosaic,
        albumentations=config["train"]["albumentations"], world_size=world_size, cache=cache, classes=args.classes)  # fmt: skip


def is_validated(args: Any, *, is_last: bool, may_stop: bool) -> bool:
    """Whether an epoch ends with a validation: with ``time`` any epoch may be the last."""
    return bool(args.val or args.time or is_last or may_stop)


class Worker:
    """One rank."""

    def __init__(self, config: dict[str, Any], pulse: Pulse):
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
        self.train, self.label, self.identity = config["train"], config["label"], config["identity"]
        self.device = ray.train.torch.get_device()
        self.precision = pick_precision(
            self.train["precision"], self.device, is_sharded=self.train["parallel"] == "fsdp"
        )
        self.agreement = Agreement(self.world_size, self.train["collective_timeout_s"])

        patience_s = self.train["storage_timeout_s"]
        self.out = Folder(config["folder"], patience_s) / "train"
        dataset = Folder(config["dataset"], patience_s)
        manifest = patiently(lambda: Manifest.load(dataset), f"read {dataset.shown(MANIFEST)}", patience_s)
        self.args = settings(
            self.train["yolo"], batch=self.train["batch"], seed=config["seed"], task=manifest.task
        )
        manifest = validated_part(manifest, self.args)
        self._plan_stream(config, dataset, manifest)
        state = self._find_state()
        # first: its processes start while the model is built
        self.stream = iter(()) if self.is_finished else self._stream(self.spec)
        lender = self._build_model(config, manifest)
        self.class_names = list(lender.data["names"].values())
        self._limit_threads()
        self._build_loop(lender)
        self.validator = make_validator(lender, dataset, rank=self.rank, world_size=self.world_size,
                                        batch=max(1, 2 * self.train["batch"] // self.world_size))  # fmt: skip
        self.saver = Saver(patience_s) if self.rank == 0 else None
        self.saved_at, self.saved_cursor = time.monotonic(), -1
        # weights of epochs that ended since the last checkpoint
        self.unwritten: dict[str, Callable[[], bytes]] = {}
        self.asked: set[str] = set()  # wishes that all ranks know of and that wait for an optimizer step
        self._rewind_tables()
        self._begin_from(state)
        import torchvision  # noqa: F401  # validation needs it: now, while the first images are made

    def _plan_stream(self, config: dict[str, Any], dataset: Folder, manifest: Manifest) -> None:
        """Which images there will be, in which order, and how they are made."""
        self.spec = stream_spec(config, self.args, manifest, dataset, self.world_size)
        self.plan = self.spec.plan
        # held open: as long as a worker lives, nobody sweeps it away
        self.cache = None if self.spec.cache is None else node_cache(self.spec.cache)

    def _build_model(self, config: dict[str, Any], manifest: Manifest) -> Lender:
        trusted = config["weights_trusted"]
        with (
            staged(config["model"], self.out) as model,
            initial_weights(config["init_from"], self.out, trusted=trusted) as weights,
            restricted(trusted=trusted),
        ):
            return Lender(
                self.train["yolo"],
                model=model,
                manifest=manifest,
                batch=self.train["batch"],
                seed=config["seed"],
                device=self.device,
                weights=weights,
                class_counts=counted_classes(self.spec, manifest, self.args),
            )

    def _limit_threads(self) -> None:
        """To be called after the model is built: building Ultralytics' trainer sets the number of threads too."""
        cores = len(os.sched_getaffinity(0))
        share = max(1, cores // ray.train.get_context().get_local_world_size())
        torch.set_num_threads(self.train["threads_per_worker"] or share)

    def _build_loop(self, lender: Lender) -> None:
        epochs, self.args = self.args.epochs, lender.args
        self.loop = Loop(lender, num_images=self.plan.num_images, steps_per_epoch=self.plan.steps_per_epoch,
                         world_size=self.world_size, precision=self.precision, spread=self.train["parallel"], sync_bn=self.train["sync_bn"],
                         begun_epochs=self.identity["begun_epochs"])  # fmt: skip
        # of `time`: now, for the optimizer and the warm-up follow from those that were asked for
        self.args.epochs = epochs
        self.finite = FiniteWatch(patience=MAX_SKIPPED if self.is_fp16 else 1)

    def _begin_from(self, state: dict[str, Any] | None) -> None:
        """Puts a checkpoint's state into the loop, when there is one."""
        self.pulse.stage = "resume"
        settle_buckets(self.loop)
        if state is not None:
            checkpoint.restore(self.loop, state)
        self.loop.lr_scale = self._standing().lr_scale
        self.synchronisation = parallel.SynchronisationCheck(self.loop)

    @property
    def is_fp16(self) -> bool:
        """Whether a GradScaler skips updates whose gradients overflow."""
        return self.precision == torch.float16

    def _find_state(self) -> dict[str, Any] | None:
        """The newest checkpoint's content, which rank 0 chooses, and where the run goes on from there."""
        self.pulse.stage = "resume"
        found = checkpoint.newest(self.out, self.out.patience_s, self.identity) if self.rank == 0 else None
        state: dict[str, Any] | None = None
        name = self.agreement.from_rank_zero(found[0] if found else None)
        if name is not None:
            state = found[1] if found else checkpoint.load(self.out, name, self.out.patience_s)
        self.broken = self.agreement.from_rank_zero(self._read_broken() if self.rank == 0 else None)
        self.cursor, self.history = (state[k] for k in ("cursor", "history")) if state else (0, [])
        self.pulse.cursor, self.pulse.num_epochs = self.cursor, len(self.history)
        self.best_classes: dict[str, Any] | None = state.get("best_classes") if state else None
        kept = state["epoch"] if state else None
        self.epoch = Epoch(self.plan.num_images, kept, skips_overflow=self.is_fp16)
        self._keep_time(self.history)
        self.is_finished = state is not None and identity.is_finished(state, self.identity, self.args.epochs)
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
        self.epoch.lap("other")
        self.pulse.stage = "wait for data"
        for batch, tensors in self._batches():
            compiles = ", the model is compiled" if self.args.compile and self.cursor == first_cursor else ""
            self.epoch.lap("wait")
            self.pulse.stage = f"step {batch.step + 1} of epoch {batch.epoch + 1}{compiles}"
            step = batch.epoch * self.plan.steps_per_epoch + batch.step
            parts = self._step(batch, tensors, step)
            say.progress(self, batch)
            learnt = self.agreement.step(self._wishes(parts, step))  # what was wished a step ago
            self.asked |= (
                learnt - {"save"} if self.saved_cursor == self.cursor - self.plan.global_batch else learnt
            )
            if "nan" in self.asked:
                self._go_back()
            self.epoch.lap("step")
            if batch.step == self.plan.steps_per_epoch - 1:
                if self._end_epoch(batch.epoch, step):
                    break
                self.loop.start_epoch()
            elif self.asked and self.loop.last_optimizer_step == step:
                self._save(self.epoch.reduced(self.agreement), is_finished=False, has_gradients=False)
            if self._must_leave():
                return True
            self.epoch.lap("other")
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
        if self.rank == 0 and self.args.plots and pictures.wants(batch, self.plan, self.spec.mosaic_epochs):
            shown = batch if batch.images.size else replace(batch, images=tensors["img"].cpu().numpy())
            sheet = pictures.training_batch(shown, self.class_names)
            self.watch.aside.submit(f"batch_{step}.png", partial(self.out.write, f"batch_{step}.png", sheet))
        # for models that draw (dropout): a resume draws alike
        torch.manual_seed(hash((self.args.seed, step, self.rank)))
        with memory.advice(self.loop, tensors, world_size=self.world_size, who=str(self.pulse)):
            parts = self.loop.step(tensors, step)
        norm = self.loop.gradient_norm if self.loop.last_optimizer_step == step else None
        self.epoch.stepped(parts, batch, norm)
        self.cursor += self.plan.global_batch
        self.pulse.cursor = self.cursor
        return parts

    def _wishes(self, parts: dict[str, Tensor], step: int) -> set[str]:
        """What this rank would have all ranks do: ``save``, ``stop``, ``preempted``, ``grow``, ``nan``."""
        wishes = set(self.pulse.wishes())
        if not self.is_fp16:
            self.finite.push(parts)
        elif self.loop.gradient_norm is not None and self.loop.last_optimizer_step == step:
            self.finite.push({"gradient norm": self.loop.gradient_norm})
        if self.finite.is_broken:
            wishes.add("nan")
        if self.saver is not None:
            self.saver.check()
            if self._is_save_due() and not self.saver.is_busy:
                wishes.add("save")
        return wishes

    def _is_save_due(self) -> bool:
        """By this rank's clock; rank 0's counts."""
        return time.monotonic() - self.saved_at > float(self.train["checkpoint_every_s"])

    def _end_epoch(self, number: int, step: int) -> bool:
        """Validates, reports, and saves if it is time to. Returns whether training ends here; the same on every rank."""
        loop, is_last = self.loop, number + 1 >= self.args.epochs
        has_gradients = loop.last_optimizer_step != step
        if has_gradients:
            checkpoint.fold_gradients(loop)
        self.synchronisation.compare_weights()
        self.synchronisation.renew()
        reduced = self.epoch.reduced(self.agreement)
        sums = summary(reduced)
        if not all(math.isfinite(value) for name, value in sums.items() if name.startswith("train/")):
            self._go_back()
        loop.end_epoch()
        if not loop.is_average_finite():
            self._go_back()
        self.epoch.lap("step")
        self.pulse.stage = f"validation after epoch {number + 1}"
        images_per_s = self.plan.positions_per_epoch / self.epoch.seconds
        metrics: dict[str, Any] = {}
        if is_validated(self.args, is_last=is_last, may_stop=loop.stopper.possible_stop):
            metrics = self.validator(loop.ema.ema, loop.lender.model, loop.device)
            fitness = metrics["fitness"]
            is_best = loop.best_fitness is None or fitness > loop.best_fitness
            loop.best_fitness = max(fitness, loop.best_fitness or 0.0)
            stop = bool(loop.stopper(number + 1, fitness)) or is_last
        else:
            is_best, stop = False, is_last
        self.epoch.lap("validate")
        self.pulse.stage = "report"
        line = {
            "epoch": number + 1, **{k: v for k, v in sums.items() if k.startswith("train/")},
            **{k: v for k, v in metrics.items() if k != "per_class"}, **loop.learning_rates(), **self.watch.line(),
            "images_per_s": images_per_s, **sums, **({"updates_skipped": reduced["num_skipped"]} if self.is_fp16 else {}),
            "world_size": self.world_size, "images_seen": self.cursor,
            "compute_dtype": str(self.precision).removeprefix("torch."), **self.epoch.seconds_by_stage(),
        }  # fmt: skip
        self._keep_time([*self.history, line])
        stop = stop or number + 1 >= self.args.epochs
        if is_best:
            self.best_classes = {"epoch": number + 1, "classes": list(metrics["per_class"])}
        self._close_epoch(line, is_best, is_finished=stop, has_gradients=has_gradients)
        say.epoch(self, line, is_best)
        return stop

    def _close_epoch(
        self, line: dict[str, Any], is_best: bool, *, is_finished: bool, has_gradients: bool
    ) -> None:
        """Adds the epoch to the history and the tables, and begins the next one. With a checkpoint if it is time for one, or the last.

        Its weights are only kept: they are written with the next checkpoint, so that what lies in the folder belongs together.
        """
        if self.rank == 0:
            self._keep_weights(line, is_best)
        is_due = is_finished or bool(self.asked) or self.agreement.any(self.rank == 0 and self._is_save_due())
        self.epoch.lap("other")
        state = self._captured(has_gradients=has_gradients) if is_due else None
        self.epoch.lap("checkpoint")
        line |= self.epoch.seconds_by_stage()
        self.history = [*self.history, line]  # a new list: the old one may be being written
        self.epoch = self.epoch.following()
        if self.saver is not None:
            tables = partial(pictures.tables, self.out, self.history)
            self.saver.submit(f"write {self.out.shown('metrics.jsonl')}", tables)
        if state is not None:
            self._submit(state, epoch=None, is_finished=is_finished)
            self.epoch.lap("checkpoint")
            self.pulse.stage = "report"
            ray.train.report({k: v for k, v in line.items() if isinstance(v, int | float)})
        self.loop.lr_scale = self._standing().lr_scale
        self.watch.epoch(line, self.history, self.best_classes if is_best else None)

    def _keep_weights(self, line: dict[str, Any], is_best: bool) -> None:
        """A copy of the averaged weights, to be written as ``last.pt``, and ``best.pt`` if they are."""
        content = functools.cache(partial(
            weights_file, deepcopy(self.loop.ema.ema).half().cpu(), copy(self.args), epoch=line["epoch"] - 1,
            metrics={k: line[k] for k in line if "map" in k}))  # fmt: skip
        self.unwritten |= dict.fromkeys(("last.pt", "best.pt")[: 1 + is_best], content)

    def _rewind_tables(self) -> None:
        """Takes out of the tables what an earlier start wrote after the checkpoint: those epochs are trained again."""
        if self.saver is None:
            return
        out, history, best_classes = self.out, self.history, self.best_classes

        def rewind() -> None:
            if out.exists("metrics.jsonl"):
                pictures.tables(out, history)
            if best_classes is not None:
                out.write_json(report.PER_CLASS, best_classes)

        self.saver.submit(f"write {out.shown('metrics.jsonl')}", rewind)

    def _save(self, epoch: dict[str, Any], *, is_finished: bool, has_gradients: bool) -> None:
        """A checkpoint within an epoch. All ranks must call.

        Args:
            epoch: sums of the epoch so far.
            is_finished: whether nothing is left to train.
            has_gradients: whether gradients wait for more steps.
        """
        self._submit(self._captured(has_gradients=has_gradients), epoch=epoch, is_finished=is_finished)
        self.epoch.lap("checkpoint")

    def _captured(self, *, has_gradients: bool) -> dict[str, Any]:
        """A copy of the loop's state, which holds numbers only: else training goes back. All ranks must call."""
        self.pulse.stage = "checkpoint"
        state = checkpoint.capture(self.loop, has_gradients=has_gradients)
        if self.agreement.any(self.rank == 0 and not checkpoint.is_finite(state)):
            self._go_back()
        return state

    def _submit(self, state: dict[str, Any], *, epoch: dict[str, Any] | None, is_finished: bool) -> None:
        """Has rank 0 write a captured state in the background; weights that wait are written before it, so that whoever resumes finds them."""
        if self.saver is not None:
            for name, content in self.unwritten.items():
                self.saver.submit(f"write {self.out.shown(name)}", partial(_write, self.out, name, content))
            self.unwritten = {}
            state |= {
                "cursor": self.cursor,
                "history": self.history,
                "is_finished": is_finished,
                "epoch": epoch,
                "best_classes": self.best_classes,
                "identity": {name: self.identity[name] for name in ("run", "fingerprint", "length")},
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

    def _standing(self) -> rollback.Standing:
        """What is left of the rollbacks so far."""
        return rollback.standing([each["epoch"] for each in self.broken], len(self.history))

    def _go_back(self) -> NoReturn:
        """Ends this attempt: the loss or the weights are no numbers any more. All ranks must call.

        Raises:
            NotFiniteError: training is to go on from the newest checkpoint, at half the learning rate.
            DivergedError: that was done too often in a row.
        """
        limit, epoch = self.train["max_nan_restarts"], (self.cursor - 1) // self.plan.positions_per_epoch + 1
        self.broken.append({"epoch": epoch, "images_seen": self.cursor})
        now = self._standing()
        if self.saver is not None:
            self.saver.flush()
            written = f"write {self.out.shown(NAN_RESTARTS)}"
            patiently(lambda: self.out.write_json(NAN_RESTARTS, self.broken), written, self.out.patience_s)
        self.agreement.any(False)
        what = f"the loss is not finite in epoch {epoch}, after {self.cursor} images"
        if now.in_a_row > limit:
            raise failure.DivergedError(
                f"{what}; that makes {now.in_a_row} times without a good epoch in between, train.max_nan_restarts={limit}, each at half the "
                f"learning rate: lower train.yolo.lr0 (now {self.args.lr0:g}), raise train.yolo.warmup_epochs, or use train.precision=fp32, "
                "and add train.overwrite=true"
            )
        raise failure.NotFiniteError(
            f"{what}: restart {now.in_a_row} of {limit} in a row, at {now.lr_scale:g} of the learning rate"
        )

    def _read_broken(self) -> list[dict[str, Any]]:
        out, what = self.out, f"read {self.out.shown(NAN_RESTARTS)}"
        return patiently(
            lambda: out.read_json(NAN_RESTARTS) if out.exists(NAN_RESTARTS) else [], what, out.patience_s
        )


def _write(out: Folder, name: str, content: Callable[[], bytes]) -> None:
    out.write(name, content())
