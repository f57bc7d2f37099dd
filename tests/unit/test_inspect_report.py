"""What the numbers are made to say: notes, verdicts, the summary, the pictures of odd datasets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raypar.dataset.batch import Batch
from raypar.dataset.show import batch_image
from raypar.images import decode
from raypar.inspect import pictures, report
from raypar.inspect.speed import STAGES, Rate, train_steps
from raypar.inspect.statistics import Statistics


def found(
    counts: list[list[int]], hw: tuple[int, int] = (480, 640), side: float = 0.2, num_classes: int = 3
) -> Statistics:
    """Images whose boxes have these classes."""
    class_ids = np.array([i for image in counts for i in image], np.int32)
    boxes = np.tile(np.array([0.5, 0.5, side, side], np.float32), (len(class_ids), 1))
    return Statistics.of(np.full(len(counts), hw[0]), np.full(len(counts), hw[1]), np.array([len(image) for image in counts], np.int64),
                         class_ids, boxes, num_classes=num_classes, imgsz=320)  # fmt: skip


def notes(of: Statistics, names: tuple[str, ...] = ("a", "b", "c"), task: str = "detect") -> str:
    return "\n".join(report.notes(of, names, 320, task))


def test_a_sound_dataset_has_no_notes() -> None:
    assert notes(found([[0, 1, 2]] * 60)) == ""


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (found([[0, 1]] * 60), "no boxes of c: nothing can be learnt of it"),
        (found([[0, 1]] * 60 + [[2]] * 7), "fewer than 50 boxes of c (7)"),
        (found([[0] * 100, [1, 2]] * 60), "no note"),
        (found([[0] * 120, [1, 2]] * 60 + [[0] * 20]), "120 times the boxes of the rarest"),
        (found([[0, 1, 2]] * 60 + [[]] * 40), "40% of the images have no box"),
        (found([[0, 1, 2]] * 60, side=0.02), "100% of the boxes are under 8 px at imgsz 320"),
        (found([[0, 1, 2]] * 60, side=0.003), "180 box(es) under 2 px at imgsz 320: training drops them"),
        (found([[0, 1, 2]] * 60, hw=(3000, 4000)), "images are 10.8 times larger than they are trained at"),
    ],
)  # fmt: skip
def test_notes(of: Statistics, said: str) -> None:
    assert said in (notes(of) or "no note")


def test_notes_of_many_empty_classes_name_a_few() -> None:
    names = tuple(f"class{i}" for i in range(100))
    assert "class1, class2, class3, class4, class5 and 94 more: nothing can be learnt of them" in notes(
        found([[0]] * 60, num_classes=100), names
    )


def model(rate: float, *, is_gpu: bool) -> dict[str, Any]:
    return {
        "device": "GPU X" if is_gpu else "CPU, 8 threads",
        "is_gpu": is_gpu,
        "images_per_s": rate,
        "batch": 16,
        "precision": "bfloat16",
    }


def test_verdict_for_a_gpu() -> None:
    assert report.verdict(800.0, 16, model(2000.0, is_gpu=True)).startswith(
        "the data limits: one GPU X takes 2000 images/s and needs 40 CPU(s) to feed it, this machine's 16 make 800"
    )
    assert report.verdict(800.0, 16, model(300.0, is_gpu=True)).startswith(
        "the model limits: one GPU X takes 300 images/s and needs 6 CPU(s)"
    )


def test_verdict_for_a_cpu_shares_the_cores() -> None:
    said = report.verdict(90.0, 2, model(10.0, is_gpu=False))
    assert said.startswith("the model limits")
    assert "about 9 images/s, 10% of the time for the data" in said
    assert report.verdict(10.0, 2, model(90.0, is_gpu=False)).startswith("the data limits")


def test_verdict_without_a_model() -> None:
    assert "yolov9000.yaml: no such file" in report.verdict(
        10.0, 2, {"error": "yolov9000.yaml: no such file"}
    )


def test_cpus_for_a_rate_follow_from_the_loaded_machine() -> None:
    stages = {stage: 1.0 for stage in STAGES} | {"decode": 3.0}
    measured = {
        "one": Rate(1, 200.0, 5.0),
        "all": Rate(4, 500.0, 8.0),
        "stages": {"cpu": stages, "wall": stages},
        "num_cores": 8,
        "busy": 0.5,
    }
    said = report.speed(measured, model(100.0, is_gpu=True), 8.0, 1.0)
    # 125 images/s a core when four are busy
    assert said["cpus_for_images_per_s"] == {"500": 4, "1000": 8, "2000": 16}
    assert said["slowest_stage"] == "decode"
    assert said["images_per_s_cached_estimate"] == pytest.approx(500 * 7 / 3)  # without read and decode
    lines = "\n".join(report.speed_lines(said))
    assert "4 of 8 cores" in lines
    assert "50% busy with other work" in lines


def a_report(of: Statistics, names: tuple[str, ...], task: str = "detect") -> dict[str, Any]:
    return {"name": "x", "split": "train", "task": task, "imgsz": 320, "statistics": report.describe(of, names, 320),
            "notes": report.notes(of, names, 320, task), "speed": None}  # fmt: skip


@pytest.mark.parametrize(("num_classes", "num_lines"), [(1, 1), (12, 12), (13, 12), (200, 12)])
def test_summary_fits_a_screen(num_classes: int, num_lines: int) -> None:
    names = tuple(f"class{i}" for i in range(num_classes))
    lines = report.data_lines(a_report(found([list(range(num_classes))] * 3, num_classes=num_classes), names))
    table = [line for line in lines if line.startswith(("class", "..."))]
    assert len(table) == 1 + num_lines
    assert any(f"({num_classes - 11} more classes)" in line for line in table) == (num_classes > 12)


def test_page_is_whole_and_escaped() -> None:
    text = report.page(a_report(found([[0]]), ("<b>", "b", "c")), ["<b>"], {"Statistics": b"\x89PNG"})
    assert "<b>" not in text
    assert "data:image/png;base64,iVBORw" in text


@pytest.mark.parametrize(
    "of",
    [
        found([[0, 1, 2], [0]]),
        found([[0]]),  # one image
        found([[], []]),  # no box at all
        found([[0] * 5000, []]),  # more boxes than there are bins
        found([[0]], hw=(1, 60000)),
        found([list(range(100))] * 3, num_classes=100),
        found([[0, 1]], hw=(100, 300))
        + found([[2]], hw=(2000, 50))
        + found([[1]], side=1e-6)
        + found([[1]], side=1.0),
    ],
    ids=["usual", "one image", "no box", "crowd", "thin", "many classes", "all sizes"],
)
@pytest.mark.parametrize("speed", [None, {"stages_cpu_ms_per_image": dict.fromkeys(STAGES, 0.5)}])
def test_histograms_of_any_dataset(of: Statistics, speed: dict[str, Any] | None) -> None:
    names = tuple(f"class {i} with a rather long name" for i in range(len(of.boxes_per_class)))
    image = decode(pictures.histograms(of, names, 320, "title", speed))
    assert image.shape[0] > 500
    assert image.shape[1] > 1000
    assert image.std() > 10


def test_labels_of_the_other_tasks_are_drawn_where_they_are() -> None:
    """A mask, the same as a turned box, and keypoints, in a 64 px image, away from the box; nothing else is touched."""
    mask = np.zeros((1, 16, 16), np.uint8)
    mask[0, 4:12, 4:8] = 1  # rows 16 to 48, columns 16 to 32
    labels = {
        "class_ids": np.zeros(1, np.int32),
        "boxes_xywhn": np.array([[0.8, 0.9, 0.1, 0.1]], np.float32),
        "image_index": np.zeros(1, np.int32),
    }
    extra: dict[str, Any] = {
        "masks": mask,
        "boxes_xywhr": np.array([[0.375, 0.5, 0.5, 0.25, np.pi / 2]], np.float32),
        "keypoints": np.array([[[0.75, 0.25, 2], [0.75, 0.75, 0]]], np.float32),
    }
    images = np.full((1, 3, 64, 64), 200, np.uint8)
    for name, value in extra.items():
        batch = Batch(0, 0, 0, images, **labels, rows=np.zeros(1, np.int64), **{name: value})
        plain = Batch(0, 0, 0, images, **labels, rows=np.zeros(1, np.int64))
        changed = (batch_image(batch, 0, ["a"]) != 200).any(-1)
        where = np.argwhere(changed & ~(batch_image(plain, 0, ["a"]) != 200).any(-1))
        if name == "keypoints":
            assert len(where) > 4
            assert abs(where - [16, 48]).max() <= 3, "the visible one, not the other"
        else:
            assert abs(where.min(0) - [16, 16]).max() <= 2, name
            assert abs(where.max(0) - [48, 32]).max() <= 2, name


@pytest.mark.parametrize("kind", ["", "-seg", "-pose", "-obb", "-cls"])
def test_the_model_of_every_task_steps(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raypar.inspect.speed.STEPS_S", 0.01)
    timed = train_steps(f"yolov8n{kind}.yaml", 2, 64, "fp32", use_gpu=False, trusted=False)
    assert timed["images_per_s"] > 0
    assert timed["precision"] == "float32"
    assert not timed["is_gpu"]
