"""Every file in jobs/ loads, and begins with its own command."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from raypar import runfile
from raypar.config import VERBS

JOBS = Path(__file__).resolve().parents[2] / "jobs"
RUN_FILES = sorted(p for p in JOBS.glob("*.yaml") if p.name not in ("runtime_env.yaml", "serve.yaml"))
FILES = sorted([*JOBS.glob("*.yaml"), *JOBS.glob("*.py")])


def test_there_are_some() -> None:
    assert {p.stem for p in RUN_FILES} >= {"demo", "bccd", "coco_2x4gpu"}


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda p: p.name)
def test_run_file_is_valid(path: Path) -> None:
    config = runfile.load(path)
    assert config.prepare is not None


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_first_line_is_the_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith(("# raypar ", "# ray job submit ", "# serve deploy ", "# make demo")), first
    words = first.split()
    if "raypar" in words and path.name != "runtime_env.yaml":
        assert words[words.index("raypar") + 1] in VERBS
        assert f"jobs/{path.name}" in words


def test_runtime_env_is_what_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((JOBS / "runtime_env.yaml").read_text())
    RuntimeEnv(**settings)
    assert all(isinstance(v, str) for v in settings["env_vars"].values())
    assert "runs" in settings["excludes"], "outputs do not travel with the code"


def test_pipeline_only_calls_verbs() -> None:
    tree = ast.parse((JOBS / "pipeline.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))], (
        "thin: the verbs do the work"
    )
