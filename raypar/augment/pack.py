"""A batch's samples as one small table of numbers: all that the device needs to render them. Pure NumPy.

Runs in: Ray Data tasks or training workers. Every map is turned round here: from a pixel of the output to a pixel of the source.

The table is flat float32: a row of ``SAMPLE_WIDTH`` for each output image, then a row of ``LAYER_WIDTH`` for each layer: first one for
each image, then those to blend in, then those to cut from. Whole numbers in it are below 2**24, which float32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Layer, Recipe, Sample, Tile, layout
from raypar.augment.paint import MAX_ROUNDING_PX, _span

Rect = Sequence[float] | Floats
# columns of an image's row; -1 where it has no such layer
MIXED, CUT, SHARE, RECT, HUE, SATURATION, VALUE, HAS_COLOUR, FLIP_X, FLIP_Y, SWAP = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    10,
    11,
    12,
    13,
)
SAMPLE_WIDTH = 16
# columns of a layer's row; SEAM: x and y of the pixel (of the output; of the canvas when there is a matrix) where right and lower tiles begin
OWNER, SEAM = 0, 1
# then without a matrix: for each tile its slot, and for x and y (factor, offset, lowest and highest source index, first output pixel, end)
TILES, TILE_WIDTH = 4, 13
# and with one: output -> canvas (9, by rows), and for each tile its slot, left, top, width and height on the canvas
MATRIX, PLACES, PLACE_WIDTH = 4, 13, 5
LAYER_WIDTH = 56
NEVER = 1e6  # a seam that no pixel reaches: all belong to the first tile


@dataclass(frozen=True)
class Table:
    """A batch to render.

    Attributes:
        values: float32 (num_images * SAMPLE_WIDTH + (num_images + num_mixed + num_cut) * LAYER_WIDTH,).
        num_images: in the batch.
        num_mixed: layers to blend in.
        num_cut: layers to cut a rectangle from.
    """

    values: NDArray[np.float32]
    num_images: int
    num_mixed: int
    num_cut: int


def pack(recipe: Recipe, samples: Sequence[Sample], image_hws: Sequence[tuple[int, int]], slots: Sequence[int],
         cuts: Sequence[Rect | None] | None = None) -> Table:  # fmt: skip
    """Packs a batch.

    Args:
        recipe: that the samples were drawn from.
        samples: one an output image.
        image_hws: of the window's sources as they lie in the ring, px; a sample's indices point into it.
        slots: of the ring, where those sources lie.
        cuts: for each image the rectangle (x0, y0, x1, y1), px, that is cut from its ``cut`` layer, before flips; None where none is
            (it follows from the boxes: :func:`raypar.augment.geometry.choose_cut`).
    """
    cuts = [None] * len(samples) if cuts is None else cuts
    mixed = [i for i, sample in enumerate(samples) if sample.mixed is not None]
    cut = [
        i
        for i, (sample, area) in enumerate(zip(samples, cuts, strict=True))
        if sample.cut is not None and area is not None
    ]
    rows = np.zeros((len(samples), SAMPLE_WIDTH), np.float32)
    rows[:, [MIXED, CUT]] = -1
    layers = [(i, sample.layer) for i, sample in enumerate(samples)]
    for i, sample in enumerate(samples):
        hue, saturation, value = sample.gains
        rows[i, HUE : HAS_COLOUR + 1] = (hue * 180 + 90) % 180, saturation + 1, value + 1, sample.gains.any()
        rows[i, FLIP_X : SWAP + 1] = *sample.flip, sample.swap
    for i in mixed:
        if (pair := samples[i].mixed) is not None:
            rows[i, MIXED], rows[i, SHARE] = len(layers), pair[1]
            layers.append((i, pair[0]))
    for i in cut:
        if (triple := samples[i].cut) is not None and (area := cuts[i]) is not None:
            rows[i, CUT], rows[i, RECT : RECT + 4] = len(layers), np.asarray(area).astype(int)
            layers.append((i, triple[0]))
    write = _spans if recipe.is_axis_aligned else _places
    packed = np.zeros((len(layers), LAYER_WIDTH), np.float32)
    for row, (owner, layer) in zip(packed, layers, strict=True):
        row[OWNER], row[SEAM : SEAM + 2] = owner, NEVER
        write(
            row, layer, [image_hws[i] for i in layer.indices], [slots[i] for i in layer.indices], recipe.imgsz
        )
    return Table(np.concatenate([rows.reshape(-1), packed.reshape(-1)]), len(samples), len(mixed), len(cut))


def _spans(
    row: NDArray[np.float32], layer: Layer, hws: Sequence[tuple[int, int]], slots: Sequence[int], size: int
) -> None:
    """Scale and shift: what :func:`raypar.augment.paint.paint_tiles` resizes from where to where."""
    tiles, canvas_hw = layout(layer, hws, size)
    matrix = layer.matrix(canvas_hw, size)
    if layer.centre is not None:
        for axis, centre in enumerate(layer.centre):
            row[SEAM + axis] = round(float(matrix[axis, axis] * (centre - 0.5) + matrix[axis, 2] + 0.5))
    for i, (tile, hw, slot) in enumerate(zip(tiles, hws, slots, strict=True)):
        at = TILES + i * TILE_WIDTH
        row[at] = slot
        row[at + 1 : at + TILE_WIDTH] = _tile(matrix, tile, hw, size)


def _tile(matrix: Floats, tile: Tile, hw: tuple[int, int], size: int) -> list[float]:
    spans = [_span(float(matrix[a, a]), float(matrix[a, 2]), tile, a, hw[1 - a], size) for a in (0, 1)]
    numbers: list[float] = []
    is_resized = all(span is not None and span.rounding_px <= MAX_ROUNDING_PX for span in spans)
    for span, length in zip(spans, hw[::-1], strict=True):
        if span is None:
            numbers += [0.0] * 6  # an empty range of output pixels: nothing is seen
        elif is_resized:  # cv2.resize
            factor = (span.end - span.begin) / (span.to_end - span.to)
            numbers += [
                factor,
                span.begin - 0.5 + (0.5 - span.to) * factor,
                span.begin,
                span.end - 1,
                span.to,
                span.to_end,
            ]
        else:  # cv2.warpAffine, the outermost pixels repeated
            numbers += [1 / span.scale, -span.shift / span.scale, 0, length - 1, span.to, span.to_end]
    return numbers


def _places(
    row: NDArray[np.float32], layer: Layer, hws: Sequence[tuple[int, int]], slots: Sequence[int], size: int
) -> None:
    """Any map: where :func:`raypar.augment.paint.paint_canvas` puts the tiles, and the inverse of its warp."""
    tiles, canvas_hw = layout(layer, hws, size)
    if layer.centre is not None:
        row[SEAM : SEAM + 2] = layer.centre
    inverse = np.linalg.inv(layer.matrix(canvas_hw, size))
    row[MATRIX : MATRIX + 9] = (inverse / inverse[2, 2]).reshape(-1)
    for i, (tile, slot) in enumerate(zip(tiles, slots, strict=True)):
        # what juts out of the canvas is never sampled: with a mosaic the canvas is 2S wide
        row[PLACES + i * PLACE_WIDTH : PLACES + (i + 1) * PLACE_WIDTH] = slot, *tile.origin, *tile.hw[::-1]
