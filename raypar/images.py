"""Encoded bytes <-> pixels. Pure; runs everywhere.

``image`` is uint8 (H, W, 3) RGB, contiguous.
"""

from __future__ import annotations

import io
import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


class TooManyPixels(ValueError):
    """The header promises more pixels than are allowed; nothing was decoded."""


def decode(data: bytes | Any, max_pixels: int | None = None) -> Image:
    """Decodes any format that OpenCV reads; grey, 16-bit, CMYK and transparent images come out as RGB, EXIF orientation applied.

    Args:
        data: the encoded bytes, or a buffer of them.
        max_pixels: checked against the header, before anything is decoded.

    Raises:
        TooManyPixels: more than ``max_pixels``.
        ValueError: not an image, or damaged.
    """
    if max_pixels is not None:
        height, width = size_of(data)
        if height * width > max_pixels:
            raise TooManyPixels(f"{width}x{height} px are more than the {max_pixels} allowed")
    buffer = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(buffer, cv2.IMREAD_COLOR_RGB) if buffer.size else None
    except cv2.error as error:
        raise ValueError(f"not a readable image: {error}") from error
    if image is None:
        raise ValueError("not a readable image")
    return image  # type: ignore[no-any-return]


def size_of(data: bytes | Any) -> tuple[int, int]:
    """Height and width in px, from the header alone.

    Raises:
        ValueError: no known header.
    """
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except PIL.Image.DecompressionBombError as error:
        raise TooManyPixels(str(error)) from error
    except Exception as error:
        raise ValueError(f"not a readable image: {error}") from error


def shrink(image: Image, imgsz: int) -> Image:
    """Brings the longer side down to ``imgsz`` px, as Ultralytics' ``load_image`` does; smaller images stay as they are."""
    height, width = image.shape[:2]
    ratio = imgsz / max(height, width)
    if ratio >= 1:
        return image
    size = min(math.ceil(width * ratio), imgsz), min(math.ceil(height * ratio), imgsz)
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)  # type: ignore[no-any-return]


def encode_jpeg(image: Image, quality: int = 90) -> bytes:
    return _encode(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_png(image: Image) -> bytes:
    return _encode(image, ".png", [])


def _encode(image: Image, suffix: str, settings: list[int]) -> bytes:
    done, buffer = cv2.imencode(suffix, image[..., ::-1], settings)
    assert done
    return buffer.tobytes()  # type: ignore[no-any-return]
