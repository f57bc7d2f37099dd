"""Starting or joining Ray, and whether it can ever hold what a run asks for. Runs in: the driver."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from raypar.quiet import quiet_ray

if TYPE_CHECKING:
    from raypar.config import RunConfig

MIN_LOCAL_CPUS = 4  # fewer would leave Ray Data nothing beside the training workers


def connect(*, with_dashboard: bool = False) -> None:
    """Joins the cluster that this process belongs to (a job, or RAY_ADDRESS); otherwise starts Ray on this machine."""
    import ray

    if ray.is_initialized():
        return
    _set_variables()
    quiet_ray()
    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        # a job brings its own runtime environment; a second one would clash
        ray.init(logging_level="warning")
        return
    # Its processes get this one's variables. A runtime environment would give each the same, and take half a second of each one's start.
    os.environ["PYTHONPATH"] = _package_path()
    # nobody takes this machine away and says so before
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # how soon the end of the training is noticed
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, MIN_LOCAL_CPUS),
        logging_level="warning",
        include_dashboard=with_dashboard,
    )


def require(num_cpus: float, num_gpus: float) -> None:
    """Checks what the cluster has, nodes that an autoscaler may still add included.

    Raises:
        ValueError: it can never have that much.
    """
    import ray

    if _can_grow():
        return
    total = ray.cluster_resources()
    for name, wanted in (("GPU", num_gpus), ("CPU", num_cpus)):
        if wanted > total.get(name, 0):
            nodes = sum(1 for node in ray.nodes() if node["Alive"])
            raise ValueError(f"{wanted:g} {name}s are needed, the cluster ({nodes} node(s)) has {total.get(name, 0):g}: "
                             "ask for fewer (train.num_workers, use_gpu, cpus_per_worker, tune.max_concurrent) or add nodes")  # fmt: skip


def needs(verb: str, config: RunConfig, gpus: float) -> tuple[float, float]:
    """CPUs and GPUs that a verb takes at the least, on a cluster that has so many GPUs."""
    if verb == "train":
        train: Any = importlib.import_module("raypar.train")
        cpus_and_gpus: tuple[float, float] = train.needs(config, use_gpu=train.uses_gpu(config, gpus))
        return cpus_and_gpus
    if verb == "tune":
        cpus, cards = needs("train", config, gpus)
        return cpus * (config.tune.max_concurrent or 1), cards * (config.tune.max_concurrent or 1)
    if verb == "inspect":
        return 1.0, 0.0
    if verb in ("evaluate", "predict"):
        section = config.evaluate if verb == "evaluate" else config.predict
        return float(section.num_workers), float(section.num_workers if section.use_gpu is True else 0)
    if verb == "serve":
        replicas = (
            config.serve.num_replicas
            if isinstance(config.serve.num_replicas, int)
            else config.serve.num_replicas.min
        )
        return (
            replicas * config.serve.num_cpus,
            replicas * config.serve.num_gpus if config.serve.use_gpu is True else 0.0,
        )
    return 0.0, 1.0 if verb == "export" and config.export.format == "engine" else 0.0


def num_gpus() -> float:
    """GPUs of the cluster that this process has joined."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0))


def check_without_starting(verb: str, config: RunConfig) -> str:
    """Compares what a verb needs with the cluster that was joined or that RAY_ADDRESS names, else with a Ray that this machine could start.

    Raises:
        ValueError: there will never be so many.
    """
    ray: Any = sys.modules.get("ray")
    if os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized()):
        connect()
        wanted = needs(verb, config, num_gpus())
        require(*wanted)
        return f"{wanted[0]:g} and {wanted[1]:g} are needed, the cluster can have them"
    cpus, gpus = local_resources()
    wanted = needs(verb, config, gpus)
    for name, need, have in (("GPU", wanted[1], gpus), ("CPU", wanted[0], cpus)):
        if need > have:
            raise ValueError(
                f"{need:g} {name}s are needed, a Ray on this machine has {have:g}: ask for fewer, or set RAY_ADDRESS to a cluster that has them"
            )
    return f"{wanted[0]:g} and {wanted[1]:g} are needed, a Ray on this machine has {cpus:g} and {gpus:g}"


def local_resources() -> tuple[float, float]:
    """CPUs and GPUs that a Ray started on this machine would have, without starting it."""
    from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

    return float(max(os.cpu_count() or 1, MIN_LOCAL_CPUS)), float(
        NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    )


def _can_grow() -> bool:
    """Whether an autoscaler can add nodes: then only it knows what is still to come."""
    from ray._private import ray_constants
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    return is_autoscaler_v2() or grows(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS))


def grows(status: bytes | None) -> bool:
    """Whether the status that Ray's monitor writes is that of a cluster with node types of its own.

    The monitor of a plain ``ray start --head`` reports too, and names each node's type ``node_<node id>``
    (Ray 2.60.0, ``format_readonly_node_type``).
    """
    report = json.loads(status).get("autoscaler_report") if status else None
    types = [*((report or {}).get("active_nodes") or {}), *((report or {}).get("idle_nodes") or {})]
    return any(re.fullmatch("node_[0-9a-f]+", name) is None for name in types)


def _package_path() -> str:
    """Where workers find raypar when it is used from a checkout."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def _set_variables() -> None:
    """What Ray reads from the environment: its own reports of progress give way to raypar's."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no colours in files
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # processes without a GPU see none


def task_cause(error: BaseException) -> BaseException:
    """What really went wrong in a Ray task or actor, out of Ray's wrapping."""
    from ray.exceptions import RayTaskError

    seen: set[int] = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = error.cause if isinstance(error, RayTaskError) else error.__cause__
        if inner is None:
            break
        error = inner
    return error
