"""The built-in dataset: circles, squares, triangles and stars on textured backgrounds, drawn from a seed. Pure; runs in a Ray task.

Shapes are turned, overlap, and are cut by the image's edge. Each class keeps to a quarter of the colour wheel (with a gap), so that a small
model learns the set from nothing in minutes: it is for trying raypar out and for tests of the whole path, not for judging models.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.outlines import cut_polygon
from raypar.dataset.formats import SPLITS, Labels, Listing, Record, boxes_around
from raypar.dataset.records import Records

CLASS_NAMES = ("circle", "square", "triangle", "star")
JPEG_QUALITY = 90
BYTES_PER_PIXEL = 0.35  # of a finished JPEG; sizes shards
EMPTY_SHARE = 0.03  # of the images
MAX_SHAPES = 8
SIDES = (0.12, 0.45)  # of the image's height
# of an image that shows one shape, about its middle: classifiers see a square out of there
SINGLE_SIDES = (0.4, 0.8)
MAX_COVERED = 0.6  # a shape hidden more than this is not drawn
HUE_SPREAD = 25  # degrees to both sides of a class's hue
KEYPOINT_SHAPE, FLIP_IDX = (5, 3), (0, 1, 3, 2, 4)  # a shape's centre, top, left, right and bottom
# class id, colour, mask (H, W), outline (P, 2) px
Shape = tuple[int, NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]


def scan(num_images: dict[str, int], task: str = "detect") -> Listing:
    """Records of images that are still to be drawn; ``num_images`` by split."""
    splits = {
        split: Records.of(Record(f"{i:06d}.jpg", "", i) for i in range(n))
        for split, n in num_images.items()
        if n
    }
    if task == "pose":
        return Listing(CLASS_NAMES, splits, task=task, keypoint_shape=KEYPOINT_SHAPE, flip_idx=FLIP_IDX)
    return Listing(CLASS_NAMES, splits, task=task)


def render(
    seed: int, split: str, index: int, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.float64]]:
    """Draws one image.

    Returns:
        image uint8 (height, width, 3) RGB, class_ids int64 (N,), boxes_xyxy float64 (N, 4) px: the exact hull of each shape's pixels
        inside the image, its covered ones included.
    """
    image, shapes = _scene(seed, split, index, height, width)
    boxes = [_hull(mask) for _, _, mask, _ in shapes]
    return (
        image,
        np.asarray([shape[0] for shape in shapes], np.int64),
        np.asarray(boxes, np.float64).reshape(-1, 4),
    )


def draw(
    seed: int, split: str, index: int, height: int, width: int, task: str = "detect"
) -> tuple[NDArray[np.uint8], Labels]:
    """An image uint8 (height, width, 3) RGB and its labels; the images of classify show one shape each."""
    hw = (height, width)
    if task == "detect":
        image, class_ids, boxes_xyxy = render(seed, split, index, height, width)
        return image, labels(class_ids, boxes_xyxy, hw)
    image, shapes = _scene(seed, split, index, height, width, is_single=task == "classify")
    class_ids = np.asarray([shape[0] for shape in shapes], np.int64)
    if task == "classify":
        return image, Labels(class_ids, np.array([[0.5, 0.5, 1.0, 1.0]]))
    if task == "segment":
        segments = tuple(cut_polygon(outline, width, height) / [width, height] for *_, outline in shapes)
        return image, Labels(class_ids, boxes_around(segments), segments_xyn=segments)
    if task == "obb":
        corners = tuple(
            cv2.boxPoints(cv2.minAreaRect(outline.astype(np.float32))) / [width, height]
            for *_, outline in shapes
        )
        return image, Labels(class_ids, boxes_around(corners), segments_xyn=corners)
    found = labels(
        class_ids, np.asarray([_hull(mask) for _, _, mask, _ in shapes], np.float64).reshape(-1, 4), hw
    )
    keypoints = (
        np.stack([_keypoints(shapes, i, hw) for i in range(len(shapes))])
        if shapes
        else np.zeros((0, *KEYPOINT_SHAPE))
    )
    return image, Labels(found.class_ids, found.boxes_xywhn, keypoints=keypoints)


def _scene(
    seed: int, split: str, index: int, height: int, width: int, *, is_single: bool = False
) -> tuple[NDArray[np.uint8], list[Shape]]:
    """The image and the shapes that can be seen, in drawing order."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    image = _background(rng, height, width)
    num_shapes = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_SHAPES + 1))
    shapes = (
        [_shape(rng, height, width, is_single=True)]
        if is_single
        else _visible([_shape(rng, height, width) for _ in range(num_shapes)])
    )
    for _, colour, mask, _ in shapes:
        image[mask] = np.clip(colour + rng.normal(0, 4, (int(mask.sum()), 3)), 0, 255)
    return image.astype(np.uint8), shapes


def _hull(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1] + 1), int(rows[-1] + 1)


def _keypoints(shapes: list[Shape], i: int, image_hw: tuple[int, int]) -> NDArray[np.float64]:
    """Centre, top, left, right and bottom of a shape, normalised, with visibility: 0 outside the image, 1 covered, 2 seen: (5, 3)."""
    outline = shapes[i][3]
    (left, top), (right, bottom) = outline.argmin(0), outline.argmax(0)
    points = np.stack([outline.mean(0), *outline[[top, left, right, bottom]]])
    found = np.zeros(KEYPOINT_SHAPE)
    for k, (x, y) in enumerate(points):
        if 0 <= x < image_hw[1] and 0 <= y < image_hw[0]:
            is_covered = any(shape[2][int(y), int(x)] for shape in shapes[i + 1 :])
            found[k] = x / image_hw[1], y / image_hw[0], 1 if is_covered else 2
    return found


def encode(image: NDArray[np.uint8]) -> bytes:
    """uint8 (H, W, 3) RGB -> JPEG."""
    is_encoded, data = cv2.imencode(
        ".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    )
    assert is_encoded
    return bytes(data.tobytes())


def labels(
    class_ids: NDArray[np.int64], boxes_xyxy: NDArray[np.float64], image_hw: tuple[int, int]
) -> Labels:
    """Labels of a drawn image; ``boxes_xyxy`` float64 (N, 4) px."""
    x1, y1, x2, y2 = boxes_xyxy.T / np.array([image_hw[1], image_hw[0]] * 2)[:, None]
    return Labels(class_ids, np.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], axis=1))


def _background(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """A grey gradient in a random direction, blotches and fine noise; float64 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    grey = rng.uniform(60, 190) + rng.uniform(20, 80) * (x * np.cos(angle) + y * np.sin(angle))
    blotches = cv2.resize(rng.normal(0, 14, (6, 8)), (width, height), interpolation=cv2.INTER_CUBIC)
    tint = rng.uniform(-12, 12, 3)
    image = (grey + blotches)[..., None] + tint + rng.normal(0, 7, (height, width, 1))
    return np.clip(image, 0, 255)


def _shape(rng: np.random.Generator, height: int, width: int, *, is_single: bool = False) -> Shape:
    """One shape; its centre lies inside the image."""
    class_id = int(rng.integers(len(CLASS_NAMES)))
    side = (min(height, width) if is_single else height) * float(
        np.exp(rng.uniform(*np.log(SINGLE_SIDES if is_single else SIDES)))
    )
    margin = min(0.25 * side, 0.5 * width)
    centre = np.array([rng.uniform(margin, width - margin), rng.uniform(0.25 * side, height - 0.25 * side)])
    if is_single:
        centre = np.array([width, height]) / 2 + rng.uniform(-0.1, 0.1, 2) * min(height, width)
    points = centre + _outline(class_id, rng.uniform(0, 2 * np.pi)) * side / 2
    mask = np.zeros((height, width), np.uint8)
    cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return class_id, _colour(rng, class_id), mask.astype(bool), points


def _outline(class_id: int, turn: float) -> NDArray[np.float64]:
    """Corners (K, 2) of a shape about the origin, in halves of its side: width of a square or circle, span of a triangle or star."""
    name = CLASS_NAMES[class_id]
    num_points = {"circle": 64, "square": 4, "triangle": 3, "star": 10}[name]
    radius = np.full(num_points, {"circle": 1.0, "square": 1.3, "triangle": 1.25, "star": 1.2}[name])
    if name == "star":
        radius[1::2] *= 0.45
    angles = turn + np.arange(num_points) * 2 * np.pi / num_points
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def _colour(rng: np.random.Generator, class_id: int) -> NDArray[np.float64]:
    """A strong colour from the class's part of the colour wheel, RGB 0 to 255."""
    hue = (360 / len(CLASS_NAMES) * class_id + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 360
    hsv = np.array([[[hue, rng.uniform(0.75, 1), rng.uniform(0.65, 1)]]], np.float32)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255, np.float64)


def _visible(shapes: list[Shape]) -> list[Shape]:
    """Shapes in drawing order, without those that later ones would hide and those of no pixel."""
    if not shapes:
        return []
    covered = np.zeros_like(shapes[0][2])
    kept = []
    for shape in reversed(shapes):
        mask = shape[2]
        if mask.any() and (mask & covered).sum() <= MAX_COVERED * mask.sum():
            kept.append(shape)
            covered |= mask
    return kept[::-1]
