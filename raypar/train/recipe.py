"""What comes from Ultralytics: model, loss, optimizer, settings, and the ``.pt`` format.

Runs in: every training worker; :func:`settings` on the driver too. Ultralytics' trainer object is built but its loop is never
started: it only lends its methods (see ``docs/decisions/0001-own-loop.md``).
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from ultralytics import __version__ as ultralytics_version
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.data.utils import get_split_fraction
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer
from ultralytics.optim import MuSGD
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import init_seeds

from raypar.dataset.manifest import Manifest
from raypar.dataset.rows import boxes_per_class
from raypar.dataset.stream import StreamSpec
from raypar.storage import Folder, patiently
from raypar.weights import read_model
from raypar.yolo_keys import chosen_classes, nearest, refuse_for_task

STRIDE = 32  # px, of the coarsest level of a model; more with a level more


def settings(yolo: dict[str, Any], **owned: Any) -> SimpleNamespace:
    """Ultralytics' whole settings: its defaults, the user's ``train.yolo``, and what raypar decides.

    Raises:
        ValueError: an unknown setting (with the nearest name), a value of the wrong type, or one that raypar cannot honour.
    """
    for key in yolo:
        if key not in DEFAULT_CFG_DICT:
            raise ValueError(f"train.yolo.{key}: Ultralytics has no such setting{nearest(key)}")
    assert "cfg" not in yolo, "raypar.config merges it, and refuses what raypar does not take"
    if "task" in owned:
        refuse_for_task(yolo, owned["task"])
    if owned.get("task") == "classify":
        yolo = {"imgsz": 224, **yolo}  # its trainer's default
    try:
        args = get_cfg(overrides={**yolo, **owned})
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"train.yolo: {' '.join(str(error).split())}") from error
    _check_values(args)
    args.classes = chosen_classes(args.classes)
    args.imgsz = math.ceil(args.imgsz / STRIDE) * STRIDE  # as Ultralytics' check_imgsz
    return args


def _check_values(args: SimpleNamespace) -> None:
    """Refuses values that Ultralytics takes and a training of raypar cannot.

    Raises:
        ValueError: there is one.
    """
    if isinstance(args.fraction, list) and args.fraction[2:] not in ([], [1.0]):
        raise ValueError(
            f"train.yolo.fraction={args.fraction}: training reads no test images: write [train, val] alone"
        )
    if args.nms:
        raise ValueError(
            "train.yolo.nms=True embeds NMS in an exported model: leave it out; false validates by the NMS-free head"
        )
    if args.time is not None and args.time <= 0:
        raise ValueError(f"train.yolo.time={args.time}: hours, more than 0")
    if args.epochs < 1:
        raise ValueError(f"train.yolo.epochs={args.epochs}: at least 1 is needed")
    if not isinstance(args.imgsz, int) or args.imgsz < 1:
        raise ValueError(
            f"train.yolo.imgsz={args.imgsz}: one whole number of px, for training images are squares"
        )


def iterations(args: SimpleNamespace, num_images: int, epochs: int | None = None) -> int:
    """Optimizer steps of a run, as Ultralytics' ``_setup_train`` counts them (8.4.190); ``optimizer=auto`` depends on them.

    Args:
        args: of :func:`settings`.
        num_images: trained on in an epoch.
        epochs: that the run was begun with, when they are fewer: an optimizer's state is of no use to another one.
    """
    return int(math.ceil(num_images / max(args.batch, args.nbs)) * (epochs or args.epochs))


def optimizer_of(args: SimpleNamespace, num_images: int) -> type[torch.optim.Optimizer]:
    """Which optimizer a run with these settings gets: Ultralytics is asked to build it for a model of one layer.

    Args:
        args: of :func:`settings`.
        num_images: trained on in an epoch.

    Raises:
        ValueError: Ultralytics has none of that name.
    """
    trainer = SimpleNamespace(args=copy(args), data={})
    model = torch.nn.Module()
    model.model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1))
    level = LOGGER.level
    LOGGER.setLevel("WARNING")
    try:
        return type(
            BaseTrainer.build_optimizer(
                trainer, model, name=args.optimizer, iterations=iterations(args, num_images)
            )
        )
    except NotImplementedError as error:
        raise ValueError(
            f"train.yolo.optimizer: {' '.join(str(error).split()).split(' Request ')[0]}"
        ) from error
    finally:
        LOGGER.setLevel(level)


def refuse_for_fsdp(args: SimpleNamespace, num_images: int) -> None:
    """MuSGD makes matrices orthogonal, and a rank of FSDP has only some of their rows.

    Raises:
        ValueError: the run's optimizer cannot work on shares.
    """
    if not issubclass(optimizer_of(args, num_images), MuSGD):
        return
    steps, is_auto = iterations(args, num_images), str(args.optimizer).lower() == "auto"
    chosen = (
        f"train.yolo.optimizer=auto takes MuSGD for {steps:,} steps"
        if is_auto
        else "train.yolo.optimizer=MuSGD"
    )
    raise ValueError(f"train.parallel=fsdp: {chosen}, and that needs whole matrices: "
                     "write train.yolo.optimizer=SGD train.yolo.lr0=0.01, or train.yolo.optimizer=AdamW train.yolo.lr0=0.001")  # fmt: skip


class Lender:
    """Ultralytics' trainer for the dataset's task, for its methods only: ``train()`` is never called.

    Args:
        yolo: the user's settings.
        model: a model yaml's name or content, or a local ``.pt``.
        manifest: of the dataset.
        batch: images a step over all workers.
        seed: of the run; every rank builds the same weights from it.
        device: where the model goes.
        weights: a model whose weights a yaml's model takes over where they fit.
        class_counts: labels of each class that is trained on; unset: those of the whole training split.
    """

    args: Any  # the rest of what Ultralytics' trainers have
    data: dict[str, Any]
    model: Any
    build_optimizer: Any
    set_class_weights: Any

    def __new__(cls, *_: Any, manifest: Manifest, **__: Any) -> Lender:
        return super().__new__(LENDERS[manifest.task] if cls is Lender else cls)

    def __init__(
        self,
        yolo: dict[str, Any],
        *,
        model: str | dict[str, Any],
        manifest: Manifest,
        batch: int,
        seed: int,
        device: torch.device,
        weights: torch.nn.Module | None = None,
        class_counts: Sequence[int] | None = None,
    ):
        self.manifest, self.class_counts = manifest, class_counts
        name = model if isinstance(model, str) else model.get("yaml_file", "yolov8n.yaml")
        # always the same: Ultralytics leaves an args.yaml there
        save_dir = Path(tempfile.gettempdir(), f"raypar-{os.getuid()}")
        args = settings(
            yolo,
            model=name,
            data="raypar",
            batch=batch,
            seed=seed,
            device="cpu",
            save_dir=save_dir,
            mode="train",
            task=manifest.task,
        )
        super().__init__(overrides=vars(args))  # type: ignore[call-arg]  # of Ultralytics' trainer
        self.device = device
        init_seeds(seed, deterministic=self.args.deterministic)
        if isinstance(model, dict):
            self.model = self.get_model(cfg=model, weights=weights, verbose=False)  # type: ignore[attr-defined]
        else:
            self.setup_model()  # type: ignore[attr-defined]
        self.model.to(device)
        self.set_model_attributes()  # type: ignore[attr-defined]
        self.stride = max(int(self.model.stride.max()), STRIDE)
        if self.args.imgsz % self.stride:
            raise ValueError(f"train.yolo.imgsz={self.args.imgsz}: {name} needs a multiple of {self.stride}")
        self._freeze()

    def preprocess_batch(
        self, batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> dict[str, torch.Tensor]:
        """To the device; uint8 images become numbers of ``dtype`` in [0, 1].

        The values are those of Ultralytics' ``preprocess_batch`` under autocast, without its float32 images: less than half of the memory traffic.
        """
        if self.args.multi_scale and self.manifest.task != "classify":  # it resizes them, in float32
            return cast("dict[str, torch.Tensor]", super().preprocess_batch(dict(batch)))  # type: ignore[misc]  # of Ultralytics' trainer
        moved = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        moved["img"] = moved["img"].to(dtype).div_(255)
        return moved

    def run_callbacks(self, event: str) -> None:
        """None of Ultralytics' callbacks run: its loggers would start once a worker."""

    def get_dataset(self) -> dict[str, Any]:
        names = dict(enumerate(["item"] if self.args.single_cls else self.manifest.class_names))
        pose = {"kpt_shape": list(self.manifest.keypoint_shape)} if self.manifest.keypoint_shape else {}
        return {"train": "", "val": "", "names": names, "nc": len(names), "channels": 3, **pose}

    def get_class_counts(self) -> Any:
        counted = (
            self.manifest.split("train").boxes_per_class if self.class_counts is None else self.class_counts
        )
        counts = np.asarray(counted, np.float32)
        if self.args.classes is not None:
            counts[~np.isin(np.arange(len(counts)), self.args.classes)] = 0
        return counts.sum(keepdims=True) if self.args.single_cls else counts

    def _freeze(self) -> None:
        """Marks the frozen layers as Ultralytics' ``_setup_train`` does (8.4.190)."""
        freeze = self.args.freeze
        layers = freeze if isinstance(freeze, list) else range(freeze) if isinstance(freeze, int) else []
        self.freeze_layer_names = [f"model.{x}." for x in layers] + [".dfl"]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = parameter.dtype.is_floating_point and not any(
                x in name for x in self.freeze_layer_names
            )
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(f"train.yolo.freeze={freeze} leaves nothing to train")


class DetectLender(Lender, DetectionTrainer):  # type: ignore[misc]  # Ultralytics is untyped
    pass


class SegmentLender(Lender, SegmentationTrainer):  # type: ignore[misc]
    pass


class PoseLender(Lender, PoseTrainer):  # type: ignore[misc]
    pass


class ObbLender(Lender, OBBTrainer):  # type: ignore[misc]
    pass


class ClassifyLender(Lender, ClassificationTrainer):  # type: ignore[misc]
    pass


LENDERS: dict[str, type[Lender]] = {
    "detect": DetectLender, "segment": SegmentLender, "pose": PoseLender, "obb": ObbLender, "classify": ClassifyLender,
}  # fmt: skip


def weights_file(
    ema: torch.nn.Module, args: SimpleNamespace, *, epoch: int, metrics: dict[str, float]
) -> bytes:
    """``best.pt`` / ``last.pt`` as Ultralytics' own trainer leaves them: fp16 EMA weights that ``ultralytics.YOLO`` loads and runs.

    The format is that of ``BaseTrainer.save_model`` followed by ``strip_optimizer`` (8.4.190).
    """
    model: Any = deepcopy(ema).half().to(memory_format=torch.contiguous_format)
    model.criterion = None
    for parameter in model.parameters():
        parameter.requires_grad = False
    for value in model.state_dict().values():
        if value.is_floating_point():
            torch.nan_to_num_(value)
    train_args = {k: v for k, v in vars(args).items() if k not in {"save_dir", "device"}}
    model.args = {k: train_args[k] for k in train_args if k in DEFAULT_CFG_DICT}
    buffer = io.BytesIO()
    torch.save(
        {"epoch": -1, "best_fitness": None, "model": model, "ema": None, "updates": None, "optimizer": None, "scaler": None,
         "train_args": train_args, "train_metrics": metrics, "trained_epochs": epoch + 1, "date": datetime.now(UTC).isoformat(),
         "version": ultralytics_version, "license": "AGPL-3.0 (https://ultralytics.com/license)", "docs": "https://docs.ultralytics.com"},
        buffer,
    )  # fmt: skip
    return buffer.getvalue()


def validated_part(manifest: Manifest, args: SimpleNamespace) -> Manifest:
    """The dataset, its val split cut to the images that ``fraction`` leaves of it."""
    val = manifest.split("val").first(get_split_fraction(args.fraction, "val"))
    return manifest.model_copy(update={"splits": {**manifest.splits, "val": val}})


def counted_classes(spec: StreamSpec, manifest: Manifest, args: SimpleNamespace) -> list[int] | None:
    """Labels of each class in the images that are trained on, where ``cls_pw`` needs them and the manifest does not have them."""
    if not args.cls_pw or spec.plan.num_images == manifest.split("train").num_images:
        return None
    num_classes = len(manifest.class_names)
    return boxes_per_class(spec.dataset, spec.groups, spec.plan.row_groups, num_classes).tolist()


@contextmanager
def initial_weights(name: str | None, out: Folder, *, trusted: bool) -> Iterator[torch.nn.Module | None]:
    """The model whose weights a yaml's model takes over, which the driver put into storage; None: none."""
    if name is None:
        yield None
        return
    with staged(name, out) as path:
        assert isinstance(path, str), "weights, and no yaml's content"
        yield read_model(path, trusted=trusted)


@contextmanager
def staged(model: str | dict[str, Any], out: Folder) -> Iterator[str | dict[str, Any]]:
    """Weights that the driver put into storage, on this node for as long as they are read; a yaml's content is used as it is."""
    if isinstance(model, dict):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="raypar-") as folder:
        yield str(
            patiently(
                lambda: out.download(model, f"{folder}/{model}"), f"read {out.shown(model)}", out.patience_s
            )
        )
