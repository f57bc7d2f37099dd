"""Requests that are made to break a service, and what it must answer them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import PIL.Image

from raypar.images import encode_jpeg, encode_png
from tests.pictures import encode, jpeg_of_many_scans, png, segment

MB = 1 << 20
GREY = np.full((48, 64, 3), 114, np.uint8)
BIG = 0x4000  # px a side: 268 Mpx


@dataclass(frozen=True)
class Attack:
    """A request.

    Attributes:
        name: for people.
        statuses: one of these must come back.
        body: makes the bytes, or pieces of them, which are then sent without a length.
        headers: content type and others, raw.
    """

    name: str
    statuses: tuple[int, ...]
    body: Callable[[], bytes | Iterator[bytes]]
    headers: dict[str, bytes] = field(default_factory=lambda: {"Content-Type": b"image/jpeg"})

    def content(self) -> bytes | Iterator[bytes]:
        return self.body()


def photo(seed: int = 0) -> bytes:
    """A JPEG of coloured patches that nothing is wrong with."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return encode_jpeg(np.kron(small, np.ones((20, 20, 1), np.uint8)))


def jpeg_bomb() -> bytes:
    data = bytearray(encode_jpeg(GREY))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", BIG, BIG)
    return bytes(data)


def webp_bomb() -> bytes:
    sides = (BIG - 1).to_bytes(3, "little") * 2
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


def gif_bomb() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 0xFFFF, 0xFFFF) + encode(GREY, "GIF")[10:]


def tiff_bomb() -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(GREY).save(out, "TIFF", tiffinfo={})
    data = bytearray(out.getvalue())
    (directory,) = struct.unpack_from("<I", data, 4)
    (num_tags,) = struct.unpack_from("<H", data, directory)
    for at in range(directory + 2, directory + 2 + 12 * num_tags, 12):
        if struct.unpack_from("<H", data, at)[0] in (256, 257):
            struct.pack_into("<HII", data, at + 2, 4, 1, 100_000)
    return bytes(data)


def bmp_bomb() -> bytes:
    data = bytearray(encode(GREY, "BMP"))
    struct.pack_into("<ii", data, 18, 1 << 30, 1 << 30)
    return bytes(data)


def avif_bomb() -> bytes:
    data = bytearray(encode(GREY, "AVIF"))
    struct.pack_into(">II", data, data.index(b"ispe") + 8, BIG, BIG)
    return bytes(data)


def tiff_of_huge_tags() -> bytes:
    entries = b"".join(struct.pack("<HHII", tag, 4, 1 << 28, 8) for tag in range(1, 4001))
    return b"II*\0" + struct.pack("<IH", 8, 4000) + entries + bytes(4)


def png_of_many_chunks() -> bytes:
    data = encode_png(GREY)
    empty = struct.pack(">I", 0) + b"prIv" + struct.pack(">I", 0x1BB5B7C5)
    return data[:33] + empty * (15 * MB // len(empty)) + data[33:]


def form(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end


def image_part(data: bytes, name: bytes = b"image") -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"; filename="a.jpg"\r\n\r\n' + data


def text_part(name: bytes) -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"\r\n\r\ntext'


FORM = {"Content-Type": b"multipart/form-data; boundary=x"}

BOMBS = [
    Attack("PNG of 3.6 gigapixels", (413,), lambda: png(GREY[..., 0], 8, size=(60_000, 60_000))),
    Attack("JPEG of 268 megapixels", (413,), jpeg_bomb),
    Attack("WebP of 268 megapixels", (413,), webp_bomb),
    Attack("GIF of 4 gigapixels", (400,), gif_bomb),
    Attack("TIFF of 10 gigapixels", (413,), tiff_bomb),
    Attack("BMP of 10^18 pixels", (413,), bmp_bomb),
    Attack("AVIF of 268 megapixels", (400, 413), avif_bomb),
    Attack("black PNG of 49 megapixels, which is allowed", (200,), lambda: encode_png(np.zeros((7000, 7000, 3), np.uint8))),
]  # fmt: skip
SCANS = [
    Attack("JPEG of 5,000 scans", (400,), lambda: jpeg_of_many_scans(5000, 1024)),
]
HEADERS = [
    Attack("15 MB of empty JPEG segments", (400,), lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * (15 * MB // 4)),
    Attack("15 MB of large JPEG segments", (400,), lambda: b"\xff\xd8" + segment(0xE1, bytes(65_000)) * 240),
    Attack("15 MB of JPEG fill bytes", (400,), lambda: b"\xff\xd8" + b"\xff" * 15 * MB),
    Attack("PNG of a million chunks", (400,), png_of_many_chunks),
    Attack("TIFF of 4,000 tags of a gigabyte", (400,), tiff_of_huge_tags),
    Attack("nothing", (400,), lambda: b""),
    Attack("no image", (400,), lambda: b"\x89PNG\r\n\x1a\n"),
    Attack("half an image", (400,), lambda: encode_png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:3000]),
    Attack("a pickle", (400,), lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR."),
]  # fmt: skip
FORMS = [
    Attack("form of 100,000 parts", (400,), lambda: form(*[text_part(b"a")] * 100_000), FORM),
    Attack("field name of 1 MB", (400,), lambda: form(text_part(b"a" * MB)), FORM),
    Attack("header of 15 MB", (400,), lambda: b"--x\r\n" + b"a" * 15 * MB, FORM),
    Attack("15 MB of almost boundaries", (400,), lambda: form(image_part(b"\r\n--" * (15 * MB // 4))), FORM),
    Attack("form without end", (400,), lambda: form(image_part(photo()), end=b""), FORM),
    Attack("form without boundary", (400,), lambda: form(image_part(photo())), {"Content-Type": b"multipart/form-data"}),
    Attack("boundary of 500 characters", (400,), lambda: form(image_part(photo())), {"Content-Type": b"multipart/form-data; boundary=" + b"x" * 500}),
    Attack("two images", (422,), lambda: form(image_part(photo()), image_part(photo())), FORM),
    Attack("image under another name", (422,), lambda: form(image_part(photo(), b"picture")), FORM),
    Attack("text in the field image", (422,), lambda: form(text_part(b"image")), FORM),
    Attack("image of another type", (415,), photo, {"Content-Type": b"text/plain"}),
    Attack("no type", (415,), photo, {"Content-Type": b""}),
    Attack("type of 30 kB", (415,), photo, {"Content-Type": b"image/jpeg; " + b"a=b;" * 7500}),
    Attack("type that is no ASCII", (415,), photo, {"Content-Type": b"\xff\xfe"}),
    Attack("headers that are no ASCII", (200,), photo, {"Content-Type": b"image/jpeg", "X-Request-Id": b"\xff", "Authorization": b"Bearer \xff"}),
]  # fmt: skip
BODIES = [
    Attack("64 MB without a length", (413,), lambda: (bytes(MB) for _ in range(64))),
    Attack("17 MB with a length", (413,), lambda: bytes(17 * MB)),
    Attack("form of 64 MB without a length", (413,), lambda: (bytes(MB) for _ in range(64)), FORM),
]
ATTACKS = BOMBS + SCANS + HEADERS + FORMS + BODIES
