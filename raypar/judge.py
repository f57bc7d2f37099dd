"""How good a model of another task than detect is: Ultralytics' own validators judge, over images that may be shown anywhere.

Runs in: training workers (validation), Ray Data actors (evaluate), and the driver, which joins their states. The validators' loops and
loaders are not used, only what they do with a batch; so the figures are theirs. Images are letterboxed by
:class:`raypar.detector.Detector`, in the rectangles that the caller names.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from ultralytics.data.augment import classify_transforms
from ultralytics.data.utils import polygons2masks_overlap
from ultralytics.models.yolo.classify import ClassificationValidator
from ultralytics.models.yolo.obb import OBBValidator
from ultralytics.models.yolo.pose import PoseValidator
from ultralytics.models.yolo.segment import SegmentationValidator
from ultralytics.utils.instance import Instances
from ultralytics.utils.ops import resample_segments

from raypar.augment.outlines import boxes_xywhr
from raypar.dataset.manifest import Manifest
from raypar.dataset.rows import only_classes, row_labels
from raypar.detector import Detector, Letterboxed
from raypar.images import Image

VALIDATORS: dict[str, Any] = {
    "segment": SegmentationValidator, "pose": PoseValidator, "obb": OBBValidator, "classify": ClassificationValidator,
}  # fmt: skip
OBB_POINTS = 100  # of a rotated box's outline, before its smallest rectangle is sought
NAMES = {
    "precision": "precision",
    "recall": "recall",
    "mAP50": "map50",
    "mAP50-95": "map50_95",
    "accuracy_top1": "top1",
    "accuracy_top5": "top5",
}
OF = {"(B)": "", "(M)": "mask_", "(P)": "pose_"}  # boxes, masks, keypoints


class Judge:
    """Ultralytics' validator of a dataset's task.

    Args:
        manifest: of the dataset: task, class names, keypoints.
        args: Ultralytics' settings: imgsz, conf (nothing: 0.001, for obb 0.01), iou, max_det, mask_ratio, single_cls ...
        folder: local; where pictures go.
        plots: whether curves, confusion matrices and samples are drawn.
    """

    def __init__(self, manifest: Manifest, args: SimpleNamespace, folder: Path, *, plots: bool = False):
        self.task, self.args, self.plots = manifest.task, args, plots
        self.names = dict(enumerate(["item"] if args.single_cls else manifest.class_names))
        self.num_keypoints = manifest.keypoint_shape[0] if manifest.keypoint_shape else 0
        args = copy(args)
        args.plots, args.save_json, args.save_txt = plots, False, False
        self.validator = VALIDATORS[self.task](save_dir=folder, args=vars(args))
        pose = {"kpt_shape": list(manifest.keypoint_shape)} if manifest.keypoint_shape else {}
        self.validator.data = {
            "train": "",
            "val": "",
            "names": self.names,
            "nc": len(self.names),
            "channels": 3,
            **pose,
        }
        self.clear(SimpleNamespace(names=self.names))

    def clear(self, model: Any) -> None:
        """Forgets all images; ``model`` is judged next."""
        self.positions: list[int] = []
        self.validator.init_metrics(model)

    @property
    def num_images(self) -> int:
        """Images so far."""
        return len(self.positions)

    def keep(self, max_det: int) -> None:
        """Sets how many boxes an image may have."""
        self.validator.args.max_det = max_det

    def batch(self, table: pa.Table, group: Letterboxed, device: torch.device) -> dict[str, Any]:
        """A batch for the model, the loss and :meth:`update`, on a device.

        Args:
            table: rows of shards, which the group's ``indices`` count; ``position``: of each in the order of all images.
            group: of a detector's ``letterbox``, for classify of :func:`classified`.
            device: of the model.
        """
        rows = table.take(group.indices)
        made = self._classified(rows, group) if self.task == "classify" else self._boxed(rows, group)
        made |= {"im_file": rows["image_id"].to_pylist(), "positions": rows["position"].to_pylist()}
        return {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in made.items()
        }

    def update(self, raw: Any, batch: dict[str, Any]) -> None:
        """Adds what the model, in evaluation mode, made of a batch's ``img``.

        Args:
            raw: the model's own output.
            batch: of :meth:`batch`.
        """
        self.validator.device = batch["img"].device
        self.validator.update_metrics(self._found(raw, len(batch["img"])), batch)
        self.positions += batch["positions"]

    def draw(self, raw: Any, batch: dict[str, Any]) -> None:
        """Draws labels and predictions of a batch's first 16 images: ``val_batch0_labels.jpg`` and ``val_batch0_pred.jpg``.

        Arguments as of :meth:`update`; counts for no metric.
        """
        self.validator.device = batch["img"].device
        predictions = self._found(raw, len(batch["img"]))
        # Ultralytics draws in threads and scales the pixels in place: one at a time, each with pixels of its own
        with _threads_joined():
            self.validator.plot_val_samples(_copied(batch), 0)
        with _threads_joined():
            self.validator.plot_predictions(_copied(batch), predictions, 0)

    def _found(self, raw: Any, count: int) -> Any:
        """What the validator reads from the model's output. One image at a time: NMS gives a batch some seconds, after which the rest of
        it has no boxes."""
        if self.task == "classify":
            return self.validator.postprocess(raw)
        import torchvision  # noqa: F401  # as in raypar.detector

        first = raw[0]  # of segment boxes and prototypes, otherwise boxes; raw[1] is for the loss
        return [found for i in range(count) for found in self.validator.postprocess([_one(first, i)])]

    def state(self) -> dict[str, Any]:
        """Everything, as values that can be pickled."""
        return {
            "stats": self._stats(),
            "confusion": self.validator.confusion_matrix.matrix,
            "positions": self.positions,
        }

    def _stats(self) -> dict[str, list[Any]]:
        """Lists of one entry an image."""
        if self.task != "classify":
            found: dict[str, list[Any]] = self.validator.metrics.stats
            return found
        validator = self.validator  # it keeps a tensor for each batch
        return {
            name: [row.clone() for rows in getattr(validator, name) for row in rows.split(1)]
            for name in ("pred", "targets")
        }

    def join(self, states: Sequence[dict[str, Any]]) -> None:
        """Takes other judges' states instead of its own, and orders their images by position: then equal confidences do not depend on
        who judged what."""
        validator = self.validator
        positions = [position for state in states for position in state["positions"]]
        order = sorted(range(len(positions)), key=positions.__getitem__)
        stats = {}
        for name in states[0]["stats"]:
            values = [value for state in states for value in state["stats"][name]]
            stats[name] = [values[i] for i in order]
        if self.task == "classify":
            validator.pred, validator.targets = stats["pred"], stats["targets"]
        else:
            validator.metrics.stats = stats
        validator.confusion_matrix.matrix = sum(state["confusion"] for state in states)
        self.positions = sorted(positions)

    def compute(self) -> dict[str, Any]:
        """Metrics of all images, by the names of ``metrics.jsonl``; ``per_class`` of classes that have labels. Draws, if it is to."""
        validator = self.validator
        validator.finalize_metrics()
        found = {_name(key): float(value) for key, value in validator.get_stats().items()}
        return {**found, "num_images": self.num_images, "per_class": self._per_class()}

    def _per_class(self) -> list[dict[str, Any]]:
        metrics = self.validator.metrics
        if self.task == "classify":
            return []
        names = [_name(key) for key in metrics.keys]
        return [{"class_name": self.names[int(c)], "num_boxes": int(metrics.nt_per_class[c]),
                 **{name: float(value) for name, value in zip(names, metrics.class_result(i), strict=True)}}
                for i, c in enumerate(metrics.ap_class_index)]  # fmt: skip

    def _classified(self, rows: pa.Table, group: Letterboxed) -> dict[str, Any]:
        class_ids = rows["class_id"].to_numpy().astype(np.int64) * (0 if self.args.single_cls else 1)
        return {"img": group.images, "cls": torch.from_numpy(class_ids)}

    def _boxed(self, rows: pa.Table, group: Letterboxed) -> dict[str, Any]:
        """Images of one shape, with their labels in their letterboxes' own coordinates."""
        height, width = group.images.shape[2:]
        side = np.array([width, height], np.float32)
        found: dict[str, list[NDArray[Any]]] = {"cls": [], "bboxes": [], "batch_idx": []}
        for place in range(rows.num_rows):
            labels = row_labels(rows, place, self.task, self.num_keypoints)
            class_ids, boxes, polygons, keypoints = only_classes(labels, self.args.classes)
            if self.task == "obb" and polygons is not None and len(polygons):
                polygons = np.stack(resample_segments(list(polygons), n=OBB_POINTS))
            # Ultralytics' own arithmetic, to the last bit: which of two like boxes an anchor is assigned to hangs on it
            arrays = (
                None if x is None else x.copy() for x in (boxes, polygons, keypoints)
            )  # it works in place
            moved = Instances(*arrays, bbox_format="xywh", normalized=True)
            moved.convert_bbox("xyxy")
            moved.denormalize(*_scaled_wh(group, place))
            moved.add_padding(*group.pads[place].tolist())
            moved.convert_bbox("xywh")
            boxes = moved.bboxes / np.tile(side, 2)
            if polygons is not None:
                polygons = moved.segments
            if self.task == "obb" and polygons is not None:
                boxes = (boxes_xywhr(polygons) / np.append(np.tile(side, 2), 1)).astype(np.float32)
            if self.task == "segment" and polygons is not None:
                mask, order = self._mask(polygons, (height, width))
                class_ids, boxes = class_ids[order], boxes[order]
                found.setdefault("masks", []).append(mask)
            if keypoints is not None:
                found.setdefault("keypoints", []).append(moved.keypoints / np.append(side, 1))
            found["cls"].append((class_ids * (0 if self.args.single_cls else 1)).reshape(-1, 1))
            found["bboxes"].append(boxes)
            found["batch_idx"].append(np.full(len(class_ids), place))
        tensors = {name: torch.from_numpy((np.stack if name == "masks" else np.concatenate)(values).astype(np.float32))
                   for name, values in found.items()}  # fmt: skip
        if "masks" in tensors:
            tensors["sem_masks"] = class_of_pixels(
                tensors["masks"].int(), tensors["cls"][:, 0], tensors["batch_idx"]
            )
        pads = [
            ((float(g[0]), float(g[1])), (float(p[0]), float(p[1])))
            for g, p in zip(group.gains, group.pads, strict=True)
        ]
        return {"img": group.images.float() / 255, **tensors, "ori_shape": group.image_hws, "ratio_pad": pads}

    def _mask(self, polygons: NDArray[np.float32], hw: tuple[int, int]) -> tuple[NDArray[Any], NDArray[Any]]:
        ratio = self.args.mask_ratio
        if not len(polygons):
            return np.zeros((hw[0] // ratio, hw[1] // ratio), np.uint8), np.zeros(0, np.intp)
        mask, order = polygons2masks_overlap(hw, list(polygons), downsample_ratio=ratio)
        return mask, order


def letterboxed(task: str, image: Image, shape: tuple[int, int], detector: Detector) -> Letterboxed:
    """An image as a model of a task is validated with it.

    Args:
        task: classify has no letterboxes.
        image: uint8 (H, W, 3) RGB.
        shape: height and width of its letterbox, px.
        detector: that the image is for.
    """
    if task == "classify":
        return classified(image, detector.imgsz)
    (found,) = detector.letterbox([image], [shape])
    return found


def classified(image: Image, imgsz: int) -> Letterboxed:
    """An image as a classifier is validated with it: float32 (1, 3, imgsz, imgsz) RGB in [0, 1], cut square."""
    import PIL.Image

    pixels: Tensor = classify_transforms(size=imgsz)(PIL.Image.fromarray(image))
    return Letterboxed(pixels[None], [0], [], [], [(image.shape[0], image.shape[1])])


def class_of_pixels(masks: Tensor, class_ids: Tensor, image_index: Tensor) -> Tensor:
    """Class of the instance that each pixel shows, float32 (B, H, W); where there is none, of the image's last one (as in Ultralytics).

    Args:
        masks: (B, H, W), i + 1 where an image's i-th instance is seen.
        class_ids, image_index: (M,), in the order of images and of their instances.
    """
    ends = torch.bincount(image_index.long(), minlength=len(masks)).cumsum(0)
    found = torch.zeros(masks.shape)
    for image, end in enumerate(ends.tolist()):
        mine = class_ids[ends[image - 1] if image else 0 : end]
        if len(mine):
            found[image] = mine[masks[image].long() - 1].float()
    return found


def _scaled_wh(group: Letterboxed, place: int) -> list[int]:
    """Width and height of an image inside its letterbox, px."""
    height, width = group.image_hws[place]
    return [
        round(side * float(gain)) for side, gain in zip((width, height), group.gains[place], strict=False)
    ]


@contextmanager
def _threads_joined() -> Iterator[None]:
    """Waits for the threads that are started within."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join()


def _copied(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}


def _one(output: Any, i: int) -> Any:
    """The i-th image of a model's output, still a batch."""
    return tuple(value[i : i + 1] for value in output) if isinstance(output, tuple) else output[i : i + 1]


def _name(key: str) -> str:
    """``metrics/mAP50-95(M)`` -> ``mask_map50_95``."""
    name = key.removeprefix("metrics/")
    for suffix, prefix in OF.items():
        if name.endswith(suffix):
            return prefix + NAMES[name.removesuffix(suffix)]
    return NAMES.get(name, name)
