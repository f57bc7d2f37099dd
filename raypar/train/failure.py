"""What can go wrong in a training, in one line each; and what is tried again, how often.

Runs in: the workers (they explain their errors), and Ray Train's controller (it decides). Imports no torch: the controller starts fast.
"""

from __future__ import annotations

import errno
import json
import re
import time
from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

from raypar.storage import OutOfDiskError, StorageError
from raypar.train import pulse

START_ATTEMPTS = 3
# an elastic run has counted that there is room: when there is none, a node was counted that has gone
ELASTIC_START_S = 15.0
MAX_PREEMPTIONS = 100
# The same again would come of the same settings and the same data: these are not tried again.
MISTAKES = (ValueError, TypeError, AttributeError, ImportError, NotImplementedError, AssertionError)
DEAD = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)  # a worker's process has ended


class RankError(RuntimeError):
    """A worker's error, with the rank, the host and the stage."""


class StuckError(RankError):
    """A rank waited for the others as long as is allowed."""


class CutOffError(RankError):
    """A connection to another rank broke: something happened there, of which this rank knows nothing."""


class OutOfMemoryError(RuntimeError):
    """A step does not fit into the memory of its device."""


class NotFiniteError(RuntimeError):
    """The loss or the weights are no numbers any more: training goes back to its checkpoint."""


class DivergedError(ValueError):
    """That happened too often."""


class Restart(RuntimeError):  # noqa: N818
    """All ranks have saved and leave, so that the workers can be placed anew."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason  # "preempted" or "grow"


class UnplaceableError(RuntimeError):
    """There is no place for the workers."""


LESS_MEMORY = ("fewer images a worker (train.batch, or more nodes), fewer workers a node (train.cpus_per_worker), train.cache=none and a "
               "smaller train.yolo.imgsz take less")  # fmt: skip
TOLD = (OutOfMemoryError, NotFiniteError, Restart, OutOfDiskError, StorageError)


def explained(error: Exception, life: pulse.Pulse) -> Exception:
    """A worker's error as the controller and the user are told of it."""
    if (failed := _storage_error(error)) is not None:
        return StorageError(f"{life}: {failed}; raise train.storage_timeout_s to wait longer")
    is_task, error = isinstance(error, ray.exceptions.RayTaskError), unwrapped(error)
    text = _first_line(error)
    if isinstance(error, (*TOLD, RankError, *MISTAKES)):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfDiskError(f"{life}: {text}")
    # of a data task, tried again by Ray as often as is allowed
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return RankError(f"{life}: a task that reads data was killed: {memory_of_node(error)}")
    if is_out_of_memory(error):
        return OutOfMemoryError(f"{life}: {text}; {LESS_MEMORY}")
    if is_task and isinstance(error, OSError):  # a file's, and no other rank's, whatever it says
        return RankError(f"{life}: a task that reads data failed: {type(error).__name__}: {text}")
    if any(word in text.lower() for word in ("timed out", "timeout", "wait time")):
        return StuckError(f"{life}: waited too long for the others: {text}{_who_is_silent(life)}")
    if any(word in text.lower() for word in ("connection closed by peer", "connection reset", "broken pipe")):
        return CutOffError(f"{life}: {text}{_who_is_silent(life)}")
    return RankError(f"{life}: {type(error).__name__}: {text}")


def unwrapped(error: Exception) -> Exception:
    """What was raised in a task or an actor. Ray's own error around it has neither its attributes nor its message, but a traceback."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    return error


def _storage_error(error: Exception) -> StorageError | None:
    """A store's failure, of this process or, by the text of its traceback, of a task that reads data; nothing when it is something else."""
    if type(found := unwrapped(error)) is StorageError:
        return found
    told = re.search(r"^raypar\.storage\.StorageError: (.+)$", str(error), re.MULTILINE)
    return StorageError(told[1]) if told else None


def start_attempts(placement_timeout_s: float, *, is_elastic: bool) -> tuple[int, float]:
    """How often the workers may find no place, and for how many seconds each time; an elastic run counts anew in between."""
    seconds = placement_timeout_s / START_ATTEMPTS
    if is_elastic:
        seconds = min(seconds, ELASTIC_START_S)
    return round(placement_timeout_s / seconds), seconds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, on whatever device."""
    # also the driver's own: "CUDA error: out of memory"
    words = r"DefaultCPUAllocator|\b(?:cuda|hip)\b.{0,20}\bout of memory"
    return (
        type(error).__name__ == "OutOfMemoryError" or re.search(words, str(error), re.IGNORECASE) is not None
    )


def _who_is_silent(life: pulse.Pulse) -> str:
    """Which ranks give no sign of life, and what the others do."""
    try:
        silent = pulse.silent(life.run_id)
        others = [beat for beat in pulse.beats(life.run_id) if beat.rank != life.rank]
    except Exception:
        return "; this host cannot reach the head of the cluster either"
    if silent:
        return "; no sign of life from " + ", ".join(map(str, silent))
    return "; " + ", ".join(map(str, others[:8])) if others else ""


class Policy(FailurePolicy):  # type: ignore[misc]  # Ray is untyped here
    """Ray Train's failure policy, which tells causes apart and says what it does. Failures are counted in a row: a start from a checkpoint
    with more epochs than any before it begins the count again.

    Args:
        failure_config: ``max_failures`` is taken from it.
        run_id: of this start of the run, to look up who did what.
        placement_timeout_s: for the message.
        start_attempts: how often in a row the workers may find no place.
    """

    def __init__(
        self,
        failure_config: Any,
        run_id: str,
        placement_timeout_s: float,
        start_attempts: int = START_ATTEMPTS,
    ):
        super().__init__(failure_config)
        self.run_id, self.placement_timeout_s, self.start_attempts = (
            run_id,
            placement_timeout_s,
            start_attempts,
        )
        self.counts: dict[str, int] = {}
        self.num_epochs = 0  # the most that a start has found in its checkpoint

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        beats = _beats(self.run_id)
        kind, cause = diagnosis(training_failed_error, beats)
        num_epochs = max((beat.num_epochs for beat in beats.values()), default=0)
        if num_epochs > self.num_epochs:  # the start that failed had come further than any before it
            self.num_epochs = num_epochs
            self.counts.pop("failure", None)
        if kind != "start":
            self.counts.pop("start", None)  # in a row
        self.counts[kind] = count = self.counts.get(kind, 0) + 1
        limits = {"failure": self.failure_config.max_failures, "start": self.start_attempts - 1, "preemption": MAX_PREEMPTIONS,
                  "grow": -1, "not finite": -1}  # fmt: skip  # the workers count the last one
        limit = limits.get(kind, 0)
        is_retry = limit < 0 or count <= limit
        is_stop = is_retry and _is_asked_to_stop(self.run_id)
        then = (
            "training ends, as it was asked to"
            if is_stop
            else _what_next(kind, count, limit)
            if is_retry
            else "training ends"
        )
        event = {
            "time": time.time(),
            "what": f"{cause}; {then}",
            "kind": kind,
            "count": count,
            "limit": limit,
        }
        # the next rank 0, or the driver, keeps it
        pulse.post(self.run_id, f"failure:{time.time():020.6f}", json.dumps(event))
        if is_retry:
            print(f"train: {cause}; {then}", flush=True)
            pulse.clear(self.run_id, "beat:")
            # "stop" stays: asked for a moment later, the next workers hear it
            pulse.clear(self.run_id, "grow")
            if is_stop:
                pulse.post(self.run_id, pulse.ENDED, cause)
        elif kind == "start":
            post_cause(self.run_id, missing(self.placement_timeout_s, cause))
        else:
            again = "" if limit <= 0 else f" (failure {count}, and train.max_failures={limit})"
            post_cause(self.run_id, cause + again)
        return FailureDecision.RETRY if is_retry and not is_stop else FailureDecision.RAISE


class Unstarted(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Takes down the workers of a start that failed late. Ray Train forgets them: they would go on, and keep the room that the next ones
    need (Ray 2.60.0, ``WorkerGroup._start``). It must be the first callback."""

    def __init__(self) -> None:
        self.group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        self.group = worker_group

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self.group = None  # from here on it is the controller's

    def before_controller_execute_failure_decision(self, failure_decision: FailureDecision) -> None:
        group, self.group = self.group, None
        if group is None or not group.has_started():
            return
        try:
            group.shutdown()
        except Exception as error:  # of another callback that was not ready for it
            print(f"train: workers that did not start are killed: {_first_line(error)}", flush=True)
            if group.has_started():
                group.get_worker_group_state().shutdown()


def _what_next(kind: str, count: int, limit: int) -> str:
    if kind == "grow":
        return "the workers start again, more of them"
    if kind == "not finite":
        return "going on from the newest checkpoint"
    of = "no limit" if limit < 0 else f"of {limit}"
    return f"{kind} {count} {of}: the workers start again from the newest checkpoint"


def post_cause(run_id: str, cause: str) -> None:
    """Leaves the reason of the end for the driver."""
    print(f"train: {cause}", flush=True)
    pulse.post(run_id, "cause", cause)


def _beats(run_id: str) -> dict[int, pulse.Beat]:
    try:
        return {beat.rank: beat for beat in pulse.beats(run_id)}
    except Exception:
        return {}


def _is_asked_to_stop(run_id: str) -> bool:
    try:
        return pulse.read(run_id, "stop") is not None
    except Exception:
        return False


def diagnosis(error: Exception, beats: dict[int, pulse.Beat]) -> tuple[str, str]:
    """The kind of a failure, and its cause in one line.

    Returns:
        kind: ``failure``, ``preemption``, ``grow``, ``not finite`` and ``start`` are tried again; ``final`` is not.
    """
    if isinstance(error, ray.train.ControllerError):
        inner = unwrapped(error.controller_failure)
        if type(inner).__name__ in ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"):
            return "start", _first_line(inner)
        # when all are there and are told to train, which is no part of their start to Ray Train (2.60.0)
        if isinstance(inner, DEAD):
            kind, cause = _of_dead("a worker that was starting", inner)
            return "failure" if kind == "lost" else kind, cause
        if isinstance(inner, OSError) and inner.errno not in (errno.ENOSPC, errno.EDQUOT):
            return "failure", f"the controller: {_first_line(inner)}"
        return "final", _first_line(inner)
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "final", f"the run's controller was killed: {memory_of_node(error)}"
    if isinstance(error, ray.exceptions.RayActorError):
        return "final", f"the run's controller is lost: {_death(error)}"
    if type(error).__name__ == "PreemptionError":
        return "preemption", _first_line(error)
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    found = [_of_worker(rank, failure, beats.get(rank)) for rank, failure in sorted(failures.items())]
    order = ("preemption", "grow", "not finite", "final", "lost", "failure", "cut off")
    # One dead rank makes the others fail too, with errors that say little: the most telling one is the cause.
    kind, cause = min(found, key=lambda each: order.index(each[0]), default=("failure", _first_line(error)))
    return "failure" if kind in ("lost", "cut off") else kind, cause


def _of_worker(rank: int, failure: Exception, beat: pulse.Beat | None) -> tuple[str, str]:
    failure = unwrapped(failure)
    dead = getattr(failure, "health_check_failure", failure)
    if isinstance(failure, Restart):
        return ("preemption", "a node is about to be taken away and everything is saved") if failure.reason == "preempted" else (
            "grow", "more workers can be had and everything is saved")  # fmt: skip
    if isinstance(failure, NotFiniteError):
        return "not finite", str(failure)
    if isinstance(failure, (*MISTAKES, OutOfMemoryError, OutOfDiskError, StorageError)):
        return "final", f"worker {rank}: {_first_line(failure)}"
    who = f"worker {rank}" + (
        f" on {beat.host}, in stage '{beat.stage}' after {beat.cursor} images," if beat else ""
    )
    held = f"it held {beat.memory_gb:.1f} GB" if beat else ""
    if isinstance(dead, DEAD):
        return _of_dead(who, dead, held)
    return "cut off" if isinstance(failure, CutOffError) else "failure", _first_line(failure)


def _of_dead(who: str, dead: Exception, held: str = "") -> tuple[str, str]:
    if isinstance(dead, ray.exceptions.OutOfMemoryError):
        return "lost", f"{who} was killed: {memory_of_node(dead, held)}"
    if isinstance(dead, ray.exceptions.RayActorError) and dead.preempted:
        return "preemption", f"{who} went with its node, which was taken away"
    return "lost", f"{who} is lost: {_death(dead, held)}"


def memory_of_node(error: Exception, held: str = "") -> str:
    """That Ray's memory monitor killed a process, with its node's figures out of the error's text (Ray 2.60.0), and what takes less."""
    used = re.search(r"was ([\d.]+ ?GB) used / ([\d.]+ ?GB) limit", str(error))
    figures = ", ".join(filter(None, [f"{used[1]} of {used[2]} were used" if used else "", held]))
    return f"its node ran out of memory{f' ({figures})' if figures else ''}: {LESS_MEMORY}"


def _death(error: ray.exceptions.RayActorError, held: str = "") -> str:
    """What Ray says of a process' end, in short."""
    text = str(error)
    if "node has died" in text:
        return "its node died"
    silent = "OOM killer" in text  # Ray guesses so of every process that ends without a word
    hint = " without a word, as when its host runs out of memory (dmesg says so)" if silent else ""
    return f"its process died{hint}{f'; {held}' if silent and held else ''}"


def missing(timeout_s: float, cause: str) -> str:
    """Why the workers found no place."""
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    have = ", ".join(f"{free.get(k, 0):g} of {total[k]:g} {k}s free" for k in ("CPU", "GPU") if k in total)
    return (f"the workers found no place within train.placement_timeout_s={timeout_s:g} s: {cause}; the cluster now has {nodes} node(s), "
            f"{have}: add nodes, ask for fewer workers, or let their number vary (train.num_workers={{min: 1, max: ...}})")  # fmt: skip


def _first_line(error: BaseException) -> str:
    """The line of an error's text that says most: the last one of a traceback, the first one else; gloo adds a place and a joke."""
    text = re.sub(
        r"\[\S+?\.(?:cc|h|cpp):\d+\] | This is typically caused by a remote worker crashing.*", "", str(error)
    )
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return (lines[-1] if "Traceback" in str(error) else lines[0])[:500]
