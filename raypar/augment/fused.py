"""The program of :mod:`raypar.augment.gpu` as one Triton kernel: every pixel of a batch is made in registers and written once.

Runs in: training workers with CUDA and Triton. A program instance makes part of a row of one output image: gather from the ring, blend,
mix-up, cut-mix, colours, store. It follows the torch program line for line, and no multiplication is joined with an addition, so both give
the same bits (maps with a perspective but for a last bit of their division). Under ``TRITON_INTERPRET=1`` it runs on CPU tensors, which is how it is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raypar.augment import pack
from raypar.augment.paint import GREY as GREY_LEVEL

try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch without it
    triton = tl = None

IS_HERE = triton is not None
BLOCK = 128
jit: Callable[[Any], Any] = triton.jit if IS_HERE else lambda function: function
if IS_HERE:  # a kernel reads only constants of the module
    OWNER, SEAM, TILES, TILE_WIDTH = (
        tl.constexpr(v) for v in (pack.OWNER, pack.SEAM, pack.TILES, pack.TILE_WIDTH)
    )
    MATRIX, PLACES, PLACE_WIDTH = (tl.constexpr(v) for v in (pack.MATRIX, pack.PLACES, pack.PLACE_WIDTH))
    MIXED, CUT, SHARE, RECT = (tl.constexpr(v) for v in (pack.MIXED, pack.CUT, pack.SHARE, pack.RECT))
    HUE, SATURATION, VALUE, HAS_COLOUR = (
        tl.constexpr(v) for v in (pack.HUE, pack.SATURATION, pack.VALUE, pack.HAS_COLOUR)
    )
    FLIP_X, FLIP_Y, SWAP = (tl.constexpr(v) for v in (pack.FLIP_X, pack.FLIP_Y, pack.SWAP))
    SAMPLE_WIDTH, LAYER_WIDTH, GREY = (
        tl.constexpr(v) for v in (pack.SAMPLE_WIDTH, pack.LAYER_WIDTH, float(GREY_LEVEL))
    )


def render(words: Tensor, rows: Tensor, layers: Tensor, out: Tensor, *, is_axis_aligned: bool) -> None:
    """Renders a batch.

    Args:
        words: of a :class:`raypar.augment.ring.Ring`.
        rows: float32 (B, SAMPLE_WIDTH) of a table, contiguous.
        layers: float32 (L, LAYER_WIDTH) of a table, contiguous.
        out: (B, 3, S, S), uint8 or floating, any memory format; written.
        is_axis_aligned: whether the layers' rows hold spans or matrices.
    """
    assert triton is not None
    size = out.shape[-1]
    grid = (size * triton.cdiv(size, BLOCK), out.shape[0])
    _kernel[grid](words, rows, layers, out, *out.stride(), size=size, block=BLOCK, spans=is_axis_aligned,
                  is_byte=out.dtype == torch.uint8, enable_fp_fusion=False)  # fmt: skip


@jit
def _kernel(words, rows, layers, out, stride_b, stride_c, stride_y, stride_x, size: tl.constexpr, block: tl.constexpr, spans: tl.constexpr, is_byte: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    per_row: tl.constexpr = (size + block - 1) // block
    image = tl.program_id(1)
    out_y = tl.program_id(0) // per_row
    out_x = tl.program_id(0) % per_row * block + tl.arange(0, block)
    row = rows + image * SAMPLE_WIDTH
    x = tl.where(tl.load(row + FLIP_X) > 0, size - 1 - out_x, out_x).to(tl.float32)
    y = tl.where(tl.load(row + FLIP_Y) > 0, size - 1 - out_y, out_y).to(tl.float32)
    r, g, b = _layer(words, layers + image * LAYER_WIDTH, x, y, size, spans)
    mixed = tl.load(row + MIXED).to(tl.int32)
    if mixed >= 0:
        r2, g2, b2 = _layer(words, layers + mixed * LAYER_WIDTH, x, y, size, spans)
        share = tl.load(row + SHARE)
        r, g, b = _mix(r, r2, share), _mix(g, g2, share), _mix(b, b2, share)
    cut = tl.load(row + CUT).to(tl.int32)
    if cut >= 0:
        r2, g2, b2 = _layer(words, layers + cut * LAYER_WIDTH, x, y, size, spans)
        in_x = tl.minimum(x - tl.load(row + RECT), tl.load(row + RECT + 2) - 1 - x)
        in_y = tl.minimum(y - tl.load(row + RECT + 1), tl.load(row + RECT + 3) - 1 - y)
        inside = tl.minimum(in_x, in_y) >= 0
        r, g, b = tl.where(inside, r2, r), tl.where(inside, g2, g), tl.where(inside, b2, b)
    if tl.load(row + HAS_COLOUR) > 0:
        r, g, b = _shift_hsv(r, g, b, tl.load(row + HUE), tl.load(row + SATURATION), tl.load(row + VALUE))
    swap = tl.load(row + SWAP) > 0
    first, last = tl.where(swap, b, r), tl.where(swap, r, b)
    at = out + image.to(tl.int64) * stride_b + out_y * stride_y + out_x * stride_x
    is_in = out_x < size
    if is_byte:
        tl.store(at, first.to(tl.uint8), mask=is_in)
        tl.store(at + stride_c, g.to(tl.uint8), mask=is_in)
        tl.store(at + 2 * stride_c, last.to(tl.uint8), mask=is_in)
    else:
        kind = out.dtype.element_ty
        tl.store(at, (first / 255).to(kind), mask=is_in)
        tl.store(at + stride_c, (g / 255).to(kind), mask=is_in)
        tl.store(at + 2 * stride_c, (last / 255).to(kind), mask=is_in)


@jit
def _layer(words, row, x, y, size: tl.constexpr, spans: tl.constexpr):  # type: ignore[no-untyped-def]
    """Red, green, blue of a layer, float32 (block,), at x (block,) and y of the output before flips."""
    seam_x, seam_y = tl.load(row + SEAM), tl.load(row + SEAM + 1)
    if spans:
        left = row + TILES + tl.where(y >= seam_y, 2 * TILE_WIDTH, 0)
        is_right = x >= seam_x
        slot = _either(left, is_right, 0)
        x0, x1, share_x, is_there_x = _along(left, is_right, x, 1)
        y0, y1, share_y, is_there_y = _along(left, is_right, y, 7)
        is_there = is_there_x & is_there_y
        base = words + slot.to(tl.int64) * (size * size)
        up, down = y0.to(tl.int32) * size, y1.to(tl.int32) * size
        here, there = x0.to(tl.int32), x1.to(tl.int32)
        a, b = (
            tl.load(base + up + here, mask=is_there, other=0),
            tl.load(base + up + there, mask=is_there, other=0),
        )
        c, d = (
            tl.load(base + down + here, mask=is_there, other=0),
            tl.load(base + down + there, mask=is_there, other=0),
        )
        red = tl.where(is_there, _blend(a, b, c, d, share_x, share_y, 0), GREY)
        green = tl.where(is_there, _blend(a, b, c, d, share_x, share_y, 8), GREY)
        blue = tl.where(is_there, _blend(a, b, c, d, share_x, share_y, 16), GREY)
    else:
        m = row + MATRIX
        depth = tl.load(m + 6) * x + tl.load(m + 7) * y + tl.load(m + 8)
        depth = tl.where(depth == 0, float("inf"), depth)
        canvas_x = (tl.load(m) * x + tl.load(m + 1) * y + tl.load(m + 2)) / depth
        canvas_y = (tl.load(m + 3) * x + tl.load(m + 4) * y + tl.load(m + 5)) / depth
        column = tl.floor(tl.minimum(tl.maximum(canvas_x, -4.0 * size), 4.0 * size))
        line = tl.floor(tl.minimum(tl.maximum(canvas_y, -4.0 * size), 4.0 * size))
        share_x = tl.minimum(tl.maximum(canvas_x - column, 0.0), 1.0)
        share_y = tl.minimum(tl.maximum(canvas_y - line, 0.0), 1.0)
        a = _canvas_pixel(words, row, column, line, seam_x, seam_y, size)
        b = _canvas_pixel(words, row, column + 1, line, seam_x, seam_y, size)
        c = _canvas_pixel(words, row, column, line + 1, seam_x, seam_y, size)
        d = _canvas_pixel(words, row, column + 1, line + 1, seam_x, seam_y, size)
        red = _blend(a, b, c, d, share_x, share_y, 0)
        green = _blend(a, b, c, d, share_x, share_y, 8)
        blue = _blend(a, b, c, d, share_x, share_y, 16)
    return red, green, blue


@jit
def _either(left, is_right, column):  # type: ignore[no-untyped-def]
    return tl.where(is_right, tl.load(left + TILE_WIDTH + column), tl.load(left + column))


@jit
def _along(left, is_right, place, first: tl.constexpr):  # type: ignore[no-untyped-def]
    """Along one axis: source index, that of the next pixel, its share, and whether the tile is there."""
    lowest, highest = _either(left, is_right, first + 2), _either(left, is_right, first + 3)
    at = place * _either(left, is_right, first) + _either(left, is_right, first + 1)
    at = tl.minimum(tl.maximum(at, lowest), highest)
    index = tl.floor(at)
    is_there = (place >= _either(left, is_right, first + 4)) & (place < _either(left, is_right, first + 5))
    return index, tl.minimum(index + 1, highest), at - index, is_there


@jit
def _of_four(tiles, is_right, is_low, column: tl.constexpr):  # type: ignore[no-untyped-def]
    upper = tl.where(is_right, tl.load(tiles + PLACE_WIDTH + column), tl.load(tiles + column))
    lower = tl.where(
        is_right, tl.load(tiles + 3 * PLACE_WIDTH + column), tl.load(tiles + 2 * PLACE_WIDTH + column)
    )
    return tl.where(is_low, lower, upper)


@jit
def _canvas_pixel(words, row, column, line, seam_x, seam_y, size: tl.constexpr):  # type: ignore[no-untyped-def]
    """A whole pixel of the canvas as a word of the ring, grey where no tile lies."""
    tiles, is_right, is_low = row + PLACES, column >= seam_x, line >= seam_y
    in_x, in_y = column - _of_four(tiles, is_right, is_low, 1), line - _of_four(tiles, is_right, is_low, 2)
    is_there = (
        (in_x >= 0)
        & (in_x < _of_four(tiles, is_right, is_low, 3))
        & (in_y >= 0)
        & (in_y < _of_four(tiles, is_right, is_low, 4))
    )
    is_there = is_there & (column >= 0) & (column < 2 * size) & (line >= 0) & (line < 2 * size)
    index = tl.where(is_there, in_y.to(tl.int32) * size + in_x.to(tl.int32), 0)
    slot = _of_four(tiles, is_right, is_low, 0).to(tl.int64)
    return tl.load(words + slot * (size * size) + index, mask=is_there, other=0x727272)  # 114 thrice


@jit
def _blend(a, b, c, d, share_x, share_y, shift: tl.constexpr):  # type: ignore[no-untyped-def]
    a, b = ((a >> shift) & 255).to(tl.float32), ((b >> shift) & 255).to(tl.float32)
    c, d = ((c >> shift) & 255).to(tl.float32), ((d >> shift) & 255).to(tl.float32)
    upper, lower = a + (b - a) * share_x, c + (d - c) * share_x
    return tl.floor(upper + (lower - upper) * share_y + 0.5)


@jit
def _mix(a, b, share):  # type: ignore[no-untyped-def]
    """What cv2.addWeighted with gamma -0.5 rounds: half to even matters, for shares near a half make many ties."""
    value = tl.maximum(a * share + b * (1 - share) - 0.5, 0.0)
    nearest = tl.floor(value + 0.5)
    is_odd_tie = (nearest - value == 0.5) & (nearest - 2 * tl.floor(nearest * 0.5) == 1)
    return tl.where(is_odd_tie, nearest - 1, nearest)


@jit
def _shift_hsv(r, g, b, hue, saturation, value):  # type: ignore[no-untyped-def]
    """Step by step :func:`raypar.augment.gpu.shift_hsv`."""
    v = tl.maximum(tl.maximum(r, g), b)
    chroma = v - tl.minimum(tl.minimum(r, g), b)
    s = tl.floor(chroma * tl.floor(tl.div_rn(1044480.0, tl.maximum(v, 1.0)) + 0.5) * 0.000244140625 + 0.5)
    apart = tl.where(v == r, g - b, tl.where(v == g, b - r + 2 * chroma, r - g + 4 * chroma))
    h = (
        tl.floor(apart * tl.floor(tl.div_rn(122880.0, tl.maximum(chroma, 1.0)) + 0.5) * 0.000244140625 + 90.5)
        + hue
    )
    h = tl.where(h >= 180, h - 180, h)
    h = tl.floor(tl.where(h >= 180, h - 180, h)) * (6 / 180)
    v = tl.floor(tl.minimum(v * value, 255.0)) * (1 / 255)
    c = v * (tl.floor(tl.minimum(s * saturation, 255.0)) * (1 / 255))
    return _plane(h, v, c, 5), _plane(h, v, c, 3), _plane(h, v, c, 1)


@jit
def _plane(h, v, c, sixths: tl.constexpr):  # type: ignore[no-untyped-def]
    k = h + sixths
    k = tl.where(k >= 6, k - 6, k)
    return tl.floor((v - c * tl.minimum(tl.maximum(tl.minimum(k, 4 - k), 0.0), 1.0)) * 255)
