"""A ring of decoded images on the device, and what fills it: one decode serves an image's about four uses.

Runs in: training workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raypar.augment.paint import GREY
from raypar.images import decode, resized_hw, shrink

Item = TypeVar("Item")
Made = TypeVar("Made")
MAX_DECODE_THREADS = 16


class Ring:
    """Decoded images in one tensor, each in a slot of its own.

    Args:
        capacity: number of slots.
        imgsz: longest side of an image, px.
        device: where it lives.
        is_enlarged: whether small images are brought to ``imgsz`` when put in, as a renderer needs for maps that turn, shear or tilt
            (``not recipe.is_axis_aligned``).

    Attributes:
        pixels: uint8 (capacity, imgsz, imgsz, 4): red, green, blue and nothing, so that a pixel is one word; an image lies in the upper
            left corner, what is beyond it is undefined.
        words: int32 (capacity * imgsz * imgsz,), the same memory.
        hws: of each slot's image, px; on the host.
    """

    def __init__(self, capacity: int, imgsz: int, device: torch.device | str, *, is_enlarged: bool = False):
        self.imgsz, self.is_enlarged = imgsz, is_enlarged
        self.pixels = torch.zeros((capacity, imgsz, imgsz, 4), dtype=torch.uint8, device=device)
        self.words = self.pixels.view(torch.int32).view(-1)
        self.hws: list[tuple[int, int]] = [(0, 0)] * capacity

    @property
    def num_bytes(self) -> int:
        return self.pixels.numel()

    def put(self, slots: Sequence[int], images: Sequence[Tensor | NDArray[np.uint8]]) -> None:
        """Writes images uint8 (H, W, 3) RGB, H and W at most ``imgsz``; the caller's stream does it."""
        for slot, given in zip(slots, images, strict=True):
            image = (torch.from_numpy(given) if isinstance(given, np.ndarray) else given).to(self.pixels.device, non_blocking=True)
            if self.is_enlarged:
                image = resize(image, resized_hw((image.shape[0], image.shape[1]), self.imgsz))
            height, width = image.shape[:2]
            self.pixels[slot, :height, :width, :3] = image
            self.hws[slot] = height, width


def resize(image: Tensor, hw: tuple[int, int]) -> Tensor:
    """uint8 (H, W, 3) at another size by bilinear interpolation, as ``cv2.resize``; itself if it has that size."""
    if tuple(image.shape[:2]) == hw:
        return image
    planes = image.permute(2, 0, 1)[None].float()
    return (F.interpolate(planes, hw, mode="bilinear", align_corners=False)[0] + 0.5).to(torch.uint8).permute(1, 2, 0)


def decode_batch(encoded: Sequence[Any], image_hws: Sequence[tuple[int, int]], imgsz: int,
                 device: torch.device | str) -> tuple[list[Tensor], list[int]]:  # fmt: skip
    """Decodes images for a ring: on a GPU baseline JPEGs there, the others, and on a CPU all, in threads.

    Args:
        encoded: bytes, or buffers of them.
        image_hws: px, as stored with the images.
        imgsz: larger images are shrunk to it.
        device: of the result.

    Returns:
        uint8 (H, W, 3) RGB tensors on the device (where they were decoded in threads: on the host), and which of them could not be
        decoded or have not the size they should: those are grey, so that a batch's geometry does not depend on them.
    """
    found: list[Tensor | None] = [None] * len(encoded)
    if torch.device(device).type == "cuda":
        baseline = [i for i, data in enumerate(encoded) if is_baseline_jpeg(data)]
        for i, image in zip(baseline, _decode_on_gpu([encoded[i] for i in baseline], torch.device(device)), strict=False):
            hw = image.shape[0], image.shape[1]
            found[i] = resize(image, resized_hw(hw, imgsz)) if max(hw) > imgsz else image
    left = [i for i, image in enumerate(found) if image is None]
    for i, pixels in zip(left, _pool().map(lambda i: _decode_on_cpu(encoded[i], imgsz), left), strict=True):
        found[i] = pixels
    images, grey = [], []
    for i, (made, (height, width)) in enumerate(zip(found, image_hws, strict=True)):
        expected = resized_hw((height, width), imgsz) if max(height, width) > imgsz else (height, width)
        if made is None or tuple(made.shape[:2]) != expected:
            grey.append(i)
            made = torch.full((*expected, 3), GREY, dtype=torch.uint8)
        images.append(made)
    return images, grey


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_DECODE_THREADS, len(os.sched_getaffinity(0))), "decode")


def _decode_on_cpu(data: Any, imgsz: int) -> Tensor | None:
    try:
        return torch.from_numpy(shrink(decode(data), imgsz))
    except ValueError:
        return None


def _decode_on_gpu(encoded: Sequence[Any], device: torch.device) -> list[Tensor]:
    """All images uint8 (H, W, 3), or none: nvJPEG, through torchvision's operator, gives no part of a list with a damaged image."""
    if not encoded:
        return []
    try:
        from torchvision.io import ImageReadMode  # loads the operator, whose Python wrapper is deprecated and says so each time

        data = [torch.from_numpy(np.frombuffer(one, np.uint8).copy()) for one in encoded]
        stream = torch.cuda.current_stream(device)
        # The decoder writes on a stream of its own, which waits for nobody: not for those who still read what this memory was before.
        stream.synchronize()
        planes = torch.ops.image.decode_jpegs_cuda(data, ImageReadMode.RGB.value, device)
        stream.synchronize()  # until here it may read the bytes
    except (ImportError, AttributeError, RuntimeError):  # no torchvision, one without nvJPEG, or an image it refuses
        return []
    return [image.permute(1, 2, 0) for image in planes]


def is_baseline_jpeg(data: Any) -> bool:
    """Whether bytes are a JPEG whose frame is sequential: what a GPU's decoder takes (progressive ones fall back to its CPU path)."""
    view = memoryview(data).cast("B")
    if len(view) < 4 or view[0] != 0xFF or view[1] != 0xD8:
        return False
    at = 2
    while at + 4 <= len(view) and view[at] == 0xFF:
        marker = view[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            return marker in (0xC0, 0xC1)
        at += 1 if marker == 0xFF else 2 + (view[at + 2] << 8 | view[at + 3])
    return False


def prefetched(items: Iterable[Item], prepare: Callable[[Item], Made], device: torch.device | str) -> Iterator[Made]:
    """Prepares each item while the one before is in use: in a thread, and on a GPU on a stream of its own.

    Args:
        items: taken in the caller's thread, one ahead.
        prepare: makes a tensor, or a dict, list or tuple with tensors; runs in the thread, one item at a time and in order.
        device: of the tensors.

    Yields:
        What was made. On a GPU the caller's current stream waits for it; the host does not.
    """
    device = torch.device(device)
    side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(device))  # for what prepare will use: a ring that was just made

    def work(item: Item) -> tuple[Made, Any]:
        if side is None:
            return prepare(item), None
        with torch.cuda.device(device), torch.cuda.stream(side):
            made = prepare(item)
            return made, side.record_event()

    def hand_over(waiting: Future[tuple[Made, Any]]) -> Made:
        made, is_ready = waiting.result()
        if side is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(is_ready)
            for tensor in _tensors(made):
                tensor.record_stream(stream)  # else its memory might be given away while the caller's stream still reads it
        return made

    waiting: Future[tuple[Made, Any]] | None = None
    with ThreadPoolExecutor(1, "prefetch") as thread:
        for item in items:
            following = thread.submit(work, item)
            if waiting is not None:
                yield hand_over(waiting)
            waiting = following
        if waiting is not None:
            yield hand_over(waiting)


def _tensors(made: Any) -> Iterator[Tensor]:
    if isinstance(made, Tensor):
        if made.is_cuda:
            yield made
    elif isinstance(made, dict | list | tuple):
        for part in made.values() if isinstance(made, dict) else made:
            yield from _tensors(part)
