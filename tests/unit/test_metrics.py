"""Metrics are Ultralytics' own, and do not depend on who scored what in which order."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ultralytics import YOLO

from raypar.boxes import clip, xywhn_to_xyxy, xyxy_to_xywhn
from raypar.detector import Detections, Detector
from raypar.images import encode_png
from raypar.metrics import Scorer

NAMES = ["circle", "square", "triangle"]
CONF = 0.4  # untrained weights find too much below
NO_BOXES = np.zeros((0, 4), np.float32)
Image = tuple[str, Detections, NDArray[np.int32], NDArray[np.float32]]


def found(boxes: Any, class_ids: Any, confidences: Any) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(class_ids, np.int32),
        np.array(confidences, np.float32),
        (200, 200),
    )


def random_images(num: int) -> list[Image]:
    """Labels, and detections that hit some of them."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(num):
        n = int(rng.integers(0, 6))
        corners = rng.uniform(0, 120, (n, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(20, 70, (n, 2))], 1).astype(np.float32)
        class_ids = rng.integers(0, len(NAMES), n).astype(np.int32)
        hits = rng.random(n) < 0.7
        wrong = rng.uniform(0, 100, (3, 2))
        guessed = np.concatenate(
            [boxes[hits] + rng.normal(0, 3, (hits.sum(), 4)), np.concatenate([wrong, wrong + 30], 1)]
        )
        confidences = np.sort(rng.random(len(guessed)))[::-1]
        order = rng.permutation(len(guessed))
        guessed_ids = np.concatenate([class_ids[hits], rng.integers(0, 3, 3)])
        images.append(
            (f"{i:03d}.jpg", found(guessed[order], guessed_ids[order], confidences), class_ids, boxes)
        )
    return images


def scorer_of(images: list[Image]) -> Scorer:
    scorer = Scorer(NAMES)
    for image_id, detections, class_ids, boxes in images:
        scorer.update([detections], [image_id], [class_ids], [boxes])
    return scorer


@pytest.fixture(scope="module")
def small_box_weights(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights whose boxes are about three strides wide, so that most lie inside the image."""
    saved = torch.load(tiny_weights, weights_only=False)
    with torch.no_grad():
        for branch in saved["model"].model[-1].cv2:
            # of the 16 distances to each side
            branch[-1].bias += -2 * (torch.arange(16) - 1.5).square().repeat(4)
    path = tmp_path_factory.mktemp("weights") / "small_boxes.pt"
    torch.save(saved, path)
    return path


def test_metrics_are_those_of_yolo_val(small_box_weights: Path, tmp_path: Path) -> None:
    """Labels are some of what the model finds, disturbed: so even untrained weights have a telling score."""
    # as YOLO.val itself sets it on two cores: the last bits of a forward pass, and so which of like boxes is kept, depend on it
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    detector = Detector.load(small_box_weights, device="cpu", conf=CONF, pad=0.5)
    scorer = Scorer(detector.class_names)
    for i in range(12):
        image = np.kron(rng.integers(0, 256, (8, 10, 3)), np.ones((15, 16, 1))).astype(np.uint8)
        labels = detector([image])[0]
        picked = rng.permutation(len(labels.class_ids))[:150]
        boxes = xyxy_to_xywhn(clip(labels.boxes_xyxy[picked], labels.image_hw), labels.image_hw)
        boxes = np.round(np.clip(boxes + rng.normal(0, 0.006, boxes.shape), 0.02, 0.98), 5).astype(np.float32)
        class_ids = labels.class_ids[picked]
        if i == 3:
            boxes, class_ids = NO_BOXES, class_ids[:0]
        (tmp_path / "images" / f"{i:02d}.png").write_bytes(encode_png(image))
        lines = [
            f"{c} {' '.join(f'{v:.5f}' for v in box)}\n" for c, box in zip(class_ids, boxes, strict=True)
        ]
        (tmp_path / "labels" / f"{i:02d}.txt").write_text("".join(dict.fromkeys(lines)))
        scorer.update(detector([image]), [f"{i:02d}"], [class_ids], [xywhn_to_xyxy(boxes, labels.image_hw)])
    (tmp_path / "data.yaml").write_text(
        f"path: {tmp_path}\ntrain: images\nval: images\nnames: {detector.class_names}\n"
    )
    theirs = YOLO(small_box_weights).val(data=tmp_path / "data.yaml", imgsz=160, batch=1, conf=CONF, iou=0.7, max_det=300, device="cpu",
                                    workers=0, plots=False, verbose=False, project=tmp_path / "val")  # fmt: skip
    ours = scorer.compute()
    assert 0.05 < ours["map50_95"] < 0.95
    pairs = {
        "map50_95": theirs.box.map,
        "map50": theirs.box.map50,
        "precision": theirs.box.mp,
        "recall": theirs.box.mr,
        "fitness": theirs.fitness,
    }
    for name, expected in pairs.items():
        assert ours[name] == pytest.approx(expected, abs=1e-4), name
    assert ours["num_boxes"] == theirs.nt_per_class.sum()
    for i, class_id in enumerate(theirs.ap_class_index):
        row = ours["per_class"][class_id]
        assert (row["precision"], row["recall"], row["map50"], row["map50_95"]) == pytest.approx(
            theirs.class_result(i), abs=1e-3
        )


def test_merging_in_any_order_gives_the_same_numbers() -> None:
    images = random_images(30)
    whole = scorer_of(images).compute()
    assert 0.1 < whole["map50"] < 0.95
    for seed in range(3):
        shuffled = list(images)
        random.Random(seed).shuffle(shuffled)
        merged = Scorer(NAMES)
        for part in (shuffled[:1], shuffled[1:17], [], shuffled[17:]):
            merged.merge(pickle.loads(pickle.dumps(scorer_of(part).state())))
        assert merged.compute() == whole
        np.testing.assert_array_equal(merged.state()["confusion"], scorer_of(images).state()["confusion"])


def test_an_image_scored_twice_is_an_error() -> None:
    scorer = scorer_of(random_images(2))
    with pytest.raises(ValueError, match=r"001\.jpg"):
        scorer.merge(scorer_of(random_images(2)[1:]).state())


def test_a_small_case_by_hand() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 70, 70]], np.float32)
    detections = found([[0, 0, 10, 10], [50, 50, 70, 62], [100, 100, 120, 120]], [0, 0, 1], [0.9, 0.8, 0.7])
    result = scorer_of([("a", detections, np.array([0, 0], np.int32), boxes)]).compute()
    # IoU of the second is 0.6: right at the thresholds 0.5, 0.55 and 0.6, wrong at the seven above
    circle = result["per_class"][0]
    assert (circle["num_boxes"], result["num_images"], result["num_boxes"]) == (2, 1, 2)
    # Ultralytics' integral over 101 points ends a little below one
    assert circle["map50"] == pytest.approx(0.995, abs=1e-6)
    assert circle["map50_95"] == pytest.approx(0.3 * 0.995 + 0.7 * 0.5, abs=0.01)
    square = result["per_class"][1]
    assert (square["num_boxes"], square["map50"]) == (0, None)
    assert result["map50"] == circle["map50"]  # a class without labels counts for no mean


def test_a_target_counts_once() -> None:
    box = np.array([[0, 0, 10, 10]], np.float32)
    scorer = scorer_of([("a", found([*box, *box], [0, 0], [0.9, 0.8]), np.array([0], np.int32), box)])
    assert scorer.state()["images"]["a"][0][:, 0].tolist() == [True, False]


def test_nothing_found_and_nothing_there() -> None:
    none, box = found([], [], []), np.array([[0, 0, 10, 10]], np.float32)
    no_ids = np.zeros(0, np.int32)
    for images in (
        [],
        [("a", none, no_ids, NO_BOXES)],
        [("a", none, np.array([0], np.int32), box)],
        [("a", found(box, [0], [0.9]), no_ids, NO_BOXES)],
    ):
        result = scorer_of(images).compute()
        assert (result["map50"], result["map50_95"], result["fitness"]) == (0, 0, 0)
        assert result["num_images"] == len(images)


def test_plots_are_written(tmp_path: Path) -> None:
    scorer_of(random_images(8)).compute(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 1000}
    curves = {f"Box{curve}_curve.png" for curve in ("PR", "F1", "P", "R")}
    assert names == curves | {"confusion_matrix.png", "confusion_matrix_normalized.png"}
