"""Batches of the same files by raypar and by Ultralytics, whose draws are replaced by raypar's.

    python benchmarks/parity.py [--kinds detect coco ...] [--images 200] [--imgsz 640]

For each task and format files are written: images, and labels as their format has them. raypar reads them as `prepare` does, writes shards, and its stream makes batches of them with the
default augmentation, one epoch with mosaic and one without. Ultralytics reads the same files (of VOC and COCO JSON the labels converted to its own format: by its `convert_coco`, and by the
plain rule for VOC) with `YOLODataset` and `v8_transforms`, every draw forced to the number that raypar drew: partners, places, maps, colours, flips and albumentations.

For each kind a row: the largest difference of a box (over the image's side), of a keypoint, of the pixels' mean (grey levels), and the share of mask pixels that differ. Boxes must agree within
1e-4 (of rotated ones one in a hundred within 1e-3), an image's pixels within 2 grey levels on average, and no image may have other labels.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("YOLO_VERBOSE", "False")

import albumentations
import cv2
import numpy as np
import pyarrow.parquet as pq
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data import augment as theirs
from ultralytics.data.converter import convert_coco
from ultralytics.data.dataset import ClassificationDataset, YOLODataset

from raypar.augment import albu
from raypar.augment.classify import ClassifyRecipe
from raypar.augment.geometry import Layer, Recipe, Sample, draw, generator
from raypar.config import PrepareConfig
from raypar.dataset import shards
from raypar.dataset.batch import Batch
from raypar.dataset.formats import Labels, Listing, coco, folders, shapes, voc, yolo
from raypar.dataset.ingest import ShardJob
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import Item, Plan
from raypar.dataset.records import Records
from raypar.dataset.stream import ALBUMENTATIONS, StreamSpec, recipe_of, render
from raypar.prepare import _split
from raypar.storage import Folder

SEED, GLOBAL_BATCH = 7, 16
# kind: task, format, the labels that are drawn
KINDS = {
    "detect": ("detect", "yolo", "detect"),
    "polygons": ("detect", "yolo", "segment"),  # of a detect dataset
    "mixed": ("detect", "yolo", "segment"),  # some images have polygons, others boxes: none is used
    "segment": ("segment", "yolo", "segment"),
    "pose": ("pose", "yolo", "pose"),
    "obb": ("obb", "yolo", "obb"),
    "voc": ("detect", "voc", "detect"),
    "coco": ("detect", "coco", "segment"),  # with polygons
    "coco boxes": ("detect", "coco", "detect"),
    "coco segment": ("segment", "coco", "segment"),
    "classify": ("classify", "folders", "classify"),
}
MAX_BOX, MAX_PIXEL, MAX_MASK = 1e-4, 2.0, 0.01
MAX_TIE, MAX_TIES = 1e-3, 0.01


@dataclass
class Difference:
    """The largest differences of a kind, and how many images and labels were compared.

    Attributes:
        images, labels: that were compared.
        others: images with other labels: in number, class or visibility.
        box, keypoint: over the image's side.
        pixel: of an image, its mean, grey levels.
        usual_pixel: the same, of all images.
        ties: rotated boxes that differ by more, but hardly. Their corners are a parallelogram by a hair, as an image's sides are rounded
            when it is resized, and which of its two smallest rectangles is taken is decided by a last bit.
        mask: share of an image's mask pixels.
        touched: images that albumentations changed.
    """

    images: int = 0
    labels: int = 0
    others: int = 0
    box: float = 0.0
    keypoint: float = 0.0
    pixel: float = 0.0
    usual_pixel: float = 0.0
    ties: int = 0
    mask: float = 0.0
    touched: int = 0

    def is_fine(self) -> bool:
        far = max(self.box, self.keypoint)
        return (
            not self.others
            and self.ties <= MAX_TIES * self.labels
            and far <= MAX_BOX
            and self.pixel <= MAX_PIXEL
            and self.mask <= MAX_MASK
        )


def compare(kind: str, folder: Path, *, count: int, imgsz: int, **settings: Any) -> Difference:
    """Writes ``count`` images and compares what both sides make of them; ``settings``: of Ultralytics, added to the default ones."""
    task, form, _ = KINDS[kind]
    write(kind, folder / "source", count, imgsz)
    manifest = prepared(folder / "source", Folder.at(str(folder / "dataset")), task, form)
    args = vars(get_cfg(overrides={"imgsz": imgsz, "task": task, **settings}))
    split = manifest.split("train")
    plan = Plan(tuple(n for shard in split.shards for n in shard.row_groups), seed=SEED, global_batch=GLOBAL_BATCH, epochs=2,
                window_images=64)  # fmt: skip
    spec = StreamSpec.of(Folder.at(str(folder / "dataset")), split, plan, recipe_of(args, manifest), mosaic_epochs=1,
                         albumentations=None, world_size=1)  # fmt: skip
    names = [
        Path(name).name
        for shard in split.shards
        for name in pq.read_table(folder / "dataset" / shard.path, columns=["image_id"])[
            "image_id"
        ].to_pylist()
    ]
    other = (
        Classified(folder / "source", args)
        if task == "classify"
        else Forced(kind, folder / "source", manifest, args)
    )
    assert sorted(names) == sorted(other.index_of), "both sides must use the same images"
    found = Difference()
    for item in plan.items():
        for batch in render(spec, item):
            for i, (rows, index) in enumerate(shown(spec, item, batch)):
                expected = other.make(spec, item, batch, i, [names[row] for row in rows], index)
                measure(found, batch, i, expected, task)
    return found


def shown(spec: StreamSpec, item: Item, batch: Batch) -> Iterator[tuple[np.ndarray, int]]:
    """For each image of a batch the rows of its window, and which of them it shows."""
    window = spec.plan.window(item.epoch, item.window)
    rows = np.concatenate(
        [spec.first_rows[group] + np.arange(part.start, part.stop) for group, part in window.rows()]
    )
    start = (batch.step - window.first_step) * GLOBAL_BATCH
    for i in range(len(batch.images)):
        index = int(window.order[start + i])
        assert rows[index] == batch.rows[i]
        yield rows, index


def prepared(source: Path, dataset: Folder, task: str, form: str) -> Manifest:
    """The dataset that `raypar prepare` would write, by its own functions but without Ray."""
    section = PrepareConfig.model_validate(
        {"source": str(source), "format": form, "task": task, "rows_per_group": 16}
    )
    place = source / "data.yaml" if form == "yolo" else source
    listing: Listing = {"yolo": lambda: yolo.scan(place, task), "coco": lambda: coco.scan(place, task),
                        "voc": lambda: voc.scan(place, SEED), "folders": lambda: folders.scan(place, SEED)}[form]()  # fmt: skip
    splits = {split: Records.of(records) for split, records in listing.splits.items()}
    template = ShardJob(dataset, "", "", form, len(listing.class_names), (), section.rows_per_group, section.max_pixels, SEED,
                        task=listing.task, keypoint_shape=listing.keypoint_shape)  # fmt: skip
    wanted = shards.portions(splits, template, section, taken={}, first={})
    reports = [shards.write_portion(portion, splits[portion.split], template) for portion in wanted]
    return Manifest(task=listing.task, class_names=listing.class_names, keypoint_shape=listing.keypoint_shape, flip_idx=listing.flip_idx,
                    splits={split: _split(split, reports, len(listing.class_names)) for split in splits}, source=str(source))  # fmt: skip


# Ultralytics' side


class Forced:
    """Ultralytics' dataset of the same files; its transforms take a sample's numbers in place of their draws."""

    def __init__(self, kind: str, source: Path, manifest: Manifest, args: dict[str, Any]):
        self.args = args
        images = converted(kind, source) / "images" / "train"
        data: dict[str, Any] = {
            "names": dict(enumerate(manifest.class_names)),
            "nc": len(manifest.class_names),
            "channels": 3,
        }
        if manifest.keypoint_shape:
            data |= {"kpt_shape": list(manifest.keypoint_shape), "flip_idx": list(manifest.flip_idx)}
        self.dataset = YOLODataset(img_path=str(images), imgsz=args["imgsz"], augment=True, hyp=get_cfg(overrides=args), data=data,
                                   task=manifest.task, batch_size=GLOBAL_BATCH, cache=False)  # fmt: skip
        self.index_of = {Path(file).name: i for i, file in enumerate(self.dataset.im_files)}

    def make(
        self, spec: StreamSpec, item: Item, batch: Batch, i: int, names: Sequence[str], index: int
    ) -> dict[str, Any]:
        recipe = spec.recipe
        assert isinstance(recipe, Recipe)
        rng = generator(spec.plan.seed, item.epoch, batch.step * GLOBAL_BATCH + i)
        sample = draw(recipe, rng, index, len(names), mosaic_on=item.epoch < spec.mosaic_epochs)
        rng = generator(spec.plan.seed, item.epoch, ALBUMENTATIONS + int(batch.rows[i]))
        draws = rng.random(len(albu.ULTRALYTICS))
        changes = [
            getattr(albumentations, name)(p=1.0)
            for entry, drawn in zip(albu.ULTRALYTICS, draws, strict=True)
            for name, setting in entry.items()
            if drawn < setting["p"]
        ]
        if changes:
            torch.manual_seed(int(rng.integers(2**31)))  # it seeds albumentations by it
        indices = [self.index_of[name] for name in names]
        with self.forced(sample, indices, is_changed=bool(changes)):
            steps = list(self.dataset.transforms.transforms)
            if changes:
                place = next(k for k, step in enumerate(steps) if isinstance(step, theirs.Albumentations))
                steps[place] = theirs.Albumentations(p=1.0, transforms=changes)
            labels = self.dataset.get_image_and_label(indices[sample.layer.indices[0]])
            for step in steps:
                labels = step(labels)
        return {**labels, "is_touched": bool(changes)}

    @contextmanager
    def forced(self, sample: Sample, indices: list[int], *, is_changed: bool) -> Iterator[None]:
        layers: list[Layer] = [sample.layer]
        uniform = numbers(sample.layer)
        for second in (sample.mixed, sample.cut):
            uniform.append(2.0 if second is None else 0.0)
            if second is not None:
                layers.append(second[0])
                uniform += numbers(second[0])
        uniform.append(1.0)  # Format: RGB
        partners = iter([indices[k] for k in layer.indices[1:]] for layer in layers if layer.centre)
        seconds = iter(indices[layer.indices[0]] for layer in layers[1:])
        chances = [0.0 if is_changed else 1.0, *(0.0 if flip else 1.0 for flip in sample.flip[::-1])]
        strength = [self.args[name] for name in ("hsv_h", "hsv_s", "hsv_v")]
        gains = np.divide(sample.gains, strength, out=np.zeros(3), where=np.array(strength) > 0)
        left, decided = iter(uniform), iter(chances)
        areas = iter([] if sample.cut is None else sample.cut[1].astype(int))
        share = 0.5 if sample.mixed is None else sample.mixed[1]
        pick = 0.0 if sample.cut is None else sample.cut[2]
        with (
            patch.object(random, "uniform", lambda *_: next(left)),
            patch.object(random, "random", lambda: next(decided)),
            patch.object(np.random, "uniform", lambda *_: gains),
            patch.object(np.random, "beta", lambda *_: share),
            patch.object(np.random, "choice", lambda free: free[int(pick * len(free))]),
            patch.object(theirs.Mosaic, "get_indexes", lambda _: next(partners)),
            patch.object(theirs.BaseMixTransform, "get_indexes", lambda _: next(seconds)),
            patch.object(theirs.CutMix, "_rand_bbox", lambda *_: tuple(next(areas))),
        ):
            yield
        assert next(left, None) is None, "Ultralytics drew fewer numbers"
        assert next(decided, None) is None


def numbers(layer: Layer) -> list[float]:
    """What Ultralytics draws for a layer with `random.uniform`, in its order: whether there is a mosaic, its centre, the map."""
    mosaic = [2.0] if layer.centre is None else [0.0, *layer.centre[::-1]]
    return [*mosaic, *layer.perspective, layer.angle, layer.scale, *layer.shear, *layer.shift]


class Classified:
    """Ultralytics' dataset of folders of classes; its transforms draw from torch's generator."""

    def __init__(self, source: Path, args: dict[str, Any]):
        self.dataset = ClassificationDataset(
            str(source / "train"), get_cfg(overrides=args), augment=True, prefix="train"
        )
        self.index_of = {Path(sample[0]).name: i for i, sample in enumerate(self.dataset.samples)}

    def make(
        self, spec: StreamSpec, item: Item, batch: Batch, i: int, names: Sequence[str], index: int
    ) -> dict[str, Any]:
        assert isinstance(spec.recipe, ClassifyRecipe)
        rng = generator(spec.plan.seed, item.epoch, batch.step * GLOBAL_BATCH + i)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            found = self.dataset[self.index_of[names[index]]]
        return {
            "img": found["img"] * 255,
            "cls": torch.tensor([[found["cls"]]]),
            "bboxes": torch.zeros(0, 4),
            "is_touched": False,
        }


# the comparison


def measure(found: Difference, batch: Batch, i: int, expected: dict[str, Any], task: str) -> None:
    """Adds an image's differences."""
    found.images += 1
    found.touched += expected["is_touched"]
    pixels = float(
        np.abs(batch.images[i].astype(np.float64) - expected["img"].numpy().astype(np.float64)).mean()
    )
    found.pixel = max(found.pixel, pixels)
    found.usual_pixel += (pixels - found.usual_pixel) / found.images
    wanted = expected["cls"].numpy().reshape(-1).astype(int)
    mine = np.array([i]) if task == "classify" else np.flatnonzero(batch.image_index == i)
    class_ids = batch.class_ids[mine]
    found.labels += len(class_ids)
    if sorted(class_ids.tolist()) != sorted(wanted.tolist()):
        found.others += 1
        return
    if task == "classify" or not len(class_ids):
        return
    boxes = batch.boxes_xywhn if task != "obb" or batch.boxes_xywhr is None else batch.boxes_xywhr
    order = matched(class_ids, boxes[mine], wanted, expected["bboxes"].numpy())
    apart = box_differences(boxes[mine], expected["bboxes"].numpy()[order])
    is_tie = (apart > MAX_BOX) & (apart <= MAX_TIE) if task == "obb" else np.zeros(len(apart), np.bool_)
    found.ties += int(is_tie.sum())
    found.box = max(found.box, float(apart[~is_tie].max(initial=0)))
    if batch.keypoints is not None:
        points = expected["keypoints"].numpy()[order]
        found.keypoint = max(found.keypoint, float(np.abs(batch.keypoints[mine] - points)[..., :2].max()))
        found.others += not np.array_equal(batch.keypoints[mine][..., 2], points[..., 2])
    if batch.masks is not None:
        place = np.concatenate([[0], np.argsort(order) + 1])
        share = (batch.masks[i] != place[expected["masks"][0].numpy().astype(int)]).mean()
        found.mask = max(found.mask, float(share))


def matched(
    class_ids: np.ndarray, boxes: np.ndarray, wanted_ids: np.ndarray, wanted: np.ndarray
) -> np.ndarray:
    """For each label the nearest of the expected ones that is left: instances of about equal area may change places in masks."""
    left, order = list(range(len(wanted))), []
    for class_id, box in zip(class_ids, boxes, strict=True):
        apart = [np.abs(wanted[j, :4] - box[:4]).max() + 10 * (wanted_ids[j] != class_id) for j in left]
        order.append(left.pop(int(np.argmin(apart))))
    return np.array(order, np.intp)


def box_differences(boxes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """For each box (N, 4) over the image's side; of rotated ones (N, 5) the angle counts by the long side, and turned by a quarter they are the same."""
    boxes, wanted = boxes.astype(np.float64), wanted.astype(np.float64)
    if boxes.shape[1] == 4:
        return np.abs(boxes - wanted).max(1, initial=0)
    centre = np.abs(boxes[:, :2] - wanted[:, :2]).max(1, initial=0)
    found = []
    for sides, angle in ((wanted[:, [2, 3]], wanted[:, 4]), (wanted[:, [3, 2]], wanted[:, 4] + np.pi / 2)):
        apart = np.abs(boxes[:, 2:4] - sides).max(1, initial=0)
        turn = np.abs((boxes[:, 4] - angle + np.pi / 2) % np.pi - np.pi / 2) * sides.max(1, initial=0)
        found.append(np.max([centre, apart, turn], axis=0))
    return np.minimum(*found)


# the files


def write(kind: str, folder: Path, count: int, imgsz: int) -> None:
    """Writes a source of ``count`` images in train, and one in val."""
    form = KINDS[kind][1]
    put = {"yolo": _yolo, "voc": _voc, "coco": _coco, "folders": _folders}[form]
    for split, number in (("train", count), ("val", 1)):
        drawn = []
        for i in range(number):
            rng = np.random.default_rng([SEED, i])
            hw = (int(side) for side in rng.uniform(0.3, 1.4, 2) * imgsz)
            height, width = (max(48, side) for side in hw)
            image, labels = shapes.draw(SEED, split, i, height, width, task=KINDS[kind][2])
            image = cv2.GaussianBlur(image, (0, 0), 1.0)  # as a lens does: white noise is in no photograph
            drawn.append((f"{i:05d}", shapes.encode(image), (height, width), labels))
        put(kind, folder, split, drawn)


Drawn = list[tuple[str, bytes, tuple[int, int], Labels]]


def _file(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _yolo(kind: str, folder: Path, split: str, drawn: Drawn) -> None:
    for name, image, _, labels in drawn:
        has_polygons = labels.segments_xyn is not None and not (kind == "mixed" and int(name) % 3 == 1)
        _file(folder / "images" / split / f"{name}.jpg", image)
        _file(folder / "labels" / split / f"{name}.txt", lines(labels, has_polygons=has_polygons))
    more = (
        {"kpt_shape": list(shapes.KEYPOINT_SHAPE), "flip_idx": list(shapes.FLIP_IDX)}
        if kind == "pose"
        else {}
    )
    data = {"train": "images/train", "val": "images/val", "names": list(shapes.CLASS_NAMES), **more}
    _file(folder / "data.yaml", json.dumps(data))


def lines(labels: Labels, *, has_polygons: bool) -> str:
    """A label file."""
    found = []
    for i, class_id in enumerate(labels.class_ids):
        values = labels.boxes_xywhn[i]
        if has_polygons and labels.segments_xyn is not None:
            values = labels.segments_xyn[i].ravel()
        if labels.keypoints is not None:
            values = np.concatenate([values, labels.keypoints[i].ravel()])
        found.append(" ".join([str(class_id), *(f"{value:.8f}" for value in values)]) + "\n")
    return "".join(found)


def _voc(_: str, folder: Path, split: str, drawn: Drawn) -> None:
    for name, image, (height, width), labels in drawn:
        name = f"{split}-{name}"
        objects = ""
        for class_id, (x, y, w, h) in zip(
            labels.class_ids, labels.boxes_xywhn * [width, height, width, height], strict=True
        ):
            sides = {"xmin": x - w / 2 + 1, "ymin": y - h / 2 + 1, "xmax": x + w / 2, "ymax": y + h / 2}
            box = "".join(f"<{key}>{round(value)}</{key}>" for key, value in sides.items())
            objects += f"<object><name>{shapes.CLASS_NAMES[class_id]}</name><bndbox>{box}</bndbox></object>"
        size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        _file(folder / "JPEGImages" / f"{name}.jpg", image)
        _file(folder / "Annotations" / f"{name}.xml", f"<annotation>{size}{objects}</annotation>")
    _file(folder / "ImageSets/Main" / f"{split}.txt", "".join(f"{split}-{name}\n" for name, *_ in drawn))
    _file(folder / "classes.txt", "\n".join(shapes.CLASS_NAMES))


def _coco(kind: str, folder: Path, split: str, drawn: Drawn) -> None:
    """Of the polygons some have two parts, and some objects have none."""
    data: dict[str, list[Any]] = {"images": [], "annotations": [],
                                  "categories": [{"id": i + 1, "name": name} for i, name in enumerate(shapes.CLASS_NAMES)]}  # fmt: skip
    for number, (name, image, (height, width), labels) in enumerate(drawn):
        _file(folder / split / f"{name}.jpg", image)
        data["images"].append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
        for i, class_id in enumerate(labels.class_ids):
            x, y, w, h = labels.boxes_xywhn[i] * [width, height, width, height]
            parts = []
            if labels.segments_xyn is not None:
                polygon = labels.segments_xyn[i] * [width, height]
                small = polygon.mean(0) + np.array([[0, 0], [0.1 * w, 0], [0.1 * w, 0.1 * h]])
                parts = [[polygon], [polygon, small], [polygon], []][len(data["annotations"]) % 4]
            data["annotations"].append({
                "id": len(data["annotations"]), "image_id": number, "category_id": int(class_id) + 1, "iscrowd": 0,
                "bbox": [x - w / 2, y - h / 2, w, h], "segmentation": [part.ravel().round(2).tolist() for part in parts]})  # fmt: skip
    _file(folder / "annotations" / f"instances_{split}.json", json.dumps(data))


def _folders(_: str, folder: Path, split: str, drawn: Drawn) -> None:
    for name, image, _, labels in drawn:
        _file(folder / split / shapes.CLASS_NAMES[int(labels.class_ids[0])] / f"{name}.jpg", image)
    for name in shapes.CLASS_NAMES:
        (folder / split / name).mkdir(parents=True, exist_ok=True)


def converted(kind: str, source: Path) -> Path:
    """The folder with images/train and labels/train that Ultralytics reads: the source's own, or one that is made of it."""
    form, folder = KINDS[kind][1], source.parent / "converted"
    if form == "yolo":
        return source
    if form == "coco":
        convert_coco(
            str(source / "annotations"), str(folder), use_segments=kind != "coco boxes", cls91to80=False
        )
        (folder / "images" / "train").symlink_to(source / "train")
        return folder
    listing = voc.scan(str(source), SEED)
    for record in listing.splits["train"]:
        _file(folder / "images" / "train" / record.image_id, Path(record.image_path).read_bytes())
        _file(
            folder / "labels" / "train" / f"{Path(record.image_id).stem}.txt",
            _voc_lines(Path(record.labels[0]).read_text()),
        )
    return folder


def _voc_lines(xml: str) -> str:
    """An annotation by the rule that Ultralytics' VOC.yaml gives: inclusive px, from 1."""
    from xml.etree import ElementTree

    root = ElementTree.fromstring(xml)
    width, height = (int(root.findtext(f"size/{key}") or 0) for key in ("width", "height"))
    found = ""
    for item in root.iter("object"):
        x0, y0, x1, y1 = (
            float(item.findtext(f"bndbox/{key}") or 0) for key in ("xmin", "ymin", "xmax", "ymax")
        )
        box = (
            (x0 - 1 + x1) / 2 / width,
            (y0 - 1 + y1) / 2 / height,
            (x1 - x0 + 1) / width,
            (y1 - y0 + 1) / height,
        )
        found += (
            f"{shapes.CLASS_NAMES.index(item.findtext('name') or '')} "
            + " ".join(f"{v:.8f}" for v in box)
            + "\n"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--imgsz", type=int, default=640)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(prefix="raypar-parity-") as folder:
            found = compare(kind, Path(folder), count=args.images, imgsz=args.imgsz)
        rows.append({"kind": kind, "is_fine": found.is_fine(), **vars(found)})
        print(f"{kind}: {'equal' if found.is_fine() else 'DIFFERENT'} {found}", flush=True)
    print(json.dumps({"benchmark": "parity", "images": args.images, "imgsz": args.imgsz, "rows": rows}))
    if not all(row["is_fine"] for row in rows):
        raise SystemExit(
            f"a kind differs by more than boxes {MAX_BOX:g}, pixels {MAX_PIXEL:g}, masks {MAX_MASK:g}"
        )


if __name__ == "__main__":
    main()
