"""What makes a training survive, without Ray: agreeing, saving, trying again, telling failures apart."""

from __future__ import annotations

import errno
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.exceptions
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ray.train.v2._internal import constants
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from raypar.config import RunConfig
from raypar.dataset.batch import Batch
from raypar.dataset.manifest import Manifest, Split
from raypar.storage import Folder, OutOfDiskError, patiently
from raypar.train import checkpoint, failure, launch, memory, pulse
from raypar.train import saver as saver_module
from raypar.train.agree import Agreement, FiniteWatch
from raypar.train.elastic import largest
from raypar.train.epoch import Epoch, summary
from raypar.train.loop import Loop
from raypar.train.prime import settle_buckets
from raypar.train.recipe import Lender
from raypar.train.saver import Saver

CLASSES, BATCH, IMGSZ, STEPS = ("a", "b"), 4, 64, 3


def make_loop(
    world_size: int = 1, model: Any = "yolov8n.yaml", precision: torch.dtype = torch.float32
) -> Loop:
    """yolov8n at 64 px; three steps an epoch, gradients of up to four added up."""
    manifest = Manifest(
        task="detect", class_names=CLASSES, splits={"train": Split(num_images=STEPS * BATCH)}, source=""
    )
    yolo = {"epochs": 4, "imgsz": IMGSZ, "nbs": 4 * BATCH, "warmup_epochs": 1.0}
    lender = Lender(yolo, model=model, manifest=manifest, batch=BATCH, seed=0, device=torch.device("cpu"))
    torch.set_num_threads(1)
    return Loop(
        lender,
        num_images=STEPS * BATCH,
        steps_per_epoch=STEPS,
        world_size=world_size,
        precision=precision,
    )


def make_batch(step: int, rank: int = 0, images: int = BATCH) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng([step, rank])
    return {
        "img": torch.from_numpy(rng.integers(0, 256, (images, 3, IMGSZ, IMGSZ), np.uint8)),
        "cls": torch.from_numpy(rng.integers(0, 2, (images, 1))).float(),
        "bboxes": torch.from_numpy(rng.uniform(0.2, 0.5, (images, 4))).float(),
        "batch_idx": torch.arange(images).float(),
    }


def test_trains_cleaner_is_told_which_cluster_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, str] = {}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(ray.train.torch.TorchTrainer, "_initialize_and_run_controller", lambda self, **_: told.update(constants.get_env_vars_to_propagate()))  # fmt: skip
    trainer = launch.Trainer(
        run_id="x", world_sizes=[1], placement_timeout_s=1.0, train_loop_per_worker=print
    )
    monkeypatch.setattr(launch.pulse, "clear", lambda *_: None)
    trainer._initialize_and_run_controller()
    assert told["RAY_API_SERVER_ADDRESS"] == "10.0.0.1:6379"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ, "not for a Ray that comes later"


def test_a_state_is_whole_with_gradients_that_wait(tmp_path: Path) -> None:
    """Saved after any step and restored into a new loop, training goes on with the same bits."""
    steps, at = 7, 5  # after warm-up four steps are added up, so gradients wait at step 5
    loop = make_loop()
    out = Folder.at(tmp_path)
    loop.start_epoch()
    for step in range(steps):
        loop.step(make_batch(step), step)
        if step == at:
            assert loop.last_optimizer_step != step, "no gradient waits: the test shows nothing"
            state = checkpoint.capture(loop, has_gradients=True)
            checkpoint.write(out, {**state, "cursor": 24}, keep=1)
    other = make_loop()
    found = checkpoint.newest(out, 1.0)
    assert found is not None
    checkpoint.restore(other, found[1])
    other.start_epoch()
    for step in range(at + 1, steps):
        other.step(make_batch(step), step)
    a, b = (checkpoint.capture(x, has_gradients=True) for x in (loop, other))
    assert_same(a, b)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_a_copy_does_not_change_with_the_loop() -> None:
    loop = make_loop()
    loop.start_epoch()
    loop.step(make_batch(0), 0)
    state = checkpoint.capture(loop, has_gradients=False)
    name, before = next((n, v.clone()) for n, v in state["model"].items() if n.endswith("running_mean"))
    loop.step(make_batch(1), 1)
    loop.step(make_batch(2), 2)
    assert torch.equal(state["model"][name], before)
    assert not torch.equal(loop.lender.model.state_dict()[name], before)


def test_the_criterions_schedule_is_kept() -> None:
    """YOLO26's end-to-end loss shifts its weights at each epoch."""
    loop = make_loop()

    class Scheduled:
        updates, o2m = 3, 0.4

    loop.lender.model.init_criterion = Scheduled
    loop.lender.model.criterion = Scheduled()
    vars(loop.lender.model.criterion).update(updates=5, o2m=0.25)
    state = checkpoint.capture(loop, has_gradients=False)
    loop.lender.model.criterion = None
    checkpoint.restore(loop, state)
    assert (loop.lender.model.criterion.updates, loop.lender.model.criterion.o2m) == (5, 0.25)


def test_only_numbers_are_saved() -> None:
    state = checkpoint.capture(make_loop(), has_gradients=False)
    assert checkpoint.is_finite(state)
    next(v for v in state["ema"].values() if v.is_floating_point()).view(-1)[0] = float("nan")
    assert not checkpoint.is_finite(state)


def test_a_halved_learning_rate_is_halved_in_the_warm_up_too() -> None:
    """Else what made the loss no number comes back in the first steps after each restart."""
    rates: list[list[float]] = []
    for scale in (1.0, 0.5):
        loop = make_loop()
        loop.args.warmup_bias_lr, loop.lr_scale = 0.1, scale  # optimizer=auto sets it to nothing
        loop._schedule(1)
        rates.append([group["lr"] for group in loop.optimizer.param_groups])
    assert rates[1] == pytest.approx([rate / 2 for rate in rates[0]])


def test_gradients_that_wait_may_overflow_only_where_the_scaler_leaves_such_an_update_out() -> None:
    state = checkpoint.capture(make_loop(), has_gradients=False)
    state["gradients"] = {"model.0.conv.weight": torch.tensor([float("inf")])}
    assert not checkpoint.is_finite(state)
    state["scaler"] = torch.amp.GradScaler("cpu").state_dict()
    assert checkpoint.is_finite(state)


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Folder.at(tmp_path)
    for cursor in (8, 16, 24):
        checkpoint.write(out, {"cursor": cursor}, keep=2)
    assert checkpoint.names(out) == ["checkpoint_0000000024", "checkpoint_0000000016"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_0000000016", "checkpoint_0000000024"]
    (tmp_path / "checkpoint_0000000032").mkdir()  # begun, not complete
    (tmp_path / "checkpoint_0000000024" / "state.pt").write_bytes(b"PK cut")
    found = checkpoint.newest(out, 1.0)
    assert found is not None
    assert found[0] == "checkpoint_0000000016"
    assert "checkpoint_0000000024 cannot be read and is passed over" in capsys.readouterr().out
    (tmp_path / "checkpoint_0000000016" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the checkpoints"):
        checkpoint.newest(out, 1.0)
    assert checkpoint.newest(Folder.at(tmp_path / "new"), 1.0) is None


def _ranks(rank: int, path: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    agreement = Agreement(2, 30)
    agreed = [
        sorted(
            agreement.step({"save"} if (rank, step) == (0, 1) else {"nan"} if (rank, step) == (1, 2) else ())
        )
        for step in range(4)
    ]
    agreed.append(sorted(agreement.last()))
    epoch = Epoch(6, {"losses": {"box": 4.0}, "num_steps": 2, "num_replaced": 1, "times_seen": np.array([1, 1, 0, 0, 0, 0], np.uint8),
                      "wait_s": 1.0, "step_s": 1.0, "seconds": 5.0})  # fmt: skip
    rows = np.array([[2, 3], [4, 0]][rank])
    epoch.stepped(
        {"box": torch.tensor(1.0 + rank)}, Batch(0, 2, rank, *[np.empty(0)] * 4, rows, num_replaced=rank)
    )  # type: ignore[arg-type]
    reduced = epoch.reduced(agreement)
    loop = make_loop(world_size=2)
    loop.last_optimizer_step = 3  # so that the next steps only add up
    loop.accumulate = loop.nominal_accumulate = 4
    loop.start_epoch()
    loop.step(make_batch(4, rank, 2), 4)
    own = torch.cat(
        [p.grad.reshape(-1) for p in loop.lender.model.parameters() if p.grad is not None]
    ).clone()
    checkpoint.fold_gradients(loop)
    mean = torch.cat([p.grad.reshape(-1) for p in loop.lender.model.parameters() if p.grad is not None])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    results[rank] = {
        "agreed": agreed, "any": agreement.any(rank == 1), "none": agreement.any(False), "from zero": agreement.from_rank_zero(f"of {rank}"),
        "epoch": summary(reduced), "steps": reduced["num_steps"], "differ": not torch.equal(*both),
        "folded": torch.equal(mean, (both[0] + both[1]) / 2),
    }  # fmt: skip
    dist.destroy_process_group()


def test_images_shown_hundreds_of_times_in_a_step_are_counted() -> None:
    """A split of three images, and a batch of 1,024: the counts of an epoch do not overflow."""
    epoch = Epoch(4)
    rows = np.repeat([0, 1, 2], [512, 256, 256])
    epoch.stepped({"box": torch.tensor(1.0)}, Batch(0, 0, 0, *[np.empty(0)] * 4, rows))  # type: ignore[arg-type]
    found = summary(epoch.reduced(Agreement(1, 30)))
    assert (found["images_missed"], found["images_repeated"]) == (1, 1024 - 3)


def test_two_ranks_agree_one_step_later_and_share_their_sums_and_gradients(tmp_path: Path) -> None:
    results = mp.Manager().dict()
    mp.spawn(_ranks, (str(tmp_path / "store"), results), nprocs=2)
    for rank in (0, 1):
        found = results[rank]
        assert found["agreed"] == [[], [], ["save"], ["nan"], []]
        assert (found["any"], found["none"], found["from zero"]) == (True, False, "of 0")
        assert found["steps"] == 3
        assert found["epoch"]["train/box"] == (4.0 + 1.5) / 3
        assert (found["epoch"]["images_missed"], found["epoch"]["images_repeated"]) == (1, 1)  # row 5; row 0
        assert found["epoch"]["images_replaced"] == 2
        assert found["differ"]
        assert found["folded"]


def _three(rank: int, path: str, results: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
    loops, state = [], dict[str, Any]()
    for first in (0, 2):  # the second one starts from what the first one was after two steps
        loop = make_loop(world_size=3)
        settle_buckets(loop)
        loop.start_epoch()
        if first:
            checkpoint.restore(loop, state)
        for step in range(first, 5):
            loop.step(make_batch(step, rank), step)
            if step == 1:
                checkpoint.fold_gradients(loop)
                state = checkpoint.capture(loop, has_gradients=True)
        loops.append(torch.cat([p.detach().reshape(-1) for p in loop.lender.model.parameters()]))
    results[rank] = torch.equal(*loops)
    dist.destroy_process_group()


def test_three_ranks_resume_to_the_last_bit(tmp_path: Path) -> None:
    """Sums of three numbers depend on their order, which DDP changes after the first step of every start."""
    results = mp.Manager().dict()
    mp.spawn(_three, (str(tmp_path / "store"), results), nprocs=3)
    assert dict(results) == {0: True, 1: True, 2: True}


def _with_weights_of_the_loss(rank: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=3)
    manifest = Manifest(
        task="pose",
        class_names=CLASSES,
        keypoint_shape=(3, 3),
        splits={"train": Split(num_images=BATCH)},
        source="",
    )
    lender = Lender(
        {"imgsz": IMGSZ},
        model="yolo26n-pose.yaml",
        manifest=manifest,
        batch=BATCH,
        seed=0,
        device=torch.device("cpu"),
    )
    torch.set_num_threads(1)
    settle_buckets(Loop(lender, num_images=BATCH, steps_per_epoch=1, world_size=3))
    dist.destroy_process_group()


def test_weights_that_only_the_loss_uses_are_settled_too(tmp_path: Path) -> None:
    """Else DDP waits for their gradients: "expected to have finished reduction"."""
    mp.spawn(_with_weights_of_the_loss, (str(tmp_path / "store"),), nprocs=3)


def test_one_rank_needs_no_group() -> None:
    agreement = Agreement(1, 1)
    assert agreement.step({"save"}) == set()
    assert agreement.step(()) == {"save"}
    assert agreement.from_rank_zero(3) == 3
    assert agreement.any(True)


def test_a_loss_that_is_no_number_is_noticed() -> None:
    watch = FiniteWatch()
    watch.push({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert not watch.is_broken
    watch.push({"a": torch.tensor(float("inf")), "b": torch.tensor(-float("inf"))})
    watch.push({"a": torch.tensor(1.0), "b": torch.tensor(2.0)})
    assert watch.is_broken


def test_a_patient_watch_counts_in_a_row() -> None:
    watch, overflow, fine = (
        FiniteWatch(patience=3),
        {"norm": torch.tensor(float("inf"))},
        {"norm": torch.tensor(1.0)},
    )
    for values in (overflow, overflow, fine, overflow, overflow):
        watch.push(values)
    assert not watch.is_broken
    watch.push(overflow)
    watch.push(fine)
    assert watch.is_broken


class Failing:
    """Fails some times, then works."""

    def __init__(self, times: int, error: OSError):
        self.left, self.error = times, error

    def __call__(self) -> str:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return "done"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr("raypar.storage.time.sleep", pauses.append)
    return pauses


def test_storage_is_tried_again_and_each_failure_is_told(
    no_pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert patiently(Failing(5, OSError("connection reset")), "write x", 60) == "done"
    assert no_pauses == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert capsys.readouterr().out.count("cannot write x (attempt ") == 5


def test_patience_ends(no_pauses: list[float]) -> None:
    with pytest.raises(OSError, match="connection reset"):
        patiently(Failing(9, OSError("connection reset")), "write x", 0)
    with pytest.raises(FileNotFoundError):  # no repetition mends that
        patiently(Failing(9, FileNotFoundError("gone")), "read x", 60)
    with pytest.raises(OutOfDiskError, match="no space is left to write x"):
        patiently(Failing(9, OSError(errno.ENOSPC, "No space left on device")), "write x", 60)
    assert no_pauses == []


def test_a_full_disk_leaves_earlier_checkpoints_and_no_scraps(tmp_path: Path) -> None:
    out = Folder.at(tmp_path)
    checkpoint.write(out, {"cursor": 8}, keep=2)

    class Full(Folder):
        @property
        def fs(self) -> Any:
            class Store:
                def open_output_stream(self, path: str) -> Any:
                    Path(path).write_bytes(b"the first part")
                    raise OSError(errno.ENOSPC, "No space left on device")

            return Store()

        is_local = True  # type: ignore[assignment]
        path = str(tmp_path)  # type: ignore[assignment]

    saver = Saver(60)
    saver.submit(
        "write checkpoint_0000000016", lambda: checkpoint.write(Full(str(tmp_path)), {"cursor": 16}, keep=2)
    )
    with pytest.raises(OutOfDiskError, match="no space is left to write checkpoint_0000000016"):
        saver.flush()
    assert checkpoint.names(out) == ["checkpoint_0000000008"]
    assert not [p for p in tmp_path.rglob("*.part")]


def test_the_saver_writes_in_order_beside_the_training() -> None:
    saver, done, gate = Saver(1), list[int](), threading.Event()
    saver.submit("a", lambda: (gate.wait(5), done.append(1)))
    saver.submit("b", lambda: done.append(2))
    assert saver.is_busy
    assert done == []
    gate.set()
    saver.flush()
    assert done == [1, 2]
    assert not saver.is_busy
    saver.submit("c", Failing(1, PermissionError("no")))
    time.sleep(0.1)
    with pytest.raises(PermissionError):
        saver.submit("d", lambda: done.append(3))
    saver.end()
    saver.end()
    assert not saver._thread.is_alive()


def test_the_savers_end_writes_what_waits_and_waits_for_no_store_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(saver_module, "END_S", 0.3)
    saver, done, gate = Saver(60), list[int](), threading.Event()
    saver.submit("a", lambda: done.append(1))
    saver.end()
    assert done == [1]
    saver = Saver(60)
    for _ in range(3):  # one is being written, two wait: there is no room for a word to end
        saver.submit("b", gate.wait)
    began = time.monotonic()
    saver.end()
    assert 0.3 <= time.monotonic() - began < 5
    gate.set()


def test_workers_that_share_the_batch_and_leave_a_cpu_to_the_data() -> None:
    sizes = RunConfig.model_validate(
        {"name": "x", "train": {"batch": 16, "num_workers": {"min": 1, "max": 8}}}
    ).train.world_sizes
    assert sizes == [1, 2, 4, 8]
    assert largest(sizes, 7, cpus=64, cpus_per_worker=1) == 4
    assert largest(sizes, 8, cpus=8, cpus_per_worker=1) == 4  # eight would leave no CPU to the data
    assert largest(sizes, 8, cpus=9, cpus_per_worker=1) == 8
    assert largest([2, 4], 1, cpus=64, cpus_per_worker=1) == 0


@pytest.mark.parametrize(
    ("num_workers", "batch", "message"),
    [
        ({"min": 3, "max": 2}, 16, "min 3 is above max 2"),
        ({"min": 1, "max": 3}, 16, "multiple of 3"),
        (5, 16, "multiple of 5"),
    ],
)
def test_workers_that_cannot_be(num_workers: Any, batch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate({"name": "x", "train": {"batch": batch, "num_workers": num_workers}})


class Words:
    """Instead of the cluster's store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, beats: list[pulse.Beat]):
        self.posted: dict[str, str] = {}
        monkeypatch.setattr(pulse, "beats", lambda run_id: beats)
        monkeypatch.setattr(pulse, "post", lambda run_id, name, value: self.posted.__setitem__(name, value))
        monkeypatch.setattr(pulse, "clear", lambda run_id, name="": None)


def lost(rank: int) -> Exception:
    return ray.train.WorkerGroupError(
        "x", {0: failure.RankError("rank 0: gloo: connection closed"), rank: ray.exceptions.ActorDiedError()}
    )


def policy(max_failures: int = 2) -> failure.Policy:
    return failure.Policy(ray.train.FailureConfig(max_failures=max_failures), "id", 30)


def test_lost_workers_are_replaced_so_often_and_each_time_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Words(monkeypatch, [pulse.Beat(1, 2, "b (10.0.0.2)", 77, "step 3 of epoch 2", 1.0, 120, 9, 0.5)])
    decide = policy(max_failures=2)
    assert [decide.make_decision(lost(1)) for _ in range(3)] == [
        FailureDecision.RETRY,
        FailureDecision.RETRY,
        FailureDecision.RAISE,
    ]
    told = capsys.readouterr().out
    assert (
        "worker 1 on b (10.0.0.2), in stage 'step 3 of epoch 2' after 120 images, is lost: its process died; failure 1 of 2"
        in told
    )
    assert "failure 2 of 2" in told
    assert "(failure 3, and train.max_failures=2)" in words.posted["cause"]


def test_failures_are_counted_again_after_a_further_epoch_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One a month is no reason to end; the same epoch over and over is."""
    beat = pulse.Beat(1, 2, "b (10.0.0.2)", 77, "step 3 of epoch 2", 1.0, 120, 9, 0.5)
    beats = [beat]
    Words(monkeypatch, beats)
    decide = policy(max_failures=2)
    for num_epochs in (3, 4, 9, 12, 20):
        beats[0] = replace(beat, num_epochs=num_epochs)
        assert decide.make_decision(lost(1)) == FailureDecision.RETRY
    beats[0] = replace(beat, num_epochs=19)  # the newest checkpoint could not be read
    assert decide.make_decision(lost(1)) == FailureDecision.RETRY
    assert decide.make_decision(lost(1)) == FailureDecision.RAISE


def test_an_elastic_run_counts_room_anew_before_long() -> None:
    assert failure.start_attempts(300, is_elastic=False) == (3, 100)
    assert failure.start_attempts(300, is_elastic=True) == (20, 15)
    assert failure.start_attempts(30, is_elastic=True) == (3, 10)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad"),
        TypeError("bad"),
        failure.OutOfMemoryError("16 fit"),
        OutOfDiskError("full"),
        failure.DivergedError("lr0"),
    ],
)
def test_what_would_fail_again_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    words = Words(monkeypatch, [])
    both = ray.train.WorkerGroupError(
        "x", {0: failure.RankError("rank 0: gloo: connection closed"), 1: error}
    )
    assert policy().make_decision(both) == FailureDecision.RAISE
    assert str(error) in words.posted["cause"]


@pytest.mark.parametrize(
    "error", [failure.Restart("grow"), failure.Restart("preempted"), failure.NotFiniteError("not finite")]
)
def test_what_is_no_failure_is_not_counted_as_one(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    Words(monkeypatch, [])
    decide = policy(max_failures=0)
    for _ in range(5):
        assert (
            decide.make_decision(ray.train.WorkerGroupError("x", {0: error, 1: error}))
            == FailureDecision.RETRY
        )


class Life:
    """Stands for a worker's pulse."""

    run_id, rank = "id", 0

    def __str__(self) -> str:
        return "rank 0 on a (10.0.0.1) in stage 'step 4 of epoch 1', after 12 images"


def test_a_stuck_rank_names_itself_and_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = pulse.Beat(1, 2, "b (10.0.0.2)", 77, "wait for data", 31.0, 12, 9, 0.5)
    Words(monkeypatch, [silent])
    monkeypatch.setattr(pulse, "silent", lambda run_id: [silent])
    error = failure.explained(
        RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 30000ms for recv"), Life()
    )  # type: ignore[arg-type]
    assert isinstance(error, failure.StuckError)
    for part in (
        "rank 0 on a (10.0.0.1)",
        "step 4 of epoch 1",
        "no sign of life from rank 1 on b (10.0.0.2) in stage 'wait for data'",
    ):
        assert part in str(error)


def test_out_of_memory_names_the_batch_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, tried = make_loop(), list[int]()

    def attempt(loop: Any, batch: dict[str, torch.Tensor]) -> None:
        tried.append(len(batch["img"]))
        assert len(batch["cls"]) == len(batch["bboxes"]) == len(batch["batch_idx"]) == len(batch["img"])
        if len(batch["img"]) > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    monkeypatch.setattr(memory, "_try", attempt)
    with (
        pytest.raises(
            failure.OutOfMemoryError,
            match=r"with 32 images a worker \(train.batch=64\); 4 fit: train.batch=8",
        ),
        memory.advice(loop, make_batch(0, images=32), world_size=2, who="rank 0"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert tried == [16, 8, 4]
    with (
        pytest.raises(RuntimeError, match="something else"),
        memory.advice(loop, make_batch(0), world_size=2, who="rank 0"),
    ):
        raise RuntimeError("something else")


def test_a_smaller_batch_is_really_tried() -> None:
    assert memory.largest_that_fits(make_loop(), make_batch(0, images=4)) == 2
