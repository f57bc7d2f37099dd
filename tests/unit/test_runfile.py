"""The run file's loader: strict YAML, overrides, and one clear line a mistake."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar import runfile
from raypar.runfile import Loader, dump, load, parse_override


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5", 0.5), ("1.", 1.0), ("0.01", 0.01), (".inf", float("inf")),
        ("10", 10), ("010", 10), ("-3", -3), ("0o17", "0o17"), ("1_000", "1_000"), ("1:30", "1:30"), ("2026-01-02", "2026-01-02"),
        ("true", True), ("False", False), ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"),
        ("null", None), ("~", None), ("", None), ("'1e-3'", "1e-3"), ("{min: 1, max: 2}", {"min": 1, "max": 2}), ("[1, a]", [1, "a"]),
    ],
)  # fmt: skip
def test_scalars_are_what_people_expect(text: str, value: object) -> None:
    read = yaml.load(text, Loader)
    assert read == value
    assert type(read) is type(value)


def test_plain_pyyaml_would_have_been_wrong() -> None:
    """The reason for our own loader, so that it goes when PyYAML mends its ways."""
    assert yaml.safe_load("[1e-3, off, 1:30, 010]") == ["1e-3", False, 90, 8]
    assert yaml.safe_load("2026-01-02") == datetime.date(2026, 1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nseed: 3\nseed: 4\n", "run.yaml:3: 'seed' is written twice"),
        ("name: a\ntrain:\n  batch: 2\n  yolo: {lr0: 1, lr0: 2}\n", "run.yaml:4: 'lr0' is written twice"),
        ("name: a\n\tseed: 3\n", "run.yaml:2: "),
        ("name: [a\n", "run.yaml:2: "),
        ("- a\n", "holds settings (name: ..., train: ...), this one holds list"),
        ("", "run.yaml: name: is missing"),
        ("name: a\ntrain:\n  num_worker: 2\n", "run.yaml:3: train.num_worker: no such setting; did you mean 'num_workers'?"),
        ("name: a\ntrain:\n  epochs: 2\n", "run.yaml:3: train.epochs: no such setting; did you mean 'train.yolo.epochs'?"),
        ("name: a\nnum_workers: 2\n", "run.yaml:2: num_workers: no such setting; did you mean 'train.num_workers'?"),
        ("name: a\ntrian: {}\n", "run.yaml:2: trian: no such setting; did you mean 'train'?"),
        ("name: a\nprepare: {format: shapes, shapes: {hight: 3}}\n", "prepare.shapes.hight: no such setting; did you mean 'height'?"),
        ("name: a\nserve: {num_replicas: {mn: 2}}\n", "run.yaml:2: serve.num_replicas.mn: no such setting; did you mean 'min'?"),
        ("name: a\nserve: {num_replicas: 0}\n", "run.yaml:2: serve.num_replicas: should be greater than 0"),
        ("name: a\ntrain:\n  batch: -1\n", "run.yaml:3: train.batch: should be greater than 0, not -1"),
        ("name: a\ntrain: {use_gpu: maybe}\n", "train.use_gpu: should be a valid boolean"),
        ("name: 3\n", "run.yaml:1: name: should be a valid string, not 3"),
        ("name: a b\n", "run.yaml:1: name: should match pattern"),
        ("name: a\ntrain: 3\n", "run.yaml:2: train: should be a valid dictionary"),
        ("name: a\ntrain: {yolo: {device: 0}}\n", "'device' is raypar's: write train.use_gpu"),
        ("name: a\ntrain:\n  yolo:\n    epoch: 3\n", "run.yaml:4: train.yolo.epoch: no such setting of Ultralytics; did you mean 'epochs'?"),
        ("name: a\nprepare: {format: voc}\n", "run.yaml:2: prepare: source is missing"),
        ("name: a\nprepare:\n", "run.yaml:2: prepare: source is missing"),
        ("name: a\ntrain: {batch: 10, num_workers: 3}\n", "cannot be shared equally by 3 workers"),
    ],
)  # fmt: skip
def test_one_clear_line(write, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(write(text))
    said = str(caught.value)
    assert message in said
    assert "\n" not in said, "one mistake, one line"
    assert "pydantic" not in said


def test_every_mistake_has_its_line(write) -> None:
    with pytest.raises(ValueError) as caught:
        load(write("name: a\ntrain:\n  batch: x\n  num_worker: 1\nserve:\n  prt: 80\n"))
    assert [line.split(": ")[0].split(":")[-1] for line in str(caught.value).splitlines()] == ["3", "4", "6"]


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml: cannot read the run file: No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="cannot read the run file: Is a directory"):
        load(tmp_path)


def test_overrides_win_and_the_later_one_too(write) -> None:
    path = write("name: a\ntrain: {batch: 8, yolo: {lr0: 0.1}}\n")
    config = load(
        path,
        [
            "train.batch=4",
            "train.yolo.lr0=1e-3",
            "train.batch=2",
            "train.yolo.cos_lr=true",
            "prepare.format=shapes",
            "prepare.shapes.train=7",
        ],
    )
    assert config.train.batch == 2
    assert config.train.yolo == {"lr0": 0.001, "cos_lr": True}
    assert config.prepare is not None
    assert config.prepare.shapes.train == 7


def test_override_replaces_a_short_form(write) -> None:
    config = load(write("name: a\nserve: {num_replicas: 1}\n"), ["serve.num_replicas.min=2", "serve.num_replicas.max=4"])
    assert config.serve.num_replicas.model_dump() == {"min": 2, "max": 4}  # type: ignore[union-attr]


def test_override_splits_at_the_first_equals_sign() -> None:
    assert parse_override("predict.source=s3://bucket/a=b?c=d") == (("predict", "source"), "s3://bucket/a=b?c=d")


@pytest.mark.parametrize("text", ["train", "=3", "train.=3", ".x=3", ""])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ValueError, match=r"write section\.key=value"):
        parse_override(text)


def test_override_errors_name_the_override(write) -> None:
    path = write("name: a\ntrain:\n  batch: 8\n")
    with pytest.raises(ValueError, match=r"^train\.num_worker=2: train\.num_worker: no such setting; did you mean 'num_workers'\?$"):
        load(path, ["train.num_worker=2"])
    with pytest.raises(ValueError, match=r"^train\.batch=\[1: the value is not YAML"):
        load(path, ["train.batch=[1"])
    with pytest.raises(ValueError, match=r"^train\.batch=x: train\.batch: should be a valid integer"):
        load(path, ["train.batch=x"])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.from_regex("[a-z][a-z0-9]{0,8}", fullmatch=True).filter(lambda k: k not in runfile.RunConfig.model_fields), SCALARS, max_size=5
    )
)
def test_dump_reads_back_to_the_same(extra: dict[str, object]) -> None:
    from raypar.config import OWNED_BY_RAYPAR

    yolo = {k: v for k, v in extra.items() if k not in OWNED_BY_RAYPAR}
    config = runfile.RunConfig.model_validate({"name": "x", "train": {"yolo": {**yolo, "text": "1e-3", "word": "off", "time": "1:30"}}})
    assert runfile.RunConfig.model_validate(yaml.load(dump(config), Loader)) == config
