"""The run file: YAML without surprises, overrides, and one clear line for each mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raypar import runfile
from raypar.cli import main
from raypar.config import OWNED_BY_RAYPAR, RunConfig

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(p for p in (ROOT / "jobs").glob("*.yaml") if p.name not in {"runtime_env.yaml", "serve.yaml"})


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("path", JOBS, ids=lambda p: p.name)
def test_every_job_loads_and_begins_with_its_command(path: Path) -> None:
    assert runfile.load(str(path)).name
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert path.name in first


def test_a_dumped_run_file_is_the_same_run(tmp_path: Path) -> None:
    config = runfile.load(str(ROOT / "jobs" / "demo.yaml"), ["train.yolo.lr0=1e-3", "train.model=a=b.pt"])
    assert config.train.yolo["lr0"] == 0.001
    assert config.train.model == "a=b.pt"
    assert runfile.load(write(tmp_path, runfile.dump(config))) == config


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_floats_are_floats_however_they_are_written(value: float) -> None:
    for text in (f"{value!r}", f"{value:e}", f"{value:.3E}"):
        assert isinstance(yaml.load(text, runfile.Loader), int | float), text  # noqa: S506


@pytest.mark.parametrize(("text", "value"), [("off", "off"), ("yes", "yes"), ("true", True), ("1e-3", 0.001), ("2E+4", 2e4), ("12", 12), ("v1.e", "v1.e"), ("1.5", 1.5), ("e5", "e5")])
def test_words_are_words_and_numbers_numbers(text: str, value: object) -> None:
    loaded = yaml.load(text, runfile.Loader)  # noqa: S506
    assert loaded == value
    assert type(loaded) is type(value)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("name: a\nnmae: b", [], "nmae: no such setting; did you mean 'name'?"),
        ("name: a\ntrain: {num_worker: 2}", [], "train.num_worker: no such setting; did you mean 'num_workers'?"),
        ("name: a\nprepare: {format: shapes, shapes: {hieght: 3}}", [], "prepare.shapes.hieght: no such setting; did you mean 'height'?"),
        ("name: a\nevaluate: {cnof: 0.1}", [], "evaluate.cnof: no such setting; did you mean 'conf'?"),
        ("name: a\npredict: {sorce: x}", [], "predict.sorce: no such setting; did you mean 'source'?"),
        ("name: a\nexport: {fromat: onnx}", [], "export.fromat: no such setting; did you mean 'format'?"),
        ("name: a\nserve: {prot: 80}", [], "serve.prot: no such setting; did you mean 'port'?"),
        ("name: a", ["train.btach=3"], "train.btach: no such setting; did you mean 'batch'?"),
        ("name: a\ntrain: {batch: many}", [], "train.batch"),
        ("name: a\ntrain: {batch: 15, num_workers: 2}", [], "multiple of 2"),
        ("name: a\nname: b", [], "2: 'name' is written twice"),
        ("name: a\ntrain: {yolo: {batch: 3}}", [], "'batch' is raypar's: write train.batch"),
        ("train: {}", [], "name: is missing"),
        ("name: a\nprepare: {format: voc}", [], "source is missing"),
        ("- a", [], "this one holds list"),
        ("name: [", [], "run.yaml"),
        ("name: a", ["train"], "write section.key=value"),
        ("name: a", ["name.x=1"], "name"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError) as error:
        runfile.load(write(tmp_path, text), overrides)
    assert words in str(error.value)


def test_frozen_and_rebuilt_with_validation() -> None:
    config = RunConfig(name="a")
    with pytest.raises(ValueError, match="frozen"):
        config.name = "b"  # type: ignore[misc]


def test_what_raypar_owns_is_a_setting_of_ultralytics() -> None:
    from ultralytics.cfg import DEFAULT_CFG_DICT

    assert set(OWNED_BY_RAYPAR) <= set(DEFAULT_CFG_DICT), set(OWNED_BY_RAYPAR) - set(DEFAULT_CFG_DICT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "RUN", "train.yolo.epohcs=3"], "did you mean 'epochs'"),
        (["train", "RUN", "train.yolo.epochs=three"], "epochs"),
        (["train", "RUN"], "raypar prepare"),
        (["evaluate", "RUN"], "raypar prepare"),
        (["prepare", "RUN", "prepare.format=voc", "prepare.source=/no/such/place"], "/no/such/place"),
        (["predict", "RUN", "predict.source=RUN"], "predict.source"),
        (["serve", "RUN", "serve.weights=/no/such.pt"], "/no/such.pt"),
        (["prepare", "RUN", "storage=/proc/nowhere"], "cannot be written"),
    ],
)
def test_the_command_line_says_it_in_one_line_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    run_file = write(tmp_path, f"name: a\nstorage: {tmp_path}\nprepare: {{format: shapes}}")
    code = main([run_file if a == "RUN" else a.replace("RUN", run_file) for a in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = "import sys; from raypar.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint({m.split('.')[0] for m in sys.modules} & {'ray', 'torch', 'pyarrow', 'pydantic', 'ultralytics'})"
    best = 10.0
    for _ in range(5):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.monotonic() - began)
    assert done.stdout.strip().endswith("set()")
    assert "prepare" in done.stdout
    assert best < 3.0  # 0.05 s on an idle machine; the imports above are what this is about
