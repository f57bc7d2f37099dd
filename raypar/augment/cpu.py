"""The geometry, rendered by OpenCV into a packed batch.

Runs in: Ray Data tasks. No mosaic canvas is painted when maps are only scale, shift and flip (the default recipe): each tile is
warped straight to its place in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Layer, Recipe, Sample, Tile, choose_cut, draw, layout, move_boxes

GREY = (114, 114, 114)
Image = NDArray[np.uint8]


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
            image, found, moved = self.render(sample, sources)
            cv2.split(image, list(out[i][::-1] if sample.swap else out[i]))
            class_ids.append(found)
            boxes.append(moved)
        counts = [len(x) for x in class_ids]
        return Labels(np.concatenate(class_ids), np.concatenate(boxes), np.repeat(np.arange(len(counts), dtype=np.int32), counts))

    def render(self, sample: Sample, sources: Sequence[Source]) -> tuple[Image, NDArray[np.int32], NDArray[np.float32]]:
        """One image: uint8 (S, S, 3) RGB, class_ids int32 (N,), boxes_xywhn float32 (N, 4)."""
        size = self.recipe.imgsz
        image, class_ids, boxes = self._layer(sample.layer, sources, sample.flip)
        if sample.mixed is not None:
            other, share = sample.mixed
            image2, class_ids2, boxes2 = self._layer(other, sources, sample.flip)
            image = cv2.addWeighted(image, share, image2, 1 - share, -0.5)  # Ultralytics truncates, OpenCV rounds
            class_ids, boxes = np.concatenate([class_ids, class_ids2]), np.concatenate([boxes, boxes2])
        if sample.cut is not None:
            other, areas, pick = sample.cut
            image2, class_ids2, boxes2 = self._layer(other, sources, sample.flip)
            if (chosen := choose_cut(areas, pick, boxes, boxes2)) is not None:
                area, come = chosen
                x0, y0, x1, y1 = _flipped(area[None], sample.flip, size)[0].astype(int)
                image[y0:y1, x0:x1] = image2[y0:y1, x0:x1]
                along = np.concatenate([boxes2[come, :2].clip(area[:2], area[2:]), boxes2[come, 2:].clip(area[:2], area[2:])], 1)
                class_ids, boxes = np.concatenate([class_ids, class_ids2[come]]), np.concatenate([boxes, along])
        if self.recipe.hsv_h or self.recipe.hsv_s or self.recipe.hsv_v:
            shift_colours(image, sample.gains)
        boxes = _flipped(boxes, sample.flip, size) / size
        return image, class_ids, np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float32)

    def _layer(self, layer: Layer, sources: Sequence[Source], flip: tuple[bool, bool]) -> tuple[Image, NDArray[np.int32], Floats]:
        """A layer's pixels, flipped, and its boxes_xyxy in px, not yet flipped."""
        size, shown = self.recipe.imgsz, [sources[i] for i in layer.indices]
        tiles, canvas_hw = layout(layer, [s.hw for s in shown], size)
        class_ids, boxes = move_boxes(layer, tiles, canvas_hw, [(s.class_ids, s.boxes_xywhn) for s in shown], size)
        flipping = np.diag([-1.0 if flip[0] else 1.0, -1.0 if flip[1] else 1.0, 1.0])
        flipping[:2, 2] = [size - 1 if flip[0] else 0, size - 1 if flip[1] else 0]  # of pixel indices
        matrix = flipping @ layer.matrix(canvas_hw, size)
        paint = _paint_tiles if self.recipe.is_axis_aligned else _paint_canvas
        return paint([s.image for s in shown], tiles, canvas_hw, matrix, size), class_ids, boxes


def shift_colours(image: Image, gains: Floats) -> None:
    """Changes hue, saturation and value of an RGB image in place, by Ultralytics' look-up tables (RandomHSV)."""
    levels = np.arange(256)
    hue = ((levels + gains[0] * 180) % 180).astype(np.uint8)
    saturation, value = (np.clip(levels * (g + 1), 0, 255).astype(np.uint8) for g in gains[1:])
    saturation[0] = 0  # pure white stays white
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.cvtColor(cv2.LUT(hsv, np.stack([hue, saturation, value], -1)[None]), cv2.COLOR_HSV2RGB, dst=image)


def _flipped(boxes_xyxy: Floats, flip: tuple[bool, bool], size: int) -> Floats:
    x0, y0, x1, y1 = boxes_xyxy.T
    if flip[0]:
        x0, x1 = size - x1, size - x0
    if flip[1]:
        y0, y1 = size - y1, size - y0
    return np.stack([x0, y0, x1, y1], 1)


def _source_map(tile: Tile, image: Image) -> Floats:
    """Indices of a source's pixels -> indices on the canvas, by cv2.resize's convention."""
    scale = np.array(tile.hw[::-1]) / (image.shape[1], image.shape[0])
    matrix = np.diag([*scale, 1.0])
    matrix[:2, 2] = scale / 2 - 0.5 + tile.origin
    return matrix


def _paint_tiles(images: Sequence[Image], tiles: Sequence[Tile], canvas_hw: tuple[int, int], matrix: Floats, size: int) -> Image:
    """Warps each tile to its own rectangle of the output: every pixel is written about once."""
    out = np.full((size, size, 3), GREY, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        edges = matrix[:2, :2] @ (np.reshape(tile.rect, (2, 2)).T - 0.5) + matrix[:2, 2:]  # (2, 2): x's, y's of two corners
        (x0, x1), (y0, y1) = np.clip(np.ceil(np.sort(edges, 1)), 0, size).astype(int)  # pixels whose centre lies in the tile
        if x1 <= x0 or y1 <= y0:
            continue
        whole = matrix @ _source_map(tile, image)
        whole[:2, 2] -= x0, y0
        cv2.warpAffine(image, whole[:2], (int(x1 - x0), int(y1 - y0)), dst=out[y0:y1, x0:x1], flags=cv2.INTER_LINEAR,
                       borderMode=cv2.BORDER_REPLICATE)  # fmt: skip
    return out


def _paint_canvas(images: Sequence[Image], tiles: Sequence[Tile], canvas_hw: tuple[int, int], matrix: Floats, size: int) -> Image:
    """Paints the canvas and warps it whole: for maps that turn, shear or tilt, as Ultralytics does for all."""
    canvas = np.full((*canvas_hw, 3), GREY, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        if (image.shape[0], image.shape[1]) != tile.hw:
            image = cv2.resize(image, tile.hw[::-1], interpolation=cv2.INTER_LINEAR)
        (x0, y0, x1, y1), (left, top) = tile.rect, tile.origin
        canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    return cv2.warpPerspective(canvas, matrix, (size, size), borderValue=GREY)
