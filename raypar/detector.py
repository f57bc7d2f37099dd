"""Weights + images -> detections: the only way from the one to the other.

Runs in: training workers (validation), Ray Data actors (evaluate, predict), Serve replicas. An image is letterboxed by its own
shape alone, and images of equal shape share a forward pass: no answer depends on the other images of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from ultralytics.utils.nms import non_max_suppression

from raypar.boxes import clip
from raypar.images import Image, decode
from raypar.precision import pick_device, pick_precision
from raypar.weights import read_model

GREY = 114  # of the border, as in Ultralytics' LetterBox
Threshold = float | Sequence[float]


@dataclass(frozen=True)
class Detections:
    """What was found in an image, most confident first.

    Attributes:
        boxes_xyxy: float32 (N, 4) px of the original image; inside it, unless they are for metrics.
        class_ids: int32 (N,).
        confidences: float32 (N,) in [0, 1].
        image_hw: height and width of the original image, px.
    """

    boxes_xyxy: NDArray[np.float32]
    class_ids: NDArray[np.int32]
    confidences: NDArray[np.float32]
    image_hw: tuple[int, int]

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True)
class Letterboxed:
    """Images of one shape, ready for the model. ``boxes_letterboxed = boxes_xyxy * gain + np.tile(pad, 2)``.

    Attributes:
        images: uint8 (B, 3, h, w) RGB.
        indices: of each image among those that were given.
        gains: each float32 (4,): scale of x, y, x, y.
        pads: each float32 (2,): border on the left and on top, px.
        image_hws: height and width of the originals, px.
    """

    images: Tensor
    indices: list[int]
    gains: list[NDArray[np.float32]]
    pads: list[NDArray[np.float32]]
    image_hws: list[tuple[int, int]]


class Detector:
    """A model and how its answers are read.

    Args:
        model: detection model; its weights are not changed.
        class_names: in the order of class ids.
        imgsz: px of the longer side; rounded up to a multiple of ``stride``.
        stride: of the model's coarsest level, px.
        device: where the model is.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``; boxes are always decoded in fp32.
        conf: boxes below this confidence are dropped.
        iou: overlap above which NMS drops the weaker box.
        max_det: boxes kept an image.
        pad: border in strides: 0 is the letterbox of ``YOLO.predict``, 0.5 that of ``YOLO.val``.
        evaluating: whether the answers are for metrics, as in ``YOLO.val``: a box may count for several classes, and may reach
            beyond the image (labels end at its edge, so clipping would flatter the overlap). Nothing: where there is a ``pad``.
        square: whether every image is padded to ``imgsz`` x ``imgsz``.

    Raises:
        ValueError: the precision is not for this device.
    """

    def __init__(self, model: nn.Module, class_names: Sequence[str], *, imgsz: int, stride: int = 32, device: str | torch.device = "cpu",
                 precision: str = "fp32", conf: float = 0.25, iou: float = 0.7, max_det: int = 300, pad: float = 0.0,
                 evaluating: bool | None = None, square: bool = False):  # fmt: skip
        self.class_names, self.stride = list(class_names), stride
        self.imgsz = math.ceil(imgsz / stride) * stride
        self.device = torch.device(device)
        self.precision = pick_precision(precision, self.device)
        self.conf, self.iou, self.max_det = conf, iou, max_det
        self.pad, self.square, self.evaluating = pad, square, pad > 0 if evaluating is None else evaluating
        self.task = "detect"
        self.sha256 = ""  # of the weights, where they came from a file
        self.is_end2end = bool(getattr(model, "end2end", False))
        self.model = model.eval() if self.precision == torch.float32 else _lowered(model, self.precision)

    @classmethod
    def load(cls, weights: str | Path, *, device: str | torch.device = "cpu", precision: str = "fp32", imgsz: int | None = None,
             conf: float = 0.25, iou: float = 0.7, max_det: int = 300, pad: float = 0.0, task: str = "detect",
             trusted: bool = False) -> Self:  # fmt: skip
        """A detector from a local ``.pt``, or from anything that Ultralytics' ``AutoBackend`` loads (ONNX, OpenVINO ...).

        Args:
            weights: local path.
            device: where it runs; ``auto``: a GPU if this process has one.
            imgsz: px; nothing: as trained or exported.
            task: that the weights are for; of others than detect only :meth:`letterbox` and :meth:`forward` have a meaning.
            trusted: whether code that a ``.pt`` holds may run.

        Raises:
            ValueError: there is no such file, it cannot be read, or it is for another task, size or precision.
        """
        device = pick_device("auto") if device == "auto" else torch.device(device)
        if not Path(weights).exists():
            raise ValueError(f"there are no weights at {weights}")
        try:
            if str(weights).endswith(".pt"):
                found = _read_pt(str(weights), device, trusted=trusted)
            else:
                found = _read_export(str(weights), device)
        except Exception as error:  # whatever unpickling foreign bytes, or a runtime, raises
            raise ValueError(
                f"weights {weights} cannot be read: {' '.join(str(error).split())[:300] or type(error).__name__}"
            ) from error
        if found.task != task:
            raise ValueError(f"weights {weights} are for '{found.task}', not for '{task}'")
        if task != "detect" and (found.is_export or precision not in ("auto", "fp32")):
            raise ValueError(f"weights {weights} are for '{task}', which is computed from a .pt in fp32 only")
        if found.is_fixed and imgsz not in (None, found.imgsz):
            raise ValueError(
                f"{weights} was exported for imgsz {found.imgsz}, not {imgsz}: leave imgsz out, or export it again"
            )
        if found.is_export:
            if precision not in ("auto", "fp32"):
                raise ValueError(
                    f"{weights} computes as it was exported: leave precision at auto, or export with half=true"
                )
            precision = "fp32"
        if found.head_limit is not None:
            found.head_limit.set_head_attr(max_det=max_det)
        detector = cls(found.model, found.class_names, imgsz=imgsz or found.imgsz, stride=found.stride, device=device,
                       precision=precision, conf=conf, iou=iou, max_det=max_det, pad=pad, square=found.is_fixed)  # fmt: skip
        detector.sha256 = sha256_of(weights)
        return detector

    def __call__(self, images: Sequence[bytes | Image], *, conf: Threshold | None = None, iou: Threshold | None = None,
                 max_det: int | Sequence[int] | None = None) -> list[Detections]:  # fmt: skip
        """Detections of each image, in the order given.

        Args:
            images: encoded bytes, or uint8 (H, W, 3) RGB.
            conf, iou, max_det: one value, or one an image; nothing: the detector's own.

        Raises:
            ValueError: an image cannot be decoded.
        """
        found: list[Detections | None] = [None] * len(images)
        for group in self.letterbox(images):
            mine = [_picked(value, group.indices) for value in (conf, iou, max_det)]
            for i, detections in zip(
                group.indices, self.postprocess(self.forward(group.images), group, *mine), strict=True
            ):
                found[i] = detections
        return [detections for detections in found if detections is not None]

    def letterbox(self, images: Sequence[bytes | Image]) -> list[Letterboxed]:
        """Scales and pads each image by its own shape, and puts those of equal shape together.

        Raises:
            ValueError: an image cannot be decoded.
        """
        shapes: dict[tuple[int, int], list[int]] = {}
        decoded = [image if isinstance(image, np.ndarray) else decode(image) for image in images]
        for i, image in enumerate(decoded):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
                raise ValueError(f"image {i} is {image.dtype} {image.shape}: it must be uint8 (H, W, 3) RGB")
            shapes.setdefault(self._sizes(image.shape[0], image.shape[1])[1], []).append(i)
        return [
            self._group([decoded[i] for i in indices], indices, shape) for shape, indices in shapes.items()
        ]

    def _sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Height and width of the scaled image, and of the letterbox around it.

        Without ``pad`` the sides are rounded as in Ultralytics' ``LetterBox``, with it as in its ``load_image`` and ``set_rectangle``.
        """
        ratio = self.imgsz / max(height, width)
        if self.pad == 0:
            scaled = max(round(height * ratio), 1), max(round(width * ratio), 1)
            exact: tuple[float, float] = scaled
        else:
            scaled = min(math.ceil(height * ratio), self.imgsz), min(math.ceil(width * ratio), self.imgsz)
            exact = height * ratio, width * ratio
        if self.square:
            return scaled, (self.imgsz, self.imgsz)
        boxed = [math.ceil(side / self.stride + self.pad) * self.stride for side in exact]
        return scaled, (boxed[0], boxed[1])

    def _group(self, images: list[Image], indices: list[int], shape: tuple[int, int]) -> Letterboxed:
        height, width = shape
        slab = np.full((len(images), 3, height, width), GREY, np.uint8)
        gains, pads, hws = [], [], []
        for i, image in enumerate(images):
            hw = image.shape[0], image.shape[1]
            (tall, wide), _ = self._sizes(*hw)
            scaled = (
                image
                if hw == (tall, wide)
                else cv2.resize(image, (wide, tall), interpolation=cv2.INTER_LINEAR)
            )
            top, left = round((height - tall) / 2 - 0.1), round((width - wide) / 2 - 0.1)
            slab[i, :, top : top + tall, left : left + wide] = scaled.transpose(2, 0, 1)
            gains.append(np.array([wide / hw[1], tall / hw[0]] * 2, np.float32))
            pads.append(np.array([left, top], np.float32))
            hws.append(hw)
        return Letterboxed(torch.from_numpy(slab), indices, gains, pads, hws)

    def forward(self, images: Tensor) -> Any:
        """The model's own output for uint8 (B, 3, h, w) RGB: what an Ultralytics model returns in evaluation mode."""
        with torch.no_grad():
            return self.model(images.to(self.device).to(self.precision) / 255)

    def postprocess(self, raw: Any, group: Letterboxed, conf: Threshold | None = None, iou: Threshold | None = None,
                    max_det: int | Sequence[int] | None = None) -> list[Detections]:  # fmt: skip
        """NMS, image by image, and boxes back into the pixels of the originals.

        Args:
            raw: of :meth:`forward`.
            group: the images that it is of.
            conf, iou, max_det: one value, or one for each image of the group; nothing: the detector's own.
        """
        import torchvision  # noqa: F401  # Ultralytics takes its NMS if it is imported: always, then; here: it takes half a second

        output: Tensor = raw[0] if isinstance(raw, list | tuple) else raw
        count = len(group.indices)
        confs = _spread(self.conf if conf is None else conf, count)
        ious = _spread(self.iou if iou is None else iou, count)
        limits = _spread(self.max_det if max_det is None else max_det, count)
        found = []
        # NMS has a time limit for a whole batch, after which the rest of it gets no boxes: none here
        for i in range(count):
            kept = non_max_suppression(output[i : i + 1].float(), confs[i], ious[i], multi_label=self.evaluating, max_det=int(limits[i]),
                                       max_time_img=math.inf, end2end=self.is_end2end)[0].cpu().numpy()  # fmt: skip
            height, width = group.image_hws[i]
            boxes = (kept[:, :4] - np.tile(group.pads[i], 2)) / group.gains[i]
            if not self.evaluating:
                boxes = clip(boxes, (height, width))
            found.append(
                Detections(
                    boxes.astype(np.float32),
                    kept[:, 5].astype(np.int32),
                    kept[:, 4].astype(np.float32),
                    (height, width),
                )
            )
        return found

    def warm_up(self, batch: int = 1) -> None:
        """Runs the model once on a square batch, so that the first request does not pay for it."""
        self.forward(torch.full((batch, 3, self.imgsz, self.imgsz), GREY, dtype=torch.uint8))


@dataclass(frozen=True)
class _Read:
    """A model file, read."""

    model: nn.Module
    class_names: list[str]
    imgsz: int
    stride: int
    task: str
    is_export: bool = False
    is_fixed: bool = False  # takes only imgsz x imgsz
    head_limit: Any = None  # the model itself, where it has no NMS and limits the boxes in its head


def _read_pt(weights: str, device: torch.device, *, trusted: bool) -> _Read:
    model = read_model(weights, trusted=trusted, device=device)
    imgsz = model.args["imgsz"]
    if hasattr(model, "fuse"):
        model = model.fuse(verbose=False)
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    has_limit = getattr(model, "end2end", False) and hasattr(model, "set_head_attr")
    return _Read(model, _names(model.names), max(imgsz) if isinstance(imgsz, list | tuple) else int(imgsz),
                 max(int(model.stride.max()), 32), model.task, head_limit=model if has_limit else None)  # fmt: skip


def _read_export(weights: str, device: torch.device) -> _Read:
    from ultralytics.nn.autobackend import AutoBackend

    model = AutoBackend(weights, device=device, verbose=False)
    is_fixed = not getattr(model, "dynamic", False)
    imgsz = getattr(model, "imgsz", 640)
    sides = {int(side) for side in (imgsz if isinstance(imgsz, list | tuple) else [imgsz])}
    if is_fixed and len(sides) > 1:
        raise ValueError(
            f"it takes images of {imgsz} px, and raypar pads to squares: export it with one imgsz"
        )
    return _Read(
        model,
        _names(model.names),
        max(sides),
        int(model.stride),
        str(model.task or "detect"),
        is_export=True,
        is_fixed=is_fixed,
    )


def sha256_of(weights: str | Path) -> str:
    """Hex digest of a weights file; of a folder (OpenVINO ...), of its files in the order of their names."""
    path, digest = Path(weights), hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                while chunk := opened.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _names(names: Any) -> list[str]:
    return (
        [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else [str(name) for name in names]
    )


def _lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in bf16 or fp16 whose head decodes boxes in fp32: bf16 has 8 bits, which at stride 8 are boxes off by 4 px."""
    copy: Any = deepcopy(model).eval().to(dtype)
    head = copy.model[-1]
    head.dfl.float()
    head.shape = None  # anchors kept from before are made anew
    decode_in = head._inference

    def in_fp32(outputs: dict[str, Any]) -> Tensor:
        return decode_in(
            {k: v.float() if isinstance(v, Tensor) else [x.float() for x in v] for k, v in outputs.items()}
        )

    head._inference = in_fp32
    return copy


def _spread(value: Any, count: int) -> list[Any]:
    if isinstance(value, int | float):
        return [value] * count
    assert len(value) == count, f"{len(value)} thresholds for {count} images"
    return list(value)


def _picked(value: Any, indices: list[int]) -> Any:
    return value if value is None or isinstance(value, int | float) else [value[i] for i in indices]
