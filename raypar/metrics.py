"""How good detections are: Ultralytics' own arithmetic, over images that may be scored anywhere and in any order.

Runs in: training workers, Ray Data actors, and the driver, which merges their states.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ultralytics.engine.validator import BaseValidator
from ultralytics.utils.metrics import ConfusionMatrix, DetMetrics, box_iou

from raypar.detector import Detections

IOUS = torch.linspace(0.5, 0.95, 10)  # of mAP50-95
CONFUSION_CONF = 0.25  # boxes below are not in the confusion matrix; at 0.001 it would be noise
_MATCHER: Any = SimpleNamespace(iouv=IOUS)


class _Image(NamedTuple):
    """What an image adds: which detections are right at each overlap, and what was there."""

    is_right: NDArray[np.bool_]  # (N, 10)
    confidences: NDArray[np.float32]  # (N,)
    class_ids: NDArray[np.int32]  # (N,) of the detections
    label_class_ids: NDArray[np.int32]  # (M,)
    position: int  # of the image among all


class Scorer:
    """Sums over images, by image id: the same numbers in whatever order and process the images come.

    Args:
        class_names: in the order of class ids.
    """

    def __init__(self, class_names: Sequence[str]):
        self.class_names = list(class_names)
        self._names = dict(enumerate(self.class_names))
        self._images: dict[str, _Image] = {}
        self._confusion = ConfusionMatrix(names=self._names)

    def update(self, detections: Sequence[Detections], image_ids: Sequence[str], class_ids: Sequence[NDArray[Any]],
               boxes_xyxy: Sequence[NDArray[Any]], positions: Sequence[int] | None = None) -> None:  # fmt: skip
        """Adds images.

        Args:
            detections: one an image, most confident first.
            image_ids: unique over all updates and merges.
            class_ids: labels: (M,) an image.
            boxes_xyxy: labels: (M, 4) px of the original image.
            positions: of each in the order of all images, which decides between equal confidences; unset: the order of the image ids.

        Raises:
            ValueError: an image was there before.
        """
        places = [0] * len(image_ids) if positions is None else positions
        for found, image_id, ids, boxes, position in zip(
            detections, image_ids, class_ids, boxes_xyxy, places, strict=True
        ):
            labels = np.asarray(ids, np.int32), np.asarray(boxes, np.float32).reshape(-1, 4)
            self._add(image_id, self._score(found, *labels, position))

    def _score(
        self,
        found: Detections,
        class_ids: NDArray[np.int32],
        boxes_xyxy: NDArray[np.float32],
        position: int,
    ) -> _Image:
        predicted = {"bboxes": torch.from_numpy(found.boxes_xyxy), "conf": torch.from_numpy(found.confidences),
                     "cls": torch.from_numpy(found.class_ids).float()}  # fmt: skip
        labels = {"bboxes": torch.from_numpy(boxes_xyxy), "cls": torch.from_numpy(class_ids).float()}
        is_right = np.zeros((len(found.class_ids), len(IOUS)), bool)
        if len(found.class_ids) and len(class_ids):
            overlap = box_iou(labels["bboxes"], predicted["bboxes"])
            is_right = BaseValidator.match_predictions(
                _MATCHER, predicted["cls"], labels["cls"], overlap
            ).numpy()
        self._confusion.process_batch(predicted, labels, conf=CONFUSION_CONF)
        return _Image(is_right, found.confidences, found.class_ids, class_ids, position)

    def _add(self, image_id: str, image: _Image) -> None:
        if image_id in self._images:
            raise ValueError(f"image '{image_id}' is scored twice")
        self._images[image_id] = image

    def state(self) -> dict[str, Any]:
        """Everything, as plain picklable values."""
        return {
            "images": {k: tuple(v) for k, v in self._images.items()},
            "confusion": self._confusion.matrix.copy(),
        }

    def merge(self, state: dict[str, Any]) -> None:
        """Adds another scorer's :meth:`state`.

        Raises:
            ValueError: an image is in both.
        """
        for image_id, image in state["images"].items():
            self._add(image_id, _Image(*image))
        self._confusion.matrix += state["confusion"]

    def compute(self, plots_folder: Path | None = None) -> dict[str, Any]:
        """Metrics of all images so far. Classes without a label have no numbers (None) and count for no mean.

        Args:
            plots_folder: local folder for the precision, recall, F1 and precision-recall curves and the confusion matrices.
        """
        metrics = DetMetrics(self._names)
        for image_id in sorted(
            self._images, key=lambda image_id: (self._images[image_id].position, image_id)
        ):
            image = self._images[image_id]
            metrics.update_stats({
                "tp": image.is_right, "conf": image.confidences, "pred_cls": image.class_ids.astype(np.float32),
                "target_cls": image.label_class_ids.astype(np.float32), "target_img": np.unique(image.label_class_ids), "im_name": image_id,
            })  # fmt: skip
        if self._images:
            metrics.process(save_dir=plots_folder or Path(), plot=plots_folder is not None)
        if plots_folder is not None:
            for normalize in (True, False):
                self._confusion.plot(normalize=normalize, save_dir=plots_folder)
        precision, recall, map50, map50_95 = (float(np.nan_to_num(x)) for x in metrics.mean_results())
        return {"map50_95": map50_95, "map50": map50, "precision": precision, "recall": recall, "fitness": float(metrics.fitness),
                "num_images": len(self._images), "num_boxes": sum(len(x.label_class_ids) for x in self._images.values()),
                "per_class": self._per_class(metrics)}  # fmt: skip

    def _per_class(self, metrics: Any) -> list[dict[str, Any]]:
        places = {int(class_id): i for i, class_id in enumerate(metrics.ap_class_index)}
        counts = metrics.nt_per_class if metrics.nt_per_class is not None else [0] * len(self.class_names)
        rows = []
        for class_id, name in enumerate(self.class_names):
            values: Sequence[float | None] = [None] * 4
            if class_id in places:
                values = [float(x) for x in metrics.class_result(places[class_id])]
            precision, recall, map50, map50_95 = values
            rows.append({"class_name": name, "num_boxes": int(counts[class_id]), "precision": precision, "recall": recall,
                         "map50": map50, "map50_95": map50_95})  # fmt: skip
        return rows
