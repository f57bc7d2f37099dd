"""Tune without Ray: search spaces, what is refused, trials' runs, the record, what comes of it."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import raypar.tune
from raypar import runfile
from raypar.cli import main
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest
from raypar.domain import Domain, dotted
from raypar.storage import Folder
from raypar.tune import report, space, study, trial
from raypar.tune.trial import Trial, best_so_far

SPACE: dict[str, Any] = {
    "train.yolo.lr0": {"loguniform": [1e-4, 1e-1]},
    "train.batch": {"choice": [4, 8]},
    "train.yolo.mosaic": {"uniform": [0, 1]},
}


def config_of(space: dict[str, Any] = SPACE, storage: str = "/nowhere", **tune: Any) -> RunConfig:
    return RunConfig.model_validate({
        "name": "a", "storage": storage, "train": {"yolo": {"epochs": 4, "imgsz": 64, "optimizer": "SGD"}}, "tune": {"space": space, **tune}})  # fmt: skip


FINITE = st.floats(1e-6, 1e6)
DOMAINS = st.one_of(
    st.tuples(FINITE, FINITE).filter(lambda t: t[0] < t[1]).map(lambda t: {"uniform": list(t)}),
    st.tuples(FINITE, FINITE).filter(lambda t: t[0] < t[1]).map(lambda t: {"loguniform": list(t)}),
    st.tuples(st.integers(-50, 50), st.integers(2, 50)).map(lambda t: {"randint": [t[0], t[0] + t[1]]}),
    st.tuples(st.integers(-5, 5), st.integers(1, 8), st.sampled_from([0.25, 0.5, 2.0])).map(lambda t: {"quniform": [t[0], t[0] + t[1] * t[2], t[2]]}),
    st.lists(st.booleans() | st.integers() | FINITE | st.sampled_from(["SGD", "AdamW"]), min_size=1).map(lambda values: {"choice": values}),
)  # fmt: skip


@given(DOMAINS, st.integers(0, 1000))
def test_draws_lie_in_their_domain_and_repeat(value: dict[str, Any], seed: int) -> None:
    domain = Domain.model_validate(value)
    drawn = domain.draw(np.random.default_rng(seed))
    assert drawn == domain.draw(np.random.default_rng(seed))
    json.dumps(drawn)
    if domain.kind == "choice":
        assert drawn in domain.arguments
    else:
        assert domain.edges[0] <= drawn <= domain.edges[1]
    if domain.kind == "quniform":
        assert math.isclose((drawn - domain.arguments[0]) % domain.arguments[2], 0, abs_tol=1e-9)
    assert Domain.model_validate(domain.model_dump(mode="json")) == domain


@given(st.dictionaries(st.sampled_from([*SPACE, "seed", "train.yolo.hsv_h"]), DOMAINS, min_size=1))
def test_a_space_may_be_written_with_dots_or_in_sections(flat: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        runfile.put(nested, tuple(key.split(".")), value)
    assert dotted(nested) == dotted(flat) == flat


def test_a_domain_in_an_override_joins_the_run_files() -> None:
    path = Path(__file__).parents[2] / "jobs/tune.yaml"
    before = runfile.load(path).tune.space
    after = runfile.load(
        path,
        [
            "tune.space.train.yolo.momentum={uniform: [0.8, 0.95]}",
            "tune.space.train.yolo.lr0.loguniform=[1e-3, 1e-2]",
        ],
    ).tune.space
    assert after.keys() == {*before, "train.yolo.momentum"}
    assert after["train.yolo.lr0"].arguments == [0.001, 0.01]


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("{unifrom: [0, 1]}", "write one of uniform, quniform, loguniform, randint, choice"),
        ("3", "write one of uniform"),
        ("{uniform: [0, 1], choice: [1]}", "write one of uniform"),
        ("{uniform: [1, 0]}", "uniform wants its lower end first"),
        ("{uniform: [0]}", "uniform"),
        ("{loguniform: [0, 1]}", "greater than 0"),
        ("{randint: [3, 4]}", "one number only"),
        ("{randint: [0.5, 4]}", "valid integer"),
        ("{choice: []}", "at least 1 item"),
    ],
)
def test_a_wrong_domain_is_one_line_with_its_place(tmp_path: Path, domain: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\ntune:\n  space:\n    train.yolo.lr0: {domain}\n")
    with pytest.raises(ValueError, match=r"run\.yaml:4: tune\.space\.train\.yolo\.lr0") as caught:
        runfile.load(path)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """Runs that were handed to train's checks, which know of Ultralytics and need no dataset here."""
    from raypar import train
    from raypar.train.recipe import settings

    seen: list[RunConfig] = []

    def check(config: RunConfig) -> None:
        settings(config.train.yolo, batch=config.train.batch, seed=config.seed, task="detect")
        seen.append(config)

    monkeypatch.setattr(train, "check_settings", check)
    monkeypatch.setattr(Manifest, "load", lambda folder: SimpleNamespace(task="detect"))
    return seen


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space is empty"),
        (
            {"train.yolo.lr": {"uniform": [0, 1]}},
            "Ultralytics has no such setting; did you mean 'train.yolo.lr",
        ),
        ({"train.bacth": {"choice": [4]}}, "no such setting; did you mean 'train.batch'?"),
        ({"lr0": {"uniform": [0, 1]}}, "no such setting"),
        ({"name": {"choice": ["x"]}}, "is the same for every trial"),
        ({"storage": {"choice": ["x"]}}, "is the same for every trial"),
        ({"evaluate.conf": {"uniform": [0, 1]}}, "is the same for every trial"),
        ({"train.max_failures": {"choice": [1]}}, "write it in section train"),
        ({"train.num_workers": {"choice": [1]}}, "write it in section train"),
        ({"train.yolo.epochs": {"choice": [1]}}, "trials are compared epoch by epoch"),
        ({"train.yolo.device": {"choice": [0]}}, "write train.use_gpu"),
        ({"train.yolo.lr0": {"choice": ["fast"]}}, "'fast' cannot be had"),
        ({"train.yolo.mosaic": {"uniform": [0, 2]}}, "tune.space.train.yolo.mosaic: 2.0 cannot be had"),
        ({"train.yolo.close_mosaic": {"uniform": [0, 9]}}, "cannot be had"),
        ({"train.batch": {"randint": [2, 9]}}, "shared equally by 2 workers"),
    ],
)
def test_a_wrong_space_is_refused(checked: list[RunConfig], space: dict[str, Any], message: str) -> None:
    config = config_of(space)
    config = config.model_validate(
        {
            **config.model_dump(mode="json"),
            "train": {**config.train.model_dump(mode="json"), "num_workers": 2},
        }
    )
    with pytest.raises(ValueError) as caught:
        raypar.tune.check(config)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_right_space_is_tried_at_its_edges(checked: list[RunConfig]) -> None:
    assert "20 trials over 3 setting(s)" in raypar.tune.check(config_of())
    assert {c.train.yolo.get("lr0") for c in checked} >= {None, 1e-4, 1e-1}
    assert {c.train.batch for c in checked} == {4, 8, 16}


def test_what_optimizer_auto_ignores_is_refused(checked: list[RunConfig]) -> None:
    value = config_of().model_dump(mode="json")
    del value["train"]["yolo"]["optimizer"]
    with pytest.raises(ValueError, match="optimizer=auto chooses it itself"):
        raypar.tune.check(RunConfig.model_validate(value))
    value["tune"]["space"]["train.yolo.optimizer"] = {"choice": ["SGD", "AdamW"]}
    raypar.tune.check(RunConfig.model_validate(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tune": {"metric": "top1"}},
            "tune.metric: top1 is no metric of this task: there are fitness, map50_95",
        ),
        ({"tune": {"grace_epochs": 9}}, "tune.grace_epochs=9 is more than train.yolo.epochs=4"),
        ({"train": {"num_workers": {"min": 1, "max": 2}}}, "train.num_workers: trials that grow"),
        ({"train": {"yolo": {"val": False}}}, "train.yolo.val=false"),
    ],
)
def test_other_settings_that_are_refused(
    checked: list[RunConfig], change: dict[str, Any], message: str
) -> None:
    value = config_of().model_dump(mode="json")
    runfile._merge(value, change)
    with pytest.raises(ValueError) as caught:
        raypar.tune.check(RunConfig.model_validate(value))
    assert message in str(caught.value)


def test_without_optuna(checked: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raypar.tune, "find_spec", lambda name: None)
    assert raypar.tune.check(config_of()).endswith("by random")
    with pytest.raises(ValueError, match="Optuna is not installed: pip install optuna"):
        raypar.tune.check(config_of(search="optuna"))


def test_dry_run_without_a_dataset_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"name: a\nstorage: {tmp_path}\ntune: {{space: {{train.batch: {{choice: [4, 8]}}}}}}\n")
    assert main(["tune", str(path), "--dry-run"]) == 2
    assert "run `raypar prepare`" in capsys.readouterr().err


def test_a_trials_run_is_its_own(tmp_path: Path) -> None:
    config = config_of(storage=str(tmp_path))
    config = config.model_validate(
        {
            **config.model_dump(mode="json"),
            "train": {**config.train.model_dump(mode="json"), "overwrite": True},
        }
    )
    params = {"train.yolo.lr0": 0.02, "train.batch": 8}
    run = space.trial_run(config, "trial_003", params)
    assert run.folder.uri == f"{tmp_path}/a/tune/trial_003"
    assert run.dataset_folder.uri == f"{tmp_path}/a/dataset"
    assert (run.train.yolo["lr0"], run.train.batch, run.train.yolo["imgsz"]) == (0.02, 8, 64)
    assert not run.train.overwrite, "a trial that goes on would begin anew"
    (tmp_path / "run.yaml").write_text(runfile.dump(run))
    assert runfile.load(tmp_path / "run.yaml") == run
    in_store = space.trial_run(config_of(storage="s3://bucket/runs?scheme=http"), "trial_000", params)
    assert in_store.folder.uri == "s3://bucket/runs/a/tune/trial_000?scheme=http"
    assert in_store.dataset_folder.uri == "s3://bucket/runs/a/dataset?scheme=http"


def test_random_settings_follow_from_seed_and_number() -> None:
    domains = config_of().tune.space
    drawn = [space.draw(domains, 0, n) for n in range(50)]
    assert drawn == [space.draw(domains, 0, n) for n in range(50)]
    assert len({json.dumps(d) for d in drawn}) == 50
    assert drawn[0] != space.draw(domains, 1, 0)
    assert {d["train.batch"] for d in drawn} == {4, 8}


def test_what_a_training_used_is_compared() -> None:
    used = {"seed": 0, "train": {"batch": 8, "yolo": {"lr0": 0.01}}}
    assert space.used_others({"train.batch": 8, "train.yolo.lr0": 0.01, "seed": 0}, used) == ""
    assert (
        space.used_others({"train.batch": 4, "train.yolo.lr0": 0.02}, used)
        == "train.batch was 8, not 4, train.yolo.lr0 was 0.01, not 0.02"
    )
    assert "was None" in space.used_others({"train.yolo.mosaic": 1.0}, used)


def test_the_score_is_that_of_the_best_weights() -> None:
    lines = [
        {"epoch": 1, "fitness": 0.2, "map50": 0.5},
        {"epoch": 2, "fitness": 0.4, "map50": 0.45},
        {"epoch": 3, "fitness": 0.3, "map50": 0.6},
    ]
    assert best_so_far(lines, "map50") == (2, 0.45)
    assert best_so_far(lines[:1], "map50") == (1, 0.5)
    assert best_so_far([{"epoch": 1}], "map50") is None


def record(
    number: int,
    state: str,
    score: float | None,
    scores: list[list[float]] | None = None,
    **more: Any,
) -> study.Record:
    params = {"train.yolo.lr0": 0.01 * (number + 1), "train.batch": 8, "train.yolo.mosaic": 0.5}
    return {"trial": f"trial_{number:03d}", "state": state, "params": params, "score": score, "best_epoch": 2, "epochs": 4, "began": 0.0,
            "seconds": 3.0, "own_settings": True, "error": None, "scores": scores or [], **more}  # fmt: skip


def test_asha_stops_by_what_trials_before_a_restart_reached() -> None:
    config = config_of(grace_epochs=1, reduction_factor=2)
    late = SimpleNamespace(trial_id="new")

    def decision(records: list[study.Record]) -> str:
        scheduler = study.make_scheduler(config, 4, records)
        scheduler.on_trial_add(None, late)
        return str(scheduler.on_trial_result(None, late, {"epoch": 1, "score": 0.5}))

    assert decision([]) == "CONTINUE"
    assert decision([record(0, "finished", 0.9, [[1, 0.8], [2, 0.9]])]) == "STOP"
    assert decision([record(0, "running", 0.9, [[1, 0.8]])]) == "CONTINUE", (
        "one that goes on tells its epochs again itself"
    )


def test_optuna_knows_earlier_trials_and_draws_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    config = config_of()
    first = study.make_optuna(config, []).suggest("x")
    records = [
        record(0, "finished", 0.9),
        record(1, "failed", None),
        record(2, "stopped", 0.1),
        record(3, "running", None),
    ]
    again = study.make_optuna(config, records)
    assert [t.state.name for t in again._ot_study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert again.suggest("x") != first
    assert first.keys() == SPACE.keys()


def a_study(tmp_path: Path, records: list[study.Record], **tune: Any) -> study.Study:
    config = config_of(storage=str(tmp_path), search="random", num_trials=4, **tune)
    return study.Study(config, 4, None, records, "/")


def test_a_study_is_written_down_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = a_study(tmp_path, [])
    asked = [ours.suggest(f"id{i}") for i in range(3)]
    assert [a and a["run"]["name"] for a in asked] == ["trial_000", "trial_001", "trial_002"]
    (tmp_path / "a/tune/trial_000/train").mkdir()
    params = ours.records[0]["params"]
    used = {
        "train": {
            "batch": params["train.batch"],
            "yolo": {"lr0": params["train.yolo.lr0"], "mosaic": params["train.yolo.mosaic"]},
        }
    }
    (tmp_path / "a/tune/trial_000/train/used.json").write_text(json.dumps(used))
    ours.on_trial_result("id0", {"epoch": 1, "score": 0.2, "best_epoch": 1})
    ours.on_trial_complete("id0", {"epoch": 2, "score": 0.3, "best_epoch": 2, "state": "finished"})
    ours.on_trial_complete(
        "id1",
        {"epoch": 0, "score": float("nan"), "best_epoch": 0, "state": "failed", "error": "out of memory"},
    )
    ours.is_interrupted = True
    ours.on_trial_complete("id2", {"epoch": 1, "score": 0.1, "best_epoch": 1})
    told = capsys.readouterr().out
    assert "trial_000 finished; fitness 0.3000 after 2 epochs" in told
    assert "trial_001 failed: out of memory" in told

    found = study.read(ours.run)
    assert [r["state"] for r in found] == ["finished", "failed", "running"]
    assert found[0]["scores"] == [[1, 0.2], [2, 0.3]]
    assert (found[0]["own_settings"], found[1]["own_settings"]) == (True, None)
    again = a_study(tmp_path, found)
    assert [a and a["run"]["name"] for a in (again.suggest("id0"), again.suggest("id1"))] == [
        "trial_002",
        "trial_003",
    ]
    assert [r["params"] for r in again.records[:3]] == [r["params"] for r in ours.records]
    assert study.best_of(again.records) == found[0]


def test_a_trial_that_used_other_settings_has_failed(tmp_path: Path) -> None:
    ours = a_study(tmp_path, [])
    ours.suggest("id")
    (tmp_path / "a/tune/trial_000/train").mkdir()
    (tmp_path / "a/tune/trial_000/train/used.json").write_text(
        json.dumps({"train": {"batch": 2, "yolo": {}}})
    )
    ours.on_trial_complete("id", {"epoch": 4, "score": 0.9, "best_epoch": 2, "state": "finished"})
    assert (ours.records[0]["state"], ours.records[0]["own_settings"]) == ("failed", False)
    assert "did not train with its own settings: train.batch was 2" in ours.records[0]["error"]
    assert study.best_of(ours.records) is None


def a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> Trial:
    """A trial of 3 epochs without Ray, whose training is ``run(out)``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trial.train, "run", lambda config, **_: run(config.folder / "train"))
    monkeypatch.setattr(trial, "LOOK_EVERY_S", 0.01)
    ours = Trial.__new__(Trial)
    ours.setup(
        {
            "run": {"name": "trial_000", "storage": str(tmp_path)},
            "run_id": "x",
            "epochs": 3,
            "metric": "map50",
            "folder": str(tmp_path),
        }
    )
    return ours


def epochs(*fitness: float) -> str:
    return "".join(
        json.dumps({"epoch": i + 1, "fitness": f, "map50": f / 2}) + "\n" for i, f in enumerate(fitness)
    )


def told(ours: Trial) -> list[dict[str, Any]]:
    results = [ours.step()]
    while not results[-1].get("done"):
        results.append(ours.step())
    return results


def test_a_trial_tells_every_epoch_and_the_last_one_with_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Folder) -> None:
        out.write("metrics.jsonl", epochs(0.4, 0.2))  # of an earlier start: told again
        time.sleep(0.1)
        out.write("metrics.jsonl", epochs(0.4, 0.2, 0.6))
        time.sleep(0.1)

    results = told(a_trial(tmp_path, monkeypatch, run))
    assert [(r["epoch"], r["score"], r["best_epoch"]) for r in results] == [
        (1, 0.2, 1),
        (2, 0.2, 1),
        (3, 0.3, 3),
    ]
    assert [r.get("state") for r in results] == [None, None, "finished"]


def test_a_trial_that_fails_says_why_and_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Folder) -> None:
        out.write("metrics.jsonl", epochs(0.4))
        raise RuntimeError("training failed: out of memory")

    last = told(a_trial(tmp_path, monkeypatch, run))[-1]
    assert (last["state"], last["error"], last["epoch"]) == ("failed", "training failed: out of memory", 1)


def test_a_stopped_trial_asks_its_workers_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()

    def ask_to_stop(run_id: str) -> bool:
        asked.set()
        return True

    def run(out: Folder) -> None:
        out.write("metrics.jsonl", epochs(0.1))
        assert asked.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr("raypar.train.launch.ask_to_stop", ask_to_stop)
    ours = a_trial(tmp_path, monkeypatch, run)
    assert ours.step()["epoch"] == 1
    ours.cleanup()
    assert not ours.training.is_alive()
    assert ours.outcome == {"state": "stopped"}


def test_best_yaml_is_taken_as_overrides(tmp_path: Path) -> None:
    best = record(3, "finished", 0.5)
    (tmp_path / "best.yaml").write_text(report.best_yaml(best, "map50_95", 9))
    (tmp_path / "run.yaml").write_text("name: a\ntrain: {batch: 2, yolo: {epochs: 7, lr0: 1}}\n")
    config = runfile.load(tmp_path / "run.yaml", [f"@{tmp_path}/best.yaml"])
    assert (config.train.batch, config.train.yolo) == (8, {"epochs": 7, "lr0": 0.04, "mosaic": 0.5})
    assert (
        runfile.load(tmp_path / "run.yaml", [f"@{tmp_path}/best.yaml", "train.batch=4"]).train.batch == 4
    ), "the later of two wins"
    assert yaml.safe_load((tmp_path / "best.yaml").read_text()) == {
        "train": {"yolo": {"lr0": 0.04, "mosaic": 0.5}, "batch": 8}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "other.yaml: cannot read the run file"),
        ("train: {bacth: 3}\n", "other.yaml:1: train.bacth: no such setting; did you mean 'batch'?"),
    ],
)
def test_a_wrong_file_of_overrides_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    (tmp_path / "run.yaml").write_text("name: a\n")
    if text:
        (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        runfile.load(tmp_path / "run.yaml", [f"@{tmp_path}/other.yaml"])
    assert message in str(caught.value)


def test_the_screen_the_table_and_the_picture(tmp_path: Path) -> None:
    records = [
        record(0, "finished", 0.5),
        record(1, "stopped", 0.7),
        record(2, "failed", None, error="out of memory"),
        record(3, "finished", 0.6),
    ]
    best = study.best_of(records)
    assert best == records[3], "a trial that was stopped early is not the best, whatever it reached"
    lines = report.screen(records, best, "map50")
    assert lines[0] == "4 trials: 2 finished, 1 stopped, 1 failed; each used its own settings"
    assert [line.split()[0] for line in lines[1:]] == [
        "trial",
        "trial_003",
        "trial_000",
        "trial_001",
        "trial_002",
    ]
    assert lines[-1] == "trial_002 failed: out of memory"
    rows = report.table(records, "map50").splitlines()
    assert (
        rows[0]
        == "trial,state,map50,best_epoch,epochs,seconds,own_settings,train.yolo.lr0,train.batch,train.yolo.mosaic,error"
    )
    assert len(rows) == 5
    assert report.picture(config_of(), records, best).startswith(b"\x89PNG")
