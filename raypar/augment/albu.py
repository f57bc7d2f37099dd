"""The user's albumentations transforms: box-safe, seeded per image, and moving all labels as Ultralytics' ``Albumentations`` does (8.4.190).

Runs in: Ray Data tasks; :func:`check` on the driver. Each transform's probability is drawn here, so that an image to which none
applies (96 of 100 by default) costs microseconds instead of a pass through albumentations.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raypar.augment.geometry import Floats, Recipe
from raypar.augment.labels import Instances
from raypar.augment.outlines import clipped, resampled, visible_boxes

# it would ask the network for its newest version when imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Image = NDArray[np.uint8]
Labelled = tuple[Image, NDArray[np.int32], NDArray[np.float32]]
ULTRALYTICS = [
    {"Blur": {"p": 0.01}},
    {"MedianBlur": {"p": 0.01}},
    {"ToGray": {"p": 0.01}},
    {"CLAHE": {"p": 0.01}},
]
NUM_OBB_POINTS = 100  # of a rotated box that is moved: YOLODataset.update_labels_info
Spec = Sequence[dict[str, Any]] | str | None


def check(spec: Spec, task: str = "detect", imgsz: int = 64, *, has_polygons: bool = False) -> None:
    """Builds the transforms, tries each on an image of noise, and forgets them.

    Raises:
        ValueError: one is unknown, refuses its arguments, or makes what cannot be trained on; see :func:`make`.
    """
    transforms = make(spec, task, has_polygons=has_polygons)
    noise = np.random.default_rng(0).integers(0, 256, (imgsz, imgsz, 3), np.uint8)
    for i in range(len(transforms.steps)):
        transforms.try_step(i, noise)


@dataclass(frozen=True)
class Transforms:
    """Transforms in their order, each with its probability, and whether it moves pixels and so labels.

    Attributes:
        steps: (probability, whether it moves pixels, the transform, which always applies).
        task: whose labels there are; classify has none that move.
    """

    steps: Sequence[tuple[float, bool, Any]]
    task: str = "detect"
    _composed: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def move_pixels(self) -> bool:
        """Whether any of them does, with labels to follow."""
        return any(moves for _, moves, _ in self.steps)

    def apply_to(self, rng: np.random.Generator) -> bool:
        """Whether any of them is applied to the image that has this generator, which is drawn from."""
        return bool(self._drawn(rng))

    def __call__(
        self,
        image: Image,
        class_ids: NDArray[np.int32],
        boxes_xywhn: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> Labelled:
        """An image uint8 (H, W, 3) RGB of any size, class_ids int32 (N,) and boxes_xywhn float32 (N, 4), as they are then.

        Boxes that a transform moves out of the image are gone; transforms of the pixels alone never touch boxes.
        """
        drawn = self._drawn(rng)
        if not drawn:
            return image, class_ids, boxes_xywhn
        result = self._applied(drawn, rng, image, boxes_xywhn)
        if not self._moves(drawn):
            return result["image"], class_ids, boxes_xywhn
        kept = np.asarray(result["index"], np.intp).reshape(-1)
        boxes = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        return result["image"], class_ids[kept], boxes

    def change(
        self, image: Image, shown: Instances, rng: np.random.Generator, recipe: Recipe
    ) -> tuple[Image, Instances]:
        """A composed image, and what it shows, as they are then.

        Where every label would be lost, both are left as they were (so are they by Ultralytics).

        Args:
            image: uint8 (S, S, 3) RGB, before flips.
            shown: its labels, px.
            rng: the image's own.
            recipe: of the labels: ``task`` and ``flip_idx``.

        Raises:
            ValueError: a transform changed the size or the type of the image.
        """
        drawn = self._drawn(rng)
        if not drawn:
            return image, shown
        if not self._moves(drawn):
            return self._same_kind(self._applied(drawn, rng, image)["image"], image), shown
        if recipe.task == "obb" and shown.polygons is not None:
            shown = replace(shown, polygons=resampled(shown.polygons, NUM_OBB_POINTS))
        size = image.shape[0]
        low, high = shown.boxes[:, :2], shown.boxes[:, 2:]
        boxes_xywhn = np.concatenate([(low + high) / 2, high - low], 1) / size
        points = _points_of(shown, size)
        result = self._applied(drawn, rng, image, boxes_xywhn, points)
        kept = np.asarray(result["index"], np.intp).reshape(-1)
        if len(shown.class_ids) and not len(kept):
            return image, shown
        moved = points.copy()
        is_lost = np.ones(len(points), np.bool_)
        left = np.asarray(result["point_index"], np.intp).reshape(-1)
        is_lost[left] = False
        moved[left] = np.asarray(result["keypoints"], np.float64).reshape(-1, 2)
        boxes = np.asarray(result["bboxes"], np.float64).reshape(-1, 4) * size
        boxes = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
        made = _followed(shown, kept, boxes, moved, is_lost, recipe.flip_idx, size)
        return self._same_kind(result["image"], image), made

    def try_step(self, i: int, image: Image) -> None:
        """Applies one transform to an image uint8 (H, W, 3), for its errors."""
        name = type(self.steps[i][2]).__name__
        boxes, points = np.array([[0.5, 0.5, 0.5, 0.5]]), np.array([[image.shape[1] / 2, image.shape[0] / 2]])
        try:
            made = self._applied((i,), np.random.default_rng(0), image, boxes, points)["image"]
        except Exception as error:  # whatever a user's transform raises
            raise ValueError(f"train.albumentations: {name}: {' '.join(str(error).split())[:200]}") from error
        if self.task != "classify":
            self._same_kind(made, image, name)

    def _drawn(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The transforms that an image gets."""
        draws = rng.random(len(self.steps))
        return tuple(i for i, (probability, _, _) in enumerate(self.steps) if draws[i] < probability)

    def _moves(self, drawn: tuple[int, ...]) -> bool:
        return any(self.steps[i][1] for i in drawn)

    def _applied(
        self,
        drawn: tuple[int, ...],
        rng: np.random.Generator,
        image: Image,
        boxes_xywhn: NDArray[Any] | None = None,
        points: Floats | None = None,
    ) -> dict[str, Any]:
        """What albumentations returns of some transforms, one after the other; RGB in and out.

        Ultralytics gives them BGR, as OpenCV reads images, and so they get it here: grey and contrast depend on it.
        """
        compose = self._compose(drawn)
        compose.set_random_seed(int(rng.integers(2**31)))
        is_bgr = self.task != "classify"
        given = np.array(
            image[..., ::-1] if is_bgr else image, order="C"
        )  # a copy: it may be a view of the cache
        labels: dict[str, Any] = {}
        if self._moves(drawn):
            boxes = np.zeros((0, 4)) if boxes_xywhn is None else boxes_xywhn
            points = np.zeros((0, 2)) if points is None else points
            labels = {"bboxes": boxes, "index": np.arange(len(boxes)), "keypoints": points,
                      "point_index": np.arange(len(points))}  # fmt: skip
        result: dict[str, Any] = compose(image=given, **labels)
        made = result["image"]
        result["image"] = np.ascontiguousarray(made[..., ::-1] if is_bgr and made.ndim == 3 else made)
        return result

    def _compose(self, drawn: tuple[int, ...]) -> Any:
        """Some transforms as one; made once."""
        if drawn not in self._composed:
            library, labels = _albumentations(), {}
            if self._moves(drawn):
                labels = {
                    "bbox_params": library.BboxParams(
                        format="yolo", label_fields=["index"], clip=True, filter_invalid_bboxes=True
                    ),
                    "keypoint_params": library.KeypointParams(
                        format="xy", remove_invisible=False, label_fields=["point_index"]
                    ),
                }
            with warnings.catch_warnings():
                # transforms of the pixels alone among others
                warnings.filterwarnings("ignore", message="Got processor for")
                self._composed[drawn] = library.Compose([self.steps[i][2] for i in drawn], **labels)
        return self._composed[drawn]

    def _same_kind(self, made: NDArray[Any], image: Image, name: str = "a transform") -> Image:
        if made.shape != image.shape or made.dtype != np.uint8:
            was, now = (f"{a.dtype} of {a.shape[1]}x{a.shape[0]} px" for a in (image, made))
            raise ValueError(
                f"train.albumentations: {name} made an image {now} of one {was}: all images of a batch have one size, "
                "so add a transform that brings it back, or leave it out"
            )
        return made


def _points_of(shown: Instances, size: int) -> Floats:
    """All that moves as points, float64 (P, 2) px: of polygons, then keypoints, then three corners, which say if the image is mirrored."""
    points = [] if shown.polygons is None else [shown.polygons.reshape(-1, 2).astype(np.float64)]
    if shown.keypoints is not None:
        corners = np.array([[0, 0], [size, 0], [0, size]], np.float64)
        points += [shown.keypoints[..., :2].reshape(-1, 2), corners]
    return np.concatenate([np.zeros((0, 2)), *points])


def _followed(
    shown: Instances,
    kept: NDArray[np.intp],
    boxes: Floats,
    moved: Floats,
    is_lost: NDArray[np.bool_],
    flip_idx: Sequence[int],
    size: int,
) -> Instances:
    """Labels whose points were moved.

    Args:
        shown: the labels as they were.
        kept: those whose boxes are left.
        boxes: of these, float64 (K, 4), px.
        moved: of :func:`_points_of`, moved.
        is_lost: which of these points are gone.
        flip_idx: where each keypoint of a mirrored image comes from.
        size: S.
    """
    polygons, keypoints = shown.polygons, shown.keypoints
    num_points = 0 if polygons is None else polygons.size // 2
    if polygons is not None and num_points:
        outlines = moved[:num_points].reshape(polygons.shape)
        lost = is_lost[:num_points].reshape(polygons.shape[:2])
        is_gone = np.asarray(lost.all(1))
        kept = kept[~is_gone[kept]]
        polygons = _filled(outlines, lost)[kept].astype(np.float32)
        boxes = visible_boxes(polygons, size)
        polygons = clipped(polygons, boxes[:, :2], boxes[:, 2:])
    if keypoints is not None:
        xy = moved[num_points:-3].reshape(*keypoints.shape[:2], 2)[kept]
        inside = xy.clip(0, size)
        is_gone = np.asarray(
            is_lost[num_points:-3].reshape(keypoints.shape[:2])[kept] | (xy != inside).any(-1)
        )
        visibility = np.where(is_gone, 0, keypoints[kept, :, 2])
        keypoints = np.concatenate([inside, visibility[..., None]], -1)
        corner, right, low = moved[-3:]
        turn = np.linalg.det(np.stack([right - corner, low - corner]))
        if flip_idx and not is_lost[-3:].any() and turn < 0:
            keypoints = keypoints[:, list(flip_idx)]
    made = Instances(shown.class_ids[kept], boxes, polygons, keypoints)
    return made.take(np.asarray((boxes[:, 2:] > boxes[:, :2]).all(1)))


def _filled(outlines: Floats, is_lost: NDArray[np.bool_]) -> Floats:
    """Polygons (N, P, 2), each lost point in the place of the next one that is left, or of the last."""
    for outline, lost in zip(outlines, is_lost, strict=True):
        left = np.flatnonzero(~lost)
        if len(left) and lost.any():
            following = np.searchsorted(left, np.flatnonzero(lost)).clip(0, len(left) - 1)
            outline[lost] = outline[left[following]]
    return outlines


def make(spec: Spec, task: str = "detect", *, has_polygons: bool = False) -> Transforms:
    """Builds the transforms.

    Args:
        spec: ``[{"Blur": {"p": 0.1}}, ...]``; ``"pkg.module:function"``, which returns albumentations objects; nothing for the four
            that Ultralytics applies (none for classify); an empty list for none.
        task: of the dataset.
        has_polygons: detect: whether boxes are those around polygons.

    Raises:
        ValueError: a transform is unknown, refuses its arguments, or moves pixels in a way that the labels cannot follow.
    """
    library = _albumentations()
    if spec is None and task == "classify":
        spec = []
    made = (
        _from_function(library, spec)
        if isinstance(spec, str)
        else [_from_dict(library, entry) for entry in (ULTRALYTICS if spec is None else spec)]
    )
    steps = []
    for transform in made:
        probability, transform.p = float(transform.p), 1.0
        inner = _inner(library, transform)
        if task in ("segment", "pose", "obb") or has_polygons:
            _check_topology(library, inner, task)
        moves = task != "classify" and any(not isinstance(t, library.ImageOnlyTransform) for t in inner)
        steps.append((probability, moves, transform))
    return Transforms(steps, task)


def _inner(library: Any, transform: Any) -> list[Any]:
    """A transform, or all that a composition such as ``OneOf`` chooses from."""
    if isinstance(transform, library.BaseCompose):
        return [inner for part in transform.transforms for inner in _inner(library, part)]
    return [transform]


def _check_topology(library: Any, inner: list[Any], task: str) -> None:
    if any(isinstance(transform, library.RandomGridShuffle) for transform in inner):
        raise ValueError(
            f"train.albumentations: RandomGridShuffle tears polygons and keypoints apart, which the labels of '{task}' "
            "cannot follow: leave it out"
        )


def _albumentations() -> Any:
    """The library without its conversion to tensors, for which it would import torch: 1.5 s of each task's start, and 150 MB."""
    name = "albumentations.pytorch"
    if "albumentations" not in sys.modules:
        sys.modules[name] = ModuleType(name)
        try:
            importlib.import_module("albumentations")
        finally:
            del sys.modules[name]  # whoever wants the real one imports it
    return importlib.import_module("albumentations")


def _from_dict(library: Any, entry: dict[str, Any]) -> Any:
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError(f"train.albumentations: {entry!r} is not of the form {{Name: {{setting: value}}}}")
    ((name, arguments),) = entry.items()
    kind = getattr(library, name, None)
    if not (isinstance(kind, type) and issubclass(kind, library.BasicTransform)):
        known = [
            n
            for n in dir(library)
            if isinstance(getattr(library, n), type)
            and issubclass(getattr(library, n), library.BasicTransform)
        ]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"train.albumentations: there is no transform '{name}'"
            + (f"; did you mean '{near[0]}'?" if near else "")
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # albumentations only warns of a misspelt argument
            return kind(**(arguments or {}))
    except (TypeError, ValueError, UserWarning) as error:
        raise ValueError(f"train.albumentations: {name}: {' '.join(str(error).split())}") from error


def _from_function(library: Any, name: str) -> list[Any]:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"train.albumentations: '{name}' (write pkg.module:function): {error}") from error
    if not isinstance(made, list | tuple):
        raise ValueError(
            f"train.albumentations: '{name}' returned a {type(made).__name__}; it should return a list of albumentations transforms"
        )
    for transform in made:
        if not isinstance(transform, library.BasicTransform | library.BaseCompose):
            raise ValueError(
                f"train.albumentations: '{name}' returned {transform!r}, which is not an albumentations transform"
            )
    return copy.deepcopy(list(made))  # their probabilities are changed
