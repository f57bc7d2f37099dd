"""The renderer's pixels and labels against Ultralytics' whole chain: load_image's resize, Mosaic ... Format; seams, edges, odd sizes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.data import augment as theirs
from ultralytics.utils.instance import Instances

from raypar.augment import albu
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Layer, Recipe, Sample, draw, generator, resized_hw
from raypar.augment.paint import develop
from raypar.images import decode, shrink

SIZE = 256
COLOURS = {"hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4}
MOVES = {"translate": 0.1, "scale": 0.5}
RECIPES = {
    "default": Recipe(SIZE, mosaic=1.0, **MOVES, **COLOURS, fliplr=0.5),
    "no mosaic": Recipe(SIZE, **MOVES, **COLOURS, fliplr=0.5, flipud=0.5),
    "mixup": Recipe(SIZE, mosaic=1.0, **MOVES, **COLOURS, fliplr=0.5, mixup=1.0),
    "cutmix": Recipe(SIZE, mosaic=0.5, **MOVES, **COLOURS, fliplr=0.5, flipud=0.5, cutmix=1.0),
    "both": Recipe(SIZE, mosaic=1.0, **MOVES, mixup=1.0, cutmix=1.0),
    "turned": Recipe(SIZE, mosaic=1.0, degrees=30, shear=8, **MOVES, **COLOURS, fliplr=0.5, mixup=0.5),
    "tilted": Recipe(SIZE, mosaic=0.5, perspective=0.0008, **MOVES, **COLOURS, flipud=0.5, cutmix=0.5),
    "swapped": Recipe(SIZE, mosaic=1.0, **MOVES, **COLOURS, bgr=0.5),
}


def textured(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Detail that falls with its frequency, as in photographs: uint8 (H, W, 3)."""
    image = np.zeros((height, width, 3), np.float32)
    for cells, contrast in ((3, 60.0), (8, 35.0), (20, 15.0), (60, 6.0)):
        image += contrast * cv2.resize(
            rng.standard_normal((cells, cells, 3)).astype(np.float32),
            (width, height),
            interpolation=cv2.INTER_CUBIC,
        )
    return np.clip(image + 120, 0, 255).astype(np.uint8)


def labelled(rng: np.random.Generator, image: np.ndarray) -> Source:
    wh = rng.uniform(0.05, 0.4, (5, 2))
    boxes = np.concatenate([rng.uniform(wh / 2, 1 - wh / 2), wh], 1).astype(np.float32)
    return Source(image, rng.integers(0, 3, 5).astype(np.int32), boxes)


def make_window(seed: int, hws: list[tuple[int, int]] | None = None) -> list[Source]:
    rng = np.random.default_rng(seed)
    return [
        labelled(rng, textured(rng, *hw))
        for hw in hws or [(192, 256), (256, 171), (256, 256), (128, 256), (256, 200)]
    ]


def chain(recipe: Recipe, sample: Sample, sources: list[Source]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ultralytics' transforms with the sample's numbers in place of their draws: image uint8 (3, S, S), class ids, boxes_xywhn."""

    def entry(index: int) -> dict[str, Any]:
        source = sources[index]
        hw = resized_hw(source.hw, SIZE)
        image = source.image[..., ::-1]
        image = cv2.resize(image, hw[::-1], interpolation=cv2.INTER_LINEAR) if hw != source.hw else image
        instances = Instances(
            source.boxes_xywhn.copy(), np.zeros((0, 1000, 2), np.float32), bbox_format="xywh", normalized=True
        )
        return {"img": np.ascontiguousarray(image), "cls": source.class_ids.reshape(-1, 1).astype(np.float32), "instances": instances,
                "im_file": "", "ori_shape": source.hw, "resized_shape": hw}  # fmt: skip

    def layer_of(layer: Layer) -> dict[str, Any]:
        numbers: Iterator[float] = iter(
            [
                *(layer.centre or ())[::-1],
                *layer.perspective,
                layer.angle,
                layer.scale,
                *layer.shear,
                *layer.shift,
            ]
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "uniform", lambda low, high: next(numbers))
            labels = entry(layer.indices[0])
            if layer.centre:
                mosaic = theirs.Mosaic(
                    SimpleNamespace(cache="ram", get_image_and_label=entry), imgsz=SIZE, p=1.0
                )
                mosaic.get_indexes = lambda: list(layer.indices[1:])
                params = mosaic.get_params(labels)
                labels = mosaic.apply_instances(mosaic.apply_image(labels, params), params)
            warp = theirs.RandomPerspective(perspective=recipe.perspective, size=(SIZE, SIZE))
            params = warp.get_params(labels)
            return warp.apply_instances(warp.apply_image(labels, params), params)

    labels = layer_of(sample.layer)
    with pytest.MonkeyPatch.context() as patch:
        for kind, second in ((theirs.MixUp, sample.mixed), (theirs.CutMix, sample.cut)):
            if second is None:
                continue
            dataset = SimpleNamespace(get_image_and_label=lambda i, layer=second[0]: layer_of(layer))
            mix = kind(dataset, p=1.0)
            mix.get_indexes = lambda: 0
            if sample.mixed is not None:
                patch.setattr(np.random, "beta", lambda *_: sample.mixed[1])
            if sample.cut is not None:
                areas = iter(sample.cut[1].astype(int))
                mix._rand_bbox = lambda *_, areas=areas: tuple(next(areas))
                patch.setattr(np.random, "choice", lambda free: free[int(sample.cut[2] * len(free))])
            labels = mix(labels)
        if recipe.hsv_s:
            patch.setattr(
                np.random, "uniform", lambda *_: sample.gains / [recipe.hsv_h, recipe.hsv_s, recipe.hsv_v]
            )
            labels = theirs.RandomHSV(recipe.hsv_h, recipe.hsv_s, recipe.hsv_v)(labels)
        for flip, direction in ((sample.flip[1], "vertical"), (sample.flip[0], "horizontal")):
            labels = theirs.RandomFlip(p=1.0 if flip else 0.0, direction=direction)(labels)
        labels = theirs.Format(bgr=1.1 if sample.swap else -0.1)(labels)
    return labels["img"].numpy(), labels["cls"].numpy().reshape(-1).astype(int), labels["bboxes"].numpy()


def compare(recipe: Recipe, sources: list[Source], seed: int) -> float:
    """Asserts equal labels; the mean difference of the pixels, in grey levels."""
    key = generator(seed, 0, 0)
    sample = draw(recipe, generator(seed, 0, 0), seed % len(sources), len(sources), mosaic_on=True)
    out = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(recipe)(sources, [seed % len(sources)], [key], mosaic_on=True, out=out)
    expected, class_ids, boxes = chain(recipe, sample, sources)
    assert labels.class_ids.tolist() == class_ids.tolist()
    np.testing.assert_allclose(labels.boxes_xywhn, boxes, atol=1e-4)
    return float(np.abs(out[0].astype(int) - expected.astype(int)).mean())


def render(
    recipe: Recipe, sample: Sample, sources: list[Source]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image uint8 (S, S, 3) RGB, class_ids and boxes_xywhn of a sample."""
    out = np.empty((3, SIZE, SIZE), np.uint8)
    moved = Renderer(recipe).render(sample, sources, out)
    return out.transpose(1, 2, 0), moved.class_ids, moved.boxes_xywhn


def recolour(image: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) with other colours."""
    out = np.empty((3, *image.shape[:2]), np.uint8)
    develop(image, gains, (False, False), False, out)
    return out.transpose(1, 2, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_pixels_and_labels_are_those_of_ultralytics_chain(name: str) -> None:
    differences = [compare(RECIPES[name], make_window(seed % 3), seed) for seed in range(12)]
    assert max(differences) <= 2.0
    assert np.mean(differences) <= 1.0


@pytest.mark.parametrize("name", ["default", "no mosaic", "turned"])
def test_sources_smaller_than_the_output_are_made_larger_as_by_load_image(name: str) -> None:
    window = make_window(0, [(60, 80), (100, 40), (30, 30), (256, 256)])
    assert max(compare(RECIPES[name], window, seed) for seed in range(8)) <= 2.0


def test_the_default_recipe_never_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warp takes five times as long as a resize: it is for tiny sources only."""
    window, out = make_window(0), np.empty((1, 3, SIZE, SIZE), np.uint8)
    monkeypatch.setattr(cv2, "warpAffine", lambda *_, **__: pytest.fail("warped"))
    monkeypatch.setattr(cv2, "warpPerspective", lambda *_, **__: pytest.fail("warped"))
    for seed in range(60):
        Renderer(RECIPES["default"])(
            window, [seed % 5], [generator(seed, 0, 0)], mosaic_on=seed % 2 == 0, out=out
        )


def test_tiny_sources_are_warped_into_place() -> None:
    window = make_window(0, [(6, 8), (5, 3), (9, 9), (2, 16)])
    assert max(compare(RECIPES["default"], window, seed) for seed in range(8)) <= 2.5


@pytest.mark.parametrize("name", ["default", "no mosaic", "cutmix", "turned"])
def test_blood_cells(name: str, bccd: Path) -> None:
    rng = np.random.default_rng(0)
    paths = sorted((bccd / "JPEGImages").glob("*.jpg"))[:6]
    window = [labelled(rng, shrink(decode(path.read_bytes()), SIZE)) for path in paths]
    assert max(compare(RECIPES[name], window, seed) for seed in range(8)) <= 2.0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4), st.integers(0, 10**6),
       st.sampled_from(sorted(RECIPES)), st.booleans())  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_size_of_source_is_rendered(
    hws: list[tuple[int, int]], seed: int, name: str, mosaic_on: bool
) -> None:
    window = [
        Source(np.full((*hw, 3), 200, np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.float32))
        for hw in hws
    ]
    out = np.zeros((2, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(RECIPES[name])(
        window, [0, len(hws) - 1], [generator(seed, 1, i) for i in range(2)], mosaic_on=mosaic_on, out=out
    )
    assert out.min() > 20  # every pixel was written
    assert (labels.class_ids.dtype, labels.boxes_xywhn.dtype, labels.image_index.dtype) == (
        np.int32,
        np.float32,
        np.int32,
    )
    assert (labels.class_ids.shape, labels.boxes_xywhn.shape, labels.image_index.shape) == (
        (0,),
        (0, 4),
        (0,),
    )


def test_extreme_aspects() -> None:
    window = [
        Source(np.full((*hw, 3), 200, np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.float32))
        for hw in ((1, 3000), (3000, 1), (1, 1))
    ]
    out = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    for seed in range(40):
        Renderer(RECIPES["default"])(
            window, [seed % 3], [generator(seed, 0, 0)], mosaic_on=seed % 2 == 0, out=out
        )


@given(st.integers(0, 10**6))
@settings(max_examples=80, deadline=None)
def test_no_line_between_tiles(seed: int) -> None:
    """White square sources fill the whole canvas: no grey anywhere but outside of it, and at most a rounded edge there."""
    recipe = Recipe(SIZE, mosaic=1.0, translate=0.1, scale=0.5, fliplr=0.5)
    window = [
        Source(np.full((SIZE, SIZE, 3), 255, np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.float32))
    ]
    sample = draw(recipe, generator(seed, 0, 0), 0, 1, mosaic_on=True)
    image = render(recipe, sample, window)[0]
    expected = chain(recipe, sample, window)[0].transpose(1, 2, 0)
    is_inside = cv2.erode((expected == 255).all(2).astype(np.uint8), np.ones((3, 3)))
    assert (image[is_inside == 1] == 255).all()
    is_outside = cv2.erode((expected == 114).all(2).astype(np.uint8), np.ones((3, 3)))
    assert (image[is_outside == 1] == 114).all()


def test_colours_are_exactly_ultralytics() -> None:
    """Random colours, strong gains: the tables, and the order of channels, are theirs."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        gains = rng.uniform(-1, 1, 3) * [0.5, 0.9, 0.9]
        image = rng.integers(0, 256, (300, 301, 3), np.uint8)
        labels = {"img": np.ascontiguousarray(image[..., ::-1])}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "uniform", lambda *_, gains=gains: gains)
            theirs.RandomHSV(1.0, 1.0, 1.0)(labels)
        difference = np.abs(recolour(image, gains).astype(int) - labels["img"][..., ::-1].astype(int))
        assert difference.max() <= 2  # OpenCV's last bits depend on the processor
        assert difference.mean() < 0.1


@given(st.integers(0, 10**6), st.sampled_from([Recipe(SIZE, mosaic=1.0, **MOVES, fliplr=0.5, flipud=0.5),
                                               Recipe(SIZE, **MOVES, fliplr=0.5, flipud=0.5),
                                               Recipe(SIZE, degrees=45, shear=10, **MOVES, fliplr=0.5, flipud=0.5),
                                               Recipe(SIZE, mosaic=1.0, degrees=45, perspective=0.0005, fliplr=0.5)]))  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_a_white_rectangle_fills_its_box(seed: int, recipe: Recipe) -> None:
    image = np.zeros((200, SIZE, 3), np.uint8)
    image[60:150, 70:190] = 255
    box = np.array([[130 / SIZE, 105 / 200, 120 / SIZE, 90 / 200]], np.float32)
    none = Source(np.zeros((SIZE, SIZE, 3), np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.float32))
    window = [Source(image, np.zeros(1, np.int32), box), none]
    drawn = draw(recipe, generator(seed, 0, 0), 0, 2, mosaic_on=True)
    layer = drawn.layer
    layer = Layer(
        (0, 1, 1, 1)[: len(layer.indices)],
        layer.centre,
        layer.perspective,
        layer.angle,
        layer.scale,
        layer.shear,
        layer.shift,
    )
    rendered, _, boxes = render(recipe, Sample(layer, None, None, drawn.gains, drawn.flip, False), window)
    if not len(boxes):
        return
    x, y, w, h = boxes[0] * SIZE
    rows, columns = np.nonzero(rendered[..., 0] > 180)
    if not len(rows):  # all that is seen is a corner of the box around a turned rectangle
        assert not recipe.is_axis_aligned
        return
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    said = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    assert (found[:2] >= said[:2] - 1.5).all()  # never outside of its box
    assert (found[2:] <= said[2:] + 1.5).all()
    is_whole = said.min() > 1 and said.max() < SIZE - 1 and layer.centre is None
    # a turned rectangle that is cut off need not touch all sides of what is left of its hull
    if recipe.is_axis_aligned or is_whole:
        corner = 0 if recipe.is_axis_aligned else 2.5  # sharp corners are blurred away
        np.testing.assert_allclose(found, said, atol=1.5 + corner)


def test_an_image_is_the_same_in_any_batch() -> None:
    window, recipe = make_window(2), RECIPES["mixup"]
    batch, alone = np.empty((4, 3, SIZE, SIZE), np.uint8), np.empty((1, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(recipe)(
        window, [3, 1, 2, 0], [generator(0, 0, p) for p in range(4)], mosaic_on=True, out=batch
    )
    for i, index in enumerate([3, 1, 2, 0]):
        one = Renderer(recipe)(window, [index], [generator(0, 0, i)], mosaic_on=True, out=alone)
        assert np.array_equal(alone[0], batch[i])
        assert np.array_equal(one.boxes_xywhn, labels.boxes_xywhn[labels.image_index == i])
    assert batch.flags.c_contiguous


def test_rendering_leaves_the_sources_alone() -> None:
    window = make_window(0)
    before = [(s.image.copy(), s.boxes_xywhn.copy()) for s in window]
    out = np.empty((1, 3, SIZE, SIZE), np.uint8)
    for name in RECIPES:
        Renderer(RECIPES[name])(window, [0], [generator(0, 0, 0)], mosaic_on=True, out=out)
    for source, (image, boxes) in zip(window, before, strict=True):
        assert np.array_equal(source.image, image)
        assert np.array_equal(source.boxes_xywhn, boxes)


def test_the_default_transforms_are_ultralytics() -> None:
    used = [(type(t).__name__, t.p) for t in theirs.Albumentations(p=1.0).transform.transforms if t.p]
    assert used == [(name, settings_["p"]) for entry in albu.ULTRALYTICS for name, settings_ in entry.items()]


MINE = [
    albumentations.HorizontalFlip(p=0.5),
    albumentations.OneOf([albumentations.Blur(), albumentations.ToGray()], p=0.25),
]


def my_transforms() -> list[Any]:
    return MINE


def test_a_users_function_keeps_its_probabilities() -> None:
    source = make_window(0)[0]
    # made on the driver and again in a task: never with probabilities that the first changed
    for _ in range(2):
        transform = albu.make(f"{__name__}:my_transforms")
        results = [
            transform(source.image, source.class_ids, source.boxes_xywhn, np.random.default_rng(i))
            for i in range(200)
        ]
        flipped = np.mean([not np.allclose(boxes, source.boxes_xywhn, atol=1e-3) for _, _, boxes in results])
        assert 0.38 < flipped < 0.62
        assert [t.p for t in MINE] == [0.5, 0.25]


def test_boxes_without_area_do_not_stop_a_run() -> None:
    boxes = np.array([[0.02, 0.5, 0.1, 0.2], [0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.2, 0.2]], np.float32)
    image, ids = textured(np.random.default_rng(0), 100, 80), np.array([0, 1, 2], np.int32)
    _, kept, moved = albu.make([{"HorizontalFlip": {"p": 1.0}}])(image, ids, boxes, np.random.default_rng(0))
    assert kept.tolist() == [0, 2]
    np.testing.assert_allclose(moved[1], [0.5, 0.5, 0.2, 0.2], atol=1e-5)
    _, kept, same = albu.make([{"Blur": {"p": 1.0}}])(image, ids, boxes, np.random.default_rng(0))
    assert kept.tolist() == [0, 1, 2]
    assert same is boxes


@pytest.mark.parametrize("name", ["raypar.images:decode", "os:getcwd"])
def test_a_function_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"train\.albumentations"):
        albu.check(name)
