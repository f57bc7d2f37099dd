"""Images of a batch as the model gets them, with their labels drawn. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from raypar.boxes import xywhn_to_xyxy
from raypar.dataset.batch import Batch
from raypar.draw import FONT, boxes_on, outlines_on, points_on
from raypar.images import Image


def batch_image(batch: Batch, i: int, class_names: Sequence[str], *, with_class: bool = False) -> Image:
    """An image of a batch with its labels: boxes, masks' outlines, rotated boxes, keypoints; of classify its class, if wanted."""
    image = np.ascontiguousarray(batch.images[i].transpose(1, 2, 0))
    if not len(batch.boxes_xywhn):
        if with_class and len(batch.class_ids):
            cv2.putText(
                image,
                class_names[int(batch.class_ids[i])].encode("ascii", "replace").decode(),
                (4, 16),
                FONT,
                0.5,
                (255, 255, 255),
                2,
            )
        return image
    mine, size = batch.image_index == i, image.shape[0]
    class_ids = batch.class_ids[mine]
    image = boxes_on(image, xywhn_to_xyxy(batch.boxes_xywhn[mine], (size, size)), class_ids, class_names)
    if batch.masks is not None:
        for k, class_id in enumerate(class_ids):
            image = outlines_on(
                image, contours := _contours(batch.masks[i] == k + 1, size), np.full(len(contours), class_id)
            )
    if batch.boxes_xywhr is not None:
        turned = batch.boxes_xywhr[mine] * np.array([size, size, size, size, 180 / np.pi], np.float32)
        image = outlines_on(
            image,
            [cv2.boxPoints(((x, y), (w, h), angle)) for x, y, w, h, angle in turned.tolist()],
            class_ids,
        )
    if batch.keypoints is not None:
        image = points_on(image, batch.keypoints[mine] * np.array([size, size, 1], np.float32))
    return image


def _contours(mask: Any, size: int) -> list[Any]:
    """Outlines of a mask, in px of an image of this side."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [(outline.reshape(-1, 2) + 0.5) * size / mask.shape[0] for outline in found]
