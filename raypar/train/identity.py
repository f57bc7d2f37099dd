"""Which run a training belongs to, and how long it is: what a checkpoint must have in common with the run that takes it.

``settings.json`` holds the run's fingerprint (:func:`raypar.train.fingerprint`), the checksum of that, an id and the length that it was begun with. A run's length,
``train.yolo.epochs`` or ``train.yolo.time``, may grow; all else stays. Runs in: the driver; the workers compare plain values.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass
from typing import Any

from raypar.yolo_keys import yolo_settings

ID, BEGUN, DIGEST = "id", "begun", "sha256"  # in settings.json, with the fingerprint
MODEL_CONTENT = "model_sha256"  # in the fingerprint: of a model yaml
NO_ID = ""  # of a run that was begun with a raypar that gave none; its checkpoints have none either


@dataclass(frozen=True)
class Growth:
    """A length that was raised.

    Attributes:
        setting: ``epochs`` or ``time``, of ``train.yolo``.
        before, now: epochs or hours.
    """

    setting: str
    before: float
    now: float

    def __str__(self) -> str:
        unit = "epochs" if self.setting == "epochs" else "hours"
        return (
            f"train.yolo.{self.setting} was {self.before:g} and is {self.now:g} now: the run goes on from its newest checkpoint "
            f"with the schedule of {self.now:g} {unit}"
        )


def length_of(yolo: dict[str, Any]) -> dict[str, Any]:
    """``epochs`` and ``time`` of Ultralytics' settings; with ``time`` it decides, and ``epochs`` is a first guess."""
    return {name: yolo.get(name, yolo_settings()[name]) for name in ("epochs", "time")}


def deciding(length: dict[str, Any]) -> str:
    return "epochs" if length["time"] is None else "time"


def growth(before: dict[str, Any], now: dict[str, Any]) -> Growth | None:
    """What was raised between two fingerprints; nothing when the length is the same, shorter, or measured otherwise."""
    then, today = length_of(before["yolo"]), length_of(now["yolo"])
    setting = deciding(today)
    if deciding(then) != setting or not _is_more(today[setting], then[setting]):
        return None
    return Growth(setting, then[setting], today[setting])


def without(fingerprint: dict[str, Any], setting: str) -> dict[str, Any]:
    """A fingerprint without one of Ultralytics' settings."""
    return {**fingerprint, "yolo": {k: v for k, v in fingerprint["yolo"].items() if k != setting}}


def recorded(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    """What ``settings.json`` is to hold.

    Args:
        before: what it holds; nothing at a run's first start.
        now: the fingerprint.
    """
    if before is None:
        return {**now, ID: uuid.uuid4().hex, BEGUN: length_of(now["yolo"]), DIGEST: _digest(now)}
    # kept as they are: another raypar may count more settings to the fingerprint
    kept = {ID: NO_ID, BEGUN: length_of(before["yolo"]), DIGEST: _digest(before)}
    return {**now, **{name: before.get(name, value) for name, value in kept.items()}}


def of(settings: dict[str, Any]) -> dict[str, Any]:
    """For the workers, from the content of ``settings.json``: ``run`` (its id), ``fingerprint``, ``length``, ``begun`` (the first one)."""
    length, begun = length_of(settings["yolo"]), settings[BEGUN]
    return {
        "run": settings[ID],
        "fingerprint": settings[DIGEST],
        "length": length[deciding(length)],
        "begun": begun[deciding(begun)],
        "begun_epochs": begun["epochs"],
    }


def of_another(state: dict[str, Any], identity: dict[str, Any]) -> str | None:
    """Why a checkpoint's content is not of a run; nothing when it is.

    Args:
        state: of a checkpoint.
        identity: of the run, see :func:`of`.
    """
    theirs = state.get("identity", {"run": NO_ID})
    if theirs["run"] != identity["run"]:
        return "is of another run"
    if theirs.get("fingerprint", identity["fingerprint"]) != identity["fingerprint"]:
        return "was made with other settings"
    return None


def is_finished(state: dict[str, Any], identity: dict[str, Any], epochs: int) -> bool:
    """Whether nothing is left to train after a checkpoint of the run; what ended a shorter run does not end a longer one.

    Args:
        state: of the checkpoint.
        identity: see :func:`of`.
        epochs: of the run, as far as is known.
    """
    length = state.get("identity", {}).get("length", identity["begun"])
    return bool(state["is_finished"]) and (
        not _is_more(identity["length"], length) or len(state["history"]) >= epochs
    )


def _digest(fingerprint: dict[str, Any]) -> str:
    """Of all but the length, which may grow."""
    kept = without(fingerprint, deciding(length_of(fingerprint["yolo"])))
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _is_more(one: Any, other: Any) -> bool:
    """Whether both are numbers and the first one is larger; what is no number is refused elsewhere."""
    numbers = [x for x in (one, other) if isinstance(x, int | float) and not isinstance(x, bool)]
    return len(numbers) == 2 and numbers[0] > numbers[1]
