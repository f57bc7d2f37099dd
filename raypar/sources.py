"""What ``predict`` reads: images named in any of the usual ways, cut into pieces that are the same at every run.

Runs in: the driver, which lists and cuts; whoever reads a piece.
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raypar.dataset.formats import IMAGE_SUFFIXES
from raypar.dataset.manifest import Manifest
from raypar.storage import Folder

PIECE_IMAGES = 256  # at most, but whole row groups
PIECE_BYTES = 64 << 20  # of encoded images, about
MIN_PIECES = 32  # wanted, so that many workers share a small source
MIN_PIECE_IMAGES = 16


@dataclass(frozen=True)
class Entry:
    """An image file, or a row group of a Parquet shard.

    Attributes:
        image_id: of a file, its path under the source; of a row group, nothing: its rows have their own.
        folder: where the file or shard lies.
        name: of the file or shard in there.
        group: the row group's number; -1 for an image file.
        num_images: 1, or the rows of the row group.
        num_bytes: of the file, or about those of the row group.
    """

    image_id: str
    folder: Folder
    name: str
    group: int
    num_images: int
    num_bytes: int


@dataclass(frozen=True)
class Source:
    """A listed source.

    Attributes:
        pieces: each of them becomes one file of detections.
        is_local: whether it lies on the driver's node, outside the run's storage, where other nodes may not see it.
        sha256: of the listing: names, sizes and cuts.
    """

    pieces: list[list[Entry]]
    is_local: bool
    sha256: str

    @property
    def num_images(self) -> int:
        return sum(entry.num_images for piece in self.pieces for entry in piece)


def list_source(source: str | None, run: Folder, dataset: Folder | None = None) -> Source:
    """Lists a source and cuts it into pieces.

    Args:
        source: a folder (with all below it), a glob, an image, a ``.txt`` of paths, Parquet shards (a file, or their folder) or a URI
            of any of these; nothing: the val split of the dataset.
        run: the run's folder.
        dataset: where its dataset is, when that is another's.

    Raises:
        ValueError: there is nothing, or nothing that is an image.
    """
    if source is None:
        dataset = dataset or run / "dataset"
        shards = Manifest.load(dataset).split("val").shards
        entries = [Entry("", dataset, shard.path, i, n, shard.num_bytes * n // max(sum(shard.row_groups), 1))
                   for shard in shards for i, n in enumerate(shard.row_groups)]  # fmt: skip
        return _cut(entries, is_local=False)
    files = _text(source) if source.endswith(".txt") else _files(source)
    shards_found = [f for f in files if f.name.lower().endswith(".parquet")]
    images = [f for f in files if Path(f.name).suffix.lower() in IMAGE_SUFFIXES]
    entries = [e for f in shards_found for e in _row_groups(f)] if shards_found and not images else images
    if not entries:
        raise ValueError(f"predict.source: there are no images at {source}: "
                         f"name a folder, a glob, an image, a .txt of paths or Parquet shards")  # fmt: skip
    is_in_storage = all(entry.folder.uri.startswith(run.uri + "/") for entry in entries)
    return _cut(entries, is_local=entries[0].folder.is_local and not is_in_storage)


def read(entry: Entry) -> Iterator[tuple[str, bytes | Exception]]:
    """The images of an entry: id and encoded bytes, or what went wrong instead of them."""
    if entry.group >= 0:
        with entry.folder.open(entry.name) as file:
            rows = pq.ParquetFile(file).read_row_group(entry.group, columns=["image_id", "image"])
        for i in range(rows.num_rows):
            yield rows["image_id"][i].as_py(), rows["image"][i].as_py()
        return
    try:
        yield entry.image_id, entry.folder.read(entry.name)
    except OSError as error:
        yield entry.image_id, error


def _files(source: str) -> list[Entry]:
    """The files that a folder, a glob or a single path stand for, in the order of their names."""
    if any(letter in source for letter in "*?["):
        return _globbed(source)
    parent, _, name = source.rstrip("/").rpartition("/")
    folder = Folder.at(source)
    info = folder.fs.get_file_info(folder.path)
    if info.type == pafs.FileType.File:
        return [
            Entry(
                name,
                Folder.at(parent or ("/" if source.startswith("/") else ".")),
                name,
                -1,
                1,
                info.size or 0,
            )
        ]
    if info.type == pafs.FileType.NotFound:
        raise ValueError(f"predict.source: there is nothing at {source}")
    return _below(folder)


def _below(folder: Folder) -> list[Entry]:
    selector = pafs.FileSelector(folder.path, recursive=True)
    prefix = len(folder.path.rstrip("/")) + 1
    found = [
        (i.path[prefix:], i.size or 0)
        for i in folder.fs.get_file_info(selector)
        if i.type == pafs.FileType.File
    ]
    return [Entry(name, folder, name, -1, 1, size) for name, size in sorted(found)]


def _globbed(source: str) -> list[Entry]:
    fixed: list[str] = []
    for part in source.split("/"):
        if any(letter in part for letter in "*?["):
            break
        fixed.append(part)
    base = "/".join(fixed) or ("/" if source.startswith("/") else ".")
    pattern = source[len("/".join(fixed)) :].lstrip("/")
    folder = Folder.at(base)
    if folder.is_local:
        paths = sorted(path for path in Path(folder.path).glob(pattern) if path.is_file())
        names = [path.relative_to(folder.path).as_posix() for path in paths]
        return [
            Entry(name, folder, name, -1, 1, path.stat().st_size)
            for name, path in zip(names, paths, strict=True)
        ]
    return [entry for entry in _below(folder) if fnmatch.fnmatchcase(entry.name, pattern)]


def _text(source: str) -> list[Entry]:
    """The files that a list names, one a line; relative paths start at the list's folder, or at the working directory."""
    parent, _, name = source.rpartition("/")
    folder = Folder.at(parent or ".")
    if not folder.exists(name):
        raise ValueError(f"predict.source: there is no file {source}")
    entries: dict[str, Entry] = {}
    for raw in folder.read(name).decode().splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        beside = "://" not in line and not line.startswith("/") and folder.exists(line.removeprefix("./"))
        for entry in _files(f"{folder.uri}/{line.removeprefix('./')}" if beside else line):
            image_id = line if entry.image_id == line.rpartition("/")[2] else f"{line}/{entry.image_id}"
            entries[image_id] = Entry(image_id, entry.folder, entry.name, -1, 1, entry.num_bytes)
    return list(entries.values())


def _row_groups(file: Entry) -> list[Entry]:
    with file.folder.open(file.name) as opened:
        footer = pq.ParquetFile(opened)
        missing = {"image_id", "image"} - set(footer.schema_arrow.names)
        if missing:
            raise ValueError(f"predict.source: {file.folder.uri}/{file.name} has no column {' and '.join(sorted(missing))}: "
                             f"it is no shard of images")  # fmt: skip
        groups = [footer.metadata.row_group(i) for i in range(footer.metadata.num_row_groups)]
    return [Entry("", file.folder, file.name, i, g.num_rows, g.total_byte_size) for i, g in enumerate(groups)]


def _cut(entries: list[Entry], *, is_local: bool) -> Source:
    total = sum(entry.num_images for entry in entries)
    limit = max(MIN_PIECE_IMAGES, min(PIECE_IMAGES, -(-total // MIN_PIECES)))
    pieces: list[list[Entry]] = []
    images = num_bytes = 0
    for entry in entries:
        if not pieces or images + entry.num_images > limit or num_bytes + entry.num_bytes > PIECE_BYTES:
            pieces.append([])
            images = num_bytes = 0
        pieces[-1].append(entry)
        images, num_bytes = images + entry.num_images, num_bytes + entry.num_bytes
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(
            repr(
                [(e.image_id, e.folder.uri, e.name, e.group, e.num_images, e.num_bytes) for e in piece]
            ).encode()
        )
    return Source(pieces, is_local, digest.hexdigest())
