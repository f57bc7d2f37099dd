"""Albumentations act on the composed image and move every kind of label, as Ultralytics' own class does with the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import albumentations
import numpy as np
import pytest
import torch
from test_augment_tasks import FLIP_IDX, MOVES, SIZE, make_outlined, make_window
from ultralytics.data import augment as theirs
from ultralytics.utils.instance import Instances as TheirInstances
from ultralytics.utils.ops import resample_segments, xyxyxyxy2xywhr

from raypar.augment import albu, outlines
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Recipe, draw, generator
from raypar.augment.labels import Instances, compose_labels
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import Plan
from raypar.dataset.stream import StreamSpec, render
from raypar.storage import Folder

SPATIAL: dict[str, list[dict[str, Any]]] = {
    "mirrored": [{"HorizontalFlip": {"p": 1.0}}],
    "turned": [{"Rotate": {"limit": [25, 25], "p": 1.0}}, {"ToGray": {"p": 1.0}}],
    "warped": [
        {"Affine": {"scale": [0.6, 1.4], "shear": [-10, 10], "p": 1.0}},
        {"HorizontalFlip": {"p": 1.0}},
    ],
    "choice": [{"Perspective": {"p": 1.0}}, {"GaussNoise": {"p": 1.0}}],
    "dropped": [{"CoarseDropout": {"p": 1.0}}, {"Transpose": {"p": 1.0}}],
}


def composed(task: str, seed: int) -> tuple[Recipe, np.ndarray, Instances]:
    """A composed image uint8 (S, S, 3) of noise, and what a mosaic shows."""
    kind = "detect" if task == "outlined" else task
    recipe = Recipe(SIZE, mosaic=0.5, **MOVES, task=kind, flip_idx=FLIP_IDX if task == "pose" else ())
    window = make_outlined(seed % 4)[0] if kind == "detect" else make_window(seed % 4, kind)
    if task == "detect":
        window = [replace(source, polygons=None) for source in window]
    sample = draw(recipe, generator(seed, 0, 0), seed % 4, 4, mosaic_on=True)
    image = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return recipe, image, compose_labels(recipe, sample, window).shown


def by_ultralytics(
    spec: list[dict[str, Any]], seed: int, recipe: Recipe, image: np.ndarray, shown: Instances
) -> dict[str, Any]:
    made = [getattr(albumentations, name)(**kwargs) for entry in spec for name, kwargs in entry.items()]
    rng = np.random.default_rng(seed)
    rng.random(len(made))
    torch.manual_seed(int(rng.integers(2**31)))
    segments = np.zeros((0, 1000, 2), np.float32)
    if shown.polygons is not None:
        num_points = 100 if recipe.task == "obb" else shown.polygons.shape[1]
        polygons = resample_segments(list(shown.polygons), num_points)
        segments = np.reshape(polygons, (-1, num_points, 2)).astype(np.float32)
    keypoints = None if shown.keypoints is None else shown.keypoints.astype(np.float32)
    boxes = shown.boxes.astype(np.float32)
    instances = TheirInstances(boxes, segments, keypoints, bbox_format="xyxy", normalized=False)
    change = theirs.Albumentations(p=1.0, transforms=made, flip_idx=list(recipe.flip_idx))
    labels = change({"img": np.ascontiguousarray(image[..., ::-1]), "cls": shown.class_ids.reshape(-1, 1).astype(np.float32),
                     "instances": instances})  # fmt: skip
    labels["instances"].convert_bbox("xyxy")
    labels["instances"].denormalize(SIZE, SIZE)
    return labels


@pytest.mark.parametrize("task", ["detect", "outlined", "segment", "pose", "obb"])
@pytest.mark.parametrize("name", SPATIAL)
def test_labels_follow_as_in_ultralytics(task: str, name: str) -> None:
    num_labels = 0
    for seed in range(6):
        recipe, image, shown = composed(task, seed)
        transforms = albu.make(SPATIAL[name], recipe.task, has_polygons=task == "outlined")
        expected = by_ultralytics(SPATIAL[name], seed, recipe, image, shown)
        made, found = transforms.change(image, shown, np.random.default_rng(seed), recipe)
        np.testing.assert_array_equal(made, expected["img"][..., ::-1])
        theirs_ = expected["instances"]
        # what lies wholly outside has a box of zeros there
        is_left = (theirs_.bboxes[:, 2:] > theirs_.bboxes[:, :2]).all(1)
        assert found.class_ids.tolist() == expected["cls"].reshape(-1)[is_left].astype(int).tolist()
        np.testing.assert_allclose(found.boxes, theirs_.bboxes[is_left], atol=1e-4 * SIZE)
        if task == "obb":
            wanted = xyxyxyxy2xywhr(theirs_.segments[is_left])
            assert found.polygons is not None
            np.testing.assert_allclose(outlines.boxes_xywhr(found.polygons)[:, :4], wanted[:, :4], atol=0.05)
        elif found.polygons is not None:
            np.testing.assert_allclose(found.polygons, theirs_.segments[is_left], atol=1e-3)
        if task == "pose":
            assert found.keypoints is not None
            np.testing.assert_allclose(found.keypoints, theirs_.keypoints[is_left], atol=1e-3)
        num_labels += len(found.class_ids)
    assert num_labels > 10


def test_the_default_four_are_pixels_as_ultralytics() -> None:
    recipe, image, shown = composed("detect", 0)
    for entry in albu.ULTRALYTICS:
        spec = [{name: {"p": 1.0} for name in entry}]
        made, same = albu.make(spec).change(image, shown, np.random.default_rng(3), recipe)
        np.testing.assert_array_equal(made, by_ultralytics(spec, 3, recipe, image, shown)["img"][..., ::-1])
        assert same is shown
        assert not np.array_equal(made, image)


def test_an_image_keeps_its_labels_when_all_would_be_lost() -> None:
    recipe, image, shown = composed("detect", 0)
    shown = shown.take(np.array([0]))
    away = albu.make([{"Affine": {"translate_px": 4 * SIZE, "p": 1.0}}])
    made, found = away.change(image, shown, np.random.default_rng(0), recipe)
    assert made is image
    assert found is shown


def test_they_act_on_the_composed_image(tmp_path: Path) -> None:
    """Of a mosaic whose tiles are coloured all is grey or nothing is; each image's draw is its own."""
    manifest = coloured(tmp_path)
    split = manifest.split("train")
    plan = Plan(split.shards[0].row_groups, seed=1, global_batch=8, epochs=2, window_images=16)
    spec = StreamSpec.of(Folder.at(tmp_path), split, plan, Recipe(64, mosaic=1.0, scale=0.2), mosaic_epochs=2,
                         albumentations=[{"ToGray": {"p": 0.4}}], world_size=1)  # fmt: skip
    is_grey = []
    for item in plan.items():
        for batch in render(spec, item):
            shares = []
            for image in batch.images.astype(int):
                is_tile = (image != 114).any(0)
                shares.append(((image.max(0) - image.min(0))[is_tile] <= 2).mean())
            assert all(share < 0.05 or share > 0.95 for share in shares), shares
            is_grey += [share > 0.5 for share in shares]
    assert 0.2 < np.mean(is_grey) < 0.6


def coloured(folder: Path) -> Manifest:
    """A dataset of 32 wholly red images with a box each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raypar.dataset.formats.shapes import encode
    from raypar.dataset.manifest import Shard, Split
    from raypar.dataset.schema import row_schema

    image = np.full((64, 64, 3), (220, 30, 60), np.uint8)
    rows = [{"image_id": f"{i}.jpg", "image": encode(image), "height": 64, "width": 64, "class_ids": [0],
             "boxes_xywhn": [0.5, 0.5, 0.4, 0.4], "segments_xyn": []} for i in range(32)]  # fmt: skip
    schema = row_schema("detect")
    pq.write_table(
        pa.Table.from_pylist(rows, schema), folder / "a.parquet", row_group_size=8, use_dictionary=False
    )
    shard = Shard(
        path="a.parquet", row_groups=(8,) * 4, num_bytes=(folder / "a.parquet").stat().st_size, sha256=""
    )
    splits = {"train": Split(shards=(shard,), num_images=32, num_boxes=32, boxes_per_class=(32,))}
    return Manifest(task="detect", class_names=("a",), splits=splits, source="")


def test_an_image_is_the_same_in_any_batch() -> None:
    transforms = albu.make([{"Rotate": {"p": 0.5}}, {"ToGray": {"p": 0.5}}], "segment")
    recipe, window = Recipe(SIZE, mosaic=1.0, **MOVES, task="segment"), make_window(0, "segment")
    renderer = Renderer(recipe, transforms)

    def made(positions: list[int]) -> tuple[np.ndarray, Any]:
        out = np.empty((len(positions), 3, SIZE, SIZE), np.uint8)
        rngs, changes = ([generator(0, epoch, p) for p in positions] for epoch in (0, 1))
        return out, renderer(window, [0] * len(positions), rngs, mosaic_on=True, out=out, changes=changes)

    together, labels = made([3, 1, 4])
    for i, position in enumerate((3, 1, 4)):
        alone, own = made([position])
        assert np.array_equal(alone[0], together[i])
        assert np.array_equal(own.boxes_xywhn, labels.boxes_xywhn[labels.image_index == i])
        assert np.array_equal(own.masks[0], labels.masks[i])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            [{"RandomCrop": {"height": 40, "width": 40, "p": 0.1}}],
            "RandomCrop made an image uint8 of 40x40 px",
        ),
        ([{"Resize": {"height": 32, "width": 64}}], "all images of a batch have one size"),
        ([{"Normalize": {"p": 0.1}}], "Normalize made an image float32"),
        ([{"RandomCrop": {"height": 400, "width": 400, "p": 0.1}}], "RandomCrop: "),
    ],
)
def test_what_makes_no_batch_is_refused_before_training(spec: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(ValueError, match=r"train\.albumentations") as error:
        albu.check(spec, "detect", 64)
    assert words in str(error.value)


def test_labels_that_a_grid_would_tear_apart_are_refused() -> None:
    spec = [{"RandomGridShuffle": {"p": 0.1}}]
    albu.check(spec, "detect")
    for task, has_polygons in (("segment", False), ("pose", False), ("obb", False), ("detect", True)):
        with pytest.raises(ValueError, match="RandomGridShuffle"):
            albu.make(spec, task, has_polygons=has_polygons)


def test_a_choice_of_pixels_alone_moves_nothing() -> None:
    assert not albu.make(f"{__name__}:blur_or_grey").move_pixels
    assert albu.make(f"{__name__}:blur_or_flip").move_pixels


def blur_or_grey() -> list[Any]:
    return [albumentations.OneOf([albumentations.Blur(), albumentations.ToGray()], p=0.5)]


def blur_or_flip() -> list[Any]:
    return [albumentations.OneOf([albumentations.Blur(), albumentations.HorizontalFlip()], p=0.5)]


def test_sources_are_left_alone() -> None:
    source = Source(
        np.full((64, 64, 3), 200, np.uint8),
        np.zeros(1, np.int32),
        np.array([[0.5, 0.5, 0.3, 0.3]], np.float32),
    )
    renderer = Renderer(Recipe(64), albu.make([{"InvertImg": {"p": 1.0}}]))
    out = np.empty((1, 3, 64, 64), np.uint8)
    renderer([source], [0], [generator(0, 0, 0)], mosaic_on=False, out=out, changes=[generator(0, 0, 1)])
    assert (out == 55).all()
    assert (source.image == 200).all()
