"""The detector: the same pixels and the same boxes as Ultralytics, whatever shares the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset
from ultralytics.data.augment import LetterBox

from raypar.boxes import iou
from raypar.detector import Detections, Detector
from raypar.images import decode, encode_jpeg, encode_png

# smaller and larger than imgsz
SHAPES = [(120, 160), (160, 120), (97, 211), (320, 240), (33, 500), (160, 160), (161, 159), (20, 28)]


def picture(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    """uint8 (H, W, 3) RGB: blurred noise and rectangles."""
    rng = np.random.default_rng([seed, height, width])
    image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 2)
    for _ in range(6):
        y, x = rng.integers(0, height), rng.integers(0, width)
        image[y : y + max(1, height // 4), x : x + max(1, width // 4)] = rng.integers(0, 256, 3)
    return np.asarray(image, np.uint8)


@pytest.fixture(scope="module")
def detector(tiny_weights: Path) -> Detector:
    return Detector.load(tiny_weights, device="cpu")


def assert_equal(one: Detections, other: Detections, px: float = 0.0, confidence: float = 0.0) -> None:
    assert one.image_hw == other.image_hw
    np.testing.assert_array_equal(one.class_ids, other.class_ids)
    np.testing.assert_allclose(one.confidences, other.confidences, atol=confidence, rtol=0)
    np.testing.assert_allclose(one.boxes_xyxy, other.boxes_xyxy, atol=px, rtol=0)


def test_boxes_are_those_of_yolo_predict(detector: Detector, tiny_weights: Path, tmp_path: Path) -> None:
    model = YOLO(tiny_weights)
    num_boxes = 0
    for height, width in SHAPES:
        path = tmp_path / f"{height}x{width}.png"
        path.write_bytes(encode_png(picture(height, width)))
        theirs = model.predict(path, imgsz=detector.imgsz, conf=0.25, iou=0.7, device="cpu", verbose=False)[
            0
        ].boxes
        expected = Detections(
            theirs.xyxy.numpy(), theirs.cls.numpy().astype(np.int32), theirs.conf.numpy(), (height, width)
        )
        assert_equal(detector([path.read_bytes()])[0], expected, px=0.01, confidence=1e-4)
        num_boxes += len(expected.class_ids)
    assert num_boxes > 100


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 160, 320]))
def test_letterbox_is_ultralytics_letterbox(height: int, width: int, imgsz: int) -> None:
    image = picture(height, width)
    (group,) = Detector(torch.nn.Identity(), ["a"], imgsz=imgsz).letterbox([image])
    expected = LetterBox((imgsz, imgsz), auto=True, stride=32)(image=image)
    np.testing.assert_array_equal(group.images[0].permute(1, 2, 0).numpy(), expected)
    (group,) = Detector(torch.nn.Identity(), ["a"], imgsz=imgsz, square=True).letterbox([image])
    np.testing.assert_array_equal(
        group.images[0].permute(1, 2, 0).numpy(), LetterBox((imgsz, imgsz))(image=image)
    )


def test_letterbox_for_metrics_is_that_of_ultralytics_validation(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for height, width in SHAPES:
        (tmp_path / "images" / f"{height}x{width}.png").write_bytes(encode_png(picture(height, width)))
        (tmp_path / "labels" / f"{height}x{width}.txt").write_text("0 0.5 0.5 0.3 0.4\n")
    args = get_cfg(overrides={"imgsz": 160, "task": "detect", "cache": False})
    data: dict[str, Any] = {"names": {0: "a"}, "channels": 3, "nc": 1}
    theirs = build_yolo_dataset(args, str(tmp_path / "images"), 1, data, mode="val", rect=True, stride=32)
    ours = Detector(torch.nn.Identity(), ["a"], imgsz=160, pad=0.5)
    for sample in (theirs[i] for i in range(len(SHAPES))):
        (group,) = ours.letterbox([Path(sample["im_file"]).read_bytes()])
        np.testing.assert_array_equal(group.images[0].numpy(), sample["img"].numpy())
        (gain_y, gain_x), pads = sample["ratio_pad"]
        np.testing.assert_allclose(group.gains[0], [gain_x, gain_y] * 2, rtol=1e-6)
        np.testing.assert_array_equal(group.pads[0], pads)


def test_images_of_equal_shape_share_a_group_and_keep_their_places() -> None:
    images = [
        picture(*hw, seed=i)
        for i, hw in enumerate([(120, 160), (160, 120), (60, 80), (160, 120), (240, 320)])
    ]
    groups = Detector(torch.nn.Identity(), ["a"], imgsz=160).letterbox(images)
    assert [group.indices for group in groups] == [[0, 2, 4], [1, 3]]
    assert [tuple(group.images.shape) for group in groups] == [(3, 3, 128, 160), (2, 3, 160, 128)]
    assert groups[0].image_hws == [(120, 160), (60, 80), (240, 320)]


def test_a_result_does_not_depend_on_batch_mates(detector: Detector) -> None:
    images = [picture(*hw, seed=i) for i, hw in enumerate(SHAPES + SHAPES[:3])]
    for group in detector.letterbox(images):
        together = detector.forward(group.images)[0]
        for row, i in enumerate(group.indices):
            (alone,) = detector.letterbox([images[i]])
            assert torch.equal(alone.images[0], group.images[row])
            torch.testing.assert_close(
                together[row], detector.forward(alone.images)[0][0], atol=2e-3, rtol=1e-4
            )


def test_answers_come_back_in_the_order_of_the_images(detector: Detector) -> None:
    images = [
        picture(*hw, seed=i)
        for i, hw in enumerate([(120, 160), (160, 120), (60, 80), (160, 120), (120, 160)])
    ]
    for image, found in zip(images, detector(images), strict=True):
        (alone,) = detector([image])
        assert found.image_hw == image.shape[:2]
        # NMS may settle a tie otherwise in another batch
        surest = (iou(found.boxes_xyxy[:5], alone.boxes_xyxy) > 0.99).any(1)
        assert surest.sum() >= 4


def test_thresholds_of_each_image_act_as_if_it_were_alone(detector: Detector) -> None:
    images = [picture(120, 160, seed=i) for i in range(6)]
    conf, iou_, limit = (
        [0.1, 0.5, 0.25, 0.25, 0.1, 0.6],
        [0.7, 0.7, 0.3, 0.9, 0.3, 0.5],
        [300, 5, 300, 20, 1, 300],
    )
    (group,) = detector.letterbox(images)
    raw = detector.forward(group.images)[0]
    together = detector.postprocess(raw, group, conf, iou_, limit)
    for i, found in enumerate(together):
        (mine,) = detector.letterbox([images[i]])
        (alone,) = detector.postprocess(raw[i : i + 1], mine, conf[i], iou_[i], limit[i])
        assert_equal(found, alone)
        assert 0 < len(alone.class_ids) <= limit[i]
        assert (alone.confidences > conf[i]).all()
    for found, expected in zip(detector(images, conf=conf, iou=iou_, max_det=limit), together, strict=True):
        assert_equal(found, expected)


def test_detections_are_sorted_typed_and_inside_the_image(detector: Detector) -> None:
    for (height, width), found in zip(SHAPES, detector([picture(*hw) for hw in SHAPES]), strict=True):
        assert (found.boxes_xyxy.dtype, found.class_ids.dtype, found.confidences.dtype) == (
            np.float32,
            np.int32,
            np.float32,
        )
        assert found.boxes_xyxy.shape == (len(found.class_ids), 4)
        assert (np.diff(found.confidences) <= 0).all()
        assert (found.boxes_xyxy >= 0).all()
        assert (found.boxes_xyxy <= [width, height, width, height]).all()
        assert found.image_hw == (height, width)


def test_for_metrics_boxes_reach_beyond_the_image(detector: Detector, tiny_weights: Path) -> None:
    found = Detector.load(tiny_weights, device="cpu", conf=0.001, pad=0.5)([picture(97, 211)])[0]
    assert (found.boxes_xyxy < 0).any()


def test_encoded_bytes_and_pixels_give_the_same(detector: Detector) -> None:
    image = picture(120, 160)
    jpeg = encode_jpeg(image)
    assert_equal(detector([jpeg])[0], detector([decode(jpeg)])[0])
    assert_equal(detector([encode_png(image)])[0], detector([image])[0])


def test_nothing_in_nothing_out(detector: Detector) -> None:
    assert detector([]) == []
    assert len(detector([picture(120, 160)], conf=1.0)[0].class_ids) == 0


def test_bf16_finds_what_fp32_finds(detector: Detector, tiny_weights: Path) -> None:
    images = [picture(*hw) for hw in SHAPES]
    low = Detector.load(tiny_weights, device="cpu", precision="bf16")
    num_found = num_all = 0
    for exact, near in zip(detector(images, conf=0.5), low(images, conf=0.3), strict=True):
        is_near = (iou(exact.boxes_xyxy, near.boxes_xyxy) > 0.8) & (
            exact.class_ids[:, None] == near.class_ids
        )
        num_found, num_all = num_found + int(is_near.any(1).sum()), num_all + len(exact.class_ids)
    assert num_all > 50
    # NMS of random weights is touchy; a wrong decode would match next to nothing
    assert num_found >= 0.9 * num_all


def test_settings_come_from_the_checkpoint(detector: Detector) -> None:
    assert detector.imgsz == 160
    assert detector.class_names == ["circle", "square", "triangle", "star"]
    assert len(detector.sha256) == 64


def test_bad_images_are_the_users_error(detector: Detector) -> None:
    for bad in (b"", b"no image", encode_jpeg(picture(20, 20))[:10]):
        with pytest.raises(ValueError, match="image"):
            detector([picture(20, 20), bad])


def test_bad_weights_are_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights at"):
        Detector.load(tmp_path / "absent.pt", device="cpu")
    for name in ("text.pt", "text.onnx", "text.odd"):
        (tmp_path / name).write_text("not weights")
        with pytest.raises(ValueError, match=name):
            Detector.load(tmp_path / name, device="cpu")


def test_weights_for_another_task_are_refused(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import ClassificationModel

    model = ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False)
    torch.save(
        {"model": model, "ema": None, "train_args": {"imgsz": 64, "task": "classify"}}, tmp_path / "cls.pt"
    )
    with pytest.raises(ValueError, match="classify"):
        Detector.load(tmp_path / "cls.pt", device="cpu")
