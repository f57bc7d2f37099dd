"""Validation in the middle of a training: every worker takes its share of the images, and the metrics are those of the whole.

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
from raypar.dataset.rows import cells, only_classes, row_group
from raypar.detector import Detector, Letterboxed
from raypar.images import decode
from raypar.judge import Judge
from raypar.metrics import Scorer
from raypar.storage import Folder
from raypar.train.recipe import Lender

CACHE_BYTES = 512 << 20  # letterboxed images a rank keeps between epochs


class Labels(NamedTuple):
    """What is known of one image: boxes_xyxy float32 (N, 4) in px of the original image."""

    image_id: str
    class_ids: NDArray[np.int32]
    boxes_xyxy: NDArray[np.float32]


class Validator:
    """One rank's part of the validation split.

    Args:
        lender: Ultralytics' settings, and the class names.
        dataset: where the shards are.
        batch: images a forward pass.
    """

    def __init__(self, lender: Lender, dataset: Folder, *, rank: int, world_size: int, batch: int):
        self.lender, self.dataset, self.split = lender, dataset, lender.manifest.split("val")
        self.class_names = list(lender.data["names"].values())
        self.rows = contiguous_share(self.split.num_images, rank, world_size)
        self.args, self.batch = lender.args, batch
        self.cache: list[tuple[list[Letterboxed], list[Labels]]] | None = None

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses.

        Args:
            model: the EMA weights, in evaluation mode.
            loss_of: the training model, whose criterion measures the validation loss.
            device: where the model is.
        """
        select_head(model, self.args)
        conf = 0.001 if self.args.conf is None else self.args.conf
        detector = Detector(model, self.class_names, imgsz=self.args.imgsz, stride=max(int(model.stride.max()), 32), device=device,
                            conf=conf, iou=self.args.iou, max_det=self.args.max_det, pad=0.5, agnostic=self.args.agnostic_nms)  # fmt: skip
        scorer = Scorer(self.class_names)
        losses: dict[str, float] = {}
        num_images = 0
        for groups, labels in self._batches(detector):
            for group in groups:
                raw = detector.forward(group.images)
                mine = [labels[i] for i in group.indices]
                for name, value in _loss(loss_of, raw, group, mine, device).items():
                    losses[name] = losses.get(name, 0.0) + value * len(mine)
                num_images += len(mine)
                scorer.update(detector.postprocess(raw, group), *map(list, zip(*mine, strict=True)))
        return _join(scorer, losses, num_images, self.split.num_images)

    def _batches(self, detector: Detector) -> Iterator[tuple[list[Letterboxed], list[Labels]]]:
        if self.cache is not None:
            yield from self.cache
            return
        kept, num_bytes = [], 0
        for images, labels in self._read():
            groups = detector.letterbox(images)
            num_bytes += sum(g.images.nbytes for g in groups)
            kept.append((groups, labels)) if num_bytes <= CACHE_BYTES else kept.clear()
            yield groups, labels
        self.cache = kept if num_bytes <= CACHE_BYTES else None

    def _read(self) -> Iterator[tuple[list[bytes], list[Labels]]]:
        """This rank's rows, in batches of encoded images and their labels."""
        for table in tables(self.dataset, self.split, self.rows, self.batch):
            images, labels = [], []
            for row in table.to_pylist():
                class_ids = np.asarray(row["class_ids"], np.int32)
                boxes = np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4)
                class_ids, boxes, *_ = only_classes((class_ids, boxes, None, None), self.args.classes)
                class_ids = class_ids * (0 if self.args.single_cls else 1)
                images.append(row["image"])
                labels.append(
                    Labels(row["image_id"], class_ids, xywhn_to_xyxy(boxes, (row["height"], row["width"])))
                )
            yield images, labels


class JudgedValidator:
    """One rank's part of the validation split of another task, by Ultralytics' own validator; arguments as of :class:`Validator`."""

    def __init__(self, lender: Lender, dataset: Folder, *, rank: int, world_size: int, batch: int):
        self.dataset, self.split, self.args, self.batch = (
            dataset,
            lender.manifest.split("val"),
            lender.args,
            batch,
        )
        self.rows = contiguous_share(self.split.num_images, rank, world_size)
        self.judge = Judge(lender.manifest, lender.args, Path(lender.args.save_dir))

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses. Arguments as of :class:`Validator`."""
        select_head(model, self.args)
        stride = max(int(model.stride.max()), 32)
        detector = Detector(
            model,
            list(self.judge.names.values()),
            imgsz=self.args.imgsz,
            stride=stride,
            device=device,
            pad=0.5,
        )
        self.judge.clear(model)
        losses: dict[str, float] = {}
        for table in tables(self.dataset, self.split, self.rows, self.batch):
            images = [decode(image) for image in cells(table["image"])]
            for batch in self.judge.batches(table, images, detector):
                with torch.no_grad():
                    raw = detector.model(batch["img"])
                    parts = loss_of.loss(batch, raw)[1]
                for name, value in parts.items():
                    losses[name] = losses.get(name, 0.0) + float(value) * len(batch["img"])
                self.judge.update(raw, batch)
        states, means = gathered(self.judge.state(), losses, self.judge.num_images, self.split.num_images)
        self.judge.join(states)
        return {**self.judge.compute(), **means}


def select_head(model: Any, args: Any) -> None:
    """Lets a model with two heads answer by the one that Ultralytics validates: that with NMS, or with ``nms=False`` that without.

    As ``BaseValidator.__call__`` and ``DetectionValidator.init_metrics`` do (8.4.190).
    """
    if not hasattr(model, "end2end"):
        return
    model.end2end = args.nms is False
    if model.end2end:
        model.set_head_attr(max_det=args.max_det, agnostic_nms=args.agnostic_nms)


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


def _join(scorer: Scorer, losses: dict[str, float], num_images: int, expected: int) -> dict[str, Any]:
    """Gathers every rank's part; the same answer everywhere."""
    whole = Scorer(scorer.class_names)
    states, means = gathered(scorer.state(), losses, num_images, expected)
    for state in states:
        whole.merge(state)
    return {**whole.compute(), **means}


def gathered(
    state: Any, losses: dict[str, float], num_images: int, expected: int
) -> tuple[list[Any], dict[str, float]]:
    """What every rank has found, in their order, and ``val/...`` losses as means over all images; the same answer everywhere.

    Args:
        state: what this rank has found; can be pickled.
        losses: sums over this rank's images.
        num_images: of this rank.
        expected: images of all ranks.
    """
    parts: list[Any] = [(state, losses, num_images)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (state, losses, num_images))
    total = sum(n for _, _, n in parts)
    if total != expected:
        raise RuntimeError(f"validation saw {total} images of {expected}")
    names = dict.fromkeys(name for _, part, _ in parts for name in part)
    return [state for state, _, _ in parts], {
        f"val/{name}": sum(part.get(name, 0.0) for _, part, _ in parts) / total for name in names
    }
