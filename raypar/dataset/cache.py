"""Decoded images, kept once a node: the second epoch decodes nothing.

Runs in: Ray Data tasks, which share the files; the driver drops them. A file holds the images of one row group as the stream wants them
(upright RGB, longer side at most imgsz), and is memory-mapped: readers copy nothing and processes share the pages. ``ram`` files are in
/dev/shm, ``disk`` files in the folder for temporary ones. When the limit is reached, what did not fit is decoded again each epoch.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

SHARED_MEMORY = Path("/dev/shm")
PREFIX = f"raypar-cache-{os.getuid()}-"
# of a node's memory, of what is free on its disk: the limits where none is set
SHARE_OF_MEMORY, SHARE_OF_DISK = 0.25, 0.5
LOCK = "lock"
DROP_WAIT_S = 20
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class CacheSpec:
    """Which cache, on whatever node.

    Attributes:
        kind: ``ram`` or ``disk``.
        key: of the run, its dataset and its image size: part of the folder's name.
        limit_bytes: of a node; None: a share of what it has.
    """

    kind: str
    key: str
    limit_bytes: int | None = None

    @property
    def folder(self) -> Path:
        return (SHARED_MEMORY if self.kind == "ram" else Path(tempfile.gettempdir())) / (PREFIX + self.key)


class Cache:
    """A node's cache, as one process sees it; holds a shared lock on its folder for as long as the process lives."""

    def __init__(self, spec: CacheSpec):
        self.folder = spec.folder
        sweep(self.folder.parent, spec.folder)
        self._lock = _locked(self.folder)
        self.limit_bytes = _limit(spec) if spec.limit_bytes is None else spec.limit_bytes

    def get(self, name: str) -> list[Image | None] | None:
        """What was put under a name; images uint8 (H, W, 3), read-only views of the file. None: nothing."""
        try:
            with (self.folder / name).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except FileNotFoundError:
            return None
        count = int(np.frombuffer(mapped, np.int64, 1)[0])
        hws = np.frombuffer(mapped, np.int64, 2 * count, 8).reshape(-1, 2)
        at, images = 8 + hws.nbytes, list[Image | None]()
        for height, width in hws.tolist():
            size = 3 * height * width
            images.append(
                np.frombuffer(mapped, np.uint8, size, at).reshape(height, width, 3) if size else None
            )
            at += size
        return images

    def put(self, name: str, images: Sequence[Image | None]) -> bool:
        """Keeps images (None: one that cannot be decoded) under a name; whole or not at all. False: there is no room."""
        sizes = [0 if image is None else image.nbytes for image in images]
        head = np.array(
            [len(images), *(n for image in images for n in ((0, 0) if image is None else image.shape[:2]))],
            np.int64,
        )
        if self.used_bytes() + head.nbytes + sum(sizes) > self.limit_bytes:
            return False
        try:
            handle, part = tempfile.mkstemp(dir=self.folder, suffix=".part")
        except FileNotFoundError:  # dropped meanwhile: training has ended
            return False
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(head.data)
                for image in images:
                    if image is not None:
                        file.write(np.ascontiguousarray(image).data)
            os.replace(part, self.folder / name)  # noqa: PTH105
        except OSError:  # the file system is full: another's files count too
            Path(part).unlink(missing_ok=True)
            return False
        return True

    def used_bytes(self) -> int:
        """Of all files, unfinished ones too."""
        try:
            return sum(_size(entry) for entry in os.scandir(self.folder))
        except FileNotFoundError:
            return 0


@lru_cache(maxsize=1)
def node_cache(spec: CacheSpec) -> Cache:
    """This process' view of the cache; opened once."""
    return Cache(spec)


def drop(spec: CacheSpec) -> None:
    """Deletes this node's files; those who still read them can go on."""
    shutil.rmtree(spec.folder, ignore_errors=True)


def drop_everywhere(spec: CacheSpec) -> None:
    """Deletes the files of all living nodes. Runs in: the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    task = ray.remote(num_cpus=0, max_retries=0)(drop)
    refs = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(spec)
        for node in nodes
    ]
    # a node that is lost takes its files with it, or sweeps them later
    ray.wait(refs, num_returns=len(refs), timeout=DROP_WAIT_S)


def sweep(parent: Path, mine: Path | None = None) -> None:
    """Deletes others' caches whose processes have all ended without dropping them: nobody holds their lock."""
    for folder in set(parent.glob(f"{PREFIX}*")) - {mine}:
        try:
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # nobody can hold it
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # in use, or gone meanwhile
            continue


def _locked(folder: Path) -> IO[bytes]:
    """The folder's lock, shared; the folder is made. Again if it was swept away between the two."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (folder / LOCK).open("ab")
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_SH)
        try:
            if os.fstat(lock.fileno()).st_ino == (folder / LOCK).stat().st_ino:
                return lock
        except FileNotFoundError:
            pass
        lock.close()


def _limit(spec: CacheSpec) -> int:
    free_bytes = shutil.disk_usage(spec.folder.parent).free
    if spec.kind == "disk":
        return int(SHARE_OF_DISK * free_bytes)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(SHARE_OF_MEMORY * memory_bytes, SHARE_OF_DISK * free_bytes))


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # renamed or deleted meanwhile
        return 0
