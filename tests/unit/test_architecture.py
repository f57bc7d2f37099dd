"""The tree of docs/architecture.md, held by the imports: they run downward, heavy libraries are imported late, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "raypar"
FILES = sorted(PACKAGE.rglob("*.py"))
VERBS = {"prepare", "train", "evaluate", "predict", "export", "serve"}
# Lowest first; a module may import its own layer and those below. Longest matching name counts.
LAYERS = [
    {"raypar", "raypar.storage"},
    {"raypar.config", "raypar.runfile", "raypar.progress", "raypar.precision", "raypar.boxes", "raypar.images", "raypar.draw"},
    {
        "raypar.augment",
        "raypar.dataset.schema",
        "raypar.dataset.manifest",
        "raypar.dataset.plan",
        "raypar.dataset.batch",
        "raypar.dataset.formats",
    },
    {"raypar.dataset", "raypar.detector", "raypar.weights", "raypar.sources"},
    {"raypar.metrics", "raypar.cluster"},
    {f"raypar.{verb}" for verb in VERBS},
    {"raypar.cli"},
    {"raypar.__main__"},
]
LIGHT = {"raypar.cli", "raypar.config", "raypar.runfile", "raypar.storage", "raypar.__main__", "raypar"}
HEAVY = {"ray", "torch", "ultralytics", "albumentations", "cv2"}
FORBIDDEN = {"utils", "helpers", "common", "core", "base", "misc", "manager", "handler", "engine"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, *, only_top: bool) -> set[str]:
    """Modules that a file imports; ``only_top`` leaves out those inside functions and under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if only_top else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if (PACKAGE.parent / Path(*n.split("."))).with_suffix(".py").exists() else node.module for n in names}
    return found


def layer(module: str) -> int:
    best, rank = "", -1
    for i, names in enumerate(LAYERS):
        for name in names:
            if (module == name or module.startswith(name + ".")) and len(name) > len(best):
                best, rank = name, i
    return rank


def verb_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in VERBS else None


@pytest.mark.parametrize("path", FILES, ids=[module_name(f) for f in FILES])
def test_imports_run_downward(path: Path) -> None:
    module = module_name(path)
    assert layer(module) > 0 or module in {"raypar", "raypar.storage"}, f"{module} has no layer: put it into the tree"
    for imported in imports(path, only_top=False):
        if not imported.startswith("raypar"):
            continue
        assert layer(imported) <= layer(module), f"{module} imports {imported}, which is above it"
        mine, other = verb_of(module), verb_of(imported)
        assert mine is None or other is None or mine == other, f"verbs do not import verbs: {module} imports {imported}"


@pytest.mark.parametrize("module", sorted(LIGHT - {"raypar"}))
def test_light_modules_import_nothing_heavy(module: str) -> None:
    path = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
    assert not {name.split(".")[0] for name in imports(path, only_top=True)} & HEAVY


def test_the_plan_and_the_geometry_are_pure() -> None:
    for name in ("dataset/plan.py", "augment/geometry.py"):
        assert not {n.split(".")[0] for n in imports(PACKAGE / name, only_top=False)} & (HEAVY | {"pyarrow", "os"})


@pytest.mark.parametrize("path", FILES, ids=[module_name(f) for f in FILES])
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert path.stem not in FORBIDDEN
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 75, f"{node.name} is too long"


def test_no_folder_has_one_file() -> None:
    for folder in {f.parent for f in FILES} - {PACKAGE}:
        assert len([f for f in folder.iterdir() if f.name != "__pycache__"]) > 1, folder
