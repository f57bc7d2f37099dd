"""The stream for ``augment: gpu``: encoded images travel, with all the numbers by which a device renders them.

Runs in: Ray Data tasks. They read rows, draw the geometry and move the labels; no pixel is decoded, but of the few images that
albumentations change. :mod:`raypar.dataset.rendered` does the rest in the training workers. Items, windows, steps, shares and random numbers are those of
:mod:`raypar.dataset.stream`; only mosaic partners differ. *Lane* j is the j-th position of every step of the run. An image's partners are the images
that its lane showed in the last ``depth`` steps: they were this rank's own, whatever the number of workers, and are decoded already.

Letters: B images of a rank in a step, D the depth. Slot k*B + i of a rank's ring holds the newest image of its i-th lane among steps k, k + D, k + 2D ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypar.augment.geometry import Layer, Recipe, Sample, draw, generator
from raypar.augment.labels import batch_labels, move_labels
from raypar.augment.outlines import Outlines
from raypar.augment.pack import Table
from raypar.augment.pack import pack as pack_table
from raypar.dataset.batch import Batch, one_binary
from raypar.dataset.batch import pack as pack_labels
from raypar.dataset.batch import unpack as unpack_labels
from raypar.dataset.plan import Item, Window
from raypar.dataset.rows import cells, row_group
from raypar.dataset.stream import (
    ALBUMENTATIONS,
    MAX_STEPS_PER_BLOCK,
    StreamSpec,
    _start,
    dealt,
    fetched,
    labels_of,
    settle,
    transform_of,
)
from raypar.images import decode_shrunk, resized_hw

MIN_DEPTH, MAX_DEPTH = 8, 32  # steps
RING_IMAGES, RING_BYTES = 512, 2 << 30  # of all ranks' rings together, about, between those two
# of what one rank is dealt at a time; an encoded image, at the most, about
BLOCK_BYTES, IMAGE_BYTES = 64 << 20, 256 << 10
LOOK_AHEAD_BYTES = 512 << 20  # of blocks that may wait for the workers, about
# while labels are moved, a class id has above it the number k of the step that its image is from
STEP_BIT = 20
LABELLED_GROUPS = 16  # row groups whose labels a process keeps


@dataclass(frozen=True)
class Labelled:
    """A source without its pixels; as :class:`raypar.augment.cpu.Source`, its ``hw`` that of the image in the ring."""

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    hw: tuple[int, int]
    polygons: NDArray[np.float32] | Outlines | None = None
    keypoints: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class EncodedBatch:
    """One rank's part of one step, to be rendered.

    Attributes:
        labels: the batch without pixels: its ``images`` are uint8 (B, 3, 0, 0).
        encoded: bytes of the B images that the step shows for the first time.
        image_hws: int32 (B, 2), height and width of them, px, when their longer side is at most imgsz.
        box_slots: int32 (M,), the slot of the image that each label comes from.
        table: by which to render.
    """

    labels: Batch
    encoded: Sequence[Any]
    image_hws: NDArray[np.int32]
    box_slots: NDArray[np.int32]
    table: Table

    @property
    def epoch(self) -> int:
        return self.labels.epoch

    @property
    def step(self) -> int:
        return self.labels.step

    @property
    def rank(self) -> int:
        return self.labels.rank


def refuse(
    *, task: str, cache: str, copy_paste: float, moves_pixels: bool, has_polygons: bool = False
) -> None:
    """Says what the device does not do; ``has_polygons``: of a detect dataset.

    Raises:
        ValueError: it is asked for.
    """
    reasons = {
        "the dataset's task is 'classify'": task == "classify",
        f"train.cache={cache} keeps images for the processes that augment on CPUs (write train.cache=none)": cache
        != "none",
        f"train.yolo.copy_paste={copy_paste} is not done on the device (write 0)": bool(copy_paste)
        and (task in ("segment", "obb") or has_polygons),
        "train.albumentations has a transform that moves pixels": moves_pixels,
    }
    if found := [reason for reason, is_so in reasons.items() if is_so]:
        raise ValueError(f"train.augment=gpu cannot be had: {'; '.join(found)}; or write train.augment=cpu")


def depth_of(spec: StreamSpec) -> int:
    """D: from how many steps an image's partners are. It follows from the global batch and imgsz alone, and so does what is drawn."""
    images = min(RING_IMAGES, RING_BYTES // (4 * spec.recipe.imgsz**2))
    return max(MIN_DEPTH, min(MAX_DEPTH, images // spec.plan.global_batch))


def encoded_batches(spec: StreamSpec, rank: int, cursor: int) -> Iterator[EncodedBatch]:
    """A rank's part of all steps from a cursor to the end of the run; see :func:`raypar.dataset.stream.dealt`."""
    return dealt(
        spec, rank, cursor, partial(_start, spec, task=_task, look_ahead_bytes=LOOK_AHEAD_BYTES), unpack
    )


def _task(spec_ref: Any, item: Item) -> Iterator[pa.Table]:
    settle()
    for block in encoded_blocks(fetched(spec_ref), item):
        yield pack(block)


def encoded_blocks(spec: StreamSpec, item: Item) -> Iterator[list[EncodedBatch]]:
    """A window as it travels: of a few steps those of rank 0, then those of rank 1, and so on; then the next steps."""
    plan, window = spec.plan, spec.plan.window(item.epoch, item.window)
    begin = item.epoch * plan.steps_per_epoch + window.first_step
    first, last = begin + item.skip_steps, begin + len(window.order) // plan.global_batch
    sources = dict(_sources(spec, max(0, first - depth_of(spec) + 1), last))
    numbers, images = _images(spec, window)

    def one(step: int, rank: int) -> EncodedBatch:
        at = (step - begin) * plan.global_batch
        shown = window.order[at : at + plan.global_batch][plan.share(rank, spec.world_size)]
        hws = [source.hw for source in sources[step][plan.share(rank, spec.world_size)]]
        encoded = [
            _changed(spec, item.epoch, int(numbers[row]), images[row], hw)
            for row, hw in zip(shown, hws, strict=True)
        ]
        labels, box_slots, table = _drawn(spec, step, rank, sources, numbers[shown])
        return EncodedBatch(labels, encoded, np.array(hws, np.int32), box_slots, table)

    per_block = max(1, min(MAX_STEPS_PER_BLOCK, BLOCK_BYTES // (spec.images_per_batch * IMAGE_BYTES)))
    for start in range(first, last, per_block):
        for rank in range(spec.world_size):
            yield [one(step, rank) for step in range(start, min(start + per_block, last))]


def _drawn(spec: StreamSpec, step: int, rank: int, sources: dict[int, list[Labelled]],
           numbers: NDArray[np.int64]) -> tuple[Batch, NDArray[np.int32], Table]:  # fmt: skip
    """What a rank shows in a step, counted from the start of the run: labels, the slot each is from, and how to render."""
    plan, recipe, depth, per_batch = spec.plan, spec.recipe, depth_of(spec), spec.images_per_batch
    assert isinstance(recipe, Recipe)
    epoch, epoch_step = divmod(step, plan.steps_per_epoch)
    share, num_steps = plan.share(rank, spec.world_size), min(step + 1, depth)
    # slot k * B + lane
    ring = [source for k in range(num_steps) for source in sources[step - (step - k) % depth][share]]
    samples = []
    for lane in range(per_batch):
        rng = generator(plan.seed, epoch, epoch_step * plan.global_batch + share.start + lane)
        sample = draw(recipe, rng, step % depth, num_steps, mosaic_on=epoch < spec.mosaic_epochs)
        samples.append(in_lane(sample, lane, per_batch, num_steps))
    moved = [move_labels(recipe, sample, ring) for sample in samples]
    table = pack_table(
        recipe, samples, [source.hw for source in ring], range(len(ring)), [m.cut for m in moved]
    )
    flat = batch_labels(moved)
    batch = Batch(epoch, epoch_step, rank, np.empty((per_batch, 3, 0, 0), np.uint8), flat.class_ids & ((1 << STEP_BIT) - 1),
                  flat.boxes_xywhn, flat.image_index, numbers, 0, flat.masks, flat.keypoints, flat.boxes_xywhr)  # fmt: skip
    return batch, (flat.class_ids >> STEP_BIT) * np.int32(per_batch) + flat.image_index, table


def in_lane(sample: Sample, lane: int, per_batch: int, num_steps: int) -> Sample:
    """A sample drawn from the last steps of one lane, as one of the ring's slots; a mosaic's images are different ones while there are enough."""

    def placed(layer: Layer) -> Layer:
        chosen: list[int] = []
        for k in layer.indices:
            while k in chosen and len(chosen) < num_steps:
                k = (k + 1) % num_steps
            chosen.append(k)
        return replace(layer, indices=tuple(k * per_batch + lane for k in chosen))

    mixed = None if sample.mixed is None else (placed(sample.mixed[0]), sample.mixed[1])
    cut = None if sample.cut is None else (placed(sample.cut[0]), *sample.cut[1:])
    return replace(sample, layer=placed(sample.layer), mixed=mixed, cut=cut)


def _sources(spec: StreamSpec, first: int, last: int) -> Iterator[tuple[int, list[Labelled]]]:
    """What the steps first .. last-1 of the run show, G sources each; class ids say which step of the ring they are from."""
    plan, depth = spec.plan, depth_of(spec)
    for item in plan.items(first * plan.global_batch):
        window = plan.window(item.epoch, item.window)
        begin = item.epoch * plan.steps_per_epoch + window.first_step
        labelled = [source for group, rows in window.rows() for source in _labelled(spec, group)[rows]]
        order = window.order.reshape(-1, plan.global_batch)
        for step in range(begin + item.skip_steps, begin + len(order)):
            if step >= last:
                return
            tag = np.int32(step % depth << STEP_BIT)
            shown = (labelled[row] for row in order[step - begin])
            yield step, [replace(source, class_ids=source.class_ids + tag) for source in shown]


def _labelled(spec: StreamSpec, group: int) -> list[Labelled]:
    """A row group's rows without their images; a process keeps those that it used last."""
    kept = spec.labels_kept
    if (found := kept.pop(group, None)) is None:
        path, index = spec.groups[group]
        table = row_group(spec.dataset, path, index, ["height", "width", *spec.label_columns]).slice(
            0, spec.plan.row_groups[group]
        )
        hws = zip(table["height"].to_pylist(), table["width"].to_pylist(), strict=True)
        found = [_row(spec, table, i, hw) for i, hw in enumerate(hws)]
        while len(kept) >= LABELLED_GROUPS:
            del kept[next(iter(kept))]
    kept[group] = found
    return found


def _row(spec: StreamSpec, table: pa.Table, i: int, hw: tuple[int, int]) -> Labelled:
    assert isinstance(spec.recipe, Recipe)
    class_ids, boxes, polygons, keypoints = labels_of(spec, table, i)
    in_ring = resized_hw(hw, spec.recipe.imgsz) if max(hw) > spec.recipe.imgsz else hw
    return Labelled(class_ids, boxes, in_ring, polygons, keypoints)


def _images(spec: StreamSpec, window: Window) -> tuple[NDArray[np.int64], list[pa.Buffer]]:
    """For a window's rows their numbers within the split, and their encoded images."""
    numbers, images = [], []
    for group, rows in window.rows():
        path, index = spec.groups[group]
        column = row_group(spec.dataset, path, index, ["image"])["image"]
        images += cells(column)[rows]
        numbers.append(spec.first_rows[group] + np.arange(rows.start, rows.stop))
    return np.concatenate(numbers), images


def _changed(spec: StreamSpec, epoch: int, number: int, image: pa.Buffer, hw: tuple[int, int]) -> Any:
    """An encoded image as albumentations change it, by the draws of the other stream; most are left as they are."""
    transform, key = transform_of(spec), (spec.plan.seed, epoch, ALBUMENTATIONS + number)
    if not transform.apply_to(generator(*key)):
        return image
    try:
        decoded = decode_shrunk(image, spec.recipe.imgsz)
    except ValueError:  # the worker will say so
        return image
    made, _, _ = transform(decoded, np.zeros(0, np.int32), np.zeros((0, 4), np.float32), generator(*key))
    if made.shape[:2] != decoded.shape[:2]:
        raise ValueError(f"train.albumentations: an image of {hw[1]} x {hw[0]} px became {made.shape[1]} x {made.shape[0]}, which "
                         f"train.augment=gpu cannot follow: write train.augment=cpu")  # fmt: skip
    # nothing is lost, and it takes no time
    is_done, encoded = cv2.imencode(".bmp", cv2.cvtColor(made, cv2.COLOR_RGB2BGR))
    assert is_done
    return encoded.reshape(-1)


def pack(batches: Sequence[EncodedBatch]) -> pa.Table:
    """Consecutive steps of one rank as one row of buffers."""
    table = pack_labels([batch.labels for batch in batches])
    encoded = [np.frombuffer(image, np.uint8) for batch in batches for image in batch.encoded]
    columns: dict[str, NDArray[Any]] = {
        "encoded": np.concatenate(encoded),
        "num_bytes": np.array([image.size for image in encoded], np.int64),
        "image_hws": np.concatenate([batch.image_hws for batch in batches]),
        "box_slots": np.concatenate([batch.box_slots for batch in batches]),
        "values": np.concatenate([batch.table.values for batch in batches]),
        "tables": np.array(
            [(b.table.values.size, b.table.num_images, b.table.num_mixed, b.table.num_cut) for b in batches],
            np.int64,
        ),
    }
    for name, array in columns.items():
        table = table.append_column(name, one_binary(array))
    return table


def unpack(table: pa.Table) -> list[EncodedBatch]:
    """The inverse of :func:`pack`; all but the tables are views of the memory of Arrow's."""

    def view(name: str, dtype: Any) -> NDArray[Any]:
        return np.frombuffer(cells(table.column(name))[0], dtype=dtype)

    batches = unpack_labels(table)
    per_batch, tables = len(batches[0].images), view("tables", np.int64).reshape(-1, 4)
    encoded = np.split(view("encoded", np.uint8), np.cumsum(view("num_bytes", np.int64))[:-1])
    image_hws = view("image_hws", np.int32).reshape(-1, per_batch, 2)
    box_slots = np.split(
        view("box_slots", np.int32), np.cumsum([len(batch.image_index) for batch in batches])[:-1]
    )
    values = np.split(view("values", np.float32).copy(), np.cumsum(tables[:, 0])[:-1])
    return [
        EncodedBatch(
            batch,
            encoded[i * per_batch : (i + 1) * per_batch],
            image_hws[i],
            box_slots[i],
            Table(values[i], *tables[i, 1:].tolist()),
        )
        for i, batch in enumerate(batches)
    ]
