"""Augmentation of classify: Ultralytics' own transforms (torchvision's, on Pillow images), seeded for each image.

Runs in: Ray Data tasks. Random resized crop, flips, RandAugment, AugMix or AutoAugment or else colour jitter, and erasing: the list is
that of ``ultralytics.data.augment.classify_augmentations``, and the pixels are the same bits for the same state of torch's generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from raypar.augment.cpu import Source
from raypar.augment.labels import Labels
from raypar.augment.paint import Image


@dataclass(frozen=True)
class ClassifyRecipe:
    """How strongly to augment: Ultralytics' settings of the same names, for classify."""

    imgsz: int
    scale: float = 0.0
    fliplr: float = 0.0
    flipud: float = 0.0
    auto_augment: str | None = None
    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    erasing: float = 0.0
    task: str = "classify"
    num_keypoints: int = 0

    @classmethod
    def from_yolo(cls, args: Mapping[str, Any]) -> ClassifyRecipe:
        """The recipe in Ultralytics' whole settings.

        Raises:
            ValueError: a setting has no meaning for classify.
        """
        if isinstance(args["scale"], list | tuple):
            raise ValueError(
                f"train.yolo.scale={args['scale']}: for classify it is one number, the crop keeps 1 - scale of the area at least"
            )
        if args["auto_augment"] not in (None, "", "randaugment", "augmix", "autoaugment"):
            raise ValueError(
                f"train.yolo.auto_augment={args['auto_augment']!r}: write randaugment, augmix, autoaugment or nothing"
            )
        names = ("imgsz", "scale", "fliplr", "flipud", "auto_augment", "hsv_h", "hsv_s", "hsv_v", "erasing")
        return cls(**{name: args[name] for name in names} | {"auto_augment": args["auto_augment"] or None})


class ClassifyRenderer:
    """Renders images of a recipe; called as :class:`raypar.augment.cpu.Renderer`."""

    def __init__(self, recipe: ClassifyRecipe):
        self.recipe = recipe

    def __call__(self, sources: Sequence[Source], indices: Sequence[int], rngs: Sequence[np.random.Generator], *,
                 mosaic_on: bool, out: Image) -> Labels:  # fmt: skip
        """Fills a batch.

        Args:
            sources: the window, in full size.
            indices: for each output image, the source that it shows.
            rngs: for each output image, its own generator.
            mosaic_on: there is none.
            out: uint8 (B, 3, S, S), RGB; written.

        Returns:
            The class of each image; no boxes.
        """
        for i, (index, rng) in enumerate(zip(indices, rngs, strict=True)):
            augment(self.recipe, sources[index].image, int(rng.integers(2**63)), out[i])
        class_ids = np.concatenate([sources[index].class_ids for index in indices]).astype(np.int32)
        return Labels(class_ids, np.zeros((0, 4), np.float32), np.arange(len(class_ids), dtype=np.int32))


def augment(recipe: ClassifyRecipe, image: Image, seed: int, out: Image) -> None:
    """One image, uint8 (H, W, 3) RGB, into uint8 (3, S, S), RGB."""
    import PIL.Image
    import torch

    on_image, erase = _transforms(recipe)
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        shown = PIL.Image.fromarray(image)
        for transform in on_image:
            shown = transform(shown)
        out[...] = np.asarray(shown).transpose(2, 0, 1)
        out[...] = erase(torch.from_numpy(out)).numpy()
    finally:
        torch.set_rng_state(state)


@lru_cache(maxsize=4)
def _transforms(recipe: ClassifyRecipe) -> tuple[list[Any], Any]:
    """Ultralytics' transforms of Pillow images, and its erasing. Between them it only makes floats of them, divided by 255."""
    import torchvision.transforms as T
    from ultralytics.data.augment import classify_augmentations

    made = classify_augmentations(
        size=recipe.imgsz, scale=(1.0 - recipe.scale, 1.0), hflip=recipe.fliplr, vflip=recipe.flipud, erasing=recipe.erasing,
        auto_augment=recipe.auto_augment, hsv_h=recipe.hsv_h, hsv_s=recipe.hsv_s, hsv_v=recipe.hsv_v).transforms  # fmt: skip
    *on_image, to_tensor, normalize, erase = made
    assert isinstance(to_tensor, T.ToTensor)
    assert isinstance(normalize, T.Normalize)
    assert float(normalize.mean.abs().max()) == 0, normalize
    assert float((normalize.std - 1).abs().max()) == 0, normalize
    return on_image, erase
