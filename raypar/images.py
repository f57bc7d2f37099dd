"""Encoded bytes <-> pixels. Every image that raypar reads is decoded here, so that prepare, train and predict see the same pixels.

Runs in: every process.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.image_header import Header, check_header, read_header

if TYPE_CHECKING:
    import PIL.Image

Image = NDArray[np.uint8]
JPEG = b"\xff\xd8"
DARKEST = 16  # of 256: where no pixel is as bright, 16 bits were used as 12, and show black
EXIF_ORIENTATION = 0x0112
# the entry of an EXIF block that says 2 to 8, in either byte order
ORIENTATION_TAG = re.compile(
    rb"\x12\x01.\x00\x01\x00\x00\x00[\x02-\x08]|\x01\x12\x00.\x00\x00\x00\x01(?:\x00\x00\x00|\x00)?[\x02-\x08]",
    re.DOTALL,
)
# cv2.IMREAD_REDUCED_GRAYSCALE_2 ..., which with IMREAD_COLOR_RGB stand for the size alone
REDUCED = {2: 16, 4: 32, 8: 64}


def decode(data: Any, max_pixels: int | None = None, *, reduction: int = 1) -> Image:
    """Decodes an image, upright and as 8 bits a channel, by one rule for every verb.

    It is turned by its EXIF orientation (and AVIF's own) alone: XMP is not read. Grey is repeated, palettes are applied, CMYK becomes RGB, alpha is
    dropped, and of 16 bits the upper 8 are kept, all as Ultralytics does. What that rule would make black, or cannot hold (floating-point and signed
    numbers, 32 bits, more than 4 channels), is refused.

    Args:
        data: encoded bytes of one of :data:`raypar.image_header.FORMATS`, or any buffer of them.
        max_pixels: larger images are refused by their header, before a pixel is decoded.
        reduction: 2, 4 or 8 decode a JPEG at that part of its size, rounded up: a pixel is the mean of a square (libjpeg, in a third of the time).

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        TooManyPixelsError: it has more than ``max_pixels``.
        ValueError: the bytes are not an image, or one that is refused.
    """
    header = read_header(data) if max_pixels is None else check_header(data, max_pixels)
    image = _pixels(data, header, reduction)
    if header.bits > 8 and image.max() < DARKEST:
        raise ValueError(
            f"pixels of {header.bits} bits that use only the lowest {header.bits - 4} would be black as 8 bits: "
            f"stretch them to all {header.bits} bits, or save them with 8"
        )
    return image


def is_turned(data: Any) -> bool:
    """Whether :func:`decode` turns or mirrors an image by its orientation, so that a reader that does not would see another one.

    Raises:
        ValueError: the bytes are not an image.
    """
    header = read_header(data)
    if header.kind == "TIFF":  # OpenCV always turns it
        return header.orientation != 1
    if header.kind == "AVIF":
        return _pillow_orientation(data, header) != 1
    if ORIENTATION_TAG.search(memoryview(data).cast("B")) is None:
        return False
    upright = _decode_with_opencv(data, cv2.IMREAD_COLOR_RGB)
    as_stored = _decode_with_opencv(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    return not np.array_equal(upright, as_stored)


def _pixels(data: Any, header: Header, reduction: int) -> Image:
    if header.needs_pillow:
        return _decode_with_pillow(data, header)
    try:
        return _decode_with_opencv(data, cv2.IMREAD_COLOR_RGB | REDUCED.get(reduction, 0))
    except ValueError:
        if header.kind != "JPEG2000":
            raise
    return _decode_with_pillow(data, header)  # which knows CMYK too


def _decode_with_opencv(data: Any, flags: int) -> Image:
    encoded = np.frombuffer(data, np.uint8)
    try:
        image = cv2.imdecode(encoded, flags)
    except cv2.error as error:
        raise ValueError(f"not an image that can be decoded: {error}") from error
    if image is None:
        raise ValueError(
            f"not an image that can be decoded: {len(encoded)} bytes that begin with {encoded[:8].tobytes()!r}"
        )
    return np.asarray(image, np.uint8)


def _decode_with_pillow(data: Any, header: Header) -> Image:
    """For what OpenCV reads not at all or otherwise: AVIF, whose orientation it leaves out, and some TIFFs."""
    import PIL.ImageOps

    try:
        with _open_with_pillow(data, header) as opened:
            upright = PIL.ImageOps.exif_transpose(opened)
            return np.array(upright.convert("RGB"))
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to
        reason = str(error).partition("<_io")[0].strip() or type(error).__name__
        raise ValueError(f"not an image that can be decoded: {reason}") from error


def _pillow_orientation(data: Any, header: Header) -> int:
    with _open_with_pillow(data, header) as opened:
        return int(opened.getexif().get(EXIF_ORIENTATION, 1))


def _open_with_pillow(data: Any, header: Header) -> PIL.Image.Image:
    """An image of which Pillow knows the EXIF alone: it would look for an orientation in the XMP too."""
    import PIL.Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        opened = PIL.Image.open(io.BytesIO(data), formats=[header.kind])
    opened.info.pop("xmp", None)
    return opened


def header_hw(data: Any) -> tuple[int, int]:
    """Height and width, px, as the header of encoded bytes (or any buffer of them) says; not turned by EXIF, and nothing is decoded.

    Raises:
        ValueError: not an image, or one that is refused whatever its size.
    """
    header = read_header(data)
    return header.height, header.width


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
    hw = header_hw(data)
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
