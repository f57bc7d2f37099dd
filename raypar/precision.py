"""Which number format a device computes in, and which device a process uses. Runs in: workers, actors and replicas."""

from __future__ import annotations

from pathlib import Path

import torch


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward passes.

    Args:
        precision: ``fp32``, ``bf16``, ``fp16``, or ``auto``: bf16 on GPUs and CPUs that compute in it (AMX or AVX512-BF16), else
            fp16 on GPUs and fp32 on CPUs.
        device: where it will run.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if _cpu_computes_bf16() else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU: use bf16, fp32 or auto")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def _cpu_computes_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "") if info.exists() else ""
    return "avx512_bf16" in flags.split() or "amx_bf16" in flags.split()


def pick_device(use_gpu: bool) -> torch.device:
    """The GPU that Ray gave this process, or the CPU. Always explicit: Ray does not hide GPUs from processes that asked for none."""
    return torch.device("cuda", 0) if use_gpu else torch.device("cpu")
