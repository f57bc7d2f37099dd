"""Augmentation: the same draws give Ultralytics' boxes and pixels; boxes stay on what they mark; keys decide everything."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.data import augment as theirs
from ultralytics.utils.instance import Instances

from raypar.augment import albu
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Layer, Recipe, Sample, draw, generator
from raypar.augment.paint import develop

SIZE = 160
GEOMETRIES = {
    "default": Recipe(
        SIZE, mosaic=1.0, translate=0.1, scale=0.5, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5
    ),
    "turned": Recipe(SIZE, mosaic=1.0, degrees=20, translate=0.2, scale=0.4, shear=8, flipud=0.5),
    "tilted": Recipe(SIZE, mosaic=0.5, perspective=0.0008, scale=0.3, fliplr=0.5),
    "plain": Recipe(SIZE, translate=0.1, scale=0.5),
}


def make_sources(rng: np.random.Generator, count: int = 5) -> list[Source]:
    """Smooth pictures of several sizes with off-centre, oblong boxes."""
    sources = []
    for _ in range(count):
        height, width = (
            (SIZE, int(rng.integers(60, SIZE))) if rng.random() < 0.5 else (int(rng.integers(60, SIZE)), SIZE)
        )
        image = cv2.resize(
            rng.integers(0, 256, (8, 8, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
        )
        wh = rng.uniform(0.1, 0.4, (4, 2)) * (1.0, 0.6)
        boxes = np.concatenate([rng.uniform(wh / 2, 1 - wh / 2), wh], 1).astype(np.float32)
        sources.append(Source(image, rng.integers(0, 3, 4).astype(np.int32), boxes))
    return sources


def ultralytics_labels(source: Source) -> dict[str, Any]:
    return {
        "img": np.ascontiguousarray(source.image[..., ::-1]),
        "cls": source.class_ids.reshape(-1, 1).astype(np.float32),
        "instances": Instances(source.boxes_xywhn.copy(), np.zeros((0, 1000, 2), np.float32), bbox_format="xywh", normalized=True),
        "im_file": "x", "ori_shape": source.hw, "resized_shape": source.hw,
    }  # fmt: skip


def ultralytics_layer(
    layer: Layer, recipe: Recipe, sources: list[Source], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The same layer by Ultralytics' own Mosaic and RandomPerspective, with their draws replaced by ours."""
    draws = [layer.centre[1], layer.centre[0]] if layer.centre else []
    draws += [*layer.perspective, layer.angle, layer.scale, *layer.shear, *(s for s in layer.shift)]
    values = iter(draws)
    monkeypatch.setattr(random, "uniform", lambda a, b: next(values))
    labels = ultralytics_labels(sources[layer.indices[0]])
    if layer.centre:
        dataset = SimpleNamespace(cache="ram", get_image_and_label=lambda i: ultralytics_labels(sources[i]))
        mosaic = theirs.Mosaic(dataset, imgsz=SIZE, p=1.0)
        mosaic.get_indexes = lambda: list(layer.indices[1:])
        params = mosaic.get_params(labels)
        labels = mosaic.apply_instances(mosaic.apply_image(labels, params), params)
    warp = theirs.RandomPerspective(perspective=recipe.perspective, size=(SIZE, SIZE))
    params = warp.get_params(labels)
    labels = warp.apply_instances(warp.apply_image(labels, params), params)
    monkeypatch.undo()
    return labels


def finish(labels: dict[str, Any], sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flips as Ultralytics, then RGB and normalised boxes."""
    for k, direction in enumerate(("horizontal", "vertical")):
        flip = theirs.RandomFlip(p=1.0 if sample.flip[k] else 0.0, direction=direction)
        params = flip.get_params(labels)
        labels = flip.apply_instances(flip.apply_image(labels, params), params)
    labels["instances"].convert_bbox("xywh")
    labels["instances"].normalize(SIZE, SIZE)
    return (
        np.ascontiguousarray(labels["img"][..., ::-1]),
        labels["cls"].reshape(-1).astype(int),
        labels["instances"].bboxes,
    )


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


@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_and_pixels_equal_ultralytics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = GEOMETRIES[name]
    without_colour = Recipe(**{**recipe.__dict__, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0})
    num_boxes = 0
    for seed in range(25):
        sources = make_sources(np.random.default_rng(seed))
        sample = draw(without_colour, generator(seed, 0, 0), seed % 5, 5, mosaic_on=True)
        image, class_ids, boxes = render(without_colour, sample, sources)
        expected_image, expected_ids, expected = finish(
            ultralytics_layer(sample.layer, recipe, sources, monkeypatch), sample
        )
        assert class_ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(boxes, expected, atol=1e-4)
        assert np.abs(image.astype(int) - expected_image.astype(int)).mean() <= 2.0
        num_boxes += len(boxes)
    assert num_boxes > 40


def test_colours_equal_ultralytics(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        image, gains = make_sources(rng, 1)[0].image, rng.uniform(-1, 1, 3) * [0.015, 0.7, 0.4]
        labels = {"img": np.ascontiguousarray(image[..., ::-1])}
        monkeypatch.setattr(np.random, "uniform", lambda *_, g=gains: g / [0.015, 0.7, 0.4])
        theirs.RandomHSV(0.015, 0.7, 0.4).apply_image(labels)
        monkeypatch.undo()
        ours = recolour(image, gains)
        assert np.abs(ours.astype(int) - labels["img"][..., ::-1].astype(int)).max() <= 2
        assert not np.array_equal(ours, image)


def test_mix_up_and_cut_mix_blend_as_ultralytics() -> None:
    sources = make_sources(np.random.default_rng(0))
    recipe = Recipe(SIZE, mosaic=1.0, scale=0.3, mixup=1.0)
    sample = draw(recipe, generator(0, 0, 1), 0, 5, mosaic_on=True)
    assert sample.mixed is not None
    alone = [
        render(recipe, Sample(layer, None, None, sample.gains, sample.flip, False), sources)
        for layer in (sample.layer, sample.mixed[0])
    ]
    image, class_ids, boxes = render(recipe, sample, sources)
    share = sample.mixed[1]
    expected = (alone[0][0] * share + alone[1][0] * (1 - share)).astype(np.uint8)
    assert np.abs(image.astype(int) - expected.astype(int)).max() <= 1
    assert len(class_ids) == len(alone[0][1]) + len(alone[1][1]) == len(boxes)

    recipe, cuts = Recipe(SIZE, scale=0.2, cutmix=1.0, fliplr=0.5), 0
    for position in range(120):
        sample = draw(recipe, generator(0, 0, position), position % 5, 5, mosaic_on=True)
        assert sample.cut is not None
        plain = render(recipe, Sample(sample.layer, None, None, sample.gains, sample.flip, False), sources)
        other = render(recipe, Sample(sample.cut[0], None, None, sample.gains, sample.flip, False), sources)[
            0
        ]
        image, class_ids, _ = render(recipe, sample, sources)
        changed = (image != plain[0]).any(2)
        cuts += len(class_ids) > len(plain[1])
        assert np.array_equal(image[changed], other[changed])
        assert changed.any() <= (len(class_ids) > len(plain[1]))
    assert cuts > 3


@given(st.sampled_from(sorted(GEOMETRIES)), st.integers(0, 10**9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_marked_rectangle_is_where_its_box_says(name: str, key: int, mosaic_on: bool) -> None:
    """A white rectangle on black, alone in its window: the rendered white lies in the moved box, and touches its sides."""
    recipe = Recipe(**{**GEOMETRIES[name].__dict__, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0})
    image = np.zeros((120, SIZE, 3), np.uint8)
    image[30:80, 40:110] = 255
    empty = Source(np.zeros((SIZE, SIZE, 3), np.uint8), np.empty(0, np.int32), np.empty((0, 4), np.float32))
    marked = Source(
        image, np.zeros(1, np.int32), np.array([[75 / SIZE, 55 / 120, 70 / SIZE, 50 / 120]], np.float32)
    )
    sample = draw(recipe, generator(1, 0, key), 0, 2, mosaic_on=mosaic_on)
    indices = tuple(0 if i == 0 else 1 for i in range(len(sample.layer.indices)))
    sample = Sample(
        Layer(indices, *list(sample.layer.__dict__.values())[1:]),
        None,
        None,
        sample.gains,
        sample.flip,
        False,
    )
    rendered, _, boxes = render(recipe, sample, [marked, empty])
    white = np.argwhere(rendered[..., 0] > 200)
    for x, y, w, h in boxes * SIZE:
        low, high = white.min(0), white.max(0)
        assert low[1] >= x - w / 2 - 2
        assert high[1] <= x + w / 2 + 2
        assert low[0] >= y - h / 2 - 2
        assert high[0] <= y + h / 2 + 2
        # turned: the hull is wider than what it holds
        slack = 2.5 if recipe.is_axis_aligned else 0.5 * max(w, h) + 2.5
        assert abs(low[1] - (x - w / 2)) <= slack
        assert abs(high[0] - (y + h / 2)) <= slack


@given(
    st.sampled_from(sorted(GEOMETRIES)), st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 2**40)
)
@settings(max_examples=40, deadline=None)
def test_keys_decide(name: str, seed: int, epoch: int, position: int) -> None:
    one, again, other = (
        draw(GEOMETRIES[name], generator(seed, epoch, p), 0, 9, mosaic_on=True)
        for p in (position, position, position + 1)
    )
    assert repr(one) == repr(again)
    assert repr(one) != repr(other)


@given(st.sampled_from(sorted(GEOMETRIES)), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_boxes_stay_in_the_image_and_slabs_are_filled(name: str, seed: int) -> None:
    sources = make_sources(np.random.default_rng(seed % 7))
    out = np.zeros((3, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(GEOMETRIES[name])(
        sources, [0, 1, 2], [generator(seed, 0, i) for i in range(3)], mosaic_on=True, out=out
    )
    low, high = (
        labels.boxes_xywhn[:, :2] - labels.boxes_xywhn[:, 2:] / 2,
        labels.boxes_xywhn[:, :2] + labels.boxes_xywhn[:, 2:] / 2,
    )
    assert (low >= -1e-6).all()
    assert (high <= 1 + 1e-6).all()
    assert len(labels.class_ids) == len(labels.boxes_xywhn) == len(labels.image_index)
    assert (np.diff(labels.image_index) >= 0).all()
    assert out.reshape(3, -1).any(1).all()


def test_draws_are_distributed_as_the_recipe_says() -> None:
    samples = [draw(GEOMETRIES["default"], generator(0, 0, p), 0, 9, mosaic_on=True) for p in range(4000)]
    scales = np.array([s.layer.scale for s in samples])
    assert abs(scales.mean() - 1) < 0.02
    assert scales.min() > 0.5
    assert scales.max() < 1.5
    assert abs(np.mean([s.flip[0] for s in samples]) - 0.5) < 0.03
    assert not any(s.flip[1] for s in samples)
    partners = np.bincount([i for s in samples for i in s.layer.indices[1:]], minlength=9)
    assert partners.min() > 0.9 * partners.mean()


def test_albumentations_is_seeded_and_moves_boxes() -> None:
    source = make_sources(np.random.default_rng(0), 1)[0]
    flip = albu.make([{"HorizontalFlip": {"p": 1.0}}, {"GaussNoise": {"p": 1.0}}])
    image, class_ids, boxes = flip(
        source.image, source.class_ids, source.boxes_xywhn, np.random.default_rng(3)
    )
    again, _, _ = flip(source.image, source.class_ids, source.boxes_xywhn, np.random.default_rng(3))
    other, _, _ = flip(source.image, source.class_ids, source.boxes_xywhn, np.random.default_rng(4))
    assert np.array_equal(image, again)
    assert not np.array_equal(image, other)
    np.testing.assert_allclose(boxes[:, 0], 1 - source.boxes_xywhn[:, 0], atol=1e-5)
    assert class_ids.tolist() == source.class_ids.tolist()


def test_albumentations_probabilities_hold() -> None:
    source = make_sources(np.random.default_rng(0), 1)[0]
    transform = albu.make([{"ToGray": {"p": 0.25}}])
    changed = [
        transform(source.image, source.class_ids, source.boxes_xywhn, np.random.default_rng(i))[0]
        is not source.image
        for i in range(400)
    ]
    assert 0.17 < np.mean(changed) < 0.33


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([{"HorizontalFlipp": {}}], "did you mean 'HorizontalFlip'"),
        ([{"Blur": {"p": 0.1, "blurr_limit": 3}}], "Blur"),
        (["Blur"], "form"),
        ("no.such.module:make", "no.such.module"),
    ],
)
def test_a_wrong_transform_is_named(spec: Any, words: str) -> None:
    with pytest.raises(ValueError, match="albumentations") as error:
        albu.check(spec)
    assert words in str(error.value)


def test_real_photographs_too(bccd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted((bccd / "JPEGImages").glob("*.jpg"))[:4]
    sources = []
    for path in paths:
        image = cv2.resize(
            cv2.imread(str(path))[..., ::-1], (SIZE, SIZE * 3 // 4), interpolation=cv2.INTER_LINEAR
        )
        sources.append(
            Source(
                np.ascontiguousarray(image),
                np.zeros(1, np.int32),
                np.array([[0.4, 0.5, 0.3, 0.2]], np.float32),
            )
        )
    recipe = Recipe(SIZE, mosaic=1.0, translate=0.1, scale=0.5, fliplr=0.5)
    for position in range(10):
        sample = draw(recipe, generator(5, 0, position), position % 4, 4, mosaic_on=True)
        image, _, _ = render(recipe, sample, sources)
        expected, _, _ = finish(ultralytics_layer(sample.layer, recipe, sources, monkeypatch), sample)
        assert np.abs(image.astype(int) - expected.astype(int)).mean() <= 2.0
