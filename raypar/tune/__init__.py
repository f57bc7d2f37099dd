"""``raypar tune``: a dataset and a search space -> the settings that train best, by Ray Tune over :func:`raypar.train.run`.

Runs in: the driver. Trials are runs of their own in ``{storage}/{name}/tune/trial_000`` ..., over the one dataset. A study that was
killed goes on: trials that are over are kept, and those that were running resume from their checkpoints.
"""

from __future__ import annotations

import functools
import os
import signal
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raypar import outputs, train
from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.manifest import Manifest
from raypar.lease import Lease, refuse_if_held
from raypar.yolo_keys import yolo_settings

SUMMARY, SETTINGS = "summary.json", "settings.json"  # the summary is written last
NO_WORKERS_S = 20.0  # after an interrupt: how long trials may have no workers that hear of it
# Tune's own tables, files and Ctrl-C give way to raypar's (Ray 2.60.0)
QUIET_TUNE = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
# what the names of a task's metrics begin with
METRICS = {"detect": ("",), "obb": ("",), "segment": ("", "mask_"), "pose": ("", "pose_")}
OPTUNA = "tune.search=optuna: Optuna is not installed: pip install optuna, or write tune.search=random"


def check(config: RunConfig) -> str:
    """All checks that need no cluster: the run as it is, and with every setting of the search space at its edges.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    section = config.tune
    refuse_if_held(config.folder / "tune")
    train.check_settings(config)
    if not isinstance(config.train.num_workers, int):
        raise ValueError("train.num_workers: trials that grow would take each other's place: write a number")
    if not config.train.yolo.get("val", True):
        raise ValueError(
            "train.yolo.val=false: a trial that is not validated cannot be compared: leave it out"
        )
    if section.search == "optuna" and find_spec("optuna") is None:
        raise ValueError(OPTUNA)
    known = _metrics(Manifest.load(config.dataset_folder).task)
    if section.metric not in known:
        raise ValueError(
            f"tune.metric: {section.metric} is no metric of this task: there are {', '.join(known)}"
        )
    epochs = _epochs(config)
    if section.scheduler == "asha" and section.grace_epochs > epochs:
        raise ValueError(
            f"tune.grace_epochs={section.grace_epochs} is more than train.yolo.epochs={epochs}: ask for fewer, or tune.scheduler=none"
        )
    from raypar.tune import space

    space.check(config)
    return f"{section.num_trials} trials over {len(section.space)} setting(s), by {'optuna' if _has_optuna(config) else 'random'}"


def run(config: RunConfig) -> dict[str, Any]:
    """Trains all trials and returns the summary: the best one, its metric and settings.

    Raises:
        KeyboardInterrupt: interrupted; what is over is kept.
        ValueError: the study was begun with other settings, or another driver works on it.
        RuntimeError: no trial finished.
    """
    # once: a second interrupt would end everything at once
    interrupt = functools.cache(_interrupt_this_process)
    with Lease(config.folder / "tune", "tune", on_lost=interrupt) as lease:
        if config.tune.overwrite:
            lease.clear()
        try:
            return _run(config)
        except KeyboardInterrupt:
            lease.check()
            raise


def _run(config: RunConfig) -> dict[str, Any]:
    """Trains all trials, by a driver that holds the study's lease."""
    from raypar.tune import report, study

    section, out = config.tune, config.folder / "tune"
    settings = {**train.fingerprint(config), "metric": section.metric,
                "space": {key: {d.kind: d.arguments} for key, d in section.space.items()}}  # fmt: skip
    if out.exists(SETTINGS) and (others := train.changes(out.read_json(SETTINGS), settings)):
        raise ValueError(
            f"{out.uri} was begun with other settings ({others}): set them back, choose another name, or add tune.overwrite=true"
        )
    out.write_json(SETTINGS, settings)
    outputs.write_run_file(out, config)
    records = study.read(config)
    over = sum(map(study.is_over, records))
    if over >= section.num_trials and over == len(records):
        print(
            f"tune: {out.uri} is complete; raise tune.num_trials for more trials, tune.overwrite=true begins anew",
            flush=True,
        )
    else:
        if over:
            print(
                f"tune: {over} of {section.num_trials} trials are over already; {len(records) - over} go on",
                flush=True,
            )
        # once, and not by each trial
        verify.check_sums(config.dataset_folder, Manifest.load(config.dataset_folder), train.SPLITS)
        _search(config, records)
    best = study.best_of(records)
    if best is None:
        raise RuntimeError(
            f"no trial finished: {records[-1]['error']}; all of them: {out.uri}/{study.TRIALS}"
        )
    summary = report.write(config, records, best)
    out.write_json(SUMMARY, summary)
    return summary


def _interrupt_this_process() -> None:
    """As Ctrl-C does."""
    os.kill(os.getpid(), signal.SIGINT)


def _search(config: RunConfig, records: list[dict[str, Any]]) -> None:
    """Runs the trials that are due; ``records`` is brought up to date."""
    import ray
    import ray.tune

    from raypar.tune import study
    from raypar.tune.trial import Trial

    section, epochs = config.tune, _epochs(config)
    num_concurrent = section.max_concurrent or room(config)
    has_optuna = _has_optuna(config)
    if section.search == "auto" and not has_optuna:
        print(
            "tune: Optuna is not installed, so settings are drawn at random (pip install optuna)", flush=True
        )
    print(f"tune: {section.num_trials} trials of {epochs} epochs, {num_concurrent} at a time, by {'optuna' if has_optuna else 'random'}"
          + (f"; asha may stop one after {section.grace_epochs} epochs" if section.scheduler == "asha" else ""), flush=True)  # fmt: skip
    due = section.num_trials - sum(map(study.is_over, records))
    searcher = study.Study(
        config, epochs, study.make_optuna(config, records) if has_optuna else None, records, str(Path.cwd())
    )
    # trials see the files of this node; their workers go anywhere
    here = f"node:{ray.util.get_node_ip_address()}"
    os.environ |= QUIET_TUNE
    with tempfile.TemporaryDirectory(prefix="raypar-tune-") as folder, _Interrupt(searcher) as interrupt:
        ray.tune.Tuner(
            ray.tune.with_resources(Trial, ray.tune.PlacementGroupFactory([{here: 0.001}])),
            tune_config=ray.tune.TuneConfig(search_alg=searcher, scheduler=study.make_scheduler(config, epochs, records),
                                            num_samples=due, max_concurrent_trials=num_concurrent,
 trial_name_creator=_trial_name, trial_dirname_creator=_trial_name),
            run_config=ray.tune.RunConfig(name="tune", storage_path=folder, verbose=0, stop=interrupt.stopper,
                                          checkpoint_config=ray.tune.CheckpointConfig(checkpoint_at_end=False),
 failure_config=ray.tune.FailureConfig(max_failures=config.train.max_failures)),
        ).fit()  # fmt: skip
        if searcher.is_interrupted:
            raise KeyboardInterrupt


def room(config: RunConfig) -> int:
    """How many trials the cluster holds at a time, at least one; each wants its workers and a CPU for its data."""
    import ray

    total = ray.cluster_resources()
    cpus, gpus = train.needs(config, use_gpu=train.uses_gpu(config, total.get("GPU", 0)))
    fits = [total.get("CPU", 0) / cpus, *([total.get("GPU", 0) / gpus] if gpus else [])]
    return max(1, int(min(fits)))


class _Interrupt:
    """While it is open, the first Ctrl-C lets the trials save and leave, which ends the study; the second one ends it at once."""

    def __init__(self, searcher: Any):
        import ray.tune

        class Stopper(ray.tune.Stopper):  # type: ignore[misc]  # Ray is untyped here
            is_on = False

            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return self.is_on

        self.searcher, self.stopper = searcher, Stopper()
        self.is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupt:
        if self.is_main:
            self.before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_main:
            signal.signal(signal.SIGINT, self.before)

    def _on_interrupt(self, signum: int, frame: Any) -> None:
        if self.searcher.is_interrupted:
            raise KeyboardInterrupt
        self.searcher.is_interrupted = True
        print(
            "tune: interrupted: the trials save their checkpoints, then all ends; interrupt again to end at once",
            flush=True,
        )
        threading.Thread(target=self._ask_to_stop, daemon=True).start()

    def _ask_to_stop(self) -> None:
        """Until every trial has left; one whose workers are not there yet has nothing to save, and is not waited for long."""
        from raypar.train import launch

        deadline = time.monotonic() + NO_WORKERS_S
        while running := list(self.searcher.running):
            heard = [run_id for run_id in running if launch.ask_to_stop(run_id)]
            if not heard and time.monotonic() > deadline:
                break
            time.sleep(1)
        self.stopper.is_on = True


def _trial_name(trial: Any) -> str:
    return str(trial.config["run"]["name"])


def _has_optuna(config: RunConfig) -> bool:
    return config.tune.search != "random" and find_spec("optuna") is not None


def _epochs(config: RunConfig) -> int:
    return int(config.train.yolo.get("epochs", yolo_settings()["epochs"]))


def _metrics(task: str) -> list[str]:
    """Metrics that can be compared, by task."""
    if task == "classify":
        return ["fitness", "top1", "top5"]
    return [
        "fitness",
        *(
            f"{prefix}{name}"
            for prefix in METRICS[task]
            for name in ("map50_95", "map50", "precision", "recall")
        ),
    ]
