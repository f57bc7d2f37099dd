"""When an export agrees with its weights: boxes of given classes, places and confidences, and raw outputs with ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import raypar.export
from raypar.detector import Detections, Detector


class Fixed:
    """Detects the same in every image."""

    def __init__(self, boxes: Any, class_ids: Any, confidences: Any):
        self.found = Detections(
            np.array(boxes, np.float32).reshape(-1, 4),
            np.array(class_ids, np.int32),
            np.array(confidences, np.float32),
            (99, 99),
        )

    def __call__(self, images: list[Any], **thresholds: float) -> list[Detections]:
        return [self.found] * len(images)


@pytest.mark.parametrize(
    ("other", "agreeing"),
    [
        (Fixed([[0, 0, 50, 50], [10, 10, 90, 90]], [0, 1], [0.9, 0.8]), 4),
        (Fixed([[0, 0, 50, 50], [10, 10, 90, 90]], [0, 2], [0.9, 0.8]), 2),  # another class
        (Fixed([[0, 0, 50, 50], [10, 10, 90, 80]], [0, 1], [0.9, 0.8]), 2),  # another place
        (Fixed([[0, 0, 50, 50], [10, 10, 90, 90]], [0, 1], [0.9, 0.78]), 2),  # another confidence
        (Fixed([[0, 0, 50, 50]], [0], [0.9]), 2),  # one is missing
        (Fixed([], [], []), 0),
    ],
)
def test_what_agreement_means(other: Fixed, agreeing: int) -> None:
    ours = Fixed([[0, 0, 50, 50], [10, 10, 90, 90]], [0, 1], [0.9, 0.8])
    report = raypar.export.compare(ours, other, [None], is_half=False)
    assert (report["num_agreeing"], report["num_compared"]) == (agreeing, 2 + len(other.found))


class Head(torch.nn.Module):
    """Gives the same raw output for every image."""

    def __init__(self, scores: list[list[float]], boxes: list[list[float]]):
        super().__init__()
        self.output = torch.cat([torch.tensor(boxes), torch.tensor(scores)], 1).T[None]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output.expand(len(images), -1, -1)


@pytest.mark.parametrize("level", [0.3, 0.02])  # sure, and not
@pytest.mark.parametrize(
    ("scores", "is_right"),
    [
        ([[1.0, 1.0 + 1e-7, 0.1], [0.9, 0.5, 0.1]], True),  # a tie the other way round
        ([[1.0 + 1e-7, 1.0, 0.1], [0.5, 0.9, 0.1]], False),  # another class
        ([[1.0 + 1e-7, 1.0, 0.1], [0.9, 0.5, 0.1]], True),
    ],
)
def test_a_tie_of_two_classes_is_no_difference(
    level: float, scores: list[list[float]], is_right: bool
) -> None:
    boxes = [[20.0, 20.0, 20.0, 20.0], [40.0, 40.0, 30.0, 30.0]]
    scale = 1.0 if level == 0.3 else 0.05  # so that a wrong class differs by more than is tolerated
    ours = [[1.0 + 1e-7, 1.0, 0.1], [0.9, 0.5, 0.1]]
    one, other = (
        Detector(Head([[s * scale for s in row] for row in rows], boxes), ["a", "b", "c"], imgsz=64)
        for rows in (ours, scores)
    )
    image = np.zeros((64, 64, 3), np.uint8)
    if scores[0][1] > scores[0][0]:  # what is named differs
        assert one([image], conf=0.001)[0].class_ids[0] != other([image], conf=0.001)[0].class_ids[0]
    report = raypar.export.compare(one, other, [image], is_half=False)
    assert (report["num_agreeing"] == report["num_compared"]) is is_right
    assert report["num_compared"] > 0
    assert (report["compared_above_confidence"] is None) is (level == 0.02)
    assert not one.evaluating  # compare leaves its detectors as they are
