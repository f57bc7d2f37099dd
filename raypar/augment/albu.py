"""The user's albumentations transforms, box-safe and seeded per image.

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
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# it would ask the network for its newest version when imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

Labelled = tuple[NDArray[np.uint8], NDArray[np.int32], NDArray[np.float32]]
ULTRALYTICS = [
    {"Blur": {"p": 0.01}},
    {"MedianBlur": {"p": 0.01}},
    {"ToGray": {"p": 0.01}},
    {"CLAHE": {"p": 0.01}},
]
Spec = Sequence[dict[str, Any]] | str | None


def check(spec: Spec, task: str = "detect") -> None:
    """Builds the transforms and forgets them.

    Raises:
        ValueError: one is unknown or refuses its arguments.
    """
    make(spec, task)


@dataclass(frozen=True)
class Transforms:
    """Transforms in their order, each with its probability, and whether it moves pixels and so boxes.

    Called with an image uint8 (H, W, 3) RGB, class_ids int32 (N,), boxes_xywhn float32 (N, 4) and the image's own generator, it gives
    the first three as they are then. Boxes that a transform moves out of the image are gone from the result; transforms of the pixels
    alone never touch boxes.
    """

    steps: Sequence[tuple[float, bool, Any]]

    @property
    def move_pixels(self) -> bool:
        """Whether any of them does."""
        return any(moves for _, moves, _ in self.steps)

    def apply_to(self, rng: np.random.Generator) -> bool:
        """Whether any of them is applied to the image that has this generator, which is drawn from."""
        return any(rng.random(len(self.steps)) < [probability for probability, _, _ in self.steps])

    def __call__(
        self,
        image: NDArray[np.uint8],
        class_ids: NDArray[np.int32],
        boxes_xywhn: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> Labelled:
        draws = rng.random(len(self.steps))
        for (probability, moves, compose), drawn in zip(self.steps, draws, strict=True):
            if drawn >= probability:
                continue
            if not image.flags.writeable:  # a view of the cache
                image = image.copy()
            compose.set_random_seed(int(rng.integers(2**31)))
            result = (
                compose(image=image, bboxes=boxes_xywhn, class_ids=class_ids)
                if moves
                else compose(image=image)
            )
            image = np.ascontiguousarray(result["image"])
            if moves:
                class_ids = np.asarray(result["class_ids"], np.int32).reshape(-1)
                boxes_xywhn = np.asarray(result["bboxes"], np.float32).reshape(-1, 4)
        return image, class_ids, boxes_xywhn


def make(spec: Spec, task: str = "detect") -> Transforms:
    """Builds the transforms.

    Args:
        spec: ``[{"Blur": {"p": 0.1}}, ...]``; ``"pkg.module:function"``, which returns albumentations objects; nothing for the four
            that Ultralytics applies (none for classify); an empty list for none.
        task: of the dataset; only boxes can be moved.

    Raises:
        ValueError: a transform is unknown, refuses its arguments, or moves pixels and the task's labels cannot be moved with it.
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
        moves = not isinstance(transform, library.ImageOnlyTransform)
        if moves and task in ("segment", "pose", "obb"):
            name = type(transform).__name__
            raise ValueError(
                f"train.albumentations: {name} moves pixels, which only detect and classify can follow; '{task}' cannot"
            )
        moves = moves and task == "detect"  # an image's class stays
        boxes = (
            library.BboxParams(
                format="yolo", label_fields=["class_ids"], clip=True, filter_invalid_bboxes=True
            )
            if moves
            else None
        )
        with warnings.catch_warnings():
            # a composition of transforms of pixels alone
            warnings.filterwarnings("ignore", message="Got processor for bboxes")
            steps.append((probability, moves, library.Compose([transform], bbox_params=boxes)))

    return Transforms(steps)


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
