"""Sums of one epoch: losses, where the time went, and how often each image was seen. A part of every checkpoint.

Runs in: every training worker.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypar.dataset.batch import Batch
from raypar.train.agree import Agreement

SAY_EVERY_S = 60.0


class Epoch:
    """One rank's sums since it began or resumed an epoch, on top of what a checkpoint kept of it.

    Args:
        num_images: in the training split.
        kept: of the same epoch, as :meth:`reduced` gave it.
    """

    def __init__(self, num_images: int, kept: dict[str, Any] | None = None):
        self.began = self.mark = self.spoke = time.monotonic()
        self.wait_s = self.step_s = 0.0
        self.num_steps = self.num_replaced = 0
        self.losses: dict[str, Tensor] = {}  # on the device, so that no step waits for one
        # a small split may be shown more than 255 times in a step of a large batch
        self.times_seen: NDArray[np.int32] = np.zeros(num_images, np.int32)
        self.kept = kept or {}

    @property
    def seconds(self) -> float:
        return float(time.monotonic() - self.began + self.kept.get("seconds", 0.0))

    def waited(self) -> None:
        now = time.monotonic()
        self.wait_s, self.mark = self.wait_s + now - self.mark, now

    def stepped(self, parts: dict[str, Tensor], batch: Batch) -> None:
        now = time.monotonic()
        self.step_s, self.mark = self.step_s + now - self.mark, now
        self.num_steps += 1
        self.num_replaced += batch.num_replaced
        np.add.at(self.times_seen, batch.rows, 1)
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
            ``losses`` (sums over steps of means over ranks), ``num_steps``, ``num_replaced``, ``times_seen`` int32 (images,),
            ``wait_s``, ``step_s`` and ``seconds`` of this rank.
        """
        names = sorted({*self.losses, *self.kept.get("losses", {})})
        mine = [float(self.losses[name]) if name in self.losses else 0.0 for name in names]
        *sums, num_replaced = agreement.sum(
            torch.tensor([*mine, self.num_replaced], dtype=torch.float64)
        ).tolist()
        seen = agreement.sum(torch.from_numpy(self.times_seen.copy())).numpy()
        kept = self.kept
        return {
            "losses": {
                n: s / agreement.world_size + kept.get("losses", {}).get(n, 0.0)
                for n, s in zip(names, sums, strict=True)
            },
            "num_steps": self.num_steps + kept.get("num_steps", 0),
            "num_replaced": int(num_replaced) + kept.get("num_replaced", 0),
            "times_seen": seen + kept["times_seen"] if kept else seen,
            "wait_s": self.wait_s + kept.get("wait_s", 0.0),
            "step_s": self.step_s + kept.get("step_s", 0.0),
            "seconds": self.seconds,
        }


def summary(reduced: dict[str, Any]) -> dict[str, Any]:
    """What ``metrics.jsonl`` says of it: mean losses, how many images were missed and how many shown again (topping up the last step)."""
    seen = reduced["times_seen"]
    return {
        **{f"train/{name}": value / reduced["num_steps"] for name, value in reduced["losses"].items()},
        "wait_s": reduced["wait_s"],
        "step_s": reduced["step_s"],
        "images_missed": int((seen == 0).sum()),
        "images_repeated": int(np.maximum(seen.astype(int) - 1, 0).sum()),
        "images_replaced": reduced["num_replaced"],
    }
