"""Damaged images and labels: nothing crashes or hangs, and every file is kept, mended, or set aside with a reason."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import raypar.prepare
from raypar.augment.geometry import Recipe
from raypar.config import RunConfig
from raypar.dataset.formats import Record, coco, voc, yolo
from raypar.dataset.ingest import ShardJob, ShardReport, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, render
from raypar.dataset.tidy import tidy
from raypar.images import decode
from raypar.storage import Folder

NUM_FILES, NUM_THROUGH_RAY, SHARD_FILES = 2000, 200, 100
MAX_PIXELS = 1_000_000
Rng = np.random.Generator


def clean_image(rng: Rng) -> bytes:
    """A small picture in one of the encodings that are met."""
    kind, mode, options = (
        ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("JPEG", "RGB", {"progressive": True}), ("PNG", "RGB", {}),
        ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "I;16", {}), ("PNG", "1", {}), ("WEBP", "RGB", {}), ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}), ("TIFF", "RGB", {"compression": "tiff_lzw"}), ("GIF", "P", {}), ("PPM", "RGB", {}),
    )[rng.integers(15)]  # fmt: skip
    height, width = (int(x) for x in rng.integers(12, 64, 2))
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65535, (height, width)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    if rng.random() < 0.2:
        exif[0x0112] = int(rng.integers(0, 12)) if kind != "TIFF" else 6
    out = io.BytesIO()
    image.save(out, kind, **options, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return out.getvalue()


def cut_short(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def flip_bits(data: bytes, rng: Rng) -> bytes:
    flipped = bytearray(data)
    for _ in range(int(rng.integers(1, 40))):
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
    return bytes(flipped)


def flip_header(data: bytes, rng: Rng) -> bytes:
    head = min(len(data), 64)
    return flip_bits(data[:head], rng) + data[head:]


def blank_a_part(data: bytes, rng: Rng) -> bytes:
    start = int(rng.integers(len(data)))
    length = int(rng.integers(1, len(data)))
    return data[:start] + bytes([int(rng.integers(256))]) * length + data[start + length :]


def absurd_png(data: bytes, rng: Rng) -> bytes:
    """A PNG whose header, with a right checksum, promises up to 2^31 x 2^31 px."""
    height, width = (int(2 ** rng.uniform(0, 31)) for _ in range(2))
    ihdr = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + ihdr + zlib.crc32(ihdr).to_bytes(4, "big")
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk
        + (len(body) - 4).to_bytes(4, "big")
        + body
        + zlib.crc32(body).to_bytes(4, "big")
    )


def absurd_jpeg(data: bytes, rng: Rng) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, "JPEG")
    jpeg = bytearray(out.getvalue())
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = rng.integers(0, 256, 4).astype(np.uint8).tobytes()
    return bytes(jpeg)


IMAGE_DAMAGE: list[Callable[[bytes, Rng], bytes]] = [
    lambda data, rng: data, lambda data, rng: data, cut_short, cut_short, flip_bits, flip_bits, flip_header, blank_a_part, absurd_png,
    absurd_jpeg, lambda data, rng: b"", lambda data, rng: rng.bytes(500), lambda data, rng: b"<html>404 not found</html>",
    lambda data, rng: data + rng.bytes(int(rng.integers(1, 300))), lambda data, rng: data[:8] + rng.bytes(300),
    lambda data, rng: data + data, lambda data, rng: b"%PDF-1.4 " + data, lambda data, rng: b"%!PS-Adobe-3.0 EPSF-3.0\n" + data,
]  # fmt: skip


def clean_labels(rng: Rng) -> str:
    lines = []
    for _ in range(int(rng.integers(0, 5))):
        width, height = rng.uniform(0.01, 0.5, 2)
        lines.append(f"{rng.integers(3)} {rng.uniform(width / 2, 1 - width / 2):.6f} {rng.uniform(height / 2, 1 - height / 2):.6f} "
                     f"{width:.6f} {height:.6f}\n")  # fmt: skip
    return "".join(lines)


LABEL_LINES = [
    "0 nan 0.5 0.1 0.1", "0 0.5 inf 0.1 0.1", "-1 0.5 0.5 0.1 0.1", "3 0.5 0.5 0.1 0.1", "99999999999999999999999999 0.5 0.5 0.1 0.1",
    "1.5 0.5 0.5 0.1 0.1", "1e400 0.5 0.5 0.1 0.1", "0 -0.5 0.5 0.1 0.1", "0 0.5 0.5 -0.1 0.1", "0 320 240 64 48", "0 0.5 0.5", "cat 0.5 0.5 0.1 0.1",
    "0 0.5 0.5 0 0", "0 1.005 0.5 0.1 0.1", "0 0.5,0.5,0.1,0.1", "0 0.5 0.5 0.1 0.1 0.9", "0 0x1p-1 0.5 0.1 0.1", "0 1_0 0.5 0.1 0.1",
    "0 0.1 0.1 0.9 0.1 0.9 0.9", "0 0.1 0.1 nan 0.1 0.9 0.9", "0 1e-320 1e-320 1e-320 1e-320", "nan nan nan nan nan", "\u0660 0.5 0.5 0.1 0.1",
    "0 " + "0.5 " * 20_000, "0 " + "9" * 20_000 + " 0.5 0.1 0.1", "0 0.5 0.5 1e-30 1", "\0 0 0 0 0", "0 0.5 0.5 0.1 0.1 \x00", "[0, 0.5, 0.5, 0.1, 0.1]",
]  # fmt: skip


def damaged_labels(rng: Rng) -> bytes | None:
    """A label file's bytes; None: there is none."""
    kind = int(rng.integers(10))
    if kind < 2:
        return clean_labels(rng).encode()
    if kind == 2:
        return [None, b"", b"\n\n \t\n", b"\xef\xbb\xbf", b"\xff\xfe0\0 \0", b"\0" * 50][rng.integers(6)]
    if kind == 3:
        return rng.bytes(int(rng.integers(1, 400)))
    if kind == 4:
        return flip_bits((clean_labels(rng) or "0 .5 .5 .1 .1").encode(), rng)
    if kind == 5:
        return clean_labels(rng).encode("utf-16")
    if kind == 6:
        return (clean_labels(rng) or "0 .5 .5 .1 .1").replace("\n", "\r").encode()
    return (clean_labels(rng) + LABEL_LINES[rng.integers(len(LABEL_LINES))] + "\n").encode()


def odd_file(path: Path, kind: int) -> None:
    """What is called an image and is no file of bytes."""
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path)
    elif kind == 2:
        path.symlink_to("nowhere.jpg")
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.symlink_to("/dev/zero")
    elif kind == 5:
        path.write_bytes(clean_image(np.random.default_rng(0)))
        path.chmod(0)
    elif kind == 6:
        with path.open("wb") as file:
            file.truncate(8 << 30)  # a hole: takes no room on the disk
    else:
        path.symlink_to("/proc/self/mem")


def write_files(root: Path, count: int, seed: int) -> list[Record]:
    """``count`` images with labels under ``root``, each damaged in a way that follows from the seed and its number."""
    records = []
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        suffix = ("jpg", "png", "webp", "bmp", "tif", "JPEG")[rng.integers(6)]
        image = root / "images" / "train" / f"{number:05d}.{suffix}"
        label = root / "labels" / "train" / f"{number:05d}.txt"
        if number % 50 == 49:
            odd_file(image, number // 50 % 8)
        else:
            image.write_bytes(IMAGE_DAMAGE[rng.integers(len(IMAGE_DAMAGE))](clean_image(rng), rng))
        if number % 50 == 24:
            odd_file(label, number // 50 % 8)
        elif (labels := damaged_labels(rng)) is not None:
            label.write_bytes(labels)
        records.append(Record(image.name, str(image), str(label)))
    return records


def write_shards(dataset: Folder, records: list[Record]) -> list[ShardReport]:
    return [
        write_shard(
            ShardJob(
                dataset,
                f"train/{i:05d}.parquet",
                "train",
                "yolo",
                3,
                tuple(records[i : i + SHARD_FILES]),
                16,
                MAX_PIXELS,
            )
        )
        for i in range(0, len(records), SHARD_FILES)
    ]


def check_account(rows: list[dict[str, Any]], rejected: list[dict[str, str]], names: set[str]) -> None:
    """Every file is a good row or a line with a reason, and never both."""
    kept, refused = [row["image_id"] for row in rows], [line["image_id"] for line in rejected]
    assert len(kept) + len(refused) == len(names)
    assert {*kept, *refused} == names
    for line in rejected:
        assert line["reason"].strip(), line
        assert len(line["reason"]) < 400, line
        assert "\n" not in line["reason"], line
    for row in rows:
        assert decode(row["image"]).shape == (row["height"], row["width"], 3), row["image_id"]
        boxes = np.reshape(row["boxes_xywhn"], (-1, 4))
        assert len(boxes) == len(row["class_ids"])
        assert np.isfinite(boxes).all()
        assert (boxes >= 0).all()
        assert (boxes <= 1).all()
        assert (boxes[:, 2:] > 0).all()
        assert all(0 <= class_id < 3 for class_id in row["class_ids"])


def spec_of(dataset: Folder, split: Split) -> StreamSpec:
    groups = tuple(n for shard in split.shards for n in shard.row_groups)
    plan = Plan(groups, seed=0, global_batch=8, epochs=1, window_images=64)
    recipe = Recipe(
        imgsz=64, mosaic=1.0, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5
    )
    return StreamSpec.of(dataset, split, plan, recipe, mosaic_epochs=1, albumentations=[], world_size=1)


def test_damaged_files_never_stop_a_shard_and_the_stream_shows_what_is_left(tmp_path: Path) -> None:
    records = write_files(tmp_path / "source", NUM_FILES, seed=0)
    dataset = Folder.at(tmp_path / "dataset")
    reports = write_shards(dataset, records)
    shards = tuple(report.shard for report in reports if report.shard)
    rows = [row for shard in shards for row in pq.read_table(f"{dataset.path}/{shard.path}").to_pylist()]
    check_account(
        rows,
        [line for report in reports for line in report.rejected],
        {record.image_id for record in records},
    )
    assert len(rows) > NUM_FILES // 20
    assert sum(report.num_repaired for report in reports) > NUM_FILES // 200
    spec = spec_of(dataset, Split(shards=shards, num_images=len(rows)))
    batches = [batch for item in spec.plan.items() for batch in render(spec, item)]
    # prepare lets nothing through that cannot be decoded
    assert sum(batch.num_replaced for batch in batches) == 0
    assert sorted({int(row) for batch in batches for row in batch.rows}) == list(range(len(rows)))
    assert all(np.isfinite(batch.boxes_xywhn).all() for batch in batches)


def test_rows_damaged_after_prepare_are_replaced_alike_each_time_and_counted(tmp_path: Path) -> None:
    """As if shards had been altered while a run was going on: what can be decoded is shown, the rest is replaced."""
    rng, dataset = np.random.default_rng(1), Folder.at(tmp_path / "dataset")
    folder = tmp_path / "source"
    folder.mkdir()
    records = []
    for number in range(200):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)).save(
            out, "PNG" if number % 2 else "JPEG"
        )
        (folder / f"{number}.png").write_bytes(out.getvalue())
        records.append(Record(f"{number}.png", str(folder / f"{number}.png"), str(folder / "none.txt")))
    report = write_shard(
        ShardJob(dataset, "train/0.parquet", "train", "yolo", 3, tuple(records), 16, MAX_PIXELS)
    )
    assert report.shard is not None
    table = pq.read_table(f"{dataset.path}/train/0.parquet")
    images = [
        IMAGE_DAMAGE[rng.integers(2, 8)](image, rng) if rng.random() < 0.5 else image
        for image in table["image"].to_pylist()
    ]
    num_bad = sum(not is_decodable(image) for image in images)
    assert num_bad > 20
    damaged = table.set_column(1, table.schema.field("image"), pa.array(images, pa.binary()))
    pq.write_table(damaged, f"{dataset.path}/train/0.parquet", row_group_size=16)
    spec = spec_of(dataset, Split(shards=(report.shard,), num_images=200))
    first, second = ([batch for item in spec.plan.items() for batch in render(spec, item)] for _ in range(2))
    assert sum(batch.num_replaced for batch in first) == num_bad
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.images, other.images)


def is_decodable(data: bytes) -> bool:
    try:
        decode(data)
    except ValueError:
        return False
    return True


VALUES = [
    0,
    1,
    -1,
    7,
    1.5,
    10**400,
    -(10**400),
    1e308,
    float("nan"),
    float("inf"),
    "3",
    "x",
    "",
    None,
    True,
    [],
    [1],
    {},
    {"a": 1},
    "9" * 500,
]


def coordinate(rng: Rng) -> Any:
    return VALUES[rng.integers(len(VALUES))] if rng.random() < 0.15 else float(rng.uniform(0, 20))


def reason(read: Callable[[], object]) -> str:
    """Why labels were refused; empty when they were read."""
    try:
        read()
    except ValueError as error:
        return str(error)
    return ""


def test_coco_annotations_of_any_value_are_read_or_refused() -> None:
    num_read = 0
    for number in range(1000):
        rng = np.random.default_rng([2, number])

        boxes = [
            [coordinate(rng) for _ in range(rng.choice([4, 4, 4, 4, 3, 5]))]
            for _ in range(int(rng.integers(0, 4)))
        ]
        boxes += [VALUES[rng.integers(len(VALUES))]] if rng.random() < 0.2 else []
        record = Record("a", "a", ((40, 50), [(int(rng.integers(-1, 4)), box) for box in boxes]))
        if refused := reason(lambda record=record: coco.read_labels(record, 3, (40, 50))):  # type: ignore[misc]
            assert len(refused) < 400
            continue
        num_read += 1
        tidied = tidy(coco.read_labels(record, 3, (40, 50)))[0].boxes_xywhn
        assert np.isfinite(tidied).all()
        assert ((tidied >= 0) & (tidied <= 1)).all()
    assert num_read > 100


def test_voc_annotations_of_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    item = "<object><name>a</name><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
    clean = f"<annotation><size><width>50</width><height>40</height></size>{item * 3}</annotation>"
    laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
    bombs = [
        f'<!DOCTYPE a [<!ENTITY l0 "ha">{laughs}]><annotation><object><name>&l9;</name></object></annotation>'.encode(),
        b'<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>',
        b"<a>" * 200_000, b"", b'<?xml version="1.0" encoding="no-such"?><a/>', b'<?xml version="1.0" encoding="utf-7"?><a/>', clean.encode("utf-16"),
    ]  # fmt: skip
    record = Record("a", "a", (str(tmp_path / "a.xml"), ("a", "b")))
    num_read = 0
    for number in range(500):
        rng = np.random.default_rng([3, number])
        damaged = (
            [flip_bits, cut_short, blank_a_part][rng.integers(3)](clean.encode(), rng)
            if rng.random() < 0.8
            else clean.encode()
        )
        (tmp_path / "a.xml").write_bytes(bombs[number] if number < len(bombs) else damaged)
        refused = reason(lambda: voc.read_labels(record, 2, (40, 50)))
        assert len(refused) < 400
        num_read += not refused
    assert 50 < num_read < 450


@pytest.mark.usefixtures("ray_4_cpus")
def test_prepare_takes_a_folder_of_damaged_files(tmp_path: Path) -> None:
    root = tmp_path / "source"
    records = write_files(root, NUM_THROUGH_RAY, seed=1)
    (root / "images" / "val").mkdir()
    Image.new("RGB", (50, 40)).save(root / "images" / "val" / "good.png")
    # two loops: 2^40 folders, to who follows them
    (root / "images" / "train" / "again").symlink_to(root / "images" / "train")
    (root / "images" / "train" / "and_again").symlink_to(root / "images")
    not_utf8 = Path(os.fsdecode(os.fsencode(root / "images" / "train") + b"/caf\xe9.png"))
    Image.new("RGB", (50, 40)).save(not_utf8)
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b, c]\n")
    config = RunConfig.model_validate(
        {
            "name": "fuzz",
            "storage": str(tmp_path / "runs"),
            "prepare": {"source": str(root), "max_rejected": 0.95, "max_pixels": MAX_PIXELS},
        }
    )
    manifest = raypar.prepare.run(config)
    folder = Path(config.folder.uri) / "dataset"
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    rows = [
        row
        for shard in manifest.splits["train"].shards
        for row in pq.read_table(folder / shard.path).to_pylist()
    ]
    check_account(
        rows, rejected, {record.image_id for record in records} | {not_utf8.name, "and_again/val/good.png"}
    )
    assert Manifest.load(config.folder / "dataset").num_rejected == len(rejected)
    assert {yolo.label_path(record.image_path) for record in records} == {record.labels for record in records}
