"""Labels of segment, pose and obb against Ultralytics' whole chain with the same draws; properties of the outlines."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.cfg import get_cfg
from ultralytics.data import augment as theirs
from ultralytics.data.utils import polygons2masks_overlap
from ultralytics.utils.instance import Instances
from ultralytics.utils.ops import resample_segments, segment2box, xyxyxyxy2xywhr

from benchmarks.parity import box_differences, matched
from raypar.augment import outlines
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Layer, Recipe, Sample, draw, generator, resized_hw
from raypar.augment.labels import move_labels

SIZE = 256
MOVES = {"translate": 0.1, "scale": 0.5, "fliplr": 0.5}
RECIPES: dict[str, dict[str, Any]] = {
    "default": {"mosaic": 1.0, **MOVES},
    "no mosaic": {**MOVES, "flipud": 0.5},
    "mixup": {"mosaic": 0.5, "mixup": 1.0, **MOVES},
    "cutmix": {"mosaic": 0.5, "cutmix": 1.0, **MOVES, "flipud": 0.5},
    "turned": {"mosaic": 1.0, "degrees": 40, "shear": 8, **MOVES},
    "tilted": {"mosaic": 0.5, "perspective": 0.0008, "cutmix": 0.3, **MOVES},
}
NUM_KEYPOINTS, FLIP_IDX = 5, (0, 2, 1, 4, 3)


def outline(rng: np.random.Generator, num_points: int) -> np.ndarray:
    """A star-shaped polygon float32 (P, 2) within the image, often touching its edge."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, num_points))
    radius = rng.uniform(0.3, 1, num_points)[:, None] * rng.uniform(0.03, 0.4)
    centre = rng.uniform(0, 1, 2)
    return (centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)).clip(0, 1).astype(np.float32)


def rotated(rng: np.random.Generator, hw: tuple[int, int]) -> np.ndarray:
    """Corners float32 (4, 2) of a rotated box that may leave the image a little."""
    turn, (long, short) = (
        rng.uniform(0, np.pi),
        np.array([rng.uniform(0.15, 0.5), rng.uniform(0.03, 0.12)]) * min(hw),
    )
    basis = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    corners = np.array([[1, 1], [1, -1], [-1, -1], [-1, 1]]) / 2 * [long, short] @ basis
    return ((corners + rng.uniform(0, 1, 2) * hw[::-1]) / hw[::-1]).astype(np.float32)


def make_source(rng: np.random.Generator, task: str, hw: tuple[int, int], count: int = 5) -> Source:
    image = np.full((*hw, 3), 100, np.uint8)
    class_ids = rng.integers(0, 3, count).astype(np.int32)
    if task == "pose":
        wh = rng.uniform(0.1, 0.5, (count, 2))
        centres = rng.uniform(wh / 2, 1 - wh / 2)
        points = centres[:, None] + rng.uniform(-0.5, 0.5, (count, NUM_KEYPOINTS, 2)) * wh[:, None]
        keypoints = np.concatenate([points, rng.integers(0, 3, (count, NUM_KEYPOINTS, 1))], -1).astype(
            np.float32
        )
        return Source(
            image, class_ids, np.concatenate([centres, wh], 1).astype(np.float32), keypoints=keypoints
        )
    raw = [
        rotated(rng, hw) if task == "obb" else outline(rng, int(rng.integers(3, 30))) for _ in range(count)
    ]
    boxes = np.array([[*(p.min(0) + p.max(0)) / 2, *(p.max(0) - p.min(0))] for p in raw], np.float32).reshape(
        -1, 4
    )
    polygons = outlines.densify(raw) if task == "segment" else np.array(raw, np.float32).reshape(-1, 4, 2)
    return Source(image, class_ids, boxes, polygons=polygons)


def make_window(seed: int, task: str) -> list[Source]:
    rng = np.random.default_rng(seed)
    hws = [(192, 256), (256, 171), (256, 256), (128, 256), (100, 80)]
    return [make_source(rng, task, hw, count) for hw, count in zip(hws, (5, 8, 0, 3, 4), strict=True)]


def chain(recipe: Recipe, sample: Sample, sources: list[Source]) -> dict[str, Any]:  # noqa: PLR0915
    """Ultralytics' transforms with the sample's numbers in place of their draws."""
    is_obb = recipe.task == "obb"

    def entry(index: int) -> dict[str, Any]:
        source = sources[index]
        hw = resized_hw(source.hw, SIZE)
        image = cv2.resize(source.image, hw[::-1], interpolation=cv2.INTER_LINEAR)
        segments = np.zeros((0, 1000, 2), np.float32)
        if source.polygons is not None:
            num_points = 100 if is_obb else max(1000, source.polygons.shape[1])
            polygons = resample_segments(list(source.polygons), num_points)
            segments = np.reshape(polygons, (-1, num_points, 2)).astype(np.float32)
        keypoints = None if source.keypoints is None else source.keypoints.copy()
        instances = Instances(
            source.boxes_xywhn.copy(), segments, keypoints, bbox_format="xywh", normalized=True
        )
        return {"img": image, "cls": source.class_ids.reshape(-1, 1).astype(np.float32), "instances": instances,
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
                dataset = SimpleNamespace(cache="ram", get_image_and_label=entry, use_obb=is_obb)
                mosaic = theirs.Mosaic(dataset, imgsz=SIZE, p=1.0)
                mosaic.get_indexes = lambda: list(layer.indices[1:])
                params = mosaic.get_params(labels)
                labels = mosaic.apply_instances(mosaic.apply_image(labels, params), params)
            if layer.copy_paste:
                sort = np.argsort
                # many are equally free
                patch.setattr(np, "argsort", lambda values: sort(values, kind="stable"))
                labels = theirs.CopyPaste(p=layer.copy_paste, mode="flip")(labels)
            warp = theirs.RandomPerspective(
                perspective=recipe.perspective, size=(SIZE, SIZE), preserve_obb=is_obb
            )
            params = warp.get_params(labels)
            return warp.apply_instances(warp.apply_image(labels, params), params)

    labels = layer_of(sample.layer)
    with pytest.MonkeyPatch.context() as patch:
        for kind, second in ((theirs.MixUp, sample.mixed), (theirs.CutMix, sample.cut)):
            if second is None:
                continue
            dataset = SimpleNamespace(
                get_image_and_label=lambda i, layer=second[0]: layer_of(layer), use_obb=is_obb
            )
            mix = kind(dataset, p=1.0)
            mix.get_indexes = lambda: 0
            if sample.cut is not None:
                areas = iter(sample.cut[1].astype(int))
                mix._rand_bbox = lambda *_, areas=areas: tuple(next(areas))
                patch.setattr(np.random, "choice", lambda free: free[int(sample.cut[2] * len(free))])
            labels = mix(labels)
    for flip, direction in ((sample.flip[1], "vertical"), (sample.flip[0], "horizontal")):
        flip_idx = list(recipe.flip_idx) or None
        labels = theirs.RandomFlip(p=1.0 if flip else 0.0, direction=direction, flip_idx=flip_idx)(labels)
    finish = theirs.Format(
        return_mask=recipe.task == "segment",
        return_keypoint=recipe.task == "pose",
        return_obb=is_obb,
        mask_ratio=4,
    )
    return finish(labels)


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    return float((mask & other).sum() / (mask | other).sum()) if (mask | other).any() else 1.0


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """(N, 5) -> corners (N, 4, 2), from the lowest angle about the centre on."""
    return np.array(
        [cv2.boxPoints(((b[0], b[1]), (b[2], b[3]), float(np.rad2deg(b[4])))) for b in boxes]
    ).reshape(-1, 4, 2)


def compare(recipe: Recipe, sources: list[Source], seed: int) -> int:
    """Asserts equal labels; how many there were."""
    index = seed % len(sources)
    out = np.zeros((1, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(recipe)(sources, [index], [generator(seed, 0, 0)], mosaic_on=True, out=out)
    sample = draw(recipe, generator(seed, 0, 0), index, len(sources), mosaic_on=True)
    expected = chain(recipe, sample, sources)
    class_ids, boxes = expected["cls"].numpy().reshape(-1).astype(int), expected["bboxes"].numpy()
    assert len(labels.class_ids) == len(class_ids)
    if recipe.task == "segment":
        return compare_masks(labels, expected)
    assert labels.class_ids.tolist() == class_ids.tolist()
    if recipe.task == "pose":
        np.testing.assert_allclose(labels.boxes_xywhn, boxes, atol=1e-4)
        assert labels.keypoints is not None
        theirs_ = expected["keypoints"].numpy().reshape(-1, NUM_KEYPOINTS, 3)
        np.testing.assert_allclose(labels.keypoints[..., :2] * SIZE, theirs_[..., :2] * SIZE, atol=1e-3)
        assert np.array_equal(labels.keypoints[..., 2], theirs_[..., 2])
    if recipe.task == "obb":
        assert labels.boxes_xywhr is not None
        # else which side is the longer one is decided by a last bit
        long = (boxes[:, 2] - boxes[:, 3]) * SIZE > 0.1
        np.testing.assert_allclose(labels.boxes_xywhr[long, :4], boxes[long, :4], atol=1e-3)
        turn = (labels.boxes_xywhr[long, 4] - boxes[long, 4] + np.pi / 2) % np.pi - np.pi / 2
        np.testing.assert_allclose(turn * boxes[long, 2], 0, atol=1e-3)
    return len(class_ids)


def compare_masks(labels: Any, expected: dict[str, Any]) -> int:
    """The same masks, but that instances of about equal area may have changed places."""
    mask, other = labels.masks[0], expected["masks"][0].numpy().astype(int)
    boxes, others = labels.boxes_xywhn, expected["bboxes"].numpy()
    ids = expected["cls"].numpy().reshape(-1)
    left, renamed = set(range(len(boxes))), np.zeros_like(other)
    for i in range(len(boxes)):
        same = [
            j for j in left if np.abs(others[j] - boxes[i]).max() < 1e-4 and ids[j] == labels.class_ids[i]
        ]
        assert same, (boxes[i], others)
        left.discard(same[0])
        renamed[other == same[0] + 1] = i + 1
        areas = np.bincount(other.reshape(-1), minlength=len(boxes) + 1)
        assert i == same[0] or abs(areas[i + 1] - areas[same[0] + 1]) < 400  # of what is seen of them
    assert iou(mask > 0, renamed > 0) > 0.98
    assert (mask != renamed).mean() < 0.01
    return len(boxes)


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
@pytest.mark.parametrize("name", RECIPES)
def test_labels_are_those_of_ultralytics_chain(task: str, name: str) -> None:
    recipe = Recipe(SIZE, **RECIPES[name], task=task, flip_idx=FLIP_IDX if task == "pose" else ())
    counts = [compare(recipe, make_window(seed % 4, task), seed) for seed in range(24)]
    assert sum(counts) > 60


def make_outlined(seed: int) -> tuple[list[Source], list[Source]]:
    """Sources of detect with polygons: dense ones, and the same as outlines, of which only boxes are wanted."""
    rng = np.random.default_rng(seed)
    dense, flat = [], []
    for i, (hw, count) in enumerate(
        zip([(192, 256), (256, 171), (256, 256), (128, 256)], (5, 8, 0, 6), strict=True)
    ):
        longest = (
            1300 if (seed, i) == (3, 1) else 30
        )  # more than an image's polygons are usually made dense with
        raw = [outline(rng, int(rng.integers(3, longest))) for _ in range(count)]
        boxes = np.array([[*(p.min(0) + p.max(0)) / 2, *(p.max(0) - p.min(0))] for p in raw], np.float32)
        labels = rng.integers(0, 3, count).astype(np.int32), boxes.reshape(-1, 4)
        image = np.full((*hw, 3), 100, np.uint8)
        dense.append(Source(image, *labels, outlines.densify(raw)))
        flat.append(Source(image, *labels, outlines.Outlines.of(raw)))
    return dense, flat


@pytest.mark.parametrize("name", RECIPES)
def test_boxes_of_detect_follow_polygons_as_in_ultralytics(name: str) -> None:
    recipe, num_boxes, num_tighter = Recipe(SIZE, **RECIPES[name]), 0, 0
    for seed in range(24):
        dense, flat = make_outlined(seed % 4)
        sample = draw(recipe, generator(seed, 0, 0), seed % 4, 4, mosaic_on=True)
        expected = chain(recipe, sample, dense)
        boxes = expected["bboxes"].numpy().reshape(-1, 4)
        for sources in (dense, flat):
            moved = move_labels(recipe, sample, sources)
            assert moved.class_ids.tolist() == expected["cls"].numpy().reshape(-1).astype(int).tolist()
            np.testing.assert_allclose(moved.boxes_xywhn, boxes, atol=1e-4)
        plain = move_labels(recipe, sample, [replace(source, polygons=None) for source in dense])
        num_boxes += len(boxes)
        num_tighter += len(boxes) - sum(np.abs(plain.boxes_xywhn - box).max(1).min() < 1e-3 for box in boxes if len(plain.boxes_xywhn))  # fmt: skip
    assert num_boxes > 60
    assert num_tighter > 10  # with boxes alone they would be others


def test_copy_paste_of_detect_pastes_as_ultralytics() -> None:
    # all that are eligible: which of those that are equally free come first is decided by a last bit
    recipe, num_pasted = Recipe(SIZE, mosaic=1.0, **MOVES, copy_paste=1.0), 0
    for seed in range(16):
        dense, _ = make_outlined(seed % 4)
        sample = draw(recipe, generator(seed, 0, 0), seed % 4, 4, mosaic_on=True)
        moved, expected = move_labels(recipe, sample, dense), chain(recipe, sample, dense)
        found = np.column_stack([moved.class_ids, moved.boxes_xywhn])
        wanted = np.column_stack([expected["cls"].numpy(), expected["bboxes"].numpy().reshape(-1, 4)])
        assert len(found) == len(wanted)
        assert all(np.abs(wanted - row).max(1).min() < 1e-4 for row in found)
        num_pasted += len(moved.pasted[0])
    assert num_pasted > 8


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_copy_paste_is_ultralytics(mosaic: float) -> None:
    recipe = Recipe(SIZE, mosaic=mosaic, **MOVES, task="segment", copy_paste=0.6)
    assert sum(compare(recipe, make_window(seed % 4, "segment"), seed) for seed in range(16)) > 60


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_copy_paste_paints_what_ultralytics_paints(mosaic: float) -> None:
    recipe = Recipe(SIZE, mosaic=mosaic, **MOVES, task="segment", copy_paste=1.0)
    window = make_window(1, "segment")
    for i, source in enumerate(window):
        height, width = source.hw
        source.image[...] = np.stack(
            np.broadcast_arrays(np.arange(width) * 255 // width, np.arange(height)[:, None], 60 * i), -1
        )
    num_pasted = 0
    for seed in range(8):
        sample = draw(recipe, generator(seed, 0, 0), seed % 5, 5, mosaic_on=True)
        out = np.zeros((3, SIZE, SIZE), np.uint8)
        moved = Renderer(recipe).render(sample, window, out)
        expected = chain(recipe, sample, window)["img"].numpy()[::-1]  # Format turns BGR into RGB
        num_pasted += len(moved.pasted[0])
        assert np.abs(out.astype(int) - expected).mean() < 2
    assert num_pasted > 8


def test_copy_paste_of_rotated_boxes_is_ultralytics() -> None:
    recipe = Recipe(SIZE, mosaic=1.0, **MOVES, task="obb", copy_paste=1.0)
    num_pasted = 0
    for seed in range(16):
        window = make_window(seed % 4, "obb")
        sample = draw(recipe, generator(seed, 0, 0), seed % 5, 5, mosaic_on=True)
        moved, expected = move_labels(recipe, sample, window), chain(recipe, sample, window)
        wanted_ids, wanted = expected["cls"].numpy().reshape(-1), expected["bboxes"].numpy()
        assert moved.boxes_xywhr is not None
        assert sorted(moved.class_ids.tolist()) == sorted(wanted_ids.astype(int).tolist())
        order = matched(moved.class_ids, moved.boxes_xywhr, wanted_ids, wanted)
        assert (box_differences(moved.boxes_xywhr, wanted[order]) < 1e-3).all()
        num_pasted += len(moved.pasted[0])
    assert num_pasted > 8


POINT = st.tuples(st.integers(-240, 1280), st.integers(-240, 1280)).map(lambda p: (p[0] / 4, p[1] / 4))
POLYGONS = st.lists(st.lists(POINT, min_size=3, max_size=12), max_size=5)


@given(POLYGONS)
@settings(max_examples=50, deadline=None)
def test_outlines_are_ultralytics(raw: list[list[tuple[float, float]]]) -> None:
    polygons = [np.array(p, np.float32) for p in raw]
    dense = outlines.densify(polygons)
    for mine, theirs_ in zip(dense, resample_segments([p.copy() for p in polygons]), strict=True):
        np.testing.assert_array_equal(mine, theirs_)
    with np.errstate(over="ignore"):
        expected = np.array([segment2box(p, SIZE, SIZE) for p in dense]).reshape(-1, 4)
    np.testing.assert_allclose(
        outlines.visible_boxes(dense, SIZE) if len(dense) else np.zeros((0, 4)), expected, atol=1e-3
    )


@given(POLYGONS, st.sampled_from([1, 2, 3, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_masks_are_ultralytics(raw: list[list[tuple[float, float]]], ratio: int) -> None:
    polygons = outlines.densify([np.array(p, np.float32).clip(0, SIZE) for p in raw])
    mask, order = outlines.overlap_mask(polygons, SIZE, ratio)
    assert mask.shape == (SIZE // ratio, SIZE // ratio)
    assert sorted(order.tolist()) == list(range(len(raw)))
    if raw:
        with pytest.MonkeyPatch.context() as patch:
            sort = np.argsort
            # some have the same area
            patch.setattr(np, "argsort", lambda values: sort(values, kind="stable"))
            expected, index = polygons2masks_overlap((SIZE, SIZE), list(polygons), ratio)
        assert index.tolist() == order.tolist()
        np.testing.assert_array_equal(mask, expected)


def test_more_than_255_masks() -> None:
    squares = [
        np.array([[x, y], [x + 6, y], [x + 6, y + 6], [x, y + 6]], np.float32)
        for x in range(0, 250, 12)
        for y in range(0, 250, 12)
    ]
    mask, _ = outlines.overlap_mask(outlines.densify(squares), SIZE, 4)
    assert mask.dtype == np.uint16
    assert mask.max() == len(squares) > 255


def test_what_is_left_of_a_rotated_box_is_a_share_of_the_whole() -> None:
    """Boxes in shards are cut to their image, corners are not: Ultralytics compares with the box around all corners."""
    corners = np.array([[[-0.25, 0.5], [0.1, 0.15], [0.45, 0.5], [0.1, 0.85]]], np.float32)
    whole, cut = np.array([[0.1, 0.5, 0.7, 0.7]], np.float32), np.array([[0.225, 0.5, 0.45, 0.7]], np.float32)
    image, class_ids = np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros(1, np.int32)
    recipe, counts = Recipe(SIZE, translate=0.6, scale=0.5, task="obb"), []
    for seed in range(400):
        sample = draw(recipe, generator(seed, 0, 0), 0, 1, mosaic_on=False)
        moved = [
            move_labels(recipe, sample, [Source(image, class_ids, box, corners)]) for box in (whole, cut)
        ]
        counts.append([len(m.class_ids) for m in moved])
    assert all(a == b for a, b in counts)
    assert 0.5 < np.mean(counts) < 0.99


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_corners_are_ultralytics(seed: int) -> None:
    corners = np.array([rotated(np.random.default_rng([seed, i]), (SIZE, SIZE)) for i in range(5)]) * SIZE
    boxes = outlines.boxes_xywhr(corners)
    expected = xyxyxyxy2xywhr(corners)
    np.testing.assert_allclose(boxes, expected, atol=1e-3)
    assert (boxes[:, 4] >= -np.pi / 4 - 1e-6).all()
    assert (boxes[:, 4] <= 3 * np.pi / 4).all()


def test_a_corner_on_the_edge_does_not_make_a_box_of_the_image() -> None:
    """Numbers with which cv2.intersectConvexConvex returns the whole of its second polygon."""
    corners = np.array(
        [[[22.530080, 48.436653], [33.603607, 37.064732], [6.712e-08, 4.3428755], [-11.073526, 15.714798]]],
        np.float32,
    )
    before = np.array([[-11.073526, 4.3428755, 33.603607, 48.436653]])
    cut, boxes = outlines.cut_corners(corners, before, 70, 114)
    np.testing.assert_allclose(boxes, [[0, 4.3428755, 33.603607, 48.436653]], atol=1e-4)
    assert cut.min() > -11.1
    assert cut.max() < 48.5


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_cut_polygons_are_what_the_image_shows_of_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    polygon = (
        cv2.convexHull(rng.uniform(-60, 160, (6, 2)).astype(np.float32)).reshape(-1, 2).astype(np.float64)
    )
    found = outlines.cut_polygon(polygon, 100, 80)
    area, expected = cv2.intersectConvexConvex(
        polygon.astype(np.float32), np.array([[0, 0], [100, 0], [100, 80], [0, 80]], np.float32)
    )
    assert len(found) == 0 or (found.min() >= 0 and (found <= [100.001, 80.001]).all())
    if expected is None or area <= 0:
        assert len(found) == 0 or cv2.contourArea(found.astype(np.float32)) < 1
        return
    assert cv2.contourArea(found.astype(np.float32)) == pytest.approx(area, abs=0.05)


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_an_image_without_instances(task: str) -> None:
    window = [make_source(np.random.default_rng(0), task, (200, 256), 0)]
    recipe = Recipe(
        SIZE, mosaic=1.0, mixup=1.0, cutmix=1.0, fliplr=1.0, copy_paste=1.0, task=task, flip_idx=FLIP_IDX
    )
    out = np.zeros((2, 3, SIZE, SIZE), np.uint8)
    labels = Renderer(recipe)(window, [0, 0], [generator(0, 0, p) for p in range(2)], mosaic_on=True, out=out)
    assert len(labels.class_ids) == 0
    assert (labels.masks is not None and labels.masks.shape == (2, SIZE // 4, SIZE // 4)) == (
        task == "segment"
    )
    assert (labels.keypoints is not None and labels.keypoints.shape == (0, NUM_KEYPOINTS, 3)) == (
        task == "pose"
    )
    assert (labels.boxes_xywhr is not None and labels.boxes_xywhr.shape == (0, 5)) == (task == "obb")


def test_the_recipe_follows_the_task() -> None:
    args = vars(get_cfg(overrides={"imgsz": 320, "copy_paste": 0.3, "fliplr": 0.5, "flipud": 0.2}))
    assert [Recipe.from_yolo(args, task).copy_paste for task in ("detect", "obb", "pose")] == [0.3, 0.3, 0]
    segment = Recipe.from_yolo(args, "segment")
    assert (segment.copy_paste, segment.mask_ratio, segment.fliplr) == (0.3, 4, 0.5)
    assert draw(segment, generator(0, 0, 0), 0, 4, mosaic_on=True).layer.copy_paste == 0.3
    assert draw(segment, generator(0, 0, 0), 0, 4, mosaic_on=False).layer.copy_paste == 0
    pose = Recipe.from_yolo(args, "pose")
    # as in v8_transforms: nothing says which keypoint becomes which
    assert (pose.fliplr, pose.flipud) == (0, 0)
    assert Recipe.from_yolo(args, "pose", [1, 0]).fliplr == 0.5
    with pytest.raises(ValueError, match="overlap_mask"):
        Recipe.from_yolo(args | {"overlap_mask": False}, "segment")
    for task in ("detect", "segment", "obb"):
        with pytest.raises(ValueError, match="copy_paste_mode"):
            Recipe.from_yolo(args | {"copy_paste_mode": "mixup"}, task)
