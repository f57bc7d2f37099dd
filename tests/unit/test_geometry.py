"""The recipe, the draws, and where they put tiles and boxes: against Ultralytics' own Mosaic and RandomPerspective."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.cfg import get_cfg
from ultralytics.data import augment as theirs
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils.instance import Instances

from raypar.augment.geometry import Layer, Recipe, choose_cut, draw, generator, layout, resized_hw
from raypar.augment.labels import move_layer

SIZE = 160
DEFAULT = Recipe(SIZE, mosaic=1.0, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5)
ALL = Recipe(SIZE, 0.5, 0.5, 0.5, 30.0, 0.3, 0.6, 10.0, 0.001, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5)
SIDES = st.integers(1, 2 * SIZE)
SEEDS = st.integers(0, 2**32)


class Forced:
    """Stands in for ``random.uniform``: gives the layer's own numbers, in the order in which Ultralytics asks for them."""

    def __init__(self, layer: Layer):
        centre = [layer.centre[1], layer.centre[0]] if layer.centre else []
        self.values = iter(
            [*centre, *layer.perspective, layer.angle, layer.scale, *layer.shear, *layer.shift]
        )

    def __call__(self, low: float, high: float) -> float:
        return next(self.values)


def ultralytics_boxes(
    layer: Layer, recipe: Recipe, hws: list[tuple[int, int]], labels: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[Any, list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Matrix, mosaic layout, class ids and boxes_xyxy px that Ultralytics makes of the same draws."""

    def entry(i: int) -> dict[str, Any]:
        hw = resized_hw(hws[i], SIZE)
        return {
            "img": np.zeros((*hw, 3), np.uint8),
            "cls": labels[i][0].reshape(-1, 1).astype(np.float32),
            "instances": Instances(
                labels[i][1].copy(), np.zeros((0, 1000, 2), np.float32), bbox_format="xywh", normalized=True
            ),
            "im_file": "",
            "ori_shape": hws[i],
            "resized_shape": hw,
        }

    places, image = [], entry(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "uniform", Forced(layer))
        if layer.centre:
            mosaic = theirs.Mosaic(SimpleNamespace(cache="ram", get_image_and_label=entry), imgsz=SIZE, p=1.0)
            mosaic.get_indexes = lambda: [1, 2, 3]
            params = mosaic.get_params(image)
            places = params["layout"]
            image = mosaic.apply_instances(mosaic.apply_image(image, params), params)
        warp = theirs.RandomPerspective(perspective=recipe.perspective, size=(SIZE, SIZE))
        params = warp.get_params(image)
    image = warp.apply_instances(image, params)
    return params["M"], places, image["cls"].reshape(-1), image["instances"].bboxes


def random_labels(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of every size and aspect, many of them on the edge or a hair wide."""
    wh = rng.uniform(0, 1, (count, 2)) ** rng.choice([1, 3, 8], (count, 2))
    centres = rng.choice([0.0, 0.5, 1.0], (count, 2)) * (1 - wh) * rng.uniform(0.9, 1, (count, 2)) + wh / 2
    return rng.integers(0, 5, count).astype(np.int32), np.concatenate([centres, wh], 1).astype(np.float32)


def moved(
    recipe: Recipe, layer: Layer, hws: list[tuple[int, int]], labels: list[tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Class ids and boxes_xyxy px of a layer whose tiles are the sources 0, 1 ..."""
    sources = [
        SimpleNamespace(hw=hw, class_ids=ids, boxes_xywhn=boxes, polygons=None, keypoints=None)
        for hw, (ids, boxes) in zip(hws, labels, strict=True)
    ]
    instances, pasted = move_layer(recipe, layer, sources)
    assert len(pasted) == 0
    return instances.class_ids, instances.boxes


@given(
    SEEDS,
    st.lists(st.tuples(SIDES, SIDES), min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([DEFAULT, ALL]),
)
@settings(max_examples=150, deadline=None)
def test_tiles_map_and_boxes_are_ultralytics(
    seed: int, hws: list[tuple[int, int]], mosaic_on: bool, recipe: Recipe
) -> None:
    layer = draw(recipe, generator(seed, 0, 0), 0, 4, mosaic_on=mosaic_on).layer
    rng = np.random.default_rng(seed)
    layer = Layer(
        tuple(range(len(layer.indices))),
        layer.centre,
        layer.perspective,
        layer.angle,
        layer.scale,
        layer.shear,
        layer.shift,
    )
    hws = hws[: len(layer.indices)]
    labels = [random_labels(rng, int(rng.integers(0, 9))) for _ in hws]
    tiles, canvas_hw = layout(layer, hws, SIZE)
    class_ids, boxes = moved(recipe, layer, hws, labels)
    matrix, places, expected_ids, expected = ultralytics_boxes(layer, recipe, hws, labels)

    np.testing.assert_allclose(layer.matrix(canvas_hw, SIZE), matrix, rtol=1e-5, atol=1e-4)
    for tile, place in zip(tiles, places, strict=bool(places)):
        assert tile.rect == (place["x1a"], place["y1a"], place["x2a"], place["y2a"])
        assert tile.origin == (place["padw"], place["padh"])
    # else a box within float32's error of a threshold: the next test counts those
    if len(class_ids) == len(expected_ids):
        assert class_ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(boxes / SIZE, expected / SIZE, atol=1e-4)


def test_the_same_boxes_are_dropped() -> None:
    kept = dropped = different = 0
    for seed in range(200):
        layer = draw(DEFAULT, generator(seed, 0, 0), 0, 4, mosaic_on=True).layer
        layer = Layer(
            (0, 1, 2, 3),
            *(getattr(layer, n) for n in ("centre", "perspective", "angle", "scale", "shear", "shift")),
        )
        rng = np.random.default_rng(seed)
        hws, labels = [(SIZE, SIZE * 3 // 4)] * 4, [random_labels(rng, 8) for _ in range(4)]
        class_ids, _ = moved(DEFAULT, layer, hws, labels)
        expected = ultralytics_boxes(layer, DEFAULT, hws, labels)[2]
        kept, dropped = kept + len(expected), dropped + 32 - len(expected)
        different += class_ids.tolist() != expected.tolist()
    assert kept > 500
    assert dropped > 500
    assert different <= 1


@pytest.mark.parametrize(
    "hw", [(480, 640), (640, 480), (1, 3000), (3000, 1), (100, 37), (160, 160), (1079, 1921)]
)
def test_sizes_are_those_of_load_image(hw: tuple[int, int]) -> None:
    image = np.zeros((*hw, 3), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralytics.data.base.imread", lambda *_, **__: image)
        loader = SimpleNamespace(
            ims=[None],
            im_files=["x"],
            npy_files=[SimpleNamespace(exists=lambda: False)],
            imgsz=SIZE,
            cv2_flag=1,
            augment=False,
            cache=None,
        )
        resized = YOLODataset.load_image(loader, 0)[0]
    assert resized.shape[:2] == resized_hw(hw, SIZE)


def test_the_recipe_is_read_from_ultralytics_settings() -> None:
    args = vars(get_cfg(overrides={"imgsz": 320, "scale": (0.4, 0.9), "mixup": 0.2}))
    recipe = Recipe.from_yolo(args)
    assert (recipe.imgsz, recipe.scale, recipe.mixup, recipe.mosaic) == (320, (0.4, 0.9), 0.2, 1.0)
    assert recipe.is_axis_aligned
    scales = [draw(recipe, generator(0, 0, p), 0, 1, mosaic_on=True).layer.scale for p in range(300)]
    assert 0.4 <= min(scales) < 0.45 < 0.85 < max(scales) <= 0.9
    assert not Recipe.from_yolo(vars(get_cfg(overrides={"shear": 1.0}))).is_axis_aligned


@given(SEEDS, st.integers(0, 10**4), st.integers(0, 2**50))
@settings(max_examples=50, deadline=None)
def test_every_part_of_the_key_matters(seed: int, epoch: int, position: int) -> None:
    keys = [
        (seed, epoch, position),
        (seed + 1, epoch, position),
        (seed, epoch + 1, position),
        (seed, epoch, position + 1),
    ]
    numbers = [generator(*key).integers(2**63, size=4096).tolist() for key in keys]
    # not even parts of one stream are in another
    assert len({n for stream in numbers for n in stream}) == 4 * 4096
    assert generator(*keys[0]).integers(2**63, size=4096).tolist() == numbers[0]


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_an_effect_leaves_the_others_as_they_were(seed: int) -> None:
    off = draw(DEFAULT, generator(seed, 0, 0), 0, 9, mosaic_on=True)
    on = draw(
        Recipe(**{**DEFAULT.__dict__, "mixup": 1.0, "cutmix": 1.0, "bgr": 1.0, "flipud": 1.0}),
        generator(seed, 0, 0),
        0,
        9,
        mosaic_on=True,
    )
    cut_only = draw(
        Recipe(**{**DEFAULT.__dict__, "cutmix": 1.0}), generator(seed, 0, 0), 0, 9, mosaic_on=True
    )
    assert off.mixed is None
    assert off.cut is None
    assert on.mixed is not None
    assert on.swap
    assert on.layer == off.layer
    assert on.gains.tolist() == off.gains.tolist()
    assert on.flip == (off.flip[0], True)
    assert repr(on.cut) == repr(cut_only.cut)
    assert on.mixed[0] != on.layer


def test_closing_mosaic_closes_what_ultralytics_closes() -> None:
    settings_ = get_cfg(overrides={"mosaic": 1.0, "mixup": 1.0, "cutmix": 1.0, "fliplr": 1.0, "bgr": 1.0})
    YOLODataset.close_mosaic(SimpleNamespace(build_transforms=lambda hyp: None), settings_)
    closed = Recipe.from_yolo(vars(settings_))
    full = Recipe(**{**closed.__dict__, "mosaic": 1.0, "mixup": 1.0, "cutmix": 1.0})
    for position in range(50):
        sample = draw(full, generator(0, 0, position), 0, 9, mosaic_on=False)
        assert repr(sample) == repr(draw(closed, generator(0, 0, position), 0, 9, mosaic_on=True))
        assert len(sample.layer.indices) == 1
        assert sample.mixed is None
        assert sample.cut is None
        assert sample.flip[0]


def test_tiles_meet_on_a_pixels_edge_and_shifts_stay_uniform() -> None:
    shifts = []
    for position in range(3000):
        layer = draw(DEFAULT, generator(0, 0, position), 0, 9, mosaic_on=True).layer
        assert layer.centre is not None
        matrix = layer.matrix((2 * SIZE, 2 * SIZE), SIZE)
        seam = matrix[:2, :2] @ (np.array(layer.centre) - 0.5) + matrix[:2, 2] + 0.5
        np.testing.assert_allclose(seam, np.round(seam), atol=1e-9)
        shifts.append(layer.shift)
    values = np.array(shifts)
    assert values.min() >= 0.4 - 0.5 / SIZE - 1e-9
    assert values.max() <= 0.6 + 0.5 / SIZE + 1e-9
    counts = np.histogram(values[:, 0], bins=8, range=(0.4, 0.6))[0]
    assert counts.min() > 0.8 * len(values) / 8
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.06


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_cut_is_ultralytics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sample = draw(Recipe(SIZE, cutmix=1.0), generator(seed, 0, 0), 0, 2, mosaic_on=True)
    assert sample.cut is not None
    _, areas, pick = sample.cut
    assert areas.min() >= 0
    assert areas.max() <= SIZE
    both = [
        np.sort(rng.uniform(0, SIZE, (int(rng.integers(0, 4)), 2, 2)), axis=1).reshape(-1, 4)
        for _ in range(2)
    ]

    def labels(boxes: np.ndarray) -> dict[str, Any]:
        instances = Instances(
            boxes.astype(np.float32), np.zeros((0, 1000, 2), np.float32), bbox_format="xyxy", normalized=False
        )
        return {
            "img": np.zeros((SIZE, SIZE, 3), np.uint8),
            "cls": np.zeros((len(boxes), 1)),
            "instances": instances,
        }

    cutmix = theirs.CutMix(SimpleNamespace(get_image_and_label=lambda i: labels(both[1])), p=1.0)
    cutmix.get_indexes = lambda: 0
    candidates = iter(areas.astype(int))
    cutmix._rand_bbox = lambda *_: tuple(next(candidates))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "choice", lambda free: free[int(pick * len(free))])
        params = cutmix.get_params(labels(both[0]))
    chosen = choose_cut(areas, pick, *both)
    assert (chosen is None) == bool(params.get("skip"))
    if chosen is not None:
        assert chosen[0].tolist() == params["area"].tolist()
        assert chosen[1].tolist() == params["indexes2"].tolist()
