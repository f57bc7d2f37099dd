"""``raypar serve``: weights -> an HTTP service on Ray Serve.

Runs in: the driver (``check``, ``start``, ``run``), or a Ray task (``build_app``, by ``serve deploy``). Two deployments: ``Ingress`` speaks
HTTP and checks requests, ``Detector`` runs the model in batches.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from raypar.config import Autoscaling, RunConfig, ServeConfig
from raypar.pool import read_facts
from raypar.storage import Folder
from raypar.weights import find

if TYPE_CHECKING:
    from ray.serve import Application

REPLICAS_PER_INGRESS = 8
INGRESS_MARGIN = 1000  # requests that an ingress takes beyond what the detector has room for, to refuse them


def check(config: RunConfig) -> None:
    """All checks that need no cluster: the weights can be read and detect, the API keys are set, the port is free.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    section = config.serve
    weights = find(section.weights, config.folder, "serve")
    _key_digests(section)
    # as cluster.connect
    is_joining = os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    if not is_joining:  # else it is another machine's port, or Serve has it already
        _check_port(section.host, section.port)
    if not weights.name.endswith(".engine"):  # which only the GPU that it was made for can read
        read_facts(weights, section.imgsz, precision=section.precision, trusted=config.weights_trusted)


def run(config: RunConfig) -> None:
    """Serves until SIGINT or SIGTERM; then answers what it has begun, and takes the service down."""
    done = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        url = start(config)
        key = (
            f" -H 'Authorization: Bearer KEY'  # one of ${config.serve.api_key_env}"
            if config.serve.api_key_env
            else ""
        )
        print(f"serve: {config.name} at {url}/ (API: {url}/docs)", flush=True)
        print(
            f"serve: try  curl {url}/v1/detect -H 'Content-Type: image/jpeg' --data-binary @image.jpg{key}",
            flush=True,
        )
        while not done.wait(1):
            pass
        print("serve: shutting down", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop(config)


def start(config: RunConfig) -> str:
    """Deploys the service on the running Ray, waits until it answers, and returns its URL (without a slash at its end)."""
    from ray import serve

    settings = config.serve
    is_local = settings.host in ("127.0.0.1", "localhost", "::1")
    serve.start(
        proxy_location="HeadOnly" if is_local else "EveryNode",
        # the proxy gives up without a reason: later than we do
        http_options={
            "host": settings.host,
            "port": settings.port,
            "request_timeout_s": 2 * settings.request_timeout_s + 5,
        },
    )
    serve.run(build_app({**settings.model_dump(mode="json"), "weights": _staged(config), "name": config.name,
                         "weights_trusted": config.weights_trusted}), name=config.name, route_prefix=settings.route_prefix)  # fmt: skip
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(settings.host, settings.host)
    return f"http://{host}:{settings.port}{settings.route_prefix.rstrip('/')}"


def stop(config: RunConfig) -> None:
    """Takes the service down, and Ray Serve with it if it runs nothing else."""
    from ray import serve

    serve.delete(config.name)
    if not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]


def build_app(args: dict[str, Any]) -> Application:
    """The Serve application; ``import_path: raypar.serve:build_app`` in a file for ``serve deploy``.

    Args:
        args: the fields of :class:`ServeConfig`, ``name``, what to call the model, and ``weights_trusted``. ``host``, ``port`` and ``route_prefix`` are not used
            here. ``weights`` may be left to ``user_config`` of the deployment ``Detector``, where they change without a restart.

    Raises:
        ValueError: an unknown or wrong setting, or API keys that are not set.
    """
    from ray import serve

    from raypar.serve.api import Limits
    from raypar.serve.replica import Ingress, Replica

    name, trusted = args.get("name"), bool(args.get("weights_trusted", False))
    config = ServeConfig.model_validate(
        {key: value for key, value in args.items() if key not in ("name", "weights_trusted")}
    )
    use_gpu, replicas = _use_gpu(config), config.num_replicas
    in_batches = 2 * config.max_batch_size  # one batch on the model, one getting ready
    # a change restarts a replica
    settings = config.model_dump(mode="json", exclude={"weights", "host", "port", "route_prefix"})
    deploy: Any = serve.deployment
    detector = deploy(
        Replica,
        name="Detector",
        **_scaling(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus if use_gpu else 0},
        max_ongoing_requests=in_batches,
        max_queued_requests=config.max_queued_requests,
        user_config={"weights": config.weights, "name": name} if config.weights else {},
    ).bind(settings, "cuda:0" if use_gpu else "cpu", trusted)
    most = replicas.max if isinstance(replicas, Autoscaling) else replicas
    limits = Limits(
        int(config.max_image_mb * 1e6),
        config.max_pixels,
        config.request_timeout_s,
        config.conf,
        config.iou,
        config.max_det,
    )
    ingress = deploy(
        serve.ingress()(Ingress),  # type: ignore[call-arg]
        name="Ingress",
        num_replicas=-(-most // REPLICAS_PER_INGRESS),
        ray_actor_options={"num_cpus": 0},  # on the smallest cluster, too, the model gets its CPU
        # never full before the detector is: its 503 tells the reason, the proxy's does not (bodies are read here, so what waits there is small)
        max_ongoing_requests=most * in_batches + config.max_queued_requests + INGRESS_MARGIN,
        max_queued_requests=config.max_queued_requests + INGRESS_MARGIN,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
    )
    return cast("Application", ingress.bind(detector, limits, _key_digests(config)))


def _scaling(config: ServeConfig) -> dict[str, Any]:
    replicas = config.num_replicas
    if not isinstance(replicas, Autoscaling):
        return {"num_replicas": replicas}
    bounds = {
        "min_replicas": replicas.min,
        "max_replicas": replicas.max,
        "target_ongoing_requests": config.max_batch_size,
    }
    return {"num_replicas": "auto", "autoscaling_config": bounds}


def _use_gpu(config: ServeConfig) -> bool:
    import ray

    if config.use_gpu != "auto":
        return config.use_gpu
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= config.num_gpus  # type: ignore[no-untyped-call]


def _key_digests(config: ServeConfig) -> tuple[bytes, ...]:
    """sha256 of each accepted key: the keys themselves stay in this process."""
    from raypar.serve.api import digest

    if config.api_key_env is None:
        return ()
    keys = [key.strip() for key in os.environ.get(config.api_key_env, "").split(",") if key.strip()]
    if not keys:
        name = config.api_key_env
        raise ValueError(
            f"serve.api_key_env names {name}, and that variable is not set: export {name}=KEY (or KEY1,KEY2)"
        )
    return tuple(digest(key) for key in keys)


def _check_port(host: str, port: int) -> None:
    """Whether a service can listen there.

    Raises:
        ValueError: it cannot.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"serve.host={host} serve.port={port}: nothing can listen there ({error.strerror}): name another, as serve.port={port % 65535 + 1}"
        ) from error


def _weights(config: RunConfig) -> str:
    """Where the weights are, absolute: ``serve.weights``, or what this run trained."""
    return (
        Folder.at(config.serve.weights).uri if config.serve.weights else (config.folder / "train/best.pt").uri
    )


def _staged(config: RunConfig) -> str:
    """The weights where every node finds them: local ones are copied to the run's storage, when that is remote."""
    weights = _weights(config)
    if "://" in weights or config.folder.is_local:
        return weights
    target, source = config.folder / "serve", Path(weights)
    for path in [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]:
        target.upload(path, str(path.relative_to(source.parent)))
    return f"{target.uri}/{source.name}"
