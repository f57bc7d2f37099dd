"""Makes sums over three or more ranks independent of when a run was started. Runs in: every training worker.

DDP lays out its buckets anew after the first backward pass, in the order in which gradients came, and a ring all-reduce adds the
ranks' numbers in an order that depends on the place in the bucket. So the first step of a resumed run would differ from the same
step of a run left alone, in the last bit. Two passes that count for nothing, before the first step of every start, settle the
layout. (Two numbers have the same sum in any order.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

IMAGES, SIDE = 2, 64


def settle_buckets(loop: Any) -> None:
    """Forward and backward passes of nothing, after which weights, buffers and gradients are what they were. All ranks must call."""
    if loop.world_size <= 2 or not isinstance(loop.model, nn.parallel.DistributedDataParallel):
        return
    buffers = {name: value.clone() for name, value in loop.lender.model.named_buffers()}
    loop.start_epoch()
    # the new layout comes with the second one; gradients that a resume brings must find it there
    for _ in range(2):
        with torch.autocast(loop.device.type, loop.precision, enabled=loop.precision != torch.float32):
            outputs = loop.model(torch.zeros(IMAGES, 3, SIDE, SIDE, device=loop.device))
        total: Any = torch.stack(
            [value.float().sum() for value in _tensors(outputs) if value.requires_grad]
        ).sum()
        # some are used by the loss alone
        nothing = [p.flatten()[:0].sum() for p in loop.lender.model.parameters() if p.requires_grad]
        (total + torch.stack(nothing).sum()).backward()
        loop.optimizer.zero_grad(set_to_none=True)
    for name, value in loop.lender.model.named_buffers():
        value.copy_(buffers[name])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in _tensors(each)]
