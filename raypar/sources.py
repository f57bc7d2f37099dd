"""What ``predict`` reads: images named in any of the usual ways, cut into pieces that are the same at every run.

Runs in: the driver, which lists and cuts; whoever reads a piece.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raypar.dataset.formats import IMAGE_SUFFIXES
from raypar.dataset.manifest import Manifest
from raypar.dataset.remote import is_hidden
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
    place = _place(source)
    is_list = source.lower().endswith(".txt") and place.info().type == pafs.FileType.File
    files = _text(place, source) if is_list else _files(place, source)
    shards_found = [f for f in files if f.name.lower().endswith(".parquet")]
    images = [f for f in files if Path(f.name).suffix.lower() in IMAGE_SUFFIXES]
    entries = [e for f in shards_found for e in _row_groups(f)] if shards_found and not images else images
    if not entries:
        raise ValueError(f"predict.source: there are no images at {source}: "
                         f"name a folder, a glob, an image, a .txt of paths or Parquet shards")  # fmt: skip
    is_in_storage = all(f"{entry.folder.path}/{entry.name}".startswith(run.path + "/") for entry in entries)
    return _cut(entries, is_local=entries[0].folder.is_local and not (run.is_local and is_in_storage))


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
    except UnicodeEncodeError:
        yield entry.image_id, ValueError("its name is not text in UTF-8")
    except OSError as error:
        yield entry.image_id, error


@dataclass(frozen=True)
class _Place:
    """A path or a pattern below a folder. In a store the folder is the whole bucket: a key may hold what a URI may not.

    Attributes:
        folder: local: the root, or the working directory.
        parts: of the path from there.
    """

    folder: Folder
    parts: tuple[str, ...]

    def __truediv__(self, path: str) -> _Place:
        return _Place(self.folder, (*self.parts, *_parts(path)))

    @property
    def name(self) -> str:
        return "/".join(self.parts)

    @property
    def path(self) -> str:
        """On the folder's file system."""
        return f"{self.folder.path.rstrip('/')}/{self.name}" if self.parts else self.folder.path

    def info(self) -> pafs.FileInfo:
        """What is there, without a look into it."""
        return self.folder.fs.get_file_info(self.path)

    def exists(self) -> bool:
        return bool(self.info().type != pafs.FileType.NotFound)


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _place(source: str) -> _Place:
    """Where a path or URI points. Whatever characters it has, a path that exists is that path; only else is ``%20`` a blank in a URI."""
    scheme, is_uri, rest = source.partition("://")
    if not is_uri:
        path = source if os.path.lexists(source) else str(Path(source).expanduser())
        return _Place(Folder.at("/" if path.startswith("/") else "."), _parts(path))
    if scheme == "file":
        places = [_Place(Folder.at("/"), _parts(path)) for path in (rest, unquote(rest))]
    else:
        # a bucket's options have a "=", a pattern or a name with a "?" has none
        options = re.search(r"\?[A-Za-z_]+=.*$", rest)
        whole = rest[: options.start()] if options else rest
        bucket, _, path = whole.partition("/")
        folder = Folder(f"{scheme}://{bucket}{options[0] if options else ''}")
        places = [_Place(folder, _parts(path)) for path in (path, unquote(path))]
    return next((place for place in places if place.exists()), places[0])


def _files(place: _Place, source: str) -> list[Entry]:
    """The files that a folder, a pattern or a single path stand for, in the order of their names."""
    info = place.info()
    above = _Place(place.folder, place.parts[:-1])
    if info.type == pafs.FileType.File:
        return _entries(above, {place.parts[-1]: info.size or 0})
    if info.type != pafs.FileType.NotFound:
        return _below(place, ("**",))
    above = _Place(place.folder, ())
    for i, part in enumerate(place.parts):
        deeper = above / part
        if deeper.exists():
            above = deeper
        elif any(letter in part for letter in "*?["):
            return _below(above, place.parts[i:])
        else:
            break
    raise ValueError(f"predict.source: there is nothing at {source}")


def _entries(above: _Place, sizes: dict[str, int]) -> list[Entry]:
    """Files below a place, by name; their ids are their paths from there."""
    if above.folder.is_local:
        folder = Folder.at(above.path)
        return [Entry(_shown(name), folder, name, -1, 1, size) for name, size in sorted(sizes.items())]
    return [
        Entry(name, above.folder, (above / name).name, -1, 1, size) for name, size in sorted(sizes.items())
    ]


def _shown(name: str) -> str:
    """A name that can be written, whatever bytes it has."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _below(place: _Place, pattern: tuple[str, ...]) -> list[Entry]:
    """All files below a folder whose path from there fits a pattern, hidden ones left out."""
    if place.folder.is_local:
        return _entries(place, _walk(place.path, pattern))
    infos = place.folder.fs.get_file_info(pafs.FileSelector(place.path, recursive=True, allow_not_found=True))
    prefix = len(place.path.rstrip("/")) + 1
    sizes = {i.path[prefix:]: i.size or 0 for i in infos if i.type == pafs.FileType.File}
    return _entries(
        place, {name: size for name, size in sizes.items() if _fits(tuple(name.split("/")), pattern)}
    )


def _walk(folder: str, pattern: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the local files below a folder that fit a pattern, by their path from there. Links are followed, but what was reached already is
    left out: a folder, or one that the links lie in, is never listed twice, nor a file next to a link to it.

    Raises:
        ValueError: a folder cannot be read.
    """
    seen = {(info.st_dev, info.st_ino) for info in (above.stat() for above in Path(folder).resolve().parents)}
    sizes: dict[str, int] = {}
    files: set[tuple[int, int]] = set()
    links: list[tuple[str, os.stat_result]] = []
    folders, linked_folders = [""], deque[str]()
    while folders or linked_folders:
        here = folders.pop() if folders else linked_folders.popleft()
        identity, entries = _scan(f"{folder}/{here}")
        if identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            name = f"{here}{entry.name}"
            parts = tuple(name.split("/"))
            if _is(entry.is_dir) and _leads(parts, pattern):
                (linked_folders if entry.is_symlink() else folders).append(f"{name}/")
            elif _is(entry.is_file) and _fits(parts, pattern):
                info = entry.stat()
                if entry.is_symlink():
                    links.append((name, info))
                else:
                    sizes[name] = info.st_size
                    files.add((info.st_dev, info.st_ino))
    for name, info in sorted(links, key=lambda link: link[0]):
        if (info.st_dev, info.st_ino) not in files:
            files.add((info.st_dev, info.st_ino))
            sizes[name] = info.st_size
    return sizes


def _scan(folder: str) -> tuple[tuple[int, int], list[os.DirEntry[str]]]:
    """What tells a folder from all others, whatever path led there, and what lies in it."""
    try:
        info = Path(folder).stat()
        with os.scandir(folder) as entries:
            return (info.st_dev, info.st_ino), sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            f"predict.source: folder {folder} cannot be read ({error.strerror or error})"
        ) from error


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself
        return False


def _leads(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether files below a folder can fit a pattern."""
    for part, wanted in zip(parts, pattern, strict=False):
        if wanted == "**":
            return not any(is_hidden(name) for name in parts)
        if not _name_fits(part, wanted):
            return False
    return len(parts) < len(pattern)


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether a path fits a pattern: ``*``, ``?`` and ``[...]`` stay within a name, ``**`` is any number of folders, or at its end all files."""
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] != "**":
        return _name_fits(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
    if not pattern[1:]:
        return not any(is_hidden(name) for name in parts)
    return _fits(parts, pattern[1:]) or (not is_hidden(parts[0]) and _fits(parts[1:], pattern))


def _name_fits(name: str, pattern: str) -> bool:
    if is_hidden(name) and not is_hidden(pattern):
        return False
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _text(place: _Place, source: str) -> list[Entry]:
    """The files that a list names, one a line; relative paths start at the list's folder, or at the working directory.

    Raises:
        ValueError: it is no text, or names what is not there.
    """
    above = _Place(place.folder, place.parts[:-1])
    entries: dict[str, Entry] = {}
    for number, line in enumerate(_lines(place, source), 1):
        try:
            written, files = _named(line, above)
        except ValueError as error:
            raise ValueError(f"{error} (line {number} of {source})") from error
        for entry in files:
            is_itself = entry.image_id == written.rpartition("/")[2]
            image_id = written if is_itself else f"{written}/{entry.image_id}"
            entries[image_id] = Entry(image_id, entry.folder, entry.name, -1, 1, entry.num_bytes)
    return list(entries.values())


def _lines(place: _Place, source: str) -> list[str]:
    """A list's lines, without what Windows puts in front and at their ends."""
    data = place.folder.read(place.name)
    is_utf_16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"predict.source: {source} is no list: byte {error.start} is no text in UTF-8"
        ) from error
    return re.split("\r\n|\n|\r", text)


def _named(line: str, above: _Place) -> tuple[str, list[Entry]]:
    """What a line of a list names, as it is written there, and its files; none for a comment or an empty line.

    A name may begin or end with a blank, or begin with ``#``: what exists is meant.
    """
    stripped = line.strip()
    if not stripped:
        return "", []
    for written in dict.fromkeys((line, stripped, stripped.strip("\"'"))):
        for place in _meant(written, above):
            if place.exists():
                return written, _files(place, written)
    if stripped.startswith("#"):
        return "", []
    if any(letter in stripped for letter in "*?["):
        for place in _meant(stripped, above):
            with contextlib.suppress(ValueError):  # the folder is not there
                if files := _files(place, stripped):
                    return stripped, files
    raise ValueError(f"predict.source: there is nothing at {stripped}")


def _meant(written: str, above: _Place) -> list[_Place]:
    """Where a path of a list may point, the likeliest first."""
    is_relative = "://" not in written and not written.startswith("/")
    return [above / written, _place(written)] if is_relative else [_place(written)]


def _row_groups(file: Entry) -> list[Entry]:
    with file.folder.open(file.name) as opened:
        footer = pq.ParquetFile(opened)
        missing = {"image_id", "image"} - set(footer.schema_arrow.names)
        if missing:
            raise ValueError(f"predict.source: {file.folder.shown(file.name)} has no column {' and '.join(sorted(missing))}: "
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
