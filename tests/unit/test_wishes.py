"""What is asked of a run under way, without Ray: to stop, and to grow; whatever happens to its workers meanwhile."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.exceptions
import ray.experimental.internal_kv as kv
import ray.train
import ray.train.torch
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ResizeDecision

from raypar.train import chronicle, failure, launch, pulse
from raypar.train.elastic import Elastic

RUN = "id"
LOST = ray.exceptions.ActorDiedError()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, bytes]:
    """Instead of the cluster's; a worker has given a sign of life."""
    kept: dict[bytes, bytes] = {}

    def delete(prefix: bytes, *, del_by_prefix: bool, namespace: bytes) -> None:
        for key in [key for key in kept if key.startswith(prefix)]:
            del kept[key]

    monkeypatch.setattr(
        kv, "_internal_kv_put", lambda key, value, overwrite, namespace: kept.__setitem__(key, value)
    )
    monkeypatch.setattr(kv, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(
        kv, "_internal_kv_list", lambda prefix, namespace: [key for key in kept if key.startswith(prefix)]
    )
    monkeypatch.setattr(kv, "_internal_kv_del", delete)
    worker(0)._beat()
    return kept


def worker(rank: int) -> pulse.Pulse:
    """A pulse without its thread."""
    life = pulse.Pulse.__new__(pulse.Pulse)
    vars(life).update(run_id=RUN, rank=rank, world_size=2, local_rank=rank, host="a", cursor=8, total=0, _count=0, _stage="step", _since=0.0,
                      _wishes=set(), num_epochs=0)  # fmt: skip
    return life


def heard(rank: int, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What a worker that has just started hears."""
    monkeypatch.setattr(pulse, "_preemption", lambda: None)
    life = worker(rank)
    life._listen()
    return life.wishes()


def decide(*errors: Exception, max_failures: int = 3) -> FailureDecision:
    """What the controller does about workers that failed so."""
    policy = failure.Policy(ray.train.FailureConfig(max_failures=max_failures), RUN, 30)
    return policy.make_decision(ray.train.WorkerGroupError("x", dict(enumerate(errors))))


def test_room_to_grow_takes_no_stop_away(store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.ask_to_stop(RUN)
    monkeypatch.setattr(
        ElasticScalingPolicy,
        "make_decision_for_running_worker_group",
        lambda *_: ResizeDecision(4, {"CPU": 1}),
    )
    elastic = Elastic.__new__(Elastic)
    elastic.run_id = RUN
    elastic.make_decision_for_running_worker_group(SimpleNamespace(num_workers=2), None)
    assert heard(0, monkeypatch) == {"stop", "grow"}
    assert heard(1, monkeypatch) == set(), "rank 0 tells the others"


@pytest.mark.parametrize(
    "error",
    [LOST, failure.Restart("grow"), failure.Restart("preempted"), failure.NotFiniteError("not finite")],
)
def test_who_asked_to_stop_gets_no_new_workers(
    store: dict[bytes, bytes],
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch.ask_to_stop(RUN)
    assert decide(error) == FailureDecision.RAISE
    assert "training ends, as it was asked to" in capsys.readouterr().out
    assert fitted(tmp_path, monkeypatch).return_value == {"stopped": 0}, "none is saved"
    for cursor in (8, 16):
        (tmp_path / "train" / f"checkpoint_{cursor:010d}").mkdir(parents=True)
        (tmp_path / "train" / f"checkpoint_{cursor:010d}" / "state.pt").touch()
    decide(error)
    assert fitted(tmp_path, monkeypatch).return_value == {"stopped": 16}
    chronicle.happened(SimpleNamespace(exists=lambda _: False, write=lambda *_: None), RUN)  # type: ignore[arg-type]
    assert sorted(key.decode() for key in store) == [f"{RUN}:stop"], (
        "only what the trainer clears in any case"
    )


def fitted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the driver gets of a run whose controller has raised."""

    def fit(trainer: launch.Trainer) -> None:
        raise ray.train.WorkerGroupError("x", {0: LOST})

    monkeypatch.setattr(ray.train.torch.TorchTrainer, "fit", fit)
    config = {"folder": str(folder), "train": {"storage_timeout_s": 1.0}}
    trainer = launch.Trainer(
        run_id=RUN,
        world_sizes=[1],
        placement_timeout_s=1.0,
        train_loop_per_worker=print,
        train_loop_config=config,
    )
    found: SimpleNamespace = trainer.fit()
    return found


def test_a_stop_that_comes_a_moment_later_is_heard_by_the_next_workers(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    old_beats = dict(store)
    pulse.post(RUN, "grow", "asked")
    assert decide(failure.Restart("grow")) == FailureDecision.RETRY
    assert not store.keys() & {f"{RUN}:grow".encode(), *old_beats}
    assert not launch.ask_to_stop(RUN), "there is nobody to hear it"
    store |= old_beats
    assert launch.ask_to_stop(RUN)
    assert heard(0, monkeypatch) == {"stop"}


@pytest.mark.parametrize(
    ("error", "max_failures"), [(failure.OutOfDiskError("no space is left"), 3), (LOST, 0)]
)
def test_what_ends_a_run_anyway_stays_its_reason(
    store: dict[bytes, bytes],
    error: Exception,
    max_failures: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert launch.ask_to_stop(RUN)
    assert decide(error, max_failures=max_failures) == FailureDecision.RAISE
    with pytest.raises(ray.train.WorkerGroupError):
        fitted(tmp_path, monkeypatch)
    assert pulse.read(RUN, "cause")


def test_a_store_that_is_away_is_no_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv, "global_gcs_client", None)
    monkeypatch.setattr(pulse, "post", lambda *_: None)
    monkeypatch.setattr(pulse, "clear", lambda *_: None)
    assert decide(LOST) == FailureDecision.RETRY
