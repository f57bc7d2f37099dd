"""Whether the shards in storage are those of the manifest: sizes by one listing, checksums once a dataset.

A shard's checksum is looked up in ``verified.json`` beside the manifest by (path, size, time of change), so that only what is new or was touched
is read again. Runs in: the driver; much data is hashed in Ray tasks, spread over the nodes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.fs as pafs

from raypar.dataset.manifest import Manifest, Shard
from raypar.storage import Folder

VERIFIED = "verified.json"
CHUNK_BYTES = 4 << 20
DRIVER_BYTES = 2 << 30  # up to so much is hashed by the driver's threads; tasks would take as long to start
NUM_NAMED = 3  # shards named in an error


def check_sizes(dataset: Folder, manifest: Manifest, splits: Iterable[str]) -> None:
    """Compares the sizes of the splits' shards with the manifest, by one listing a split.

    Raises:
        ValueError: a shard is missing or has another size; one line that names it.
    """
    shards, found = _shards(manifest, splits), _listed(dataset, splits)
    problems = []
    for shard in shards:
        if shard.path not in found:
            problems.append(f"shard {shard.path} is missing")
        elif (num_bytes := found[shard.path][0]) != shard.num_bytes:
            problems.append(f"shard {shard.path} has {num_bytes} bytes, the manifest says {shard.num_bytes}")
    _raise_if(problems, dataset)


def check_sums(dataset: Folder, manifest: Manifest, splits: Iterable[str]) -> None:
    """Compares sizes and SHA-256 of the splits' shards with the manifest; what was compared before and not touched since is not read again.

    Raises:
        ValueError: a shard is missing, cut or altered; one line that names it.
    """
    splits = tuple(splits)
    check_sizes(dataset, manifest, splits)
    found, known = _listed(dataset, splits), _known(dataset)
    shards = _shards(manifest, splits)
    due = [shard for shard in shards if known.get(shard.path) != [*found[shard.path], shard.sha256]]
    if not due:
        return
    num_bytes = sum(shard.num_bytes for shard in due)
    if num_bytes > DRIVER_BYTES:
        print(
            f"checking {len(due)} shards, {num_bytes / 1e9:.1f} GB, against their checksums (once a dataset)",
            flush=True,
        )
    sums = dict(
        zip(
            [shard.path for shard in due],
            _hashed(dataset, [shard.path for shard in due], num_bytes),
            strict=True,
        )
    )
    good = {
        shard.path: [*found[shard.path], shard.sha256] for shard in due if sums[shard.path] == shard.sha256
    }
    _remember(dataset, known | good)
    _raise_if(
        [
            f"shard {shard.path} is altered (its SHA-256 is not the manifest's)"
            for shard in due
            if shard.path not in good
        ],
        dataset,
    )


def _shards(manifest: Manifest, splits: Iterable[str]) -> list[Shard]:
    return [shard for split in splits for shard in manifest.split(split).shards]


def _listed(dataset: Folder, splits: Iterable[str]) -> dict[str, list[int]]:
    """[bytes, time of change in ns] of every file of the splits, by its path in the dataset."""
    prefix = len(dataset.path.rstrip("/")) + 1
    found: dict[str, list[int]] = {}
    for split in splits:
        selector = pafs.FileSelector(f"{dataset.path}/{split}", allow_not_found=True)
        for info in dataset.fs.get_file_info(selector):
            if info.type == pafs.FileType.File:
                found[info.path[prefix:]] = [info.size, info.mtime_ns or 0]
    return found


def _known(dataset: Folder) -> dict[str, Any]:
    try:
        value = dataset.read_json(VERIFIED) if dataset.exists(VERIFIED) else {}
    except (OSError, ValueError):  # it only saves time
        return {}
    return value if isinstance(value, dict) else {}


def _remember(dataset: Folder, known: dict[str, Any]) -> None:
    try:
        dataset.write(VERIFIED, json.dumps(known) + "\n")
    except OSError:  # a dataset that may only be read is hashed at each start
        return


def _hashed(dataset: Folder, paths: list[str], num_bytes: int) -> list[str]:
    """Hex digests of files, in order."""
    import ray

    if num_bytes <= DRIVER_BYTES or not ray.is_initialized():
        with ThreadPoolExecutor(min(len(paths), 2 * (os.cpu_count() or 1))) as threads:
            return list(threads.map(lambda path: sha256_of(dataset, path), paths))
    task = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(sha256_of)
    return list(ray.get([task.remote(dataset, path) for path in paths]))


def sha256_of(dataset: Folder, path: str) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with dataset.open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _raise_if(problems: list[str], dataset: Folder) -> None:
    if problems:
        more = f" (and {len(problems) - NUM_NAMED} more)" if len(problems) > NUM_NAMED else ""
        raise ValueError(
            f"{dataset.uri}: {'; '.join(problems[:NUM_NAMED])}{more}: restore what is wrong, "
            f"or run `raypar prepare` with prepare.overwrite=true"
        )
