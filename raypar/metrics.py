"""Detections against labels -> the metrics that Ultralytics reports, by its own code.

Runs in: Ray Data actors and training workers (one scorer each), and wherever their states are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils.metrics import ConfusionMatrix, DetMetrics, box_iou

from raypar.detector import Detections

IOU_LEVELS = torch.linspace(0.5, 0.95, 10)
_MATCHER = SimpleNamespace(iouv=IOU_LEVELS)  # what match_predictions reads of a validator


class Scorer:
    """Collects matches image by image.

    Args:
        class_names: by class id.
        confusion: whether to keep a confusion matrix too (it costs a second matching).
    """

    def __init__(self, class_names: Sequence[str], *, confusion: bool = False):
        self.class_names = list(class_names)
        self.images: dict[str, dict[str, Any]] = {}
        self.confusion = ConfusionMatrix(names=dict(enumerate(self.class_names))) if confusion else None

    def update(self, detections: Sequence[Detections], image_ids: Sequence[str], class_ids: Sequence[NDArray[np.int32]],
               boxes_xyxy: Sequence[NDArray[np.float32]]) -> None:  # fmt: skip
        """Adds images.

        Args:
            detections: of each image, most confident first.
            image_ids: of each image.
            class_ids: labels of each image, int32 (N,).
            boxes_xyxy: labels of each image, float32 (N, 4), px of the original.
        """
        for found, image_id, labels, boxes in zip(detections, image_ids, class_ids, boxes_xyxy, strict=True):
            assert image_id not in self.images, f"{image_id} was scored twice"
            self.images[image_id] = {
                "tp": _match(found, labels, boxes),
                "conf": found.confidences,
                "pred_cls": found.class_ids.astype(np.float32),
                "target_cls": labels.astype(np.float32),
                "target_img": np.unique(labels).astype(np.float32),
            }
            if self.confusion is not None:
                self.confusion.process_batch(
                    {"bboxes": torch.from_numpy(found.boxes_xyxy), "conf": torch.from_numpy(found.confidences), "cls": torch.from_numpy(found.class_ids).float()},
                    {"bboxes": torch.from_numpy(boxes), "cls": torch.from_numpy(labels).float()},
                    conf=0.001,
                )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """All that was collected, in plain NumPy, to be merged elsewhere."""
        return {"images": self.images, "confusion": None if self.confusion is None else self.confusion.matrix}

    def merge(self, state: dict[str, Any]) -> None:
        """Adds another scorer's state; the order of merging does not matter."""
        twice = self.images.keys() & state["images"].keys()
        assert not twice, f"scored twice: {sorted(twice)[:3]}"
        self.images |= state["images"]
        if self.confusion is not None and state["confusion"] is not None:
            self.confusion.matrix = self.confusion.matrix + state["confusion"]

    def compute(self, plots_folder: Path | None = None) -> dict[str, Any]:
        """The metrics over all images: map50_95, map50, precision, recall, fitness, num_images, num_boxes, per_class.

        Args:
            plots_folder: where to write Ultralytics' curves and confusion matrices; nothing: none are drawn.
        """
        metrics = DetMetrics(dict(enumerate(self.class_names)))
        for image_id in sorted(self.images):  # so that ties in confidence fall the same way whoever scored what
            metrics.update_stats({**self.images[image_id], "im_name": image_id})
        num_boxes = sum(len(image["target_cls"]) for image in self.images.values())
        if num_boxes:
            metrics.process(save_dir=plots_folder or Path(), plot=plots_folder is not None)
        precision, recall, map50, map50_95 = (float(x) for x in metrics.mean_results()) if num_boxes else (0.0, 0.0, 0.0, 0.0)
        if plots_folder is not None and self.confusion is not None:
            for normalize in (True, False):
                self.confusion.plot(save_dir=str(plots_folder), normalize=normalize)
        per_class = [
            {"class_name": self.class_names[c], "num_boxes": int(metrics.nt_per_class[c]), **dict(zip(("precision", "recall", "map50", "map50_95"), map(float, metrics.class_result(i)), strict=True))}
            for i, c in enumerate(metrics.ap_class_index)
        ] if num_boxes else []  # fmt: skip
        return {"map50_95": map50_95, "map50": map50, "precision": precision, "recall": recall, "fitness": float(metrics.fitness) if num_boxes else 0.0,
                "num_images": len(self.images), "num_boxes": num_boxes, "per_class": per_class}  # fmt: skip


def _match(found: Detections, labels: NDArray[np.int32], boxes: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Whether each detection is right at each of the ten IoU levels: bool (N, 10)."""
    if not len(labels) or not len(found.class_ids):
        return np.zeros((len(found.class_ids), len(IOU_LEVELS)), bool)
    iou = box_iou(torch.from_numpy(boxes), torch.from_numpy(found.boxes_xyxy))
    matched = BaseValidator.match_predictions(_MATCHER, torch.from_numpy(found.class_ids).float(), torch.from_numpy(labels).float(), iou)
    return matched.numpy()  # type: ignore[no-any-return]
