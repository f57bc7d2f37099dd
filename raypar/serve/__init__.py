"""``raypar serve``: weights -> an HTTP service on Ray Serve.

Runs in: the driver (``check``, ``start``, ``run``), or a Ray task (``build_app``, by ``serve deploy``). Two deployments: ``Ingress`` speaks
HTTP and checks requests, ``Detector`` runs the model in batches.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from raypar.config import Autoscaling, RunConfig, ServeConfig
from raypar.pool import read_facts
from raypar.storage import Folder
from raypar.weights import find

if TYPE_CHECKING:
    from ray.serve import Application

REPLICAS_PER_INGRESS = 8
READY_PERIOD_S = 2  # how old what /readyz answers may be
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


@dataclass(frozen=True)
class Service:
    """What :func:`start` has deployed.

    Attributes:
        name: of the Serve application.
        url: where it answers, without a slash at its end.
        deployed_at: when, by Serve's clock: another deployment under this name has another time; ``None``: it never was.
        owns_serve: whether Ray Serve was started for it.
    """

    name: str
    url: str
    deployed_at: float | None
    owns_serve: bool


def run(config: RunConfig) -> None:
    """Serves until SIGINT or SIGTERM; then answers what it has begun, and takes the service down."""
    done = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: done.set()) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        service = start(config)
        try:
            _print_urls(config, service)
            while not done.wait(1):
                pass
            print("serve: shutting down", flush=True)
        finally:
            stop(service)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_urls(config: RunConfig, service: Service) -> None:
    url, name = service.url, config.serve.api_key_env
    key = f" -H 'Authorization: Bearer KEY'  # one of ${name}" if name else ""
    print(f"serve: {service.name} at {url}/ (API: {url}/docs)", flush=True)
    print(
        f"serve: try  curl {url}/v1/detect -H 'Content-Type: image/jpeg' --data-binary @image.jpg{key}",
        flush=True,
    )


def start(config: RunConfig) -> Service:
    """Deploys the service on the running Ray, and waits until it answers. What it has begun is taken down again if that fails.

    Raises:
        ValueError: its name or route prefix is another service's, the Serve that runs takes no HTTP, or no detector could be started.
    """
    from ray import serve

    args = {
        **config.serve.model_dump(mode="json"),
        "weights": _staged(config),
        "name": config.name,
        "weights_trusted": config.weights_trusted,
    }
    app = build_app(args)
    running = _running_serve()
    if running is None:
        _start_serve(config.serve)
    else:
        _check_running(running, config)
    try:
        serve.run(app, name=config.name, route_prefix=config.serve.route_prefix)
    except BaseException as error:
        reason = _reason(config.name)
        stop(Service(config.name, "", _deployed_at(config.name), owns_serve=running is None))
        if isinstance(error, RuntimeError):  # Serve's, which does not say more
            raise ValueError(f"the service could not be started: {reason or error}") from error
        raise
    return Service(config.name, _url(config.serve), _deployed_at(config.name), owns_serve=running is None)


def stop(service: Service) -> None:
    """Takes the service down, unless another one was deployed under its name; and Ray Serve, if it was started for it and runs nothing else."""
    from ray import serve

    if service.deployed_at is not None and service.deployed_at == _deployed_at(service.name):
        serve.delete(service.name)
    if service.owns_serve and not serve.status().applications:
        serve.shutdown()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class RunningServe:
    """The Ray Serve of this Ray, as far as it matters to another service.

    Attributes:
        host, port: where its proxies listen.
        has_proxy: whether there are any.
        is_https: whether they speak TLS.
        route_prefixes: of each application, by its name.
    """

    host: str
    port: int
    has_proxy: bool
    is_https: bool
    route_prefixes: dict[str, str | None]


def _running_serve() -> RunningServe | None:
    """``serve.status()`` is made of the same details and leaves out route prefixes; it does not know the host and port (Ray 2.60)."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return None
    options, details = client.http_config, client.get_serve_details()
    return RunningServe(
        options.host or "",
        options.port,
        has_proxy=bool(options.host) and details.get("proxy_location") != "Disabled",
        is_https=bool(options.ssl_certfile),
        route_prefixes={name: app.get("route_prefix") for name, app in details["applications"].items()},
    )


def _start_serve(settings: ServeConfig) -> None:
    from ray import serve

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


def _check_running(running: RunningServe, config: RunConfig) -> None:
    """Whether a service can be added to a Serve that runs already.

    Raises:
        ValueError: it takes no HTTP, or runs something else of this name or under this route prefix.
    """
    settings = config.serve
    if not running.has_proxy:
        raise ValueError(
            "the Ray Serve of this cluster runs without an HTTP proxy: shut it down (serve shutdown), so that raypar starts it with one"
        )
    if config.name in running.route_prefixes:
        raise ValueError(
            f"name={config.name}: a service of this name runs on this Ray already: end it first (serve shutdown ends all of them), or give this run another name"
        )
    prefix = settings.route_prefix
    for name, other in running.route_prefixes.items():
        if other is not None and (other.rstrip("/") or "/") == (prefix.rstrip("/") or "/"):
            raise ValueError(
                f"serve.route_prefix={prefix}: the service '{name}' answers there already: name another, as serve.route_prefix=/{config.name}"
            )
    if (running.host, running.port) != (settings.host, settings.port):
        print(
            f"serve: Ray Serve runs already and listens on {running.host}:{running.port}; "
            "serve.host and serve.port count only where raypar starts it",
            flush=True,
        )


def _url(settings: ServeConfig) -> str:
    running = _running_serve()
    assert running is not None, "the service has just been deployed on it"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(running.host, running.host)
    scheme = "https" if running.is_https else "http"
    return f"{scheme}://{host}:{running.port}{settings.route_prefix.rstrip('/')}"


def _deployed_at(name: str) -> float | None:
    """When the application was deployed last, by Serve's clock; ``None``: there is none."""
    from ray import serve

    application = serve.status().applications.get(name)
    return None if application is None else application.last_deployed_time_s


def _reason(name: str) -> str:
    """Why an application could not be started: the last error that its replicas' tracebacks name, for people."""
    from ray import serve

    application = serve.status().applications.get(name)
    messages = [each.message for each in application.deployments.values()] if application else []
    found = re.findall(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception): .+)$", "\n".join(messages), re.MULTILINE)
    return str(found[-1]).removeprefix("ValueError: ") if found else ""


def build_app(args: dict[str, Any]) -> Application:
    """The Serve application; ``import_path: raypar.serve:build_app`` in a file for ``serve deploy``.

    Args:
        args: the fields of :class:`ServeConfig`, ``name``, what to call the model, and ``weights_trusted``. ``host``, ``port`` and ``route_prefix`` are not used
            here. ``weights`` may be left to ``user_config`` of the deployment ``Detector``, where they change without a restart.

    Raises:
        ValueError: an unknown or wrong setting, or API keys that are not set.
    """
    from ray import serve

    from raypar.serve.body import Limits
    from raypar.serve.replica import DETECTOR, Ingress, Replica

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
        name=DETECTOR,
        **_scaling(config),
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus if use_gpu else 0},
        max_ongoing_requests=in_batches,
        max_queued_requests=config.max_queued_requests,
        health_check_period_s=_health_check_period_s(config),
        user_config={"weights": config.weights, "name": name} if config.weights else {},
    ).bind(settings, "cuda:0" if use_gpu else "cpu", trusted)
    most = replicas.max if isinstance(replicas, Autoscaling) else replicas
    limits = Limits(
        int(config.max_image_mb * 1e6),
        config.max_pixels,
        int(config.max_held_mb * 1e6),
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
        health_check_period_s=READY_PERIOD_S,
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


def _health_check_period_s(config: ServeConfig) -> float:
    """Serve replaces a replica after three failed checks: one that hangs is gone half a request's time after it was found."""
    return min(max(config.request_timeout_s / 6, 1), 10)


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
