"""Validation of segment, pose, obb and classify: Ultralytics' own validators judge, every worker its share of the images.

Runs in: every training worker. The validators' loops and loaders are not used, only what they do with a batch; so the figures are
theirs. Images are letterboxed by :class:`raypar.detector.Detector`, one by one, as ``YOLO.val`` does with ``batch=1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.data.augment import classify_transforms
from ultralytics.data.utils import polygons2masks_overlap
from ultralytics.models.yolo.classify import ClassificationValidator
from ultralytics.models.yolo.obb import OBBValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator

from raypar.augment.outlines import boxes_xywhr
from raypar.dataset.plan import contiguous_share
from raypar.dataset.rows import cells, row_labels
from raypar.detector import Detector, Letterboxed
from raypar.images import decode
from raypar.storage import Folder
from raypar.train.recipe import Lender
from raypar.train.validate import gathered, tables

JUDGES: dict[str, Any] = {
    "segment": SegmentationValidator, "pose": PoseValidator, "obb": OBBValidator, "classify": ClassificationValidator,
}  # fmt: skip
NAMES = {
    "precision": "precision",
    "recall": "recall",
    "mAP50": "map50",
    "mAP50-95": "map50_95",
    "accuracy_top1": "top1",
    "accuracy_top5": "top5",
}
OF = {"(B)": "", "(M)": "mask_", "(P)": "pose_"}  # boxes, masks, keypoints


class LentValidator:
    """One rank's part of the validation split; arguments as of :class:`raypar.train.validate.Validator`."""

    def __init__(self, lender: Lender, dataset: Folder, *, rank: int, world_size: int, batch: int):
        self.lender, self.dataset, self.split, self.batch = lender, dataset, lender.manifest.split("val"), batch
        self.task, self.args = lender.manifest.task, lender.args
        self.rows = contiguous_share(self.split.num_images, rank, world_size)
        args = copy(lender.args)
        args.plots = args.save_json = args.save_txt = False
        self.judge = JUDGES[self.task](save_dir=Path(args.save_dir), args=vars(args))
        self.judge.data = lender.data

    def __call__(self, model: Any, loss_of: Any, device: torch.device) -> dict[str, Any]:
        """Metrics of the whole split, equal on every rank; with ``val/...`` losses. Arguments as of the other validator."""
        judge = self.judge
        judge.device = device
        model.eval()
        judge.init_metrics(model)
        losses: dict[str, float] = {}
        num_images = 0
        for batch in self._batches(model, device):
            with torch.no_grad():
                raw = model(batch["img"])
                parts = loss_of.loss(batch, raw)[1]
            count = len(batch["img"])
            for name, value in parts.items():
                losses[name] = losses.get(name, 0.0) + float(value) * count
            num_images += count
            judge.update_metrics(self._found(raw, count), batch)
        state = (judge.pred, judge.targets) if self.task == "classify" else judge.metrics.stats
        states, means = gathered(state, losses, num_images, self.split.num_images)
        self._merge(states)
        found = judge.get_stats()
        return {**{_name(key): float(value) for key, value in found.items()}, "num_images": self.split.num_images,
                "per_class": self._per_class(), **means}  # fmt: skip

    def _found(self, raw: Any, count: int) -> Any:
        """What the judge reads from the model's output. One image at a time: NMS gives a batch some seconds, after which the rest of it
        has no boxes."""
        if self.task == "classify":
            return self.judge.postprocess(raw)
        first = raw[0]  # of segment boxes and prototypes, otherwise boxes; raw[1] is for the loss
        return [found for i in range(count) for found in self.judge.postprocess([_one(first, i)])]

    def _per_class(self) -> list[dict[str, Any]]:
        """Of each class that has labels, as :class:`raypar.metrics.Scorer` says it; of masks and keypoints too. Nothing for classify."""
        if self.task == "classify":
            return []
        metrics, names = self.judge.metrics, list(self.lender.data["names"].values())
        keys = [_name(key) for key in metrics.keys]  # a list, not of a dict
        return [{"class_name": names[int(c)], "num_boxes": int(metrics.nt_per_class[int(c)]),
                 **dict(zip(keys, map(float, metrics.class_result(i)), strict=True))}
                for i, c in enumerate(metrics.ap_class_index)]  # fmt: skip

    def _merge(self, states: list[Any]) -> None:
        if self.task == "classify":
            self.judge.pred, self.judge.targets = ([x for state in states for x in state[i]] for i in range(2))
        else:
            self.judge.metrics.stats = {name: [x for state in states for x in state[name]] for name in states[0]}

    def _batches(self, model: Any, device: torch.device) -> Iterator[dict[str, Any]]:
        """Batches as the judge and the loss want them, on the device."""
        stride = 32 if self.task == "classify" else max(int(model.stride.max()), 32)
        boxer = Detector(model, list(self.lender.data["names"].values()), imgsz=self.args.imgsz, stride=stride, device=device, pad=0.5)
        for table in tables(self.dataset, self.split, self.rows, self.batch):
            images = [decode(image) for image in cells(table["image"])]
            made = [self._classify(table, images)] if self.task == "classify" else (
                self._boxed(table, group) for group in boxer.letterbox(images))  # fmt: skip
            for batch in made:
                yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def _classify(self, table: pa.Table, images: list[NDArray[np.uint8]]) -> dict[str, Any]:
        from PIL import Image

        transform = classify_transforms(size=self.args.imgsz)
        shown = torch.stack([transform(Image.fromarray(image)) for image in images])
        return {"img": shown, "cls": torch.from_numpy(table["class_id"].to_numpy().astype(np.int64))}

    def _boxed(self, table: pa.Table, group: Letterboxed) -> dict[str, Any]:
        """Images of one shape, with their labels in their letterboxes' own coordinates."""
        height, width = group.images.shape[2:]
        side = np.array([width, height], np.float32)
        num_keypoints = self.lender.manifest.keypoint_shape[0] if self.lender.manifest.keypoint_shape else 0
        found: dict[str, list[NDArray[Any]]] = {"cls": [], "bboxes": [], "batch_idx": []}
        for place, i in enumerate(group.indices):
            class_ids, boxes, polygons, keypoints = row_labels(table, i, self.task, num_keypoints)
            scale = group.gains[place][:2] * np.array(group.image_hws[place][::-1], np.float32)  # px of the scaled image
            shift = group.pads[place]
            boxes = (np.concatenate([boxes[:, :2] * scale + shift, boxes[:, 2:] * scale], 1) / np.tile(side, 2)).astype(np.float32)
            if polygons is not None:
                polygons = (polygons * scale + shift).astype(np.float32)
            if self.task == "obb" and polygons is not None:
                boxes = (boxes_xywhr(polygons) / np.append(np.tile(side, 2), 1)).astype(np.float32)
            if self.task == "segment" and polygons is not None:
                mask, order = self._mask(polygons, (height, width))
                class_ids, boxes = class_ids[order], boxes[order]
                found.setdefault("masks", []).append(mask)
            if keypoints is not None:
                found.setdefault("keypoints", []).append(keypoints / np.append(side, 1) * np.append(scale, 1) + np.append(shift / side, 0))
            found["cls"].append((class_ids * (0 if self.args.single_cls else 1)).reshape(-1, 1))
            found["bboxes"].append(boxes)
            found["batch_idx"].append(np.full(len(class_ids), place))
        labels = {name: torch.from_numpy((np.stack if name == "masks" else np.concatenate)(values).astype(np.float32))
                  for name, values in found.items()}  # fmt: skip
        if "masks" in labels:
            from raypar.train.loop import class_of_pixels

            labels["sem_masks"] = class_of_pixels(labels["masks"].int(), labels["cls"][:, 0], labels["batch_idx"])
        names = table["image_id"].to_pylist()
        pads = [((float(g[0]), float(g[1])), (float(p[0]), float(p[1]))) for g, p in zip(group.gains, group.pads, strict=True)]
        return {"img": group.images.float() / 255, **labels, "ori_shape": group.image_hws, "ratio_pad": pads,
                "im_file": [names[i] for i in group.indices]}  # fmt: skip

    def _mask(self, polygons: NDArray[np.float32], hw: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
        ratio = self.args.mask_ratio
        if not len(polygons):
            return np.zeros((hw[0] // ratio, hw[1] // ratio), np.uint8), np.zeros(0, np.intp)
        mask, order = polygons2masks_overlap(hw, list(polygons), downsample_ratio=ratio)
        return mask, order


def _one(output: Any, i: int) -> Any:
    """The i-th image of a model's output, still a batch."""
    return tuple(value[i : i + 1] for value in output) if isinstance(output, tuple) else output[i : i + 1]


def _name(key: str) -> str:
    """``metrics/mAP50-95(M)`` -> ``mask_map50_95``."""
    name = key.removeprefix("metrics/")
    for suffix, prefix in OF.items():
        if name.endswith(suffix):
            return prefix + NAMES[name.removesuffix(suffix)]
    return NAMES.get(name, name)
