"""Which network interface the ranks talk through: the one that carries the node's Ray address.

Runs in: every training worker, before its process group. A host has several interfaces (a bridge of containers, a management network),
and gloo takes the one that the host's name stands for, which on Debian is 127.0.1.1. Ray's address is known to work: the cluster uses it.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.util import TrainingFramework

# What gloo and NCCL read, and how they want a name: NCCL takes a name for a prefix of names, unless told otherwise.
VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}

GOODBYE_S = 3.0  # for leaving a process group: a host that is gone never answers, and the processes end next


class Network(BackendConfig):  # type: ignore[misc]  # Ray is untyped here
    """Ray Train's ``TorchConfig`` for workers that choose their interface first. Without torch, so that the controller, which only holds it,
    does not import torch: that took two seconds before the workers could start (Ray 2.60.0, ``ray/train/torch/config.py``).

    Args:
        timeout_s: how long a collective may wait.
    """

    backend = ""  # the trainer sets it: gloo or nccl

    def __init__(self, timeout_s: int):
        self.timeout_s = timeout_s

    @property
    def backend_cls(self) -> Any:
        return _Backend

    @property
    def train_func_context(self) -> Any:
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH


class _Backend(Backend):  # type: ignore[misc]
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Network) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(choose_interface)
        group = {
            "backend": backend_config.backend,
            "world_size": len(worker_group),
            "timeout_s": backend_config.timeout_s,
        }
        ray.get(
            [
                worker_group.execute_single_async(rank, join, address, port, world_rank=rank, **group)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: Network) -> None:
        """Ray's own waits half a minute for a lost host, and with a traceback."""
        leaving = worker_group.execute_async(leave, destroy_process_group=len(worker_group) > 1)
        ray.wait(leaving, num_returns=len(leaving), timeout=GOODBYE_S)


def join(address: str, port: int, **group: Any) -> None:
    """Sets the variables of torch.distributed, from which Ultralytics takes its rank too, and joins the process group."""
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(init_method="env://", **group)


def leave(*, destroy_process_group: bool) -> None:
    """Leaves it."""
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroy_process_group)


def choose_interface() -> None:
    """Sets the variables that nobody has set; leaves them when no interface has the address."""
    name = interface_of(ray.util.get_node_ip_address())
    for variable, form in VARIABLES.items() if name else ():
        os.environ.setdefault(variable, form.format(name))


def interface_of(address: str) -> str | None:
    """The name of this host's interface that has an IP address (v4 or v6), if one has."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == address for each in addresses):
            return str(name)
    return None
