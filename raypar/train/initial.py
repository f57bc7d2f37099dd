"""What a training starts from: the content of a model's yaml, or weights. Runs in: the driver."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

from raypar.storage import Folder
from raypar.weights import read_model

INITIAL = "init.pt"  # weights that training starts from, in the run's folder
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
    if task != wanted:
        raise ValueError(
            f"{key}: {name} is a model for '{task}', the dataset is for '{wanted}': write e.g. yolov8n{SUFFIXES.get(wanted, '')}.yaml"
        )
    return found


def stage(model: str | dict[str, Any], out: Folder, *, is_begun: bool) -> str | dict[str, Any]:
    """Puts weights into storage once, where every node can read them; returns their name there, or a yaml's content as it is."""
    if isinstance(model, dict):
        return model
    if not (is_begun and out.exists(INITIAL)):  # a run that goes on does so with what it was begun with
        out.upload(model, INITIAL)
    return INITIAL


def _read_yaml(name: str, key: str) -> tuple[dict[str, Any], str]:
    from ultralytics.nn.tasks import guess_model_task, yaml_model_load

    try:
        content: dict[str, Any] = yaml_model_load(name)
        return content, guess_model_task(content)
    except Exception as error:  # whatever Ultralytics or YAML makes of it
        raise _unreadable(name, key, error) from error


def _read_weights(name: str, key: str, *, trusted: bool) -> tuple[str, str]:
    is_remote = "://" in name
    path = Path(name) if is_remote or Path(name).exists() else _downloaded(name, key)
    try:
        local = str((_fetched(name) if is_remote else path).absolute())
        return local, read_model(local, trusted=trusted).task
    except Exception as error:  # whatever unpickling foreign bytes raises
        raise _unreadable(name, key, error) from error


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
