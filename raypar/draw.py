"""Boxes on images, and many images on one sheet. Pure; OpenCV only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
# One colour a class, told apart on light and dark grounds (RGB).
COLOURS = [(230, 57, 70), (29, 120, 216), (42, 157, 78), (244, 162, 30), (145, 70, 200), (0, 168, 168), (214, 64, 159), (120, 94, 60)]
GROUND = 245


def boxes_on(image: Image, boxes_xyxy: NDArray[np.float32], class_ids: NDArray[np.int32], class_names: Sequence[str],
             confidences: NDArray[np.float32] | None = None) -> Image:  # fmt: skip
    """A copy of an image with labelled boxes.

    Args:
        image: uint8 (H, W, 3) RGB.
        boxes_xyxy: (N, 4) px.
        class_ids: (N,).
        class_names: by class id.
        confidences: (N,), shown behind the name when given.
    """
    drawn = np.ascontiguousarray(image).copy()
    side = max(image.shape[:2])
    thickness, scale = max(1, round(side / 320)), max(0.35, side / 1600)
    for i, (box, class_id) in enumerate(zip(boxes_xyxy, class_ids, strict=True)):
        colour = COLOURS[int(class_id) % len(COLOURS)]
        x0, y0, x1, y1 = (round(float(v)) for v in box)
        cv2.rectangle(drawn, (x0, y0), (x1, y1), colour, thickness, cv2.LINE_AA)
        text = class_names[int(class_id)] + (f" {confidences[i]:.2f}" if confidences is not None else "")
        (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        top = y0 - height - base if y0 - height - base >= 0 else y0
        cv2.rectangle(drawn, (x0, top), (x0 + width + 2, top + height + base), colour, cv2.FILLED)
        cv2.putText(drawn, text, (x0 + 1, top + height + base // 2), cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), 1, cv2.LINE_AA)
    return drawn


def contact_sheet(images: Sequence[Image], titles: Sequence[str] | None = None, columns: int = 4, gap: int = 6) -> Image:
    """Images of any size in rows, each in a cell as large as the largest, with a line of text above it when titles are given."""
    columns = min(columns, len(images))
    height, width = (max(image.shape[k] for image in images) for k in (0, 1))
    head = 18 if titles else 0
    rows = math.ceil(len(images) / columns)
    sheet = np.full((rows * (height + head + gap) + gap, columns * (width + gap) + gap, 3), GROUND, np.uint8)
    for i, image in enumerate(images):
        y, x = gap + (i // columns) * (height + head + gap), gap + (i % columns) * (width + gap)
        if titles:
            cv2.putText(sheet, titles[i][: width // 7], (x, y + 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (60, 60, 60), 1, cv2.LINE_AA)
        sheet[y + head : y + head + image.shape[0], x : x + image.shape[1]] = image
    return sheet
