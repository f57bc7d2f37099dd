"""The search space: which settings may be in it, the run of each trial, and whether it would start. Runs in: the driver."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

import numpy as np

from raypar import runfile, train
from raypar.config import RunConfig, TrainConfig
from raypar.domain import Domain
from raypar.yolo_keys import HONOURED, REFUSED

# What changes what is learnt; all else of section train is the same for every trial. Under train.yolo all that is honoured may vary but FIXED.
SEARCHED = (
    "seed",
    "train.model",
    "train.init_from",
    "train.batch",
    "train.precision",
    "train.augment",
    "train.albumentations",
    "train.sync_bn",
)
_JUDGED_ALIKE = "trials are compared by one way of validating"
FIXED = {
    "epochs": "trials are compared epoch by epoch, and the learning rate follows from their number",
    "time": "raypar trains whole epochs",
    "val": "a trial that is not validated cannot be compared",
    "single_cls": "its metrics are those of another task",
    "classes": "its metrics are those of another task",
    "cfg": "write the settings of the file into the space one by one",
    "plots": "it does not change what is learnt",
    **dict.fromkeys(("conf", "iou", "max_det", "agnostic_nms", "nms"), _JUDGED_ALIKE),
}
NUM_PROBES = 8


def check(config: RunConfig) -> None:
    """Every key, and every domain at its edges and at a few values between, one at a time.

    Raises:
        ValueError: one line a mistake.
    """
    space = config.tune.space
    if not space:
        raise ValueError(
            "tune.space is empty: write settings and what to draw them from, e.g. train.yolo.lr0: {loguniform: [1e-4, 1e-1]}"
        )
    mistakes = [f"tune.space.{key}: {why}" for key in space if (why := _refusal(key))]
    mistakes += [f"tune.space.train.yolo.{name}: train.yolo.optimizer=auto chooses it itself: name one, e.g. train.yolo.optimizer=SGD"
                 for name in train.IGNORED_BY_AUTO if f"train.yolo.{name}" in space and "auto" in _optimizers(config)]  # fmt: skip
    if not mistakes:
        mistakes = [text for key, domain in space.items() if (text := _try(config, key, domain))]
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _optimizers(config: RunConfig) -> list[Any]:
    domain = config.tune.space.get("train.yolo.optimizer")
    return [config.train.yolo.get("optimizer", "auto")] if domain is None else domain.edges


def _refusal(key: str) -> str:
    """Why a setting cannot be in a search space; nothing when it can."""
    if key.startswith("train.yolo."):
        name = key.removeprefix("train.yolo.")
        if name in FIXED:
            return f"is the same for every trial: {FIXED[name]}"
        if name in REFUSED:
            return f"'{name}' is refused: {REFUSED[name]}"
        return "" if name in HONOURED else "Ultralytics has no such setting" + _nearest(key)
    if key in SEARCHED:
        return ""
    section, _, name = key.partition(".")
    if section == "train" and name.split(".")[0] in TrainConfig.model_fields:
        return f"does not change what is learnt, or is the same for every trial: write it in section train; there are {', '.join(SEARCHED)}, train.yolo.*"
    if section in RunConfig.model_fields and section != "train":
        return f"is the same for every trial; there are {', '.join(SEARCHED)}, train.yolo.*"
    return "no such setting" + _nearest(key)


def _nearest(key: str) -> str:
    known = [*SEARCHED, *(f"train.yolo.{name}" for name in HONOURED if name not in FIXED)]
    return "".join(f"; did you mean '{name}'?" for name in difflib.get_close_matches(key, known, n=1))


def _try(config: RunConfig, key: str, domain: Domain) -> str:
    """What is wrong with a value of a domain: the first that is."""
    for value in _probes(domain):
        try:
            train.check_settings(with_params(config, {key: value}))
        except ValueError as error:
            reason = (
                next((str(e["msg"]) for e in error.errors()), "") if hasattr(error, "errors") else str(error)
            )
            return f"tune.space.{key}: {value!r} cannot be had: {' '.join(reason.removeprefix('Value error, ').split())}"
    return ""


def _probes(domain: Domain) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    seen: set[Any] = set()
    for value in [
        *domain.edges,
        *(domain.draw(rng) for _ in range(0 if domain.kind == "choice" else NUM_PROBES)),
    ]:
        if value not in seen:
            yield value
        seen.add(value)


def with_params(config: RunConfig, params: dict[str, Any]) -> RunConfig:
    """A run with some of its settings replaced.

    Raises:
        ValueError: of pydantic, when it cannot be.
    """
    value = config.model_dump(mode="json")
    for key, param in params.items():
        runfile.put(value, tuple(key.split(".")), param)
    return RunConfig.model_validate(value)


def trial_run(config: RunConfig, name: str, params: dict[str, Any]) -> RunConfig:
    """The run of a trial: its own folder below ``tune``, the study's dataset, its own settings."""
    value = with_params(config, params).model_dump(mode="json")
    value |= {
        "name": name,
        "storage": (config.folder / "tune").uri,
        "dataset": config.dataset_folder.uri,
        "prepare": None,
    }
    value["train"]["overwrite"] = False
    del value["tune"]
    return RunConfig.model_validate(value)


def draw(space: dict[str, Domain], seed: int, number: int) -> dict[str, Any]:
    """The settings of a trial at random: a function of the run's seed and the trial's number alone."""
    rng = np.random.default_rng([seed, number])
    return {key: space[key].draw(rng) for key in sorted(space)}


def used_others(params: dict[str, Any], used: dict[str, Any]) -> str:
    """Which settings a training used otherwise than a trial has them, in words; nothing when it used them all.

    Args:
        params: by dotted key.
        used: what rank 0 of the training says of itself (``train/used.json``).
    """
    others = []
    for key, wanted in params.items():
        value: Any = used
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value != wanted:
            others.append(f"{key} was {value!r}, not {wanted!r}")
    return ", ".join(others)
