"""The geometry, rendered by OpenCV into a packed batch.

Runs in: Ray Data tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from raypar.augment.albu import Transforms
from raypar.augment.geometry import Layer, Recipe, Sample, draw, layout
from raypar.augment.labels import (
    Composed,
    Labels,
    Moved,
    Polygons,
    batch_labels,
    compose_labels,
    finish_labels,
)
from raypar.augment.outlines import Outlines
from raypar.augment.paint import Image, canvas, develop, paint_canvas, paint_tiles


@dataclass
class Source:
    """An image of the window, and its labels.

    Attributes:
        image: uint8 (H, W, 3) RGB; its longer side should not exceed the recipe's imgsz by much (``images.shrink``).
        class_ids: int32 (N,).
        boxes_xywhn: float32 (N, 4), centre x, centre y, width, height over W, H.
        polygons: float32 (N, P, 2) over W, H: for segment, with many points (``outlines.densify``); the four corners for obb. For
            detect either the same as for segment or ``outlines.Outlines``, which move boxes as well, or None: in all sources alike.
        keypoints: float32 (N, K, 3), x, y over W, H, visibility: for pose.
    """

    image: Image
    class_ids: NDArray[np.int32]
    boxes_xywhn: NDArray[np.float32]
    polygons: NDArray[np.float32] | Outlines | None = None
    keypoints: NDArray[np.float32] | None = None

    @property
    def hw(self) -> tuple[int, int]:
        return self.image.shape[0], self.image.shape[1]


class Renderer:
    """Renders samples of a recipe.

    Args:
        recipe: whose ``imgsz`` is the output's side S.
        transforms: albumentations, which act on the composed image: after mosaic, map, mix-up and cut-mix, before colours and flips.
    """

    def __init__(self, recipe: Recipe, transforms: Transforms | None = None):
        self.recipe, self.transforms = recipe, transforms
        self.room = canvas(recipe.imgsz)

    def __call__(self, sources: Sequence[Source], indices: Sequence[int], rngs: Sequence[np.random.Generator], *,
                 mosaic_on: bool, out: Image, changes: Sequence[np.random.Generator] = ()) -> Labels:  # fmt: skip
        """Fills a batch.

        Args:
            sources: the window; mosaic and mix-up partners come from it.
            indices: for each output image, the source that it shows.
            rngs: for each output image, its own generator.
            mosaic_on: False in the last epochs (close_mosaic).
            out: uint8 (B, 3, S, S), RGB; written.
            changes: for each output image the generator of its albumentations; none: they are left out.
        """
        moved = []
        for i, (index, rng) in enumerate(zip(indices, rngs, strict=True)):
            sample = draw(self.recipe, rng, index, len(sources), mosaic_on=mosaic_on)
            moved.append(self.render(sample, sources, out[i], changes[i] if changes else None))
        return batch_labels(moved)

    def render(
        self, sample: Sample, sources: Sequence[Source], out: Image, change: np.random.Generator | None = None
    ) -> Moved:
        """Writes one image into uint8 (3, S, S), RGB; returns its labels. Arguments as of :meth:`__call__`."""
        composed = compose_labels(self.recipe, sample, sources)
        image = self._composed(sample, sources, composed)
        if self.transforms is not None and change is not None:
            image, shown = self.transforms.change(image, composed.shown, change, self.recipe)
            composed = replace(composed, shown=shown)
        develop(image, sample.gains, sample.flip, sample.swap, out)
        return finish_labels(self.recipe, sample, composed)

    def _composed(self, sample: Sample, sources: Sequence[Source], moved: Composed) -> Image:
        """All layers in one image: uint8 (S, S, 3), RGB; not flipped, in its own colours."""
        size = self.recipe.imgsz
        image = self._layer(sample.layer, sources, self.room, moved.pasted[0])
        if sample.mixed is not None:
            other, share = sample.mixed
            image2 = self._layer(other, sources, canvas(size), moved.pasted[1])
            # Ultralytics truncates, OpenCV rounds
            image = cv2.addWeighted(image, share, image2, 1 - share, -0.5)
        if moved.cut is not None:
            assert sample.cut is not None
            x0, y0, x1, y1 = moved.cut
            image[y0:y1, x0:x1] = self._layer(sample.cut[0], sources, canvas(size), moved.pasted[2])[
                y0:y1, x0:x1
            ]
        return image

    def _layer(self, layer: Layer, sources: Sequence[Source], room: Image, pasted: Polygons) -> Image:
        """A layer's pixels; not flipped."""
        size, shown = self.recipe.imgsz, [sources[i] for i in layer.indices]
        tiles, canvas_hw = layout(layer, [s.hw for s in shown], size)
        matrix, images = layer.matrix(canvas_hw, size), [s.image for s in shown]
        if self.recipe.is_axis_aligned and not len(pasted):
            return paint_tiles(images, tiles, matrix, size, room)
        return paint_canvas(images, tiles, canvas_hw, matrix, size, pasted)
