"""Weights + images -> detections: the only inference path. ``evaluate``, ``predict``, ``serve`` and training's validation use it.

Runs in: Ray Data actors, Serve replicas, training workers. Each image is letterboxed to its own smallest rectangle, so that its
result does not depend on the images it is batched with.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.utils.nms import non_max_suppression

from raypar.boxes import clip_xyxy
from raypar.images import decode
from raypar.precision import pick_precision

GREY = 114
Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Detections:
    """What was found in one image, most confident first.

    Attributes:
        boxes_xyxy: float32 (N, 4), px of the original image.
        class_ids: int32 (N,).
        confidences: float32 (N,).
        image_hw: of the original image, px.
    """

    boxes_xyxy: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    confidences: NDArray[np.float32]
    image_hw: tuple[int, int]


@dataclass
class Letterboxed:
    """Images of one shape, ready for the model. A point p of an original lies at ``p * gain + pad``.

    Attributes:
        images: uint8 (B, 3, h, w) RGB, on the CPU.
        indices: positions of the images in the list that they came from.
        gains: for each image float64 (2,), of x and y.
        pads: for each image float64 (2,), px to the left and above.
        image_hws: of the originals.
    """

    images: Tensor
    indices: list[int]
    gains: list[NDArray[np.float64]]
    pads: list[NDArray[np.float64]]
    image_hws: list[tuple[int, int]]


class Detector:
    """A model and its settings.

    Args:
        model: an Ultralytics model in evaluation mode, or its AutoBackend.
        class_names: by class id.
        imgsz: px of the longer side that the model sees.
        stride: of the model; image sides are multiples of it.
        device: where the model is.
        precision: of the forward pass.
        conf: boxes below this confidence are dropped.
        iou: overlap above which NMS drops the weaker box.
        max_det: boxes kept an image.
        evaluating: letterbox and count labels as Ultralytics' validator does (half a stride of padding, several classes a box);
            otherwise as its predictor does.
        square: letterbox to imgsz x imgsz (exports with a fixed shape).
    """

    def __init__(self, model: Any, class_names: Sequence[str], *, imgsz: int, stride: int = 32, device: str | torch.device = "cpu",
                 precision: torch.dtype = torch.float32, conf: float = 0.25, iou: float = 0.7, max_det: int = 300,
                 evaluating: bool = False, square: bool = False):  # fmt: skip
        self.model, self.class_names, self.stride, self.device = model, list(class_names), stride, torch.device(device)
        self.imgsz = math.ceil(imgsz / stride) * stride
        self.precision, self.conf, self.iou, self.max_det = precision, conf, iou, max_det
        self.evaluating, self.square = evaluating, square
        self.task = "detect"

    @classmethod
    def load(cls, weights: str | Path, *, device: str | torch.device = "cpu", precision: str = "fp32", imgsz: int | None = None,
             **settings: Any) -> Detector:  # fmt: skip
        """A warmed-up detector from a local file: ``.pt``, or an export that Ultralytics' AutoBackend loads.

        Args:
            weights: local path.
            device: ``cpu`` or ``cuda:N``.
            precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
            imgsz: px; by default as trained.
            **settings: conf, iou, max_det, evaluating.

        Raises:
            ValueError: the file cannot be read, or is not a detection model.
        """
        device, path = torch.device(device), Path(weights)
        if not path.exists():
            raise ValueError(f"weights {path} do not exist")
        try:
            detector = cls._torch(path, device, precision, imgsz, settings) if path.suffix == ".pt" else cls._export(path, device, imgsz, settings)
        except Exception as error:
            raise ValueError(f"weights {path} cannot be read: {' '.join(str(error).split())[:300]}") from error
        detector([np.full((detector.imgsz, detector.imgsz, 3), GREY, np.uint8)])
        return detector

    @classmethod
    def _torch(cls, path: Path, device: torch.device, precision: str, imgsz: int | None, settings: dict[str, Any]) -> Detector:
        from ultralytics.nn.tasks import load_checkpoint

        model, _ = load_checkpoint(path, device=device, fuse=True)
        if model.task != "detect":
            raise ValueError(f"it is a model for '{model.task}', not 'detect'")
        dtype = pick_precision(precision, device)
        if dtype != torch.float32:
            model.to(memory_format=torch.channels_last)
        args = model.args if isinstance(model.args, dict) else vars(model.args)
        return cls(model, list(model.names.values()), imgsz=imgsz or args.get("imgsz", 640), stride=max(int(model.stride.max()), 32),
                   device=device, precision=dtype, **settings)  # fmt: skip

    @classmethod
    def _export(cls, path: Path, device: torch.device, imgsz: int | None, settings: dict[str, Any]) -> Detector:
        from ultralytics.nn.autobackend import AutoBackend

        model = AutoBackend(str(path), device=device, fp16=False)
        trained = model.imgsz if isinstance(model.imgsz, int) else max(model.imgsz)
        return cls(model, list(model.names.values()), imgsz=imgsz or trained, stride=max(int(model.stride), 32), device=device,
                   square=not getattr(model, "dynamic", False), **settings)  # fmt: skip

    def __call__(self, images: Sequence[bytes | Image], *, conf: float | Sequence[float] | None = None,
                 iou: float | Sequence[float] | None = None, max_det: int | Sequence[int] | None = None) -> list[Detections]:  # fmt: skip
        """Detections of each image, in order.

        Args:
            images: encoded bytes, or uint8 (H, W, 3) RGB; any sizes.
            conf, iou, max_det: for all images, or one for each; by default the detector's.

        Raises:
            ValueError: an image cannot be decoded.
        """
        thresholds = list(zip(*(_for_each(x, default, len(images)) for x, default in
                                ((conf, self.conf), (iou, self.iou), (max_det, self.max_det))), strict=True))  # fmt: skip
        found: list[Detections | None] = [None] * len(images)
        for group in self.letterbox(images):
            raw = self.forward(group.images)
            for detections, i in zip(self.postprocess(raw, group, [thresholds[i] for i in group.indices]), group.indices, strict=True):
                found[i] = detections
        return [d for d in found if d is not None]

    def letterbox(self, images: Sequence[bytes | Image]) -> list[Letterboxed]:
        """Decodes, resizes and pads images, grouped by the shape that they get."""
        groups: dict[tuple[int, int], list[tuple[int, Image, NDArray[np.float64], NDArray[np.float64], tuple[int, int]]]] = defaultdict(list)
        for i, data in enumerate(images):
            image = data if isinstance(data, np.ndarray) else decode(data)
            boxed, gain, pad = self._letterbox(image)
            groups[boxed.shape[0], boxed.shape[1]].append((i, boxed, gain, pad, (image.shape[0], image.shape[1])))
        return [
            Letterboxed(torch.from_numpy(np.stack([b for _, b, *_ in members]).transpose(0, 3, 1, 2).copy()), [m[0] for m in members],
                        [m[2] for m in members], [m[3] for m in members], [m[4] for m in members])
            for members in groups.values()
        ]  # fmt: skip

    def _letterbox(self, image: Image) -> tuple[Image, NDArray[np.float64], NDArray[np.float64]]:
        """One image as Ultralytics' LetterBox makes it, the gain (2,) and the pad (2,) of x and y."""
        height, width = image.shape[:2]
        ratio = self.imgsz / max(height, width)
        if self.evaluating:  # BaseDataset.load_image
            w, h = (min(math.ceil(side * ratio), self.imgsz) if ratio != 1 else side for side in (width, height))
        else:  # LetterBox(auto=True)
            w, h = (max(round(side * ratio), 1) for side in (width, height))
        extra = 0.5 if self.evaluating else 0.0
        full_w, full_h = (self.imgsz if self.square else math.ceil(side * ratio / self.stride + extra) * self.stride for side in (width, height))
        full_w, full_h = max(full_w, math.ceil(w / self.stride) * self.stride), max(full_h, math.ceil(h / self.stride) * self.stride)
        if (w, h) != (width, height):
            image = cv2.resize(image, (w, h), interpolation=cv2.INTER_LINEAR)
        left, top = round((full_w - w) / 2 - 0.1), round((full_h - h) / 2 - 0.1)
        boxed = cv2.copyMakeBorder(image, top, full_h - h - top, left, full_w - w - left, cv2.BORDER_CONSTANT, value=(GREY,) * 3)
        gain = np.array([w / width, h / height]) if self.evaluating else np.array([ratio, ratio])
        return boxed, gain, np.array([left, top], np.float64)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """The model's raw output for uint8 (B, 3, h, w) RGB."""
        x = images.to(self.device, non_blocking=True).float() / 255
        if self.precision == torch.float32:
            return self.model(x)
        with torch.autocast(self.device.type, self.precision):
            return self.model(x.to(memory_format=torch.channels_last))

    def postprocess(self, raw: Any, group: Letterboxed, thresholds: Sequence[tuple[float, float, int]] | None = None) -> list[Detections]:
        """NMS, and boxes brought back to the originals; one result for each image of the group.

        Args:
            raw: of :meth:`forward`.
            group: the images that it is of.
            thresholds: for each image (conf, iou, max_det); by default the detector's.
        """
        thresholds = thresholds or [(self.conf, self.iou, self.max_det)] * len(group.indices)
        output = (raw[0] if isinstance(raw, list | tuple) else raw).float()
        found: list[Detections | None] = [None] * len(group.indices)
        for setting in sorted(set(thresholds)):  # usually one: NMS runs once for the batch
            mine = [k for k, t in enumerate(thresholds) if t == setting]
            conf, iou, max_det = setting
            kept = non_max_suppression(output[mine].clone(), conf, iou, multi_label=self.evaluating, max_det=max_det,
                                       max_time_img=10.0, end2end=getattr(self.model, "end2end", False))  # fmt: skip
            for k, rows in zip(mine, kept, strict=True):
                found[k] = _restored(rows.cpu().numpy(), group.gains[k], group.pads[k], group.image_hws[k])
        return [d for d in found if d is not None]


def _restored(rows: NDArray[np.float32], gain: NDArray[np.float64], pad: NDArray[np.float64], image_hw: tuple[int, int]) -> Detections:
    boxes = ((rows[:, :4] - np.tile(pad, 2)) / np.tile(gain, 2)).astype(np.float32)
    return Detections(clip_xyxy(boxes, image_hw), rows[:, 5].astype(np.int32), rows[:, 4].astype(np.float32), image_hw)


def _for_each(value: Any, default: Any, count: int) -> list[Any]:
    if value is None:
        value = default
    values = list(value) if isinstance(value, Sequence) else [value] * count
    assert len(values) == count, (len(values), count)
    return values
