"""Which checkpoints a run takes, what must stay as it was begun, and what happens when its length is raised."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import raypar.train
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.storage import Folder
from raypar.train import checkpoint, identity
from raypar.train.identity import Growth
from raypar.train.recipe import iterations, optimizer_of, settings

MANIFEST = Manifest(
    task="detect",
    class_names=("a",),
    splits={
        "train": Split(
            shards=(Shard(path="train/00000.parquet", num_bytes=1, sha256="", row_groups=(64,)),),
            num_images=64,
        )
    },
    source="",
)
YOLO: dict[str, Any] = {"model": "yolov8n.yaml", "yolo": {"epochs": 2, "lr0": 0.1}}


def begun(**yolo: Any) -> dict[str, Any]:
    """The content of settings.json of a new run."""
    return identity.recorded(None, {**YOLO, "yolo": {**YOLO["yolo"], **yolo}})


def state_of(run: dict[str, Any], cursor: int, **other: Any) -> dict[str, Any]:
    mine = {name: run[name] for name in ("run", "fingerprint", "length")}
    return {"cursor": cursor, "history": [{}, {}], "is_finished": True, "identity": mine, **other}


def test_a_run_takes_no_checkpoint_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, one, other = Folder.at(tmp_path), identity.of(begun()), identity.of(begun())
    changed = identity.of(identity.recorded(begun(), YOLO) | {"id": one["run"], "sha256": "another"})
    checkpoint.write(out, state_of(one, 8), keep=9)
    checkpoint.write(out, state_of(other, 16), keep=9)  # of an overwritten run, whose writer was late
    checkpoint.write(out, state_of(changed, 24), keep=9)
    without = state_of(one, 32)
    del without["identity"]
    checkpoint.write(out, without, keep=9)  # of an older raypar, copied in
    shutil.copytree(tmp_path / checkpoint.name_of(8), tmp_path / checkpoint.name_of(40))  # another's name
    found = checkpoint.newest(out, 1.0, one)
    assert found is not None
    assert found[0] == checkpoint.name_of(8)
    said = capsys.readouterr().out
    for cursor, why in (
        (16, "is of another run"),
        (24, "was made with other settings"),
        (32, "is of another run"),
        (40, "holds the state after 8 images"),
    ):
        assert f"train: {checkpoint.name_of(cursor)} {why} and is passed over" in said
    assert checkpoint.newest(out, 1.0, identity.of(begun())) is None, "a new run starts from the beginning"
    (tmp_path / checkpoint.name_of(8) / "state.pt").write_bytes(b"PK cut")
    with pytest.raises(
        ValueError, match=f"none of the checkpoints {checkpoint.name_of(8)} in .* can be read"
    ):
        checkpoint.newest(out, 1.0, one)
    torch.save({"model": 1}, tmp_path / checkpoint.name_of(8) / "state.pt")  # no state at all
    with pytest.raises(ValueError, match="can be read"):
        checkpoint.newest(out, 1.0, one)


def test_a_run_that_an_older_raypar_began_goes_on(tmp_path: Path) -> None:
    """Its settings and its checkpoints have no id; those that it writes from now on have none either, and it stays so."""
    out = Folder.at(tmp_path)
    old = {"cursor": 8, "history": [{}, {}], "is_finished": True}
    checkpoint.write(out, old, keep=9)
    recorded = identity.recorded(YOLO, {**YOLO, "newer": None})
    run = identity.of(recorded)
    assert checkpoint.newest(out, 1.0, run) is not None
    checkpoint.write(out, state_of(run, 16), keep=9)
    again = identity.of(identity.recorded(recorded, {**YOLO, "newest": None}))
    assert again == run
    assert (checkpoint.newest(out, 1.0, again) or ("",))[0] == checkpoint.name_of(16)
    assert identity.is_finished(old, run, epochs=2)


@pytest.mark.parametrize(
    ("then", "now", "grown"),
    [
        ({"epochs": 2}, {"epochs": 5}, Growth("epochs", 2, 5)),
        ({"epochs": 2}, {}, Growth("epochs", 2, 100)),  # Ultralytics' default
        ({"epochs": 2}, {"epochs": 2}, None),
        ({}, {"epochs": 5}, None),
        ({"time": 1}, {"time": 1.5}, Growth("time", 1, 1.5)),
        ({"time": 1, "epochs": 2}, {"time": 1, "epochs": 5}, None),  # the time decides
        ({"time": 2}, {"time": 1}, None),
        ({"epochs": 2}, {"epochs": 5, "time": 1}, None),
        ({"epochs": 2}, {"epochs": "many"}, None),
        ({"epochs": 2}, {"epochs": True}, None),
    ],
)
def test_what_counts_as_a_longer_run(then: dict[str, Any], now: dict[str, Any], grown: Growth | None) -> None:
    assert identity.growth({"yolo": then}, {"yolo": now}) == grown


def test_the_end_of_a_shorter_run_is_not_that_of_a_longer_one() -> None:
    before = begun(epochs=2)
    state = state_of(identity.of(before), 96)
    assert identity.is_finished(state, identity.of(before), epochs=2)
    longer = identity.recorded(before, {**YOLO, "yolo": {**YOLO["yolo"], "epochs": 5}})
    run = identity.of(longer)
    assert identity.of_another(state, run) is None
    assert not identity.is_finished(state, run, epochs=5)
    assert (run["begun_epochs"], run["length"]) == (2, 5)
    old = {"cursor": 96, "history": [{}, {}], "is_finished": True}  # of an older raypar
    assert not identity.is_finished(
        old, identity.of(identity.recorded(YOLO, {**YOLO, "yolo": {"epochs": 5}})), 5
    )
    early = state_of(run, 96)  # it stopped early, after two of five epochs
    assert identity.is_finished(early, run, epochs=5)
    hours = begun(time=1.0)
    more = identity.of(identity.recorded(hours, {**YOLO, "yolo": {**YOLO["yolo"], "time": 1.1}}))
    ended = state_of(identity.of(hours), 96)
    assert not identity.is_finished(ended, more, epochs=3)
    assert identity.is_finished(ended, more, epochs=2), "no further epoch fits"


def make_config(storage: Path, **train: Any) -> RunConfig:
    config = RunConfig.model_validate({"name": "run", "storage": str(storage), "train": train})
    MANIFEST.save(config.dataset_folder)
    return config


def begin(config: RunConfig) -> Folder:
    out = config.folder / "train"
    out.write_json(raypar.train.SETTINGS, identity.recorded(None, raypar.train.fingerprint(config)))
    return out


def test_only_the_length_may_be_raised(tmp_path: Path) -> None:
    out = begin(make_config(tmp_path, yolo={"epochs": 5}))

    def check(**train: Any) -> Growth | None:
        config = make_config(tmp_path, **train)
        return raypar.train._check_begun(config, raypar.train.fingerprint(config))

    assert check(yolo={"epochs": 5}) is None
    assert str(check(yolo={"epochs": 8})) == (
        "train.yolo.epochs was 5 and is 8 now: the run goes on from its newest checkpoint with the schedule of 8 epochs"
    )
    with pytest.raises(ValueError, match=r"other settings \(yolo.epochs: 5 then, 4 now\)"):
        check(yolo={"epochs": 4})
    with pytest.raises(ValueError, match=r"batch: 16 then, 8 now, yolo.epochs: 5 then, 8 now"):
        check(batch=8, yolo={"epochs": 8})
    out.write_json(raypar.train.SUMMARY, {})
    with pytest.raises(ValueError, match=r"raised from 5 to 8, and .* has no checkpoint to go on from"):
        check(yolo={"epochs": 8})
    checkpoint.write(out, {"cursor": 8}, keep=1)
    assert check(yolo={"epochs": 8}) is not None


def test_an_edited_model_yaml_is_another_model(tmp_path: Path) -> None:
    from ultralytics.utils import ROOT

    mine = tmp_path / "my_model.yaml"
    text = (ROOT / "cfg" / "models" / "v8" / "yolov8.yaml").read_text()
    mine.write_text(text)
    config = make_config(tmp_path, model=str(mine), yolo={"epochs": 5})
    out = begin(config)
    assert raypar.train._check_begun(config, raypar.train.fingerprint(config)) is None
    mine.write_text(f"# a comment changes nothing\n{text}")
    assert raypar.train._check_begun(config, raypar.train.fingerprint(config)) is None
    mine.write_text(text.replace("SPPF, [1024, 5]", "SPPF, [1024, 7]"))
    for yolo in ({"epochs": 5}, {"epochs": 8}):
        changed = make_config(tmp_path, model=str(mine), yolo=yolo)
        with pytest.raises(ValueError, match=r"the content of train.model, .*my_model.yaml, was changed"):
            raypar.train._check_begun(changed, raypar.train.fingerprint(changed))
    older = out.read_json(raypar.train.SETTINGS)
    del older["model_sha256"]  # as older runs have it: unknown
    out.write_json(raypar.train.SETTINGS, older)
    assert raypar.train._check_begun(config, raypar.train.fingerprint(config)) is None


def test_a_longer_run_keeps_its_optimizer() -> None:
    """optimizer=auto takes another one for long runs, to which the checkpoint's state would mean nothing."""
    args = settings({"epochs": 5000}, batch=16)
    longer = optimizer_of(args, 1000).__name__
    args.epochs = 5
    assert optimizer_of(args, 1000).__name__ != longer, "else the test shows nothing"
    before = iterations(args, 1000)
    args.epochs = 5000
    assert iterations(args, 1000, 5) == before
