"""Decoding at a part of the size: the pixels of decoding all and shrinking, whatever the size, the format and the camera's orientation."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raypar import images
from raypar.images import decode, decode_shrunk, encode_jpeg, encode_png, shrink


def picture(height: int, width: int) -> np.ndarray:
    """Slow waves: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / 25
    return (127 + 80 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(x) * np.cos(y)], -1)).astype(np.uint8)


sides = st.one_of(st.integers(8, 300), st.integers(2, 37).map(lambda n: 8 * n))


@given(sides, sides, st.integers(8, 200), st.booleans())
def test_pixels_are_those_of_the_whole_image_shrunk(
    height: int, width: int, side: int, is_jpeg: bool
) -> None:
    encoded = (encode_jpeg if is_jpeg else encode_png)(picture(height, width))
    found, expected = decode_shrunk(encoded, side), shrink(decode(encoded), side)
    assert found.shape == expected.shape
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    if not is_jpeg or max(height, width) < 4 * side or height % 2 or width % 2:
        assert not difference.any()
    elif min(expected.shape[:2]) > 16:
        assert difference.mean() <= 2


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_an_image_is_upright(orientation: int) -> None:
    exif, out = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    PIL.Image.fromarray(picture(96, 208)).save(out, "JPEG", exif=exif)
    expected = shrink(decode(out.getvalue()), 50)
    found = decode_shrunk(out.getvalue(), 50)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() <= 2


def test_fewer_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def heard(*args: Any, **how: Any) -> np.ndarray:
        shapes.append(decode(*args, **how).shape)
        return decode(*args, **how)

    monkeypatch.setattr(images, "decode", heard)
    encoded = encode_jpeg(picture(480, 640))
    for side in (640, 320, 161, 160, 80, 50, 35):
        decode_shrunk(encoded, side)
    assert [width for _, width, _ in shapes] == [640, 640, 640, 320, 160, 160, 80]


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xd8", b"\xff\xd8" + bytes(100)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an image"):
        decode_shrunk(data, 50)
