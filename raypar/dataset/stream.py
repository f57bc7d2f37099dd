"""The plan, run by Ray Data: one long stream of packed batches over many epochs.

Runs in: rank 0 builds a stream, Ray Data tasks read, decode and augment its windows, every training worker takes its own
batches. An item of the plan is a window; its task yields one block of a few steps for each rank in turn. Blocks have one
row, ``preserve_order`` keeps them in plan order and ``streaming_split`` deals each to the rank with the fewest rows: so rank
and step follow from the plan. Every batch says what it is, and :func:`batches` refuses one that is out of turn.

Why one stream and not one Ray Data execution an epoch: see ``docs/decisions/0002-one-stream.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import chain, islice
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raypar.augment import albu
from raypar.augment.classify import ClassifyRecipe, ClassifyRenderer
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Recipe, generator
from raypar.augment.labels import Labels
from raypar.augment.outlines import Outlines, densify
from raypar.dataset.batch import Batch, pack, unpack
from raypar.dataset.cache import CacheSpec, node_cache
from raypar.dataset.manifest import Manifest, RowGroups, Split
from raypar.dataset.placement import away_from_gpus
from raypar.dataset.plan import Item, Plan, Window
from raypar.dataset.rows import cells, only_classes, row_group, row_labels, row_polygons
from raypar.dataset.schema import row_schema
from raypar.images import Image, decode, decode_shrunk
from raypar.storage import Folder

MAX_ITEMS = 4096  # windows in one Ray Data execution; the next one starts where it ends
BLOCK_BYTES, MAX_STEPS_PER_BLOCK = 128 << 20, 8  # of what one rank is dealt at a time
LOOK_AHEAD_IMAGES = 1024  # rendered images that may wait for the workers, about, at the least
# more where there are more CPUs: Ray Data runs a task for every 2.7 windows that may wait (2.60.0)
WINDOWS_PER_CPU, SPARE_CPUS = 3, 2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
SourceLabels = tuple[
    NDArray[np.int32], NDArray[np.float32], NDArray[np.float32] | Outlines | None, NDArray[np.float32] | None
]
ALBUMENTATIONS = 1 << 62  # keeps an image's albumentations draws apart from those of its position


@dataclass(frozen=True)
class StreamSpec:
    """All that a task must know to make any batch of the run."""

    dataset: Folder
    groups: Sequence[tuple[str, int]]  # for each row group of the plan: its shard's path and its number there
    plan: Plan
    recipe: Recipe | ClassifyRecipe
    mosaic_epochs: int  # epochs before mosaic is closed
    albumentations: list[dict[str, Any]] | str | None
    world_size: int
    cache: CacheSpec | None = None
    has_polygons: bool = False  # detect: of each box, in the shards
    classes: tuple[int, ...] | None = None  # whose labels are kept; None: all

    @classmethod
    def of(cls, dataset: Folder, split: Split, plan: Plan, recipe: Recipe | ClassifyRecipe, *, mosaic_epochs: int,
           albumentations: list[dict[str, Any]] | str | None, world_size: int,
           cache: CacheSpec | None = None, classes: Sequence[int] | None = None) -> StreamSpec:  # fmt: skip
        return cls(
            dataset,
            RowGroups(split),
            plan,
            recipe,
            mosaic_epochs,
            albumentations,
            world_size,
            cache,
            has_polygons=recipe.task == "detect" and split.has_polygons,
            classes=None if classes is None else tuple(classes),
        )

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """The number within the split of the first row of each row group."""
        return np.concatenate([[0], np.cumsum(self.plan.row_groups)])[:-1]

    @cached_property
    def label_columns(self) -> list[str]:
        """What is read of a row beside its image."""
        left_out = {"image_id", "image", "height", "width"}
        if self.recipe.task == "detect" and not self.has_polygons:
            left_out.add("segments_xyn")
        return [name for name in row_schema(self.recipe.task).names if name not in left_out]

    @cached_property
    def labels_kept(self) -> dict[int, Any]:
        """What :mod:`raypar.dataset.encoded` keeps of row groups, for as long as a process has this stream."""
        return {}

    @property
    def images_per_batch(self) -> int:
        return self.plan.global_batch // self.world_size

    @property
    def steps_per_block(self) -> int:
        """How many steps of a rank travel together."""
        return max(
            1, min(MAX_STEPS_PER_BLOCK, BLOCK_BYTES // (self.images_per_batch * 3 * self.recipe.imgsz**2))
        )


def recipe_of(args: Mapping[str, Any], manifest: Manifest) -> Recipe | ClassifyRecipe:
    """How to augment a dataset, by Ultralytics' whole settings.

    Raises:
        ValueError: a setting that raypar cannot honour for the dataset's task.
    """
    if manifest.task == "classify":
        return ClassifyRecipe.from_yolo(args)
    # Ultralytics pastes along polygons, and ignores the setting where there are none
    if manifest.task == "detect" and args["copy_paste"] and not manifest.split("train").has_polygons:
        raise ValueError(
            f"train.yolo.copy_paste={args['copy_paste']}: the dataset has boxes without polygons, and objects are pasted by "
            "their polygons: leave it out"
        )
    return Recipe.from_yolo(
        args, manifest.task, manifest.flip_idx, manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
    )


def render(spec: StreamSpec, item: Item) -> Iterator[Batch]:
    """All batches of a window. The whole stream is this function, mapped over the plan's items."""
    return chain.from_iterable(blocks(spec, item))


def blocks(spec: StreamSpec, item: Item) -> Iterator[list[Batch]]:
    """All batches of a window as they travel: of a few steps those of rank 0, then those of rank 1, and so on; then the next steps."""
    window = spec.plan.window(item.epoch, item.window)
    rows, sources, num_replaced = _read(spec, item, window)
    renderer = _renderer(spec, item.epoch)
    size, per_batch, global_batch = spec.recipe.imgsz, spec.images_per_batch, spec.plan.global_batch

    def one(step: int, rank: int, images: NDArray[np.uint8], num_replaced: int) -> Batch:
        start = step * global_batch + spec.plan.share(rank, spec.world_size).start
        shown = window.order[start : start + per_batch]
        first_position = window.first_step * global_batch + start
        rngs = [generator(spec.plan.seed, item.epoch, first_position + i) for i in range(per_batch)]
        labels = renderer(sources, shown, rows[shown], rngs, images)
        return Batch(item.epoch, window.first_step + step, rank, images, labels.class_ids, labels.boxes_xywhn, labels.image_index,
                     rows[shown], num_replaced, labels.masks, labels.keypoints, labels.boxes_xywhr)  # fmt: skip

    num_steps = len(window.order) // global_batch
    for first in range(item.skip_steps, num_steps, spec.steps_per_block):
        steps = range(first, min(first + spec.steps_per_block, num_steps))
        for rank in range(spec.world_size):
            slab = np.empty((len(steps), per_batch, 3, size, size), np.uint8)
            # replaced images are counted once, by the window's first batch
            yield [
                one(s, rank, slab[s - first], num_replaced if (s, rank) == (item.skip_steps, 0) else 0)
                for s in steps
            ]


def _renderer(spec: StreamSpec, epoch: int) -> Callable[..., Labels]:
    """Fills images from sources, given what each shows: its index among them and its number within the split."""
    mosaic_on = epoch < spec.mosaic_epochs
    if isinstance(spec.recipe, ClassifyRecipe):
        classify = ClassifyRenderer(spec.recipe)
        return lambda sources, shown, _, rngs, out: classify(
            sources, shown.tolist(), rngs, mosaic_on=mosaic_on, out=out
        )
    boxed = Renderer(spec.recipe, transform_of(spec))

    def render_boxed(
        sources: Sequence[Source],
        shown: NDArray[np.int64],
        numbers: NDArray[np.int64],
        rngs: Sequence[np.random.Generator],
        out: NDArray[np.uint8],
    ) -> Labels:
        changes = [generator(spec.plan.seed, epoch, ALBUMENTATIONS + int(number)) for number in numbers]
        return boxed(sources, shown.tolist(), rngs, mosaic_on=mosaic_on, out=out, changes=changes)

    return render_boxed


def _read(spec: StreamSpec, item: Item, window: Window) -> tuple[NDArray[np.int64], list[Source], int]:
    """The window's rows: their numbers within the split, the images with their boxes, and how many had to be replaced."""
    tables, images, numbers = [], list[pa.Buffer | Image | None](), []
    for group, rows in window.rows():
        table, in_group = _read_group(spec, group)
        tables.append(table.slice(rows.start, rows.stop - rows.start))
        images += in_group[rows]
        numbers.append(spec.first_rows[group] + np.arange(rows.start, rows.stop))
    table, number = pa.concat_tables(tables), np.concatenate(numbers)
    found = [
        _source(spec, item, int(n), table, i, image)
        for i, (n, image) in enumerate(zip(number, images, strict=True))
    ]
    good = [i for i, source in enumerate(found) if source is not None]
    if not good:
        raise ValueError(
            f"no image of the {len(found)} in a window of {spec.dataset.uri} can be decoded: prepare the dataset again"
        )
    # itself, or the next good one
    stand_in = {i: good[np.searchsorted(good, i) % len(good)] for i in range(len(found))}
    sources = [source for i in range(len(found)) if (source := found[stand_in[i]]) is not None]
    return number, sources, len(found) - len(good)


def _read_group(spec: StreamSpec, group: int) -> tuple[pa.Table, Sequence[pa.Buffer | Image | None]]:
    """A row group's labels, and its images: encoded, or decoded when there is a cache (None: cannot be)."""
    path, index = spec.groups[group]
    cache = None if spec.cache is None else node_cache(spec.cache)
    images = None if cache is None else cache.get(str(group))
    columns = ["image"] * (images is None) + spec.label_columns
    table = row_group(spec.dataset, path, index, columns)
    if images is not None:
        return table, images
    encoded = cells(table["image"])
    if cache is None:
        return table.select(spec.label_columns), encoded
    decoded = [_decode(spec, image) for image in encoded]
    cache.put(str(group), decoded)
    return table.select(spec.label_columns), decoded


def _decode(spec: StreamSpec, image: pa.Buffer) -> Image | None:
    try:
        # classify takes crops of it
        return decode(image) if spec.recipe.task == "classify" else decode_shrunk(image, spec.recipe.imgsz)
    except ValueError:
        return None


def _source(
    spec: StreamSpec, item: Item, number: int, table: pa.Table, i: int, image: pa.Buffer | Image | None
) -> Source | None:
    if isinstance(image, pa.Buffer):
        image = _decode(spec, image)
    if image is None:
        return None
    class_ids, boxes, polygons, keypoints = labels_of(spec, table, i)
    if spec.recipe.task == "classify":  # Ultralytics has none: they act on the image as it is stored
        rng = generator(spec.plan.seed, item.epoch, ALBUMENTATIONS + number)
        image, class_ids, boxes = transform_of(spec)(image, class_ids, boxes, rng)
    return Source(image, class_ids, boxes, polygons, keypoints)


def labels_of(spec: StreamSpec, table: pa.Table, i: int) -> SourceLabels:
    """Labels of a row, as a source has them."""
    recipe = spec.recipe
    labels = row_labels(table, i, recipe.task, recipe.num_keypoints)
    if not spec.has_polygons:
        return only_classes(labels, spec.classes)
    class_ids, boxes, _, keypoints = only_classes(labels, spec.classes)
    found = row_polygons(table, i)
    if spec.classes is not None:
        found = [polygon for polygon, id_ in zip(found, labels[0], strict=True) if id_ in spec.classes]
    # polygons that are pasted, or moved by albumentations, must be dense; else only boxes are wanted of them
    is_dense = isinstance(recipe, Recipe) and (recipe.copy_paste > 0 or transform_of(spec).move_pixels)
    return class_ids, boxes, densify(found) if is_dense else Outlines.of(found), keypoints


@lru_cache(maxsize=1)
def _made(albumentations: str, task: str, has_polygons: bool) -> albu.Transforms:
    import json

    return albu.make(json.loads(albumentations), task, has_polygons=has_polygons)


def transform_of(spec: StreamSpec) -> albu.Transforms:
    import json

    # made once a process: it costs milliseconds
    return _made(json.dumps(spec.albumentations), spec.recipe.task, spec.has_polygons)


class Placed(Protocol):
    """What is dealt says where it belongs."""

    @property
    def epoch(self) -> int: ...
    @property
    def step(self) -> int: ...
    @property
    def rank(self) -> int: ...


Dealt = TypeVar("Dealt", bound=Placed)


def batches(spec: StreamSpec, rank: int, cursor: int) -> Iterator[Batch]:
    """A rank's batches from a cursor to the end of the run; see :func:`dealt`."""
    return dealt(spec, rank, cursor, partial(_start, spec), unpack)


def dealt(spec: StreamSpec, rank: int, cursor: int, start: Callable[[list[Item]], list[Any]],
          open_block: Callable[[pa.Table], list[Dealt]]) -> Iterator[Dealt]:  # fmt: skip
    """What a rank is dealt from a cursor to the end of the run. Every rank of the worker group must iterate; rank 0 feeds all.

    The first execution starts at once, not when somebody iterates: its processes take seconds.

    Args:
        spec: of the stream.
        rank: whose.
        cursor: where to begin.
        start: starts a Ray Data execution over some items and returns one iterator for each rank.
        open_block: a block's batches.

    Raises:
        RuntimeError: a batch came out of turn (a defect, or a world size that changed under the stream).
    """
    items = spec.plan.items(cursor)

    def execute() -> Any:
        """This rank's part of the next items; nothing after the last."""
        import ray.train.collective

        execution = list(islice(items, MAX_ITEMS))
        shards = start(execution) if execution and rank == 0 else None
        return ray.train.collective.broadcast_from_rank_zero(shards)[rank] if execution else None

    first = execute()

    def all_blocks() -> Iterator[pa.Table]:
        shard = first
        while shard is not None:
            yield from shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
            shard = execute()

    return _in_turn(
        chain.from_iterable(map(open_block, all_blocks())),
        spec.plan.steps_per_epoch,
        cursor // spec.plan.global_batch,
        rank,
    )


def _in_turn(dealt: Iterable[Dealt], steps_per_epoch: int, due: int, rank: int) -> Iterator[Dealt]:
    """The same, when each is what is due: steps of this rank from step ``due`` of the run on."""
    for batch in dealt:
        place = divmod(due, steps_per_epoch)
        if (batch.epoch, batch.step, batch.rank) != (*place, rank):
            raise RuntimeError(f"rank {rank} expected epoch {place[0]} step {place[1]} and was dealt "
                               f"epoch {batch.epoch} step {batch.step} of rank {batch.rank}")  # fmt: skip
        due += 1
        yield batch


def _task(spec_ref: Any, item: Item) -> Iterator[pa.Table]:
    settle()
    for block in blocks(fetched(spec_ref), item):
        yield pack(block)


def _start(spec: StreamSpec, execution: list[Item], task: Callable[[Any, Item], Iterator[pa.Table]] = _task,
           look_ahead_bytes: int | None = None) -> list[Any]:  # fmt: skip
    """Starts a Ray Data execution over some items and returns one iterator for each rank.

    Args:
        spec: of the stream.
        execution: the items.
        task: makes an item's blocks, given a reference to ``spec``.
        look_ahead_bytes: of blocks that may wait for the workers, about; nothing: of as many images as :func:`look_ahead_images` says.
    """
    import ray
    from ray.data import Datasource, ExecutionOptions, ExecutionResources
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    from raypar.dataset.pace import Pace

    spec_ref = ray.put(spec)

    class Windows(Datasource):  # type: ignore[misc]  # Ray Data's reader of windows: one task an item
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(partial(task, spec_ref, item), unknown) for item in execution]

    if look_ahead_bytes is None:
        window_images, image_bytes = (
            spec.plan.steps_per_window * spec.plan.global_batch,
            3 * spec.recipe.imgsz**2,
        )
        free, store = (
            ray.available_resources().get("CPU", 0.0),
            ray.cluster_resources().get("object_store_memory", 0.0),
        )
        look_ahead_bytes = image_bytes * look_ahead_images(window_images, free, store / image_bytes)
    dataset = ray.data.read_datasource(Windows(), override_num_blocks=len(execution), **away_from_gpus())
    dataset.context.target_max_block_size = 1  # a block is one row: never joined, never cut
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources.for_limits(object_store_memory=look_ahead_bytes))  # fmt: skip
    dataset.context.custom_execution_callback_classes = [Pace]
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    # a long validation is not a hang; collectives have their own limit
    dataset.context.execution_no_progress_timeout_s = -1
    return list(dataset.streaming_split(spec.world_size, equal=False))


def look_ahead_images(window_images: int, free_cpus: float, store_images: float) -> int:
    """How many rendered images may wait for the workers, so that every CPU has work; half of what the object stores hold at the most."""
    wanted = max(LOOK_AHEAD_IMAGES, int(WINDOWS_PER_CPU * window_images * (free_cpus - SPARE_CPUS)))
    return max(1, min(wanted, int(store_images / 2)))


@lru_cache(maxsize=1)
def settle() -> None:
    """Fits a process to rendering: one thread, and memory that is freed is kept for the next window.

    glibc would give it back to the kernel, which clears every page again: half the time of decoding a small JPEG.
    """
    import ctypes

    import cv2

    cv2.setNumThreads(0)  # tasks are the parallelism
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


@lru_cache(maxsize=1)
def fetched(spec_ref: Any) -> StreamSpec:
    """A task's stream."""
    import ray

    spec: StreamSpec = ray.get(spec_ref)  # once a process: a long plan takes a while to unpack
    return spec
