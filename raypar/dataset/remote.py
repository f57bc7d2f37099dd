"""Files of a remote store under the operations of ``pathlib.Path`` by which formats list a source.

A folder's names, sizes and times are asked for once, when something in it is first asked after, and kept packed. Runs in: the driver, which
lists and reads descriptions (``data.yaml``, JSON, and XML where it must); Ray tasks read images and labels (``read_file``).
"""

from __future__ import annotations

import fnmatch
import posixpath
import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from raypar.storage import Folder, patiently

PATIENCE_S = 60.0  # with a store that fails
THREADS = 16  # requests at once
CHUNK = 1024  # files read ahead by ``contents``, descriptions of a few kB
# asking again does not help
DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "InvalidAccessKeyId", "SignatureDoesNotMatch")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is left out of every listing: a name with a leading dot, or macOS's folder in an archive."""
    return name.startswith(".") or name == "__MACOSX"


@dataclass(frozen=True)
class Names:
    """What lies in one folder.

    Attributes:
        folders: names, sorted.
        files: large_string (N,), names, sorted.
        sizes: int64 (N,), bytes.
        times_s: float64 (N,), last change, seconds since 1970; 0 where the store does not say.
    """

    folders: tuple[str, ...]
    files: pa.LargeStringArray
    sizes: NDArray[np.int64]
    times_s: NDArray[np.float64]

    @classmethod
    def of(cls, infos: list[pafs.FileInfo]) -> Names:
        """Packs what a store answers."""
        files = sorted(
            (info for info in infos if info.type == pafs.FileType.File), key=lambda info: info.base_name
        )
        folders = sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)
        return cls(
            tuple(folders),
            pa.array((info.base_name for info in files), pa.large_string()),
            np.fromiter((info.size or 0 for info in files), np.int64, len(files)),
            np.fromiter(((info.mtime_ns or 0) / 1e9 for info in files), np.float64, len(files)),
        )

    def find(self, name: str) -> int:
        """Index of a file; -1 where there is none of that name."""
        index = bisect_left(range(len(self.files)), name, key=lambda i: str(self.files[i].as_py()))
        return index if index < len(self.files) and self.files[index].as_py() == name else -1

    def __iter__(self) -> Iterator[str]:
        """Names of files and folders."""
        yield from self.folders
        for start in range(0, len(self.files), CHUNK):
            yield from self.files[start : start + CHUNK].to_pylist()


class Tree:
    """A store, and what was found in it so far. Threads may share it.

    Attributes:
        store: any folder of the store; the way to open it.
    """

    def __init__(self, store: Folder):
        self.store = store
        self.scheme = store.uri.partition("://")[0]
        self._names: dict[str, Names | None] = {}
        self._locks: dict[str, threading.Lock] = {}

    def names(self, path: str) -> Names | None:
        """What lies in a folder; None where there is no such folder."""
        with self._locks.setdefault(path, threading.Lock()):
            if path not in self._names:
                self._names[path] = self._ask(path) if self._may_be_folder(path) else None
            return self._names[path]

    def has_folder(self, path: str) -> bool:
        """Whether there is such a folder; its names are asked for only where its parent's are not known."""
        parent, name = posixpath.split(path)
        known = self._names.get(parent)
        return name in known.folders if known else self.names(path) is not None

    def file_info(self, uri: str) -> tuple[float, float] | None:
        """(bytes, seconds since 1970 of the last change) of a file by its ``str(RemotePath)``; None where there is none."""
        parent, name = posixpath.split(fs_path(uri))
        names = self.names(parent)
        index = names.find(name) if names else -1
        return (float(names.sizes[index]), float(names.times_s[index])) if names and index >= 0 else None

    def below(self, path: str) -> Iterator[tuple[str, Names]]:
        """A folder and all folders below it that are not hidden, with what lies in them; those of a level are asked for together."""
        level = [path]
        with ThreadPoolExecutor(THREADS) as threads:
            while level:
                found = list(zip(level, threads.map(self.names, level), strict=True))
                yield from ((folder, names) for folder, names in found if names)
                level = [
                    posixpath.join(folder, name)
                    for folder, names in found if names
                    for name in names.folders if not is_hidden(name)
                ]  # fmt: skip

    def _may_be_folder(self, path: str) -> bool:
        parent, name = posixpath.split(path)
        known = self._names.get(parent)
        return not path.startswith("..") and (known is None or name in known.folders)

    def _ask(self, path: str) -> Names | None:
        def ask() -> list[pafs.FileInfo] | None:
            try:
                return self.store.fs.get_file_info(pafs.FileSelector(path))  # type: ignore[no-any-return]
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                raise _final(error) from error

        infos = patiently(ask, f"list {self.scheme}://{path}", PATIENCE_S)
        return None if infos is None else Names.of(infos)


class RemotePath:
    """A path in a store, as ``pathlib.Path`` where a scan needs it. There are no links, and no working directory."""

    __slots__ = ("path", "tree")

    def __init__(self, tree: Tree, path: str):
        self.tree = tree
        path = posixpath.normpath(path)
        self.path = path[1:] if path.startswith("//") else path

    def __str__(self) -> str:
        """``s3://bucket/folder/name``, without the options of the source's URI."""
        return f"{self.tree.scheme}://{self.path}"

    def __truediv__(self, name: str | PurePath) -> RemotePath:
        return RemotePath(self.tree, f"{self.path}/{name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and (self.tree, self.path) == (other.tree, other.path)

    def __hash__(self) -> int:
        return hash(self.path)

    def __lt__(self, other: RemotePath) -> bool:
        return self.path.split("/") < other.path.split("/")  # as Path: folder by folder

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def stem(self) -> str:
        return PurePosixPath(self.path).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.tree, posixpath.dirname(self.path))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self.path).relative_to(other.path)

    def is_dir(self) -> bool:
        return self.tree.has_folder(self.path)

    def is_file(self) -> bool:
        return self.tree.file_info(str(self)) is not None

    def exists(self) -> bool:
        return self.is_dir() or self.is_file()

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self.tree.names(self.path) or ())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in the folder under a name like the pattern, which has no slash."""
        return (
            self / name for name in self.tree.names(self.path) or () if fnmatch.fnmatchcase(name, pattern)
        )

    def names_below(self) -> Iterator[str]:
        """As ``raypar.dataset.formats.names_below`` of a local folder."""
        for folder, names in self.tree.below(self.path):
            start = f"{self.tree.scheme}://{folder}/"
            yield from (start + name for name in names if "." in name and not is_hidden(name))

    def read_bytes(self) -> bytes:
        """Raises: OSError: the file is not there, or the store fails and goes on failing."""
        data = read_file(self.tree.store, str(self))
        if data is None:
            raise FileNotFoundError(f"{self} is not there")
        return data

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)


Place = Path | RemotePath


def local_path(text: str) -> Path:
    """A path with ``~`` for the home folder; of a user that there is not it stays as it is written."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def place_of(source: str | Place) -> Place:
    """A source's file or folder; a local one is absolute.

    Raises:
        ValueError: a store cannot be reached, or has no such bucket.
    """
    if not isinstance(source, str):
        return source
    if "://" not in source:
        return local_path(source).absolute()
    try:
        store = Folder.at(source)
        if store.is_local:  # file://
            return Path(store.path)
        store.check_reachable()
    except (OSError, NotImplementedError, ValueError) as error:  # pyarrow's errors are among them
        raise ValueError(
            f"prepare.source {shown(source)} cannot be reached: {' '.join(str(error).split())}"
        ) from error
    return RemotePath(Tree(store), store.path)


def contents(places: Iterable[Place], max_bytes: int) -> Iterator[bytes | None]:
    """Files' bytes, in order; those of a store are read many at a time. None for one that cannot be read or is too large.

    Raises:
        OSError: the store goes on failing, or refuses.
    """

    def read(place: Place) -> bytes | None:
        if isinstance(place, Path):
            return _local(place, max_bytes)
        try:
            return read_file(place.tree.store, str(place), max_bytes)
        except ValueError:
            return None

    iterator = iter(places)
    with ThreadPoolExecutor(THREADS) as threads:
        while some := list(islice(iterator, CHUNK)):
            yield from threads.map(read, some) if isinstance(some[0], RemotePath) else map(read, some)


def _local(place: Path, max_bytes: int) -> bytes | None:
    try:
        # a pipe is never opened: reading it might not end
        return place.read_bytes() if place.is_file() and place.stat().st_size <= max_bytes else None
    except OSError:
        return None


def read_file(store: Folder, uri: str, max_bytes: int | None = None) -> bytes | None:
    """A file of a store by its ``str(RemotePath)``; None where there is none. A store that fails is asked again for ``PATIENCE_S``.

    Raises:
        ValueError: it is larger than ``max_bytes``.
        OSError: the store goes on failing, or refuses.
    """

    def read() -> bytes | None:
        try:
            with store.fs.open_input_file(fs_path(uri)) as file:
                if max_bytes is not None and (num_bytes := file.size()) > max_bytes:
                    raise ValueError(f"file has {num_bytes >> 20} MB, more than {max_bytes >> 20}")
                return bytes(file.read())
        except (FileNotFoundError, IsADirectoryError):
            return None
        except OSError as error:
            raise _final(error) from error

    return patiently(read, f"read {uri}", PATIENCE_S)


def shown(uri: str) -> str:
    """A URI for messages and the manifest: without its options and keys (``s3://key:secret@bucket/x?endpoint_override=...``)."""
    return re.sub(r"://[^/]*@", "://", uri.partition("?")[0], count=1)


def fs_path(uri: str) -> str:
    """What the store itself calls a ``str(RemotePath)``."""
    return uri.partition("://")[2]


def _final(error: OSError) -> OSError:
    """The error, or one that ends patience: a key that is refused once is refused again."""
    return PermissionError(str(error)) if any(sign in str(error) for sign in DENIED) else error
