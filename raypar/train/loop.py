"""The step loop: forward, loss, backward, optimizer, EMA. Ours, with Ultralytics' recipe.

Runs in: every training worker. It starts nothing and reads nothing, so a test can drive it with any batches. It follows
``BaseTrainer._do_train`` (Ultralytics 8.4.190) number for number, except that reduced precision ends before the loss: boxes
are decoded and compared in fp32, because bf16 has 8 bits and a box needs more.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.optim import MuSGD
from ultralytics.utils.torch_utils import EarlyStopping, ModelEMA

from raypar.dataset.batch import Batch
from raypar.judge import class_of_pixels
from raypar.train import parallel
from raypar.train.recipe import Lender, iterations


def _hush() -> None:
    """Lets torch say once, unheard, that an array is not writable: batches are views of Ray's shared memory.

    Filters are the whole process' and reset what other warnings were shown already: so not at each batch, and not in the thread that prepares them.
    """
    array = np.zeros(1, np.uint8)
    array.setflags(write=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.from_numpy(array)


_hush()


def to_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as the losses of Ultralytics' tasks want it: img uint8 (B, 3, S, S) RGB, cls (M, 1), bboxes (M, 4) xywhn, batch_idx (M,).

    obb: bboxes (M, 5) xywhr. pose: keypoints (M, K, 3). segment: masks (B, S/4, S/4), i + 1 where an image's i-th instance is seen, and
    sem_masks of the same shape, its class. classify: img and cls (B,) alone.
    """
    images, class_ids = torch.from_numpy(batch.images), torch.from_numpy(batch.class_ids)
    if len(batch.boxes_xywhn) != len(class_ids):
        return {"img": images, "cls": class_ids.long()}
    boxes = batch.boxes_xywhn if batch.boxes_xywhr is None else batch.boxes_xywhr
    image_index = torch.from_numpy(batch.image_index)
    tensors = {
        "img": images,
        "cls": class_ids.float().view(-1, 1),
        "bboxes": torch.from_numpy(boxes).clone(),
        "batch_idx": image_index.float(),
    }
    if batch.keypoints is not None:
        tensors["keypoints"] = torch.from_numpy(batch.keypoints).clone()
    if batch.masks is not None:
        masks = torch.from_numpy(batch.masks.astype(np.int32))
        tensors |= {"masks": masks, "sem_masks": class_of_pixels(masks, class_ids, image_index)}
    return tensors


class Loop:
    """One rank's model, optimizer, schedule and EMA.

    Args:
        lender: Ultralytics' parts.
        num_images: in the training split.
        steps_per_epoch: of the plan.
        world_size: ranks; above 1 a process group must be up.
        precision: dtype of forward and backward; master weights are fp32.
        spread: how the ranks share the model, ``ddp`` or ``fsdp``.
        sync_bn: whether batch norm takes the statistics of all ranks' images.
    """

    def __init__(self, lender: Lender, *, num_images: int, steps_per_epoch: int, world_size: int = 1,
                 precision: torch.dtype = torch.float32, spread: str = "ddp", sync_bn: bool = False):  # fmt: skip
        self.lender, self.args, self.device = lender, lender.args, lender.device
        self.steps_per_epoch, self.world_size, self.precision = steps_per_epoch, world_size, precision
        self.loss_scale = 1 if lender.manifest.task == "classify" else world_size
        self.channels_last = self.device.type == "cuda" or precision != torch.float32
        self.spread, self.is_sharded = spread, spread == "fsdp" and world_size > 1
        if self.channels_last and not self.is_sharded:  # FSDP2 shares out dense weights only
            lender.model.to(memory_format=torch.channels_last)
        lender.set_class_weights()
        self.ema = ModelEMA(lender.model)
        if sync_bn and world_size > 1:
            parallel.synchronise_batch_norm(lender.model, self.device)
        self.model: Any = lender.model
        if self.args.compile:
            self.model = parallel.compiled(
                lender.model,
                self.args.compile,
                is_multi_scale=bool(self.args.multi_scale),
                device=self.device,
            )
        if world_size > 1:
            self.model = (parallel.spread_fsdp if self.is_sharded else parallel.spread_ddp)(
                self.model, self.device
            )
        nominal, batch = self.args.nbs, self.args.batch
        self.nominal_accumulate = min(max(round(nominal / batch), 1), steps_per_epoch * self.args.epochs)
        self.accumulate = self.nominal_accumulate
        self.optimizer = lender.build_optimizer(
            model=lender.model, name=self.args.optimizer, lr=self.args.lr0, momentum=self.args.momentum,
            decay=self.args.weight_decay * batch * max(round(nominal / batch), 1) / nominal,
            iterations=iterations(self.args, num_images))  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        if self.is_sharded:
            assert not isinstance(self.optimizer, MuSGD), "raypar.train refuses it before workers start"
        else:
            self.optimizer = parallel.fused(self.optimizer, is_scaled=self.scaler.is_enabled())
        self.stopper = EarlyStopping(patience=self.args.patience)
        warmup_epochs = min(self.args.warmup_epochs, max(self.args.epochs - 1, 0))
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.last_optimizer_step = -1
        self.best_fitness: float | None = None
        self.lr_scale = 1.0  # less after the loss was not finite
        # Under fp16: batch norm's buffers, and a copy of what they held after the last step.
        self._statistics: tuple[list[Tensor], Tensor] | None = None
        # Under fp16: of the last update, before clipping (0-d, on the device). Not finite: that update was skipped.
        self.gradient_norm: Tensor | None = None
        self.inspect_gradients: Callable[[], None] | None = None  # called before an update

    def learning_rate_factor(self, epoch: int) -> float:
        """Share of the initial learning rate in an epoch: linear, or cosine with ``cos_lr``."""
        lrf, epochs = self.args.lrf, self.args.epochs
        if self.args.cos_lr:  # ultralytics.utils.torch_utils.one_cycle(1, lrf, epochs)
            return max((1 - math.cos(epoch * math.pi / epochs)) / 2, 0) * (lrf - 1) + 1
        return max(1 - epoch / epochs, 0) * (1.0 - lrf) + lrf

    def start_epoch(self) -> None:
        """Puts the model into training mode, with batch-norm statistics of frozen layers held."""
        self.model.train()
        for name, module in self.lender.model.named_modules():
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and any(
                x in name for x in self.lender.freeze_layer_names
            ):
                module.eval()

    def step(self, batch: dict[str, Tensor], global_step: int) -> dict[str, Tensor]:
        """One global step on this rank's share of it.

        Args:
            batch: see :func:`to_tensors`.
            global_step: counted from the start of the run.

        Returns:
            The loss' parts, detached, on the device, as means over this rank's images.
        """
        self._schedule(global_step)
        if self.scaler.is_enabled() and self._statistics is None:
            self._statistics = self._current_statistics()
        is_update = global_step - self.last_optimizer_step >= self.accumulate
        with nullcontext() if is_update or self.world_size == 1 or self.is_sharded else self.model.no_sync():
            if self.args.multi_scale:
                # Ultralytics draws the size from here: alike on every rank
                random.seed(f"{self.args.seed}:{global_step}")
            batch = self.lender.preprocess_batch(batch, self.precision)
            images = (
                batch["img"].contiguous(memory_format=torch.channels_last)
                if self.channels_last
                else batch["img"]
            )
            with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
                predictions = self.model(images)
            loss, parts = self.lender.model.loss(batch, _float(predictions))
            # The loss is a sum over this rank's images (of classify a mean). DDP takes the mean over ranks: undo that, as Ultralytics does.
            self.scaler.scale(loss.sum() * self.loss_scale).backward()
        if self.scaler.is_enabled():
            self._restore_statistics()
        if is_update:
            self._update(global_step)
        return {name: value.detach() for name, value in parts.items()}

    def end_epoch(self) -> None:
        """What Ultralytics does after an epoch's last step."""
        criterion: Any = getattr(self.lender.model, "criterion", None)
        if criterion is not None and hasattr(criterion, "update"):
            criterion.update()
        self.ema.update_attr(
            self.lender.model, include=["yaml", "nc", "args", "names", "stride", "class_weights"]
        )
        if self.world_size > 1:  # batch-norm statistics are rank 0's, as in Ultralytics
            for buffer in self.ema.ema.buffers():
                dist.broadcast(buffer, src=0)

    def is_average_finite(self) -> bool:
        """Whether the averaged weights and statistics are numbers; the same on every rank after :meth:`end_epoch`."""
        values = [value for value in self.ema.ema.state_dict().values() if value.is_floating_point()]
        return bool(torch.stack([value.isfinite().all() for value in values]).all())

    def learning_rates(self) -> dict[str, float]:
        return {f"lr/pg{i}": group["lr"] for i, group in enumerate(self.optimizer.param_groups)}

    def _schedule(self, global_step: int) -> None:
        epoch, warmup = global_step // self.steps_per_epoch, self.warmup_steps
        factor = self.learning_rate_factor(epoch) * self.lr_scale
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if not warmup or global_step > warmup:
            return
        self.accumulate = max(
            1, int(np.interp(global_step, [0, warmup], [1, self.nominal_accumulate]).round())
        )
        for group in self.optimizer.param_groups:  # bias lr falls from warmup_bias_lr, all others rise from 0
            start = self.args.warmup_bias_lr * self.lr_scale if group.get("param_group") == "bias" else 0.0
            group["lr"] = float(np.interp(global_step, [0, warmup], [start, group["initial_lr"] * factor]))
            if "momentum" in group:
                group["momentum"] = float(
                    np.interp(global_step, [0, warmup], [self.args.warmup_momentum, self.args.momentum])
                )

    def _current_statistics(self) -> tuple[list[Tensor], Tensor]:
        """Batch norm's buffers, and a copy of what they hold."""
        names = ("running_mean", "running_var")
        buffers = [b for name, b in self.lender.model.named_buffers() if name.rpartition(".")[2] in names]
        return buffers, torch.cat(buffers) if buffers else torch.empty(0)

    def _restore_statistics(self) -> None:
        """Under fp16: batch-norm statistics that overflowed in this step's forward pass become those of the step before.

        The update of such a step is skipped; statistics that are once infinite would never be finite again.
        """
        buffers, before = self._statistics or ([], torch.empty(0))
        if not buffers:
            return
        now = torch.cat(buffers)
        finite = now.where(now.isfinite(), before)
        # A kernel for all of them; torch 2.15 has no public function that copies lists of tensors.
        torch._foreach_copy_(buffers, torch.split(finite, [len(buffer) for buffer in buffers]))
        self._statistics = buffers, finite

    def _update(self, global_step: int) -> None:
        if self.inspect_gradients is not None:
            self.inspect_gradients()
        self.scaler.unscale_(self.optimizer)
        norm: Any = nn.utils.clip_grad_norm_(self.lender.model.parameters(), max_norm=10.0, foreach=True)
        if self.scaler.is_enabled():
            self.gradient_norm = getattr(norm, "full_tensor", lambda: norm)()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.is_sharded:
            parallel.update_ema(self.ema, self.lender.model)
        else:
            self.ema.update(self.lender.model)
        self.last_optimizer_step = global_step


def _float(value: Any) -> Any:
    """Every floating tensor in a nest of dicts, lists and tuples, as fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _float(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_float(v) for v in value)
    return value
