"""How a model is spread over ranks: DDP, or FSDP2 with every rank holding a share; batch norm over all ranks; compiled forward.

Runs in: every training worker. FSDP's modules take a second to import: only what needs them does. Why the averaged weights stay whole, and what is checkpointed: ``docs/decisions/0012-parallel.md``.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.utils.torch_utils import TORCH_2_13

if TYPE_CHECKING:
    from raypar.train.loop import Loop

MAX_DRIFT = 0.01  # of the largest weight: more is no rounding of different processors


def compiled(model: nn.Module, mode: bool | str, *, is_multi_scale: bool, device: torch.device) -> Any:
    """The model with its forward pass compiled; its own state and names stay what they are.

    Raises:
        ValueError: this node has no C++ compiler, which torch needs on a CPU.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:
            raise ValueError(
                "train.yolo.compile: torch compiles for a CPU with a C++ compiler, and this node has none: install g++"
            ) from error
    return torch.compile(model, mode="default" if mode is True else str(mode), dynamic=is_multi_scale)


def spread_ddp(model: Any, device: torch.device) -> nn.Module:
    """Every rank holds the whole model; gradients are averaged at the last step before an update."""
    ids = [device.index] if device.type == "cuda" else None
    # renamed in torch 2.13
    no_buffers: dict[str, Any] = {"forward_sync_buffers" if TORCH_2_13 else "broadcast_buffers": False}
    return nn.parallel.DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, **no_buffers
    )


def spread_fsdp(model: Any, device: torch.device) -> nn.Module:
    """Every rank holds a share of each layer's weights, gradients and optimizer state. In place: the modules stay the same objects.

    Raises:
        ValueError: the model's loss uses weights of its own, outside of the forward pass that would gather them.
    """
    if hasattr(model.model[-1], "flow_model"):
        raise ValueError(
            "train.parallel=fsdp: the loss of YOLO26 for pose has weights of its own, which cannot be shared out: write train.parallel=ddp"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # outputs are views; no loss writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model  # type: ignore[no-any-return]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """While it lasts, every rank sees all of a sharded model's weights. All ranks must enter."""
    from torch.distributed.fsdp import FSDPModule

    layers = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for layer in layers:
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()


def update_ema(ema: Any, model: nn.Module) -> None:
    """Ultralytics' update, from a sharded model: its layers are gathered for it, as for a forward pass. All ranks must call."""
    with whole(model), torch.no_grad():
        now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        pairs = [(v, now[k]) for k, v in ema.ema.state_dict().items() if v.is_floating_point()]
        ema._pairs = [a for a, _ in pairs], [b for _, b in pairs]
        ema.update(model)


def checksums(tensors: Sequence[Tensor], device: torch.device) -> list[int]:
    """A sum over the bit patterns of each rank's float32 tensors, by rank. All ranks must call."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else torch.zeros(1, device=device)
    total = flat.view(torch.int32).sum(dtype=torch.int64).view(1)
    every = [torch.empty_like(total) for _ in range(dist.get_world_size())]
    dist.all_gather(every, total)
    return [int(each) for each in every]


def assert_synchronised(model: nn.Module, rank: int) -> None:
    """Compares all ranks' weights bit for bit.

    Raises:
        RuntimeError: they differ.
    """
    parameters = list(model.parameters())
    if len(set(checksums(parameters, parameters[0].device))) > 1:
        raise RuntimeError(f"rank {rank}: the ranks' weights differ: gradients are not synchronised")


class SynchronisationCheck:
    """Notices ranks that train apart: a model that DDP does not wrap does so without any error.

    Gradients are compared bit for bit before the first update of a start, and once an epoch. A sum over ranks has the same bits on each
    of them, whatever the optimizer and the learning rate are (which is 0 when a warm-up begins). Weights are compared once an epoch, with
    room for what ranks on different processors round differently. Under FSDP a rank holds shares: there, gradients of shares must have
    arrived, what is not shared out is compared, and so are the averaged weights, which every rank holds whole.

    Args:
        loop: that is about to start. With several ranks all must create and call alike.
    """

    def __init__(self, loop: Loop):
        self.loop = loop
        self.has_told = False
        self.renew()

    def renew(self) -> None:
        """Has the gradients of the next update compared."""
        if self.loop.world_size > 1:
            self.loop.inspect_gradients = self._inspect

    def _inspect(self) -> None:
        """Compares the gradients; again at the next update when these tell nothing: all zero, or (fp16) not finite.

        Raises:
            RuntimeError: they differ, or there are none.
        """
        gradients = [p.grad for p in self.loop.lender.model.parameters() if p.grad is not None]
        if not gradients:
            raise RuntimeError("an update has no gradients: the ranks do not exchange them")
        own = [gradient for gradient in gradients if not hasattr(gradient, "device_mesh")]
        if len(set(checksums(own, self.loop.device))) > 1:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the ranks' gradients differ: they are not synchronised"
            )
        total = float(torch.stack([gradient.abs().sum() for gradient in own]).sum()) if own else 1.0
        if 0 < total < math.inf:
            self.loop.inspect_gradients = None

    def compare_weights(self) -> None:
        """Compares what the ranks have learnt.

        Raises:
            RuntimeError: it is not the same.
        """
        if self.loop.world_size == 1:
            return
        model = self.loop.ema.ema if self.loop.is_sharded else self.loop.lender.model
        parameters = list(model.parameters())
        if len(set(checksums(parameters, self.loop.device))) == 1:
            return
        mine = torch.cat([p.detach().reshape(-1) for p in parameters])
        first = mine.clone()
        dist.broadcast(first, src=0)
        drift = (mine - first).abs().max() / first.abs().max()
        dist.all_reduce(drift, dist.ReduceOp.MAX)
        if not float(drift) <= MAX_DRIFT:
            raise RuntimeError(
                f"rank {dist.get_rank()}: the ranks' weights differ by {float(drift):.1%} of the largest one: they are not synchronised"
            )
        if dist.get_rank() == 0 and not self.has_told:
            self.has_told = True
            print(
                f"train: note: the ranks' weights differ by rounding, up to {float(drift):.0e} of the largest one",
                flush=True,
            )


def fused(optimizer: torch.optim.Optimizer, *, is_scaled: bool = False) -> torch.optim.Optimizer:
    """The same optimizer in torch's one kernel a group, where there is one (SGD, Adam, AdamW); else as it is.

    Args:
        optimizer: without a step yet.
        is_scaled: whether a ``GradScaler`` drives it (fp16): then not SGD, whose kernel leaves momentum of unset memory behind when the first steps
            overflow and are left out, as they are on purpose (torch 2.11 to 2.15).
    """
    kind = type(optimizer)
    if kind not in (torch.optim.Adam, torch.optim.AdamW) and (kind is not torch.optim.SGD or is_scaled):
        return optimizer
    known = inspect.signature(kind).parameters
    groups = [
        {k: v for k, v in group.items() if k not in ("fused", "foreach")} for group in optimizer.param_groups
    ]
    arguments = {k: v for k, v in optimizer.defaults.items() if k in known and k not in ("fused", "foreach")}
    return kind(groups, **arguments, fused=True)


def captured(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and optimizer state by names, whole, on the CPU of rank 0. All ranks must call."""
    from torch.distributed.checkpoint import state_dict as sharded

    options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return sharded.get_model_state_dict(model, options=options), sharded.get_optimizer_state_dict(
        model, optimizer, options=options
    )


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, weights: dict[str, Any], state: dict[str, Any]
) -> None:
    """Every rank takes its share of what :func:`captured` gave, whatever the number of ranks was."""
    from torch.distributed.checkpoint import state_dict as sharded

    options = sharded.StateDictOptions(full_state_dict=True)
    # copies: it puts shares in place of what it is given
    sharded.set_model_state_dict(model, dict(weights), options=options)
    own: dict[str, Any] = {
        "state": {n: dict(v) for n, v in state["state"].items()},
        "param_groups": [dict(group) for group in state["param_groups"]],
    }
    sharded.set_optimizer_state_dict(model, optimizer, own, options=options)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients that wait for more steps, whole, by the parameters' names. All ranks must call."""
    return {
        n: getattr(p.grad, "full_tensor", lambda g=p.grad: g)()
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def set_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Of a parameter that may be a share: its part of the whole gradient."""
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        parameter.grad = distribute_tensor(gradient.to(parameter.device), mesh, placements)
    else:
        parameter.grad = gradient.to(parameter.device, copy=True)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Batch norm by the statistics of all ranks' images, in place: torch's where it has it (GPUs), else :class:`BatchNormOverRanks`."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNormOverRanks


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks, on every rank; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


class BatchNormOverRanks(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for CPUs, where torch has none. All ranks must have equally many images of one size."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        values = input.float()
        count = values.numel() // values.shape[1] * dist.get_world_size()
        mean = _SumOverRanks.apply(values.sum((0, 2, 3))) / count
        centred = values - mean.view(1, -1, 1, 1)
        variance = _SumOverRanks.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
        scale = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(input.dtype)
