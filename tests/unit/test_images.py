"""Encoded bytes -> pixels: the same in every verb, upright, 8 bits; at a part of the size; and what is refused before it is decoded."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo
from ultralytics.utils.patches import imread

from raypar import image_header, images
from raypar.dataset.ingest import read_picture
from raypar.image_header import MAX_SCANS, TooManyPixelsError, check_header
from raypar.images import decode, decode_shrunk, encode_jpeg, encode_png, header_hw, is_turned, shrink
from tests import pictures


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


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_as_by_ultralytics_and_alike_in_every_verb(
    kind: str, orientation: int, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(pictures.with_orientation(kind, orientation))
    expected = imread(path)
    assert expected is not None
    found = decode(path.read_bytes())
    np.testing.assert_array_equal(found, expected[..., ::-1])
    prepared = read_picture(str(path), 10**6)
    assert prepared.image_hw == found.shape[:2] == ((60, 100) if orientation < 5 else (100, 60))
    assert np.abs(decode(prepared.data).astype(int) - found).mean() < 3
    assert bool(prepared.repairs) == is_turned(path.read_bytes()) == (orientation != 1)
    # and whoever reads it without a thought of EXIF sees the same
    as_stored = cv2.imdecode(
        np.frombuffer(prepared.data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    assert np.abs(as_stored.astype(int) - found).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "JPEG2000"])
def test_an_orientation_in_xmp_alone_turns_nothing(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tiffinfo": {700: pictures.XMP}} if kind == "TIFF" else {"xmp": pictures.XMP}
    if kind == "PNG":
        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", pictures.XMP.decode())
        options = {"pnginfo": text}
    data = pictures.encode(pictures.corners(), kind, **options)
    if kind == "JPEG2000":  # in a box of its own, at the end
        body = bytes.fromhex("be7acfcb97a942e89c71999491e3afac") + pictures.XMP
        data += (len(body) + 8).to_bytes(4, "big") + b"uuid" + body
    assert pictures.XMP in data or kind == "PNG"
    path = tmp_path / "a"
    path.write_bytes(data)
    prepared = read_picture(str(path), 10**6)
    assert prepared.repairs == ()
    for found in (decode(data), decode(prepared.data)):
        assert np.abs(found.astype(int) - pictures.corners()).mean() < 6


def test_a_tiff_that_pillow_reads_is_not_turned_by_its_xmp() -> None:
    alpha = np.dstack([pictures.corners(), np.full((60, 100), 9, np.uint8)])
    data = pictures.encode(alpha, "TIFF", tiffinfo={700: pictures.XMP})
    np.testing.assert_array_equal(decode(data), pictures.corners())


RAMP = np.tile(np.linspace(0, 255, 100), (60, 1))
READABLE = {
    "PNG of 1 bit": pictures.png(RAMP > 127, 1),
    "PNG of 2 bits": pictures.png(np.rint(RAMP / 85), 2),
    "PNG of 4 bits": pictures.png(np.rint(RAMP / 17), 4),
    "PNG of 16 bits": pictures.png(RAMP * 257, 16),
    "PNG of 16 bits, RGB": pictures.png(np.repeat(RAMP[..., None] * 257, 3, 2), 16, 2),
    "PNG of 16 bits, clear": pictures.png(np.stack([RAMP * 257, RAMP * 0 + 9], -1), 16, 4),
    "TIFF of 1 bit": pictures.tiff(RAMP > 127, bits=1),
    "TIFF of 2 bits": pictures.tiff(np.rint(RAMP / 85), bits=2),
    "TIFF of 4 bits": pictures.tiff(np.rint(RAMP / 17), bits=4),
    "TIFF of 16 bits": pictures.tiff((RAMP * 257).astype(np.uint16)),
    "TIFF, clear": pictures.tiff(
        np.dstack([RAMP, RAMP, RAMP, RAMP * 0 + 3]).astype(np.uint8), tags=((338, 2),)
    ),
    "TIFF of 16 bits, clear": pictures.tiff(
        (np.dstack([RAMP, RAMP, RAMP, RAMP * 0 + 3]) * 257).astype(np.uint16), tags=((338, 2),)
    ),
}
for mode, kinds in {
    "1": "PNG TIFF BMP", "L": "JPEG PNG TIFF BMP WEBP AVIF JPEG2000", "LA": "PNG TIFF WEBP AVIF JPEG2000", "P": "PNG TIFF BMP", "PA": "TIFF",
    "RGBA": "PNG TIFF WEBP AVIF JPEG2000", "CMYK": "JPEG TIFF JPEG2000", "YCbCr": "JPEG TIFF", "LAB": "TIFF",
}.items():  # fmt: skip
    grey = PIL.Image.fromarray(RAMP.astype(np.uint8))
    shown = PIL.Image.merge("LAB", [grey, *[grey.point(lambda _: 128)] * 2]) if mode == "LAB" else grey if mode == "L" else (
        grey.convert("RGB").convert(mode) if mode not in ("LA", "PA", "1") else grey.convert(mode))  # fmt: skip
    for kind in kinds.split():
        out = io.BytesIO()
        shown.save(out, kind)
        READABLE[f"{kind} {mode}"] = out.getvalue()


@pytest.mark.parametrize("name", READABLE)
def test_every_kind_of_pixels_shows_what_was_drawn(name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(READABLE[name])
    prepared = read_picture(str(tmp_path / "a"), 10**6)
    # few values, dithered or rounded: on the whole the ramp
    for found in (decode(READABLE[name]), decode(prepared.data)):
        assert found.shape == (60, 100, 3)
        assert found.min() < 30
        assert found.max() > 240
        means = found.reshape(60, 10, 10, 3).mean((0, 2, 3))
        expected = RAMP.reshape(60, 10, 10).mean((0, 2))
        assert np.abs(means - expected).max() < (135 if "1 bit" in name else 45 if "2 bits" in name else 16)


REFUSED = {
    "floating-point numbers of 32 bits": pictures.tiff((RAMP / 255).astype(np.float32), sample=3),
    "floating-point numbers of 64 bits": pictures.tiff(np.dstack([RAMP] * 3), sample=3),
    "floating-point numbers of 16 bits": pictures.tiff(RAMP.astype(np.float16), sample=3),
    "signed integers of 8 bits": pictures.tiff((RAMP - 128).astype(np.int8), sample=2),
    "signed integers of 16 bits": pictures.tiff((RAMP * 100).astype(np.int16), sample=2),
    "signed integers of 32 bits": pictures.encode((RAMP * 1e6).astype(np.int32), "TIFF"),
    "of 32 bits": pictures.tiff((RAMP * 1e7).astype(np.uint32)),
    "of 12 bits": pictures.tiff(RAMP * 16, bits=12),
    "5 channels": pictures.tiff(np.dstack([RAMP] * 5).astype(np.uint8), tags=((338, 0),)),
    "raw sensor values": pictures.tiff((RAMP * 257).astype(np.uint16), photometric=32803),
    "16 bits that use only the lowest 12": pictures.tiff((RAMP * 16).astype(np.uint16)),
    "16 bits that use only the lowest 12 ": pictures.png(RAMP * 16, 16),
    "of 12 bits in a JPEG": b"\xff\xd8" + pictures.segment(0xC1, b"\x0c\0\x40\0\x40\1\1\x11\0") + b"\xff\xd9",
    "none of AVIF, BMP, JPEG": pictures.encode(RAMP.astype(np.uint8), "GIF"),
    "type 'heic' is no AVIF": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_8_bits_cannot_show_is_refused_with_the_reason_in_every_verb(
    reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(REFUSED[reason])
    with pytest.raises(ValueError, match=reason.strip()):
        decode(REFUSED[reason])
    with pytest.raises(ValueError, match=reason.strip()):
        read_picture(str(tmp_path / "a"), 10**6)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = pictures.jpeg_of_many_scans(MAX_SCANS - 1), pictures.jpeg_of_many_scans(5000, side=4000)
    assert decode(good).shape == (64, 64, 3)
    assert len(bad) < 200_000
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    (tmp_path / "a.jpg").write_bytes(bad)
    for refused in (decode, header_hw, is_turned, lambda data: check_header(data, 10**9), lambda data: decode_shrunk(data, 320),
                    lambda _: read_picture(str(tmp_path / "a.jpg"), 10**9)):  # fmt: skip
        with pytest.raises(ValueError, match="more than 100 scans"):
            refused(bad)


def test_scans_are_those_of_the_image_itself() -> None:
    jpeg = encode_jpeg(picture(64, 64))
    thumbnails = pictures.segment(0xE2, b"\xff\xda\0\2" * 200)
    assert header_hw(jpeg[:2] + thumbnails + jpeg[2:]) == (64, 64)
    assert header_hw(jpeg + pictures.jpeg_of_many_scans(500)) == (
        64,
        64,
    )  # a second image behind it is not decoded


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {
        kind: pictures.encode(picture(40, 50), kind)
        for kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "BMP", "JPEG2000")
    }
    exact["WEBP lossless"] = pictures.encode(picture(40, 50), "WEBP", lossless=True)
    exact["WEBP with EXIF"] = pictures.with_orientation("WEBP", 6, picture(40, 50))
    for name, data in exact.items():
        assert header_hw(data) == (40, 50), name
        assert header_hw(np.frombuffer(data, np.uint8)) == (40, 50), name
        assert check_header(data, 2000).width == 50
        assert decode(data, 2000).shape in ((40, 50, 3), (50, 40, 3))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    for data in [*exact.values(), pictures.png(RAMP, 8, size=(60_000, 60_000))]:
        with pytest.raises(TooManyPixelsError, match="has more than 1999 pixels"):
            decode(data, 1999)


def test_a_header_costs_nothing_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    num_steps = 0
    search = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])").search

    class Counted:
        @staticmethod
        def search(*args: Any) -> Any:
            nonlocal num_steps
            num_steps += 1
            return search(*args)

    monkeypatch.setattr(image_header, "JPEG_MARKER", Counted)
    jpeg = encode_jpeg(picture(64, 64))
    with pytest.raises(ValueError, match="4096 segments"):
        header_hw(jpeg[:2] + pictures.segment(0xFE, b"") * 3_700_000 + jpeg[2:])
    assert num_steps <= image_header.MAX_SEGMENTS
    # 15 MB of honest metadata are passed over in a few steps
    assert header_hw(jpeg[:2] + pictures.segment(0xFE, bytes(65_000)) * 230 + jpeg[2:]) == (64, 64)
    # a TIFF whose 4000 tags all name the same million bytes
    tags = b"".join(struct.pack("<HHII", 40_000 + i, 7, 10**6, 8) for i in range(4000))
    for many in (65_535, 4000):
        bomb = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", many) + tags + bytes(10**6)
        with pytest.raises(ValueError, match=r"TIFF (with 65535 tags|whose tags are larger)"):
            header_hw(bomb)


@given(st.sampled_from(sorted(READABLE)), st.integers(0, 400), st.binary(max_size=8))
def test_damaged_bytes_are_the_files_fault(name: str, at: int, damage: bytes) -> None:
    data = READABLE[name]
    for damaged in (data[:at], data[:at] + damage + data[at + len(damage) :]):
        with contextlib.suppress(ValueError):
            assert decode(damaged, 10**6).shape[2] == 3
