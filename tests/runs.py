"""Runs of tests: another one over the same dataset, and what a training left."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raypar.config import RunConfig


def train_folder(config: RunConfig) -> Path:
    return Path(config.folder.uri) / "train"


def lines(config: RunConfig) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    return [json.loads(line) for line in (train_folder(config) / "metrics.jsonl").read_text().splitlines()]


def with_train(config: RunConfig, name: str, **train: Any) -> RunConfig:
    """The same dataset, another run: the dataset folder is linked."""
    value = config.model_dump(mode="json")
    value["name"] = name
    value["train"] |= train
    other = RunConfig.model_validate(value)
    Path(other.folder.uri).mkdir()
    (Path(other.folder.uri) / "dataset").symlink_to(Path(config.folder.uri) / "dataset")
    return other


def cursors(config: RunConfig) -> list[int]:
    """Images seen of each complete checkpoint, ascending."""
    return sorted(
        int(path.parent.name.split("_")[1]) for path in train_folder(config).glob("checkpoint_*/state.pt")
    )


def final_state(config: RunConfig) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(
        train_folder(config) / f"checkpoint_{cursors(config)[-1]:010d}" / "state.pt", weights_only=False
    )
    return state


def assert_same_bits(a: Any, b: Any, path: str) -> None:
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_bits(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def fit(
    train_loop: Callable[[dict[str, Any]], Any], config: dict[str, Any], num_workers: int, storage: Path
) -> Any:
    """What a loop of one's own returns on rank 0, in workers that are started as those of a training are."""
    import ray.train

    from raypar.train.launch import Trainer
    from raypar.train.network import Network

    return (
        Trainer(
            run_id=uuid.uuid4().hex,
            world_sizes=[num_workers],
            placement_timeout_s=60,
            train_loop_per_worker=train_loop,
            train_loop_config=config,
            torch_config=Network(timeout_s=120),
            scaling_config=ray.train.ScalingConfig(num_workers=num_workers),
            run_config=ray.train.RunConfig(storage_path=str(storage)),
        )
        .fit()
        .return_value
    )
