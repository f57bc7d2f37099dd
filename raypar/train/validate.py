"""Validation in the middle of a training: every worker takes its share of the images, and the metrics are those of the whole.

Images are letterboxed in the rectangles that Ultralytics' trainer gives them: batches by aspect ratio, each twice the training batch (for
obb: the training batch), however many workers there are.

Runs in: every training worker, which reads its rows straight from the shards: a Ray Data execution at each epoch would cost
seconds (see ``docs/decisions/0003-validation.md``). Images pass through the one :class:`raypar.detector.Detector`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from raypar.boxes import xywhn_to_xyxy
from raypar.dataset.manifest import Split
from raypar.dataset.plan import contiguous_share
from raypar.dataset.rows import cells, most_labels, only_classes, read_sizes, row_group
from raypar.detector import Detector, Letterboxed, joined
from raypar.images import decode
from raypar.judge import Judge, letterboxed
from raypar.metrics import Scorer
from raypar.rectangles import BatchQueue, Rectangles, raised_max_det, rectangles, squares
from raypar.storage import Folder
from raypar.train.recipe import Lender

CACHE_BYTES = (
    512 << 20
)  # letterboxed images that a rank holds: those that wait for their batch, and those it keeps between epochs


class Labels(NamedTuple):
    """What is known of one image: boxes_xyxy float32 (N, 4) in px of the original image."""

    image_id: str
    class_ids: NDArray[np.int32]
    boxes_xyxy: NDArray[np.float32]
    position: int


class Group(NamedTuple):
    """Images of one letterbox, their rows without the encoded images, and what they weigh in the losses."""

    images: Letterboxed
    rows: pa.Table
    weight: float


class Share:
    """One rank's images of the validation split, in the batches of Ultralytics' trainer.

    Args:
        lender: Ultralytics' settings and the manifest.
        dataset: where the shards are.
        batch: images a forward pass, at most.
    """

    def __init__(self, lender: Lender, dataset: Folder, *, rank: int, world_size: int, batch: int):
        self.lender, self.dataset, self.split = lender, dataset, lender.manifest.split("val")
        self.task = lender.manifest.task
        self.rows = contiguous_share(self.split.num_images, rank, world_size)
        # as BaseTrainer._build_train_pipeline of 8.4.190, whatever the number of workers
        self.images_per_rectangle = lender.args.batch * (1 if self.task == "obb" else 2)
        self.batch = min(batch, self.images_per_rectangle)
        self.max_det = int(lender.args.max_det)
        self._rectangles: Rectangles | None = None
        self._cache: list[Group] | None = None

    def prepare(self) -> None:
        """Looks at the sizes of all images, once. All ranks must call."""
        if self._rectangles is None:
            # rank 0 alone: the order of equal ratios is not the same on every CPU
            is_first = not _is_distributed() or dist.get_rank() == 0
            self._rectangles, self.max_det = _from_rank_zero(self._planned() if is_first else None)

    def _planned(self) -> tuple[Rectangles, int]:
        sizes = read_sizes(self.dataset, self.split)
        if self.task == "classify":
            return squares(sizes.image_ids, self.images_per_rectangle), self.max_det
        num_labels = max(sizes.num_labels, most_labels(self.dataset, self.lender.manifest.split("train")))
        max_det = raised_max_det(self.max_det, num_labels)
        if max_det > self.max_det:
            print(
                f"train: images have up to {num_labels} labels: validation keeps {max_det} boxes an image",
                flush=True,
            )
        return rectangles(sizes.image_ids, sizes.hws, self.images_per_rectangle), max_det

    def groups(self, detector: Detector) -> Iterator[Group]:
        """This rank's images, each once; kept for the next time where they fit."""
        if self._cache is not None:
            yield from self._cache
            return
        assert self._rectangles is not None, "prepare comes first"
        shapes = [detector.rectangle((height, width)) for height, width in self._rectangles.sides.tolist()]
        bytes_per_pixel = 12 if self.task == "classify" else 3  # its pixels are float32
        sizes = np.array([height * width * bytes_per_pixel for height, width in shapes])
        num_bytes = sizes[self._rectangles.batch_of[self.rows.start : self.rows.stop]].sum()
        if num_bytes > CACHE_BYTES:
            yield from self._read(detector, shapes)
            return
        kept = []
        for group in self._read(detector, shapes):
            kept.append(group)
            yield group
        self._cache = kept

    def _read(self, detector: Detector, shapes: list[tuple[int, int]]) -> Iterator[Group]:
        assert self._rectangles is not None
        batch_of, weights = self._rectangles.batch_of, self._rectangles.weights()
        queue = BatchQueue[Group](batch_of, shapes, self.rows, most=self.batch, limit=CACHE_BYTES)
        image = self.rows.start
        for table in tables(self.dataset, self.split, self.rows, self.batch):
            positions = self._rectangles.position_of[image : image + table.num_rows]
            labels = table.drop_columns("image").append_column("position", pa.array(positions))
            for i, encoded in enumerate(cells(table["image"])):
                shown = letterboxed(self.task, decode(encoded), shapes[batch_of[image]], detector)
                one = Group(shown, labels.slice(i, 1), float(weights[image]))
                for groups in queue.push(image, one, shown.images.nbytes):
                    yield _together(groups)
                image += 1


def _together(groups: list[Group]) -> Group:
    rows = pa.concat_tables([group.rows for group in groups])
    return Group(joined([group.images for group in groups]), rows, sum(group.weight for group in groups))


class Validator:
    """One rank's part of the validation split.

    Args:
        lender: Ultralytics' settings, and the class names.
        dataset: where the shards are.
        share: rank, world_size, and the images of a forward pass (batch).
    """

    def __init__(self, lender: Lender, dataset: Folder, **share: int):
        self.args, self.class_names = lender.args, list(lender.data["names"].values())
        self.share = Share(lender, dataset, **share)

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses.

        Args:
            model: the EMA weights, in evaluation mode.
            loss_of: the training model, whose criterion measures the validation loss.
            device: where the model is.
        """
        self.share.prepare()
        select_head(model, self.args, self.share.max_det)
        conf = 0.001 if self.args.conf is None else self.args.conf
        detector = Detector(model, self.class_names, imgsz=self.args.imgsz, stride=max(int(model.stride.max()), 32), device=device,
                            conf=conf, iou=self.args.iou, max_det=self.share.max_det, pad=0.5,
                            agnostic=self.args.agnostic_nms)  # fmt: skip
        scorer, losses, num_images = Scorer(self.class_names), _Losses(), 0
        for group in self.share.groups(detector):
            raw = detector.forward(group.images.images)
            labels = self._labels(group.rows)
            losses.add(_loss(loss_of, raw, group.images, labels, device), group.weight)
            num_images += len(labels)
            scorer.update(detector.postprocess(raw, group.images), *map(list, zip(*labels, strict=True)))
        return _join(scorer, losses, num_images, self.share.split.num_images)

    def _labels(self, rows: pa.Table) -> list[Labels]:
        found = []
        for row in rows.to_pylist():
            class_ids = np.asarray(row["class_ids"], np.int32)
            boxes = np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4)
            class_ids, boxes, *_ = only_classes((class_ids, boxes, None, None), self.args.classes)
            class_ids = class_ids * (0 if self.args.single_cls else 1)
            boxes_xyxy = xywhn_to_xyxy(boxes, (row["height"], row["width"]))
            found.append(Labels(row["image_id"], class_ids, boxes_xyxy, row["position"]))
        return found


class JudgedValidator:
    """One rank's part of the validation split of another task, by Ultralytics' own validator; arguments as of :class:`Validator`."""

    def __init__(self, lender: Lender, dataset: Folder, **share: int):
        self.args = lender.args
        self.share = Share(lender, dataset, **share)
        self.judge = Judge(lender.manifest, lender.args, Path(lender.args.save_dir))

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses. Arguments as of :class:`Validator`."""
        self.share.prepare()
        select_head(model, self.args, self.share.max_det)
        self.judge.keep(self.share.max_det)
        stride = max(int(model.stride.max()), 32)
        names = list(self.judge.names.values())
        detector = Detector(model, names, imgsz=self.args.imgsz, stride=stride, device=device, pad=0.5)
        self.judge.clear(model)
        losses = _Losses()
        for group in self.share.groups(detector):
            batch = self.judge.batch(group.rows, group.images, detector.device)
            with torch.no_grad():
                raw = detector.model(batch["img"])
                parts = loss_of.loss(batch, raw)[1]
            losses.add({name: float(value) for name, value in parts.items()}, group.weight)
            self.judge.update(raw, batch)
        states, means = gathered(
            self.judge.state(), losses.sums, self.judge.num_images, self.share.split.num_images
        )
        self.judge.join(states)
        return {**self.judge.compute(), **means}


def select_head(model: Any, args: Any, max_det: int) -> None:
    """Lets a model with two heads answer by the one that Ultralytics validates: that with NMS, or with ``nms=False`` that without.

    As ``BaseValidator.__call__`` and ``DetectionValidator.init_metrics`` do (8.4.190).
    """
    if not hasattr(model, "end2end"):
        return
    model.end2end = args.nms is False
    if model.end2end:
        model.set_head_attr(max_det=max_det, agnostic_nms=args.agnostic_nms)


class _Losses:
    """Sums of losses."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, parts: dict[str, float], weight: float) -> None:
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * weight


def make_validator(lender: Lender, dataset: Folder, **share: int) -> Validator | JudgedValidator:
    """The validator of the dataset's task; ``share``: rank, world_size and batch."""
    return (Validator if lender.manifest.task == "detect" else JudgedValidator)(lender, dataset, **share)


def tables(dataset: Folder, split: Split, rows: range, batch: int) -> Iterator[pa.Table]:
    """Some rows of a split, at most ``batch`` at a time."""
    first, waiting = 0, list[pa.Table]()
    for shard in split.shards:
        for group, num_rows in enumerate(shard.row_groups):
            mine = range(max(rows.start - first, 0), min(rows.stop - first, num_rows))
            first += num_rows
            if not mine:
                continue
            waiting.append(row_group(dataset, shard.path, group).slice(mine.start, len(mine)))
            table = pa.concat_tables(waiting)
            whole = table.num_rows // batch * batch
            yield from (table.slice(i, batch) for i in range(0, whole, batch))
            waiting = [table.slice(whole)]
    if waiting and waiting[0].num_rows:
        yield waiting[0]


def _loss(
    model: Any, raw: Any, group: Letterboxed, labels: list[Labels], device: torch.device
) -> dict[str, float]:
    """The criterion's parts, as means over a group of equally letterboxed images."""
    height, width = group.images.shape[2:]
    boxes = [
        label.boxes_xyxy * gain + np.tile(pad, 2)
        for label, gain, pad in zip(labels, group.gains, group.pads, strict=True)
    ]
    xyxy = torch.from_numpy(np.concatenate(boxes).astype(np.float32).reshape(-1, 4)) / torch.tensor(
        [width, height, width, height]
    )
    batch = {
        "img": torch.empty(len(labels), 0, device=device),  # criteria read the number of images from it
        "cls": torch.from_numpy(np.concatenate([label.class_ids for label in labels]).astype(np.float32))
        .view(-1, 1)
        .to(device),
        "bboxes": torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1).to(device),
        "batch_idx": torch.repeat_interleave(
            torch.arange(len(labels)), torch.tensor([len(x.class_ids) for x in labels])
        )
        .float()
        .to(device),
    }
    with torch.no_grad():
        return {name: float(value) for name, value in model.loss(batch, raw)[1].items()}


def _join(scorer: Scorer, losses: _Losses, num_images: int, expected: int) -> dict[str, Any]:
    """Gathers every rank's part; the same answer everywhere."""
    whole = Scorer(scorer.class_names)
    states, means = gathered(scorer.state(), losses.sums, num_images, expected)
    for state in states:
        whole.merge(state)
    return {**whole.compute(), **means}


def gathered(
    state: Any, losses: dict[str, float], num_images: int, expected: int
) -> tuple[list[Any], dict[str, float]]:
    """What every rank has found, in their order, and ``val/...`` losses of the whole split; the same answer everywhere.

    Args:
        state: what this rank has found; can be pickled.
        losses: sums over this rank's groups, by their weights.
        num_images: of this rank.
        expected: images of all ranks.
    """
    parts: list[Any] = [(state, losses, num_images)]
    if _is_distributed():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (state, losses, num_images))
    total = sum(n for _, _, n in parts)
    if total != expected:
        raise RuntimeError(f"validation saw {total} images of {expected}")
    names = dict.fromkeys(name for _, part, _ in parts for name in part)
    return [state for state, _, _ in parts], {
        f"val/{name}": sum(part.get(name, 0.0) for _, part, _ in parts) for name in names
    }


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if _is_distributed():
        dist.broadcast_object_list(values, src=0)
    return values[0]
