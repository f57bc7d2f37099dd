"""What ``predict`` lists: a path that exists is that path, hidden files and what links lead to twice are left out."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from raypar.sources import list_source, read
from raypar.storage import Folder
from tests import pictures

JPEG = pictures.encode(pictures.corners(), "JPEG")
ODD = ["a b", " a", "a ", "[1]", "set [v2]", "a*", "a?", "100%", "a%20b", "#1", "a=b", "a'b", "{x}", "~", "\u00e4", "a\\b", "a;b&c", "!x", "a,b", "..a"]  # fmt: skip


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(JPEG)
    return root


def ids(source: Path | str) -> list[str]:
    found = list_source(str(source), Folder.at("/nowhere"))
    entries = [entry for piece in found.pieces for entry in piece]
    for entry in entries:
        assert [data for _, data in read(entry)] == [JPEG]
    return [entry.image_id for entry in entries]


@pytest.mark.parametrize("odd", ODD)
def test_a_path_that_exists_is_that_path(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what the name would mean as a pattern lies there too
    tree(tmp_path, f"{odd}/x{odd}.jpg", f"{odd}/y.jpg", "1/x.jpg", "set v/x.jpg", "ab/x.jpg", "a b c/x.jpg")
    folder = tmp_path / odd
    assert ids(folder) == sorted([f"x{odd}.jpg", "y.jpg"])
    assert ids(folder / f"x{odd}.jpg") == [f"x{odd}.jpg"]
    assert ids(folder / "*.jpg") == sorted([f"x{odd}.jpg", "y.jpg"])
    assert ids(folder / "[y]*") == ["y.jpg"]
    assert ids(f"file://{folder}") == sorted([f"x{odd}.jpg", "y.jpg"])
    (tmp_path / "list.txt").write_text(f"{odd}/x{odd}.jpg\n{folder}/y.jpg\n{odd}\n")
    assert ids(tmp_path / "list.txt") == [f"{odd}/x{odd}.jpg", f"{folder}/y.jpg", f"{odd}/y.jpg"]
    monkeypatch.chdir(tmp_path)
    assert ids(odd) == sorted([f"x{odd}.jpg", "y.jpg"])


def test_in_a_uri_a_percent_is_itself_where_that_exists(tmp_path: Path) -> None:
    tree(tmp_path, "a b/x.jpg", "c%20d/x.jpg", "c d/y.jpg")
    assert ids(f"file://{tmp_path}/a%20b") == ["x.jpg"]
    assert ids(f"file://{tmp_path}/c%20d") == ["x.jpg"]


def in_store(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Makes ``s3://bucket`` that folder."""

    def resolved(self: Folder) -> tuple[pafs.FileSystem, str]:
        assert self.uri in ("s3://bucket", "s3://bucket?region=x"), f"{self.uri} may be no URI"
        return pafs.SubTreeFileSystem(str(root), pafs.LocalFileSystem()), "bucket"

    real = Folder._resolved.func  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Folder, "_resolved", property(lambda self: (resolved if "s3:" in self.uri else real)(self))
    )


@pytest.mark.parametrize("odd", ODD)
def test_a_key_that_exists_is_that_key(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "bucket", f"deep/{odd}/x{odd}.jpg", f"deep/{odd}/y.jpg", "deep/ab/z.jpg")
    (tmp_path / "bucket/list.txt").write_text(f"deep/{odd}/x{odd}.jpg\ns3://bucket/deep/{odd}/y.jpg\n")
    in_store(monkeypatch, tmp_path)
    expected = sorted([f"x{odd}.jpg", "y.jpg"])
    assert ids(f"s3://bucket/deep/{odd}") == expected
    assert ids(f"s3://bucket/deep/{odd}/x{odd}.jpg") == [f"x{odd}.jpg"]
    assert ids(f"s3://bucket/deep/{odd}/*.jpg?region=x") == expected
    assert len(ids("s3://bucket/list.txt")) == 2


@pytest.mark.parametrize("is_remote", [False, True])
def test_hidden_files_are_left_out(is_remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = ["a.jpg", "sub/b.jpg", "sub/deep/c.jpg"]
    hidden = ["._a.jpg", ".hidden/a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/sub/b.jpg", "sub/.x.jpg", "sub/.git/d.jpg"]  # fmt: skip
    root = tree(tmp_path / "bucket", *shown, *hidden)
    if is_remote:
        in_store(monkeypatch, tmp_path)
    base = "s3://bucket" if is_remote else str(root)
    assert ids(base) == shown
    assert ids(f"{base}/**/*.jpg") == ids(f"{base}/**") == shown
    assert ids(f"{base}/*.jpg") == ["a.jpg"]
    assert ids(f"{base}/*/*.jpg") == ids(f"{base}/s?b/[a-c].jpg") == ["sub/b.jpg"]
    assert ids(f"{base}/**/deep/*") == ["sub/deep/c.jpg"]
    # unless they are asked for
    assert ids(f"{base}/.hidden") == ["a.jpg"]
    assert ids(f"{base}/.*.jpg") == ["._a.jpg"]
    assert ids(f"{base}/__MACOSX/**/*.jpg") == ["sub/b.jpg"]
    assert ids(f"{base}/._a.jpg") == ["._a.jpg"]


@pytest.mark.parametrize(
    ("links", "more"),
    [
        ({"again": "."}, []),
        ({"sub/up": ".."}, []),
        ({"sub/up": "../.."}, []),
        ({"sub/one": "../other", "other/two": "../sub"}, ["other/o.jpg"]),
        ({"alias": "sub", "aaa": "sub"}, []),
        ({"itself": "itself", "gone.jpg": "nothing"}, []),
        ({"same.jpg": "a.jpg", "zz.jpg": "sub/b.jpg"}, []),
        ({"out": "../outside", "out2": "../outside", "o.jpg": "../outside/o.jpg"}, ["out/o.jpg"]),
    ],
)
def test_nothing_is_reached_twice_through_links(
    links: dict[str, str], more: list[str], tmp_path: Path
) -> None:
    root = tree(tmp_path / "root", "a.jpg", "sub/b.jpg", *(name for name in more if name.startswith("other")))
    tree(tmp_path / "outside", "o.jpg")
    for name, target in links.items():
        (root / name).symlink_to(target)
    assert ids(root) == ids(f"{root}/**/*.jpg") == sorted(["a.jpg", "sub/b.jpg", *more])


def test_links_lead_to_what_is_asked_for(tmp_path: Path) -> None:
    root = tree(tmp_path, "real/a.jpg")
    (root / "alias").symlink_to("real")
    (root / "links").mkdir()
    (root / "links/b.jpg").symlink_to("../real/a.jpg")
    assert ids(root / "alias") == ids(root / "alias/*.jpg") == ["a.jpg"]
    assert ids(root / "al*/*.jpg") == ["alias/a.jpg"]
    assert ids(root / "links") == ["b.jpg"]


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_every_editor(coding: str, end: str, tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "b c.jpg", " d.jpg", "#e.jpg", "f\u2028g.jpg", "h1.jpg", "h2.jpg")
    lines = [
        "a.jpg",
        "# a comment",
        "",
        "  b c.jpg ",
        " d.jpg",
        "#e.jpg",
        "f\u2028g.jpg",
        '"a.jpg"',
        "h?.jpg",
        "a.jpg",
    ]
    (tmp_path / "list.TXT").write_bytes(end.join(lines).encode(coding))
    found = ids(tmp_path / "list.TXT")
    assert found == ["a.jpg", "b c.jpg", " d.jpg", "#e.jpg", "f\u2028g.jpg", "h?.jpg/h1.jpg", "h?.jpg/h2.jpg"]


def test_what_is_wrong_with_a_source_is_said(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg")
    (tmp_path / "gone.txt").write_text("a.jpg\nb.jpg\n")
    (tmp_path / "binary.txt").write_bytes(b"a\xff\xfe.jpg")
    (tmp_path / "notes.md").write_text("no image")
    for source, message in {
        "gone.txt": r"nothing at b\.jpg \(line 2 of .*gone\.txt\)",
        "binary.txt": "no list: byte 1 is no text",
        "notes.md": "no images at",
        "*.gif": "no images at",
        "none": "nothing at",
        "none/*.jpg": "nothing at",
        "none.txt": "nothing at",
    }.items():
        with pytest.raises(ValueError, match=message):
            ids(tmp_path / source)


def test_a_name_that_is_no_text_is_one_bad_image(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(JPEG)
    found = list_source(str(tmp_path), Folder.at("/nowhere"))
    first, second = (next(iter(read(entry))) for piece in found.pieces for entry in piece)
    assert first == ("a.jpg", JPEG)
    assert second[0] == "caf\ufffd.jpg"
    assert isinstance(second[1], ValueError)
