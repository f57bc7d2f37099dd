"""A source in a store is listed and read as the same files on a disk are; a store that fails is never taken for a bad image."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raypar import prepare
from raypar.config import PrepareConfig, RunConfig
from raypar.dataset import ingest, remote, shards
from raypar.dataset.formats import Listing, Record, coco, folders, voc, wanted, yolo
from raypar.dataset.ingest import ShardJob, ShardReport, write_shard
from raypar.dataset.records import Records
from raypar.dataset.remote import Place, RemotePath, Tree, place_of
from raypar.sources import list_source
from raypar.storage import Folder

XML = "<annotation><object><name>{}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object></annotation>"


@pytest.fixture(scope="module", autouse=True)
def no_hints() -> Iterator[None]:
    """Around a wrong source on a disk the right one is looked for, in a store it is not: here the rest of the line is compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wanted, "_near", lambda place: None)
        patch.setattr(wanted, "absent", lambda place: "does not exist")
        yield


def store_of(root: Path, fs: pafs.FileSystem | None = None) -> Folder:
    """A store whose one bucket is a folder of the disk."""
    folder = Folder("store://bucket?endpoint_override=host")
    folder.__dict__["_resolved"] = (
        fs or pafs.SubTreeFileSystem(str(root.parent), pafs.LocalFileSystem()),
        root.name,
    )
    return folder


def remote_of(root: Path) -> RemotePath:
    return RemotePath(Tree(store_of(root)), root.name)


def listed(scan: Callable[..., Listing], place: Place, root: Path, *args: Any) -> Any:
    """What a scan says, or the line in which it refuses, with the same paths wherever the files are."""

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            # the bucket lies in the store
            return value.replace(f"{root.parent}/", "store://").replace(f"store://{root.name}", "ROOT")
        if isinstance(value, list | tuple):
            return tuple(plain(item) for item in value)
        return tuple((key, plain(item)) for key, item in value.items()) if isinstance(value, dict) else value

    try:
        found = scan(place, *args)
    except ValueError as error:
        return plain(str(error))
    splits = {
        split: [(plain(r.image_id), plain(r.image_path), plain(r.labels)) for r in records]
        for split, records in found.splits.items()
    }
    return found.class_names, splits, plain(found.notes), found.task, found.keypoint_shape, found.flip_idx


def touch(path: Path, data: str = "x") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        path.write_text(data)


names = st.sampled_from(
    ["a.jpg", "b.png", "c d.JPG", "e.txt", ".h.jpg", "._a.jpg", "a-b.webp", "a.jpg.bak", "x"]
)
parts = st.sampled_from(["", "s/", "s/t/", "a/", "a-b/", ".hidden/", "__MACOSX/", "images/", "s.jpg/"])
files = st.lists(st.tuples(parts, names).map("".join), max_size=6)
entries = st.sampled_from(
    ["images/train", "images/val", "images", "../images/val", "images/*", "images/**/*.jpg", "images/**", "images/v[ao]l/?.jpg", "list.txt", "none"]
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(
    st.fixed_dictionaries({"train": files, "val": files}), st.fixed_dictionaries({"train": entries, "val": entries}),
    st.sampled_from([None, ".", "sub", "none"]), st.lists(st.sampled_from(["./images/train/a.jpg", "images/val/b.png", "none.jpg", ""])),
)  # fmt: skip
def test_a_data_yaml_lists_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[str, list[str]],
    named: dict[str, str],
    path: str | None,
    lines: list[str],
) -> None:
    root = tmp_path_factory.mktemp("r") / "set"
    home = root / "sub" if path == "sub" else root
    for split in ("train", "val"):
        for name in ["first.jpg", *found[split]] if found[split] else []:
            touch(home / "images" / split / name)
            touch(home / "labels" / split / Path(name).with_suffix(".txt"))
    (home / "images").mkdir(parents=True, exist_ok=True)
    touch(home / "list.txt", "\n".join(lines))
    touch(root / "data.yaml", json.dumps({"names": ["cat"], **named} | ({"path": path} if path else {})))
    for source in (root / "data.yaml", root):
        with contextlib.chdir(home):  # where a disk's lists may start too
            here = listed(yolo.scan, source, root)
        there = listed(yolo.scan, remote_of(root) / source.relative_to(root), root)
        if isinstance(here, str):
            assert isinstance(there, str)
            assert "\n" not in there
            assert path == "none" or here == there
        else:
            assert here == there


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(parts.filter(lambda p: "." not in p), files, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_voc_lists_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[str, list[str]],
    has_splits: bool,
    has_classes: bool,
    is_damaged: bool,
) -> None:
    root = tmp_path_factory.mktemp("r") / "set"
    ids = sorted({folder + name for folder, some in found.items() for name in some})
    for i, name in enumerate(ids):
        touch(root / "JPEGImages" / name)
        touch(
            root / "Annotations" / Path(name).with_suffix(".xml"),
            "<" if is_damaged and i % 3 == 0 else XML.format("cat" if i % 2 else "dog"),
        )
    if has_splits:
        stems = [str(Path(name).with_suffix("")).replace(" ", "") for name in ids]
        touch(root / "ImageSets" / "Main" / "trainval.txt", "\n".join(stems))
        touch(root / "ImageSets" / "Main" / "val.txt", "\n".join(stems[::2]))
    if has_classes:
        touch(root / "labels.txt", "cat\ndog\n")
    assert listed(voc.scan, root, root, 3) == listed(voc.scan, remote_of(root), root, 3)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from(["train", "val", "valid", "test", "images"]), st.dictionaries(st.sampled_from(["cat", "a dog", ".x"]), files, max_size=3))
)  # fmt: skip
def test_folders_of_classes_list_the_same(
    tmp_path_factory: pytest.TempPathFactory, found: dict[str, dict[str, list[str]]]
) -> None:
    root = tmp_path_factory.mktemp("r") / "set"
    root.mkdir()
    for split, classes in found.items():
        for name, some in classes.items():
            for file in some:
                touch(root / split / name / file)
    assert listed(folders.scan, root, root, 3) == listed(folders.scan, remote_of(root), root, 3)


@pytest.mark.parametrize(
    "place", ["train2017", "images/train2017", "train", "images/train", "images", "annotations", "."]
)
@pytest.mark.parametrize("source", ["", "annotations", "annotations/instances_train2017.json", "none"])
def test_coco_lists_the_same(tmp_path: Path, place: str, source: str) -> None:
    root = tmp_path / "set"
    touch(root / place / "a.jpg")
    annotations = [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]
    data = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}],
    }
    touch(root / "annotations" / "instances_train2017.json", json.dumps(data))
    assert listed(coco.scan, root / source, root) == listed(coco.scan, remote_of(root) / source, root)


@pytest.mark.parametrize("key", ["path", "train", "list"])
@pytest.mark.parametrize("entry", ["/data/coco", "~/coco", "s3://other/coco"])
def test_a_path_of_a_disk_leads_nowhere_in_a_store(tmp_path: Path, key: str, entry: str) -> None:
    root = tmp_path / "set"
    touch(root / "images" / "a.jpg")
    touch(root / "list.txt", entry + "/a.jpg")
    data = {"names": ["cat"], "train": "list.txt" if key == "list" else "images", "val": "images"} | (
        {key: entry} if key != "list" else {}
    )
    touch(root / "data.yaml", json.dumps(data))
    with pytest.raises(ValueError, match=f"names {entry}.* not in this store: write it relative"):
        yolo.scan(remote_of(root))


# Reading


class Flaky(pafs.FileSystemHandler):  # type: ignore[misc]
    """A store that fails a number of times, and counts what it is asked."""

    def __init__(self, root: Path, num_failures: int = 0, reason: str = "503 SlowDown", fails: str = ""):
        self.root, self.left, self.reason, self.fails = root.parent, num_failures, reason, fails
        self.asked: list[str] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.fails in what and self.left > 0:
            self.left -= 1
            raise OSError(self.reason)

    def _local(self) -> pafs.FileSystem:
        return pafs.SubTreeFileSystem(str(self.root), pafs.LocalFileSystem())

    def get_type_name(self) -> str:
        return "flaky"

    def get_file_info(self, paths: list[str]) -> Any:
        return self._local().get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        self._ask(f"list {selector.base_dir}")
        return self._local().get_file_info(selector)

    def open_input_file(self, path: str) -> Any:
        self._ask(f"read {path}")
        return self._local().open_input_file(path)

    def _no(self, *_: Any) -> Any:
        raise AssertionError("a source is never written")

    normalize_path = create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = (
        delete_file
    ) = move = copy_file = _no
    open_input_stream = open_output_stream = open_append_stream = _no


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE_S", 0.2)
    monkeypatch.setattr("raypar.storage.FIRST_PAUSE_S", 0.01)


def yolo_set(root: Path, num_images: int = 30) -> Path:
    for i in range(num_images):
        path = root / "images" / "train" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(path)
        touch(root / "labels" / "train" / f"{i:03d}.txt", "0 0.5 0.5 0.2 0.2\n")
    (root / "images" / "train" / "003.png").unlink()  # listed in train.txt and not there
    (root / "labels" / "train" / "004.txt").unlink()
    (root / "labels" / "train" / "005.txt").write_text("7 0.5 0.5 0.2 0.2\n")
    (root / "images" / "train" / "006.png").write_bytes(b"")
    touch(root / "train.txt", "".join(f"./images/train/{i:03d}.png\n" for i in range(num_images)))
    touch(root / "data.yaml", json.dumps({"names": ["cat"], "train": "train.txt", "val": "images/train"}))
    return root


def job_of(listing: Listing, out: Path, source: Folder | None) -> ShardJob:
    return ShardJob(
        Folder.at(out),
        "train/0.parquet",
        "train",
        "yolo",
        1,
        tuple(listing.splits["train"]),
        8,
        10**6,
        source=source,
    )


def test_a_shard_of_a_store_is_that_of_the_disk(tmp_path: Path, hurried: None) -> None:
    root = yolo_set(tmp_path / "set")
    store = store_of(root, pafs.PyFileSystem(Flaky(root, num_failures=3, fails="/00")))
    here = write_shard(job_of(yolo.scan(str(root)), tmp_path / "here", None))
    there = write_shard(job_of(yolo.scan(RemotePath(Tree(store), root.name)), tmp_path / "there", store))
    assert there.shard == here.shard
    assert [line["reason"] for line in there.rejected] == [line["reason"] for line in here.rejected]
    assert len(there.rejected) == 3
    assert there.rejected[0]["file"] == "flaky://set/images/train/003.png".replace("flaky", "store")
    assert there.num_backgrounds == 1


@pytest.mark.parametrize("reason", ["503 SlowDown", "ACCESS_DENIED"])
def test_a_store_that_fails_stops_the_shard_and_rejects_nothing(
    tmp_path: Path, hurried: None, reason: str
) -> None:
    root = yolo_set(tmp_path / "set")
    handler = Flaky(root)
    store = store_of(root, pafs.PyFileSystem(handler))
    job = job_of(yolo.scan(RemotePath(Tree(store), root.name)), tmp_path / "out", store)
    handler.left, handler.fails, handler.reason = 10**9, "images/train/020", reason
    with pytest.raises(ValueError, match=f"prepare.source fails: .*{reason}.*goes on from there") as raised:
        write_shard(job)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    assert handler.asked.count("read set/images/train/020.png") == 1 or reason == "503 SlowDown"


def test_a_folder_is_asked_for_once(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set")
    handler = Flaky(root)
    place = RemotePath(Tree(store_of(root, pafs.PyFileSystem(handler))), root.name)
    records = Records.of(yolo.scan(place).splits["train"])
    template = ShardJob(Folder.at(tmp_path / "out"), "", "", "yolo", 1, (), 8, 10**6, source=place.tree.store)
    made = shards.portions(
        {"train": records}, template, PrepareConfig(source="x"), taken={}, first={}, tree=place.tree
    )
    assert sum(len(portion.rows) for portion in made) == 30
    assert sorted(handler.asked) == sorted(
        [
            "list set",
            "list set/images/train",
            "list set/labels/train",
            "read set/data.yaml",
            "read set/train.txt",
        ]
    )
    size = (root / "images" / "train" / "001.png").stat()
    assert place.tree.file_info("store://set/images/train/001.png") == (
        size.st_size,
        pytest.approx(size.st_mtime),
    )
    assert place.tree.file_info("store://set/images/train/003.png") is None


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set")

    def fingerprint() -> str:
        place = remote_of(root)
        records = Records.of(yolo.scan(place).splits["train"])
        template = ShardJob(
            Folder.at(tmp_path / "out"), "", "", "yolo", 1, (), 8, 10**6, source=place.tree.store
        )
        made = shards.portions(
            {"train": records}, template, PrepareConfig(source="x"), taken={}, first={}, tree=place.tree
        )
        return made[0].fingerprint

    before = fingerprint()
    assert fingerprint() == before
    shutil.copy(root / "images" / "train" / "001.png", root / "images" / "train" / "002.png")
    assert fingerprint() != before


def test_too_large_files_are_set_aside_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo_set(tmp_path / "set")
    monkeypatch.setattr(ingest, "MAX_FILE_BYTES", 1)
    monkeypatch.setattr(ingest, "MAX_LABEL_BYTES", 1)
    found = ingest._fetch(
        store_of(root), Record("x", "store://set/images/train/001.png", "store://set/labels/train/001.txt")
    )
    assert [str(error) for error in found.values()] == ["file has 0 MB, more than 0"] * 2
    with pytest.raises(ValueError, match="label file has 0 MB"):
        yolo.read_labels(Record("x", "", "store://set/labels/train/001.txt"), 1, (20, 30), fetched=found)


def test_a_store_that_there_is_not_is_said_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"prepare\.source nothing://x/data.yaml cannot be reached: "
    ) as raised:
        place_of("nothing://x/data.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["store://set/deep", "deep", "./deep/", "deep/../deep"])
def test_a_path_in_the_store_is_followed(tmp_path: Path, path: str) -> None:
    root = tmp_path / "set"
    touch(root / "deep" / "images" / "a.jpg")
    touch(root / "deep" / "labels" / "a.txt")
    touch(
        root / "data.yaml", json.dumps({"names": ["cat"], "path": path, "train": "images", "val": "images"})
    )
    assert yolo.scan(remote_of(root)).splits["train"][0].image_path == "store://set/deep/images/a.jpg"


def test_keys_in_a_uri_are_not_shown() -> None:
    assert remote.shown("s3://me:secret@bucket/a?scheme=http&x=secret") == "s3://bucket/a"


def test_a_uri_of_no_store_is_said_in_one_line_without_its_keys(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"https://host(/a\.jpg)? cannot be opened: .*there are paths, and the stores of pyarrow",
    ) as caught:
        list_source("https://me:secret@host/a.jpg", Folder.at(tmp_path))
    assert "secret" not in str(caught.value)


def test_file_uris_are_local(tmp_path: Path) -> None:
    assert place_of(f"file://{tmp_path}") == tmp_path


def test_what_was_checked_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = yolo_set(tmp_path / "set")
    config = RunConfig.model_validate(
        {"name": "x", "storage": str(tmp_path), "prepare": {"source": str(root)}}
    )
    scans = []
    scan = yolo.scan
    monkeypatch.setattr(yolo, "scan", lambda *args: scans.append(args) or scan(*args))
    prepare.check(config)
    assert prepare._listed(config).class_names == ("cat",)
    assert len(scans) == 1
    prepare._listed(config)  # later, the source may be another
    prepare.check(config)
    prepare._listed(config.model_copy(update={"seed": 1}))
    assert len(scans) == 4


@pytest.mark.parametrize(("max_rejected", "num_tried"), [(0.0, 1), (0.1, 2), (0.15, 2), (0.25, 3), (1.0, 10)])
def test_prepare_stops_when_too_many_are_bad_for_certain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rejected: float, num_tried: int
) -> None:
    made = [shards.Portion(f"train/{i:05d}.parquet", "train", np.arange(10), "") for i in range(10)]
    bad = [{"split": "train", "image_id": "x", "file": "x", "reason": "bad"}] * 10
    monkeypatch.setattr(
        shards,
        "write",
        lambda due, *_: ((portion, ShardReport("train", rejected=list(bad))) for portion in due),
    )
    template = ShardJob(Folder.at(tmp_path), "", "", "yolo", 1, (), 8, 10**6)
    found = prepare._write(made, {}, template, max_rejected * 100)
    assert list(found) == [portion.path for portion in made[:num_tried]]
