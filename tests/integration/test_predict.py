"""Prediction through Ray Data: any source, each image once, and nothing done twice.

{storage}/{name}/predict/   settings.json  00000.parquet ...  samples.png  rejected.jsonl  summary.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raypar.predict
from raypar.config import RunConfig
from raypar.detector import Detections, Detector
from raypar.images import decode, encode_jpeg, encode_png
from raypar.sources import list_source, read

pytestmark = pytest.mark.usefixtures("ray_4_cpus")
NUM_IMAGES = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of several sizes in two levels, and files that are none."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(NUM_IMAGES):
        image = rng.integers(0, 256, (4 + i % 3, 5 + i % 2, 3), np.uint8).repeat(24, 0).repeat(24, 1)
        name = f"deep/er/{i:02d}.PNG" if i % 4 == 0 else f"{i:02d}.jpg"
        (folder / name).write_bytes(encode_png(image) if i % 4 == 0 else encode_jpeg(image))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 this is no image")
    (folder / "notes.md").write_text("not an image")
    return folder


def config_for(storage: Path, weights: Path, source: Path | str, **predict: Any) -> RunConfig:
    section = {"weights": str(weights), "source": str(source), "use_gpu": False, **predict}
    return RunConfig.model_validate({"name": "p", "storage": str(storage), "predict": section})


def table(config: RunConfig) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(path) for path in sorted((Path(config.folder.uri) / "predict").glob("*.parquet"))]
    )


def share_found(ours: tuple[np.ndarray, np.ndarray, np.ndarray], others: Detections) -> float:
    """How many of our boxes the others have too. Not all: an untrained model gives neighbours equal confidences, and where a
    convolution's last bit depends on the batch, NMS keeps another one of them."""
    boxes, class_ids, confidences = ours
    is_near = (np.abs(boxes[:, None] - others.boxes_xyxy[None]) < 0.05).all(2) & (
        np.abs(confidences[:, None] - others.confidences) < 1e-4
    )
    return float((is_near & (class_ids[:, None] == others.class_ids)).any(1).mean())


def test_a_folder(images: Path, tiny_weights: Path, tmp_path: Path) -> None:
    config = config_for(tmp_path, tiny_weights, images, num_workers=2, batch=7)
    summary = raypar.predict.run(config)
    rows = {row["image_id"]: row for row in table(config).to_pylist()}
    files = {
        path.relative_to(images).as_posix(): path
        for path in images.rglob("*")
        if path.suffix.lower() in (".jpg", ".png")
    }
    assert rows.keys() == files.keys() - {"broken.jpg"}
    assert (summary["num_images"], summary["num_rejected"], len(table(config))) == (NUM_IMAGES, 1, NUM_IMAGES)
    folder = Path(config.folder.uri) / "predict"
    (rejected,) = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert rejected["image_id"] == "broken.jpg"
    assert decode((folder / "samples.png").read_bytes()).std() > 10
    detector = Detector.load(tiny_weights)
    for name in ("01.jpg", "deep/er/00.PNG", "39.jpg"):
        (alone,) = detector([files[name].read_bytes()])
        row = rows[name]
        assert (row["height"], row["width"]) == alone.image_hw
        boxes, class_ids = np.reshape(row["boxes_xyxy"], (-1, 4)), np.array(row["class_ids"])
        assert share_found((boxes, class_ids, np.array(row["confidences"])), alone) > 0.95
        assert abs(len(boxes) - len(alone.boxes_xyxy)) <= 0.05 * len(boxes)
    assert (
        summary["num_boxes"]
        == sum(len(row["class_ids"]) for row in rows.values())
        == sum(summary["boxes_per_class"].values())
        > 0
    )


def test_only_what_is_missing_is_done_again(
    images: Path, tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(tmp_path, tiny_weights, images)
    first = raypar.predict.run(config)
    folder = Path(config.folder.uri) / "predict"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.parquet")}
    assert len(before) == first["num_pieces"] == 3
    (folder / "00001.parquet").unlink()
    (folder / "summary.json").unlink()  # as if it had been killed
    again = raypar.predict.run(config)
    assert "2 of 3 pieces are done" in capsys.readouterr().out
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.parquet")}
    assert after["00000.parquet"] == before["00000.parquet"]
    assert after["00002.parquet"] == before["00002.parquet"]
    assert (
        pq.read_table(folder / "00001.parquet")["image_id"].to_pylist()
        == pq.read_table(pa.BufferReader(before["00001.parquet"][1]))["image_id"].to_pylist()
    )
    assert (again["num_images"], again["num_boxes"]) == (first["num_images"], first["num_boxes"])
    raypar.predict.run(config)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"conf: 0\.25 then, 0\.6 now.*overwrite=true"):
        raypar.predict.run(config_for(tmp_path, tiny_weights, images, conf=0.6))
    anew = raypar.predict.run(config_for(tmp_path, tiny_weights, images, conf=0.6, overwrite=True))
    assert anew["num_boxes"] < first["num_boxes"]


def test_the_datasets_own_shards(trained_run: RunConfig) -> None:
    summary = raypar.predict.run(trained_run)
    ids = table(trained_run)["image_id"].to_pylist()
    assert summary["num_images"] == len(set(ids)) == 16


def test_names_of_sources(
    images: Path, trained_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(source: str) -> set[str]:
        found = list_source(source, trained_run.folder)
        return {entry.image_id or entry.name for piece in found.pieces for entry in piece}

    assert len(ids(str(images))) == NUM_IMAGES + 1
    assert ids(f"{images}/0?.jpg") == {f"{i:02d}.jpg" for i in range(10) if i % 4}
    assert len(ids(f"{images}/**/*.PNG")) == 10
    assert ids(f"{images}/01.jpg") == {"01.jpg"}
    assert ids(f"file://{images}/deep") == {f"er/{i:02d}.PNG" for i in range(0, NUM_IMAGES, 4)}
    (images / "list.txt").write_text(f"# chosen\n01.jpg\n./02.jpg\n\n{images}/deep/er/04.PNG\n01.jpg\n")
    assert ids(f"{images}/list.txt") == {"01.jpg", "./02.jpg", f"{images}/deep/er/04.PNG"}
    monkeypatch.chdir(images)
    assert ids("deep") == {f"er/{i:02d}.PNG" for i in range(0, NUM_IMAGES, 4)}
    assert ids("01.jpg") == {"01.jpg"}
    shards = list_source(f"{trained_run.folder.uri}/dataset/train", trained_run.folder)
    assert shards.num_images == 48
    assert not shards.is_local
    first, data = next(read(shards.pieces[0][0]))
    assert isinstance(data, bytes)
    assert first
    for wrong in (str(tmp_path), str(tmp_path / "none"), f"{images}/notes.md", f"{images}/*.gif"):
        with pytest.raises(ValueError, match=r"(no images|nothing|no file) at"):
            list_source(wrong, trained_run.folder)


def test_cuts_are_the_same_every_time_and_follow_the_files(
    images: Path, trained_run: RunConfig, tmp_path: Path
) -> None:
    once, twice = (list_source(str(images), trained_run.folder) for _ in range(2))
    assert once == twice
    assert [len(piece) for piece in once.pieces] == [16, 16, 9]
    fewer = list_source(f"{images}/*.jpg", trained_run.folder)
    assert fewer.sha256 != once.sha256


def test_what_is_missing_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights"):
        raypar.predict.check(config_for(tmp_path, tmp_path / "none.pt", images))
