"""Pixels of one image: its tiles painted into the output, colours shifted on the way. OpenCV.

Runs in: Ray Data tasks. No mosaic canvas is painted when maps are only scale and shift (the default recipe): the visible part of
each tile is resized to its place in the output, which takes a fifth of the time of a warp. A resize goes from whole pixels to
whole pixels. Tiles meet on a pixel's edge (see :mod:`raypar.augment.geometry`), so it is exact there; where the output's side cuts
a tile, it begins up to ``OVERHANG_PX`` further out, where edges of source and output pixels nearly coincide; a tile's own outer
edge is rounded, by half a pixel at most. Where it would be more (tiny images made many times larger), the tile is warped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Tile

GREY = 114
OVERHANG_PX, CLOSE_ENOUGH_PX = 8, 0.05
MAX_ROUNDING_PX = 0.5
STRIP_PX = 40_960  # colours change in strips that stay in the processor's cache: half the time of whole images
Image = NDArray[np.uint8]
Tables = tuple[Image, Image, Image]


def paint_tiles(images: Sequence[Image], tiles: Sequence[Tile], matrix: Floats, size: int, tables: Tables | None, scratch: Image) -> Image:
    """Paints each tile into its own rectangle of the output, colours shifted if there are tables.

    Args:
        images: of the tiles.
        tiles: of :func:`layout`.
        matrix: canvas -> output, scale and shift only.
        size: S.
        tables: of :func:`colour_tables`.
        scratch: uint8, at least (S + 2 * OVERHANG_PX, S + 2 * OVERHANG_PX, 3).
    """
    grey = GREY if tables is None else int(tables[2][GREY])
    out = np.full((size, size, 3), grey, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        x, y = (_span(float(matrix[a, a]), float(matrix[a, 2]), tile, a, image.shape[1 - a], size) for a in (0, 1))
        if x is None or y is None:
            continue
        region = out[max(y.to, 0) : y.to_end, max(x.to, 0) : x.to_end]  # slices end with the output
        width, height = x.to_end - x.to, y.to_end - y.to
        resized = scratch[:height, :width]
        if max(x.rounding_px, y.rounding_px) <= MAX_ROUNDING_PX:
            cv2.resize(image[y.begin : y.end, x.begin : x.end], (width, height), dst=resized, interpolation=cv2.INTER_LINEAR)
        else:
            placed = np.array([[x.scale, 0, x.shift - x.to], [0, y.scale, y.shift - y.to]])
            cv2.warpAffine(image, placed, (width, height), dst=resized, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        above, left = max(-y.to, 0), max(-x.to, 0)
        region[...] = resized[above : above + region.shape[0], left : left + region.shape[1]]
        if tables is not None:
            look_up(region, tables)
    return out


@dataclass(frozen=True)
class _Span:
    """Along one axis: source pixels [begin, end) become output pixels [to, to_end), some outside of it.

    Exactly, source index i goes to ``scale * i + shift``; the edges are at most ``rounding_px`` output px off.
    """

    begin: int
    end: int
    to: int
    to_end: int
    scale: float
    shift: float
    rounding_px: float


def _span(scale: float, shift: float, tile: Tile, axis: int, length: int, size: int) -> _Span | None:
    """What of a tile to resize along one axis; None if nothing is visible.

    Args:
        scale: output pixels for a pixel of the canvas.
        shift: the output index of canvas index 0.
        tile: to show.
        axis: 0 for x, 1 for y.
        length: of the source, px.
        size: of the output, px.
    """
    low, high = (round(scale * (edge - 0.5) + shift + 0.5) for edge in tile.rect[axis::2])  # edges: pixel i reaches from i to i + 1
    if min(high, size) <= max(low, 0):
        return None
    enlarged = tile.hw[1 - axis] / length
    shift += scale * (enlarged / 2 - 0.5 + tile.origin[axis])  # by cv2.resize's convention
    scale *= enlarged
    begin, to, off = _edge(scale, shift, [low] if low >= 0 else range(0, max(low, -OVERHANG_PX) - 1, -1))
    end, to_end, off_end = _edge(scale, shift, [high] if high <= size else range(size, min(high, size + OVERHANG_PX) + 1))
    begin = min(max(begin, 0), length - 1)
    return _Span(begin, min(max(end, begin + 1), length), to, to_end, scale, shift, max(off, off_end))


def _edge(scale: float, shift: float, choices: Iterable[int]) -> tuple[int, int, float]:
    """Of some output edges, the one nearest to an edge of a source pixel: that edge, itself, and how many output px they are apart."""
    best = (0, 0, math.inf)
    for to in choices:
        exact = (to - 0.5 - shift) / scale + 0.5
        off = abs(round(exact) - exact) * scale
        if off < best[2]:
            best = round(exact), to, off
            if off < CLOSE_ENOUGH_PX:
                break
    return best


def paint_canvas(images: Sequence[Image], tiles: Sequence[Tile], canvas_hw: tuple[int, int], matrix: Floats, size: int) -> Image:
    """Paints the canvas and warps it whole: for maps that turn, shear or tilt, as Ultralytics does for all."""
    canvas = np.full((*canvas_hw, 3), GREY, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        if (image.shape[0], image.shape[1]) != tile.hw:
            image = cv2.resize(image, tile.hw[::-1], interpolation=cv2.INTER_LINEAR)
        (x0, y0, x1, y1), (left, top) = tile.rect, tile.origin
        canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    return cv2.warpPerspective(canvas, matrix, (size, size), borderValue=(GREY,) * 3)


def shift_colours(image: Image, gains: Floats) -> None:
    """Changes hue, saturation and value of an RGB image in place, by Ultralytics' look-up tables (RandomHSV)."""
    look_up(image, colour_tables(gains))


def look_up(image: Image, tables: Tables) -> None:
    height, width = image.shape[:2]
    rows = min(max(STRIP_PX // width, 1), height)
    hsv, planes = np.empty((rows, width, 3), np.uint8), np.empty((3, rows, width), np.uint8)
    for row in range(0, height, rows):
        strip = image[row : row + rows]
        of_strip = list(planes[:, : len(strip)])
        cv2.split(cv2.cvtColor(strip, cv2.COLOR_RGB2HSV, dst=hsv[: len(strip)]), of_strip)
        for plane, table in zip(of_strip, tables, strict=True):  # faster than one table for all channels
            cv2.LUT(plane, table, dst=plane)
        cv2.cvtColor(cv2.merge(of_strip, dst=hsv[: len(strip)]), cv2.COLOR_HSV2RGB, dst=strip)


def colour_tables(gains: Floats) -> Tables:
    """Look-up tables uint8 (256,) of hue, saturation and value."""
    levels = np.arange(256)
    hue = ((levels + gains[0] * 180) % 180).astype(np.uint8)
    saturation, value = (np.clip(levels * (g + 1), 0, 255).astype(np.uint8) for g in gains[1:])
    saturation[0] = 0  # pure white stays white
    return hue, saturation, value
