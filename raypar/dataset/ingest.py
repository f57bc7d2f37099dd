"""One shard: records in, a Parquet file and its account out. ``write_shard`` runs in a Ray task, once a shard.

An image's bytes are stored as they are, except where they would mislead a reader: an EXIF rotation is baked in, a JPEG with bytes after its
end is saved again (as Ultralytics does), and a file that OpenCV cannot read but Pillow can is re-encoded.
"""

from __future__ import annotations

import hashlib
import io
import stat
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from raypar.dataset import remote
from raypar.dataset.formats import (
    MAX_LABEL_BYTES,
    Fetched,
    Labels,
    Record,
    coco,
    folders,
    label_file,
    shapes,
    voc,
    yolo,
)
from raypar.dataset.manifest import Shard
from raypar.dataset.schema import row_schema
from raypar.dataset.tidy import columns, tidy
from raypar.image_header import read_header
from raypar.images import Image, decode, is_turned
from raypar.storage import Folder

MIN_SIDE_PX = 10  # ultralytics.data.utils.check_image
MAX_FILE_BYTES = 1 << 30  # of an image; what is larger would be no image, or too much for a row
JPEG_QUALITY = 95
LOSSLESS = frozenset({"PNG", "BMP", "TIFF"})  # Pillow's names; when re-encoded they become PNG, others JPEG
COMPRESSION = {"image_id": "zstd", "image": "none", "height": "zstd", "width": "zstd", "class_id": "zstd"} | {
    f"{name}.list.element": "zstd"
    for name in ("class_ids", "boxes_xywhn", "keypoints", "segments_xyn.list.element")
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
    task: str = "detect"
    keypoint_shape: tuple[int, int] | None = None
    source: Folder | None = None  # opens the store that records are in, if they are in one


@dataclass
class ShardReport:
    """What became of a shard's records; ``shard`` is None when no image was left to write."""

    split: str
    shard: Shard | None = None
    num_images: int = 0
    num_boxes: int = 0
    num_polygons: int = 0
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
        sink,
        row_schema(job.task),
        compression=COMPRESSION,
        use_dictionary=False,
        write_statistics=["image_id"],
    ) as writer:

        def flush() -> None:
            writer.write_table(
                pa.Table.from_pylist(rows, schema=row_schema(job.task)), row_group_size=len(rows)
            )
            row_groups.append(len(rows))
            rows.clear()

        for record, fetched in _read_ahead(job):
            row = _row_or_reject(job, record, report, fetched)
            if row is not None:
                rows.append(row)
                if len(rows) == job.rows_per_group:
                    flush()
        if rows:
            flush()
    if row_groups:
        data = sink.getvalue().to_pybytes()
        job.dataset.write(job.path, data)
        report.shard = Shard(
            path=job.path,
            row_groups=tuple(row_groups),
            num_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
    return report


def _read_ahead(job: ShardJob) -> Iterator[tuple[Record, Fetched | None]]:
    """Each record, with its files where they come from a store: of a dozen others the reading goes on meanwhile.

    Raises:
        ValueError: the store fails. An image is never set aside for that.
    """
    if job.source is None:
        yield from ((record, None) for record in job.records)
        return
    waiting: deque[tuple[Record, Future[Fetched]]] = deque()
    threads = ThreadPoolExecutor(remote.THREADS)
    try:
        for record in job.records:
            waiting.append((record, threads.submit(_fetch, job.source, record)))
            if len(waiting) > remote.THREADS:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"prepare.source fails: {reason}; shards that are whole are kept: the same command goes on from there"
        ) from error
    finally:
        threads.shutdown(cancel_futures=True)


def _fetch(source: Folder, record: Record) -> Fetched:
    limits = {record.image_path: MAX_FILE_BYTES}
    if labels := label_file(record):
        limits[labels] = MAX_LABEL_BYTES
    found: dict[str, bytes | ValueError | None] = {}
    for path, limit in limits.items():
        try:
            found[path] = remote.read_file(source, path, limit)
        except ValueError as error:
            found[path] = error
    return found


def _row_or_reject(
    job: ShardJob, record: Record, report: ShardReport, fetched: Fetched | None
) -> dict[str, object] | None:
    """A row, counted in the report; None when the record was set aside."""
    try:
        if not record.image_id.isascii():
            _check_name(record.image_id)
        picture, labels = _read(job, record, fetched)
        labels, repairs = tidy(labels, job.task)
    except ValueError as error:
        report.rejected.append(
            {"split": job.split, "image_id": record.image_id, "file": record.image_path, "reason": str(error)}
        )
        return None
    repairs.update(picture.repairs)
    report.num_images += 1
    report.num_boxes += len(labels.class_ids)
    report.num_polygons += len(labels.segments_xyn or ())
    report.num_backgrounds += not len(labels.class_ids)
    report.num_repaired += bool(repairs)
    report.repairs += repairs
    report.boxes_per_class.update(labels.class_ids.tolist())
    return {
        "image_id": record.image_id,
        "image": picture.data,
        "height": picture.image_hw[0],
        "width": picture.image_hw[1],
        **columns(labels, job.task),
    }


def _check_name(image_id: str) -> None:
    try:
        image_id.encode()
    except UnicodeEncodeError as error:
        raise ValueError("its name is not text in UTF-8") from error


def _read(job: ShardJob, record: Record, fetched: Fetched | None) -> tuple[Picture, Labels]:
    if job.format == "shapes":
        image, labels = shapes.draw(job.seed, job.split, record.labels, *job.shapes_hw, task=job.task)
        return Picture(shapes.encode(image), job.shapes_hw), labels
    picture = read_picture(record.image_path, job.max_pixels, fetched)
    try:
        return picture, read_labels(job, record, picture.image_hw, fetched)
    except OSError as error:
        raise ValueError(f"labels cannot be read ({error.strerror or error})") from error


def read_labels(
    job: ShardJob, record: Record, image_hw: tuple[int, int], fetched: Fetched | None = None
) -> Labels:
    """An image's labels, as its format writes them."""
    if job.format == "voc":
        return voc.read_labels(record, job.num_classes, image_hw, fetched)
    if job.format == "folders":
        return folders.read_labels(record)
    if job.format == "coco":
        return coco.read_labels(record, job.num_classes, image_hw, job.task, job.keypoint_shape)
    return yolo.read_labels(record, job.num_classes, image_hw, job.task, job.keypoint_shape, fetched)


def read_picture(path: str, max_pixels: int, fetched: Fetched | None = None) -> Picture:
    """Reads and checks an image file; mends what can be mended.

    Raises:
        ValueError: it is missing, no image, truncated, too small or too large, with the reason.
    """
    data = _read_file(path) if fetched is None else _of(fetched[path])
    if not data:
        raise ValueError("file is empty")
    header = read_header(data)
    height, width = header.height, header.width
    if width * height > max_pixels:
        raise ValueError(f"image has {width * height} pixels, prepare.max_pixels is {max_pixels}")
    if min(width, height) < MIN_SIDE_PX:
        raise ValueError(f"image has {width}x{height} px: less than {MIN_SIDE_PX} on a side")
    has_tail = header.kind == "JPEG" and not data.endswith(b"\xff\xd9")
    if header.kind != "JPEG" or has_tail:
        _check_whole(data, header.kind)
    image = decode(data)
    if is_turned(data):
        return _encode(image, header.kind, JPEG_QUALITY, "EXIF rotations baked in")
    if has_tail:
        return _encode(image, "JPEG", 100, "JPEGs with bytes after their end saved again")
    if header.needs_pillow and header.kind in LOSSLESS:
        return _encode(image, header.kind, JPEG_QUALITY, "files that OpenCV cannot read re-encoded")
    return Picture(data, (image.shape[0], image.shape[1]))


def _read_file(path: str) -> bytes:
    """A file's bytes; what is no plain file (a folder, a pipe, a device) is never opened: reading it might not end."""
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            raise ValueError(
                "it is a folder" if stat.S_ISDIR(info.st_mode) else "it is a pipe or a device, not a file"
            )
        if info.st_size > MAX_FILE_BYTES:
            raise ValueError(f"file has {info.st_size >> 20} MB, more than {MAX_FILE_BYTES >> 20}")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ValueError("file is missing") from error
    except OSError as error:
        raise ValueError(f"file cannot be read ({error.strerror or error})") from error


def _of(found: bytes | ValueError | None) -> bytes:
    """What was read ahead, with the errors of ``_read_file``."""
    if found is None:
        raise ValueError("file is missing")
    if isinstance(found, ValueError):
        raise found
    return found


def _check_whole(data: bytes, kind: str) -> None:
    """Pillow refuses a truncated file; OpenCV returns what there is of it."""
    PIL.Image.MAX_IMAGE_PIXELS = None  # prepare.max_pixels decides, with a reason in rejected.jsonl
    try:
        with PIL.Image.open(io.BytesIO(data), formats=[kind]) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise all kinds on damaged files
        raise ValueError(f"image is truncated or damaged ({_one_line(error)})") from error


def _encode(image: Image, kind: str, quality: int, repair: str) -> Picture:
    """Pixels as PNG where the file was lossless, else as JPEG with full chroma."""
    out = io.BytesIO()
    upright = PIL.Image.fromarray(image)
    if kind in LOSSLESS:
        upright.save(out, "PNG")
    else:
        upright.save(out, "JPEG", quality=quality, subsampling=0)
    return Picture(out.getvalue(), (upright.height, upright.width), (repair,))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.partition(" <_io.BytesIO")[0] or type(error).__name__
