"""The shape of the code, held by a test: which module may import which, what is never imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "raypar"
FILES = sorted(PACKAGE.rglob("*.py"))
VERBS = ("prepare", "inspect", "train", "evaluate", "predict", "export", "serve", "tune")
FORBIDDEN_NAMES = {"utils", "helpers", "common", "core", "base", "misc", "manager", "handler", "engine"}

# Imports go from a module to one of a lower rank, or of its own rank when both have the same first word (dataset.formats.coco -> dataset.ingest).
RANKS = [
    {"__init__", "image_header"},
    {
        "boxes",
        "storage",
        "precision",
        "prefetch",
        "progress",
        "quiet",
        "images",
        "scores",
        "domain",
    },
    {"config", "weights", "versions"},
    {"detector"},
    {"runfile", "draw", "metrics", "augment", "pool"},
    {"dataset"},
    {"sources", "judge"},
    set(VERBS) - {"tune"},
    {"tune"},  # the one verb that runs another: train
    {"cluster"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
# cli, config and runfile answer before anything heavy is imported
LIGHT = {"__init__", "cli", "config", "runfile", "storage", "cluster"}
HEAVY = {"ray", "torch", "torchvision", "ultralytics", "albumentations", "cv2"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def first(module: str) -> str:
    return module.split(".")[0]


def imports(tree: ast.AST, *, only_at_import: bool = False) -> list[str]:
    """Full names of imported modules; with ``only_at_import`` those that run when the module is imported."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if not only_at_import:
                found += imports(node)
            continue
        if only_at_import and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        found += imports(node, only_at_import=only_at_import)
    return found


@pytest.fixture(params=FILES, ids=[name_of(f) for f in FILES])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def test_imports_run_downward(path: Path, tree: ast.Module) -> None:
    here = first(name_of(path)) if path != PACKAGE / "__init__.py" else "__init__"
    assert here in RANK, f"{here} has no place among RANKS"
    for imported in imports(tree):
        if not imported.startswith("raypar."):
            continue
        there = first(imported.removeprefix("raypar."))
        if there not in RANK:
            there = "__init__"  # a name from raypar/__init__.py
        if here == there:
            continue
        assert RANK[there] < RANK[here], f"{name_of(path)} imports {imported}, which is not below it"


def test_verbs_do_not_import_verbs(path: Path, tree: ast.Module) -> None:
    here = first(name_of(path))
    if here in VERBS:
        others = {f"raypar.{v}" for v in VERBS if v != here and (here, v) != ("tune", "train")}
        assert not [i for i in imports(tree) if any(i == o or i.startswith(f"{o}.") for o in others)]


def test_light_modules_stay_light(path: Path, tree: ast.Module) -> None:
    if name_of(path) in LIGHT:
        assert not HEAVY & {first(i) for i in imports(tree, only_at_import=True)}


def test_ray_train_is_imported_in_full(tree: ast.Module) -> None:
    assert "ray.train" not in [
        f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names
    ]


def test_names_of_modules(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts)


def test_no_folder_with_one_file() -> None:
    for folder in {f.parent for f in FILES}:
        assert len(list(folder.iterdir())) > 1, folder


def test_ascii_and_docstring(path: Path, tree: ast.Module) -> None:
    assert path.read_text().isascii()
    assert ast.get_docstring(tree) or not tree.body, "a module says what it is"


def test_every_verb_has_check_and_run() -> None:
    for verb in VERBS:
        path = PACKAGE / verb / "__init__.py" if (PACKAGE / verb).is_dir() else PACKAGE / f"{verb}.py"
        functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
        assert {"check", "run"} <= functions, verb


def test_importing_starts_nothing(tmp_path: Path) -> None:
    """No file, no Ray, no log handler comes of an import."""
    code = """
import importlib, logging, sys
before = list(logging.getLogger().handlers)
for name in sys.argv[1:]:
    importlib.import_module(name)
import ray
assert not ray.is_initialized()
assert logging.getLogger().handlers == before
"""
    modules = [f"raypar.{name_of(f)}" for f in FILES if f.name not in ("__init__.py", "__main__.py")]
    done = subprocess.run(
        [sys.executable, "-c", code, *modules], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir())
