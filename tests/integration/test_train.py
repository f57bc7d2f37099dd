"""Training through Ray: what it leaves, that ranks agree, and that a cache changes nothing.

{storage}/{name}/train/
    settings.json  summary.json  metrics.jsonl  results.csv  results.png  batch_0.png ...
    best.pt  last.pt  checkpoint_0000000096/state.pt
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import raypar.train
from raypar.config import RunConfig
from raypar.dataset.cache import PREFIX, SHARED_MEMORY
from raypar.train.report import STAGES
from tests.runs import assert_same_bits, cursors, final_state, fit, lines, train_folder, with_train

AT_EACH_EPOCH = {"checkpoint_every_s": 0.001, "keep_checkpoints": 99}  # and within it


def back_to_epoch(config: RunConfig, epoch: int) -> None:
    """Takes away what came after an epoch's end, as if the run had been killed there."""
    folder = train_folder(config)
    (folder / "summary.json").unlink()
    images_per_epoch = cursors(config)[-1] // len(lines(config))
    assert epoch * images_per_epoch in cursors(config)
    for cursor in cursors(config):
        if cursor > epoch * images_per_epoch:
            shutil.rmtree(folder / f"checkpoint_{cursor:010d}")


def test_layout_and_metrics(ray_4_cpus: None, trained_run: RunConfig) -> None:
    folder = train_folder(trained_run)
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "settings.json",
        "summary.json",
        "metrics.jsonl",
        "results.csv",
        "results.png",
        "batch_0.png",
        "best.pt",
        "last.pt",
    }
    assert not [n for n in names if n.endswith(".part")]
    epochs = lines(trained_run)
    assert [e["epoch"] for e in epochs] == [1, 2]
    assert [e["images_seen"] for e in epochs] == [48, 96]
    wanted = {
        "train/box_loss",
        "val/box_loss",
        "map50",
        "map50_95",
        "precision",
        "recall",
        "lr/pg0",
        "images_per_s",
        "wait_s",
        "step_s",
        "validate_s",
        "checkpoint_s",
        "world_size",
    }
    assert all(e.keys() >= wanted for e in epochs[:1])
    assert all(np.isfinite(v) for e in epochs for v in e.values() if isinstance(v, float))
    for e in epochs:
        assert e["epoch_s"] == pytest.approx(sum(e[name] for name in STAGES)), "of the whole epoch"
    assert [p.name for p in folder.glob("checkpoint_0*")] == ["checkpoint_0000000096"], (
        "short epochs write none"
    )


def test_ultralytics_loads_and_runs_the_weights(trained_run: RunConfig) -> None:
    from ultralytics import YOLO

    for name in ("best.pt", "last.pt"):
        model = YOLO(train_folder(trained_run) / name)
        assert list(model.names.values()) == ["circle", "square", "star", "triangle"] or set(
            model.names.values()
        ) == {
            "circle",
            "square",
            "star",
            "triangle",
        }
        model.predict(np.zeros((96, 128, 3), np.uint8), imgsz=96, verbose=False)


def test_a_finished_run_is_kept_and_other_settings_are_refused(
    ray_4_cpus: None, trained_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (train_folder(trained_run) / "best.pt").stat().st_mtime_ns
    assert raypar.train.run(trained_run)["num_epochs"] == 2
    assert "complete" in capsys.readouterr().out
    assert (train_folder(trained_run) / "best.pt").stat().st_mtime_ns == before
    value = trained_run.model_dump(mode="json")
    value["train"]["yolo"]["lr0"] = 0.5
    with pytest.raises(ValueError, match="other settings"):
        raypar.train.run(RunConfig.model_validate(value))


def test_a_finished_run_goes_on_for_more_epochs(
    ray_4_cpus: None, trained_run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_train(trained_run, "longer", yolo=trained_run.train.yolo | {"epochs": 3})
    shutil.copytree(train_folder(trained_run), train_folder(config))
    assert raypar.train.run(config)["num_epochs"] == 3
    said = capsys.readouterr().out
    assert "train.yolo.epochs was 2 and is 3 now: the run goes on from its newest checkpoint" in said
    before, found, state = lines(trained_run), lines(config), final_state(config)
    assert found[:2] == before
    assert (found[2]["epoch"], found[2]["images_seen"], found[2]["images_missed"]) == (3, 144, 0)
    assert (state["is_finished"], state["cursor"]) == (True, 144)
    lrf = 0.01  # Ultralytics' default
    initial_lr = state["optimizer"]["param_groups"][0]["initial_lr"]
    assert found[2]["lr/pg0"] == pytest.approx(initial_lr * ((1 - 2 / 3) * (1 - lrf) + lrf)), "of 3 epochs"
    assert "was 2 and is 3 now" in (train_folder(config) / "events.jsonl").read_text()
    raypar.train.run(config)
    assert "is complete" in capsys.readouterr().out
    shorter = with_train(trained_run, "shorter", yolo=trained_run.train.yolo | {"epochs": 1})
    shutil.copytree(train_folder(config), train_folder(shorter))
    with pytest.raises(ValueError, match=r"other settings \(yolo.epochs: 3 then, 1 now\)"):
        raypar.train.run(shorter)


def test_two_workers_hold_equal_weights_after_a_step(
    ray_4_cpus: None, trained_run: RunConfig, tmp_path: Path
) -> None:
    def train_loop(config: dict[str, Any]) -> Any:
        import torch.distributed as dist

        from raypar.dataset.manifest import Manifest
        from raypar.storage import Folder
        from raypar.train.loop import Loop
        from raypar.train.parallel import assert_synchronised
        from raypar.train.recipe import Lender

        rank = dist.get_rank()
        manifest = Manifest.load(Folder(config["dataset"]))
        lender = Lender(
            {"epochs": 1, "imgsz": 64, "nbs": 4},
            model="yolov8n.yaml",
            manifest=manifest,
            batch=4,
            seed=0,
            device=torch.device("cpu"),
        )
        loop = Loop(lender, num_images=48, steps_per_epoch=12, world_size=2)
        torch.manual_seed(rank)  # every rank sees other images
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
        batch = {
            "img": images,
            "cls": torch.zeros(2, 1),
            "bboxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]] * 2),
            "batch_idx": torch.tensor([0.0, 1.0]),
        }
        before = torch.cat([p.detach().reshape(-1) for p in lender.model.parameters()]).clone()
        loop.start_epoch()
        loop.step(batch, 3)
        assert_synchronised(lender.model, rank)
        after = torch.cat([p.detach().reshape(-1) for p in lender.model.parameters()])
        gathered = [torch.empty_like(after) for _ in range(2)]
        dist.all_gather(gathered, after)
        with torch.no_grad():
            next(lender.model.parameters()).view(-1)[0] += rank  # one weight of rank 1 goes astray
        try:
            assert_synchronised(lender.model, rank)
            noticed = False
        except RuntimeError:
            noticed = True
        return (
            {"moved": bool((before != after).any()), "equal": torch.equal(*gathered), "noticed": noticed}
            if rank == 0
            else None
        )

    result = fit(train_loop, {"dataset": (trained_run.folder / "dataset").uri}, 2, tmp_path)
    assert result == {"moved": True, "equal": True, "noticed": True}


def test_a_cache_changes_nothing_and_is_gone_afterwards(ray_4_cpus: None, trained_run: RunConfig) -> None:
    config = with_train(trained_run, "cached", cache="ram", cache_gb=0.5)
    raypar.train.run(config)
    for ours, theirs in zip(lines(config), lines(trained_run), strict=True):
        for key in ("train/box_loss", "train/cls_loss", "train/dfl_loss", "map50_95"):
            assert ours[key] == theirs[key], key
    assert not list(SHARED_MEMORY.glob(f"{PREFIX}*"))


def test_fraction_and_time_are_kept(ray_4_cpus: None, trained_run: RunConfig) -> None:
    yolo = trained_run.train.yolo | {"epochs": 50_000, "fraction": 0.4, "time": 1e-9, "val": False}
    config = with_train(trained_run, "short", yolo=yolo)
    summary = raypar.train.run(config)
    (line,) = lines(config)  # one epoch is the least
    assert (summary["num_epochs"], line["images_missed"], line["images_repeated"]) == (
        1,
        0,
        line["images_seen"] - round(0.4 * 48),
    )
    assert "map50_95" in line, "any epoch may be the last, so each is validated"
    state = final_state(config)
    assert state["is_finished"]
    (train_folder(config) / raypar.train.SUMMARY).unlink()
    # with the optimizer of the 50,000 epochs that were asked for, whose state it is
    assert raypar.train.run(config)["num_epochs"] == 1
    assert len(state["optimizer"]["param_groups"]) > 3, "MuSGD, as for any long run"


def test_augmenting_on_the_workers_device_trains_alike_and_resumes_to_the_same_bits(
    ray_4_cpus: None, trained_run: RunConfig
) -> None:
    """On CPU tensors: what runs on a GPU is the same program."""
    config = with_train(trained_run, "device", augment="gpu", **AT_EACH_EPOCH)
    value = config.model_dump(mode="json")
    value["train"]["cache"] = "ram"
    with pytest.raises(ValueError, match=r"train\.augment=gpu cannot be had: train\.cache=ram"):
        raypar.train.check(RunConfig.model_validate(value))
    raypar.train.check(config)
    raypar.train.run(config)
    folder, before = train_folder(config), lines(trained_run)
    found = lines(config)
    for line, other in zip(found, before, strict=True):
        assert (line["images_missed"], line["images_repeated"], line["images_replaced"]) == (0, 0, 0)
        assert line["images_seen"] == other["images_seen"]
        for name in ("train/box_loss", "train/cls_loss", "train/dfl_loss"):
            assert abs(line[name] / other[name] - 1) < 0.3, name
    assert (folder / "batch_0.png").exists()
    expected = final_state(config)
    back_to_epoch(config, 1)
    with pytest.raises(ValueError, match="augment: 'gpu' then, None now"):
        raypar.train.run(
            RunConfig.model_validate(
                {**config.model_dump(mode="json"), "train": config.train.model_dump() | {"augment": "cpu"}}
            )
        )
    raypar.train.run(config)  # from the first epoch's checkpoint, with a ring that is filled anew
    assert_same_bits(final_state(config)["model"], expected["model"], "model")


def test_shares_and_batch_norm_over_ranks_train_and_resume_to_the_same_bits(
    ray_4_cpus: None, trained_run: RunConfig
) -> None:
    """FSDP with gradients that wait at the epoch's end: three steps an epoch, an update after each second one."""
    yolo = trained_run.train.yolo | {
        "imgsz": 64,
        "fraction": 0.5,
        "nbs": 16,
        "optimizer": "SGD",
        "val": False,
    }
    config = with_train(
        trained_run, "shares", num_workers=2, parallel="fsdp", sync_bn=True, yolo=yolo, **AT_EACH_EPOCH
    )
    raypar.train.run(config)
    before, expected = lines(config), final_state(config)
    assert [(line["world_size"], line["images_missed"]) for line in before] == [(2, 0)] * 2
    assert before[0]["train/box_loss"] != before[1]["train/box_loss"]
    assert expected["model"].keys() == final_state(trained_run)["model"].keys(), (
        "whole, under a plain model's names"
    )
    back_to_epoch(config, 1)
    assert final_state(config)["gradients"]
    raypar.train.run(config)
    again = final_state(config)
    for part in ("model", "ema", "optimizer"):
        assert_same_bits(again[part], expected[part], part)
    assert lines(config)[1]["train/box_loss"] == before[1]["train/box_loss"]
