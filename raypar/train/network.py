"""Which network interface the ranks talk through: the one that carries the node's Ray address.

Runs in: every training worker, before its process group. A host has several interfaces (a bridge of containers, a management network),
and gloo takes the one that the host's name stands for, which on Debian is 127.0.1.1. Ray's address is known to work: the cluster uses it.
"""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _shutdown_torch, _TorchBackend

# What gloo and NCCL read, and how they want a name: NCCL takes a name for a prefix of names, unless told otherwise.
VARIABLES = {"GLOO_SOCKET_IFNAME": "{}", "NCCL_SOCKET_IFNAME": "={}"}

GOODBYE_S = 3.0  # for leaving a process group: a host that is gone never answers, and the processes end next


class Network(TorchConfig):  # type: ignore[misc]  # Ray is untyped here
    """Ray Train's ``TorchConfig``, whose workers choose their interface first."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Ray's own waits half a minute for a lost host, and with a traceback."""
        leaving = worker_group.execute_async(_shutdown_torch, destroy_process_group=len(worker_group) > 1)
        ray.wait(leaving, num_returns=len(leaving), timeout=GOODBYE_S)


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
