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


def decode(data: Any, max_pixels: int | None = None) -> Image:
    """Decodes an image as Ultralytics does: upright by its EXIF orientation, grey repeated, alpha dropped, 16 bits cut to 8.

    Args:
        data: encoded bytes (JPEG, PNG, WebP, BMP, TIFF ...), or any buffer of them.
        max_pixels: larger images are refused by their header, before a pixel is decoded.

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        ValueError: the bytes are not an image, or it has too many pixels.
    """
    encoded = np.frombuffer(data, np.uint8)
    if max_pixels is not None:
        height, width = header_hw(encoded.tobytes())
        if height * width > max_pixels:
            raise ValueError(f"an image of {width} x {height} has more than {max_pixels} pixels")
    try:
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if len(encoded) else None
    except cv2.error as error:
        raise ValueError(f"not an image that can be decoded: {error}") from error
    if image is None:
        raise ValueError(f"not an image that can be decoded: {len(encoded)} bytes that begin with {encoded[:8].tobytes()!r}")
    return np.asarray(image, np.uint8)


def header_hw(data: bytes) -> tuple[int, int]:
    """Height and width, px, as the header says; not turned by EXIF, and nothing is decoded.

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


def shrink(image: Image, side: int) -> Image:
    """The image with its longer side at most ``side`` px, by bilinear interpolation; smaller images stay as they are."""
    image_hw = image.shape[0], image.shape[1]
    if max(image_hw) <= side:
        return image
    height, width = resized_hw(image_hw, side)
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


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
