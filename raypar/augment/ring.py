"""A ring of decoded images on the device, and what fills it: one decode serves an image's about four uses.

Runs in: training workers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from raypar.augment.paint import GREY
from raypar.images import decode_shrunk, encode_jpeg, resized_hw

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
            image = (torch.from_numpy(given) if isinstance(given, np.ndarray) else given).to(
                self.pixels.device, non_blocking=True
            )
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
    return (
        (F.interpolate(planes, hw, mode="bilinear", align_corners=False)[0] + 0.5)
        .to(torch.uint8)
        .permute(1, 2, 0)
    )


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
        for i, image in zip(
            baseline, _decode_on_gpu([encoded[i] for i in baseline], torch.device(device)), strict=False
        ):
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
        return torch.from_numpy(decode_shrunk(data, imgsz))
    except ValueError:
        return None


def _decode_on_gpu(encoded: Sequence[Any], device: torch.device) -> list[Tensor]:
    """All images uint8 (H, W, 3), or none: nvJPEG gives no part of a list with an image that it refuses."""
    if not encoded or not has_nvjpeg(device):
        return []
    try:
        return _nvjpeg(encoded, device)
    except RuntimeError:
        return []


@cache
def has_nvjpeg(device: torch.device) -> bool:
    """Whether JPEGs can be decoded on the device; says once in a process why not."""
    try:
        _nvjpeg([encode_jpeg(np.full((16, 16, 3), GREY, np.uint8))], device)
    # no torchvision, one without it, a driver that lacks it
    except (ImportError, AttributeError, RuntimeError) as error:
        print(
            f"train.augment=gpu: images are decoded on the CPU, in threads; nvJPEG cannot be had: {' '.join(str(error).split())[:200]}",
            flush=True,
        )
        return False
    return True


def _nvjpeg(encoded: Sequence[Any], device: torch.device) -> list[Tensor]:
    """uint8 (H, W, 3) each, through torchvision's operator."""
    # loads the operator, whose Python wrapper is deprecated and says so each time
    from torchvision.io import ImageReadMode

    # read only, of which torch warns once
    data = [torch.from_numpy(np.frombuffer(one, np.uint8)) for one in encoded]
    stream = torch.cuda.current_stream(device)
    # The decoder writes on a stream of its own, which waits for nobody: not for those who still read what this memory was before.
    stream.synchronize()
    planes = torch.ops.image.decode_jpegs_cuda(data, ImageReadMode.RGB.value, device)
    stream.synchronize()  # until here it may read the bytes
    return [image.permute(1, 2, 0) for image in planes]


def is_baseline_jpeg(data: Any) -> bool:
    """Whether bytes are a whole sequential JPEG of 8 bits, grey or YCbCr: what a GPU's decoder takes and shows as the CPU's does.

    It would decode progressive ones on the CPU, one at a time, show part of a truncated one, and take every three components for YCbCr.
    """
    view = memoryview(data).cast("B")
    if len(view) < 4 or bytes(view[:2]) != b"\xff\xd8" or bytes(view[-2:]) != b"\xff\xd9":
        return False
    at = 2
    while at + 4 <= len(view) and view[at] == 0xFF:
        marker, size = view[at + 1], view[at + 2] << 8 | view[at + 3]
        # a start of frame: precision, height, width, components
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = view[at + 4 : at + 2 + size]
            return (
                marker in (0xC0, 0xC1)
                and len(frame) >= 9
                and frame[0] == 8
                and (frame[5] == 1 or (frame[5] == 3 and frame[6] != ord("R")))
            )
        if marker == 0xEE and bytes(view[at + 4 : at + 9]) == b"Adobe" and size >= 14 and view[at + 15] == 0:
            return False  # its components are not turned into YCbCr
        at += 1 if marker == 0xFF else 2 + size
    return False
