"""The image out of a request: the body itself or a form's field ``image``, with every limit enforced while it arrives.

Runs in: the ingress replicas, or any ASGI server. What looks at an image's bytes runs on a few threads, never on the event loop: a client
decides how long that takes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.exceptions import HTTPException

from raypar.image_header import TooManyPixelsError, check_header
from raypar.serve.problem import RETRY_AFTER, bad_image

T = TypeVar("T")

FORM_OVERHEAD_BYTES = 64 << 10  # boundaries and headers around an image that is sent as a form
MAX_PARTS = 9
MAX_TYPE_LENGTH = 1000  # of Content-Type; longer ones are not read
THREADS = 2

MALFORMED = "the form is malformed: send multipart/form-data with the image in its field 'image'"


@dataclass(frozen=True)
class Limits:
    """What the service accepts, and the defaults of the query parameters."""

    max_image_bytes: int = 16 << 20
    max_pixels: int = 50_000_000
    max_held_bytes: int = 1 << 30
    request_timeout_s: float = 30.0
    conf: float = 0.25
    iou: float = 0.7
    max_det: int = 300


class _Memory:
    """Counts the bytes that all requests hold."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held_bytes = max_bytes, 0

    @contextlib.contextmanager
    def share(self) -> Iterator[_Share]:
        """What one request holds, until the context ends."""
        share = _Share(self)
        try:
            yield share
        finally:
            self.held_bytes -= share.held_bytes


class _Share:
    """Counts the bytes that one request holds."""

    def __init__(self, memory: _Memory) -> None:
        self._memory, self.held_bytes = memory, 0

    def add(self, num_bytes: int) -> None:
        self.held_bytes += num_bytes
        self._memory.held_bytes += num_bytes
        if self._memory.held_bytes > self._memory.max_bytes:
            headers = RETRY_AFTER | {"Connection": "close"}
            raise HTTPException(503, "the images that wait already fill the service's memory", headers)


class Receiver:
    """Receives images within limits.

    Args:
        limits: sizes and times.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._memory = _Memory(limits.max_held_bytes)
        self._threads = ThreadPoolExecutor(THREADS, "received")

    @contextlib.asynccontextmanager
    async def image(self, request: Request, deadline: float) -> AsyncIterator[bytes]:
        """The encoded image, whose header is that of an image of an accepted size; its bytes count as held until the context ends.

        Args:
            request: whose body was not read yet.
            deadline: of the loop's clock.

        Raises:
            HTTPException: the body is too large, too slow, no form or of another type.
            BadImageError: the header is not an image's.
        """
        with self._memory.share() as share:
            try:
                async with asyncio.timeout_at(deadline):
                    image = await self._receive(request, share)
            except TimeoutError:
                seconds = f"{self._limits.request_timeout_s:g} s"
                raise HTTPException(408, f"the image did not come within {seconds}") from None
            yield image

    async def _receive(self, request: Request, share: _Share) -> bytes:
        boundary = _boundary(request)
        if boundary is None:
            image = await self._read(request, share, self._limits.max_image_bytes)
        else:
            body = await self._read(request, share, self._limits.max_image_bytes + FORM_OVERHEAD_BYTES)
            image = await self._in_thread(_form_image, body, boundary)
        if len(image) > self._limits.max_image_bytes:
            raise self._too_large()
        if not image:
            raise HTTPException(400, "the image is empty")
        await self._in_thread(_check_header, image, self._limits.max_pixels)
        return image

    async def _read(self, request: Request, share: _Share, max_bytes: int) -> bytes:
        """The body; reading ends at the first byte too many."""
        if _announced_bytes(request) > max_bytes:
            raise self._too_large()
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > max_bytes:
                raise self._too_large()
            share.add(len(chunk))
            body += chunk
        return bytes(body)

    def _too_large(self) -> HTTPException:
        detail = f"the image has more than {self._limits.max_image_bytes} bytes"
        return HTTPException(413, detail, {"Connection": "close"})

    async def _in_thread(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _boundary(request: Request) -> bytes | None:
    """What separates the parts of the form; ``None``: the body is the image itself."""
    text = request.headers.get("content-type", "")
    kind, options = parse_options_header(text) if len(text) <= MAX_TYPE_LENGTH else (b"", {})
    if kind.startswith(b"image/"):
        return None
    if kind != b"multipart/form-data":
        raise HTTPException(
            415,
            "Content-Type must be image/* with the image as the body (image/jpeg ...), or multipart/form-data with the image as its field 'image'",
        )
    if not options.get(b"boundary"):
        raise HTTPException(400, "the form's Content-Type names no boundary")
    return options[b"boundary"]


def _announced_bytes(request: Request) -> int:
    """Content-Length; 0 where there is none, or none that is a number."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


class _ImageField:
    """What a multipart parser calls: keeps the bytes of the file in the field ``image``."""

    def __init__(self) -> None:
        self.image = bytearray()
        self.num_images = self.num_parts = 0
        self.is_whole = False
        self._name, self._value = bytearray(), bytearray()
        self._is_image = False

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """By the names that the parser knows them by."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": self._add,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._is_image = False
        self.num_parts += 1
        if self.num_parts > MAX_PARTS:
            raise HTTPException(400, f"the form has more than {MAX_PARTS} parts")

    def _end_header(self) -> None:
        if self._name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            if options.get(b"name") == b"image" and b"filename" in options:
                self._is_image = True
                self.num_images += 1
        self._name.clear()
        self._value.clear()

    def _end(self) -> None:
        self.is_whole = True

    def _add(self, data: bytes, start: int, end: int) -> None:
        if self._is_image:
            self.image += data[start:end]


def _form_image(body: bytes, boundary: bytes) -> bytes:
    """The file in a form's field ``image``."""
    field = _ImageField()
    try:
        parser = MultipartParser(boundary, field.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise HTTPException(400, MALFORMED) from None
    if not field.is_whole:
        raise HTTPException(400, MALFORMED)
    if field.num_images != 1:
        found = "no file" if field.num_images == 0 else "several files"
        raise HTTPException(422, f"the form has {found} in its field 'image': send one image a request")
    return bytes(field.image)


def _check_header(image: bytes, max_pixels: int) -> None:
    """Refuses what is no image, or has too many pixels, before a pixel is decoded."""
    try:
        check_header(image, max_pixels)
    except TooManyPixelsError as error:
        raise HTTPException(413, str(error)) from None
    except ValueError as error:
        raise bad_image(error) from None
