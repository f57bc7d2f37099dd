"""What can be watched while a training runs: figures for Prometheus, loggers, the report, and a bar on the driver's terminal.

Runs in: every training worker (figures: its pulse's thread sends them, once a second, and no step waits for it), rank 0 (all else, in a
thread of its own), the driver (the bar).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from raypar.progress import Progress
from raypar.train import chronicle, pulse, report
from raypar.train.loggers import Aside, Loggers

if TYPE_CHECKING:
    from raypar.train.pulse import Pulse
    from raypar.train.worker import Worker

REPORT_EVERY_S = 60.0
# with loggers, at the end; a spot node is taken away within half a minute
FINISHED_PATIENCE_S, LEAVING_PATIENCE_S = 60.0, 10.0
TAGS = ("run", "rank")
PREFIX = "raypar_train_"
GAUGES = {
    "images_per_second": "images a second of all ranks together, over the last seconds",
    "images_seen": "images that all ranks together have trained on",
    "images_total": "images of the whole run",
    "world_size": "training workers",
    "epoch": "epochs that ended",
    "map50": "mAP at IoU 0.5 of the last validation",
    "map50_95": "mAP at IoU 0.5 to 0.95 of the last validation",
    "loss": "sum of the loss' parts, mean of the last epoch",
    "all_reduce_seconds": "of one backward pass: time that gradients travel, as DDP samples it",
    "memory_gigabytes": "the most that the process has held",
}
COUNTERS = {"stage_seconds": "time of a rank, by what it did (tag stage)"}
RATE_OVER_S = 10.0


class Figures:
    """One rank's figures in Ray's metrics, which Prometheus reads as ``ray_raypar_train_...``.

    Args:
        run: name of the run.
        rank: of this worker.
        model: what may be a ``DistributedDataParallel``.
    """

    def __init__(self, run: str, rank: int, model: Any = None):
        from ray.util.metrics import Counter, Gauge

        self.rank, self.model = rank, model
        tags = {"run": run, "rank": str(rank)}
        self.gauges = {name: Gauge(PREFIX + name, text, TAGS) for name, text in GAUGES.items()}
        self.counters = {
            name: Counter(PREFIX + name, text, (*TAGS, "stage")) for name, text in COUNTERS.items()
        }
        for metric in (*self.gauges.values(), *self.counters.values()):
            metric.set_default_tags(tags)
        self._told: dict[str, float] = {}
        self._marks: list[tuple[float, int]] = []  # (time, images seen) of the last seconds

    def on_beat(self, life: Pulse) -> None:
        """Sends what has changed; called by the pulse's thread, once a second."""
        for stage, seconds in life.seconds().items():
            if (more := seconds - self._told.get(stage, 0.0)) > 0:
                self.counters["stage_seconds"].inc(more, {"stage": stage})
                self._told[stage] = seconds
        if (took := all_reduce_s(self.model)) is not None:
            self.gauges["all_reduce_seconds"].set(took)
        self.gauges["memory_gigabytes"].set(life.memory_gb())
        if self.rank != 0:  # the others would say the same
            return
        self._marks = [mark for mark in self._marks if mark[0] > time.monotonic() - RATE_OVER_S] + [
            (time.monotonic(), life.cursor)
        ]
        (since, seen), (now, cursor) = self._marks[0], self._marks[-1]
        if now > since:
            self.gauges["images_per_second"].set(max(0, cursor - seen) / (now - since))
        self.gauges["images_seen"].set(life.cursor)
        self.gauges["images_total"].set(life.total)
        self.gauges["world_size"].set(life.world_size)

    def on_epoch(self, line: dict[str, Any]) -> None:
        """An epoch's line of ``metrics.jsonl``."""
        if self.rank != 0:
            return
        self.gauges["epoch"].set(line["epoch"])
        self.gauges["loss"].set(sum(v for k, v in line.items() if k.startswith("train/")))
        for name in ("map50", "map50_95"):
            if name in line:
                self.gauges[name].set(line[name])


def all_reduce_s(model: Any) -> float | None:
    """Seconds that the gradients of a backward pass travel, as DDP measures them itself in some of its steps; nothing when it has not."""
    if not hasattr(model, "_get_ddp_logging_data"):
        return None
    # ns; sampled in the first ten steps and each hundredth
    took = model._get_ddp_logging_data().get("avg_backward_comm_time", 0)
    return float(took) / 1e9 if took else None


class Watch:
    """All that watches one rank, from the start of its steps on.

    Args:
        worker: that is about to step.
        run_id: of this start of the run.
    """

    def __init__(self, worker: Worker, run_id: str):
        self.worker, self.run_id, self.out = worker, run_id, worker.out
        self.name = worker.out.path.rstrip("/").split("/")[-2]
        self.figures = Figures(self.name, worker.rank, worker.loop.model)
        worker.pulse.total = worker.total
        worker.pulse.on_beat = self.figures.on_beat
        if worker.rank != 0:
            return
        self.aside, self.drawn_at, self.is_ended = Aside(), time.monotonic(), False
        self.loggers = Loggers(
            worker.out, self.name, {**worker.train, "seed": worker.args.seed}, num_logged=len(worker.history)
        )
        begun = (
            "started" if worker.cursor == 0 else f"went on after {worker.cursor:,} of {worker.total:,} images"
        )
        self.aside.submit("events.jsonl", lambda: chronicle.happened(
            self.out, run_id, f"{begun}: {worker.world_size} worker(s), {worker.loop.device.type}, {_precision(worker)}"))  # fmt: skip
        self.aside.submit("environment.json", self._write_environment)
        self.aside.submit(chronicle.USED, partial(self.out.write_json, chronicle.USED, used(worker)))

    def line(self) -> dict[str, float]:
        """For an epoch's line: how long the gradients travel, when DDP has measured it."""
        took = all_reduce_s(self.worker.loop.model)
        return {} if took is None else {"all_reduce_ms": 1e3 * took}

    def epoch(
        self,
        line: dict[str, Any],
        history: Sequence[dict[str, Any]],
        best_classes: dict[str, Any] | None,
    ) -> None:
        """An epoch has ended.

        Args:
            line: of ``metrics.jsonl``.
            history: all lines so far.
            best_classes: ``epoch`` and ``classes`` (metrics of each), when this is the best epoch.
        """
        self.figures.on_epoch(line)
        if self.worker.rank != 0:
            return
        if best_classes is not None:
            self.aside.submit("per_class.json", partial(self.out.write_json, report.PER_CLASS, best_classes))
        for name, log in self.loggers.named.items():
            self.aside.submit(name, partial(log, history))
        if time.monotonic() - self.drawn_at > REPORT_EVERY_S:
            self.drawn_at = time.monotonic()
            self.aside.submit(report.REPORT, partial(report.write, self.out, self.name))

    def end(self, how: str) -> None:
        """Closes the loggers; waits for what is still being sent, a minute at most. A second call does nothing.

        Args:
            how: ``finished``, ``stopped`` (on demand, or to be placed anew) or ``failed``; with these there is less time to wait.
        """
        if self.worker.rank == 0 and not self.is_ended:
            self.is_ended = True
            self.loggers.submit_end(self.aside, how)
            self.aside.end(patience_s=FINISHED_PATIENCE_S if how == "finished" else LEAVING_PATIENCE_S)

    def _write_environment(self) -> None:
        worker = self.worker
        hosts = [
            f"rank {beat.rank}: {beat.host}, local rank {beat.local_rank}"
            for beat in pulse.beats(self.run_id)
        ]
        device = (
            torch.cuda.get_device_name(worker.loop.device)
            if worker.loop.device.type == "cuda"
            else worker.loop.device.type
        )
        self.out.write_json(
            chronicle.ENVIRONMENT,
            chronicle.environment(device, _precision(worker), torch.get_num_threads(), hosts),
        )


def used(worker: Worker) -> dict[str, Any]:
    """The settings that this worker trains with, laid out as in a run file: those of Ultralytics as its trainer holds them."""
    plain = {
        k: v for k, v in vars(worker.args).items() if isinstance(v, bool | int | float | str | list | None)
    }
    return {
        "seed": worker.args.seed,
        "train": {**worker.train, "batch": worker.plan.global_batch, "yolo": plain},
    }


def _precision(worker: Worker) -> str:
    return str(worker.precision).removeprefix("torch.")


class Bar:
    """While it is open: a bar on the driver's terminal, from rank 0's signs of life. Without a terminal there is none: rank 0 prints lines.

    Args:
        run_id: of this start of the run.
    """

    def __init__(self, run_id: str):
        self.run_id = run_id
        self.progress: Progress | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raypar-bar", daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)
        if self.progress is not None:
            self.progress.close()

    def _run(self) -> None:
        while not self._ended.wait(1.0):
            try:
                text = pulse.read(self.run_id, "beat:0")
                if text is not None:
                    self.show(pulse.Beat(**json.loads(text)))
            except Exception:  # the cluster's store is away for a while: a bar is not worth more words
                continue

    def show(self, beat: pulse.Beat) -> None:
        """Draws what a sign of life says."""
        if beat.total <= 0:
            return
        if self.progress is None or beat.cursor < self.progress.done:  # begun, or gone back to a checkpoint
            self.progress = Progress(beat.total, "images", "train", done=beat.cursor)
        self.progress.update(beat.cursor - self.progress.done)
