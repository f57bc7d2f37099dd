"""Encoded images for tests, byte by byte where no library writes them: TIFFs of any kind of pixels, PNGs, JPEGs of many scans."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"><tiff:Orientation>6</tiff:Orientation>'
    b"</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def corners(height: int = 60, width: int = 100) -> NDArray[np.uint8]:
    """Grey, with a red square on the top left and a blue one on the bottom right: no turn and no mirror leaves it as it is."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[: height // 3, : width // 5] = (250, 10, 10)
    image[-height // 3 :, -width // 5 :] = (10, 10, 250)
    return image


def encode(image: NDArray[Any], kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def with_orientation(kind: str, orientation: int, image: NDArray[np.uint8] | None = None) -> bytes:
    """With an EXIF orientation (AVIF: also as its own ``irot`` and ``imir``)."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "TIFF" else {"exif": exif}
    return encode(corners() if image is None else image, kind, **options)


def tiff(
    pixels: NDArray[Any],
    *,
    bits: int | None = None,
    sample: int = 1,
    photometric: int | None = None,
    tags: tuple[tuple[int, int], ...] = (),
) -> bytes:
    """One uncompressed strip of an array (H, W) or (H, W, C) of any type.

    Args:
        pixels: fewer than 8 ``bits`` a pixel are packed, rows padded to whole bytes.
        bits: of a sample; None: as the array has.
        sample: 1 unsigned, 2 signed, 3 floating-point.
        photometric: None: 2 for 3 or 4 channels, else 1.
        tags: further ones, each a short.
    """
    height, width = pixels.shape[:2]
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    bits = bits or pixels.itemsize * 8
    data = pixels.tobytes() if bits == pixels.itemsize * 8 else packed(pixels, bits)
    entries: list[tuple[int, int, list[int]]] = [
        (256, 4, [width]), (257, 4, [height]), (258, 3, [bits] * channels), (259, 3, [1]),
        (262, 3, [2 if channels in (3, 4) else 1] if photometric is None else [photometric]), (273, 4, [0]), (277, 3, [channels]),
        (278, 4, [height]), (279, 4, [len(data)]), (339, 3, [sample] * channels), *((tag, 3, [value]) for tag, value in tags),
    ]  # fmt: skip
    entries.sort()
    begin = 8 + 2 + 12 * len(entries) + 4
    size, code = {3: 2, 4: 4}, {3: "H", 4: "I"}
    place = begin + sum(size[kind] * len(v) for _, kind, v in entries if size[kind] * len(v) > 4)
    directory = outside = b""
    for tag, kind, values in entries:
        written = struct.pack(f"<{len(values)}{code[kind]}", *([place] if tag == 273 else values))
        if len(written) > 4:
            written, outside = struct.pack("<I", begin + len(outside)), outside + written
        directory += struct.pack("<HHI", tag, kind, len(values)) + written.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + b"\0\0\0\0" + outside + data


def packed(values: NDArray[Any], bits: int) -> bytes:
    """Rows of ``bits`` bits a value, the highest first."""
    shifts = np.arange(bits - 1, -1, -1)
    rows = ((values.astype(np.int64)[..., None] >> shifts) & 1).astype(np.uint8).reshape(len(values), -1)
    return np.packbits(rows, axis=1).tobytes()


def png(values: NDArray[Any], bits: int, colour: int = 0, *, size: tuple[int, int] | None = None) -> bytes:
    """A PNG of any depth and colour type; ``size`` (height, width) is what its header says, true or not."""
    height, width = size or values.shape[:2]
    flat = values.reshape(len(values), -1)
    row_bytes = -(-flat.shape[1] * bits // 8)
    body = packed(flat, bits)
    rows = b"".join(b"\0" + body[i : i + row_bytes] for i in range(0, len(body), row_bytes))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def segment(marker: int, body: bytes) -> bytes:
    """A JPEG's marker with what belongs to it."""
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_of_many_scans(num_scans: int, side: int = 64) -> bytes:
    """A grey progressive JPEG: one scan for the means of its squares, then as many as asked for that say "nothing here"."""
    num_squares = (-(-side // 8)) ** 2
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"
    one_code = bytes([1] + [0] * 15)  # of one bit
    out = b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(0xC2, frame)
    out += segment(0xC4, b"\x00" + one_code + b"\0") + segment(0xC4, b"\x10" + one_code + b"\xe0")
    out += segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-num_squares // 8))
    # a run of 2^15 - 1 empty squares: the code's one bit, then 14 that count
    bits = ("0" + "1" * 14) * -(-num_squares // 32767)
    bits += "1" * (-len(bits) % 8)
    run = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    return out + (segment(0xDA, b"\1\1\0\1\x3f\0") + run) * num_scans + b"\xff\xd9"
