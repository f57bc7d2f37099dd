"""What ``prepare`` wrote: splits, shards, row groups, classes, checksums. Lengths are read here, never counted by running Ray Data."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from pydantic import BaseModel, ConfigDict

from raypar.dataset.plan import first_images
from raypar.storage import Folder

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shard(Record):
    """One Parquet file.

    Attributes:
        path: relative to the dataset folder, e.g. ``train/00000.parquet``.
        row_groups: images in each row group, in file order.
        num_bytes: size of the file.
        sha256: hex digest of the file.
    """

    path: str
    row_groups: tuple[int, ...]
    num_bytes: int
    sha256: str


class Split(Record):
    """A split's shards in order, and totals over them.

    Attributes:
        appended: how many shards there were before each append.
    """

    shards: tuple[Shard, ...] = ()
    appended: tuple[int, ...] = ()
    num_images: int = 0
    num_boxes: int = 0
    num_polygons: int = (
        0  # of boxes that have one; 0 in datasets that were prepared before raypar kept them for detect
    )
    num_backgrounds: int = 0  # images without a label
    boxes_per_class: tuple[int, ...] = ()

    @property
    def has_polygons(self) -> bool:
        """Whether every box has a polygon; if only some have one, none is used (``YOLODataset.verify_labels``)."""
        return 0 < self.num_polygons == self.num_boxes

    def first(self, fraction: float | int) -> Split:
        """The first images alone, as :func:`raypar.dataset.plan.first_images` counts them; totals of labels stay those of all images."""
        row_groups = first_images([n for shard in self.shards for n in shard.row_groups], fraction)
        shards, taken = [], 0
        for shard in self.shards:
            mine = row_groups[taken : taken + len(shard.row_groups)]
            taken += len(mine)
            if mine:
                shards.append(shard.model_copy(update={"row_groups": mine}))
        return self.model_copy(update={"shards": tuple(shards), "num_images": sum(row_groups)})

    @property
    def strata(self) -> tuple[int, ...]:
        """Numbers of row groups that were shuffled together: those first prepared, then those of each append."""
        edges = (0, *self.appended, len(self.shards))
        return tuple(sum(len(shard.row_groups) for shard in self.shards[a:b]) for a, b in pairwise(edges))


class RowGroups(Sequence[tuple[str, int]]):
    """For each row group of a split its shard's path and its number there, in the memory of the shards alone."""

    def __init__(self, split: Split):
        self._paths = [shard.path for shard in split.shards]
        self._ends = np.cumsum([len(shard.row_groups) for shard in split.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[str, int] | list[tuple[str, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return self._paths[shard], int(index - (self._ends[shard - 1] if shard else 0))


class Manifest(Record):
    """The whole dataset. It is written last: where it is, the dataset is complete."""

    format_version: int = FORMAT_VERSION
    task: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]
    source: str
    # pose: keypoints of an instance, and numbers of each in the source (2 or 3)
    keypoint_shape: tuple[int, int] | None = None
    # pose: where each keypoint of a mirrored image comes from; empty: images are not mirrored
    flip_idx: tuple[int, ...] = ()
    num_rejected: int = 0
    num_repaired: int = 0
    seed: int = 0
    versions: dict[str, str] = {}

    @classmethod
    def load(cls, dataset: Folder) -> Manifest:
        """Reads a dataset's manifest.

        Raises:
            ValueError: there is none, or this raypar cannot read it.
        """
        if not dataset.exists(MANIFEST):
            raise ValueError(
                f"no dataset in {dataset.uri}: run `raypar prepare` with the same run file first"
            )
        value = dataset.read_json(MANIFEST)
        if value.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{dataset.uri}/{MANIFEST} has format {value.get('format_version')}, this raypar reads {FORMAT_VERSION}: prepare it again"
            )
        return cls.model_validate(value)

    def save(self, dataset: Folder) -> None:
        dataset.write(MANIFEST, self.model_dump_json(indent=2))

    def split(self, name: str) -> Split:
        """A split that has images.

        Raises:
            ValueError: it has none.
        """
        found = self.splits.get(name)
        if found is None or not found.num_images:
            have = ", ".join(k for k, v in self.splits.items() if v.num_images)
            draw = (
                ": prepare.val_fraction=0.1 draws them from train, with prepare.overwrite=true"
                if name == "val"
                else ""
            )
            raise ValueError(f"the dataset has no '{name}' images (it has {have or 'none at all'}){draw}")
        return found
