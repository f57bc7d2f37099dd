"""Files in a run's storage: a local folder or any store that ``pyarrow.fs`` reaches (``s3://``, ``gs://`` ...).

Runs in: every process. A file appears whole or not at all: local files are written beside their place and renamed,
object stores show an object only when its upload ends.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import pyarrow as pa
import pyarrow.fs as pafs

COPY_CHUNK_BYTES = 8 << 20
FIRST_PAUSE_S, LONGEST_PAUSE_S, PATIENCE_S = 0.5, 15.0, 300.0
Result = TypeVar("Result")
# Trying again does not mend these.
FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


def _options(uri: str) -> tuple[str, str]:
    """A URI without its options, and these: ``?endpoint_override=host:9000&scheme=http``. A local path has none."""
    place, mark, options = uri.partition("?") if "://" in uri else (uri, "", "")
    return place, mark + options


@dataclass(frozen=True)
class Folder:
    """A folder in storage. It need not exist: it is made by the first write.

    Attributes:
        uri: an absolute local path, or a URI with a scheme (``s3://bucket/prefix``).
        patience_s: how long :meth:`reading` tries a store again that fails.
    """

    uri: str
    patience_s: float = field(default=PATIENCE_S, compare=False)

    @classmethod
    def at(cls, uri: str | os.PathLike[str]) -> Folder:
        """The folder at a URI or a local path; relative paths are made absolute by this process's working directory."""
        text = str(uri)
        return cls(text.rstrip("/") if "://" in text else str(Path(text).expanduser().absolute()))

    def __truediv__(self, name: str) -> Folder:
        place, options = _options(self.uri)
        return Folder(f"{place.rstrip('/')}/{name}{options}", self.patience_s)

    @classmethod
    def holding(cls, uri: str) -> tuple[Folder, str]:
        """The folder that a file lies in, and the file's name there."""
        place, options = _options(uri)
        parent, _, name = place.rstrip("/").rpartition("/")
        return cls.at((parent if parent or not uri.startswith("/") else "/") + options), name

    def __getstate__(self) -> tuple[str, float]:
        return self.uri, self.patience_s  # a cached file system does not travel

    def __setstate__(self, state: tuple[str, float]) -> None:
        for name, value in zip(("uri", "patience_s"), state, strict=True):
            object.__setattr__(self, name, value)

    @cached_property
    def _resolved(self) -> tuple[pafs.FileSystem, str]:
        if "://" not in self.uri:
            return pafs.LocalFileSystem(), self.uri
        try:
            fs, path = pafs.FileSystem.from_uri(self.uri)
        except pa.ArrowInvalid as error:
            reason = str(error).partition(" in URI")[0]  # which may hold keys
            raise ValueError(
                f"{self.shown()} cannot be opened: {reason}; there are paths, and the stores of pyarrow.fs, as s3://, gs://, abfs:// and hdfs://"
            ) from error
        return fs, path

    @property
    def fs(self) -> pafs.FileSystem:
        """The pyarrow file system that holds the folder."""
        return self._resolved[0]

    @property
    def path(self) -> str:
        """The folder's path on ``fs``."""
        return self._resolved[1]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        return bool(self.fs.get_file_info(self._full(name)).type != pafs.FileType.NotFound)

    def list(self, name: str = "", *, recursive: bool = False) -> list[str]:
        """Names (relative to this folder, sorted) of the files in a sub-folder; none when it does not exist."""
        selector = pafs.FileSelector(self._full(name), recursive=recursive, allow_not_found=True)
        infos = self.fs.get_file_info(selector)
        prefix = len(self.path.rstrip("/")) + 1
        return sorted(i.path[prefix:] for i in infos if i.type == pafs.FileType.File)

    def sizes(self, name: str = "") -> dict[str, int]:
        """Bytes of each file of a sub-folder, by its name relative to this folder."""
        infos = self.fs.get_file_info(pafs.FileSelector(self._full(name), allow_not_found=True))
        prefix = len(self.path.rstrip("/")) + 1
        return {i.path[prefix:]: int(i.size) for i in infos if i.type == pafs.FileType.File}

    def open(self, name: str) -> BinaryIO:
        """A seekable binary file, for reading (also accepted by pyarrow)."""
        return cast(BinaryIO, self.fs.open_input_file(self._full(name)))

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def shown(self, name: str = "") -> str:
        """A file's whole name, for messages: without the URI's options and keys."""
        place = re.sub(r"://[^/]*@", "://", _options(self.uri)[0], count=1)
        return f"{place.rstrip('/')}/{name}".rstrip("/")

    def reading(self, name: str, do: Callable[[BinaryIO], Result]) -> Result:
        """What comes of reading a file. A remote store that fails is asked again for a while; a local file that fails is damaged."""

        def read() -> Result:
            with self.open(name) as file:
                return do(file)

        return read() if self.is_local else patiently(read, f"read {self.shown(name)}", self.patience_s)

    def write(self, name: str, data: bytes | memoryview | str) -> None:
        """Writes a whole file; readers see the old one or the new one."""
        target, beside = self._full(name), self._beside(name)
        try:
            with self.fs.open_output_stream(beside) as out:
                out.write(data.encode() if isinstance(data, str) else data)
            if beside != target:
                self.fs.move(beside, target)
        except OSError:
            self._forget(beside, target)
            raise

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=2) + "\n")

    def upload(self, local: str | os.PathLike[str], name: str) -> None:
        """Copies a local file into the folder; it appears whole."""
        target, beside = self._full(name), self._beside(name)
        try:
            pafs.copy_files(str(local), beside, source_filesystem=pafs.LocalFileSystem(),
                            destination_filesystem=self.fs, chunk_size=COPY_CHUNK_BYTES)  # fmt: skip
            if beside != target:
                self.fs.move(beside, target)
        except OSError:
            self._forget(beside, target)
            raise

    def download(self, name: str, local: str | os.PathLike[str]) -> Path:
        """Copies a file of the folder to a local path and returns the path."""
        Path(local).parent.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(self._full(name), str(local), source_filesystem=self.fs,
                        destination_filesystem=pafs.LocalFileSystem(), chunk_size=COPY_CHUNK_BYTES)  # fmt: skip
        return Path(local)

    def delete(self, name: str = "") -> None:
        """Removes a file or a whole sub-folder; nothing happens when it is not there."""
        info = self.fs.get_file_info(self._full(name))
        if info.type == pafs.FileType.Directory:
            self.fs.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.fs.delete_file(info.path)

    def check_reachable(self) -> None:
        """Asks the store for the folder and its bucket.

        Raises:
            OSError: the store does not answer, or refuses.
            ValueError: there is no such bucket, or no such kind of store.
        """
        self.exists()
        bucket = self.path.split("/")[0]
        if self.fs.type_name in ("s3", "gcs") and not self._may_be_there(bucket):
            raise ValueError(f"there is no bucket '{bucket}'")

    def _may_be_there(self, bucket: str) -> bool:
        try:
            return bool(self.fs.get_file_info(bucket).type != pafs.FileType.NotFound)
        except OSError:  # a key may open a folder of the bucket, and yet not the bucket
            return True

    def check_writable(self) -> None:
        """Writes and removes a small file.

        Raises:
            ValueError: the storage cannot be written, with the reason.
        """
        name = f".raypar-{uuid.uuid4().hex}"
        try:
            self.write(name, b"")
            self.delete(name)
        except Exception as error:
            raise ValueError(f"storage {self.uri} cannot be written: {error}") from error

    def _full(self, name: str) -> str:
        return f"{self.path}/{name}".rstrip("/") if name else self.path

    def _forget(self, beside: str, target: str) -> None:
        """Removes what an unfinished write left: on a full disk it would stay in the way."""
        if beside != target:
            Path(beside).unlink(missing_ok=True)

    def _beside(self, name: str) -> str:
        target = self._full(name)
        if not self.is_local:
            return target
        parent, _, base = target.rpartition("/")
        Path(parent).mkdir(parents=True, exist_ok=True)
        return f"{parent}/.{base}.{uuid.uuid4().hex[:8]}.part"


class StorageError(OSError):
    """A store went on failing for as long as is allowed."""


class OutOfDiskError(RuntimeError):
    """There is no room left to write in."""


def patiently(
    do: Callable[[], Result],
    what: str,
    patience_s: float = PATIENCE_S,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Does something with storage; when that fails, again after 0.5, 1, 2 ... 15 seconds, and each failure is reported.

    Args:
        do: may be called again.
        what: for the reports, as "write checkpoint_0000000096".
        patience_s: from the first failure on.
        stop: ends the patience early.

    Raises:
        OutOfDiskError: the disk or the quota is full.
        StorageError: it failed to the end of the patience.
        OSError: a failure that no repetition mends.
    """
    failed_since: float | None = None
    pause = FIRST_PAUSE_S
    for attempt in range(1, 1_000_000):
        try:
            return do()
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in reason:
                raise OutOfDiskError(f"no space is left to {what}: {reason}") from error
            now = time.monotonic()
            failed_since = now if failed_since is None else failed_since
            left = patience_s - (now - failed_since)
            if isinstance(error, FINAL):
                raise
            if left <= 0 or stop():
                raise StorageError(
                    f"cannot {what}, tried for {now - failed_since:.0f} s: {reason}"
                ) from error
            pause = min(pause, left)
            print(
                f"storage: cannot {what} (attempt {attempt}; given up in {left:.0f} s): {reason}; again in {pause:.1f} s",
                flush=True,
            )
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
    raise AssertionError
