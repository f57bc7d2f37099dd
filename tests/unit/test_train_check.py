"""What ``raypar.train.check`` says before a cluster is busy: of the model, of the image size, of settings without effect, of a begun run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import raypar.train
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest, Shard, Split
from raypar.storage import Folder
from raypar.train import initial
from raypar.train.recipe import Lender, settings, staged

MANIFEST = Manifest(
    task="detect",
    class_names=("a",),
    splits={
        "train": Split(
            shards=(Shard(path="train/00000.parquet", num_bytes=1, sha256="", row_groups=(64,)),),
            num_images=64,
        )
    },
    source="",
)


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    raypar.train._note.cache_clear()
    monkeypatch.setattr(raypar.train.verify, "check_sizes", lambda *_: None)


def make_config(storage: Path, **train: Any) -> RunConfig:
    config = RunConfig.model_validate(
        {"name": "run", "storage": str(storage), "train": {"model": "yolov8n.yaml", **train}}
    )
    MANIFEST.save(config.dataset_folder)
    return config


@pytest.mark.parametrize(
    ("yolo", "said"),
    [
        (
            {"lr0": 0.01, "momentum": 0.9},
            "train.yolo.lr0, train.yolo.momentum without effect: optimizer=auto",
        ),
        ({"lr0": 0.01, "optimizer": "SGD"}, ""),
        ({"epochs": 3, "time": 1.0}, "train.yolo.epochs without effect on the length"),
        ({"imgsz": 100}, "train.yolo.imgsz=100 becomes 128"),
        ({"imgsz": 96}, ""),
        ({}, ""),
    ],
)
def test_what_acts_otherwise_than_written_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yolo: dict[str, Any], said: str
) -> None:
    config = make_config(tmp_path, yolo=yolo)
    for _ in range(2):
        raypar.train.check(config)
    out = capsys.readouterr().out
    assert out.count("train: note:") == bool(said)
    assert said in out


@pytest.mark.parametrize("imgsz", [[640, 480], [64], 0, -32, 320.5])
def test_an_image_size_that_is_no_size_is_refused(imgsz: Any) -> None:
    with pytest.raises(ValueError, match=r"train\.yolo(\.imgsz=|: .*imgsz)"):
        settings({"imgsz": imgsz})


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for _ in range(2):
        Lender(
            {"imgsz": 64},
            model="yolov8n.yaml",
            manifest=MANIFEST,
            batch=2,
            seed=0,
            device=torch.device("cpu"),
        )
    assert [path.name for path in tmp_path.glob("raypar*")] == [f"raypar-{os.getuid()}"], (
        "one folder, however many workers there were"
    )
    out = Folder.at(tmp_path / "run")
    out.write("init.pt", b"weights")
    with staged("init.pt", out) as path:
        assert Path(str(path)).read_bytes() == b"weights"
    assert not Path(str(path)).parent.exists()


def test_a_model_with_a_longer_stride_says_so() -> None:
    with pytest.raises(ValueError, match=r"imgsz=96: yolov8n-p6\.yaml needs a multiple of 64"):
        Lender(
            {"imgsz": 96},
            model="yolov8n-p6.yaml",
            manifest=MANIFEST,
            batch=2,
            seed=0,
            device=torch.device("cpu"),
        )


def test_a_run_that_was_begun_otherwise_is_refused_before_ray_is_there(tmp_path: Path) -> None:
    config = make_config(tmp_path, yolo={"epochs": 1, "mosaic": 0.5})
    (config.folder / "train").write_json(raypar.train.SETTINGS, raypar.train.fingerprint(config))
    raypar.train.check(config)
    other = make_config(tmp_path, batch=8, yolo={"epochs": 20, "fliplr": 0.1})
    with pytest.raises(ValueError, match="was begun with other settings") as caught:
        raypar.train.check(other)
    said = str(caught.value)
    for expected in (
        "batch: 16 then, 8 now",
        "yolo.epochs: 1 then, 20 now",
        "yolo.mosaic: 0.5 then, None now",
        "yolo.fliplr: None then, 0.1 now",
    ):
        assert expected in said
    assert f"dataset={config.dataset_folder.uri}" in said
    raypar.train.check(make_config(tmp_path, overwrite=True, yolo={"epochs": 20}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("yolov8n", r"neither a \.yaml nor a \.pt: write yolov8n\.yaml .* yolov8n\.pt"),
        ("some/folder/", r"neither a \.yaml nor a \.pt"),
        ("mine.pt", r"there is no file mine\.pt, and Ultralytics offers no weights of that name"),
        ("yolov8q.yaml", r"train\.model: yolov8q\.yaml cannot be read"),
        ("yolov8n-seg.yaml", "a model for 'segment', the dataset is for 'detect'"),
        ("yolov8s-world.yaml", r"train\.model: yolov8s-world\.yaml is a model of the YOLO-World family, which raypar cannot train: write e\.g\. yolov8n\.yaml"),
        ("yolov8s-worldv2.yaml", "of the YOLO-World family"),
        ("yoloe-11s.yaml", "of the YOLOE family"),
        ("yoloe-26n-seg.yaml", "of the YOLOE family"),
        ("rtdetr-l.yaml", "of the RT-DETR family"),
    ],
)  # fmt: skip
def test_a_model_that_is_none_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        initial.find(name, "detect")


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"yolo": {"classes": [0, 3]}}, r"train\.yolo\.classes: there is no class 3, the dataset has 0 to 1"),
        ({"yolo": {"classes": 1}}, r"train\.yolo\.classes: no training image has a label of class 1 \(b\)"),
        ({"yolo": {"nms": False}}, r"train\.yolo\.nms=False: yolov8n\.yaml has no NMS-free head"),
        ({"yolo": {"mask_ratio": 2}}, r"train\.yolo\.mask_ratio=2 has no effect for task 'detect' \(it has for segment\)"),
        ({"yolo": {"copy_paste": 0.5}}, "the dataset has boxes without polygons"),
        ({"init_from": "yolov8n.yaml"}, r"train\.init_from: yolov8n\.yaml is a model's YAML, which holds no weights: write a \.pt"),
    ],
)  # fmt: skip
def test_settings_without_effect_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], said: str
) -> None:
    split = MANIFEST.splits["train"].model_copy(update={"boxes_per_class": (7, 0)})
    config = make_config(tmp_path, **train)
    MANIFEST.model_copy(update={"class_names": ("a", "b"), "splits": {"train": split}}).save(
        config.dataset_folder
    )
    with pytest.raises(ValueError, match=said) as caught:
        raypar.train.check(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["yolo26n.yaml", "yolov10n.yaml"])
def test_a_model_with_an_nms_free_head_may_be_validated_by_it(tmp_path: Path, model: str) -> None:
    raypar.train.check(make_config(tmp_path, model=model, yolo={"nms": False, "optimizer": "SGD"}))


@pytest.mark.parametrize("error", [ConnectionError("no route"), None])
def test_weights_that_cannot_be_downloaded_are_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def offline(name: str) -> str:
        if error:
            raise error
        return name  # Ultralytics warns, and gives the name of a file that is not there

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ultralytics.utils.downloads.attempt_download_asset", offline)
    with pytest.raises(
        ValueError, match=r"yolov8x\.pt cannot be downloaded|cannot be downloaded now.*write yolov8x\.yaml"
    ):
        initial.find("yolov8x.pt", "detect")


def test_a_file_that_holds_no_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"train\.init_from: .*broken\.pt cannot be read"):
        initial.find(str(path), "detect", "train.init_from")


def test_weights_of_a_store_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials of a study fetch them at the same time, and read them while others do."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))

    def download(folder: Folder, name: str, path: Path) -> Path:
        path.write_bytes(b"half")
        assert not list(tmp_path.glob("*.pt"))
        path.write_bytes(b"half and half")
        return path

    monkeypatch.setattr(Folder, "download", download)
    path = initial._fetched("s3://bucket/weights.pt")
    assert path.read_bytes() == b"half and half"
    assert list(tmp_path.iterdir()) == [path]
