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
from raypar.yolo_keys import HONOURED, KEYS, REFUSED


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
        ("name: a\ntrain: {use_gpu: maybe}\n", "train.use_gpu: should be true or false or 'auto', not 'maybe'"),
        ("name: 3\n", "run.yaml:1: name: should be text, not 3"),
        ("name: a b\n", "run.yaml:1: name: should consist of the letters a-z and A-Z, digits, '-', '_' and '.' (no '.' in front), not 'a b'"),
        ("name: a\nserve: {route_prefix: a}\n", "serve.route_prefix: should begin with '/' and hold no '{' and no '}', not 'a'"),
        ("name: a\ntrain: 3\n", "run.yaml:2: train: should be a section of settings, not 3"),
        ("name: a\ntrain: {yolo: 3}\n", "run.yaml:2: train.yolo: should be a section of settings, not 3"),
        ("name: a\ntrain: {num_workers: x}\n", "train.num_workers: should be an integer or a section of settings, not 'x'"),
        ("name: a\ntrain: {lr0: x}\n", "run.yaml:2: train.lr0: no such setting; did you mean 'train.yolo.lr0'?"),
        ("name: a\ntrain:\n  3: x\n", "run.yaml:3: train.3: Keys should be strings"),
        ("name: a\ntrain: {yolo: {device: 0}}\n", "run.yaml:2: train.yolo: 'device' is refused: Ray places the workers; write train.use_gpu instead"),
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


@pytest.mark.parametrize(
    ("override", "verb", "hint"),
    [
        ("train.device=0", "train", "did you mean 'train.use_gpu'?"),
        ("device=0", "train", "did you mean 'train.use_gpu'?"),
        ("device=0", "evaluate", "did you mean 'evaluate.use_gpu'?"),
        ("serve.device=0", "train", "did you mean 'serve.use_gpu'?"),
        ("workers=4", "train", "'workers' is refused: Ray Data reads ahead with the CPUs that are free; leave it out"),
        ("train.workers=4", "train", "'workers' is refused: Ray Data reads ahead"),
        ("train.resume=true", "train", "'resume' is refused: a run goes on from its newest checkpoint"),
        ("data=x.yaml", "train", "'data' is refused: training reads the dataset that `raypar prepare` wrote; write prepare.source instead"),
        ("train.data=x.yaml", "train", "'data' is refused: "),
        ("imgsz=640", "train", "did you mean 'train.yolo.imgsz'?"),
        ("imgsz=640", "predict", "did you mean 'predict.imgsz'?"),
        ("train.imgsz=640", "predict", "did you mean 'train.yolo.imgsz'?"),
        ("epochs=10", "train", "did you mean 'train.yolo.epochs'?"),
        ("epochs=10", "prepare", "did you mean 'train.yolo.epochs'?"),
        ("tune.epochs=10", "tune", "did you mean 'train.yolo.epochs'?"),
        ("epoch=10", "train", "did you mean 'train.yolo.epochs'?"),
        ("train.epoch=10", "train", "did you mean 'train.yolo.epochs'?"),
        ("lr0=0.01", "train", "did you mean 'train.yolo.lr0'?"),
        ("batch=4", "evaluate", "did you mean 'evaluate.batch'?"),
        ("batch=4", "serve", "did you mean 'serve.max_batch_size'?"),
        ("train.weights=a.pt", "train", "did you mean 'train.model'?"),
        ("weights=a.pt", "train", "did you mean 'train.model'?"),
        ("model=a.pt", "predict", "did you mean 'predict.weights'?"),
        ("source=x", "prepare", "did you mean 'prepare.source'?"),
        ("port=80", "train", "did you mean 'serve.port'?"),
        ("train.seed=3", "train", "did you mean 'seed', at the top level?"),
        ("xyzzy=3", "train", "there are name, storage, "),
        ("train.yolo.num_workers=2", "train", "did you mean 'train.num_workers'?"),
        ("train.yolo.devic=2", "train", "'device' is refused: Ray places the workers; write train.use_gpu instead"),
        ("train.save=true", "train", "'save' is refused: "),
        ("train.conf=0.1", "train", "did you mean 'train.yolo.conf'?"),
        ("train.augmentations=[]", "train", "did you mean 'train.albumentations'?"),
        ("predict.half=true", "predict", "did you mean 'predict.precision'?"),
        ("predict.lr0=1", "predict", "did you mean 'train.yolo.lr0'?"),
    ],
)  # fmt: skip
def test_words_of_ultralytics_lead_to_where_they_belong(write, override: str, verb: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(write("name: a\n"), [override], verb)
    said = str(caught.value)
    assert said.startswith(f"{override}: {override.partition('=')[0]}: no such setting")
    assert f"; {hint}" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "override",
    ["predict.save=true", "save=true", "predict.augment=true", "predict.classes=[0]", "evaluate.plots=true", "evaluate.cache=ram",
     "predict.fraction=0.5", "predict.append=true", "export.batch=4", "export.iou=0.5", "predict.split=val", "predict.cache=true",
     "evaluate.source=x", "serve.workers=2", "predict.verbose=true", "evaluate.save_json=true", "predict.max_failures=3"],
)  # fmt: skip
def test_a_word_that_another_section_uses_otherwise_is_not_suggested(write, override: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(write("name: a\n"), [override], "predict")
    said = str(caught.value)
    assert "; there are " in said
    assert "did you mean" not in said
    assert "refused" not in said, "the reason is one of training's"


def words() -> set[str]:
    """All that somebody may write, and somewhat misspelt too."""
    known = {*KEYS, *runfile.ALSO_CALLED}
    for section in (runfile.RunConfig, *runfile._sections().values()):
        known |= set(section.model_fields)
    return known | {word[:-1] for word in known if len(word) > 3}


@pytest.mark.parametrize("verb", runfile._sections())
def test_what_is_suggested_is_a_setting_of_that_section_or_of_training_alone(verb: str) -> None:
    sections = runfile._sections()
    for word in words() - set(sections[verb].model_fields):
        hint = runfile._did_you_mean((verb, word), verb)
        if not hint.startswith("; did you mean '"):
            assert hint.startswith(("; there are ", "; '")), hint
            continue
        *above, name = hint.split("'")[1].split(".")
        if above in (["train", "yolo"], ["train"]) and verb in ("train", "tune"):
            assert name in (HONOURED if len(above) == 2 else sections["train"].model_fields), hint
        elif above == ["train", "yolo"]:
            assert HONOURED[name].is_of_training_alone, f"{verb}.{word}: {hint}"
        elif hint.endswith("at the top level?"):
            assert name in runfile.RunConfig.model_fields
        else:
            assert above in ([], [verb]), f"{verb}.{word}: {hint}"
            assert name in sections[verb].model_fields


def test_every_pattern_is_said_in_words() -> None:
    sections = {
        name: section
        for name, field in runfile.RunConfig.model_fields.items()
        if (section := runfile._section_in(field.annotation))
    }
    fields = dict(runfile.RunConfig.model_fields)
    fields |= {
        f"{name}.{key}": field
        for name, section in sections.items()
        for key, field in section.model_fields.items()
    }
    assert {
        key for key, field in fields.items() if any(getattr(m, "pattern", None) for m in field.metadata)
    } == set(runfile.PATTERNS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: ../coco\ntrain: images/train\nval: images/val\nnc: 1\nnames: [a]\n", "this is a data.yaml, no run file: name it in one, as prepare: {source: "),
        ("train: [a, b]\nval: c\n", "this is a data.yaml, no run file"),
        ("nc: 80\nbackbone: []\nhead: []\n", "this is a model's YAML, no run file: name it in one, as train: {model: "),
    ],
)  # fmt: skip
def test_a_file_of_ultralytics_is_no_run_file(write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04\x80\xff", b"abcd\x00", "nam\xe9: a\n".encode("latin-1") * 2]
)
def test_a_binary_file_is_no_run_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"x\.pt: no run file: byte [0-9] is no text in UTF-8 \(a run file names weights, as train\.model\)$",
    ):
        load(path)


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
    config = load(
        write("name: a\nserve: {num_replicas: 1}\n"), ["serve.num_replicas.min=2", "serve.num_replicas.max=4"]
    )
    assert config.serve.num_replicas.model_dump() == {"min": 2, "max": 4}  # type: ignore[union-attr]


def test_override_splits_at_the_first_equals_sign() -> None:
    assert parse_override("predict.source=s3://bucket/a=b?c=d") == (
        ("predict", "source"),
        "s3://bucket/a=b?c=d",
    )


@pytest.mark.parametrize("text", ["train", "=3", "train.=3", ".x=3", ""])
def test_what_is_no_override(text: str) -> None:
    with pytest.raises(ValueError, match=r"write section\.key=value"):
        parse_override(text)


def test_override_errors_name_the_override(write) -> None:
    path = write("name: a\ntrain:\n  batch: 8\n")
    with pytest.raises(
        ValueError,
        match=r"^train\.num_worker=2: train\.num_worker: no such setting; did you mean 'num_workers'\?$",
    ):
        load(path, ["train.num_worker=2"])
    with pytest.raises(ValueError, match=r"^train\.batch=\[1: the value is not YAML"):
        load(path, ["train.batch=[1"])
    with pytest.raises(ValueError, match=r"^train\.batch=x: train\.batch: should be an integer"):
        load(path, ["train.batch=x"])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("{batch: 6}", ["train.yolo.device=0"], "train.yolo.device=0: train.yolo: 'device' is refused"),
        ("{batch: 8}", ["seed=2", "train.num_workers=3", "train.yolo.lr0=1"], "train.num_workers=3: train: batch 8 cannot be shared equally by 3"),
        ("{batch: 8}", ["train.num_workers=3", "train.batch=10"], "train.batch=10: train: batch 10 cannot be shared equally by 3"),
        ("{batch: 8}", ["prepare.format=voc", "seed=3"], "prepare.format=voc: prepare: source is missing"),
        ("{batch: 8}", ["train.num_workers.max=3"], "train.num_workers.max=3: train.num_workers.min: is missing"),
        ("{batch: 8}", ["device.x=3"], "device.x=3: device: no such setting"),
        ("{batch: 8}", ["train.batch.x=3"], "train.batch.x=3: train.batch: should be an integer"),
        ("{batch: 8, num_workers: 3}", ["train.yolo.lr0=1", "seed=2"], "run.yaml:2: train: batch 8 cannot be shared equally by 3"),
        ("{batch: 8, yolo: {device: 0}}", ["train.yolo.lr0=1"], "run.yaml:2: train.yolo: 'device' is refused"),
        ("{batch: x}", ["train.yolo.lr0=1"], "run.yaml:2: train.batch: should be an integer, not 'x'"),
    ],
)  # fmt: skip
def test_a_mistake_is_where_it_came_in(write, text: str, overrides: list[str], message: str) -> None:
    """Settings that are right one by one may be wrong together: then whoever came last is named, the run file or an override."""
    path = write(f"name: a\ntrain: {text}\n")
    with pytest.raises(ValueError) as caught:
        load(path, overrides)
    assert str(caught.value).removeprefix(f"{path.parent}/").startswith(message)
    assert "\n" not in str(caught.value)


def test_a_mistake_that_came_in_with_a_file_of_overrides(write, tmp_path: Path) -> None:
    (tmp_path / "three.yaml").write_text("seed: 2\ntrain:\n  num_workers: 3\n")
    (tmp_path / "best.yaml").write_text("train: {yolo: {lr0: 0.1}}\n")
    with pytest.raises(ValueError, match=r"three\.yaml:2: train: batch 8 cannot be shared"):
        load(write("name: a\ntrain: {batch: 8}\n"), [f"@{tmp_path}/three.yaml", f"@{tmp_path}/best.yaml"])
    with pytest.raises(ValueError, match=r"run\.yaml:2: train: batch 8 cannot be shared"):
        load(write("name: a\ntrain: {batch: 8, num_workers: 3}\n"), [f"@{tmp_path}/best.yaml"])


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
        st.from_regex("[a-z][a-z0-9]{0,8}", fullmatch=True).filter(
            lambda k: k not in runfile.RunConfig.model_fields
        ),
        SCALARS,
        max_size=5,
    )
)
def test_dump_reads_back_to_the_same(extra: dict[str, object]) -> None:
    yolo = {k: v for k, v in extra.items() if k not in REFUSED and k != "cfg"}
    config = runfile.RunConfig.model_validate(
        {"name": "x", "train": {"yolo": {**yolo, "text": "1e-3", "word": "off", "time": "1:30"}}}
    )
    assert runfile.RunConfig.model_validate(yaml.load(dump(config), Loader)) == config
