"""Encoded bytes <-> pixels. Every image that raypar reads is decoded here, so that prepare, train and predict see the same pixels.

Runs in: every process.
"""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
JPEG = b"\xff\xd8"
# cv2.IMREAD_REDUCED_GRAYSCALE_2 ..., which with IMREAD_COLOR_RGB stand for the size alone
REDUCED = {2: 16, 4: 32, 8: 64}


def decode(data: Any, max_pixels: int | None = None, *, reduction: int = 1) -> Image:
    """Decodes an image as Ultralytics does: upright by its EXIF orientation, grey repeated, alpha dropped, 16 bits cut to 8.

    Args:
        data: encoded bytes (JPEG, PNG, WebP, BMP, TIFF ...), or any buffer of them.
        max_pixels: larger images are refused by their header, before a pixel is decoded.
        reduction: 2, 4 or 8 decode a JPEG at that part of its size, rounded up: a pixel is the mean of a square (libjpeg, in a third of the time).

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        ValueError: the bytes are not an image, or it has too many pixels.
    """
    encoded = np.frombuffer(data, np.uint8)
    if max_pixels is not None:
        height, width = header_hw(encoded)
        if height * width > max_pixels:
            raise ValueError(f"an image of {width} x {height} has more than {max_pixels} pixels")
    try:
        image = (
            cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB | REDUCED.get(reduction, 0)) if len(encoded) else None
        )
    except cv2.error as error:
        raise ValueError(f"not an image that can be decoded: {error}") from error
    if image is None:
        raise ValueError(
            f"not an image that can be decoded: {len(encoded)} bytes that begin with {encoded[:8].tobytes()!r}"
        )
    return np.asarray(image, np.uint8)


def header_hw(data: Any) -> tuple[int, int]:
    """Height and width, px, as the header of encoded bytes (or any buffer of them) says; not turned by EXIF, and nothing is decoded.

    Raises:
        ValueError: not an image.
    """
    import PIL.Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(data)) as opened:
                return opened.height, opened.width
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"an image with too many pixels: {error}") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged header leads them to
        raise ValueError(f"not an image that can be decoded: {error}") from error


def resized_hw(image_hw: tuple[int, int], side: int) -> tuple[int, int]:
    """Size after the longer side became ``side`` px: rounded up, as Ultralytics' ``BaseDataset.load_image``."""
    ratio = side / max(image_hw)
    if ratio == 1:
        return image_hw
    return min(math.ceil(image_hw[0] * ratio), side), min(math.ceil(image_hw[1] * ratio), side)


def shrink(image: Image, side: int, *, reduction: int = 1) -> Image:
    """The image with its longer side at most ``side`` px, by bilinear interpolation; smaller images stay as they are.

    Args:
        image: uint8 (H, W, 3).
        side: px.
        reduction: how many times smaller than it was the image is already.
    """
    height, width = image.shape[0] * reduction, image.shape[1] * reduction
    wanted = resized_hw((height, width), side) if max(height, width) > side else (height, width)
    return (
        image
        if image.shape[:2] == wanted
        else np.asarray(cv2.resize(image, wanted[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    )


def decode_shrunk(data: Any, side: int) -> Image:
    """``shrink(decode(data), side)``, without most of the pixels of a JPEG that is at least four times as large and whose sides are even.

    What libjpeg leaves out is never more than half of the way: the rest is a bilinear resize of at least 2 to 1, as for any image. All the way
    it would be faster still, but models found fewer of the smallest objects (``docs/decisions/0008-cpu-renderer.md``).

    Raises:
        ValueError: the bytes are not an image.
    """
    reduction = _reduction(data, side)
    return shrink(decode(data, reduction=reduction), side, reduction=reduction)


def _reduction(data: Any, side: int) -> int:
    """How many times smaller a JPEG can be decoded without being stretched, or smaller than twice ``side`` px."""
    if bytes(memoryview(data)[:2]) != JPEG:
        return 1
    try:
        hw = header_hw(data)
    except ValueError:  # Pillow's; let OpenCV try
        return 1
    return max(
        (r for r in REDUCED if max(hw) >= 2 * r * side and hw[0] % r == 0 and hw[1] % r == 0), default=1
    )


def encode_jpeg(image: Image, quality: int = 90) -> bytes:
    """JPEG bytes of a uint8 (H, W, 3) RGB image."""
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_png(image: Image) -> bytes:
    """PNG bytes of a uint8 (H, W, 3) RGB image."""
    return _encode(".png", image, [])


def _encode(suffix: str, image: Image, settings: list[int]) -> bytes:
    is_done, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), settings)
    assert is_done, f"OpenCV cannot write {suffix}"
    return encoded.tobytes()
