"""Detections against labels -> the metrics that Ultralytics reports, by Ultralytics' own code.

Runs in: detector actors and training workers score images; the driver, or every worker, merges the scores and computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.metrics import ConfusionMatrix, DetMetrics, box_iou

from raypar.detector import Detections

IOU_THRESHOLDS = torch.linspace(0.5, 0.95, 10)
CONFUSION_CONF = 0.25  # boxes below it are left out of the confusion matrix


class Scored(NamedTuple):
    """One image: P predictions, T targets.

    Attributes:
        is_right: bool (P, 10), whether a prediction matches a target at each of ``IOU_THRESHOLDS``.
        confidences: float32 (P,).
        predicted: int32 (P,), class ids.
        targets: int32 (T,), class ids.
    """

    is_right: NDArray[np.bool_]
    confidences: NDArray[np.float32]
    predicted: NDArray[np.int32]
    targets: NDArray[np.int32]


class Scorer:
    """Collects scores image by image; the result does not depend on their order, nor on who scored them.

    Args:
        class_names: in the order of class ids.
        plots: whether to keep a confusion matrix (slow in Python, so not for training's validation).
    """

    def __init__(self, class_names: Sequence[str], *, plots: bool = False):
        self.class_names, self.plots = list(class_names), plots
        self.images: dict[str, Scored] = {}
        self.confusion = ConfusionMatrix(names=dict(enumerate(self.class_names)))

    def update(
        self,
        detections: Sequence[Detections],
        image_ids: Sequence[str],
        class_ids: Sequence[NDArray[np.int32]],
        boxes_xyxy: Sequence[NDArray[np.float32]],
    ) -> None:
        """Scores images.

        Args:
            detections: of each image.
            image_ids: unique over the whole set.
            class_ids: int32 (T,) for each image: its labels.
            boxes_xyxy: float32 (T, 4) for each image, px of the original.
        """
        for found, image_id, targets, boxes in zip(detections, image_ids, class_ids, boxes_xyxy, strict=True):
            self._add(image_id, self._score(found, targets, boxes))

    def state(self) -> dict[str, Any]:
        """What was collected, as a few arrays: it travels between processes."""
        scored = list(self.images.values())
        return {
            "image_ids": list(self.images),
            "num_predictions": np.array([len(s.confidences) for s in scored], np.int64),
            "num_targets": np.array([len(s.targets) for s in scored], np.int64),
            "is_right": np.concatenate([s.is_right for s in scored] or [np.zeros((0, len(IOU_THRESHOLDS)), bool)]),
            "confidences": np.concatenate([s.confidences for s in scored] or [np.zeros(0, np.float32)]),
            "predicted": np.concatenate([s.predicted for s in scored] or [np.zeros(0, np.int32)]),
            "targets": np.concatenate([s.targets for s in scored] or [np.zeros(0, np.int32)]),
            "confusion": self.confusion.matrix,
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Adds another scorer's state."""
        predictions, targets = np.cumsum(state["num_predictions"])[:-1], np.cumsum(state["num_targets"])[:-1]
        parts = [np.split(state[name], predictions) for name in ("is_right", "confidences", "predicted")]
        parts.append(np.split(state["targets"], targets))
        for image_id, *arrays in zip(state["image_ids"], *parts, strict=False):  # no image splits into one empty part
            self._add(image_id, Scored(*arrays))
        self.confusion.matrix = self.confusion.matrix + state["confusion"]

    def compute(self, plots_folder: Path | None = None) -> dict[str, Any]:
        """The metrics of everything that was collected.

        Args:
            plots_folder: where to write Ultralytics' curves (``BoxPR_curve.png`` ...) and, with ``plots``, confusion matrices.

        Returns:
            map50_95, map50, precision, recall, fitness, num_images, num_boxes, and per_class: class_name, num_boxes, precision,
            recall, map50, map50_95, where the metrics of a class without a label are None.
        """
        scored = [self.images[image_id] for image_id in sorted(self.images)]
        metrics = DetMetrics(dict(enumerate(self.class_names)))
        for s in scored:
            metrics.stats["tp"].append(s.is_right)
            metrics.stats["conf"].append(s.confidences)
            metrics.stats["pred_cls"].append(s.predicted)
            metrics.stats["target_cls"].append(s.targets)
            metrics.stats["target_img"].append(np.unique(s.targets))
        if scored:
            metrics.process(save_dir=plots_folder or Path(), plot=plots_folder is not None)
        if plots_folder is not None and self.plots:
            for normalize in (True, False):
                self.confusion.plot(normalize=normalize, save_dir=plots_folder)
        precision, recall, map50, map50_95 = (float(v) for v in metrics.mean_results())
        per_class = _per_class(metrics, self.class_names)
        return {
            "map50_95": map50_95, "map50": map50, "precision": precision, "recall": recall, "fitness": float(metrics.fitness),
            "num_images": len(scored), "num_boxes": sum(c["num_boxes"] for c in per_class), "per_class": per_class,
        }  # fmt: skip

    def _score(self, found: Detections, targets: NDArray[np.int32], boxes_xyxy: NDArray[np.float32]) -> Scored:
        """As ``DetectionValidator._process_batch``; in the original's pixels, which changes no IoU."""
        targets = np.asarray(targets, np.int32)
        labels = {"cls": torch.from_numpy(targets).float(), "bboxes": torch.from_numpy(np.asarray(boxes_xyxy, np.float32).reshape(-1, 4))}
        guess = {"cls": torch.from_numpy(found.class_ids).float(), "conf": torch.from_numpy(found.confidences),
                 "bboxes": torch.from_numpy(found.boxes_xyxy)}  # fmt: skip
        is_right = np.zeros((len(found.class_ids), len(IOU_THRESHOLDS)), bool)
        if len(targets) and len(found.class_ids):
            overlaps = box_iou(labels["bboxes"], guess["bboxes"])
            thresholds: Any = SimpleNamespace(iouv=IOU_THRESHOLDS)  # all that the method reads of its validator
            is_right = DetectionValidator.match_predictions(thresholds, guess["cls"], labels["cls"], overlaps).numpy()
        if self.plots:
            self.confusion.process_batch(guess, labels, conf=CONFUSION_CONF)
        return Scored(is_right, found.confidences, found.class_ids, targets)

    def _add(self, image_id: str, scored: Scored) -> None:
        if image_id in self.images:
            raise RuntimeError(f"image '{image_id}' was scored twice")
        self.images[image_id] = scored


def _per_class(metrics: DetMetrics, class_names: list[str]) -> list[dict[str, Any]]:
    rows = {int(class_id): i for i, class_id in enumerate(metrics.ap_class_index)}
    counts = metrics.nt_per_class if metrics.nt_per_class is not None else np.zeros(len(class_names), int)
    found = []
    for class_id, name in enumerate(class_names):
        values = metrics.class_result(rows[class_id]) if class_id in rows else (None,) * 4
        values = [None if v is None else float(v) for v in values]
        found.append({"class_name": name, "num_boxes": int(counts[class_id]),
                      **dict(zip(("precision", "recall", "map50", "map50_95"), values, strict=True))})  # fmt: skip
    return found
