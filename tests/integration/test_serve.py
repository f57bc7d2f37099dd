"""The service on a real Ray Serve, over HTTP: results, errors, batches, overload, keys, and weights swapped under load."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray.exceptions
from ray import serve

import raypar.serve
from raypar.config import RunConfig, ServeConfig
from raypar.detector import Detections, Detector
from raypar.images import decode, encode_jpeg, encode_png
from raypar.serve.replica import Replica
from tests.attack.hostile import ATTACKS

JPEG = {"Content-Type": "image/jpeg"}
KEYS = "RAYPAR_TEST_KEYS"
TIMEOUT_S = 300  # machines are shared: only what hangs meets it


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


PORT = free_port()  # of Serve's proxy, which all applications of this module share


def run_config(name: str, weights: Path, **settings: Any) -> RunConfig:
    serve = {
        "weights": str(weights),
        "port": PORT,
        "use_gpu": False,
        "route_prefix": f"/{name}",
        "max_batch_size": 8,
        **settings,
    }
    return RunConfig.model_validate({"name": name, "storage": str(weights.parent), "serve": serve})


@pytest.fixture(scope="module")
def url(ray_4_cpus: None, tiny_weights: Path) -> Iterator[str]:
    config = run_config("tiny", tiny_weights, batch_wait_s=0.05, max_image_mb=0.5, max_pixels=500_000)
    raypar.serve.check(config)
    service = raypar.serve.start(config)
    yield service.url
    raypar.serve.stop(service)


@pytest.fixture(scope="module")
def detector(tiny_weights: Path) -> Detector:
    return Detector.load(tiny_weights)


def photo(seed: int, height: int = 120, width: int = 200) -> bytes:
    """A JPEG of coloured patches, another one for each seed."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 10, 3), np.uint8)
    return encode_jpeg(np.kron(small, np.ones((height // 6, width // 10, 1), np.uint8)))


def num_differing(answer: dict[str, Any], expected: Detections, class_names: list[str]) -> int:
    """How many boxes only the answer or only the detector has (to the digits that are sent)."""
    found = answer["detections"]
    boxes = np.array([d["box_xyxy"] for d in found]).reshape(-1, 4)
    confidences, names = (
        np.array([d["confidence"] for d in found]),
        np.array([d["class_name"] for d in found]),
    )
    is_pair = (
        (np.abs(boxes[:, None] - expected.boxes_xyxy[None]).max(axis=2) < 0.02)
        & (np.abs(confidences[:, None] - expected.confidences[None]) < 1e-4)
        & (names[:, None] == np.array([class_names[i] for i in expected.class_ids])[None])
    )
    assert answer["image"] == {"height": expected.image_hw[0], "width": expected.image_hw[1]}
    return int((~is_pair.any(axis=1)).sum() + (~is_pair.any(axis=0)).sum())


def is_of_its_image(
    answer: dict[str, Any], expected: list[Detections], place: int, class_names: list[str]
) -> bool:
    """Whether an answer is that of its own image among others.

    Not box for box: other batches and threads add up in another order, and the untrained weights' near ties in NMS then fall otherwise.
    """
    differing = [num_differing(answer, each, class_names) for each in expected]
    return all(differing[place] < other / 4 for i, other in enumerate(differing) if i != place)


def batch_size(response: httpx.Response) -> int:
    return int(response.headers["server-timing"].rpartition("desc=")[2])


def is_problem(response: httpx.Response, status: int) -> bool:
    return (
        response.status_code == status == response.json()["status"]
        and response.headers["content-type"] == "application/problem+json"
    )


async def burst(url: str, bodies: list[bytes]) -> list[httpx.Response]:
    """Sends all requests at once."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)) as client:
        return await asyncio.gather(
            *(client.post(f"{url}/v1/detect", content=body, headers=JPEG) for body in bodies)
        )


def test_answers_are_the_detectors(url: str, detector: Detector, tiny_weights: Path) -> None:
    image = photo(0)
    (expected,) = detector([image], conf=0.3, iou=0.5, max_det=20)
    assert len(expected.boxes_xyxy) > 3
    query = {"conf": 0.3, "iou": 0.5, "max_det": 20}

    as_body = httpx.post(f"{url}/v1/detect", params=query, content=image, headers=JPEG)
    as_form = httpx.post(f"{url}/v1/detect", params=query, files={"image": ("x.jpg", image, "image/jpeg")})
    drawn = httpx.post(f"{url}/v1/annotate", params=query, content=image, headers=JPEG)
    model = httpx.get(f"{url}/v1/model").json()

    assert num_differing(as_body.json(), expected, detector.class_names) == 0
    assert as_form.json() == as_body.json()
    assert decode(drawn.content).shape == (120, 200, 3)
    assert drawn.content[:3] == b"\xff\xd8\xff"
    difference = np.abs(decode(drawn.content).astype(int) - decode(image))
    assert (difference.max(axis=2) > 60).mean() > 0.02  # boxes were drawn
    sha256 = hashlib.sha256(tiny_weights.read_bytes()).hexdigest()
    assert (model["sha256"], model["class_names"], model["task"]) == (sha256, detector.class_names, "detect")
    assert as_body.json()["model"] == {"name": "tiny", "sha256": sha256}


def test_probes_page_and_schema(url: str) -> None:
    for route in ("/livez", "/readyz", "/", "/page.js", "/page.css", "/docs", "/openapi.json"):
        assert httpx.get(url + route).status_code == 200, route


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (400, {"content": b"no image", "headers": JPEG}),
        (400, {"content": photo(0)[:200], "headers": JPEG}),
        (413, {"content": bytes(500_001), "headers": JPEG}),
        (
            413,
            {
                "content": encode_png(np.zeros((1000, 501, 3), np.uint8)),
                "headers": {"Content-Type": "image/png"},
            },
        ),
        (415, {"content": photo(0), "headers": {"Content-Type": "text/plain"}}),
        (422, {"content": photo(0), "headers": JPEG, "params": {"conf": 2}}),
        (422, {"files": {"other": ("x.jpg", photo(0), "image/jpeg")}}),
    ],
)
def test_errors_are_problems(url: str, status: int, arguments: dict[str, Any]) -> None:
    response = httpx.post(f"{url}/v1/detect", **arguments)
    assert is_problem(response, status), response.text


def test_attacks_get_the_same_answers_through_serve(url: str) -> None:
    """As far as Ray's proxy lets them through: a few hundred kB, and headers of ASCII."""
    num_sent = 0
    for attack in ATTACKS:
        content = attack.content() if 200 not in attack.statuses else None
        if isinstance(content, bytes) and len(content) < 400_000:
            response = httpx.post(f"{url}/v1/detect", content=content, headers=attack.headers)
            assert any(is_problem(response, status) for status in attack.statuses), (
                attack.name,
                response.text,
            )
            num_sent += 1
    assert num_sent > 20
    assert httpx.post(f"{url}/v1/detect", content=photo(0), headers=JPEG).status_code == 200


def test_a_replica_whose_forward_pass_hangs_is_replaced(
    ray_4_cpus: None, tiny_weights: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "hang"

    class Hanging(Replica):
        """The next forward pass never ends, while there is a marker."""

        def _load(self, user_config: dict[str, Any]) -> Any:
            loaded = super()._load(user_config)
            forward = loaded.detector.forward

            def hanging(images: Any) -> Any:
                if marker.exists():
                    marker.unlink()
                    threading.Event().wait()
                return forward(images)

            loaded.detector.forward = hanging  # type: ignore[method-assign]
            return loaded

    settings = {"request_timeout_s": 1.0}
    period_s = raypar.serve._health_check_period_s(ServeConfig.model_validate(settings))
    deployment: Any = serve.deployment(
        Hanging,
        name="Hanging",
        health_check_period_s=period_s,
        graceful_shutdown_timeout_s=1,
        ray_actor_options={"num_cpus": 0.5},
        user_config={"weights": str(tiny_weights)},
    )
    handle = serve.run(deployment.bind(settings, "cpu"), name="hanging", route_prefix=None)
    query = photo(0), 0.5, 0.7, 10
    try:
        handle.detect.remote(*query).result(timeout_s=TIMEOUT_S)
        marker.touch()
        with pytest.raises(ray.exceptions.RayActorError):  # the answer never comes: the replica is ended
            handle.detect.remote(*query).result(timeout_s=TIMEOUT_S)
        assert handle.detect.remote(*query).result(timeout_s=TIMEOUT_S).body["image"]["width"] == 200
    finally:
        serve.delete("hanging")


def test_a_service_touches_only_what_is_its_own(
    url: str, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="name=tiny: a service of this name runs on this Ray already"):
        raypar.serve.start(run_config("tiny", tiny_weights, route_prefix="/other"))
    with pytest.raises(ValueError, match=r"serve.route_prefix=/tiny: the service 'tiny' answers there"):
        raypar.serve.start(run_config("other", tiny_weights, route_prefix="/tiny"))
    with pytest.raises(ValueError, match="name=tiny: a service of this name"):
        raypar.serve.run(run_config("tiny", tiny_weights))  # whose end, too, leaves the first one alone
    assert list(serve.status().applications) == ["tiny"]

    other = raypar.serve.start(run_config("other", tiny_weights, port=free_port(), num_cpus=0.5))
    try:
        assert other.url == url.replace("/tiny", "/other")  # not the port that it asked for
        assert f"Ray Serve runs already and listens on 127.0.0.1:{PORT}" in capsys.readouterr().out
        assert httpx.get(f"{other.url}/v1/model").status_code == 200
        raypar.serve.stop(dataclasses.replace(other, deployed_at=1.0))  # another one's, of the same name
        assert httpx.get(f"{other.url}/v1/model").status_code == 200
    finally:
        raypar.serve.stop(other)
    assert list(serve.status().applications) == ["tiny"]
    assert httpx.get(f"{url}/readyz").status_code == 200


def test_requests_share_batches_and_a_broken_image_fails_alone(url: str, detector: Detector) -> None:
    bodies = [photo(i) for i in range(24)]
    broken = encode_png(decode(photo(5)))[:2000]  # a good header, and pixels that end too early
    bodies[5] = broken

    responses = asyncio.run(burst(url, bodies))

    assert is_problem(responses.pop(5), 400)
    bodies.pop(5)
    expected = [detector([body])[0] for body in bodies]
    for i, response in enumerate(responses):
        assert response.status_code == 200, response.text
        assert is_of_its_image(response.json(), expected, i, detector.class_names)
    assert max(map(batch_size, responses)) > 1


def test_keys(ray_4_cpus: None, url: str, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS, "one,two")
    config = run_config("locked", tiny_weights, api_key_env=KEYS, num_cpus=0.5)
    service = raypar.serve.start(config)
    try:
        locked = service.url
        assert is_problem(httpx.get(f"{locked}/v1/model"), 401)
        assert is_problem(
            httpx.post(f"{locked}/v1/detect", content=photo(0), headers=JPEG | {"X-API-Key": "three"}), 401
        )
        assert (
            httpx.post(
                f"{locked}/v1/detect", content=photo(0), headers=JPEG | {"X-API-Key": "two"}
            ).status_code
            == 200
        )
        assert httpx.get(f"{locked}/v1/model", headers={"Authorization": "Bearer one"}).status_code == 200
        assert httpx.get(f"{locked}/").status_code == 200
    finally:
        raypar.serve.stop(service)
    assert httpx.get(f"{url}/livez").status_code == 200  # the other service went on


def test_too_many_requests_are_refused_and_the_others_answered(
    ray_4_cpus: None, url: str, tiny_weights: Path, detector: Detector
) -> None:
    config = run_config(
        "small",
        tiny_weights,
        max_batch_size=1,
        max_queued_requests=2,
        imgsz=640,
        threads_per_replica=1,
        num_cpus=0.5,
    )
    service = raypar.serve.start(config)
    try:
        responses = asyncio.run(burst(service.url, [photo(i) for i in range(40)]))
    finally:
        raypar.serve.stop(service)

    refused = [r for r in responses if r.status_code != 200]
    assert 0 < len(refused) < len(responses)
    for response in refused:
        assert is_problem(response, 503)
        assert int(response.headers["retry-after"]) >= 1
    large = Detector.load(tiny_weights, imgsz=640)
    answered = [i for i, response in enumerate(responses) if response.status_code == 200]
    expected = [large([photo(i)])[0] for i in answered]
    for place, i in enumerate(answered):
        assert is_of_its_image(responses[i].json(), expected, place, large.class_names)


def deploy(config: RunConfig, weights: Path) -> None:
    """What ``serve deploy`` does with a file whose ``user_config`` names the weights."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    application = {
        "name": config.name,
        "route_prefix": config.serve.route_prefix,
        "import_path": "raypar.serve:build_app",
        "args": {"use_gpu": False, "num_cpus": 0.5, "max_batch_size": 8},
        "deployments": [{"name": "Detector", "user_config": {"weights": str(weights), "name": weights.stem}}],
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [application]}))


def answered_sha256(url: str) -> str | None:
    try:
        response = httpx.get(f"{url}/v1/model")
    except httpx.HTTPError:
        return None
    return str(response.json()["sha256"]) if response.status_code == 200 else None


def wait_for(url: str, sha256: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while answered_sha256(url) != sha256:
        assert time.monotonic() < deadline, f"{url} does not answer with {sha256}"
        time.sleep(0.1)


def test_weights_are_swapped_under_load_without_losing_a_request(
    ray_4_cpus: None, url: str, tiny_weights: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    shutil.copy(tiny_weights, first)
    other_weights(tiny_weights, second)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
    config = run_config("swapped", first)
    swapped = url.replace("/tiny", "/swapped")
    deploy(config, first)
    try:
        wait_for(swapped, hashes[0])
        done, responses = threading.Event(), list[httpx.Response]()

        def client(seed: int) -> None:
            with httpx.Client(timeout=TIMEOUT_S) as session:
                while not done.is_set():
                    responses.append(session.post(f"{swapped}/v1/detect", content=photo(seed), headers=JPEG))

        clients = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        for thread in clients:
            thread.start()
        time.sleep(1)
        deploy(config, second)
        wait_for(swapped, hashes[1])
        time.sleep(1)
        done.set()
        for thread in clients:
            thread.join(TIMEOUT_S)
    finally:
        serve.delete(config.name)

    assert {r.status_code for r in responses} == {200}
    answered = [r.json()["model"]["sha256"] for r in responses]
    assert set(answered) == set(hashes)
    assert httpx.get(f"{url}/livez").status_code == 200


def other_weights(source: Path, target: Path) -> None:
    """The same model, moved a little."""
    import torch

    checkpoint = torch.load(source, weights_only=False)
    with torch.no_grad():
        for parameter in checkpoint["model"].parameters():
            parameter.add_(0.001)
    torch.save(checkpoint, target)
