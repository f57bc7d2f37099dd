"""Many records in little memory: a few flat buffers, which Ray's tasks share. About 150 bytes an image, whatever Python would take. Pure."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raypar.dataset.formats import Record

CHUNK = 1 << 14  # records turned into buffers at once


class Records(Sequence[Record]):
    """Records of a split, packed.

    Attributes:
        image_ids: large_binary (N,): UTF-8; bytes that were no text in a file's name are kept.
    """

    def __init__(
        self, image_ids: pa.LargeBinaryArray, image_paths: pa.LargeBinaryArray, labels: pa.LargeBinaryArray,
        label_of: Callable[[str], Any] | None = None,
    ):  # fmt: skip
        self.image_ids, self._image_paths, self._labels, self._label_of = (
            image_ids,
            image_paths,
            labels,
            label_of,
        )

    @classmethod
    def of(cls, records: Iterable[Record], label_of: Callable[[str], Any] | None = None) -> Records:
        """Packs records as they come.

        Args:
            records: consumed one by one.
            label_of: what ``labels`` follows from the image's path by, for most records; it is not stored for these.
        """
        chunks: list[list[pa.Array]] = [[], [], []]
        iterator = iter(records)
        while some := list(islice(iterator, CHUNK)):
            labels = [
                None if label_of and label_of(r.image_path) == r.labels else pickle.dumps(r.labels)
                for r in some
            ]
            columns = [[_encoded(r.image_id) for r in some], [_encoded(r.image_path) for r in some], labels]
            for chunk, column in zip(chunks, columns, strict=True):
                chunk.append(pa.array(column, pa.large_binary()))
        packed = [pa.concat_arrays(chunk) if chunk else pa.array([], pa.large_binary()) for chunk in chunks]
        return cls(packed[0], packed[1], packed[2], label_of)

    def __len__(self) -> int:
        return len(self.image_ids)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.take(np.array([int(index) % len(self)]))[0]

    def _record(self, image_id: bytes, path: bytes, labels: bytes | None) -> Record:
        image_path = _decoded(path)
        found = (
            pickle.loads(labels)
            if labels is not None
            else self._label_of(image_path)
            if self._label_of
            else None
        )
        return Record(_decoded(image_id), image_path, found)

    def take(self, rows: NDArray[np.int64]) -> list[Record]:
        """Some records, in the order of their indices: much faster than one by one."""
        indices = pa.array(rows)
        ids, paths, labels = (
            column.take(indices).to_pylist() for column in (self.image_ids, self._image_paths, self._labels)
        )
        return [self._record(*columns) for columns in zip(ids, paths, labels, strict=True)]

    def digest(self, rows: NDArray[np.int64]) -> bytes:
        """SHA-256 of some records, in order."""
        digest, indices = hashlib.sha256(), pa.array(rows)
        for column in (self.image_ids, self._image_paths, self._labels):
            for buffer in column.take(indices).buffers():
                digest.update(buffer or b"")
        return digest.digest()

    def __iter__(self) -> Iterator[Record]:
        chunks = (np.arange(start, min(start + CHUNK, len(self))) for start in range(0, len(self), CHUNK))
        return (record for rows in chunks for record in self.take(rows))

    @property
    def image_paths(self) -> pa.LargeBinaryArray:
        """large_binary (N,), as ``image_ids``."""
        return self._image_paths

    def in_order(self) -> NDArray[np.int64]:
        """Indices in the order of the image ids; stable."""
        return pc.array_sort_indices(self.image_ids).to_numpy().astype(np.int64)  # type: ignore[no-any-return]

    def told_apart(self) -> tuple[Records, int]:
        """The same records with unique ids: an image that is listed again, ``a.jpg``, becomes ``a.jpg#2``, ``a.jpg#3`` ...

        Returns:
            The records, and how many have a new id.
        """
        order = self.in_order()
        ordered = self.image_ids.take(pa.array(order))
        is_again = np.zeros(len(order), bool)
        is_again[1:] = pc.equal(ordered[1:], ordered[:-1]).to_numpy(zero_copy_only=False)
        if not is_again.any():
            return self, 0
        places = np.arange(len(order))
        number = np.empty(len(order), np.int64)  # of each record among those of its id, from 0
        number[order] = places - np.maximum.accumulate(np.where(is_again, 0, places))
        rows = np.flatnonzero(number)
        again = self.image_ids.take(pa.array(rows)).to_pylist()
        renamed = [b"%s#%d" % (image_id, n + 1) for image_id, n in zip(again, number[rows], strict=True)]
        image_ids = pc.replace_with_mask(
            self.image_ids, pa.array(number > 0), pa.array(renamed, pa.large_binary())
        )
        # once more: "a.jpg#2" may be the name of a file
        found = Records(image_ids, self._image_paths, self._labels, self._label_of).told_apart()[0]
        return found, len(rows)

    def select(self, rows: Sequence[int]) -> Records:
        """Some records, packed as these are."""
        indices = pa.array(rows, pa.int64())
        ids, paths, labels = (
            column.take(indices) for column in (self.image_ids, self._image_paths, self._labels)
        )
        return Records(ids, paths, labels, self._label_of)

    @property
    def num_bytes(self) -> int:
        """Of the buffers."""
        return sum(array.nbytes for array in (self.image_ids, self._image_paths, self._labels))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # Python's sign for bytes of a file's name that are no text


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
