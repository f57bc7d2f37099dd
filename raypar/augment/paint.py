"""Pixels of one image: its tiles painted, then developed: channels apart, flipped, recoloured.

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
Image = NDArray[np.uint8]


def canvas(size: int) -> Image:
    """Room to paint one layer in: the output, and a margin for tiles that the output's sides cut."""
    return np.empty((size + 2 * OVERHANG_PX, size + 2 * OVERHANG_PX, 3), np.uint8)


def paint_tiles(
    images: Sequence[Image], tiles: Sequence[Tile], matrix: Floats, size: int, room: Image
) -> Image:
    """Resizes what is seen of each tile into its own rectangle of the output.

    Args:
        images: of the tiles.
        tiles: of :func:`layout`.
        matrix: canvas -> output, scale and shift only.
        size: S.
        room: of :func:`canvas`; painted in.

    Returns:
        uint8 (S, S, 3), a view of the room.
    """
    room[...] = GREY
    for image, tile in zip(images, tiles, strict=True):
        x, y = (
            _span(float(matrix[a, a]), float(matrix[a, 2]), tile, a, image.shape[1 - a], size) for a in (0, 1)
        )
        if x is None or y is None:
            continue
        width, height = x.to_end - x.to, y.to_end - y.to
        region = room[
            y.to + OVERHANG_PX : y.to_end + OVERHANG_PX, x.to + OVERHANG_PX : x.to_end + OVERHANG_PX
        ]
        if max(x.rounding_px, y.rounding_px) <= MAX_ROUNDING_PX:
            cv2.resize(
                image[y.begin : y.end, x.begin : x.end],
                (width, height),
                dst=region,
                interpolation=cv2.INTER_LINEAR,
            )
        else:
            placed = np.array([[x.scale, 0, x.shift - x.to], [0, y.scale, y.shift - y.to]])
            cv2.warpAffine(
                image,
                placed,
                (width, height),
                dst=region,
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
    return room[OVERHANG_PX : OVERHANG_PX + size, OVERHANG_PX : OVERHANG_PX + size]


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
    # edges: pixel i reaches from i to i + 1
    low, high = (round(scale * (edge - 0.5) + shift + 0.5) for edge in tile.rect[axis::2])
    if min(high, size) <= max(low, 0):
        return None
    enlarged = tile.hw[1 - axis] / length
    shift += scale * (enlarged / 2 - 0.5 + tile.origin[axis])  # by cv2.resize's convention
    scale *= enlarged
    begin, to, off = _edge(scale, shift, [low] if low >= 0 else range(0, max(low, -OVERHANG_PX) - 1, -1))
    end, to_end, off_end = _edge(
        scale, shift, [high] if high <= size else range(size, min(high, size + OVERHANG_PX) + 1)
    )
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


def paint_canvas(images: Sequence[Image], tiles: Sequence[Tile], canvas_hw: tuple[int, int], matrix: Floats, size: int,
                 pasted: Sequence[NDArray[np.int32]] = ()) -> Image:  # fmt: skip
    """Paints the canvas and warps it whole: for maps that turn, shear or tilt, as Ultralytics does for all.

    Within the polygons ``pasted``, int32 (P, 2) px of the canvas, it shows its mirror image (CopyPaste).
    """
    canvas = np.full((*canvas_hw, 3), GREY, np.uint8)
    for image, tile in zip(images, tiles, strict=True):
        if (image.shape[0], image.shape[1]) != tile.hw:
            image = cv2.resize(image, tile.hw[::-1], interpolation=cv2.INTER_LINEAR)
        (x0, y0, x1, y1), (left, top) = tile.rect, tile.origin
        canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]
    if len(pasted):
        mask = np.zeros(canvas_hw, np.uint8)
        for polygon in pasted:
            cv2.drawContours(mask, [polygon], -1, 1, cv2.FILLED)
        cv2.copyTo(cv2.flip(canvas, 1), mask, canvas)
    return cv2.warpPerspective(canvas, matrix, (size, size), borderValue=(GREY,) * 3)


def develop(image: Image, gains: Floats, flip: tuple[bool, bool], swap: bool, out: Image) -> None:
    """Writes a painted image into its place in the batch: channels apart, flipped, recoloured.

    Args:
        image: uint8 (S, S, 3) RGB.
        gains: float64 (3,), of hue (in turns of 180 degrees), saturation and value (RandomHSV).
        flip: (left-right, up-down).
        swap: whether red and blue change places.
        out: uint8 (3, S, S), contiguous; written.
    """
    planes = list(out[::-1] if swap else out)
    # with gaps between rows it takes five times as long as with this copy
    cv2.split(np.ascontiguousarray(image), planes)
    if any(flip):
        for plane in planes:
            cv2.flip(plane, {(True, False): 1, (False, True): 0, (True, True): -1}[flip], dst=plane)
    if gains.any():
        # here: Numba takes a while to import, and most processes paint nothing
        from raypar.augment.kernels import shift_hsv

        hue = np.float32((gains[0] * 180 + 90) % 180)
        shift_hsv(
            *(plane.reshape(-1) for plane in planes), hue, np.float32(gains[1] + 1), np.float32(gains[2] + 1)
        )
