"""A trial: one training of its own, which tells Ray Tune of its epochs. Runs in: an actor on the driver's node, without a CPU of its own.

The training is ``train.run``, in a thread; its workers find their places by Ray Train. What Tune is told is read from the trial's
``metrics.jsonl``, so that a trial that goes on tells all its epochs again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

import ray.tune

from raypar import train
from raypar.config import RunConfig
from raypar.quiet import quiet_ray

LOOK_EVERY_S, LOOK_REMOTELY_EVERY_S = 0.5, 3.0
STOP_WITHIN_S = 60.0


def best_so_far(lines: list[dict[str, Any]], metric: str) -> tuple[int, float] | None:
    """Epoch and metric of the weights that ``best.pt`` holds after these lines of ``metrics.jsonl``; nothing when none was validated."""
    validated = [line for line in lines if "fitness" in line]
    best = max(validated, key=lambda line: line["fitness"], default=None)
    return None if best is None else (best["epoch"], float(best[metric]))


class Trial(ray.tune.Trainable):  # type: ignore[misc]  # Ray is untyped here
    """Ray Tune's trainable. Its config: ``run`` (a RunConfig as a dict), ``run_id`` (to ask it to stop), ``epochs``, ``metric``, ``folder``
    (the driver's)."""

    def setup(self, config: dict[str, Any]) -> None:
        quiet_ray()
        # Tune has gone to one of its own; paths in the run are relative to the driver's
        os.chdir(config["folder"])
        self.run_config = RunConfig.model_validate(config["run"])
        self.run_id, self.epochs, self.metric = config["run_id"], config["epochs"], config["metric"]
        self.out = self.run_config.folder / "train"
        self.outcome: dict[str, Any] = {}
        self.told: list[dict[str, Any]] = []
        self.training = threading.Thread(target=self._train, name="raypar-trial", daemon=True)
        self.training.start()

    def _train(self) -> None:
        try:
            train.run(self.run_config, run_id=self.run_id, label=self.run_config.name)
            self.outcome = {"state": "finished"}
        except KeyboardInterrupt:  # asked to stop by cleanup()
            self.outcome = {"state": "stopped"}
        except BaseException as error:
            self.outcome = {
                "state": "failed",
                "error": " ".join(str(error).split())[:500] or type(error).__name__,
            }

    def step(self) -> dict[str, Any]:
        """Waits for an epoch, or for the end; an epoch that is the last one is told with the end."""
        while True:
            is_over = not self.training.is_alive()
            fresh = self._lines()[len(self.told) :]
            if fresh and (len(fresh) > 1 or not is_over) and fresh[0]["epoch"] < self.epochs:
                self.told.append(fresh[0])
                return self._result()
            if is_over:
                self.told += fresh
                return {**self._result(), **self.outcome, "done": True}
            time.sleep(LOOK_EVERY_S if self.out.is_local else LOOK_REMOTELY_EVERY_S)

    def _lines(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in self.out.read("metrics.jsonl").splitlines()]
        except OSError:  # not there yet, or the store is away for a while
            return self.told

    def _result(self) -> dict[str, Any]:
        best = best_so_far(self.told, self.metric) or (0, float("nan"))
        return {"epoch": self.told[-1]["epoch"] if self.told else 0, "score": best[1], "best_epoch": best[0]}

    def cleanup(self) -> None:
        """Ends what is left of the training: its workers save and leave. What does not, dies with this process, which owns it."""
        from raypar.train import launch

        deadline = time.monotonic() + STOP_WITHIN_S
        while self.training.is_alive() and time.monotonic() < deadline and launch.ask_to_stop(self.run_id):
            self.training.join(1.0)
