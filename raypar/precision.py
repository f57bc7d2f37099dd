"""Which device and which number format a process computes with.

Runs in: training workers, detector actors, replicas.
"""

from __future__ import annotations

from typing import Literal

import torch


def pick_precision(precision: str, device: torch.device | str, *, is_sharded: bool = False) -> torch.dtype:
    """The dtype of forward passes.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``. On a GPU auto is fp16, as in Ultralytics: torch gives fp16 to cuDNN's batch norm
            and bf16 to a slower one of its own (YOLOv8n's step on an H100 takes a fifth longer). On a CPU it is bf16 where the chip
            multiplies it in hardware (AMX or AVX512-BF16) and fp32 elsewhere, where bf16 would be emulated and slow.
        device: where the model is.
        is_sharded: whether ranks share out the weights (FSDP): then auto is bf16 on a GPU, which needs no scaling of gradients.

    Raises:
        ValueError: no such precision, or one that the device cannot compute with.
    """
    device = torch.device(device)
    if precision == "auto":
        if device.type == "cuda":
            return (
                torch.bfloat16
                if is_sharded and torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16
            )
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision '{precision}' is unknown: use auto, fp32, bf16 or fp16")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU: on a CPU use bf16, fp32 or auto")
    return dtypes[precision]


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def pick_device(use_gpu: bool | Literal["auto"] = "auto") -> torch.device:
    """The device of this process.

    Args:
        use_gpu: auto takes a GPU if torch sees one and, in a Ray task or actor, Ray gave it one: with ``num_gpus=0`` Ray
            does not hide the GPUs that belong to others.

    Raises:
        ValueError: a GPU is demanded where there is none.
    """
    if use_gpu is False:
        return torch.device("cpu")
    has_gpu = torch.cuda.is_available()
    if use_gpu is True:
        if not has_gpu:
            raise ValueError(
                "use_gpu is true but torch sees no GPU in this process: write use_gpu: auto or false"
            )
        return torch.device("cuda", 0)
    return torch.device("cuda", 0) if has_gpu and _is_given_gpu() else torch.device("cpu")


def _is_given_gpu() -> bool:
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return True  # a driver or a plain process: what torch sees is ours
    return bool(ray.get_gpu_ids())
