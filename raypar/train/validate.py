"""Validation in the middle of a training: every worker takes its share of the images, and the metrics are those of the whole.

Runs in: every training worker, which reads its rows straight from the shards: a Ray Data execution at each epoch would cost
seconds (see ``docs/decisions/0003-validation.md``). Images pass through the one :class:`raypar.detector.Detector`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from raypar.boxes import xywhn_to_xyxy
from raypar.dataset.manifest import Split
from raypar.dataset.plan import contiguous_share
from raypar.detector import Detector, Letterboxed
from raypar.metrics import Scorer
from raypar.storage import Folder

CACHE_BYTES = 512 << 20  # letterboxed images a rank keeps between epochs


class Labels(NamedTuple):
    """What is known of one image: boxes_xyxy float32 (N, 4) in px of the original image."""

    image_id: str
    class_ids: NDArray[np.int32]
    boxes_xyxy: NDArray[np.float32]


class Validator:
    """One rank's part of the validation split.

    Args:
        dataset: where the shards are.
        split: of the manifest.
        class_names: in the order of class ids.
        imgsz: px of the longer side.
        batch: images a forward pass.
        max_det: boxes kept an image.
        iou: of NMS.
        single_cls: whether all classes count as one.
    """

    def __init__(self, dataset: Folder, split: Split, class_names: list[str], *, rank: int, world_size: int, imgsz: int, batch: int,
                 max_det: int, iou: float, single_cls: bool = False):  # fmt: skip
        self.dataset, self.split, self.class_names = dataset, split, class_names
        self.rows = contiguous_share(split.num_images, rank, world_size)
        self.imgsz, self.batch, self.max_det, self.iou, self.single_cls = imgsz, batch, max_det, iou, single_cls
        self.cache: list[tuple[list[Letterboxed], list[Labels]]] | None = None

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses.

        Args:
            model: the EMA weights, in evaluation mode.
            loss_of: the training model, whose criterion measures the validation loss.
            device: where the model is.
        """
        detector = Detector(model, self.class_names, imgsz=self.imgsz, stride=max(int(model.stride.max()), 32), device=device,
                            conf=0.001, iou=self.iou, max_det=self.max_det, pad=0.5)  # fmt: skip
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
        first, images, labels = 0, [], []
        for shard in self.split.shards:
            for group, num_rows in enumerate(shard.row_groups):
                mine = range(max(self.rows.start - first, 0), min(self.rows.stop - first, num_rows))
                first += num_rows
                if not mine:
                    continue
                table = self.dataset.reading(shard.path, partial(_row_group, group))
                rows = table.slice(mine.start, len(mine)).to_pylist()
                for row in rows:
                    class_ids = np.asarray(row["class_ids"], np.int32) * (0 if self.single_cls else 1)
                    boxes = np.asarray(row["boxes_xywhn"], np.float32).reshape(-1, 4)
                    images.append(row["image"])
                    labels.append(Labels(row["image_id"], class_ids, xywhn_to_xyxy(boxes, (row["height"], row["width"]))))
                    if len(images) == self.batch:
                        yield images, labels
                        images, labels = [], []
        if images:
            yield images, labels


def _row_group(number: int, file: BinaryIO) -> pa.Table:
    return pq.ParquetFile(file).read_row_group(number)


def _loss(model: Any, raw: Any, group: Letterboxed, labels: list[Labels], device: torch.device) -> dict[str, float]:
    """The criterion's parts, as means over a group of equally letterboxed images."""
    height, width = group.images.shape[2:]
    boxes = [label.boxes_xyxy * gain + np.tile(pad, 2) for label, gain, pad in zip(labels, group.gains, group.pads, strict=True)]
    xyxy = torch.from_numpy(np.concatenate(boxes).astype(np.float32).reshape(-1, 4)) / torch.tensor([width, height, width, height])
    batch = {
        "img": torch.empty(len(labels), 0, device=device),  # criteria read the number of images from it
        "cls": torch.from_numpy(np.concatenate([label.class_ids for label in labels]).astype(np.float32)).view(-1, 1).to(device),
        "bboxes": torch.cat([(xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]], 1).to(device),
        "batch_idx": torch.repeat_interleave(torch.arange(len(labels)), torch.tensor([len(x.class_ids) for x in labels]))
        .float()
        .to(device),
    }
    with torch.no_grad():
        return {name: float(value) for name, value in model.loss(batch, raw)[1].items()}


def _join(scorer: Scorer, losses: dict[str, float], num_images: int, expected: int) -> dict[str, Any]:
    """Gathers every rank's part; the same answer everywhere."""
    parts: list[Any] = [(scorer.state(), losses, num_images)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (scorer.state(), losses, num_images))
    whole = Scorer(scorer.class_names)
    for state, _, _ in parts:
        whole.merge(state)
    total = sum(n for _, _, n in parts)
    if total != expected:
        raise RuntimeError(f"validation saw {total} images of {expected}")
    names = dict.fromkeys(name for _, part, _ in parts for name in part)
    means = {f"val/{name}": sum(part.get(name, 0.0) for _, part, _ in parts) / total for name in names}
    metrics = whole.compute()
    return {**metrics, **means}
