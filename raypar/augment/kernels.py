"""Loops over pixels that OpenCV has no single call for, compiled by Numba.

Runs in: Ray Data tasks. Compiled once a machine (about 2 s) and kept on disk. Without ``contract`` and ``reassoc`` every processor
gives the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

f32, i32 = np.float32, np.int32
ZERO, HALF, ONE, TWO, FOUR, SIX = f32(0), f32(0.5), f32(1), f32(2), f32(4), f32(6)
# OpenCV keeps hue in half degrees
HUES, MAX, PER_HUE, PER_MAX = f32(180), f32(255), f32(6 / 180), f32(1 / 255)
BITS_12, HALF_TURN = f32(2**-12), f32(90.5)
compiled: Callable[..., Any] = numba.njit(
    cache=True, nogil=True, boundscheck=False, error_model="numpy", fastmath={"nnan", "ninf", "nsz"}
)


@compiled
def shift_hsv(red: Any, green: Any, blue: Any, hue: Any, saturation: Any, value: Any) -> None:
    """Changes hue, saturation and value in place, a third of the time of OpenCV's two conversions and look-up tables.

    Both ways values are rounded to OpenCV's 8-bit HSV, and changed as Ultralytics' tables do (RandomHSV: cut, not rounded).

    Args:
        red, green, blue: uint8 (N,), contiguous.
        hue: float32, what is added (half degrees) and half a turn, modulo a turn: ``(change + 90) % 180``.
        saturation, value: float32, factors.
    """
    for i in range(red.size):
        r, g, b = f32(red[i]), f32(green[i]), f32(blue[i])
        v = max(max(r, g), b)
        chroma = v - min(min(r, g), b)
        # cv2.COLOR_RGB2HSV: fixed point with 12 bits, here in floats that hold it exactly
        s = f32(i32(chroma * f32(i32(f32(255 << 12) / max(v, ONE) + HALF)) * BITS_12 + HALF))
        apart = g - b if v == r else (b - r + TWO * chroma if v == g else r - g + FOUR * chroma)
        h = f32(i32(apart * f32(i32(f32(30 << 12) / max(chroma, ONE) + HALF)) * BITS_12 + HALF_TURN)) + hue
        h = h - HUES if h >= HUES else h
        h = h - HUES if h >= HUES else h  # the two half turns are gone
        h = f32(i32(h)) * PER_HUE  # in sixths of the circle
        v = f32(i32(min(v * value, MAX))) * PER_MAX
        c = v * (f32(i32(min(s * saturation, MAX))) * PER_MAX)
        # cv2.COLOR_HSV2RGB: floats, cut and not rounded
        k = h + f32(5)
        k = k - SIX if k >= SIX else k
        red[i] = np.uint8(i32((v - c * max(min(min(k, FOUR - k), ONE), ZERO)) * MAX))
        k = h + f32(3)
        k = k - SIX if k >= SIX else k
        green[i] = np.uint8(i32((v - c * max(min(min(k, FOUR - k), ONE), ZERO)) * MAX))
        k = h + ONE
        k = k - SIX if k >= SIX else k
        blue[i] = np.uint8(i32((v - c * max(min(min(k, FOUR - k), ONE), ZERO)) * MAX))
