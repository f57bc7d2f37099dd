"""Ray Train's trainer with raypar's own policies, and what Ctrl-C does. Runs in: the driver."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace
from typing import Any

import ray
import ray.train.torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal import constants
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from raypar.storage import Folder, patiently
from raypar.train import pulse
from raypar.train.controller import Controller
from raypar.train.elastic import Elastic
from raypar.train.failure import Policy, Unstarted, diagnosis, start_attempts

CLUSTER = "RAY_API_SERVER_ADDRESS"  # what Ray's state API asks first


class Trainer(ray.train.torch.TorchTrainer):  # type: ignore[misc]  # Ray is untyped here
    """A ``TorchTrainer`` that tells failures apart, scales by the batch, and saves before it is interrupted.

    Ray Train takes its two policies from factories that know only its own; so they are replaced on their way into the controller
    (Ray 2.60.0, ``DataParallelTrainer.fit``).

    Args:
        run_id: of this start of the run.
        world_sizes: numbers of workers that are allowed, ascending; one of them: not elastic.
        placement_timeout_s: how long to wait for room.
        arguments: of ``TorchTrainer``.
    """

    def __init__(self, *, run_id: str, world_sizes: list[int], placement_timeout_s: float, **arguments: Any):
        super().__init__(**arguments)
        self.run_id, self.world_sizes, self.placement_timeout_s = run_id, world_sizes, placement_timeout_s
        self.num_interrupts = 0

    def _create_default_callbacks(self) -> list[Any]:
        """Without those that start a process for nothing (Ray 2.60.0, ``DataParallelTrainer``).

        One deals datasets, and none are given to Ray Train. The other frees the workers' room when the controller is gone and the job goes on:
        a job that is this training ends then; one that tunes needs it.
        """
        is_the_job = ray.get_runtime_context().get_actor_id() is None
        needless = (DatasetsCallback, PlacementGroupCleanerCallback) if is_the_job else (DatasetsCallback,)
        return [
            Unstarted(),
            *(
                callback
                for callback in super()._create_default_callbacks()
                if not isinstance(callback, needless)
            ),
        ]

    def fit(self) -> Any:
        """Ray Train's own; a run that was asked to stop has stopped, too, when its workers were lost or placed anew at that moment."""
        try:
            return super().fit()
        except ray.train.TrainingFailedError:
            if pulse.read(self.run_id, pulse.ENDED) is None:
                raise
            pulse.clear(self.run_id, pulse.ENDED)
            return SimpleNamespace(return_value={"stopped": self._saved()})

    def _saved(self) -> int:
        """Images that the newest checkpoint has seen."""
        from raypar.train import checkpoint

        patience_s = self.train_loop_config["train"]["storage_timeout_s"]
        out = Folder(self.train_loop_config["folder"], patience_s) / "train"
        found = patiently(lambda: checkpoint.names(out), f"list the checkpoints in {out.shown()}", patience_s)
        return int(found[0].removeprefix(checkpoint.PREFIX)) if found else 0

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        attempts, seconds = start_attempts(
            self.placement_timeout_s, is_elastic=self.scaling_config.elasticity_enabled
        )
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)
        arguments["failure_policy"] = Policy(
            self.run_config.failure_config, self.run_id, self.placement_timeout_s, attempts
        )
        if self.scaling_config.elasticity_enabled:
            arguments["scaling_policy"] = Elastic(
                self.scaling_config, self.world_sizes, self.run_id, self.placement_timeout_s
            )
        # Train's cleaner of placement groups asks for the cluster's state, and without an address it searches this machine: where
        # another Ray runs, or has left its address behind, it dies with a traceback on the screen (Ray 2.60.0).
        os.environ[CLUSTER] = ray.get_runtime_context().gcs_address
        constants.ENV_VARS_TO_PROPAGATE.add(CLUSTER)
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if is_main else None
        try:
            return (
                _run_controller(self, arguments)
                if _started_here()
                else super()._initialize_and_run_controller(**arguments)
            )
        finally:
            os.environ.pop(CLUSTER, None)
            if is_main:
                signal.signal(signal.SIGINT, before)
            pulse.clear(self.run_id, "beat:")
            for word in pulse.WORDS:
                pulse.clear(self.run_id, word)

    def _register_sigint_handler(self, controller: Any) -> None:
        """The first interrupt asks the workers to save and end; the second one ends everything at once."""

        def on_interrupt(signum: int, frame: Any) -> None:
            self.num_interrupts += 1
            if self.num_interrupts > 1:
                raise KeyboardInterrupt
            print(
                "train: interrupted: saving a checkpoint, then ending; interrupt again to end at once",
                flush=True,
            )
            threading.Thread(target=self._ask_to_stop, daemon=True).start()

        signal.signal(signal.SIGINT, on_interrupt)

    def _ask_to_stop(self) -> None:
        if not ask_to_stop(self.run_id):  # no worker is there to hear it, and nothing to save
            os.kill(os.getpid(), signal.SIGINT)


def _started_here() -> bool:
    """Whether this process started the Ray that it uses, so that all of its processes have this one's variables."""
    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _run_controller(trainer: Trainer, arguments: dict[str, Any]) -> Any:
    """As Ray Train's own, but without runtime environments: one costs each process of the training 0.3 s, and the idle ones that Ray has
    started cannot be used (Ray 2.60.0, ``DataParallelTrainer._initialize_and_run_controller``)."""
    variables = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
    controller = ray.remote(num_cpus=0)(Controller).remote(variables, **arguments)
    # the controller would wait for it: now both start side by side
    coordinator = get_or_create_autoscaling_coordinator()
    if threading.current_thread() is threading.main_thread():
        trainer._register_sigint_handler(controller)
    ray.get(controller.run.remote())
    del coordinator
    return ray.get(controller.get_result.remote())


def ask_to_stop(run_id: str) -> bool:
    """Asks the workers of a run to save and end; whether there are any to hear it."""
    if not pulse.beats(run_id):
        return False
    pulse.post(run_id, "stop", "asked")
    return True


def cause(run_id: str, error: Exception) -> str:
    """Why a training failed: the controller's reason, or what can be told from its error."""
    found = pulse.read(run_id, "cause")
    pulse.clear(run_id)
    return found or diagnosis(error, {})[1]
