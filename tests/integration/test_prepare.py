"""``prepare`` as a user runs it: the folder it leaves, damaged files, reruns, limits."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raypar.prepare
from raypar import runfile
from raypar.config import RunConfig
from raypar.dataset import shards, verify
from raypar.dataset.formats import shapes
from raypar.dataset.manifest import Manifest
from raypar.dataset.schema import row_schema
from raypar.images import decode

pytestmark = pytest.mark.usefixtures("ray_4_cpus")
BOX_LINE = "0 0.2 0.7 0.2 0.4\n"
BOX_XYWHN = [0.2, 0.7, 0.2, 0.4]
HALVES = ((230, 30, 30), (30, 30, 230))  # left red, right blue: a rotation shows


def config_of(tmp_path: Path, **prepare: Any) -> RunConfig:
    return RunConfig.model_validate({"name": "run", "storage": str(tmp_path / "runs"), "prepare": prepare})


def shapes_config(tmp_path: Path, **prepare: Any) -> RunConfig:
    counts = {"train": 50, "val": 10, "test": 5, "height": 48, "width": 64}
    return config_of(
        tmp_path, **({"format": "shapes", "shapes": counts, "rows_per_group": 8, "shard_mb": 0.02} | prepare)
    )


def dataset_folder(config: RunConfig) -> Path:
    return Path(config.folder.uri) / "dataset"


def files_under(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def rows_of(config: RunConfig, split: str) -> list[dict[str, Any]]:
    shards = Manifest.load(config.folder / "dataset").splits[split].shards
    return [row for shard in shards for row in pq.read_table(dataset_folder(config) / shard.path).to_pylist()]


def picture(kind: str = "JPEG", size: tuple[int, int] = (80, 60), **options: Any) -> bytes:
    """A picture of two halves; ``size`` is (width, height)."""
    image = Image.new("RGB", size, HALVES[1])
    image.paste(HALVES[0], (0, 0, size[0] // 2, size[1]))
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    values = Image.Exif()
    values[0x0112] = orientation
    return values.tobytes()


def yolo_tree(root: Path, files: dict[str, tuple[bytes | None, str | None]]) -> str:
    """A data.yaml over train files {name: (bytes, label text)}, and a val split of one good image."""
    for split, items in {"train": files, "val": {"ok.jpg": (picture(), BOX_LINE)}}.items():
        for name, (data, labels) in items.items():
            image, label = (
                root / "images" / split / name,
                (root / "labels" / split / name).with_suffix(".txt"),
            )
            image.parent.mkdir(parents=True, exist_ok=True)
            label.parent.mkdir(parents=True, exist_ok=True)
            if data is not None:
                image.write_bytes(data)
            if labels is not None:
                label.write_text(labels)
    # a list, so that a missing file is listed too
    names = "".join(f"./images/train/{name}\n" for name in files)
    (root / "train.txt").write_text(names)
    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [thing]\n")
    return str(root / "data.yaml")


def test_layout_is_that_of_the_docstring(tmp_path: Path) -> None:
    config = shapes_config(tmp_path)
    manifest = raypar.prepare.run(config)
    folder = dataset_folder(config)
    shards = [shard.path for split in manifest.splits.values() for shard in split.shards]
    assert files_under(folder) == sorted(
        [*shards, "manifest.json", "rejected.jsonl", "settings.json", "run.yaml"]
    )
    assert all(re.fullmatch(r"(train|val|test)/\d{5}\.parquet", shard) for shard in shards)
    drawing = raypar.prepare.__doc__ or ""
    for name in (
        "dataset/",
        "train/00000.parquet",
        "val/00000.parquet",
        "test/00000.parquet",
        "rejected.jsonl",
        "manifest.json",
    ):
        assert name in drawing
        assert name == "dataset/" or (folder / name).is_file()
    assert len(manifest.splits["train"].shards) > 1
    assert Manifest.load(config.folder / "dataset") == manifest


def test_shards_are_what_the_manifest_says(tmp_path: Path) -> None:
    config = shapes_config(tmp_path)
    manifest = raypar.prepare.run(config)
    assert {name: split.num_images for name, split in manifest.splits.items()} == {
        "train": 50,
        "val": 10,
        "test": 5,
    }
    for name, split in manifest.splits.items():
        for shard in split.shards:
            data = (dataset_folder(config) / shard.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.num_bytes, shard.sha256)
            file = pq.ParquetFile(io.BytesIO(data))
            assert file.schema_arrow.equals(row_schema("detect"))
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
            assert tuple(group.num_rows for group in groups) == shard.row_groups
            assert all(rows == 8 for rows in shard.row_groups[:-1])
            columns = {
                groups[0].column(i).path_in_schema: groups[0].column(i).compression
                for i in range(groups[0].num_columns)
            }
            assert {path for path, compression in columns.items() if compression == "UNCOMPRESSED"} == {
                "image"
            }
            assert set(columns.values()) == {"UNCOMPRESSED", "ZSTD"}
        rows = rows_of(config, name)
        class_ids = [class_id for row in rows for class_id in row["class_ids"]]
        assert len(class_ids) == split.num_boxes
        assert np.bincount(class_ids, minlength=4).tolist() == list(split.boxes_per_class)
        assert sum(not row["class_ids"] for row in rows) == split.num_backgrounds
        assert all(len(row["boxes_xywhn"]) == 4 * len(row["class_ids"]) for row in rows)
    ids = [row["image_id"] for row in rows_of(config, "train")]
    assert sorted(ids) == [f"{i:06d}.jpg" for i in range(50)]
    assert ids != sorted(ids)  # shuffled


def test_rows_are_the_pictures_of_their_seed_and_two_runs_are_equal(tmp_path: Path) -> None:
    config, again = shapes_config(tmp_path / "a"), shapes_config(tmp_path / "b")
    assert raypar.prepare.run(config) == raypar.prepare.run(again)
    for row in rows_of(config, "val"):
        image, class_ids, boxes = shapes.render(0, "val", int(row["image_id"][:6]), 48, 64)
        assert row["image"] == shapes.encode(image)
        assert row["class_ids"] == class_ids.tolist()
        x1, y1, x2, y2 = boxes.T
        expected = np.stack([(x1 + x2) / 128, (y1 + y2) / 96, (x2 - x1) / 64, (y2 - y1) / 48], axis=1)
        np.testing.assert_allclose(np.reshape(row["boxes_xywhn"], (-1, 4)), expected, atol=1e-6)


def test_bccd(tmp_path: Path, bccd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path, source=str(bccd), format="voc")
    manifest = raypar.prepare.run(config)
    assert {name: split.num_images for name, split in manifest.splits.items()} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    assert manifest.num_rejected == 0
    assert (dataset_folder(config) / "rejected.jsonl").read_text() == ""
    assert manifest.class_names == ("Platelets", "RBC", "WBC")
    totals = np.sum([split.boxes_per_class for split in manifest.splits.values()], axis=0)
    assert totals.tolist() == [361, 4155, 372]  # as published, with the dataset
    assert len(manifest.splits["train"].shards) >= 3  # enough for several tasks though it is small
    row = rows_of(config, "train")[0]
    assert row["image"] == (bccd / "JPEGImages" / row["image_id"]).read_bytes()
    said = capsys.readouterr().out
    assert "205" in said
    assert len(said.splitlines()) < 24


def test_damaged_files_are_all_accounted_for(tmp_path: Path) -> None:
    png, jpeg = picture("PNG", (90, 70)), picture()
    good = {
        "good.jpg": (jpeg, BOX_LINE),
        "nested/good.png": (png, BOX_LINE),
        "background.jpg": (jpeg, None),
        "empty_label.jpg": (jpeg, ""),
        "tail.jpg": (jpeg + b"\0" * 40, BOX_LINE),
        "clipped.jpg": (jpeg, "0 0.98 0.5 0.1 0.1\n0 0.5 0.5 0 0.2\n" + BOX_LINE * 2),
    }
    bad = {
        "missing.jpg": ((None, BOX_LINE), "missing"),
        "zero.jpg": ((b"", BOX_LINE), "empty"),
        "text.jpg": ((b"this is no image at all", BOX_LINE), "not an image"),
        "cut.jpg": ((jpeg[:-30], BOX_LINE), "truncated"),
        "cut.png": ((png[: len(png) * 2 // 3], BOX_LINE), "truncated"),
        "tiny.jpg": ((picture(size=(80, 9)), BOX_LINE), "less than 10"),
        "huge.png": ((picture("PNG", (200, 100)), BOX_LINE), "max_pixels"),
        # cut: a decoder would have said so
        "undecoded.png": ((picture("PNG", (200, 100))[:-60], BOX_LINE), "max_pixels"),
        "class.jpg": ((jpeg, "1 0.5 0.5 0.1 0.1"), "class 1"),
        "nan.jpg": ((jpeg, "0 nan 0.5 0.1 0.1"), "finite"),
        "line.jpg": ((jpeg, "0 0.5 0.5"), "3 columns"),
        "word.jpg": ((jpeg, "thing 0.5 0.5 0.1 0.1"), "not a number"),
        "pixels.jpg": ((jpeg, "0 40 30 10 10"), "above 1"),
        "negative.jpg": ((jpeg, "0 -0.2 0.5 0.1 0.1"), "negative"),
    }
    files = good | {name: file for name, (file, _) in bad.items()}
    source = yolo_tree(tmp_path / "source", files)
    with (tmp_path / "source" / "train.txt").open("a") as listed:
        listed.write("./images/train/good.jpg\n")
    config = config_of(tmp_path, source=source, max_rejected=0.9, max_pixels=19_999)
    manifest = raypar.prepare.run(config)
    rejected = [
        json.loads(line) for line in (dataset_folder(config) / "rejected.jsonl").read_text().splitlines()
    ]
    reasons = {line["image_id"]: line for line in rejected}
    assert set(reasons) == set(bad)
    for name, (_, reason) in bad.items():
        assert reason in reasons[name]["reason"]
        assert (reasons[name]["split"], reasons[name]["file"]) == (
            "train",
            str(tmp_path / "source" / "images" / "train" / name),
        )
    rows = {row["image_id"]: row for row in rows_of(config, "train")}
    assert set(rows) == {*good, "good.jpg#2"}
    assert manifest.num_rejected == len(rejected) == len(bad)
    assert manifest.splits["train"].num_images + manifest.num_rejected == len(files) + 1
    assert manifest.splits["train"].num_backgrounds == 2
    assert manifest.num_repaired == 2  # tail.jpg and clipped.jpg
    assert rows["good.jpg"]["image"] == jpeg
    assert rows["nested/good.png"]["image"] == png
    assert rows["tail.jpg"]["image"] != jpeg
    assert rows["tail.jpg"]["image"].endswith(b"\xff\xd9")
    np.testing.assert_allclose(rows["good.jpg"]["boxes_xywhn"], BOX_XYWHN, atol=1e-6)
    np.testing.assert_allclose(
        rows["clipped.jpg"]["boxes_xywhn"], [0.965, 0.5, 0.07, 0.1, *BOX_XYWHN], atol=1e-6
    )
    for row in rows.values():
        assert decode(row["image"]).shape == (row["height"], row["width"], 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_rotation_is_baked_in(tmp_path: Path, kind: str) -> None:
    suffix = {"JPEG": "jpg", "PNG": "png"}[kind]
    files: dict[str, tuple[bytes | None, str | None]] = {
        f"{o}.{suffix}": (picture(kind, exif=exif(o)), BOX_LINE) for o in (1, 3, 6, 8)
    }
    config = config_of(tmp_path, source=yolo_tree(tmp_path / "source", files))
    manifest = raypar.prepare.run(config)
    assert manifest.num_repaired == 3
    where_red = {
        1: (slice(None), slice(0, 35)),
        3: (slice(None), slice(45, 80)),
        6: (slice(0, 35), slice(None)),
        8: (slice(45, 80), slice(None)),
    }
    for row in rows_of(config, "train"):
        orientation = int(row["image_id"][0])
        assert (row["height"], row["width"]) == ((60, 80) if orientation < 5 else (80, 60))
        image = decode(row["image"])
        np.testing.assert_allclose(image[where_red[orientation]].mean(axis=(0, 1)), HALVES[0], atol=6)
        with Image.open(io.BytesIO(row["image"])) as stored:
            assert stored.format == kind
            assert stored.getexif().get(0x0112, 1) == 1
        # labels are for the upright image, as in Ultralytics
        np.testing.assert_allclose(row["boxes_xywhn"], BOX_XYWHN, atol=1e-6)
        if orientation == 1:
            assert row["image"] == files[row["image_id"]][0]


def test_sixteen_bits_are_cut_as_opencv_cuts_them_when_a_rotation_is_baked_in(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 60 * 80).reshape(60, 80).astype(np.uint16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG", exif=exif(6))
    config = config_of(
        tmp_path, source=yolo_tree(tmp_path / "source", {"deep.png": (out.getvalue(), BOX_LINE)})
    )
    raypar.prepare.run(config)
    expected = np.rot90(values >> 8, -1)
    np.testing.assert_array_equal(
        decode(rows_of(config, "train")[0]["image"]), np.repeat(expected[..., None], 3, axis=2)
    )


def test_too_many_rejected_is_an_error_without_a_manifest(tmp_path: Path) -> None:
    files: dict[str, tuple[bytes | None, str | None]] = {
        f"{i}.jpg": (picture() if i else b"x", BOX_LINE) for i in range(4)
    }
    source = yolo_tree(tmp_path / "source", files)
    with pytest.raises(
        ValueError, match=r"1 of 5 images .*max_rejected=0.05 allows 0.*1 x not an image.*rejected\.jsonl"
    ) as caught:
        raypar.prepare.run(config_of(tmp_path, source=source))
    assert "\n" not in str(caught.value)
    config = config_of(tmp_path, source=source, max_rejected=0.2)
    kept = {"parts/train/00000.json", "rejected.jsonl", "train/00000.parquet"}
    # val may not be tried
    assert (
        kept
        <= set(files_under(dataset_folder(config)))
        <= kept | {"parts/val/00000.json", "val/00000.parquet"}
    )
    assert raypar.prepare.run(config).num_rejected == 1  # 1 of 5 is just allowed


def test_finished_dataset_is_kept_unless_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shapes_config(tmp_path)
    manifest = raypar.prepare.run(config)
    shard = dataset_folder(config) / "train" / "00000.parquet"
    shard.write_bytes(b"touched")
    capsys.readouterr()
    assert raypar.prepare.run(config) == manifest
    assert "complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="task: 'detect' then, 'segment' now"):
        raypar.prepare.run(shapes_config(tmp_path, task="segment"))
    assert shard.read_bytes() == b"touched"
    (dataset_folder(config) / "stray.txt").write_text("old")
    assert raypar.prepare.run(shapes_config(tmp_path, overwrite=True)) == manifest
    assert hashlib.sha256(shard.read_bytes()).hexdigest() == manifest.splits["train"].shards[0].sha256
    assert not (dataset_folder(config) / "stray.txt").exists()


def test_stopped_run_leaves_no_manifest_and_a_rerun_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = shapes_config(tmp_path)
    written = shards.write

    def stop_half_way(*args: Any) -> Any:
        for i, report in enumerate(written(*args)):
            if i == 2:
                raise KeyboardInterrupt
            yield report

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", stop_half_way)
        with pytest.raises(KeyboardInterrupt):
            raypar.prepare.run(config)
    folder = dataset_folder(config)
    left = files_under(folder)
    assert any(name.endswith(".parquet") for name in left)
    assert "manifest.json" not in left
    (folder / "train" / "00077.parquet").write_bytes(b"of an older run, cut otherwise")
    (folder / "train" / ".00000.parquet.abcd.part").write_bytes(b"half")
    manifest = raypar.prepare.run(config)
    paths = [shard.path for split in manifest.splits.values() for shard in split.shards]
    assert files_under(folder) == sorted(
        [*paths, "manifest.json", "rejected.jsonl", "run.yaml", "settings.json"]
    )
    assert manifest == raypar.prepare.run(shapes_config(tmp_path / "fresh"))


def prepared_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[Manifest, list[str]]:
    """The manifest, and the shards that were written for it now."""
    done: list[str] = []
    written = shards.write

    def noted(due: list[shards.Portion], *args: Any) -> Any:
        done.extend(portion.path for portion in due)
        return written(due, *args)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write", noted)
        return raypar.prepare.run(config), done


def test_what_a_stopped_run_finished_is_kept_unless_it_is_of_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: dict[str, tuple[bytes | None, str | None]] = {
        f"{i:03d}.jpg": (picture() if i else b"not an image", BOX_LINE) for i in range(60)
    }
    source = yolo_tree(tmp_path / "source", files)
    config = config_of(tmp_path, source=source, rows_per_group=4, shard_mb=0.005)
    expected, first = prepared_again(config, monkeypatch)
    assert len(first) >= 8
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:  # stopped when all shards are there, and no manifest
        patch.setattr(Manifest, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        again = config_of(tmp_path, **config.prepare.model_dump() | {"overwrite": True})  # type: ignore[union-attr]
        with pytest.raises(KeyboardInterrupt):
            raypar.prepare.run(again)
    folder = dataset_folder(config)
    shutil.copytree(folder, parts)

    def put_back() -> None:
        shutil.rmtree(folder)
        shutil.copytree(parts, folder)

    manifest, written = prepared_again(config, monkeypatch)
    assert (manifest, written) == (expected, [])
    assert not (folder / "parts").exists()
    assert (folder / "rejected.jsonl").read_text().count("\n") == 1

    put_back()
    (folder / first[3]).write_bytes(b"cut")
    (folder / "parts" / first[5]).with_suffix(".json").write_text("{")
    assert prepared_again(config, monkeypatch) == (expected, [first[3], first[5]])

    put_back()
    (tmp_path / "source" / "labels" / "train" / "007.txt").write_text(BOX_LINE + "0 0.5 0.5 0.1 0.1\n")
    manifest, written = prepared_again(config, monkeypatch)
    assert len(written) == 1
    assert manifest.splits["train"].num_boxes == expected.splits["train"].num_boxes + 1

    put_back()
    other = config_of(tmp_path, **config.prepare.model_dump() | {"max_pixels": 1_000_000})  # type: ignore[union-attr]
    assert len(prepared_again(other, monkeypatch)[1]) == len(first)


def test_a_killed_driver_loses_only_the_shards_that_were_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(
        tmp_path,
        format="shapes",
        shapes={"train": 1500, "val": 10, "height": 240, "width": 320},
        rows_per_group=16,
        shard_mb=0.6,
    )
    (tmp_path / "run.yaml").write_text(runfile.dump(config))
    command = [sys.executable, "-m", "raypar", "prepare", str(tmp_path / "run.yaml")]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder, deadline = dataset_folder(config), time.monotonic() + 120
    while len(list(folder.glob("parts/train/*.json"))) < 3:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    time.sleep(2)  # its tasks end with it
    done = {path.stem for path in folder.glob("parts/train/*.json")}
    manifest, written = prepared_again(config, monkeypatch)
    paths = {Path(shard.path).stem for shard in manifest.splits["train"].shards}
    assert 3 <= len(done) < len(paths)
    assert {Path(path).stem for path in written if path.startswith("train")} == paths - done
    verify.check_sums(config.folder / "dataset", manifest, ("train", "val"))
    assert manifest.splits["train"].num_images == 1500
    ids = [row["image_id"] for row in rows_of(config, "train")]
    assert sorted(ids) == [f"{i:06d}.jpg" for i in range(1500)]


def test_append_adds_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, tuple[bytes | None, str | None]] = {
        f"{i:03d}.jpg": (picture() if i else b"not an image", BOX_LINE) for i in range(30)
    }
    root = tmp_path / "source"
    source = yolo_tree(root, files)
    options = {"source": source, "rows_per_group": 4, "shard_mb": 0.005, "append": True, "max_rejected": 0.1}
    config = config_of(tmp_path, **options)
    before = raypar.prepare.run(config)  # nothing is there yet: as without append
    rows = rows_of(config, "train")
    text = (dataset_folder(config) / "manifest.json").read_text()
    assert raypar.prepare.run(config) == before
    assert (dataset_folder(config) / "manifest.json").read_text() == text
    assert "nothing to add" in capsys.readouterr().out

    shutil.rmtree(root)
    more = {f"{i:03d}.jpg": (picture(size=(100, 60)), BOX_LINE * 1) for i in range(20, 45)}
    # 20 to 29 are there already, though they look otherwise now
    yolo_tree(root, {**more, "bad.jpg": (b"", BOX_LINE)})
    with (root / "train.txt").open("a") as file:
        file.write("./images/train/020.jpg\n./images/train/040.jpg\n./images/train/040.jpg\n")
    manifest, written = prepared_again(config, monkeypatch)
    old = [shard.path for shard in before.splits["train"].shards]
    assert not set(written) & set(old)
    assert [shard.path for shard in manifest.splits["train"].shards][: len(old)] == old
    assert manifest.splits["train"].num_images == 29 + 15 + 3
    assert manifest.splits["train"].boxes_per_class == (29 + 15 + 3,)
    assert manifest.splits["train"].strata == (*before.splits["train"].strata, 5)  # 18 images in groups of 4
    assert manifest.splits["val"] == before.splits["val"]
    assert rows_of(config, "train")[:29] == rows
    repeated = ["020.jpg#2", "040.jpg#2", "040.jpg#3"]
    assert sorted(row["image_id"] for row in rows_of(config, "train")[29:]) == sorted(
        [*(f"{i:03d}.jpg" for i in range(30, 45)), *repeated]
    )
    rejected = [
        json.loads(line)["image_id"]
        for line in (dataset_folder(config) / "rejected.jsonl").read_text().splitlines()
    ]
    assert rejected == ["000.jpg", "bad.jpg"]
    assert manifest.num_rejected == 2
    assert Manifest.load(config.folder / "dataset") == manifest
    verify.check_sums(config.folder / "dataset", manifest, ("train", "val"))

    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [another]\n")
    with pytest.raises(ValueError, match=r"class_names: \('thing',\) there, \('another',\) in the source"):
        raypar.prepare.run(config)


def test_source_without_a_single_box_is_an_error(tmp_path: Path) -> None:
    source = yolo_tree(tmp_path / "source", {"a.jpg": (picture(), "")})
    (tmp_path / "source" / "labels" / "val" / "ok.txt").write_text("")
    with pytest.raises(ValueError, match="none of the 2 images has a label"):
        raypar.prepare.run(config_of(tmp_path, source=source))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (None, "no 'prepare' section"),
        ({"source": "/nowhere/data.yaml"}, "does not exist"),
        ({"source": "/nowhere", "format": "coco"}, "does not exist"),
        ({"source": "/nowhere", "format": "voc"}, "does not exist"),
        (
            {"source": "s3://bucket/data.yaml?endpoint_override=127.0.0.1:9&scheme=http"},
            "s3://bucket/data.yaml cannot be reached",
        ),
    ],
)
def test_check_says_what_is_wrong(prepare: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        raypar.prepare.check(RunConfig.model_validate({"name": "run", "prepare": prepare}))
    assert "\n" not in str(caught.value)


def test_cut_keeps_order_row_groups_and_size() -> None:
    sizes = np.random.default_rng(0).uniform(1e5, 3e5, 1000)
    parts = shards.cut(sizes, 20e6, 16)
    assert [row for part in parts for row in part] == list(range(1000))
    assert all(len(part) % 16 == 0 for part in parts[:-1])
    num_bytes = [sizes[part.start : part.stop].sum() for part in parts]
    assert max(num_bytes) < 26e6
    assert len(parts) == 10
    assert len(shards.cut(sizes, 1e12, 64)) == 4  # enough for several tasks
    assert len(shards.cut(sizes[:200], 1e12, 64)) == 1
    assert len(shards.cut(np.zeros(9), 1e6, 64)) == 1  # files that are all missing
    assert shards.cut(np.zeros(0), 1e6, 64) == []
