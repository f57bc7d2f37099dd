"""What the header of an encoded image says: format, size and kind of pixels; nothing is decoded. All images are checked here first.

Runs in: every process. A header is read in microseconds, whatever a hostile file holds: a few fields at known places, and no more than
``MAX_SEGMENTS`` steps over a JPEG's or JPEG 2000's parts. Pillow opens AVIF alone, whose header libavif reads.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What Ultralytics reads, by Pillow's names.
FORMATS = ("AVIF", "BMP", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")
# libjpeg's own progressive files have 10 scans, and the most that optimizers write are about 20. Each scan goes over all pixels, and a file of
# 150 kB can have thousands: seconds of work. At 100 even 50 Mpx take about a second more than their pixels do.
MAX_SCANS = 100
MAX_SEGMENTS = 4096  # of a JPEG, up to its pixels: 64 KB each, which are 256 MB of metadata
MAX_PNG_CHUNKS = 1 << 16  # of which all but MAX_SEGMENTS are pixels: 8 KB or more each
MAX_GAP = 1 << 16  # bytes between two segments of a JPEG: a search holds the interpreter for its whole length
MAX_TIFF_TAGS = 4096
MAX_TILE_PIXELS = 1 << 24  # of a TIFF, where that is more than the whole image

SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 ... SOF15: the frame's header
SOS, EOI = 0xDA, 0xD9
WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
# not FF00, which is a byte of pixels, nor RST0 ... RST7, which lie among pixels
JPEG_MARKER = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
J2K_SIZE = b"\xff\x4f\xff\x51"
TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # fmt: skip
TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
TIFF_SAMPLES = {
    2: "signed integers",
    3: "floating-point numbers",
    5: "complex integers",
    6: "complex numbers",
}
TIFF_COLOURS = frozenset({0, 1, 2, 3, 5, 6, 8})  # grey, RGB, palette, CMYK, YCbCr, L*a*b*
UNASSOCIATED_ALPHA = 2


class TooManyPixelsError(ValueError):
    """An image with more pixels than are allowed."""


@dataclass(frozen=True)
class Header:
    """What is known before a pixel is decoded.

    Attributes:
        kind: one of ``FORMATS``.
        height, width: px, as stored: not turned by the orientation.
        bits: of a sample.
        needs_pillow: whether OpenCV cannot read it, or shows other pixels than :func:`raypar.images.decode` promises.
        orientation: 1 to 8, where the header itself says it: in TIFF. EXIF blocks are not read.
    """

    kind: str
    height: int
    width: int
    bits: int = 8
    needs_pillow: bool = False
    orientation: int = 1


def read_header(data: Any) -> Header:
    """The header of an encoded image, or of any buffer of one.

    Raises:
        ValueError: not an image of ``FORMATS``, a kind of pixels that has no meaning as 8 bits, or a JPEG of too many scans.
    """
    view = memoryview(data).cast("B")
    read = _reader(bytes(view[:32]))
    if read is None:
        raise ValueError(
            f"not an image that can be read: {len(view)} bytes that begin with {bytes(view[:8])!r} "
            f"are none of {', '.join(FORMATS)}"
        )
    try:
        header = read(view)
    except (struct.error, IndexError) as error:
        raise ValueError("not an image that can be read: its header is damaged") from error
    if header.height < 1 or header.width < 1:
        raise ValueError(
            f"not an image that can be read: its header says {header.width} x {header.height} px"
        )
    return header


def check_header(data: Any, max_pixels: int) -> Header:
    """The header of an image that may be decoded: cheap enough to call before anything else is done with the bytes.

    Raises:
        TooManyPixelsError: it has more than ``max_pixels`` pixels.
        ValueError: as :func:`read_header`.
    """
    header = read_header(data)
    if header.height * header.width > max_pixels:
        raise TooManyPixelsError(
            f"an image of {header.width} x {header.height} has more than {max_pixels} pixels"
        )
    return header


def _reader(begin: bytes) -> Callable[[memoryview], Header] | None:
    """The function that reads headers of the format that the first bytes are of."""
    if begin.startswith(b"\xff\xd8\xff"):
        return _read_jpeg
    if begin.startswith(b"\x89PNG\r\n\x1a\n"):
        return _read_png
    if begin[:4] == b"RIFF" and begin[8:12] == b"WEBP":
        return _read_webp
    if begin[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _read_tiff
    if begin.startswith(b"BM"):
        return _read_bmp
    if begin.startswith((b"\0\0\0\x0cjP  \r\n\x87\n", J2K_SIZE)):
        return _read_jpeg_2000
    if begin[4:8] == b"ftyp":
        return _read_avif
    return None


def _read_jpeg(view: memoryview) -> Header:
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = JPEG_MARKER.search(view, at, at + MAX_GAP)
        if found is None:
            break
        marker, at = view[found.end() - 1], found.end()
        if marker in WITHOUT_LENGTH:
            continue
        if marker in (SOS, EOI):
            break
        if marker in SIZE_MARKERS:
            bits, height, width = struct.unpack_from(">BHH", view, at + 2)
            if bits != 8:
                raise ValueError(f"pixels of {bits} bits in a JPEG cannot be read: save them with 8 bits")
            _check_scans(view, at)
            return Header("JPEG", height, width)
        at += struct.unpack_from(">H", view, at)[0]
    else:
        raise ValueError(
            f"not an image that can be read: a JPEG with more than {MAX_SEGMENTS} segments before its size"
        )
    raise ValueError("not an image that can be read: a JPEG that does not say its size")


def _check_scans(view: memoryview, at: int) -> None:
    """Refuses a JPEG of more scans than any encoder writes."""
    data = np.frombuffer(view, np.uint8)
    if np.count_nonzero((data[:-1] == 0xFF) & (data[1:] == SOS)) <= MAX_SCANS:
        return
    # Metadata may hold those two bytes too: go from segment to segment, up to the end of the (first) image.
    num_scans = 0
    for _ in range(MAX_SEGMENTS):
        found = _next_marker(view, at)
        if found is None or view[found.end() - 1] == EOI:
            return
        marker, at = view[found.end() - 1], found.end()
        num_scans += marker == SOS
        if num_scans > MAX_SCANS:
            break
        if marker not in WITHOUT_LENGTH:
            at += struct.unpack_from(">H", view, at)[0]
    raise ValueError(
        f"a JPEG of more than {MAX_SCANS} scans is not decoded: no camera or program writes so many; save it again"
    )


def _next_marker(view: memoryview, at: int) -> re.Match[bytes] | None:
    """The first marker from there on, in searches of ``MAX_GAP`` bytes, between which other threads get their turn."""
    for start in range(at, len(view), MAX_GAP):
        found = JPEG_MARKER.search(view, start, start + MAX_GAP + 1)
        if found is not None:
            return found
    return None


def _read_png(view: memoryview) -> Header:
    if bytes(view[12:16]) != b"IHDR":
        raise ValueError("not an image that can be read: a PNG that does not say its size")
    width, height, bits = struct.unpack_from(">IIB", view, 16)
    _check_chunks(view)
    return Header("PNG", height, width, bits)


def _check_chunks(view: memoryview) -> None:
    """Refuses a PNG of more chunks than any encoder writes: libpng prints a line for each that it does not like."""
    at, num_others = len(b"\x89PNG\r\n\x1a\n"), 0
    for _ in range(MAX_PNG_CHUNKS):
        if at + 8 > len(view):
            return
        num_bytes, name = struct.unpack_from(">I4s", view, at)
        num_others += name != b"IDAT"
        if num_others > MAX_SEGMENTS or name == b"IEND":
            break
        at += 12 + num_bytes
    if name != b"IEND":
        raise ValueError("not an image that can be read: a PNG of too many chunks")


def _read_bmp(view: memoryview) -> Header:
    if struct.unpack_from("<I", view, 14)[0] == 12:  # OS/2
        width, height = struct.unpack_from("<HH", view, 18)
    else:
        width, height = struct.unpack_from("<ii", view, 18)
    return Header("BMP", abs(height), width)  # a negative height: stored from the top


def _read_webp(view: memoryview) -> Header:
    chunk = bytes(view[12:16])
    if chunk == b"VP8X":
        width, height = (int.from_bytes(view[at : at + 3], "little") + 1 for at in (24, 27))
    elif chunk == b"VP8L":
        sizes = struct.unpack_from("<I", view, 21)[0]
        width, height = (sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1
    elif chunk == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", view, 26))
    else:
        raise ValueError("not an image that can be read: a WebP that does not say its size")
    return Header("WEBP", height, width)


def _read_jpeg_2000(view: memoryview) -> Header:
    at = 0
    if bytes(view[:4]) != J2K_SIZE:  # boxes around the codestream
        for _ in range(MAX_SEGMENTS):
            size, name = struct.unpack_from(">I4s", view, at)
            head = 8
            if size == 1:
                size, head = struct.unpack_from(">Q", view, at + 8)[0], 16
            if name == b"jp2c":
                at += head
                break
            at += max(size, head)
    if bytes(view[at : at + 4]) != J2K_SIZE:
        raise ValueError("not an image that can be read: a JPEG 2000 that does not say its size")
    right, bottom, left, top = struct.unpack_from(">IIII", view, at + 8)
    sample = view[at + 42]  # of the first channel
    bits = (sample & 0x7F) + 1
    if sample & 0x80 or bits > 16:
        kind = "signed integers" if sample & 0x80 else f"{bits} bits"
        raise ValueError(
            f"pixels of {kind} in a JPEG 2000 cannot be read: save them with 8 or 16 bits, unsigned"
        )
    return Header("JPEG2000", bottom - top, right - left, bits)


def _read_avif(view: memoryview) -> Header:
    import PIL.Image

    try:
        with PIL.Image.open(io.BytesIO(view), formats=["AVIF"]) as opened:
            return Header("AVIF", opened.height, opened.width, needs_pillow=True)
    except (
        Exception
    ) as error:  # Pillow's, or Ultralytics', which replaces this function by one that looks for HEIC
        brand = bytes(view[8:12]).decode("ascii", "replace").strip()
        raise ValueError(
            f"not an image that can be read: a file of type '{brand}' is no AVIF; HEIC is not read, save it as JPEG"
        ) from error


def _read_tiff(view: memoryview) -> Header:
    tags = _tiff_tags(view)
    width, height = tags.get(256, (0,))[0], tags.get(257, (0,))[0]
    bits = tags.get(258, (1,))
    num_channels = tags.get(277, (1,))[0]
    _check_tiff_pixels(tags, bits, num_channels)
    tile = tags.get(322, (0,))[0] * tags.get(323, (0,))[0]
    if tile > max(MAX_TILE_PIXELS, width * height):
        raise ValueError(f"not an image that can be read: a TIFF with tiles of {tile} pixels")
    is_alpha_apart = num_channels == 4 and tags.get(338, (0,))[0] == UNASSOCIATED_ALPHA
    # OpenCV reads no 2 and 4 bits, and multiplies colours by an alpha that they were not multiplied by
    needs_pillow = bits[0] in (2, 4) or is_alpha_apart
    orientation = tags.get(274, (1,))[0]
    return Header(
        "TIFF", height, width, bits[0], needs_pillow, orientation if orientation in range(1, 9) else 1
    )


def _check_tiff_pixels(tags: dict[int, tuple[int, ...]], bits: tuple[int, ...], num_channels: int) -> None:
    samples = tags.get(339, (1,))[0]
    colours = tags.get(262, (1,))[0]
    if samples in TIFF_SAMPLES:
        problem = f"{TIFF_SAMPLES[samples]} of {bits[0]} bits"
    elif bits[0] not in (1, 2, 4, 8, 16) or len(set(bits)) > 1:
        problem = f"{' + '.join(str(b) for b in dict.fromkeys(bits))} bits"
    elif num_channels > 4:
        problem = f"{num_channels} channels"
    elif colours not in TIFF_COLOURS:
        problem = (
            "raw sensor values" if colours in (32803, 34892) else f"photometric interpretation {colours}"
        )
    else:
        return
    raise ValueError(
        f"pixels of {problem} in a TIFF cannot be read: save them with 8 or 16 bits, unsigned, in grey or RGB"
    )


def _tiff_tags(view: memoryview) -> dict[int, tuple[int, ...]]:
    """The first values of each tag of the first page that holds whole numbers.

    Raises:
        ValueError: the tags hold more than the file does: who reads them all (Pillow) would read some bytes over and over.
    """
    order = "<" if bytes(view[:2]) == b"II" else ">"
    is_big = 43 in (view[2], view[3])
    place, count, entry, inline = ("Q", "Q", "HHQ8s", 8) if is_big else ("I", "H", "HHI4s", 4)
    at = struct.unpack_from(order + place, view, 8 if is_big else 4)[0]
    num_tags = struct.unpack_from(order + count, view, at)[0]
    if num_tags > MAX_TIFF_TAGS:
        raise ValueError(f"not an image that can be read: a TIFF with {num_tags} tags")
    at += struct.calcsize(order + count)
    tags: dict[int, tuple[int, ...]] = {}
    num_bytes = 0
    for i in range(num_tags):
        tag, kind, length, value = struct.unpack_from(
            order + entry, view, at + i * struct.calcsize("<" + entry)
        )
        size = TIFF_TYPE_BYTES.get(kind, 1) * length
        num_bytes += size
        if kind in TIFF_INTEGERS and length:
            values = f"{order}{min(length, 8)}{TIFF_INTEGERS[kind]}"
            where = struct.unpack(order + place, value)[0] if size > inline else 0
            tags[tag] = struct.unpack_from(values, view if size > inline else value, where)
    if num_bytes > 2 * len(view):
        raise ValueError("not an image that can be read: a TIFF whose tags are larger than the file")
    return tags
