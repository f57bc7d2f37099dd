"""What a training starts from: the content of a model's yaml, or weights. Runs in: the driver."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from raypar.storage import Folder
from raypar.weights import read_model

INITIAL = "init.pt"  # weights that training starts from, in the run's folder
# Heads of models that train in another way than those of their task: with text, or with a loss of their own.
OTHER_TRAINERS = {
    "WorldDetect": "YOLO-World",
    "YOLOE": "YOLOE",
    "RTDETR": "RT-DETR",
}  # by how their names begin
SUFFIXES = {"segment": "-seg", "pose": "-pose", "obb": "-obb", "classify": "-cls"}


def find(name: str, wanted: str, key: str = "train.model", *, trusted: bool = False) -> str | dict[str, Any]:
    """A model yaml's content, or the local path of weights, which are downloaded if they are Ultralytics'; for the task ``wanted``.

    Args:
        name: of a yaml or ``.pt``, of Ultralytics or with its path or URI.
        wanted: task of the dataset.
        key: the setting that names it.
        trusted: whether code that weights hold may run.

    Raises:
        ValueError: it cannot be found or read, or is for another task.
    """
    found: str | dict[str, Any]
    if name.endswith((".yaml", ".yml")):
        found, task = _read_yaml(name, key)
    elif name.endswith(".pt"):
        found, task = _read_weights(name, key, trusted=trusted)
    else:
        base = name.rstrip("/").rsplit("/", 1)[-1]
        raise ValueError(
            f"{key}: {name} is neither a .yaml nor a .pt: write {base}.yaml to begin from scratch, {base}.pt for weights"
        )
    if key == "train.init_from" and isinstance(found, dict):
        raise ValueError(f"{key}: {name} is a model's YAML, which holds no weights: write a .pt")
    if task != wanted:
        raise ValueError(_other_task(name, task, wanted, key))
    return found


def is_end2end(model: str | dict[str, Any], *, trusted: bool) -> bool:
    """Whether a model, as :func:`find` returns it, has an NMS-free head too."""
    if isinstance(model, dict):
        return bool(model.get("end2end")) or _head(model) == "v10Detect"
    head: Any = read_model(model, trusted=trusted).model[-1]
    return getattr(head, "one2one_cv2", None) is not None


def stage(model: str | dict[str, Any], out: Folder, *, is_begun: bool) -> str | dict[str, Any]:
    """Puts weights into storage once, where every node can read them; returns their name there, or a yaml's content as it is."""
    if isinstance(model, dict):
        return model
    if not (is_begun and out.exists(INITIAL)):  # a run that goes on does so with what it was begun with
        out.upload(model, INITIAL)
    return INITIAL


def _other_task(name: str, task: str, wanted: str, key: str) -> str:
    """What to change where the model is for another task than the dataset: the one or the other."""
    base = name.rpartition("/")[2]
    suffix = SUFFIXES.get(task, "")
    fitting = base.replace(suffix, SUFFIXES.get(wanted, ""), 1) if suffix and suffix in base else ""
    if not suffix and base.startswith("yolo"):
        stem, dot, ending = base.partition(".")
        fitting = f"{stem}{SUFFIXES.get(wanted, '')}{dot}{ending}"
    model = fitting or f"yolov8n{SUFFIXES.get(wanted, '')}.yaml"
    if "classify" in (task, wanted):
        dataset = f"prepare a dataset for '{task}' from another source"
    else:
        dataset = f"prepare it again for '{task}', if its labels allow that: prepare.task={task} prepare.overwrite=true"
    return f"{key}: {name} is a model for '{task}', the dataset is for '{wanted}': take another model, e.g. {key}={model}, or {dataset}"


def content_sha256(name: str) -> str | None:
    """Of a model yaml's content, wherever it lies; nothing for weights, which a run keeps a copy of.

    Raises:
        ValueError: it cannot be read.
    """
    if not name.endswith((".yaml", ".yml")):
        return None
    content = {key: value for key, value in _read_yaml(name, "train.model")[0].items() if key != "yaml_file"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _read_yaml(name: str, key: str) -> tuple[dict[str, Any], str]:
    from ultralytics.nn.tasks import guess_model_task, yaml_model_load

    try:
        content: dict[str, Any] = yaml_model_load(name)
        head, task = _head(content), guess_model_task(content)
    except Exception as error:  # whatever Ultralytics or YAML makes of it
        raise _unreadable(name, key, error) from error
    _refuse_other_trainers(name, key, head)
    return content, task


def _read_weights(name: str, key: str, *, trusted: bool) -> tuple[str, str]:
    is_remote = "://" in name
    path = Path(name) if is_remote or Path(name).exists() else _downloaded(name, key)
    try:
        local = str((_fetched(name) if is_remote else path).absolute())
        model: Any = read_model(local, trusted=trusted)
    except Exception as error:  # whatever unpickling foreign bytes raises
        raise _unreadable(name, key, error) from error
    if key == "train.model":  # of train.init_from only the weights are taken, where they fit
        _refuse_other_trainers(name, key, type(model.model[-1]).__name__)
    return local, model.task


def _head(content: dict[str, Any]) -> str:
    """The name of a model yaml's last module."""
    return str(content["head"][-1][2])


def _refuse_other_trainers(name: str, key: str, head: str) -> None:
    """Refuses models that raypar cannot train.

    Raises:
        ValueError: the model is one.
    """
    for start, family in OTHER_TRAINERS.items():
        if head.startswith(start):
            raise ValueError(
                f"{key}: {name} is a model of the {family} family, which raypar cannot train: write e.g. yolov8n.yaml or yolo26n.yaml"
            )


def _fetched(uri: str) -> Path:
    """A local copy of weights in a store; it appears whole, for trials of a study fetch it at the same time."""
    folder, base = Folder.holding(uri)
    path = (
        Path(tempfile.gettempdir())
        / f"raypar-{os.getuid()}-{hashlib.sha256(uri.encode()).hexdigest()[:12]}.pt"
    )
    part = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        folder.download(base, part)
        return part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def _downloaded(name: str, key: str) -> Path:
    """Weights that Ultralytics offers, into the folder that ``name`` says.

    Raises:
        ValueError: it offers none of that name, or they cannot be had now.
    """
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    base = Path(name).name
    if base not in GITHUB_ASSETS_NAMES:
        raise ValueError(f"{key}: there is no file {name}, and Ultralytics offers no weights of that name")
    try:
        path = Path(attempt_download_asset(name))
        if path.exists():
            return path
        reason = ""
    except Exception as error:  # of the network, mostly
        reason = f" ({' '.join(str(error).split())[:200]})"
    raise ValueError(f"{key}: there is no file {name}, and Ultralytics' weights of that name cannot be downloaded now{reason}: "
                     f"put the file there, or write {base.removesuffix('.pt')}.yaml to begin from scratch")  # fmt: skip


def _unreadable(name: str, key: str, error: Exception) -> ValueError:
    return ValueError(f"{key}: {name} cannot be read: {' '.join(str(error).split())[:300]}")
