"""Labels drawn on images, and images joined into a contact sheet. Needs OpenCV alone: no font is loaded. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

# RGB; told apart by most colour-blind eyes (after Okabe and Ito, 2008, with lighter and darker companions).
COLOURS = (
    (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167), (140, 86, 75),
    (148, 103, 189), (188, 189, 34), (23, 190, 207), (255, 152, 150), (44, 160, 44), (174, 199, 232), (214, 39, 40), (197, 176, 213),
)  # fmt: skip
FONT = cv2.FONT_HERSHEY_SIMPLEX
GREY = 114


def colour_of(class_id: int) -> tuple[int, int, int]:
    """The RGB colour of a class, the same in every picture."""
    return COLOURS[class_id % len(COLOURS)]


def boxes_on(
    image: Image,
    boxes_xyxy: NDArray[np.float32],
    class_ids: NDArray[np.int32],
    class_names: Sequence[str],
    confidences: NDArray[np.float32] | None = None,
) -> Image:
    """A copy of an image with its boxes, each with its class name (and confidence) above it.

    Args:
        image: uint8 (H, W, 3) RGB.
        boxes_xyxy: float32 (N, 4), px.
        class_ids: int32 (N,).
        class_names: in the order of class ids.
        confidences: float32 (N,) in [0, 1], or none for labels. The surest boxes are drawn on top.
    """
    drawn = np.ascontiguousarray(image).copy()
    height, width = drawn.shape[:2]
    thick = max(1, round(max(height, width) / 400))
    scale = max(0.35, max(height, width) / 1500)
    order = range(len(boxes_xyxy)) if confidences is None else np.argsort(confidences, kind="stable")
    for i in order:
        class_id = int(class_ids[i])
        name = class_names[class_id] if class_id < len(class_names) else str(class_id)
        text = _ascii(name) if confidences is None else f"{_ascii(name)} {confidences[i]:.2f}"
        x0, y0, x1, y1 = (int(v) for v in np.clip(np.round(boxes_xyxy[i]), -1, 1 << 15))
        cv2.rectangle(drawn, (x0, y0), (x1, y1), colour_of(class_id), thick, cv2.LINE_AA)
        _write(drawn, text, (x0, y0), scale, colour_of(class_id))
    return drawn


def outlines_on(image: Image, outlines: Sequence[NDArray[Any]], class_ids: NDArray[np.int32]) -> Image:
    """A copy of an image with closed outlines in the colours of their classes.

    Args:
        image: uint8 (H, W, 3) RGB.
        outlines: N arrays (P, 2), px.
        class_ids: int32 (N,).
    """
    drawn = np.ascontiguousarray(image).copy()
    thick = max(1, round(max(drawn.shape[:2]) / 400))
    for outline, class_id in zip(outlines, class_ids, strict=True):
        cv2.polylines(
            drawn,
            [np.round(outline).astype(np.int32).reshape(-1, 1, 2)],
            True,
            colour_of(int(class_id)),
            thick,
            cv2.LINE_AA,
        )
    return drawn


def points_on(image: Image, keypoints: NDArray[np.float32]) -> Image:
    """A copy of an image with keypoints, each kind in a colour of its own; those of visibility 0 are left out.

    Args:
        image: uint8 (H, W, 3) RGB.
        keypoints: float32 (N, K, 3), x, y px, visibility.
    """
    drawn = np.ascontiguousarray(image).copy()
    radius = max(2, round(max(drawn.shape[:2]) / 200))
    for instance in keypoints:
        for k, (x, y, visibility) in enumerate(instance):
            if visibility > 0:
                cv2.circle(
                    drawn, (round(float(x)), round(float(y))), radius, colour_of(k), cv2.FILLED, cv2.LINE_AA
                )
    return drawn


def contact_sheet(
    images: Sequence[Image], titles: Sequence[str] | None = None, columns: int = 4, max_side: int = 480
) -> Image:
    """Images in a grid, row by row, each shrunk to fit a tile; titles above them.

    Args:
        images: uint8 (H, W, 3) RGB, of any sizes.
        titles: one an image.
        columns: of the grid.
        max_side: px of the longer side of a tile.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    assert len(images)
    assert titles is None or len(titles) == len(images)
    shown = [_fit(image, max_side) for image in images]
    height, width = max(i.shape[0] for i in shown), max(i.shape[1] for i in shown)
    bar, gap, columns = (20 if titles else 0), 4, min(columns, len(shown))
    rows = -(-len(shown) // columns)
    sheet = np.full((rows * (height + bar + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(shown):
        top, left = gap + (i // columns) * (height + bar + gap), gap + (i % columns) * (width + gap)
        if titles:
            room = max(1, width // 8)  # letters of about 8 px
            title = _ascii(titles[i])
            title = title if len(title) <= room else "..." + title[3 - room :]
            cv2.putText(sheet, title, (left + 2, top + bar - 6), FONT, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
        sheet[top + bar : top + bar + height, left : left + width] = GREY
        sheet[top + bar : top + bar + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def _fit(image: Image, max_side: int) -> Image:
    ratio = max_side / max(image.shape[:2])
    if ratio >= 1:
        return image
    size = max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _write(
    image: Image, text: str, corner: tuple[int, int], scale: float, colour: tuple[int, int, int]
) -> None:
    """Text on a filled ground, above a corner where there is room and below it elsewhere."""
    (width, height), base = cv2.getTextSize(text, FONT, scale, 1)
    tall = height + base + 2
    left = int(np.clip(corner[0], 0, max(0, image.shape[1] - width - 2)))
    top = corner[1] - tall if corner[1] >= tall else max(0, corner[1])
    cv2.rectangle(image, (left, top), (left + width + 2, top + tall), colour, cv2.FILLED)
    ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 110 else (255, 255, 255)
    cv2.putText(image, text, (left + 1, top + height + 1), FONT, scale, ink, 1, cv2.LINE_AA)


def _ascii(text: str) -> str:
    """OpenCV's built-in font has no other letters."""
    return text.encode("ascii", "replace").decode()
