"""Shards that are cut, missing or altered are named; what was hashed once is not read again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from raypar.dataset import verify
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.storage import Folder

SPLITS = ("train", "val")


@pytest.fixture
def dataset(tmp_path: Path) -> Folder:
    folder = Folder.at(tmp_path / "dataset")
    splits = {}
    for split, count in (("train", 5), ("val", 1)):
        shards = []
        for i in range(count):
            data = f"{split} {i} ".encode() * 1000
            folder.write(f"{split}/{i:05d}.parquet", data)
            shards.append(
                Shard(
                    path=f"{split}/{i:05d}.parquet",
                    row_groups=(4,),
                    num_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                )
            )
        splits[split] = Split(shards=tuple(shards), num_images=4 * count)
    Manifest(task="detect", class_names=("a",), splits=splits, source="test").save(folder)
    return folder


def path_of(dataset: Folder, name: str) -> Path:
    return Path(dataset.path) / name


def refusal(dataset: Folder, splits: tuple[str, ...] = SPLITS) -> str:
    with pytest.raises(ValueError) as caught:
        verify.check_sums(dataset, Manifest.load(dataset), splits)
    assert "\n" not in str(caught.value)
    assert dataset.uri in str(caught.value)
    assert "prepare.overwrite=true" in str(caught.value)
    return str(caught.value)


def test_whole_dataset_is_hashed_once(dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    hashed = verify.sha256_of
    monkeypatch.setattr(verify, "sha256_of", lambda folder, path: read.append(path) or hashed(folder, path))
    manifest = Manifest.load(dataset)
    verify.check_sizes(dataset, manifest, SPLITS)
    assert read == []
    verify.check_sums(dataset, manifest, ("val",))
    assert read == ["val/00000.parquet"]
    verify.check_sums(dataset, manifest, SPLITS)
    assert sorted(read) == sorted(
        [shard.path for split in manifest.splits.values() for shard in split.shards]
    )
    verify.check_sums(dataset, manifest, SPLITS)
    assert len(read) == 6
    touched = path_of(dataset, "train/00002.parquet")
    os.utime(touched, ns=(1, 1))
    verify.check_sums(dataset, manifest, SPLITS)
    assert read[6:] == ["train/00002.parquet"]


@pytest.mark.parametrize("was_verified", [False, True])
def test_damage_is_named(dataset: Folder, was_verified: bool) -> None:
    if was_verified:
        verify.check_sums(dataset, Manifest.load(dataset), SPLITS)
    shard = path_of(dataset, "train/00003.parquet")
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    assert f"shard train/00003.parquet has {len(data) - 7} bytes, the manifest says {len(data)}" in refusal(
        dataset
    )
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert "shard train/00003.parquet is altered" in refusal(dataset)
    assert "shard train/00003.parquet is altered" in refusal(dataset)  # not remembered as good
    shard.unlink()
    assert "shard train/00003.parquet is missing" in refusal(dataset)
    verify.check_sums(dataset, Manifest.load(dataset), ("val",))  # of no concern to it
    shard.write_bytes(data)
    verify.check_sums(dataset, Manifest.load(dataset), SPLITS)


def test_many_losses_make_one_short_line(dataset: Folder) -> None:
    for shard in path_of(dataset, "train").iterdir():
        shard.unlink()
    assert "(and 2 more)" in refusal(dataset)


def test_a_memory_that_is_damaged_or_cannot_be_written_only_costs_time(
    dataset: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(dataset)
    dataset.write(verify.VERIFIED, "no JSON")
    verify.check_sums(dataset, manifest, SPLITS)
    dataset.write(verify.VERIFIED, "[]")
    monkeypatch.setattr(Folder, "write", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    verify.check_sums(dataset, manifest, SPLITS)
