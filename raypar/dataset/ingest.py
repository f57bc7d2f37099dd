"""One shard: records in, a Parquet file and its account out. ``write_shard`` runs in a Ray task, once a shard.

An image's bytes are stored as they are, except where they would mislead a reader: an EXIF rotation is baked in, a JPEG with bytes after its
end is saved anew (as Ultralytics does), and a file that OpenCV cannot read but Pillow can is re-encoded.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps

from raypar.dataset.formats import Labels, Record, coco, shapes, voc, yolo
from raypar.dataset.manifest import Shard
from raypar.dataset.schema import row_schema
from raypar.images import decode
from raypar.storage import Folder

READ_LABELS = {"yolo": yolo.read_labels, "coco": coco.read_labels, "voc": voc.read_labels}
MIN_SIDE_PX = 10  # ultralytics.data.utils.check_image
CLIP_TOLERANCE = 1e-4  # boxes that leave the image by less (rounding in a text file) are clipped, but not worth counting
JPEG_QUALITY = 95
LOSSLESS = frozenset({"PNG", "BMP", "TIFF"})  # Pillow's names; when re-encoded they become PNG, others JPEG
COMPRESSION = {"image_id": "zstd", "image": "none", "height": "zstd", "width": "zstd"} | {
    f"{name}.list.element": "zstd" for name in ("class_ids", "boxes_xywhn")
}


@dataclass(frozen=True)
class ShardJob:
    """What a task needs to write one shard; ``path`` is relative to the dataset folder."""

    dataset: Folder
    path: str
    split: str
    format: str
    num_classes: int
    records: tuple[Record, ...]
    rows_per_group: int
    max_pixels: int
    seed: int = 0  # for shapes, as the next
    shapes_hw: tuple[int, int] = (0, 0)


@dataclass
class ShardReport:
    """What became of a shard's records; ``shard`` is None when no image was left to write."""

    split: str
    shard: Shard | None = None
    num_images: int = 0
    num_boxes: int = 0
    num_backgrounds: int = 0
    num_repaired: int = 0  # images
    boxes_per_class: Counter[int] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)  # by kind: images or boxes
    rejected: list[dict[str, str]] = field(default_factory=list)  # split, image_id, file, reason


@dataclass(frozen=True)
class Picture:
    """An image that every reader of the dataset can decode.

    Attributes:
        data: encoded bytes, upright.
        image_hw: px.
        repairs: what was done to the bytes.
    """

    data: bytes
    image_hw: tuple[int, int]
    repairs: tuple[str, ...] = ()


def write_shard(job: ShardJob) -> ShardReport:
    """Reads, checks and writes the images of one shard; the file appears whole or not at all."""
    report = ShardReport(job.split)
    sink = pa.BufferOutputStream()
    row_groups: list[int] = []
    rows: list[dict[str, object]] = []
    with pq.ParquetWriter(
        sink, row_schema("detect"), compression=COMPRESSION, use_dictionary=False, write_statistics=["image_id"]
    ) as writer:

        def flush() -> None:
            writer.write_table(pa.Table.from_pylist(rows, schema=row_schema("detect")), row_group_size=len(rows))
            row_groups.append(len(rows))
            rows.clear()

        for record in job.records:
            row = _row_or_reject(job, record, report)
            if row is not None:
                rows.append(row)
                if len(rows) == job.rows_per_group:
                    flush()
        if rows:
            flush()
    if row_groups:
        data = sink.getvalue().to_pybytes()
        job.dataset.write(job.path, data)
        report.shard = Shard(path=job.path, row_groups=tuple(row_groups), num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return report


def _row_or_reject(job: ShardJob, record: Record, report: ShardReport) -> dict[str, object] | None:
    """A row, counted in the report; None when the record was set aside."""
    try:
        picture, labels = _read(job, record)
        class_ids, boxes, repairs = tidy(labels)
    except ValueError as error:
        report.rejected.append({"split": job.split, "image_id": record.image_id, "file": record.image_path, "reason": str(error)})
        return None
    repairs.update(picture.repairs)
    report.num_images += 1
    report.num_boxes += len(class_ids)
    report.num_backgrounds += not len(class_ids)
    report.num_repaired += bool(repairs)
    report.repairs += repairs
    report.boxes_per_class.update(class_ids.tolist())
    return {
        "image_id": record.image_id,
        "image": picture.data,
        "height": picture.image_hw[0],
        "width": picture.image_hw[1],
        "class_ids": class_ids.astype(np.int32),
        "boxes_xywhn": boxes.astype(np.float32).ravel(),
    }


def _read(job: ShardJob, record: Record) -> tuple[Picture, Labels]:
    if job.format == "shapes":
        image, class_ids, boxes_xyxy = shapes.render(job.seed, job.split, record.labels, *job.shapes_hw)
        return Picture(shapes.encode(image), job.shapes_hw), shapes.labels(class_ids, boxes_xyxy, job.shapes_hw)
    picture = read_picture(record.image_path, job.max_pixels)
    try:
        return picture, READ_LABELS[job.format](record, job.num_classes, picture.image_hw)
    except OSError as error:
        raise ValueError(f"labels cannot be read ({error.strerror or error})") from error


def tidy(labels: Labels) -> tuple[NDArray[np.int64], NDArray[np.float64], Counter[str]]:
    """Clips boxes to the image and drops those of no area.

    Returns:
        class_ids int64 (N,), boxes_xywhn float64 (N, 4) in [0, 1], and how many boxes were mended, by kind.
    """
    boxes = labels.boxes_xywhn.copy()
    has_area = (boxes[:, 2:] > 0).all(axis=1)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    inside = corners.clip(0, 1)
    is_outside = (corners != inside).any(axis=1)
    clipped = np.concatenate([(inside[:, :2] + inside[:, 2:]) / 2, inside[:, 2:] - inside[:, :2]], axis=1)
    boxes[is_outside] = clipped[is_outside]
    is_kept = has_area & (boxes[:, 2:] > 0).all(axis=1)
    num_clipped = int((is_kept & (np.abs(corners - inside).max(axis=1, initial=0) > CLIP_TOLERANCE)).sum())
    repairs = Counter(
        {
            "boxes clipped to the image": num_clipped,
            "boxes without area dropped": int((~is_kept).sum()),
            "duplicate labels dropped": labels.num_duplicates,
        }
    )
    return labels.class_ids[is_kept], boxes[is_kept], +repairs


def read_picture(path: str, max_pixels: int) -> Picture:
    """Reads and checks an image file; mends what can be mended.

    Raises:
        ValueError: it is missing, no image, truncated, too small or too large, with the reason.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError("file is missing") from error
    except OSError as error:
        raise ValueError(f"file cannot be read ({error.strerror or error})") from error
    if not data:
        raise ValueError("file is empty")
    kind, (width, height) = _header(data)
    if width * height > max_pixels:
        raise ValueError(f"image has {width * height} pixels, prepare.max_pixels is {max_pixels}")
    if min(width, height) < MIN_SIDE_PX:
        raise ValueError(f"image has {width}x{height} px: less than {MIN_SIDE_PX} on a side")
    has_tail = kind == "JPEG" and not data.endswith(b"\xff\xd9")
    if kind != "JPEG" or has_tail:
        _check_whole(data)
    orientation = _orientation(data)
    image_hw = (height, width)
    if orientation != 1:
        image_hw = image_hw[::-1] if orientation >= 5 else image_hw
        return Picture(_encode(data, kind, JPEG_QUALITY), image_hw, ("EXIF rotations baked in",))
    if has_tail:
        return Picture(_encode(data, "JPEG", 100), image_hw, ("JPEGs with bytes after their end saved anew",))
    if not _is_decodable(data, image_hw):
        return Picture(_encode(data, kind, JPEG_QUALITY), image_hw, ("files that OpenCV cannot read re-encoded",))
    return Picture(data, image_hw)


def _header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format as Pillow names it and (width, height) px as stored; the pixels stay undecoded."""
    Image.MAX_IMAGE_PIXELS = None  # prepare.max_pixels decides, with a reason in rejected.jsonl
    try:
        with Image.open(io.BytesIO(data)) as image:
            return str(image.format), image.size
    except Exception as error:  # Pillow's readers raise all kinds on damaged files
        raise ValueError(f"not an image that can be read ({_one_line(error)})") from error


def _orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none. Pillow decodes a PNG to find it: check the size first."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _check_whole(data: bytes) -> None:
    """Pillow refuses a truncated file; OpenCV returns what there is of it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:
        raise ValueError(f"image is truncated or damaged ({_one_line(error)})") from error


def _is_decodable(data: bytes, image_hw: tuple[int, int]) -> bool:
    """Whether those who read the dataset will get the pixels that the header promises."""
    try:
        return decode(data).shape[:2] == image_hw
    except ValueError:
        return False


def _encode(data: bytes, kind: str, quality: int) -> bytes:
    """Upright pixels as PNG where the file was lossless, else as JPEG with full chroma."""
    out = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would saturate; OpenCV keeps the upper 8 bits
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            upright = upright.convert("RGB")
    except Exception as error:
        raise ValueError(f"image is truncated or damaged ({_one_line(error)})") from error
    if kind in LOSSLESS:
        upright.save(out, "PNG")
    else:
        upright.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.partition(" <_io.BytesIO")[0] or type(error).__name__
