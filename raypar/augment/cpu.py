"""The geometry, rendered by OpenCV into a packed batch.

Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Layer, Recipe, Sample, choose_cut, draw, layout, move_boxes
from raypar.augment.paint import Image, canvas, develop, paint_canvas, paint_tiles


@dataclass
class Source:
    """An image of the window, and its labels.

    Attributes:
        image: uint8 (H, W, 3) RGB; its longer side should not exceed the recipe's imgsz by much (``images.shrink``).
        class_ids: int32 (N,).
        boxes_xywhn: float32 (N, 4), centre x, centre y, width, height over W, H.
    """

    image: Image
    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


@dataclass
class Labels:
    """Boxes of a batch, flat.

    Attributes:
        class_ids: int32 (M,).
        boxes_xywhn: float32 (M, 4), over the output's side.
        image_index: int32 (M,), the image of the batch that each belongs to.
    """

    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    image_index: NDArray[np.int32]


class Renderer:
    """Renders samples of a recipe.

    Args:
        recipe: whose ``imgsz`` is the output's side S.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.room = canvas(recipe.imgsz)

    def __call__(self, sources: Sequence[Source], indices: Sequence[int], rngs: Sequence[np.random.Generator], *,
                 mosaic_on: bool, out: Image) -> Labels:  # fmt: skip
        """Fills a batch.

        Args:
            sources: the window; mosaic and mix-up partners come from it.
            indices: for each output image, the source that it shows.
            rngs: for each output image, its own generator.
            mosaic_on: False in the last epochs (close_mosaic).
            out: uint8 (B, 3, S, S), RGB; written.
        """
        class_ids, boxes = [], []
        for i, (index, rng) in enumerate(zip(indices, rngs, strict=True)):
            sample = draw(self.recipe, rng, index, len(sources), mosaic_on=mosaic_on)
            found, moved = self.render(sample, sources, out[i])
            class_ids.append(found)
            boxes.append(moved)
        counts = [len(x) for x in class_ids]
        return Labels(np.concatenate(class_ids), np.concatenate(boxes), np.repeat(np.arange(len(counts), dtype=np.int32), counts))

    def render(self, sample: Sample, sources: Sequence[Source], out: Image) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Writes one image into uint8 (3, S, S), RGB; returns its class_ids int32 (N,) and boxes_xywhn float32 (N, 4)."""
        size = self.recipe.imgsz
        image, class_ids, boxes = self._layer(sample.layer, sources, self.room)
        if sample.mixed is not None:
            other, share = sample.mixed
            image2, class_ids2, boxes2 = self._layer(other, sources, canvas(size))
            image = cv2.addWeighted(image, share, image2, 1 - share, -0.5)  # Ultralytics truncates, OpenCV rounds
            class_ids, boxes = np.concatenate([class_ids, class_ids2]), np.concatenate([boxes, boxes2])
        if sample.cut is not None:
            other, areas, pick = sample.cut
            image2, class_ids2, boxes2 = self._layer(other, sources, canvas(size))
            if (chosen := choose_cut(areas, pick, boxes, boxes2)) is not None:
                area, come = chosen
                x0, y0, x1, y1 = area.astype(int)
                image[y0:y1, x0:x1] = image2[y0:y1, x0:x1]
                along = np.concatenate([boxes2[come, :2].clip(area[:2], area[2:]), boxes2[come, 2:].clip(area[:2], area[2:])], 1)
                class_ids, boxes = np.concatenate([class_ids, class_ids2[come]]), np.concatenate([boxes, along])
        develop(image, sample.gains, sample.flip, sample.swap, out)
        boxes = _flipped(boxes, sample.flip, size) / size
        return class_ids, np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float32)

    def _layer(self, layer: Layer, sources: Sequence[Source], room: Image) -> tuple[Image, NDArray[np.int32], Floats]:
        """A layer's pixels and its boxes_xyxy in px; not flipped."""
        size, shown = self.recipe.imgsz, [sources[i] for i in layer.indices]
        tiles, canvas_hw = layout(layer, [s.hw for s in shown], size)
        class_ids, boxes = move_boxes(layer, tiles, canvas_hw, [(s.class_ids, s.boxes_xywhn) for s in shown], size)
        matrix, images = layer.matrix(canvas_hw, size), [s.image for s in shown]
        if self.recipe.is_axis_aligned:
            return paint_tiles(images, tiles, matrix, size, room), class_ids, boxes
        return paint_canvas(images, tiles, canvas_hw, matrix, size), class_ids, boxes


def _flipped(boxes_xyxy: Floats, flip: tuple[bool, bool], size: int) -> Floats:
    x0, y0, x1, y1 = boxes_xyxy.T
    if flip[0]:
        x0, x1 = size - x1, size - x0
    if flip[1]:
        y0, y1 = size - y1, size - y0
    return np.stack([x0, y0, x1, y1], 1)
