"""The geometry, rendered by OpenCV into a packed batch.

Runs in: Ray Data tasks. No mosaic canvas is painted when maps are only scale and shift (the default recipe): the visible part of
each tile is resized to its place in the output, which takes a fifth of the time of a warp. A resize goes from whole pixels to
whole pixels. Tiles meet on a pixel's edge (see :mod:`raypar.augment.geometry`), so it is exact there; where the output's side cuts
a tile, it begins up to ``OVERHANG_PX`` further out, where edges of source and output pixels nearly coincide; a tile's own outer
edge is rounded, by half a pixel at most. Where it would be more (tiny images made many times larger), the tile is warped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Layer, Recipe, Sample, Tile, choose_cut, draw, layout, move_boxes

GREY = 114
OVERHANG_PX = 8
MAX_ROUNDING_PX = 0.5
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
        gains = sample.gains if self.recipe.hsv_h or self.recipe.hsv_s or self.recipe.hsv_v else None
        is_alone = sample.mixed is None and sample.cut is None
        image, class_ids, boxes = self._layer(sample.layer, sources, gains if is_alone else None)
        if sample.mixed is not None:
            other, share = sample.mixed
            image2, class_ids2, boxes2 = self._layer(other, sources, None)
            image = cv2.addWeighted(image, share, image2, 1 - share, -0.5)  # Ultralytics truncates, OpenCV rounds
            class_ids, boxes = np.concatenate([class_ids, class_ids2]), np.concatenate([boxes, boxes2])
        if sample.cut is not None:
            other, areas, pick = sample.cut
            image2, class_ids2, boxes2 = self._layer(other, sources, None)
            if (chosen := choose_cut(areas, pick, boxes, boxes2)) is not None:
                area, come = chosen
                x0, y0, x1, y1 = area.astype(int)
                image[y0:y1, x0:x1] = image2[y0:y1, x0:x1]
                along = np.concatenate([boxes2[come, :2].clip(area[:2], area[2:]), boxes2[come, 2:].clip(area[:2], area[2:])], 1)
                class_ids, boxes = np.concatenate([class_ids, class_ids2[come]]), np.concatenate([boxes, along])
        if gains is not None and not is_alone:
            shift_colours(image, gains)
        if any(sample.flip):
            cv2.flip(image, {(True, False): 1, (False, True): 0, (True, True): -1}[sample.flip], dst=image)
        boxes = _flipped(boxes, sample.flip, size) / size
        return image, class_ids, np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1).astype(np.float32)

    def _layer(self, layer: Layer, sources: Sequence[Source], gains: Floats | None) -> tuple[Image, NDArray[np.int32], Floats]:
        """A layer's pixels, with shifted colours if there are gains, and its boxes_xyxy in px; not flipped."""
        size, shown = self.recipe.imgsz, [sources[i] for i in layer.indices]
        tiles, canvas_hw = layout(layer, [s.hw for s in shown], size)
        class_ids, boxes = move_boxes(layer, tiles, canvas_hw, [(s.class_ids, s.boxes_xywhn) for s in shown], size)
        matrix, images = layer.matrix(canvas_hw, size), [s.image for s in shown]
        if self.recipe.is_axis_aligned:
            return _paint_tiles(images, tiles, matrix, size, gains), class_ids, boxes
        image = _paint_canvas(images, tiles, canvas_hw, matrix, size)
        if gains is not None:
            shift_colours(image, gains)
        return image, class_ids, boxes


def shift_colours(image: Image, gains: Floats) -> None:
    """Changes hue, saturation and value of an RGB image in place, by Ultralytics' look-up tables (RandomHSV)."""
    tables = _colour_tables(gains)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    planes = cv2.split(hsv)  # a table for each plane is faster than one for all channels
    for plane, table in zip(planes, tables, strict=True):
        cv2.LUT(plane, table, dst=plane)
    cv2.cvtColor(cv2.merge(planes, dst=hsv), cv2.COLOR_HSV2RGB, dst=image)


def _colour_tables(gains: Floats) -> tuple[Image, Image, Image]:
    """Look-up tables uint8 (256,) of hue, saturation and value."""
    levels = np.arange(256)
    hue = ((levels + gains[0] * 180) % 180).astype(np.uint8)
    saturation, value = (np.clip(levels * (g + 1), 0, 255).astype(np.uint8) for g in gains[1:])
    saturation[0] = 0  # pure white stays white
    return hue, saturation, value


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


def _paint_tiles(images: Sequence[Image], tiles: Sequence[Tile], matrix: Floats, size: int, gains: Floats | None) -> Image:
    """Paints each tile into its own rectangle of the output: every pixel is written about once, and the grey is never coloured."""
    grey = GREY if gains is None else _colour_tables(gains)[2][GREY]
    out = np.full((size, size, 3), grey, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        whole = matrix @ _source_map(tile, image)  # a source's pixel indices -> the output's
        x = _span(whole[0, 0], whole[0, 2], matrix[0, 0] * (np.array(tile.rect[0::2]) - 0.5) + matrix[0, 2], image.shape[1], size)
        y = _span(whole[1, 1], whole[1, 2], matrix[1, 1] * (np.array(tile.rect[1::2]) - 0.5) + matrix[1, 2], image.shape[0], size)
        if x is None or y is None:
            continue
        region = out[max(y.to, 0) : y.to_end, max(x.to, 0) : x.to_end]  # slices end with the output
        width, height = x.to_end - x.to, y.to_end - y.to
        if max(x.rounding_px, y.rounding_px) <= MAX_ROUNDING_PX:
            resized = cv2.resize(image[y.begin : y.end, x.begin : x.end], (width, height), interpolation=cv2.INTER_LINEAR)
        else:
            whole[:2, 2] -= x.to, y.to
            resized = cv2.warpAffine(image, whole[:2], (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        above, left = max(-y.to, 0), max(-x.to, 0)
        region[...] = resized[above : above + region.shape[0], left : left + region.shape[1]]
        if gains is not None:
            shift_colours(region, gains)
    return out


@dataclass(frozen=True)
class _Span:
    """Along one axis: source pixels [begin, end) become output pixels [to, to_end), some outside of it, at most ``rounding_px`` off."""

    begin: int
    end: int
    to: int
    to_end: int
    rounding_px: float


def _span(scale: float, shift: float, edges: Floats, length: int, size: int) -> _Span | None:
    """What of a tile to resize along one axis; None if nothing is visible.

    Args:
        scale: output pixels for a source pixel.
        shift: the output index of source index 0.
        edges: (2,) output indices of the tile's two edges.
        length: of the source, px.
        size: of the output, px.
    """
    low, high = (round(float(edge) + 0.5) for edge in edges)  # edges: pixel i reaches from i to i + 1
    if min(high, size) <= max(low, 0):
        return None
    starts = [low] if low >= 0 else range(0, max(low, -OVERHANG_PX) - 1, -1)
    ends = [high] if high <= size else range(size, min(high, size + OVERHANG_PX) + 1)
    begin, to, off = min(_edges(scale, shift, starts), key=itemgetter(2))
    end, to_end, off_end = min(_edges(scale, shift, ends), key=itemgetter(2))
    begin = min(max(begin, 0), length - 1)
    return _Span(begin, min(max(end, begin + 1), length), to, to_end, max(off, off_end))


def _edges(scale: float, shift: float, to: Iterable[int]) -> Iterator[tuple[int, int, float]]:
    """For output edges: the nearest source edge, the output edge itself, and how far off that is in output px."""
    for edge in to:
        exact = (edge - 0.5 - shift) / scale + 0.5
        yield round(exact), edge, abs(round(exact) - exact) * scale


def _paint_canvas(images: Sequence[Image], tiles: Sequence[Tile], canvas_hw: tuple[int, int], matrix: Floats, size: int) -> Image:
    """Paints the canvas and warps it whole: for maps that turn, shear or tilt, as Ultralytics does for all."""
    canvas = np.full((*canvas_hw, 3), GREY, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        if (image.shape[0], image.shape[1]) != tile.hw:
            image = cv2.resize(image, tile.hw[::-1], interpolation=cv2.INTER_LINEAR)
        (x0, y0, x1, y1), (left, top) = tile.rect, tile.origin
        canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    return cv2.warpPerspective(canvas, matrix, (size, size), borderValue=(GREY,) * 3)
