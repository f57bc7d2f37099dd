"""How processes died, from Ray's own errors: what is said of it, in one line, and what is done."""

from __future__ import annotations

import errno

import pytest
import ray.exceptions
import ray.train
import torch
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from raypar.storage import OutOfDiskError, StorageError
from raypar.train import failure, launch, pulse

# What Ray 2.60.0 says, shortened in the middle, where its memory monitor or a SIGKILL ended an actor
MONITOR = (
    "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 8317af77) was 22.36GB used / "
    "23.54GB limit (0.95)\nOOM kill reason: Memory usage 24012667200B exceeded threshold of 24012667190B (95.0% of 25276502016B limit)\n"
    "Object store memory usage: [- objects spillable: 0\n]\nRay killed 1 worker(s) based on the killing policy\nRefer to the documentation"
)
SILENT = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a "
    "connection error code 2. End of file. Some common causes include: (1) the process was killed by the OOM killer due to high memory usage, "
    "(2) ray stop --force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another unexpected error."
)
NODE = "The actor died because its node has died. Node Id: 8317af77\n\tthe actor's node was terminated unexpectedly: health check failed"
BEAT = pulse.Beat(1, 2, "b (10.0.0.2)", 77, "step 3 of epoch 2", 1.0, 120, 9, 7.25)
LIFE = "rank 0 on a (10.0.0.1) in stage 'wait for data', after 12 images"  # as a pulse says of its worker
ADVICE = ("train.batch", "train.cpus_per_worker", "train.cache=none", "train.yolo.imgsz")


def dead(text: str) -> ray.exceptions.ActorDiedError:
    """As Ray builds it for whoever calls the actor."""
    return ray.exceptions.ActorDiedError(
        ActorDiedErrorContext(
            class_name="RayTrainWorker",
            actor_id=b"a" * 16,
            pid=77,
            node_ip_address="10.0.0.2",
            error_message=text,
        )
    )


def of_worker(error: Exception) -> Exception:
    """As Ray Train's controller passes it on."""
    failures = {
        0: failure.CutOffError("rank 0: connection closed by peer"),
        1: WorkerHealthCheckFailedError("x", failure=error),
    }
    return ray.train.WorkerGroupError("x", failures)


def test_a_worker_that_the_memory_monitor_kills_is_told_with_what_takes_less() -> None:
    kind, cause = failure.diagnosis(of_worker(ray.exceptions.OutOfMemoryError(MONITOR)), {1: BEAT})
    assert kind == "failure"
    assert cause.startswith(
        "worker 1 on b (10.0.0.2), in stage 'step 3 of epoch 2' after 120 images, was killed: its node ran out of memory "
        "(22.36GB of 23.54GB were used, it held 7.2 GB): "
    )
    assert all(setting in cause for setting in ADVICE)
    assert "\n" not in cause
    without = failure.diagnosis(of_worker(ray.exceptions.OutOfMemoryError("killed")), {})[1]
    assert "worker 1 was killed: its node ran out of memory: fewer images" in without


def test_a_data_task_that_the_memory_monitor_kills_is_no_step_that_does_not_fit() -> None:
    error = failure.explained(ray.exceptions.OutOfMemoryError(MONITOR), LIFE)  # type: ignore[arg-type]
    assert type(error) is failure.RankError
    assert (
        "a task that reads data was killed: its node ran out of memory (22.36GB of 23.54GB were used): "
        in str(error)
    )
    assert failure.diagnosis(ray.train.WorkerGroupError("x", {0: error}), {}) == ("failure", str(error))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SILENT,
            "is lost: its process died without a word, as when its host runs out of memory (dmesg says so); it held 7.2 GB",
        ),
        (NODE, "is lost: its node died"),
        ("The actor is dead because it was killed by `ray.kill`.", "is lost: its process died"),
    ],
)
def test_how_a_worker_died(text: str, said: str) -> None:
    kind, cause = failure.diagnosis(of_worker(dead(text)), {1: BEAT})
    assert (kind, cause) == (
        "failure",
        f"worker 1 on b (10.0.0.2), in stage 'step 3 of epoch 2' after 120 images, {said}",
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ray.exceptions.OutOfMemoryError(MONITOR),
            "the run's controller was killed: its node ran out of memory (22.36GB of 23.54GB were used)",
        ),
        (dead(NODE), "the run's controller is lost: its node died"),
    ],
)
def test_a_lost_controller_is_the_end_of_this_start(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    monkeypatch.setattr(pulse, "read", lambda run_id, name: None)
    monkeypatch.setattr(pulse, "clear", lambda run_id, name="": None)
    assert launch.cause("id", error).startswith(said)


def test_a_store_that_fails_a_task_is_told_as_such() -> None:
    told = "cannot read s3://runs/x/dataset/train/00000.parquet, tried for 300 s: curlCode: 7, Couldn't connect to server"
    trace = f"Traceback (most recent call last):\n  File 'stream.py'\nraypar.storage.StorageError: {told}\n\nThe above exception was the cause"
    for cause in (StorageError(told), RuntimeError("wrapped once more")):
        error = failure.explained(
            ray.exceptions.RayTaskError("task", trace, cause).as_instanceof_cause(), LIFE
        )  # type: ignore[arg-type]
        assert str(error) == f"{LIFE}: {told}; raise train.storage_timeout_s to wait longer"
        assert failure.diagnosis(ray.train.WorkerGroupError("x", {0: error}), {}) == (
            "final",
            f"worker 0: {error}",
        )


def of_task(cause: Exception) -> Exception:
    """As Ray raises it where a task's result is wanted."""
    trace = f"Traceback (most recent call last):\n  File 'stream.py'\n{type(cause).__name__}: {cause}"
    error: Exception = ray.exceptions.RayTaskError("task", trace, cause).as_instanceof_cause()
    assert "Traceback" not in str(error), "Ray has taken its first line away"
    return error


def test_a_data_task_tells_its_reason() -> None:
    undecodable = ValueError(
        "no image of the 12 in a window of /runs/x/dataset can be decoded: prepare the dataset again"
    )
    for wrapped in (of_task(undecodable), of_task(of_task(undecodable))):
        error = failure.explained(wrapped, LIFE)  # type: ignore[arg-type]
        assert error is undecodable
        assert failure.diagnosis(ray.train.WorkerGroupError("x", {0: wrapped}), {}) == (
            "final",
            f"worker 0: {undecodable}",
        )
        assert failure.diagnosis(ray.train.ControllerError(wrapped), {}) == ("final", str(undecodable))
    other = failure.explained(of_task(KeyError("boxes")), LIFE)  # type: ignore[arg-type]
    assert (type(other), str(other)) == (failure.RankError, f"{LIFE}: KeyError: 'boxes'")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_under_a_data_task_is_not_tried_again(number: int) -> None:
    full = OSError(number, "No space left on device", "/dev/shm/raypar")
    error = failure.explained(of_task(full), LIFE)  # type: ignore[arg-type]
    assert (type(error), str(error)) == (OutOfDiskError, f"{LIFE}: {full}")
    assert failure.diagnosis(ray.train.WorkerGroupError("x", {0: error}), {})[0] == "final"
    assert failure.diagnosis(ray.train.ControllerError(of_task(full)), {})[0] == "final"


def test_a_file_that_fails_a_data_task_is_no_other_rank() -> None:
    error = failure.explained(of_task(TimeoutError(errno.ETIMEDOUT, "Connection timed out")), LIFE)  # type: ignore[arg-type]
    assert type(error) is failure.RankError
    assert (
        str(error)
        == f"{LIFE}: a task that reads data failed: TimeoutError: [Errno {errno.ETIMEDOUT}] Connection timed out"
    )
    waiting = failure.explained(of_task(BroadcastCollectiveTimeoutError(30.0, [1], 30.0)), LIFE)  # type: ignore[arg-type]
    assert type(waiting) is failure.StuckError
    assert "timed out after 30.00 seconds" in str(waiting)


def test_a_store_that_fails_a_task_says_all_that_it_says() -> None:
    error = failure.explained(of_task(StorageError("cannot read x\n3 attempts")), LIFE)  # type: ignore[arg-type]
    assert str(error) == f"{LIFE}: cannot read x\n3 attempts; raise train.storage_timeout_s to wait longer"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (dead(NODE), ("failure", "a worker that was starting is lost: its node died")),
        (
            ray.exceptions.OutOfMemoryError(MONITOR),
            ("failure", "a worker that was starting was killed: its node ran out of memory (22.36GB"),
        ),
        (WorkerGroupStartupFailedError("one failed to initialize"), ("start", "one failed to initialize")),
        (RuntimeError("a defect"), ("final", "a defect")),
    ],
)
def test_a_worker_that_is_lost_when_it_is_told_to_train(error: Exception, said: tuple[str, str]) -> None:
    kind, cause = failure.diagnosis(ray.train.ControllerError(error), {})
    assert (kind, cause[: len(said[1])]) == said


class Late(WorkerGroup):  # type: ignore[misc]
    """A worker group whose workers are all there when one is lost."""

    def __init__(self, callbacks: list[object], error: Exception | None, *, is_odd: bool = False):
        self.callbacks, self.error, self.is_odd = callbacks, error, is_odd
        self._worker_group_state, self.freed = None, 0

    def _start_impl(self, builder: object) -> None:
        self._worker_group_state = self
        for callback in self.callbacks:
            callback.after_worker_group_start(self)  # type: ignore[attr-defined]
        if self.error is not None:
            raise self.error
        for callback in self.callbacks:
            callback.after_worker_group_training_start(self)  # type: ignore[attr-defined]

    def shutdown(self) -> None:
        if self.is_odd:
            self.is_odd = False
            raise RuntimeError("a callback was not ready")
        self.freed += 1
        self._worker_group_state = None


@pytest.mark.parametrize("is_odd", [False, True])
def test_workers_that_did_not_start_give_their_room_back(is_odd: bool) -> None:
    callback = failure.Unstarted()
    group = Late([callback], dead(NODE), is_odd=is_odd)
    with pytest.raises(ray.exceptions.ActorDiedError):
        group._start()
    assert group.freed == 0, "Ray frees them by now: this callback can go"
    for _ in range(2):
        callback.before_controller_execute_failure_decision(FailureDecision.RETRY)
    assert group.freed == 1


def test_workers_that_started_are_the_controllers() -> None:
    callback = failure.Unstarted()
    group = Late([callback], None)
    group._start()
    callback.before_controller_execute_failure_decision(FailureDecision.RETRY)
    assert group.freed == 0


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com\nCUDA kernel errors might be reported later",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA driver error: out of memory",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_the_driver_refuses_is_not_asked_for_again(text: str) -> None:
    for kind in (RuntimeError, torch.AcceleratorError):
        error = failure.explained(kind(text), LIFE)  # type: ignore[arg-type]
        assert type(error) is failure.OutOfMemoryError
        assert all(setting in str(error) for setting in ADVICE)
        assert failure.diagnosis(ray.train.WorkerGroupError("x", {0: error}), {})[0] == "final"
    assert not failure.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
