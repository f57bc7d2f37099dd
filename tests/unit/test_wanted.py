"""A ``prepare.source`` that is something else than its format wants: one ``error:`` line before Ray starts, with what to write instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from raypar import cli

FORMATS = ("yolo", "coco", "voc", "folders")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of no format, a dataset of each format, and ``data.yaml`` files that lead nowhere."""
    root = tmp_path_factory.mktemp("sources")
    images = [
        "loose/images/0.jpg",
        "voc/JPEGImages/a.jpg",
        "yolo/images/sub/a.jpg",
        "coco/images/a.jpg",
        "folders/train/cat/a.jpg",
    ]
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(root / name)
    texts = {
        "loose/notes.txt": "nothing",
        "loose/missing.txt": "./a.jpg\n",
        "voc/Annotations/a.xml": "<annotation><object><name>cat</name></object></annotation>",
        "voc/ImageSets/Main/train.txt": "b\n",
        "yolo/data.yaml": "train: images\nval: images\nnames: [cat]",
        "yolo/labels/sub/a.txt": "0 0.5 0.5 0.1 0.1",
        "coco/annotations/instances_train.json": json.dumps(
            {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": []}
        ),
        "loose/folder.yaml": "train: images/trian\nval: images\nnames: [cat]",
        "loose/glob.yaml": "train: image/**\nval: images\nnames: [cat]",
        "loose/up.yaml": "train: ../image/**\nval: images\nnames: [cat]",
        "loose/list.yaml": "train: missing.txt\nval: images\nnames: [cat]",
        "loose/bytes.yaml": "train: images/0.bin\nval: images\nnames: [cat]",
        "loose/path.yaml": f"path: {root}/losse\ntrain: images\nval: images\nnames: [cat]",
        "loose/relative.yaml": "path: losse\ntrain: images\nval: images\nnames: [cat]",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "loose/images/0.bin").write_bytes(b"\xff\xd8")
    (root / "empty").mkdir()
    return root


def error_of(source: str, format_: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says; on one line, and without a traceback."""
    (tmp_path / "run.yaml").write_text(
        json.dumps({"name": "x", "storage": str(tmp_path), "prepare": {"source": source, "format": format_}})
    )
    assert cli.main(["prepare", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("loose/images/**", "is a pattern of names"),
        ("nowhere/*.jpg", "is a pattern of names"),
        ("loose/images/0.jpg", None),
        ("loose/notes.txt", None),
        ("loose/images", None),
        ("losse/images", "does not exist ({root} has no 'losse', but 'loose')"),
        ("loose/notes.txt/x", "does not exist ({root}/loose/notes.txt is no folder)"),
        ("empty", "is an empty folder"),
        ("x" * 300, "cannot be read"),
    ],
)
def test_a_source_that_is_no_dataset(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    format_: str,
    source: str,
    why: str | None,
) -> None:
    said = error_of(str(place / source), format_, tmp_path, capsys)
    assert said.startswith(f"error: prepare.source {place / source} ")
    assert (why or "").format(root=place) in said
    assert f"format '{format_}' wants" in said or why == "cannot be read"


@pytest.mark.parametrize(
    ("source", "format_", "instead"),
    [
        ("voc/JPEGImages/*.jpg", "voc", "write prepare.source={root}/voc"),
        ("voc/JPEGImages/a.jpg", "voc", "write prepare.source={root}/voc"),
        ("voc", "yolo", "write prepare.format=voc"),
        ("yolo/images/**", "yolo", "write prepare.source={root}/yolo/data.yaml"),
        ("yolo/data.yaml", "coco", "write prepare.format=yolo"),
        ("yolo/images", "voc", "write prepare.source={root}/yolo/data.yaml prepare.format=yolo"),
        ("coco/images", "coco", "write prepare.source={root}/coco"),
        ("coco", "yolo", "write prepare.format=coco"),
        ("folders/train/cat", "folders", "write prepare.source={root}/folders"),
        ("folders/train/cat/a.jpg", "voc", "write prepare.source={root}/folders prepare.format=folders"),
    ],
)
def test_the_dataset_that_was_meant_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, format_: str, instead: str
) -> None:
    assert error_of(str(place / source), format_, tmp_path, capsys).endswith(instead.format(root=place))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "folder",
            "'train' points to {root}/images/trian, which does not exist ({root}/images has no 'trian')",
        ),
        (
            "glob",
            "'train' points to {root}/image/**, which does not exist ({root} has no 'image', but 'images')",
        ),
        ("up", "'train' points to {above}/image/**, which does not exist"),
        (
            "list",
            "'train' is {root}/missing.txt, and none of the first images that it names is there, e.g. {root}/a.jpg",
        ),
        ("bytes", "{root}/images/0.bin is not text in UTF-8"),
        ("path", "path '{above}/losse' does not exist ({above} has no 'losse', but 'loose')"),
        ("relative", "path 'losse' is neither in {root}, nor in "),
    ],
)
def test_a_yaml_whose_paths_lead_nowhere(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    loose = place / "loose"
    assert said.format(root=loose, above=place) in error_of(
        str(loose / f"{name}.yaml"), "yolo", tmp_path, capsys
    )


def test_image_sets_that_name_other_images(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none of the 1 images that ImageSets/Main names for train is in JPEGImages, e.g. b" in error_of(
        str(place / "voc"), "voc", tmp_path, capsys
    )
