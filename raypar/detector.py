"""Weights + images -> detections: the only path from one to the other, for evaluate, predict, export, serve and training's validation.

Runs in: Ray Data actors, Serve replicas, training workers. An image is letterboxed to its own smallest rectangle, so that its result
does not depend on which images share its batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import torch
import torchvision  # noqa: F401  (Ultralytics' NMS uses torchvision's when it is loaded)
from numpy.typing import NDArray
from torch import nn
from ultralytics.utils.nms import non_max_suppression

from raypar.boxes import clip
from raypar.images import Image, decode, resized_hw
from raypar.precision import pick_device, pick_precision

GREY = 114  # of the padding, as in Ultralytics
HASH_CHUNK_BYTES = 8 << 20
T = TypeVar("T", float, int)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, surest first.

    Attributes:
        boxes_xyxy: float32 (N, 4), px of the original image.
        class_ids: int32 (N,).
        confidences: float32 (N,), in [0, 1].
        image_hw: of the original image.
    """

    boxes_xyxy: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    confidences: NDArray[np.float32]
    image_hw: tuple[int, int]


@dataclass
class Letterboxed:
    """Images that were resized and padded to one shape.

    Attributes:
        images: uint8 (B, 3, h, w) RGB, on the CPU.
        indices: where each was in the list that was given.
        gains: float32 (4,) each: px here for one px of the original, for x, y, x, y.
        pads: float32 (2,) each: px to the left of and above the image.
        image_hws: of the originals.
    """

    images: torch.Tensor
    indices: list[int]
    gains: list[NDArray[np.float32]]
    pads: list[NDArray[np.float32]]
    image_hws: list[tuple[int, int]]


@dataclass(frozen=True)
class Place:
    """Where a resized image lies: its size, and the size of the rectangle around it (px, height first)."""

    inner_hw: tuple[int, int]
    outer_hw: tuple[int, int]

    @property
    def left_top(self) -> tuple[int, int]:
        """As Ultralytics' LetterBox: half of the padding, rounded so that an odd pixel goes to the right or the bottom."""
        spare_h, spare_w = self.outer_hw[0] - self.inner_hw[0], self.outer_hw[1] - self.inner_hw[1]
        return round(spare_w / 2 - 0.1), round(spare_h / 2 - 0.1)


class Detector:
    """A model and the settings it detects with.

    Args:
        model: a detection model in evaluation mode, on its device, or Ultralytics' ``AutoBackend``.
        class_names: in the order of class ids.
        imgsz: px of the longer side; rounded up to a multiple of the stride.
        stride: of the model: rectangles are multiples of it.
        device: where the model is.
        precision: of the forward pass: fp32, bf16, fp16 or auto (``raypar.precision``).
        conf: boxes at or below this confidence are dropped.
        iou: overlap above which NMS drops the weaker box.
        max_det: boxes kept an image.
        pad: 0.0 follows ``YOLO.predict``: sizes rounded, one class a box, boxes clipped to the image. 0.5 follows ``YOLO.val``:
            half a stride more around the image, sizes rounded up, every class of a box above conf, boxes not clipped.
        square: letterbox to imgsz x imgsz whatever the image's shape (exports with a fixed input).
    """

    def __init__(self, model: nn.Module, class_names: Sequence[str], *, imgsz: int, stride: int = 32, device: torch.device | str = "cpu",
                 precision: str = "fp32", conf: float = 0.25, iou: float = 0.7, max_det: int = 300, pad: float = 0.0,
                 square: bool = False):  # fmt: skip
        self.model, self.class_names = model, list(class_names)
        self.stride, self.imgsz = stride, math.ceil(imgsz / stride) * stride
        self.device = torch.device(device)
        self.dtype = pick_precision(precision, self.device, is_inference=True)
        self.conf, self.iou, self.max_det = conf, iou, max_det
        self.pad, self.square, self.is_validating = pad, square, pad > 0
        self.is_end2end = bool(getattr(model, "end2end", False))
        self.sha256 = ""  # of the weights, when they were loaded from a file

    @classmethod
    def load(cls, weights: str | Path, *, device: torch.device | str = "auto", precision: str = "fp32", imgsz: int | None = None,
             conf: float = 0.25, iou: float = 0.7, max_det: int = 300, pad: float = 0.0) -> Detector:  # fmt: skip
        """Reads weights (``.pt``, or an export that Ultralytics' ``AutoBackend`` runs) and detects once to warm up.

        Args:
            weights: a local file, or folder for the formats that are folders.
            device: ``auto`` is this process's GPU if it has one.
            precision: of ``.pt`` weights; an export computes as it was exported.
            imgsz: nothing: as trained or exported.

        Raises:
            ValueError: no such file, it cannot be read, or it does not detect boxes.
        """
        device = pick_device("auto") if device == "auto" else torch.device(device)
        model = _backend(Path(weights), device)
        is_pt = model.format == "pt"
        native = model.backend.model
        fixed = None if is_pt or model.dynamic else tuple(model.imgsz)
        if fixed and fixed[0] != fixed[1]:
            raise ValueError(f"{weights} was exported for images of {fixed[1]} x {fixed[0]} px: export it with one imgsz")
        if fixed and imgsz not in {None, fixed[0]}:
            raise ValueError(f"{weights} was exported for imgsz {fixed[0]}, not {imgsz}: leave imgsz out, or export with dynamic: true")
        trained = _trained_imgsz(native if is_pt else model)
        if is_pt and model.end2end and hasattr(native, "set_head_attr"):
            native.set_head_attr(max_det=max_det)  # the head picks its boxes itself
        class_names = [model.names[i] for i in range(len(model.names))]
        found = cls(model, class_names, imgsz=fixed[0] if fixed else imgsz or trained, stride=max(int(model.stride), 1),
                    device=model.device, precision=precision if is_pt else "fp32", conf=conf, iou=iou, max_det=max_det, pad=pad,
                    square=fixed is not None)  # fmt: skip
        found.sha256 = sha256_of(weights)
        found.warm_up()
        return found

    def warm_up(self) -> None:
        """Detects in one grey image, so that the first real one does not pay for set-up."""
        self([np.full((self.imgsz, self.imgsz, 3), GREY, np.uint8)])

    def __call__(self, images: Sequence[bytes | Image], *, conf: float | Sequence[float] | None = None,
                 iou: float | Sequence[float] | None = None, max_det: int | Sequence[int] | None = None) -> list[Detections]:  # fmt: skip
        """Detections of each image, in order.

        Args:
            images: encoded bytes, or uint8 (H, W, 3) RGB.
            conf: for all images, or one an image; nothing: the detector's. So are iou and max_det.

        Raises:
            ValueError: an image cannot be decoded.
        """
        each = [_each(given, own, len(images)) for given, own in ((conf, self.conf), (iou, self.iou))]
        limits = _each(max_det, self.max_det, len(images))
        found: dict[int, Detections] = {}
        for group in self.letterbox(images):
            chosen = [[values[i] for i in group.indices] for values in each]
            detections = self.postprocess(self.forward(group.images), group, *chosen, [limits[i] for i in group.indices])
            found.update(zip(group.indices, detections, strict=True))
        return [found[i] for i in range(len(images))]

    def letterbox(self, images: Sequence[bytes | Image]) -> list[Letterboxed]:
        """Decodes, resizes and pads images, and groups those that end with the same shape.

        Args:
            images: encoded bytes, or uint8 (H, W, 3) RGB.

        Raises:
            ValueError: an image cannot be decoded.
        """
        decoded = [image if isinstance(image, np.ndarray) else decode(image) for image in images]
        hws = [(image.shape[0], image.shape[1]) for image in decoded]
        places = [self.place(hw) for hw in hws]
        groups = []
        for outer_hw in dict.fromkeys(place.outer_hw for place in places):
            mine = [i for i, place in enumerate(places) if place.outer_hw == outer_hw]
            slab = np.full((len(mine), *outer_hw, 3), GREY, np.uint8)
            for row, i in zip(slab, mine, strict=True):
                (height, width), (left, top) = places[i].inner_hw, places[i].left_top
                image = decoded[i]
                if hws[i] != (height, width):
                    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
                row[top : top + height, left : left + width] = image
            inner = [places[i].inner_hw for i in mine]
            gains = [np.array([w / hws[i][1], h / hws[i][0]] * 2, np.float32) for i, (h, w) in zip(mine, inner, strict=True)]
            pads = [np.array(places[i].left_top, np.float32) for i in mine]
            groups.append(Letterboxed(torch.from_numpy(slab).permute(0, 3, 1, 2), mine, gains, pads, [hws[i] for i in mine]))
        return groups

    def place(self, image_hw: tuple[int, int]) -> Place:
        """Where an image of that size goes: LetterBox(auto=True) of ``YOLO.predict``, or ``load_image`` and rect of ``YOLO.val``."""
        if self.is_validating:
            inner = resized_hw(image_hw, self.imgsz)
        else:
            ratio = min(self.imgsz / image_hw[0], self.imgsz / image_hw[1])
            inner = max(round(image_hw[0] * ratio), 1), max(round(image_hw[1] * ratio), 1)
        if self.square:
            return Place(inner, (self.imgsz, self.imgsz))
        if not self.is_validating:
            return Place(inner, (self._up(inner[0]), self._up(inner[1])))
        longest = max(image_hw)  # as set_rectangle: by the original's aspect, not by the rounded size
        height, width = (math.ceil(side / longest * self.imgsz / self.stride + self.pad) * self.stride for side in image_hw)
        return Place(inner, (height, width))

    def forward(self, images: torch.Tensor) -> Any:
        """The model's raw output.

        Args:
            images: uint8 (B, 3, h, w) RGB.
        """
        with torch.no_grad(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs = images.to(self.device, non_blocking=True).float().div_(255)
            return self.model(inputs)

    def postprocess(self, raw: Any, group: Letterboxed, conf: float | Sequence[float] | None = None,
                    iou: float | Sequence[float] | None = None, max_det: int | Sequence[int] | None = None) -> list[Detections]:  # fmt: skip
        """Ultralytics' NMS, then boxes in the pixels of the originals; in the order of ``group.indices``.

        An image's result is the same as with its own thresholds alone: boxes below one image's confidence never suppress
        boxes above it, so NMS runs once for each distinct iou, at the lowest confidence.

        Args:
            raw: what ``forward`` returned for the group.
            conf: for the group, or one an image in the group's order; nothing: the detector's. So are iou and max_det.
        """
        size = len(group.indices)
        confs, ious, limits = _each(conf, self.conf, size), _each(iou, self.iou, size), _each(max_det, self.max_det, size)
        prediction = (raw[0] if isinstance(raw, list | tuple) else raw).float()
        found: dict[int, Detections] = {}
        for value in dict.fromkeys(ious):
            mine = [i for i in range(size) if ious[i] == value]
            rows = non_max_suppression(
                prediction if len(mine) == size else prediction[mine], min(confs[i] for i in mine), value, multi_label=self.is_validating,
                max_det=max(limits[i] for i in mine), end2end=self.is_end2end, max_time_img=math.inf)  # fmt: skip
            for i, kept in zip(mine, rows, strict=True):
                kept = kept[kept[:, 4] > confs[i]][: limits[i]].cpu().numpy()
                found[i] = self._original(kept, group.gains[i], group.pads[i], group.image_hws[i])
        return [found[i] for i in range(size)]

    def _original(self, rows: NDArray[np.float32], gain: NDArray[np.float32], pad: NDArray[np.float32], image_hw: tuple[int, int]) -> Detections:
        boxes = (rows[:, :4] - np.tile(pad, 2)) / gain
        boxes = boxes if self.is_validating else clip(boxes, image_hw)
        return Detections(boxes.astype(np.float32), rows[:, 5].astype(np.int32), rows[:, 4].astype(np.float32), image_hw)

    def _up(self, side: int) -> int:
        return math.ceil(side / self.stride) * self.stride


def sha256_of(weights: str | Path) -> str:
    """Hex digest of a file, or of a folder's files with their names."""
    path, digest = Path(weights), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as opened:
            while chunk := opened.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _backend(weights: Path, device: torch.device) -> Any:
    """Ultralytics' AutoBackend for a file; whatever goes wrong in it is the file's fault."""
    from ultralytics.nn.autobackend import AutoBackend

    if not weights.exists():
        raise ValueError(f"no weights at {weights}")
    try:
        model = AutoBackend(str(weights), device=device, verbose=False)
    except Exception as error:
        raise ValueError(f"{weights} cannot be read as weights: {type(error).__name__}: {error}") from error
    model.eval()
    task = model.task or getattr(model.backend.model, "task", None) or "detect"
    if task != "detect":
        raise ValueError(f"{weights} is a model for '{task}': raypar's detector runs detection models")
    return model


def _trained_imgsz(model: Any) -> int:
    """imgsz of a checkpoint's training arguments, or of an export's metadata."""
    args = getattr(model, "args", None)
    size = args.get("imgsz") if isinstance(args, dict) else getattr(model, "imgsz", None)
    return int(max(size) if isinstance(size, list | tuple) else size or 640)


def _each(given: T | Sequence[T] | None, own: T, size: int) -> list[T]:
    """One value an image."""
    if given is None:
        return [own] * size
    if isinstance(given, Sequence):
        assert len(given) == size, f"{len(given)} thresholds for {size} images"
        return list(given)
    return [given] * size
