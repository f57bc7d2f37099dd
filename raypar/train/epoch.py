"""Sums of one epoch: losses, where the time went, and how often each image was seen. A part of every checkpoint.

Runs in: every training worker.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypar.dataset.batch import Batch
from raypar.train.agree import Agreement

SAY_EVERY_S = 60.0
# Where a rank's time goes, all of it. "other": starting, telling Ray Train and the loggers, waiting for the other ranks at the epoch's end.
STAGES = ("wait", "step", "validate", "checkpoint", "other")


class Epoch:
    """One rank's sums since it began or resumed an epoch, on top of what a checkpoint kept of it.

    Args:
        num_images: in the training split.
        kept: of the same epoch, as :meth:`reduced` gave it.
        skips_overflow: whether a step whose loss is not finite counts for nothing, since its update is skipped (fp16).
        began: when the first stage began (``time.monotonic()``), so that no time is lost between two epochs; unset: now.
    """

    def __init__(
        self,
        num_images: int,
        kept: dict[str, Any] | None = None,
        *,
        skips_overflow: bool = False,
        began: float | None = None,
    ):
        self.spoke = time.monotonic()
        self.mark = self.spoke if began is None else began
        self.stage_s = dict.fromkeys(STAGES, 0.0)
        self.num_steps = self.num_replaced = 0
        self.skips_overflow = skips_overflow
        self.num_finite: Tensor | None = None  # steps, on the device
        self.num_skipped: Tensor | None = None  # updates, on the device
        self.losses: dict[str, Tensor] = {}  # on the device, so that no step waits for one
        # a small split may be shown more than 255 times in a step of a large batch
        self.times_seen: NDArray[np.int32] = np.zeros(num_images, np.int32)
        self.kept = kept or {}

    def following(self) -> Epoch:
        """The epoch after this one; its time begins with this one's last lap."""
        return Epoch(len(self.times_seen), skips_overflow=self.skips_overflow, began=self.mark)

    def lap(self, stage: str) -> None:
        """Counts the time since the last lap to a stage, one of :data:`STAGES`."""
        now = time.monotonic()
        self.stage_s[stage] += now - self.mark
        self.mark = now

    def seconds_by_stage(self) -> dict[str, float]:
        """``wait_s``, ``step_s`` ... of the whole epoch up to the last lap, and their sum as ``epoch_s``."""
        seconds = {
            f"{stage}_s": own + self.kept.get(f"{stage}_s", 0.0) for stage, own in self.stage_s.items()
        }
        return {"epoch_s": sum(seconds.values()), **seconds}

    @property
    def seconds(self) -> float:
        """From the epoch's first step on, without validation."""
        seconds = self.seconds_by_stage()
        return seconds["wait_s"] + seconds["step_s"] + seconds["checkpoint_s"] + time.monotonic() - self.mark

    def stepped(self, parts: dict[str, Tensor], batch: Batch, gradient_norm: Tensor | None = None) -> None:
        """Takes in a step.

        Args:
            parts: of its loss (0-d, on the device).
            batch: what it trained on.
            gradient_norm: under fp16, of the update that it made; not finite: the update was skipped.
        """
        self.num_steps += 1
        self.num_replaced += batch.num_replaced
        np.add.at(self.times_seen, batch.rows, 1)
        if self.skips_overflow:
            is_finite = torch.stack([value.float() for value in parts.values()]).sum().isfinite()
            parts = {name: value.where(is_finite, torch.zeros_like(value)) for name, value in parts.items()}
            self.num_finite = is_finite.long() + (0 if self.num_finite is None else self.num_finite)
        if gradient_norm is not None:
            is_skipped = ~gradient_norm.isfinite()
            self.num_skipped = is_skipped.long() + (0 if self.num_skipped is None else self.num_skipped)
        for name, value in parts.items():
            self.losses[name] = self.losses[name] + value if name in self.losses else value.clone()

    def is_time_to_speak(self) -> bool:
        if time.monotonic() - self.spoke < SAY_EVERY_S:
            return False
        self.spoke = time.monotonic()
        return True

    def reduced(self, agreement: Agreement) -> dict[str, Any]:
        """The whole epoch so far, over all ranks, whatever their number was. Waits for them.

        Returns:
            ``losses`` (sums over steps of means over ranks), ``num_steps``, ``num_finite`` (steps that the losses are of, mean over ranks),
            ``num_skipped`` (updates), ``num_replaced``, ``times_seen`` int32 (images,), and this rank's seconds by stage.
        """
        kept = self.kept
        names = sorted({*self.losses, *kept.get("losses", {})})
        mine = [float(self.losses[name]) if name in self.losses else 0.0 for name in names]
        num_finite = self.num_steps if self.num_finite is None else int(self.num_finite)
        *sums, num_finite, num_replaced = agreement.sum(
            torch.tensor([*mine, num_finite, self.num_replaced], dtype=torch.float64)
        ).tolist()
        seen = agreement.sum(torch.from_numpy(self.times_seen.copy())).numpy()
        num_skipped = 0 if self.num_skipped is None else int(self.num_skipped)
        return {
            "losses": {
                n: s / agreement.world_size + kept.get("losses", {}).get(n, 0.0)
                for n, s in zip(names, sums, strict=True)
            },
            "num_steps": self.num_steps + kept.get("num_steps", 0),
            "num_finite": num_finite / agreement.world_size
            + kept.get("num_finite", kept.get("num_steps", 0)),
            "num_skipped": num_skipped + kept.get("num_skipped", 0),
            "num_replaced": int(num_replaced) + kept.get("num_replaced", 0),
            "times_seen": seen + kept["times_seen"] if kept else seen,
            **self.seconds_by_stage(),
        }


def summary(reduced: dict[str, Any]) -> dict[str, Any]:
    """What ``metrics.jsonl`` says of it: mean losses, how many images were missed and how many shown again (topping up the last step)."""
    seen = reduced["times_seen"]
    num_finite = reduced["num_finite"]
    return {
        **{
            f"train/{name}": value / num_finite if num_finite else math.nan
            for name, value in reduced["losses"].items()
        },
        "images_missed": int((seen == 0).sum()),
        "images_repeated": int(np.maximum(seen.astype(int) - 1, 0).sum()),
        "images_replaced": reduced["num_replaced"],
    }
