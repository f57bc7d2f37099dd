"""Each epoch's line for TensorBoard, MLflow and Weights & Biases. ``metrics.jsonl`` stays the source: a logger that fails stops nothing.

Runs in: rank 0 of the training workers, in a thread of its own. TensorBoard's files are always written (``train/tensorboard/``); MLflow
is told when ``mlflow`` is installed and ``MLFLOW_TRACKING_URI`` is set, Weights & Biases when ``wandb`` is installed and
``WANDB_API_KEY`` or ``WANDB_MODE`` is set (see ``docs/decisions/0011-watching.md``).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raypar.storage import Folder, patiently

PATIENCE_S = 60.0  # with a store or server that fails
IDS = "loggers.json"  # which run of MLflow and of Weights & Biases this one is
# metrics.jsonl's names, grouped as TensorBoard folds them; what has a slash keeps its name.
GROUPS = {
    "metrics": ("map50_95", "map50", "precision", "recall", "fitness", "top1", "top5"),
    "seconds": ("epoch_s", "wait_s", "step_s", "validate_s", "checkpoint_s", "other_s"),
    "run": (
        "images_per_s",
        "world_size",
        "images_seen",
        "images_missed",
        "images_repeated",
        "images_replaced",
        "updates_skipped",
        "all_reduce_ms",
    ),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
Line = Mapping[str, Any]


class Aside:
    """A thread that does things which training need not wait for, in order, each under a name.

    A store or server that fails (``OSError``) is tried again for a while. What goes on failing is told in one warning; from then on nothing
    more is done under that name.
    """

    def __init__(self) -> None:
        self.failed: set[str] = set()
        self._work: queue.Queue[tuple[str, Callable[[], object]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="raypar-aside", daemon=True)
        self._thread.start()

    def submit(self, name: str, do: Callable[[], object]) -> None:
        """Hands over a piece of work; never waits and never raises."""
        self._work.put((name, do))

    def end(self, patience_s: float = 60.0) -> None:
        """Waits until all is done, or as long as is allowed."""
        self._work.put(None)
        self._thread.join(patience_s)
        if self._thread.is_alive():
            print(
                f"train: not everything could be logged within {patience_s:.0f} s; metrics.jsonl has it all",
                flush=True,
            )

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            name, do = work
            if name in self.failed:
                continue
            try:
                patiently(do, f"bring {name} up to date", PATIENCE_S)
            except Exception as error:
                self.failed.add(name)
                reason = (str(error).strip().splitlines() or [""])[0][:300]
                print(
                    f"train: {name} is given up, metrics.jsonl has all metrics: {type(error).__name__}: {reason}",
                    flush=True,
                )


class Loggers:
    """All loggers of a run; each is given the whole history and adds what it has not got yet.

    Args:
        out: the run's ``train`` folder.
        name: of the run, for people.
        settings: of the run, logged once.
        num_logged: epochs of the history that this start of the run resumed with.
    """

    def __init__(self, out: Folder, name: str, settings: Mapping[str, Any], num_logged: int = 0):
        self.named: dict[str, TensorBoard | MLflow | Wandb] = {"tensorboard": TensorBoard(out, num_logged)}
        if os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("mlflow"):
            self.named["mlflow"] = MLflow(out, name, settings)
        if (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")) and importlib.util.find_spec(
            "wandb"
        ):
            self.named["wandb"] = Wandb(out, name, settings)

    def submit_end(self, aside: Aside, how: str) -> None:
        """Has ended what must be ended.

        Args:
            how: ``finished``, ``stopped`` or ``failed``; whoever goes on with the run opens it again.
        """
        for name, logger in self.named.items():
            aside.submit(name, partial(logger.end, how))


def values(line: Line) -> dict[str, float]:
    """What is logged of a line: its numbers, by grouped names."""
    return {
        (f"{GROUP_OF[key]}/{key}" if key in GROUP_OF else key): float(value)
        for key, value in line.items()
        if isinstance(value, int | float) and ("/" in key or key in GROUP_OF)
    }


class TensorBoard:
    """``train/tensorboard/``: one whole events file an epoch, named by it, so that a resumed run has no epoch twice.

    TensorBoard reads a folder's files in the order of their names, and a store of objects has no appending.

    Args:
        out: the run's ``train`` folder.
        num_logged: epochs that an earlier start has logged, if it had the time to.
    """

    def __init__(self, out: Folder, num_logged: int = 0):
        self.folder, self.num_logged = out / "tensorboard", num_logged
        self.written: set[str] | None = None

    def __call__(self, history: Sequence[Line]) -> None:
        """Writes the files that are missing."""
        if self.written is None:  # of epochs that are trained anew, the old files are replaced
            kept = {self._name(line) for line in history[: self.num_logged]}
            self.written = kept & set(self.folder.sizes()) if kept else set()
        for line in history:
            if (name := self._name(line)) not in self.written:
                self.folder.write(name, events(line))
                self.written.add(name)

    def end(self, how: str) -> None:
        """Nothing is open."""

    def _name(self, line: Line) -> str:
        return f"events.out.tfevents.{line['epoch']:010d}.raypar"


def events(line: Line) -> bytes:
    """A line as a whole TensorBoard events file."""
    from tensorboardX import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = SummaryWriter(folder)
        for name, value in values(line).items():
            writer.add_scalar(name, value, line["epoch"], time.time())
        writer.close()
        (file,) = Path(folder).glob("events.*")
        return file.read_bytes()


def run_id_of(out: Folder, package: str, make: Callable[[], str]) -> str:
    """The id of this run in another system: that of ``loggers.json``, or a new one, which is kept there."""
    ids: dict[str, str] = out.read_json(IDS) if out.exists(IDS) else {}
    if package not in ids:
        ids[package] = make()
        out.write_json(IDS, ids)
    return ids[package]


class MLflow:
    """One MLflow run, gone on with after a resume; epochs that the server has are not sent again."""

    def __init__(self, out: Folder, name: str, settings: Mapping[str, Any]):
        self.out, self.name, self.settings = out, name, settings
        self.client: Any = None
        self.run_id, self.last = "", 0

    def _begin(self) -> None:
        mlflow = importlib.import_module("mlflow")
        self.client = mlflow.MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "raypar")
        found = self.client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else self.client.create_experiment(experiment)

        def create() -> str:
            run_id: str = self.client.create_run(experiment_id, run_name=self.name).info.run_id
            for key, value in flat(self.settings).items():
                self.client.log_param(run_id, key, str(value)[:500])
            return run_id

        self.run_id = run_id_of(self.out, "mlflow", create)
        self.client.update_run(self.run_id, status="RUNNING")
        self.last = max(
            (int(m.step) for m in self.client.get_metric_history(self.run_id, "epoch")), default=0
        )

    def __call__(self, history: Sequence[Line]) -> None:
        if self.client is None:
            self._begin()
        metric = importlib.import_module("mlflow.entities").Metric
        for line in history:
            if line["epoch"] > self.last:
                now, epoch = int(time.time() * 1000), line["epoch"]
                logged = {**values(line), "epoch": float(epoch)}
                self.client.log_batch(
                    self.run_id, [metric(name, value, now, epoch) for name, value in logged.items()]
                )
                self.last = epoch

    def end(self, how: str) -> None:
        if self.client is not None:
            self.client.set_terminated(self.run_id, MLFLOW_STATUS[how])


class Wandb:
    """One run of Weights & Biases, gone on with after a resume."""

    def __init__(self, out: Folder, name: str, settings: Mapping[str, Any]):
        self.out, self.name, self.settings = out, name, settings
        self.run: Any = None
        self.last = 0

    def __call__(self, history: Sequence[Line]) -> None:
        if self.run is None:
            wandb = importlib.import_module("wandb")
            run_id = run_id_of(self.out, "wandb", lambda: uuid.uuid4().hex[:12])
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "raypar"), name=self.name, id=run_id, resume="allow", dir=tempfile.gettempdir(),
                config=dict(self.settings), settings=wandb.Settings(silent=True, console="off"))  # fmt: skip
            ids = self.out.read_json(IDS)
            self.last = max(int(ids.get("wandb_epoch", 0)), int(self.run.step) - 1 if self.run.step else 0)
        for line in history:
            if line["epoch"] > self.last:
                self.run.log({**values(line), "epoch": line["epoch"]}, step=line["epoch"])
                self.last = line["epoch"]
        # offline, the server cannot be asked
        self.out.write_json(IDS, {**self.out.read_json(IDS), "wandb_epoch": self.last})

    def end(self, how: str) -> None:
        if self.run is not None:
            self.run.finish(exit_code=int(how == "failed"))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
