"""A training's exact state, and the folders that hold it: ``{run}/train/checkpoint_{images seen}/state.pt``.

Runs in: every training worker; rank 0 writes, all ranks read. A checkpoint is complete when its ``state.pt`` is there, which
appears whole; its name follows from its content, so writing it twice is harmless. Why these are not Ray Train's own checkpoints:
``docs/decisions/0009-checkpoints.md``.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from raypar.storage import Folder, patiently
from raypar.train import identity, parallel
from raypar.train.loop import Loop

STATE = "state.pt"
PREFIX = "checkpoint_"


def fold_gradients(loop: Loop) -> None:
    """Makes gradients that wait for more steps the same on every rank: their mean, which DDP would have taken at the update.

    So rank 0's are everybody's, and a checkpoint can hold them. It must be done in every run at the same steps.
    """
    parameters = [p for p in loop.lender.model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if loop.world_size == 1 or loop.is_sharded or not gradients:  # shares are summed over ranks at every step
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= loop.world_size
    for parameter, gradient, mean in zip(
        parameters, gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        # A tensor of its own, as after a resume: DDP divides what lies in its buckets, and multiplies what it copies there.
        parameter.grad = torch.empty_like(gradient).copy_(mean.view_as(gradient))


def capture(loop: Loop, *, has_gradients: bool) -> dict[str, Any]:
    """A copy on the CPU of all that a loop knows: raw fp32 weights, EMA, optimizer, scaler, early stopping, criterion.

    Args:
        loop: whose state it is. Every rank must call, since a sharded model is gathered here; rank 0's copy is the one to write.
        has_gradients: whether gradients wait for more steps (folded before).
    """
    model = loop.lender.model
    criterion = getattr(model, "criterion", None)
    weights, optimizer = (
        parallel.captured(model, loop.optimizer)
        if loop.spread == "fsdp"
        else (model.state_dict(), loop.optimizer.state_dict())
    )
    state = {
        "model": weights,
        "ema": loop.ema.ema.state_dict(),
        "ema_updates": loop.ema.updates,
        "optimizer": optimizer,
        "scaler": loop.scaler.state_dict(),
        "gradients": parallel.whole_gradients(model) if has_gradients else {},
        "criterion": {k: v for k, v in vars(criterion).items() if isinstance(v, int | float)}
        if criterion is not None
        else {},
        "stopper": {k: v for k, v in vars(loop.stopper).items() if k != "patience"},
        "best_fitness": loop.best_fitness,
        "last_optimizer_step": loop.last_optimizer_step,
    }
    copy: dict[str, Any] = _on_cpu(state)
    return copy


def is_finite(state: dict[str, Any]) -> bool:
    """Whether weights, EMA and optimizer hold numbers only: nothing else may be saved. Scaled gradients (fp16) may overflow: that update is left out."""
    found: list[Tensor] = []
    _tensors(
        [
            state["model"],
            state["ema"],
            state["optimizer"]["state"],
            {} if state["scaler"] else state["gradients"],
        ],
        found,
    )
    return all(bool(torch.isfinite(t).all()) for t in found if t.is_floating_point())


def restore(loop: Loop, state: dict[str, Any]) -> None:
    """Puts a captured state into a loop of the same run, whatever the number of ranks was."""
    model = loop.lender.model
    if loop.spread == "fsdp":
        parallel.restore(model, loop.optimizer, state["model"], state["optimizer"])
    else:
        model.load_state_dict(state["model"])
        loop.optimizer.load_state_dict(state["optimizer"])
    loop.ema.ema.load_state_dict(state["ema"])
    loop.ema.updates = state["ema_updates"]
    loop.scaler.load_state_dict(state["scaler"])
    for name, parameter in model.named_parameters():
        if name in state["gradients"]:
            parallel.set_gradient(parameter, state["gradients"][name])
    if state["criterion"]:
        model.criterion = model.init_criterion()
        vars(model.criterion).update(state["criterion"])
    vars(loop.stopper).update(state["stopper"])
    loop.best_fitness = state["best_fitness"]
    loop.last_optimizer_step = state["last_optimizer_step"]


def name_of(cursor: int) -> str:
    """A checkpoint's folder, by the images seen."""
    return f"{PREFIX}{cursor:010d}"


def write(out: Folder, state: dict[str, Any], *, keep: int) -> None:
    """Writes a checkpoint and removes all but the newest ``keep``. What is there is whole at any moment."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    name = name_of(state["cursor"])
    out.write(f"{name}/{STATE}", buffer.getbuffer())
    complete = names(out)
    # none that is newer: another process may have written it
    for old in complete[complete.index(name) + 1 :][keep - 1 :]:
        out.delete(f"{old}/{STATE}")  # first what makes it complete
        out.delete(old)


def names(out: Folder) -> list[str]:
    """Complete checkpoints, the newest first."""
    found = [name.split("/") for name in out.list(recursive=True) if name.startswith(PREFIX)]
    return sorted((parts[0] for parts in found if parts[1:] == [STATE]), reverse=True)


def load(out: Folder, name: str, patience_s: float) -> dict[str, Any]:
    """A checkpoint's content, on the CPU."""
    content = patiently(lambda: out.read(f"{name}/{STATE}"), f"read {out.shown(name)}", patience_s)
    with torch.serialization.safe_globals(_numpy_parts()):
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def _numpy_parts() -> list[Any]:
    """What numpy's arrays and numbers are pickled as; a checkpoint holds them along with tensors, and nothing else that is not plain."""
    array, scalar = np.zeros(0), np.float64(0)
    kinds = (np.bool_, np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64)
    dtypes = [type(np.dtype(kind)) for kind in kinds]
    return [np.ndarray, np.dtype, array.__reduce__()[0], scalar.__reduce__()[0], *dtypes]  # type: ignore[index]


def newest(
    out: Folder, patience_s: float, of_run: dict[str, Any] | None = None
) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint that can be read and is of the run, and its content; nothing when there is none.

    Args:
        out: the run's folder.
        patience_s: how long a storage that fails is asked again.
        of_run: which run's, see :func:`raypar.train.identity.of`; unset: any.

    Raises:
        ValueError: there are some and none can be read.
    """
    unreadable: list[str] = []
    for name in patiently(lambda: names(out), f"list the checkpoints in {out.shown()}", patience_s):
        try:
            state = load(out, name, patience_s)
            other = None if of_run is None else _other(name, state, of_run)
        except OSError:
            raise
        except Exception as error:  # torch's or pickle's, of a damaged file
            print(
                f"train: {name} cannot be read and is passed over: {' '.join(str(error).split())[:200]}",
                flush=True,
            )
            unreadable.append(name)
            continue
        if other is None:
            return name, state
        print(f"train: {name} {other} and is passed over", flush=True)
    if unreadable:
        raise ValueError(
            f"none of the checkpoints {', '.join(unreadable)} in {out.uri} can be read: restore one, or train.overwrite=true"
        )
    return None


def _other(name: str, state: dict[str, Any], of_run: dict[str, Any]) -> str | None:
    """Why a checkpoint is not what its name says in this run; nothing when it is."""
    if name != name_of(state["cursor"]):
        return f"holds the state after {state['cursor']} images"
    return identity.of_another(state, of_run)


def _on_cpu(value: Any) -> Any:
    """A copy with every tensor on the CPU, through dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(v) for v in value)
    return value


def _tensors(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
    for inner in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    ):
        _tensors(inner, found)
