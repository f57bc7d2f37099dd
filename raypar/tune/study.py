"""All trials of a study: who is next, what came of each, and how a study that was killed goes on. Runs in: the driver.

``tune/trials.jsonl`` is the only record. A study that goes on gives what is in it to Optuna and to the scheduler anew, begins with the
trials that are not over, each from its own checkpoint, and then draws new ones.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher

from raypar import runfile
from raypar.config import RunConfig
from raypar.storage import patiently
from raypar.train import chronicle
from raypar.tune import space

TRIALS = "trials.jsonl"
Record = dict[str, Any]


def read(config: RunConfig) -> list[Record]:
    """The trials of a study so far, in their order."""
    out = config.folder / "tune"
    return [json.loads(line) for line in out.read(TRIALS).splitlines()] if out.exists(TRIALS) else []


def is_over(record: Record) -> bool:
    return bool(record["state"] != "running")


def best_of(records: list[Record]) -> Record | None:
    """The best trial: of those that finished, else of those that were stopped early."""
    for state in ("finished", "stopped"):
        if found := [r for r in records if r["state"] == state and r["score"] is not None]:
            return max(found, key=lambda record: record["score"])
    return None


def make_scheduler(config: RunConfig, epochs: int, records: list[Record]) -> Any:
    """Ray Tune's scheduler, which knows what earlier trials reached at each of its halts."""
    section = config.tune
    if section.scheduler == "none":
        return FIFOScheduler()
    asha = ASHAScheduler(time_attr="epoch", metric="score", mode="max", max_t=epochs,
                         grace_period=section.grace_epochs, reduction_factor=section.reduction_factor)  # fmt: skip
    for record in filter(is_over, records):
        known = SimpleNamespace(trial_id=record["trial"])
        asha.on_trial_add(None, known)
        for epoch, score in record["scores"]:
            asha.on_trial_result(None, known, {"epoch": epoch, "score": score})
    return asha


def make_optuna(config: RunConfig, records: list[Record]) -> Any:
    """Optuna's search, which knows what came of earlier trials. Its seed counts them, so that a study that goes on does not draw the same again."""
    import optuna
    import ray.tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    domains = {
        key: ray.tune.choice(d.arguments) if d.kind == "choice" else getattr(ray.tune, d.kind)(*d.arguments)
        for key, d in config.tune.space.items()
    }
    search = OptunaSearch(
        OptunaSearch.convert_search_space(domains),
        metric="score",
        mode="max",
        seed=config.seed + 1_000 * len(records),
    )
    for record in filter(is_over, records):
        _tell(search, record)
    return search


def _tell(search: Any, record: Record) -> None:
    has_failed = record["state"] == "failed" or record["score"] is None
    search.add_evaluated_point(record["params"], record["score"], error=has_failed)


class Study(Searcher):  # type: ignore[misc]  # Ray is untyped here
    """What Ray Tune asks for trials and tells of them.

    Args:
        config: of the study.
        epochs: of every trial.
        optuna: who chooses; nothing: chance.
        records: trials so far.
        folder: the driver's working folder.
    """

    def __init__(self, config: RunConfig, epochs: int, optuna: Any, records: list[Record], folder: str):
        super().__init__(metric="score", mode="max")
        self.run, self.epochs, self.optuna, self.records, self.folder = (
            config,
            epochs,
            optuna,
            records,
            folder,
        )
        self.waiting = [record for record in records if not is_over(record)]
        self.running: dict[str, Record] = {}  # by Tune's id
        self.asked: set[str] = set()  # of these Optuna waits for an answer
        self.is_interrupted = False

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if self.is_interrupted:
            return None
        record = self.waiting.pop(0) if self.waiting else self._new(trial_id)
        record["scores"] = []  # it will tell all its epochs again
        self.running[trial_id] = record
        run = space.trial_run(self.run, record["trial"], record["params"])
        patiently(
            lambda: run.folder.write("run.yaml", runfile.dump(run) + runfile.written_by()),
            "write a trial's run.yaml",
        )
        self.write()
        print(f"tune: {record['trial']} of {self.run.tune.num_trials}: {shown(record['params'])}", flush=True)
        return {"run": run.model_dump(mode="json"), "epochs": self.epochs, "metric": self.run.tune.metric, "folder": self.folder,
                "run_id": trial_id}  # fmt: skip

    def _new(self, trial_id: str) -> Record:
        number = len(self.records)
        if self.optuna is None:
            params = space.draw(self.run.tune.space, self.run.seed, number)
        else:
            params = self.optuna.suggest(trial_id)
            self.asked.add(trial_id)
        record: Record = {"trial": f"trial_{number:03d}", "state": "running", "params": params, "score": None, "best_epoch": None, "epochs": 0,
                  "began": time.time(), "seconds": None, "own_settings": None, "error": None, "scores": []}  # fmt: skip
        self.records.append(record)
        return record

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        record, score = self.running[trial_id], result["score"]
        if score == score and result["epoch"] > record["epochs"] * bool(record["scores"]):
            record |= {"score": score, "best_epoch": result["best_epoch"], "epochs": result["epoch"]}
            record["scores"].append([result["epoch"], score])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        record = self.running[trial_id]
        if result and "epoch" in result:
            self.on_trial_result(trial_id, result)
        del self.running[trial_id]
        if self.is_interrupted and (result or {}).get("state", "stopped") == "stopped":
            return  # it is to go on another time
        state = "failed" if error else (result or {}).get("state", "stopped")
        record |= {
            "state": state,
            "seconds": time.time() - record["began"],
            "error": (result or {}).get("error"),
        }
        if error:
            record["error"] = (
                f"its process was lost more often than train.max_failures={self.run.train.max_failures} allows"
            )
        self._prove(record)
        if self.optuna is not None:
            if trial_id in self.asked:
                has_failed = record["state"] == "failed" or record["score"] is None
                self.optuna.on_trial_complete(
                    trial_id, None if has_failed else {"score": record["score"]}, error=has_failed
                )
            else:
                _tell(self.optuna, record)
        self.write()
        self._say(record)

    def _prove(self, record: Record) -> None:
        """Compares what the trial's training says it used with what the trial was given."""
        used = self.run.folder / "tune" / record["trial"] / "train"
        try:
            if not used.exists(chronicle.USED):
                return
            others = space.used_others(record["params"], used.read_json(chronicle.USED))
        except OSError as error:
            others = f"unknown: {error}"
        record["own_settings"] = not others
        if others:
            record |= {"state": "failed", "error": f"it did not train with its own settings: {others}"}

    def _say(self, record: Record) -> None:
        metric, best = self.run.tune.metric, best_of(self.records)
        what = {"finished": "finished", "stopped": "stopped early", "failed": f"failed: {record['error']}"}[
            record["state"]
        ]
        scored = (
            f"; {metric} {record['score']:.4f} after {record['epochs']} epochs"
            if record["score"] is not None
            else ""
        )
        leader = f"; the best so far is {best['trial']} with {best['score']:.4f}" if best else ""
        print(f"tune: {record['trial']} {what}{scored}{leader}", flush=True)

    def write(self) -> None:
        """Writes the record whole."""
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        patiently(lambda: (self.run.folder / "tune").write(TRIALS, text), f"write {TRIALS}")

    def save(self, checkpoint_path: str) -> None:
        """Tune's own snapshots are not used; it wants a file."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError


def shown(params: dict[str, Any]) -> str:
    """Settings in few words."""
    return ", ".join(f"{key.rpartition('.')[2]} {value:.4g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
                     for key, value in params.items())  # fmt: skip
