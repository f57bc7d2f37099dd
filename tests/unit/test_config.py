"""The config models: strict, frozen, and plain enough to travel to workers."""

from __future__ import annotations

import json
import pickle

import pytest
from pydantic import BaseModel, ValidationError

from raypar.config import RunConfig
from raypar.yolo_keys import REFUSED


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    from raypar.runfile import _section_in

    inner = [s for field in model.model_fields.values() if (s := _section_in(field.annotation))]
    return [model, *(found for s in inner for found in sections(s))]


@pytest.mark.parametrize("section", sections(RunConfig), ids=lambda s: s.__name__)
def test_every_section_is_strict_frozen_and_described(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"] is True
    assert section.__doc__
    if section.__name__ not in ("NumWorkers", "Autoscaling"):
        assert all(field.description for field in section.model_fields.values())


def test_cannot_be_changed() -> None:
    config = RunConfig(name="x")
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]


def test_travels_as_plain_data() -> None:
    config = RunConfig.model_validate({"name": "x", "train": {"yolo": {"lr0": 0.1}}})
    data = json.loads(json.dumps(config.model_dump(mode="json")))
    assert RunConfig.model_validate(data) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("where", sorted({x.instead for x in REFUSED.values() if x.instead}))
def test_the_place_to_write_instead_exists(where: str) -> None:
    section: type[BaseModel] = RunConfig
    from raypar.cli import VERBS
    from raypar.runfile import _section_in

    if where.startswith("raypar "):
        assert where.split()[1] in VERBS
        return
    for part in where.partition(",")[0].split("."):
        assert part in section.model_fields, where
        section = _section_in(section.model_fields[part].annotation) or section


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "../x", ".hidden"])
def test_name_is_one_folder(name: str) -> None:
    with pytest.raises(ValidationError):
        RunConfig(name=name)


@pytest.mark.parametrize(
    ("batch", "num_workers", "is_right"), [(16, 1, True), (16, 4, True), (16, 3, False), (2, 4, False)]
)
def test_batch_divides_among_workers(batch: int, num_workers: int, is_right: bool) -> None:
    settings = {"name": "x", "train": {"batch": batch, "num_workers": num_workers}}
    if is_right:
        assert RunConfig.model_validate(settings).train.batch == batch
    else:
        with pytest.raises(ValidationError, match="multiple of"):
            RunConfig.model_validate(settings)


def test_folder() -> None:
    assert RunConfig(name="x", storage="/data/runs").folder.uri == "/data/runs/x"
    assert RunConfig(name="x", storage="s3://bucket/prefix/").folder.uri == "s3://bucket/prefix/x"


@pytest.mark.parametrize("key", ["channels_last", "compile"])
def test_what_does_not_go_with_shared_weights_is_refused(key: str) -> None:
    settings = {"name": "x", "train": {"parallel": "fsdp", "yolo": {key: True}}}
    with pytest.raises(ValidationError, match=f"yolo.{key} .*leave one of them out"):
        RunConfig.model_validate(settings)
