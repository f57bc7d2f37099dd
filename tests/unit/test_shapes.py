"""The built-in dataset is a pure function of (seed, split, index), and its boxes fit what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from raypar.dataset.formats import shapes

HW = (240, 320)


def test_same_arguments_same_bytes_and_others_differ() -> None:
    first = shapes.encode(shapes.render(0, "train", 3, *HW)[0])
    assert first == shapes.encode(shapes.render(0, "train", 3, *HW)[0])
    for other in ((1, "train", 3), (0, "val", 3), (0, "train", 4)):
        assert first != shapes.encode(shapes.render(*other, *HW)[0])


@pytest.mark.parametrize("hw", [HW, (120, 160), (64, 48)])
def test_images_and_boxes(hw: tuple[int, int]) -> None:
    for index in range(40):
        image, class_ids, boxes = shapes.render(0, "train", index, *hw)
        assert image.shape == (*hw, 3)
        assert image.dtype == np.uint8
        assert len(class_ids) == len(boxes) <= shapes.MAX_SHAPES
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= [hw[1], hw[0]]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((boxes[:, 3] - boxes[:, 1]) <= 0.75 * hw[0]).all()


def test_boxes_are_exact_hulls_of_lone_shapes() -> None:
    """On images of one shape, the extent of the bright and saturated pixels is the box."""
    num_checked = 0
    for index in range(200):
        image, class_ids, boxes = shapes.render(0, "train", index, *HW)
        if len(class_ids) != 1:
            continue
        rows, columns = np.nonzero(np.ptp(image.astype(int), axis=2) > 80)
        assert boxes[0].tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        num_checked += 1
    assert num_checked >= 10


def test_all_classes_some_empty_and_no_hidden_shapes() -> None:
    counts = np.zeros(len(shapes.CLASS_NAMES), int)
    num_empty = 0
    for index in range(300):
        _, class_ids, boxes = shapes.render(0, "train", index, *HW)
        counts += np.bincount(class_ids, minlength=len(counts))
        num_empty += not len(boxes)
    assert counts.min() > 0.8 * counts.mean()
    assert 2 <= num_empty <= 20  # about 3 %


def test_covered_shapes_are_not_drawn() -> None:
    colour = np.zeros(3)
    small, large, side = (np.zeros((20, 20), bool) for _ in range(3))
    small[5:10, 5:10] = True
    large[4:12, 4:12] = True
    side[10:20, 0:20] = True
    kept = shapes._visible([(0, colour, small), (1, colour, large), (2, colour, side)])
    assert [class_id for class_id, _, _ in kept] == [1, 2]


def test_labels_are_normalised_by_width_and_height() -> None:
    labels = shapes.labels(np.array([2]), np.array([[32.0, 60.0, 96.0, 84.0]]), HW)
    np.testing.assert_allclose(labels.boxes_xywhn, [[0.2, 0.3, 0.2, 0.1]], atol=1e-12)


def test_scan_lists_what_is_asked_for() -> None:
    listing = shapes.scan({"train": 3, "val": 1, "test": 0})
    assert [r.image_id for r in listing.splits["train"]] == ["000000.jpg", "000001.jpg", "000002.jpg"]
    assert set(listing.splits) == {"train", "val"}
