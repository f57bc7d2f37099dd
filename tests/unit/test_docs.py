"""The documentation is true: the generated page is current, commands name what exists, links lead somewhere, YAML examples load."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from raypar import runfile
from raypar.config import VERBS, RunConfig
from raypar.runfile import Loader

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("jobs/*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture(params=PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def page(request: pytest.FixtureRequest) -> Path:
    return request.param


def commands(text: str) -> list[list[str]]:
    """Every `raypar ...` command of a page, from code blocks, indented lines and inline code, split into words."""
    lines = [line for _, block in BLOCK.findall(text) for line in block.splitlines()]
    lines += [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = (re.search(r"(?:^|&& |-m )raypar (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in found if match]


def test_run_file_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (REPOSITORY / "docs/run_file.md").read_text() == generate.page(), "run `make docs`"
    assert (REPOSITORY / "docs/yolo_keys.md").read_text() == generate.keys_page(), "run `make docs`"


def test_run_file_page_has_every_setting() -> None:
    text = (REPOSITORY / "docs/run_file.md").read_text()
    for name, field in RunConfig.model_fields.items():
        section = runfile._section_in(field.annotation)
        for setting in section.model_fields if section else ():
            assert f"`{name}.{setting}" in text


def test_run_file_page_has_each_setting_once() -> None:
    rows = re.findall(
        r"^\| `(\w+(?:\.\w+)*)` \|",
        (REPOSITORY / "docs/run_file.md").read_text().split("## Under `train.yolo`")[0],
        re.MULTILINE,
    )
    assert len(rows) == len(set(rows)) > 80


def test_readme_shows_every_verb() -> None:
    shown = {words[0] for words in commands((REPOSITORY / "README.md").read_text()) if words}
    assert set(VERBS) <= shown


def test_commands_name_what_exists(page: Path) -> None:
    for words in commands(page.read_text()):
        verb, *rest = words
        if verb in ("VERB", "--help", "--version", "..."):
            continue
        assert verb in VERBS, words
        files = [word for word in rest if word.startswith("jobs/")]
        overrides = [
            word for word in rest if "=" in word and "..." not in word and not word.startswith("key=")
        ]
        assert all((REPOSITORY / file).is_file() for file in files), words
        runfile.load(REPOSITORY / (files[0] if files else "jobs/demo.yaml"), overrides)


def test_yaml_examples_load(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text()):
        if language == "yaml" and not block.startswith(
            "apiVersion:"
        ):  # Kubernetes': tests/unit/test_kubernetes.py
            RunConfig.model_validate(yaml.load(block, Loader))


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_paths_in_code_exist(page: Path) -> None:
    for path in re.findall(r"`((?:raypar|jobs|docs|tests|benchmarks)/[\w./]+)`", page.read_text()):
        assert (REPOSITORY / path).exists(), path


def test_ascii(page: Path) -> None:
    assert page.read_text().isascii()


def test_picture_is_drawn_within_its_frame_and_names_real_files() -> None:
    root = ElementTree.parse(REPOSITORY / "docs/architecture.svg").getroot()
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    texts = [e for e in root.iter() if e.tag.endswith("}text")]
    assert all(0 < float(t.attrib["x"]) < width and 0 < float(t.attrib["y"]) < height for t in texts)
    for text in texts:
        for path in re.findall(r"((?:train|dataset|serve)/\w+\.py)", text.text or ""):
            assert (REPOSITORY / "raypar" / path).is_file(), path


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(p.name[:4]) for p in sorted((REPOSITORY / "docs/decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_changelog_has_this_version() -> None:
    from raypar import __version__

    assert f"## {__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
