"""What is written at an epoch's end and what a resume finds, without Ray: a worker with a real loop, made-up images and made-up fitness."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_parallel import TINY
from test_survival import BATCH, STEPS, assert_same, make_batch, make_loop

from raypar.dataset.plan import Plan
from raypar.storage import Folder
from raypar.train import checkpoint, failure, report
from raypar.train import worker as module
from raypar.train.agree import Agreement, FiniteWatch
from raypar.train.saver import Saver
from raypar.train.worker import Worker

EPOCHS = 4
FITNESS = [0.1, 0.4, 0.3, 0.2]  # of each epoch
OF_TIME = ("epoch_s", "wait_s", "step_s", "validate_s", "checkpoint_s", "other_s", "images_per_s")


class KilledError(Exception):
    """What SIGKILL is to a process."""


class Checks:
    """Notes which comparisons of the ranks are made."""

    def __init__(self, _: Any):
        self.made = ["at the start"]

    def compare_weights(self) -> None:
        self.made.append("weights")

    def renew(self) -> None:
        self.made.append("gradients")


class Run:
    """Starts of one run, in one folder."""

    def __init__(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        precision: torch.dtype = torch.float32,
        **train: Any,
    ):
        self.folder, self.precision = folder, precision
        folder.mkdir()
        self.train = {
            "checkpoint_every_s": 1e9,
            "keep_checkpoints": 2,
            "augment": "cpu",
            "max_nan_restarts": 3,
            **train,
        }
        self.reports: list[dict[str, Any]] = []
        monkeypatch.setattr(module.say, "progress", lambda *_: None)
        monkeypatch.setattr(module.say, "epoch", lambda *_: None)
        monkeypatch.setattr(module.pictures, "wants", lambda *_: False)
        monkeypatch.setattr(module.ray.train, "report", self.reports.append)
        monkeypatch.setattr(module.parallel, "SynchronisationCheck", Checks)

    def begin(
        self, *, kill_at: int | None = None, save_at: int | None = None, stop_at: int | None = None
    ) -> Worker:
        """A start up to its first step; it is killed before a step, asked to save or to stop after one."""
        worker = object.__new__(Worker)
        worker.rank, worker.world_size, worker.train = 0, 1, self.train
        worker.identity = {
            "run": "run",
            "fingerprint": "settings",
            "length": EPOCHS,
            "begun": EPOCHS,
            "begun_epochs": EPOCHS,
        }
        worker.out = Folder.at(self.folder)
        worker.precision = self.precision
        worker.args = SimpleNamespace(
            seed=0, single_cls=False, compile=False, plots=True, epochs=EPOCHS, time=None, val=True, lr0=0.01
        )
        worker.plan = Plan((BATCH * STEPS,), seed=0, global_batch=BATCH, epochs=EPOCHS)
        worker.spec = SimpleNamespace(mosaic_epochs=EPOCHS)  # type: ignore[assignment]
        worker.pulse = SimpleNamespace(stage="", cursor=0, wishes=set)  # type: ignore[assignment]
        worker.agreement = Agreement(1, 10.0)
        state = worker._find_state()
        worker.loop = make_loop(model=TINY, precision=self.precision)
        worker.finite = FiniteWatch(module.MAX_SKIPPED if worker.is_fp16 else 1)
        worker.saver = Saver(1)
        worker.saved_at, worker.saved_cursor = module.time.monotonic(), -1
        worker.unwritten, worker.asked = {}, set()
        worker.watch = SimpleNamespace(line=dict, epoch=lambda *_: None, end=lambda _: None)  # type: ignore[assignment]
        worker._rewind_tables()
        worker.saver.flush()
        worker._begin_from(state)
        worker.validator = lambda *_: {  # type: ignore[assignment]
            "fitness": FITNESS[len(worker.history)],
            "map50_95": FITNESS[len(worker.history)],
            "per_class": [{"class_name": "a", "map50": FITNESS[len(worker.history)]}],
        }
        worker._batches = lambda: self._batches(worker, kill_at, save_at, stop_at)  # type: ignore[method-assign]
        return worker

    def _batches(
        self, worker: Worker, kill_at: int | None, save_at: int | None, stop_at: int | None
    ) -> Iterator[Any]:
        for number in range(worker.cursor // BATCH, EPOCHS * STEPS):
            if number == kill_at:
                worker.saver.flush()  # type: ignore[union-attr]
                raise KilledError
            said = {save_at: {"save"}, stop_at: {"stop"}}.get(number, set()) if number else set()
            worker.pulse.wishes = lambda said=said: said  # type: ignore[method-assign, misc]
            epoch, step = divmod(number, STEPS)
            rows = np.arange(step * BATCH, (step + 1) * BATCH)
            yield SimpleNamespace(epoch=epoch, step=step, rows=rows, num_replaced=0), make_batch(number)

    def go(self, **how: int) -> Worker:
        """A start, to its end."""
        worker = self.begin(**how)
        try:
            worker._train()
        except KilledError:
            pass
        finally:
            worker.saver.flush()  # type: ignore[union-attr]
            worker.saver.end()  # type: ignore[union-attr]
        return worker

    @property
    def cursors(self) -> list[int]:
        return [
            int(name.removeprefix(checkpoint.PREFIX)) for name in checkpoint.names(Folder.at(self.folder))
        ]

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        content = torch.load(self.folder / name, weights_only=False)
        return {"epochs": torch.tensor(content["trained_epochs"]), **content["model"].state_dict()}

    def final(self) -> dict[str, Any]:
        out = Folder.at(self.folder)
        return checkpoint.load(out, checkpoint.names(out)[0], 1.0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run = Run(tmp_path_factory.mktemp("runs") / "alone", monkeypatch)
        run.go()
    return run


def plain(line: dict[str, Any]) -> dict[str, Any]:
    """Without times, and with losses as near as single precision adds them up from two parts."""
    return {
        k: pytest.approx(v, rel=1e-5) if k.startswith("train/") else v
        for k, v in line.items()
        if k not in OF_TIME
    }


def test_short_epochs_write_tables_alone_and_the_last_one_everything(alone: Run) -> None:
    assert alone.cursors == [EPOCHS * STEPS * BATCH]
    assert [line["epoch"] for line in alone.lines()] == [1, 2, 3, 4]
    assert int(alone.weights("last.pt")["epochs"]) == EPOCHS
    assert int(alone.weights("best.pt")["epochs"]) == 1 + int(np.argmax(FITNESS))
    assert [line["epoch"] for line in alone.reports] == [EPOCHS], "Ray Train makes each report wait"


def test_what_was_killed_between_two_checkpoints_ends_as_if_left_alone(
    alone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved in epoch 2, killed in epoch 4: epochs 2 and 3, of which one was the best so far, are trained again."""
    run = Run(tmp_path / "killed", monkeypatch)
    run.go(save_at=3, kill_at=3 * STEPS + 1)
    saved = run.cursors[0]
    assert STEPS * BATCH < saved < 2 * STEPS * BATCH
    assert [line["epoch"] for line in run.lines()] == [1, 2, 3]
    assert int(run.weights("best.pt")["epochs"]) == 1, "the best one that the checkpoint knows"
    assert int(run.weights("last.pt")["epochs"]) == 1

    worker = run.begin()
    assert worker.cursor == saved
    assert [line["epoch"] for line in run.lines()] == [1], "no epoch that is trained again"
    assert json.loads((run.folder / "per_class.json").read_text())["epoch"] == 1
    worker.saver.end()  # type: ignore[union-attr]

    run.go()
    assert list(map(plain, alone.lines())) == [{k: line[k] for k in plain(line)} for line in run.lines()]
    for name in ("best.pt", "last.pt"):
        assert_same(run.weights(name), alone.weights(name))
    for part in ("model", "ema", "optimizer", "stopper", "best_fitness", "best_classes", "cursor"):
        assert_same(run.final()[part], alone.final()[part])


def test_what_was_killed_before_any_checkpoint_begins_with_empty_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "early", monkeypatch)
    run.go(kill_at=STEPS + 1)
    assert [line["epoch"] for line in run.lines()] == [1]
    assert not (run.folder / "best.pt").exists()
    worker = run.begin()
    assert worker.cursor == 0
    assert run.lines() == []
    worker.saver.end()  # type: ignore[union-attr]


def test_a_word_to_stop_is_heard_at_an_epochs_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "stopped", monkeypatch)
    worker = run.go(stop_at=STEPS - 2)  # known to all ranks at the epoch's last step
    assert worker.cursor == STEPS * BATCH
    assert run.cursors == [worker.cursor]
    assert worker.synchronisation.made == ["at the start", "weights", "gradients"]  # type: ignore[attr-defined]
    assert int(run.weights("last.pt")["epochs"]) == 1


def test_when_it_is_time_each_epoch_ends_with_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "often", monkeypatch, checkpoint_every_s=1e-9, keep_checkpoints=99)
    run.go(kill_at=2 * STEPS)
    assert {STEPS * BATCH, 2 * STEPS * BATCH} <= set(run.cursors)


class Clock:
    """Time that passes only on request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

    def slow(self, do: Any, seconds: float) -> Any:
        """The same, and it takes so long."""

        def slowly(*arguments: Any, **named: Any) -> Any:
            self.now += seconds
            return do(*arguments, **named)

        return slowly


def test_the_stages_add_up_to_all_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    run = Run(tmp_path / "timed", monkeypatch)
    began = clock.now
    worker = run.begin(save_at=STEPS + 1)
    clock.now += 3  # to build a model
    worker.loop.step = clock.slow(lambda *_: {"box_loss": torch.tensor(1.0)}, 7)  # type: ignore[method-assign]
    worker.loop._update = lambda _: None  # type: ignore[method-assign]
    worker.validator = clock.slow(worker.validator, 50)
    worker.watch.epoch = clock.slow(worker.watch.epoch, 5)  # type: ignore[method-assign]
    monkeypatch.setattr(checkpoint, "capture", clock.slow(checkpoint.capture, 100))
    given = worker._batches()

    def wait() -> Iterator[Any]:
        for batch, tensors in given:
            clock.now += 10
            worker.loop.last_optimizer_step = batch.epoch * STEPS + batch.step
            yield batch, tensors

    worker._batches = wait  # type: ignore[method-assign]
    worker._train()
    worker.saver.end()  # type: ignore[union-attr]
    stages = ("wait_s", "step_s", "validate_s", "checkpoint_s", "other_s")
    assert [[line[name] for name in stages] for line in run.lines()] == [
        [3 * 10, 3 * 7, 50, 0, 3],
        [3 * 10, 3 * 7, 50, 100, 5],  # saved within it
        [3 * 10, 3 * 7, 50, 0, 5],
        [3 * 10, 3 * 7, 50, 100, 5],  # the last one
    ]
    for line in run.lines():
        assert line["epoch_s"] == sum(line[name] for name in stages)
    assert sum(line["epoch_s"] for line in run.lines()) == clock.now - began - 5, (
        "but for what follows the last line"
    )
    assert set(stages) == set(report.STAGES), "the report shows each of them"
    assert run.lines()[0]["images_per_s"] == STEPS * BATCH / 51


def test_a_rollback_halves_the_rate_until_good_epochs_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "rolled", monkeypatch)
    Folder.at(run.folder).write_json(
        module.NAN_RESTARTS, [{"epoch": 1, "images_seen": 8}, {"epoch": 1, "images_seen": 12}]
    )
    worker = run.begin(kill_at=3 * STEPS, save_at=STEPS)
    scales = []
    step = worker.loop.step
    worker.loop.step = lambda tensors, number: (scales.append(worker.loop.lr_scale), step(tensors, number))[1]  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        worker._train()
    assert scales == [0.25] * STEPS + [0.5] * STEPS + [1.0] * STEPS
    worker.saver.end()  # type: ignore[union-attr]
    resumed = run.begin()
    assert resumed.cursor > STEPS * BATCH
    assert resumed.loop.lr_scale == 0.5, "as in the run that was left alone"
    resumed.saver.end()  # type: ignore[union-attr]


def overflow(worker: Worker, steps: Container[int]) -> None:
    """Makes the loss of some steps infinite."""
    model = worker.loop.lender.model
    loss_of = model.loss

    def loss(*arguments: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, parts = loss_of(*arguments)
        factor = torch.inf if worker.cursor // BATCH in steps else 1.0
        return total * factor, {name: part * factor for name, part in parts.items()}

    model.loss = loss


def test_an_update_that_fp16_skips_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "overflowing", monkeypatch, precision=torch.float16)
    worker = run.begin()
    worker.args.epochs = 2
    overflow(worker, {0, 1, STEPS + 1})
    assert not worker._train()
    worker.saver.end()  # type: ignore[union-attr]
    assert len(run.lines()) == 2
    for line in run.lines():
        assert all(np.isfinite(value) for value in line.values() if isinstance(value, float)), line
    assert 0 < sum(line["updates_skipped"] for line in run.lines()) < 2 * STEPS
    assert checkpoint.is_finite(run.final())
    assert not (run.folder / module.NAN_RESTARTS).exists()


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_several_in_a_row_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: torch.dtype
) -> None:
    monkeypatch.setattr(module, "MAX_SKIPPED", 3)
    run = Run(tmp_path / "diverging", monkeypatch, precision=precision)
    worker = run.begin()
    worker.loop.nominal_accumulate = 1  # an update a step
    overflow(worker, range(1, EPOCHS * STEPS))
    with pytest.raises(
        failure.NotFiniteError, match=r"restart 1 of 3 in a row, at 0\.5 of the learning rate"
    ):
        worker._train()
    worker.saver.end()  # type: ignore[union-attr]
    noticed = 3 * BATCH  # a step after the first one
    assert worker.cursor > noticed if precision == torch.float16 else worker.cursor == noticed


def test_statistics_of_a_forward_pass_that_overflows_are_those_of_the_step_before() -> None:
    loop = make_loop(model=TINY, precision=torch.float16)
    loop.start_epoch()
    loop.step(make_batch(0), 0)
    loop.step(make_batch(1), 1)
    names = [name for name, _ in loop.lender.model.named_buffers() if name.endswith(("_mean", "_var"))]
    before = {name: loop.lender.model.state_dict()[name].clone() for name in names}
    weight = next(loop.lender.model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(1e6)  # more than fp16 holds
    loop.step(make_batch(2), 2)
    with torch.no_grad():
        weight.copy_(kept)
    after = {name: loop.lender.model.state_dict()[name] for name in names}
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(torch.equal(after[name], before[name]) for name in names[:2]), "of the layer that overflowed"
    loop.step(make_batch(3), 3)
    assert not torch.equal(loop.lender.model.state_dict()[names[0]], before[names[0]]), "they move again"
