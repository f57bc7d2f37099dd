"""Which source pixel lands where: mosaic, affine, flip, mix-up, cut-mix; and the boxes with it. Pure NumPy.

The draws and their meaning are Ultralytics' (``ultralytics/data/augment.py``, 8.4.190: v8_transforms), but each image has a
generator of its own, keyed by (seed, epoch, position), and every effect always takes its draws: switching one on or off
leaves the others as they were. One thing is added: an axis-aligned mosaic is shifted by at most half a pixel, so that its tiles
meet on a pixel's edge, where a plain resize of each tile is exact and no seam has to be blended.

Letters: S is the output's side in px, N boxes of an image. Points are (x, y), maps 3x3 float64. As in Ultralytics one map moves
both the indices of pixels and the corners of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MIN_SIDE_PX, MAX_ASPECT, MIN_AREA_LEFT = 2, 100, 0.1  # box_candidates of RandomPerspective
CUT_AREAS, MIN_AREA_IN_CUT = 3, 0.1  # CutMix


@dataclass(frozen=True)
class Recipe:
    """How strongly to augment: Ultralytics' settings of the same names. The defaults switch everything off."""

    imgsz: int
    mosaic: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float | tuple[float, float] = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    hsv_h: float = 0.0
    hsv_s: float = 0.0
    hsv_v: float = 0.0
    fliplr: float = 0.0
    flipud: float = 0.0
    bgr: float = 0.0
    copy_paste: float = 0.0
    mask_ratio: int = 4
    task: str = "detect"
    flip_idx: tuple[int, ...] = ()  # pose: where each keypoint of a mirrored image comes from
    num_keypoints: int = 0  # pose

    @classmethod
    def from_yolo(
        cls,
        args: Mapping[str, Any],
        task: str = "detect",
        flip_idx: Sequence[int] = (),
        num_keypoints: int = 0,
    ) -> Recipe:
        """The recipe in Ultralytics' whole settings; as there, keypoints are not flipped without a ``flip_idx``.

        Raises:
            ValueError: a setting that raypar cannot honour.
        """
        values = {
            f.name: args[f.name] for f in fields(cls) if f.name not in ("task", "flip_idx", "num_keypoints")
        }
        if task == "segment" and not args["overlap_mask"]:
            raise ValueError(
                "train.yolo.overlap_mask=False is not supported: masks are joined in one, as by default"
            )
        has_polygons = task in ("detect", "segment", "obb")  # detect: if the dataset has
        if has_polygons and args["copy_paste"] and args["copy_paste_mode"] != "flip":
            raise ValueError(
                f"train.yolo.copy_paste_mode={args['copy_paste_mode']!r} is not supported: write flip"
            )
        if not has_polygons:
            values["copy_paste"] = 0.0
        if task == "pose" and not flip_idx:
            values["fliplr"] = values["flipud"] = 0.0
        scale = values["scale"]
        scale = tuple(scale) if isinstance(scale, list | tuple) else float(scale)
        return cls(
            **values
            | {"scale": scale, "task": task, "flip_idx": tuple(flip_idx), "num_keypoints": num_keypoints}
        )

    @property
    def is_axis_aligned(self) -> bool:
        """Whether every map is only scale, shift and flip, as by default."""
        return not (self.degrees or self.shear or self.perspective)


@dataclass(frozen=True)
class Layer:
    """One image, or four in a mosaic, under one map.

    Attributes:
        indices: the sources: one, or the four tiles (top left, top right, bottom left, bottom right).
        centre: (x, y), where the tiles meet on the 2S x 2S canvas; None without mosaic.
        perspective: (2,) terms of the map's last row.
        angle: degrees, counter-clockwise.
        scale: factor.
        shear: (2,) degrees, in x and y.
        shift: (2,) where the canvas' centre lands, as a share of S.
        copy_paste: share of the eligible instances to paste mirrored.
    """

    indices: tuple[int, ...]
    centre: tuple[int, int] | None
    perspective: tuple[float, float]
    angle: float
    scale: float
    shear: tuple[float, float]
    shift: tuple[float, float]
    copy_paste: float = 0.0

    def matrix(self, canvas_hw: tuple[int, int], size: int) -> Floats:
        """Canvas -> output, before flips: translation * shear * rotation and scale * perspective * centring."""
        height, width = canvas_hw
        centre = np.array([[1.0, 0.0, -width / 2], [0.0, 1.0, -height / 2], [0.0, 0.0, 1.0]])
        perspective = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [*self.perspective, 1.0]])
        cos, sin = (self.scale * f(math.radians(self.angle)) for f in (math.cos, math.sin))
        # cv2.getRotationMatrix2D about the origin
        rotation = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        tan_x, tan_y = (math.tan(math.radians(s)) for s in self.shear)
        shear = np.array([[1.0, tan_x, 0.0], [tan_y, 1.0, 0.0], [0.0, 0.0, 1.0]])
        shift = np.array(
            [[1.0, 0.0, self.shift[0] * size], [0.0, 1.0, self.shift[1] * size], [0.0, 0.0, 1.0]]
        )
        return shift @ shear @ rotation @ perspective @ centre


@dataclass(frozen=True)
class Sample:
    """All that is random about one output image.

    Attributes:
        layer: the image itself.
        mixed: a second layer to blend in, and the share of the first.
        cut: a second layer to cut a rectangle from, the candidate rectangles float64 (3, 4) in px, and which one to take (0..1).
        gains: float64 (3,), of hue (in turns of 180 degrees), saturation and value.
        flip: (left-right, up-down).
        swap: whether red and blue change places.
    """

    layer: Layer
    mixed: tuple[Layer, float] | None
    cut: tuple[Layer, Floats, float] | None
    gains: Floats
    flip: tuple[bool, bool]
    swap: bool


@dataclass(frozen=True)
class Tile:
    """A source's place on the canvas.

    Attributes:
        index: of the source.
        hw: the source's height and width, px, when its longer side is S.
        origin: (x, y) of its upper left corner on the canvas; may be negative.
        rect: (x0, y0, x1, y1), the part of the canvas that it covers.
    """

    index: int
    hw: tuple[int, int]
    origin: tuple[int, int]
    rect: tuple[int, int, int, int]


def generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """A stream of random numbers of its own for each (seed, epoch, position)."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, position]))


def draw(
    recipe: Recipe, rng: np.random.Generator, index: int, num_sources: int, *, mosaic_on: bool
) -> Sample:
    """Draws everything about the output image that shows source ``index`` of a window.

    Args:
        recipe: how strongly.
        rng: this image's own.
        index: of the source.
        num_sources: in the window; partners are any of them.
        mosaic_on: False in the last epochs, which have neither mosaic nor mix-up nor cut-mix (YOLODataset.close_mosaic).
    """
    uniform, other = rng.random((4, 12)), rng.integers(num_sources, size=(3, 4))
    areas, share, choice = rng.random((3, CUT_AREAS)), float(rng.beta(32.0, 32.0)), uniform[3]
    layer = _layer(recipe, uniform[0], (index, *other[0, :3]), mosaic_on)
    mixed = cut = None
    if mosaic_on and choice[0] < recipe.mixup:
        mixed = _layer(recipe, uniform[1], tuple(other[1]), mosaic_on), share
    if mosaic_on and choice[1] < recipe.cutmix:
        cut = (
            _layer(recipe, uniform[2], tuple(other[2]), mosaic_on),
            _cut_areas(recipe.imgsz, areas),
            float(choice[2]),
        )
    gains = (choice[3:6] * 2 - 1) * [recipe.hsv_h, recipe.hsv_s, recipe.hsv_v]
    return Sample(
        layer,
        mixed,
        cut,
        gains,
        (bool(choice[6] < recipe.fliplr), bool(choice[7] < recipe.flipud)),
        bool(choice[8] < recipe.bgr),
    )


def _layer(recipe: Recipe, u: Floats, indices: Sequence[Any], mosaic_on: bool) -> Layer:
    def within(x: float, low: float, high: float) -> float:
        return float(low + x * (high - low))

    is_mosaic = mosaic_on and u[0] < recipe.mosaic
    half = recipe.imgsz // 2
    centre = (
        int(within(u[1], half, 2 * recipe.imgsz - half)),
        int(within(u[2], half, 2 * recipe.imgsz - half)),
    )
    low, high = recipe.scale if isinstance(recipe.scale, tuple) else (1 - recipe.scale, 1 + recipe.scale)
    scale = within(u[6], low, high)
    shift = [within(x, 0.5 - recipe.translate, 0.5 + recipe.translate) for x in u[9:11]]
    if is_mosaic and recipe.is_axis_aligned:
        # the tiles' common edge, as a coordinate in which pixel i reaches from i to i + 1
        for axis in range(2):
            edge = scale * (centre[axis] - 0.5 - recipe.imgsz) + shift[axis] * recipe.imgsz + 0.5
            shift[axis] += (round(edge) - edge) / recipe.imgsz
    return Layer(
        tuple(int(i) for i in indices) if is_mosaic else (int(indices[0]),),
        centre if is_mosaic else None,
        (
            within(u[3], -recipe.perspective, recipe.perspective),
            within(u[4], -recipe.perspective, recipe.perspective),
        ),
        within(u[5], -recipe.degrees, recipe.degrees),
        scale,
        (within(u[7], -recipe.shear, recipe.shear), within(u[8], -recipe.shear, recipe.shear)),
        (shift[0], shift[1]),
        recipe.copy_paste if mosaic_on else 0.0,
    )


def _cut_areas(size: int, u: Floats) -> Floats:
    """CutMix's candidate rectangles, float64 (3, 4), x0, y0, x1, y1 in px, from uniform numbers (3, 3)."""
    cut = (size * np.sqrt(u[0])).astype(np.int64) // 2  # Beta(1, 1) is uniform
    x, y = (size * u[1:]).astype(np.int64)
    return np.clip(np.stack([x - cut, y - cut, x + cut, y + cut], 1), 0, size).astype(np.float64)


def resized_hw(image_hw: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of an image whose longer side is brought to S (BaseDataset.load_image)."""
    height, width = image_hw
    ratio = size / max(height, width)
    return (
        (height, width)
        if ratio == 1
        else (min(math.ceil(height * ratio), size), min(math.ceil(width * ratio), size))
    )


def layout(
    layer: Layer, image_hws: Sequence[tuple[int, int]], size: int
) -> tuple[list[Tile], tuple[int, int]]:
    """Places a layer's sources on its canvas: the tiles, and the canvas' height and width.

    Args:
        layer: to place.
        image_hws: of its sources, in the order of ``layer.indices``, any size.
        size: S.
    """
    hws = [resized_hw(hw, size) for hw in image_hws]
    if layer.centre is None:
        height, width = hws[0]
        return [Tile(layer.indices[0], hws[0], (0, 0), (0, 0, width, height))], hws[0]
    (xc, yc), tiles = layer.centre, []
    for i, (height, width) in enumerate(hws):
        left, top = (xc - width, xc)[i % 2], (yc - height, yc)[i // 2]
        rect = max(left, 0), max(top, 0), min(left + width, 2 * size), min(top + height, 2 * size)
        tiles.append(Tile(layer.indices[i], (height, width), (left, top), rect))
    return tiles, (2 * size, 2 * size)


def to_canvas(tiles: Sequence[Tile], counts: Sequence[int]) -> tuple[Floats, Floats]:
    """How normalised points of a layer's instances become canvas px: times (N, 2), plus (N, 2).

    Args:
        tiles: of :func:`layout`.
        counts: instances of each tile.
    """
    places = np.array([(*tile.hw[::-1], *tile.origin) for tile in tiles], np.float64)
    wh, origin = np.hsplit(np.repeat(places, counts, axis=0), 2)
    return wh, origin


def is_seen(
    before: Floats, after: Floats, scale: float, min_area: float = MIN_AREA_LEFT
) -> NDArray[np.bool_]:
    """Which instances are left after a map and a cut; those cut off too far are dropped, as in Ultralytics.

    Args:
        before, after: boxes_xyxy float64 (N, 4), px of the canvas and of the output.
        scale: of the map.
        min_area: share of the area that must be left.
    """
    wh_before, wh = (before[:, 2:] - before[:, :2]) * scale, after[:, 2:] - after[:, :2]
    aspect = np.maximum(wh[:, 0] / (wh[:, 1] + 1e-16), wh[:, 1] / (wh[:, 0] + 1e-16))
    seen: NDArray[np.bool_] = (
        (wh > MIN_SIDE_PX).all(1)
        & (wh.prod(1) / (wh_before.prod(1) + 1e-16) > min_area)
        & (aspect < MAX_ASPECT)
    )
    return seen


def hull(boxes_xyxy: Floats, matrix: Floats) -> Floats:
    """The upright boxes around mapped ones: float64 (N, 4)."""
    xy = mapped(boxes_xyxy[:, [[0, 1], [2, 3], [0, 3], [2, 1]]], matrix)
    return np.concatenate([xy.min(1), xy.max(1)], 1)


def mapped(points: Floats, matrix: Floats) -> Floats:
    """Points (..., 2) through a 3x3 map."""
    xy = points @ matrix[:2, :2].T + matrix[:2, 2]
    if matrix[2, :2].any():
        xy /= points @ matrix[2, :2, None] + matrix[2, 2]
    return xy


def choose_cut(areas: Floats, pick: float, boxes: Floats, other_boxes: Floats,
               min_area: float = MIN_AREA_IN_CUT) -> tuple[Floats, NDArray[np.intp]] | None:  # fmt: skip
    """CutMix's rectangle and the other layer's boxes that come with it.

    Returns:
        The rectangle float64 (4,) in px and the indices of the boxes that lie in it by ``min_area`` or more; None when no rectangle
        is free of the image's own boxes, or none of the other's boxes would come along.
    """
    free = np.flatnonzero(_share_inside(areas, boxes).sum(1) <= 0)
    if not len(free):
        return None
    area = areas[free[int(pick * len(free))]]
    inside = np.flatnonzero(_share_inside(area[None], other_boxes)[0] >= min_area)
    return (area, inside) if len(inside) else None


def _share_inside(areas: Floats, boxes: Floats) -> Floats:
    """For each area and box, the share of the box' surface that lies in the area: float64 (A, N)."""
    low, high = (
        np.maximum(areas[:, None, :2], boxes[None, :, :2]),
        np.minimum(areas[:, None, 2:], boxes[None, :, 2:]),
    )
    surface = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return np.clip(high - low, 0, None).prod(2) / (surface + 1e-7)
