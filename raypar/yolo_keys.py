"""What becomes of each setting of Ultralytics' ``default.yaml`` (8.4.190) under ``train.yolo``: it is honoured, or refused with the reason.

Runs in: the driver and every training worker. Imports no Ray, no torch and no Ultralytics.
``docs/yolo_keys.md`` is written from this table, and a test holds it against the installed ``default.yaml``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from raypar.storage import Folder
from raypar.strict_yaml import Loader

TASKS = ("detect", "segment", "pose", "obb", "classify")
BOXES = ("detect", "segment", "pose", "obb")


@dataclass(frozen=True)
class Honoured:
    """A setting that changes what a training computes.

    Attributes:
        effect: what it decides.
        tasks: for which it does; for another one it is refused, unless its value is Ultralytics' default or switches it off.
        is_of_training_alone: whether the word means this setting wherever it is written: no other verb has one of that name.
    """

    effect: str
    tasks: tuple[str, ...] = TASKS
    is_of_training_alone: bool = True


@dataclass(frozen=True)
class Refused:
    """A setting that raypar does not take.

    Attributes:
        reason: why.
        instead: what to write; unset: there is nothing to write, the setting can only be left out.
    """

    reason: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; " + (f"write {self.instead} instead" if self.instead else "leave it out")


def _shared(effect: str, tasks: tuple[str, ...] = TASKS) -> Honoured:
    """A setting whose name other verbs use too, for something else."""
    return Honoured(effect, tasks, is_of_training_alone=False)


_PREDICTS = "it is a setting of prediction, and training predicts nothing"
_VIDEO = "it is a setting for videos, which raypar does not read"
_EXPORTS = "it is a setting of export"
_DEPTH = "it is a setting of the depth task, which raypar does not train"
_DISTILLS = "raypar does not distil models"
_DRAWS = "it is a setting of the pictures that Ultralytics' prediction draws"
_WRITES_JSON = "training writes no detections; raypar predict writes them as Parquet"

KEYS: dict[str, Honoured | Refused] = {
    "task": Refused("the task is that of the dataset", "prepare.task"),
    "mode": Refused("the mode is the verb of the command"),
    # Train settings
    "model": Refused("the model is raypar's own setting", "train.model"),
    "data": Refused("training reads the dataset that `raypar prepare` wrote", "prepare.source"),
    "epochs": Honoured("number of epochs, and the length of the learning rate's schedule"),
    "time": Honoured("hours to train: as many whole epochs as fit, in place of `epochs`"),
    "patience": Honoured("epochs without a better fitness after which training stops"),
    "batch": Refused("raypar shares a step's images out to its workers", "train.batch"),
    "imgsz": _shared("side of the square training images, px, and the longer side of validation images"),
    "save": Refused(
        "a run always keeps last.pt, best.pt and the checkpoints that it resumes from",
        "train.keep_checkpoints",
    ),
    "save_period": Refused("checkpoints are written by time", "train.checkpoint_every_s"),
    "cache": Refused("the cache is a node's, and Ray Data fills it", "train.cache"),
    "device": Refused("Ray places the workers", "train.use_gpu"),
    "workers": Refused("Ray Data reads ahead with the CPUs that are free"),
    "project": Refused("a run's folder is {storage}/{name}", "storage"),
    "name": Refused("a run's folder is {storage}/{name}", "name, at the top level,"),
    "exist_ok": Refused("a run's folder is {storage}/{name}", "train.overwrite"),
    "pretrained": Refused("the weights to start from are raypar's own setting", "train.init_from"),
    "cls_remap": Honoured(
        "whether pretrained class outputs are matched to the dataset's classes by name", BOXES
    ),
    "optimizer": Honoured("which optimizer"),
    "verbose": Refused("what is printed is the same for every run"),
    "seed": Refused("one seed rules all of a run's random choices", "seed, at the top level,"),
    "deterministic": Honoured("whether torch uses deterministic algorithms"),
    "single_cls": _shared("whether all classes are one, in training and validation"),
    "rect": Refused("training images are squares, so that mosaics and ranks share one shape"),
    "cos_lr": Honoured("whether the learning rate follows a cosine"),
    "close_mosaic": Honoured("last epochs without mosaic, mixup, cutmix and copy_paste", BOXES),
    "resume": Refused("a run goes on from its newest checkpoint when its command is given again"),
    "amp": Refused("the precision is raypar's own setting", "train.precision"),
    "fraction": _shared("share or count of the training images; [train, val]: of the validation images too"),
    "profile": Refused("raypar exports no ONNX or TensorRT model while it trains", "raypar export"),
    "freeze": Honoured("layers that are not trained"),
    "multi_scale": Honoured("range of the random sizes to which batches are scaled", BOXES),
    "compile": _shared("whether torch.compile compiles the forward pass"),
    "channels_last": _shared(
        "memory layout of weights and images; unset: channels last on GPUs and in reduced precision"
    ),
    # Segmentation
    "overlap_mask": Refused("the masks of an image are always merged into one, as by default"),
    "mask_ratio": Honoured("downsampling of the training masks", ("segment",)),
    # Classification
    "dropout": Honoured("dropout in the classification head", ("classify",)),
    # Val/Test settings
    "val": _shared("whether every epoch ends with a validation; the last one always does"),
    "split": Refused(
        "training validates on the val split", "evaluate.split, for an evaluation on another split,"
    ),
    "save_json": Refused(_WRITES_JSON),
    "conf": _shared("confidence below which validation drops boxes; unset: 0.001, for obb 0.01", BOXES),
    "iou": _shared("overlap above which the NMS of validation drops the weaker box", BOXES),
    "max_det": _shared("boxes that validation keeps of an image", BOXES),
    "quantize": Refused("raypar does no quantisation-aware training"),
    "dnn": Refused("validation runs the model in torch"),
    "plots": _shared("whether training draws batch_*.png and results.png"),
    "nms": _shared("false: validate by the NMS-free head, of models that have one", BOXES),
    # Predict settings
    "source": Refused("training reads the dataset that `raypar prepare` wrote", "prepare.source"),
    "vid_stride": Refused(_VIDEO),
    "stream_buffer": Refused(_VIDEO),
    "visualize": Refused(_PREDICTS),
    "augment": Refused(
        "it is test-time augmentation, which Ultralytics leaves out of a training's validation too"
    ),
    "agnostic_nms": _shared("whether the NMS of validation compares boxes of different classes", BOXES),
    "classes": _shared("class ids to train and validate on; the labels of other classes are left out", BOXES),
    "retina_masks": Refused(_PREDICTS),
    "embed": Refused(_PREDICTS),
    # Visualize settings
    "show": Refused(_DRAWS),
    "save_frames": Refused(_VIDEO),
    "save_txt": Refused(_WRITES_JSON),
    "save_conf": Refused(_WRITES_JSON),
    "save_crop": Refused(_PREDICTS),
    "show_labels": Refused(_DRAWS),
    "show_conf": Refused(_DRAWS),
    "show_boxes": Refused(_DRAWS),
    "line_width": Refused(_DRAWS),
    # Export settings
    "format": Refused(_EXPORTS, "export.format"),
    "optimize": Refused(f"{_EXPORTS} to a format that raypar does not export to"),
    "dynamic": Refused(_EXPORTS, "export.dynamic"),
    "simplify": Refused(f"{_EXPORTS}, where raypar keeps Ultralytics' default"),
    "opset": Refused(f"{_EXPORTS}, where raypar keeps Ultralytics' default"),
    "workspace": Refused(f"{_EXPORTS}, where raypar keeps Ultralytics' default"),
    # Hyperparameters
    "lr0": Honoured("initial learning rate; optimizer=auto chooses its own"),
    "lrf": Honoured("final learning rate, as a share of the initial one"),
    "momentum": Honoured("momentum, or Adam's first beta; optimizer=auto chooses its own"),
    "weight_decay": Honoured("weight decay"),
    "warmup_epochs": Honoured("epochs in which the learning rates rise to their initial values"),
    "warmup_momentum": Honoured("momentum at the start of the warm-up, of optimizers that have one"),
    "warmup_bias_lr": Honoured(
        "learning rate of biases at the start of the warm-up; optimizer=auto starts at 0"
    ),
    "distill_model": Refused(_DISTILLS),
    "dis": Refused(_DISTILLS),
    "box": Honoured("weight of the box loss", BOXES),
    "cls": Honoured("weight of the classification loss", BOXES),
    "cls_pw": Honoured(
        "power of the inverse class frequency by which the classification loss is weighted", BOXES
    ),
    "dfl": Honoured("weight of the distance loss", BOXES),
    "pose": Honoured("weight of the keypoint loss", ("pose",)),
    "kobj": Honoured("weight of the keypoints' visibility loss", ("pose",)),
    "rle": Honoured(
        "weight of the likelihood loss of keypoints, of models that have one (yolo26-pose)", ("pose",)
    ),
    "angle": Honoured("weight of the angle loss", ("obb",)),
    "dlog": Refused(_DEPTH),
    "dgrad": Refused(_DEPTH),
    "dlam": Refused(_DEPTH),
    "nbs": Honoured("images an optimizer step: gradients of nbs / batch steps are accumulated"),
    "hsv_h": Honoured("change of hue"),
    "hsv_s": Honoured("change of saturation"),
    "hsv_v": Honoured("change of brightness"),
    "degrees": Honoured("rotation", BOXES),
    "translate": Honoured("translation", BOXES),
    "scale": Honoured("scaling; classify: 1 - scale of the area is the smallest crop"),
    "shear": Honoured("shear", BOXES),
    "perspective": Honoured("perspective", BOXES),
    "flipud": Honoured("probability of an upside-down flip"),
    "fliplr": Honoured("probability of a left-right flip"),
    "bgr": Honoured("probability of swapping red and blue", BOXES),
    "mosaic": Honoured("probability of a mosaic", BOXES),
    "mixup": Honoured("probability of MixUp", BOXES),
    "cutmix": Honoured("probability of CutMix", BOXES),
    "copy_paste": Honoured(
        "share of the eligible objects that are pasted once more; detect: if the dataset has polygons",
        ("detect", "segment", "obb"),
    ),
    "copy_paste_mode": Honoured(
        "where pasted objects come from: `flip`, the mirrored image, alone; `mixup` is refused",
        ("detect", "segment", "obb"),
    ),
    "auto_augment": Honoured("policy of the automatic augmentation", ("classify",)),
    "erasing": Honoured("probability of erasing a random rectangle", ("classify",)),
    # The rest
    "cfg": _shared("a YAML file of these settings (a path or a URI); settings next to it win"),
    "tracker": Refused("raypar does not track"),
    # Accepted by Ultralytics though they are not in default.yaml
    "save_dir": Refused("a run's folder is {storage}/{name}", "storage"),
    "augmentations": Refused("transforms are raypar's own setting", "train.albumentations"),
}
HONOURED = {key: found for key, found in KEYS.items() if isinstance(found, Honoured)}
REFUSED = {key: found for key, found in KEYS.items() if isinstance(found, Refused)}


@cache
def yolo_settings() -> dict[str, Any]:
    """Names and defaults of Ultralytics' settings, read without importing Ultralytics (seconds)."""
    from importlib.util import find_spec

    spec = find_spec("ultralytics")
    assert spec is not None
    assert spec.submodule_search_locations
    defaults: dict[str, Any] = yaml.safe_load(
        Path(spec.submodule_search_locations[0], "cfg", "default.yaml").read_text()
    )
    return defaults


def nearest(name: str) -> str:
    """A hint at the honoured setting that a misspelt one was probably meant to be."""
    return "".join(f"; did you mean '{near}'?" for near in difflib.get_close_matches(name, HONOURED, n=1))


def refuse(keys: Iterable[str]) -> None:
    """Refuses settings that raypar does not take, whatever their value.

    Raises:
        ValueError: there is one.
    """
    if found := [f"'{key}' is refused: {REFUSED[key]}" for key in keys if key in REFUSED]:
        raise ValueError("; ".join(found))


def refuse_for_task(yolo: Mapping[str, Any], task: str) -> None:
    """Refuses settings that change nothing for a task.

    Raises:
        ValueError: there is one, and its value is neither Ultralytics' default nor switches it off.
    """
    for key, value in yolo.items():
        found = HONOURED.get(key)
        says_something = bool(value) and value != yolo_settings().get(key)
        if found is not None and task not in found.tasks and says_something:
            raise ValueError(
                f"train.yolo.{key}={value!r} has no effect for task '{task}' (it has for {', '.join(found.tasks)}): leave it out"
            )


def chosen_classes(value: Any) -> tuple[int, ...] | None:
    """The class ids in the setting ``classes``, ascending; None: all.

    Raises:
        ValueError: it holds something else.
    """
    if value is None:
        return None
    ids = value if isinstance(value, list | tuple) else [value]
    if not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"train.yolo.classes={value!r}: write class ids, e.g. 0 or [0, 2]")
    return tuple(sorted(set(ids)))


def with_cfg(yolo: dict[str, Any]) -> dict[str, Any]:
    """The same settings without ``cfg``, and with what that file says where they say nothing.

    Defaults of Ultralytics are skipped, so that a copy of its whole ``default.yaml`` may be given, but for ``imgsz``: a task may have
    another default.

    Raises:
        ValueError: the file cannot be read, or has a setting that is unknown or refused.
    """
    if yolo.get("cfg") is None:
        return {key: value for key, value in yolo.items() if key != "cfg"}
    path = yolo["cfg"]
    defaults = yolo_settings()
    found = {
        key: value for key, value in _read(path).items() if key == "imgsz" or value != defaults.get(key, ...)
    }
    for key in found:
        if key not in KEYS:
            raise ValueError(f"cfg {path}: '{key}' is no setting of Ultralytics{nearest(str(key))}")
    if "cfg" in found:
        raise ValueError(
            f"cfg {path}: it names another file, {found['cfg']}: write the settings of both into one"
        )
    try:
        refuse(found)
    except ValueError as error:
        raise ValueError(f"cfg {path}: {error}") from None
    return found | {key: value for key, value in yolo.items() if key != "cfg"}


def _read(path: Any) -> dict[str, Any]:
    """A file of settings.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    if not isinstance(path, str):
        raise ValueError(f"cfg should be the path of a YAML file of settings, not {path!r}")
    try:
        if "://" in path:
            folder, name = Folder.holding(path)
            text = folder.read(name).decode()
        else:
            text = Path(path).read_text(encoding="utf-8")
        found = yaml.load(text, Loader)
    except OSError as error:
        raise ValueError(f"cfg {path}: cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cfg {path}: no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"cfg {path}: it holds {type(found).__name__}, not settings (lr0: 0.01 ...)")
    return found
