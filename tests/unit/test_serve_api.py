"""The service without Ray: routes, errors, limits and keys over a fake model; the replica's batches over a fake detector."""

from __future__ import annotations

import asyncio
import hashlib
import re
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    ServeStatus,
)

import raypar.serve
from raypar.config import RunConfig
from raypar.detector import Detections, Detector
from raypar.images import decode, encode_jpeg, encode_png
from raypar.serve import body, loading, replica
from raypar.serve.api import Answer, build_api, digest
from raypar.serve.batch import Batcher
from raypar.serve.body import Limits
from raypar.serve.problem import BadImageError, BusyError
from raypar.serve.replica import Ingress, Replica
from raypar.serve.room import Room

JPEG = {"Content-Type": "image/jpeg"}
# an address, a library, a file of ours
INTERNAL = re.compile(
    r"0x[0-9a-f]{4}|object at|no module|opencv|pillow|cv2|\.py\b|/tmp/|/raypar/", re.IGNORECASE
)
MODEL = {"name": "fake", "sha256": "0" * 64}
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


class FakeDetector:
    """Answers each image with one box whose confidence is the image's conf; fails a batch that holds a wholly red image."""

    def __init__(self, class_names: Sequence[str] = ("cat", "dog")) -> None:
        self.class_names, self.imgsz, self.task = list(class_names), 32, "detect"
        self.batches = list[int]()
        self.is_broken, self.square = False, True
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()

    def hold(self) -> None:
        """The next forward pass goes on until ``may_end`` is set."""
        self.has_begun.clear()
        self.may_end.clear()

    def warm_up(self, batch_size: int = 1) -> None:
        if self.is_broken:
            raise RuntimeError("the model failed")

    def __call__(
        self, images: Sequence[Any], *, conf: Any = None, iou: Any = None, max_det: Any = None
    ) -> list[Detections]:
        self.batches.append(len(images))
        self.has_begun.set()
        assert self.may_end.wait(60)
        if self.is_broken or any((image == (255, 0, 0)).all() for image in images):
            raise RuntimeError("the model failed")
        confs = conf if isinstance(conf, list) else [0.5] * len(images)
        return [
            Detections(
                np.array([[1, 2, 3.3, 4]], np.float32),
                np.array([1], np.int32),
                np.array([c], np.float32),
                image.shape[:2],
            )
            for image, c in zip(images, confs, strict=True)
        ]


class FakeService:
    """What the API calls; keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[bytes, float, float, int]] = []
        self.error: Exception | None = None
        self.wait_s, self.works = 0.0, True
        self.may_answer: asyncio.Event | None = None

    async def detect(self, data: bytes, conf: float, iou: float, max_det: int) -> Answer:
        self.calls.append((data, conf, iou, max_det))
        await asyncio.sleep(self.wait_s)
        if self.may_answer is not None:
            await self.may_answer.wait()
        if self.error:
            raise self.error
        try:
            image = decode(data)
        except ValueError as error:
            raise BadImageError(str(error)) from error
        found = {"class_id": 1, "class_name": "dog", "confidence": 0.91, "box_xyxy": [1, 2, 3.3, 4]}
        size = {"height": image.shape[0], "width": image.shape[1]}
        return Answer({"model": MODEL, "image": size, "detections": [found]}, 3, 0.0125, encode_jpeg(image))

    annotate = detect

    async def info(self) -> dict[str, Any]:
        if self.error:
            raise self.error
        return {**MODEL, "task": "detect", "class_names": ["cat", "dog"], "imgsz": 32}

    async def is_ready(self) -> bool:
        return self.works


def api_of(service: FakeService, keys: Sequence[str] = (), **limits: Any) -> FastAPI:
    digests = [digest(key) for key in keys]
    return build_api(
        service.detect, service.annotate, service.info, Limits(**limits), digests, is_ready=service.is_ready
    )


def client_of(service: FakeService, keys: Sequence[str] = (), **limits: Any) -> TestClient:
    return TestClient(api_of(service, keys, **limits), raise_server_exceptions=False)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def client(service: FakeService) -> TestClient:
    return client_of(service)


def is_problem(response: Any, status: int) -> bool:
    body = response.json()
    is_typed = response.headers["content-type"] == "application/problem+json"
    return (
        is_typed
        and response.status_code == status == body["status"]
        and {"type", "title", "detail"} <= set(body)
    )


# --- routes ------------------------------------------------------------------------------------------------------------------------------


def test_detect_answers_as_documented_and_passes_the_bytes_and_thresholds_on(
    client: TestClient, service: FakeService
) -> None:
    data = encode_png(IMAGE)

    response = client.post(
        "/v1/detect?conf=0.1&iou=0.2&max_det=7", content=data, headers={"Content-Type": "image/png"}
    )

    assert response.status_code == 200, response.text
    assert response.json() == {
        "model": MODEL,
        "image": {"height": 48, "width": 64},
        "detections": [{"class_id": 1, "class_name": "dog", "confidence": 0.91, "box_xyxy": [1, 2, 3.3, 4]}],
    }
    assert service.calls == [(data, 0.1, 0.2, 7)]
    assert response.headers["server-timing"] == "forward;dur=12.5, batch;desc=3"


def test_a_form_is_the_same_request(client: TestClient, service: FakeService) -> None:
    data = encode_png(IMAGE)

    as_body = client.post("/v1/detect", content=data, headers={"Content-Type": "image/png"})
    as_form = client.post(
        "/v1/detect", files={"image": ("x.png", data, "image/png")}, data={"note": "unused"}
    )

    assert as_form.json() == as_body.json()
    assert service.calls == [(data, 0.25, 0.7, 300)] * 2  # the defaults


def test_annotate_answers_a_jpeg(client: TestClient) -> None:
    response = client.post("/v1/annotate", content=encode_jpeg(IMAGE), headers=JPEG)

    assert response.headers["content-type"] == "image/jpeg"
    assert decode(response.content).shape == IMAGE.shape


def test_model_probes_page_and_schema(client: TestClient) -> None:
    assert client.get("/v1/model").json() == {
        **MODEL, "task": "detect", "class_names": ["cat", "dog"], "imgsz": 32, "conf": 0.25, "iou": 0.7, "max_det": 300
    }  # fmt: skip
    assert (
        client.get("/livez").status_code
        == client.get("/readyz").status_code
        == client.get("/docs").status_code
        == 200
    )
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]["/v1/detect"]["post"]["requestBody"]["content"]) == {
        "image/*",
        "multipart/form-data",
    }
    assert {"400", "401", "413", "415", "422", "503", "504"} <= set(
        schema["paths"]["/v1/annotate"]["post"]["responses"]
    )


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")

    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        assert f'"{name}"' in page.text
        assert client.get(f"/{name}").status_code == 200
    for file in Path(raypar.serve.__file__).with_name("page").iterdir():
        assert "http" not in file.read_text()


# --- errors ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "arguments"),
    [
        (400, {"content": b"", "headers": JPEG}),
        (400, {"content": b"no image", "headers": JPEG}),
        (400, {"content": encode_png(IMAGE)[:60], "headers": JPEG}),  # a header without pixels
        (400, {"content": b"no form", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        (400, {"content": b"no form", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, {"content": b"no image", "headers": JPEG | {"Content-Length": b"\xb2"}}),
        (400, {"content": b"", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}),
        (415, {"content": encode_jpeg(IMAGE), "headers": {"Content-Type": "image" + "/" * 2000}}),
        (422, {"files": [("image", ("x.jpg", encode_jpeg(IMAGE), "image/jpeg"))] * 2}),
        (415, {"content": encode_jpeg(IMAGE)}),
        (
            415,
            {"content": encode_jpeg(IMAGE), "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
        ),
        (415, {"json": {"url": "file:///etc/passwd"}}),
        (422, {"files": {"picture": ("x.jpg", encode_jpeg(IMAGE), "image/jpeg")}}),
        (422, {"data": {"image": "text"}, "files": {"other": b"x"}}),
        (422, {"content": encode_jpeg(IMAGE), "headers": JPEG, "params": {"conf": 1.5}}),
        (422, {"content": encode_jpeg(IMAGE), "headers": JPEG, "params": {"iou": "much"}}),
        (422, {"content": encode_jpeg(IMAGE), "headers": JPEG, "params": {"max_det": 0}}),
        (422, {"content": encode_jpeg(IMAGE), "headers": JPEG, "params": {"conf": "nan"}}),
    ],
)
def test_a_bad_request_is_a_problem(client: TestClient, status: int, arguments: dict[str, Any]) -> None:
    for route in ("/v1/detect", "/v1/annotate"):
        response = client.post(route, **arguments)
        assert is_problem(response, status), response.text
        assert not INTERNAL.search(response.json()["detail"]), response.text


def test_other_errors_are_problems_too(client: TestClient) -> None:
    assert is_problem(client.get("/nowhere"), 404)
    assert is_problem(client.get("/v1/detect"), 405)


def test_too_many_bytes_are_refused_while_they_arrive(service: FakeService) -> None:
    client = client_of(service, max_image_bytes=100_000)
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield bytes(10_000)

    assert is_problem(client.post("/v1/detect", content=bytes(100_001), headers=JPEG), 413)
    assert is_problem(client.post("/v1/detect", content=chunks(), headers=JPEG), 413)  # no content-length
    assert is_problem(
        client.post("/v1/detect", files={"image": ("x.jpg", bytes(100_001), "image/jpeg")}), 413
    )
    assert is_problem(
        client.post("/v1/detect", files={"image": ("x.jpg", bytes(900_001), "image/jpeg")}), 413
    )
    assert service.calls == []


def test_bytes_that_all_requests_hold_are_bounded(service: FakeService) -> None:
    image = encode_png(np.random.default_rng(1).integers(0, 255, (100, 100, 3), np.uint8))
    api = api_of(service, max_held_bytes=int(1.5 * len(image)))

    async def scene() -> list[int]:
        service.may_answer = asyncio.Event()
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:

            def post() -> Any:
                return client.post("/v1/detect", content=image, headers=JPEG)

            first = asyncio.create_task(post())
            while not service.calls:
                await asyncio.sleep(0)
            second = await post()
            service.may_answer.set()
            return [(await first).status_code, second.status_code, (await post()).status_code]

    assert asyncio.run(scene()) == [200, 503, 200]


def test_nothing_a_client_sends_is_looked_at_on_the_event_loop(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, str] = {}

    def noting(name: str) -> Any:
        original = getattr(body, name)

        def noted(*args: Any) -> Any:
            threads[name] = threading.current_thread().name
            return original(*args)

        return noted

    for name in ("_form_image", "_check_header"):
        monkeypatch.setattr(body, name, noting(name))

    response = client_of(service).post(
        "/v1/detect", files={"image": ("x.jpg", encode_jpeg(IMAGE), "image/jpeg")}
    )

    assert response.status_code == 200
    assert all(thread.startswith("received") for thread in threads.values())
    assert set(threads) == {"_form_image", "_check_header"}


def test_too_many_pixels_are_refused_by_the_header(service: FakeService) -> None:
    black = encode_png(np.zeros((1001, 1000, 3), np.uint8))

    assert is_problem(
        client_of(service, max_pixels=1_000_000).post("/v1/detect", content=black, headers=JPEG), 413
    )
    assert service.calls == []
    assert (
        client_of(service, max_pixels=1_001_000).post("/v1/detect", content=black, headers=JPEG).status_code
        == 200
    )


def test_full_slow_and_failing_services(service: FakeService) -> None:
    client = client_of(service, request_timeout_s=0.2)
    send = {"content": encode_jpeg(IMAGE), "headers": JPEG}

    service.error = BusyError("all replicas are busy")
    for response in (
        client.post("/v1/detect", **send),
        client.post("/v1/annotate", **send),
        client.get("/v1/model"),
    ):
        assert is_problem(response, 503)
        assert response.headers["retry-after"] == "1"

    service.error = RuntimeError("secret detail")
    response = client.post("/v1/detect", **send)
    assert is_problem(response, 500)
    assert "secret" not in response.text

    service.error, service.wait_s = None, 5
    assert is_problem(client.post("/v1/detect", **send), 504)
    assert client.get("/livez").status_code == 200


def test_an_upload_that_stalls_is_given_up(service: FakeService) -> None:
    api = api_of(service, request_timeout_s=0.1)
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/detect",
        "query_string": b"",
        "headers": [(b"content-type", b"image/jpeg")],
    }
    asyncio.run(api(scope, receive, send))
    assert sent[0]["status"] == 408


# --- keys --------------------------------------------------------------------------------------------------------------------------------


def test_keys(service: FakeService) -> None:
    client = client_of(service, keys=["one", "two"])
    send: dict[str, Any] = {"content": encode_jpeg(IMAGE)}

    for wrong in (
        {},
        {"X-API-Key": "three"},
        {"Authorization": "Bearer on"},
        {"Authorization": "Basic one"},
        {"X-API-Key": ""},
    ):
        # the key comes before everything else
        response = client.post("/v1/detect?conf=9", **send, headers=JPEG | wrong)
        assert is_problem(response, 401)
        assert response.headers["www-authenticate"].startswith("Bearer")
        assert is_problem(client.get("/v1/model", headers=wrong), 401)
    assert service.calls == []
    for right in ({"X-API-Key": "two"}, {"Authorization": "Bearer one"}):
        assert client.post("/v1/detect", **send, headers=JPEG | right).status_code == 200
    for route in ("/", "/livez", "/readyz", "/openapi.json"):
        assert client.get(route).status_code == 200


def test_the_named_variable_must_hold_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {"name": "run", "storage": str(tmp_path), "serve": {"api_key_env": "SOME_KEYS"}}
    )
    with pytest.raises(ValueError, match=r"run `raypar train`.*serve\.weights"):
        raypar.serve.check(config)
    (config.folder / "train").write("best.pt", b"")
    with pytest.raises(ValueError, match="it is empty"):
        raypar.serve.check(config)
    (config.folder / "train").write("best.pt", b"PK\3\4 weights")
    monkeypatch.setattr(raypar.serve, "read_facts", lambda *_, **__: None)  # see test_weights.py
    with pytest.raises(ValueError, match="export SOME_KEYS=KEY"):
        raypar.serve.check(config)
    monkeypatch.setenv("SOME_KEYS", "one, two")
    monkeypatch.setattr(raypar.serve, "_check_port", lambda *_: None)
    raypar.serve.check(config)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "no.such.host.invalid"])
def test_a_port_that_is_taken_is_said_before_ray_starts(
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_weights: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve = {"host": host, "port": taken.getsockname()[1]}
        config = RunConfig.model_validate({"name": "run", "storage": str(tmp_path), "serve": serve})
        (config.folder / "train").upload(tiny_weights, "best.pt")
        with pytest.raises(ValueError, match=f"serve.port={serve['port']}: nothing can listen there"):
            raypar.serve.check(config)
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        raypar.serve.check(config)  # another machine's port
    if host == "127.0.0.1":
        monkeypatch.delenv("RAY_ADDRESS")
        raypar.serve.check(config)


# --- batches -----------------------------------------------------------------------------------------------------------------------------


class StepExecutor(Executor):
    """Runs what it is given only when the test says so."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._running: list[tuple[Any, Any, Future[Any]]] = []

    def submit(self, run: Any, /, items: Any) -> Future[Any]:  # type: ignore[override]
        self.sizes.append(len(items))
        future: Future[Any] = Future()
        self._running.append((run, items, future))
        return future

    def finish(self) -> None:
        run, items, future = self._running.pop()
        future.set_result(run(items))


class Batches:
    """A batcher over a model that works step by step, and the loop's clock held still."""

    def __init__(self, max_size: int, wait_s: float) -> None:
        self.model, self.now, self.tasks = StepExecutor(), 0.0, list[asyncio.Task[int]]()
        asyncio.get_running_loop().time = lambda: self.now  # type: ignore[method-assign]
        self.batcher = Batcher(lambda items: [10 * item for item in items], self.model, max_size, wait_s)

    async def send(self, *items: int) -> None:
        self.tasks += [asyncio.create_task(self.batcher(item)) for item in items]
        await self.settle()

    async def finish(self) -> None:
        self.model.finish()
        await self.settle()

    async def settle(self) -> None:
        """Lets everything run that can; no clock is involved."""
        for _ in range(20):
            await asyncio.sleep(0)


def test_an_idle_model_starts_at_once_and_takes_what_came_while_it_was_busy() -> None:
    async def scene() -> list[int]:
        batches = Batches(max_size=8, wait_s=0)
        await batches.send(0)
        assert batches.model.sizes == [1]
        await batches.send(*range(1, 12))
        assert batches.model.sizes == [1]  # busy
        await batches.finish()
        assert batches.model.sizes == [1, 8]
        await batches.finish()
        assert batches.model.sizes == [1, 8, 3]
        await batches.finish()
        return [task.result() for task in batches.tasks]

    assert asyncio.run(scene()) == [10 * i for i in range(12)]


def test_an_item_that_waited_behind_a_busy_model_does_not_wait_again() -> None:
    async def scene() -> None:
        batches = Batches(max_size=2, wait_s=5)
        await batches.send(0)
        assert batches.model.sizes == []  # an idle model waits for the batch to fill
        await batches.send(1)
        assert batches.model.sizes == [2]
        await batches.send(2)
        batches.now = 4.9
        await batches.finish()
        assert batches.model.sizes == [2]  # 4.9 s of 5
        await batches.send(3)
        assert batches.model.sizes == [2, 2]
        await batches.send(4)
        batches.now = 10.0
        await batches.finish()
        assert batches.model.sizes == [2, 2, 1]

    asyncio.run(scene())


def test_a_full_batch_does_not_wait_and_a_cancelled_item_is_not_computed() -> None:
    seen: list[int] = []

    def run(items: Sequence[int]) -> list[int | Exception]:
        seen.extend(items)
        return [ValueError(str(item)) if item == 2 else item for item in items]

    async def scene() -> None:
        batcher = Batcher(run, ThreadPoolExecutor(1), max_size=4, wait_s=30)
        cancelled = asyncio.create_task(batcher(99))
        await asyncio.sleep(0)
        cancelled.cancel()
        results = await asyncio.gather(*(batcher(i) for i in range(1, 5)), return_exceptions=True)
        assert [str(r) for r in results] == ["1", "2", "3", "4"]
        assert isinstance(results[1], ValueError)

    asyncio.run(asyncio.wait_for(scene(), 5))
    assert seen == [1, 2, 3] or seen == [1, 2, 3, 4]


# --- the replica -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def detectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, FakeDetector]:
    """Weights a.pt and b.pt, and the detectors that they are loaded as."""
    known = {"a": FakeDetector(), "b": FakeDetector(("cow", "pig"))}
    for name in known:
        (tmp_path / f"{name}.pt").write_bytes(name.encode())
    monkeypatch.setattr(Detector, "load", lambda local, **settings: known[local.stem])
    return known


def test_a_broken_image_and_a_failing_one_fail_alone(
    detectors: dict[str, FakeDetector], tmp_path: Path
) -> None:
    red = encode_png(np.full((8, 8, 3), (255, 0, 0), np.uint8))
    images = [encode_png(IMAGE), b"broken", red, *[encode_png(IMAGE)] * 5]

    async def scene() -> list[Any]:
        one = Replica({"max_batch_size": 8, "batch_wait_s": 0.2}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        detectors["a"].batches.clear()
        return await asyncio.gather(
            *(one.detect(data, i / 10, 0.7, 10) for i, data in enumerate(images)), return_exceptions=True
        )

    answers = asyncio.run(scene())

    assert detectors["a"].batches == [7] + [1] * 7  # together, then one by one
    assert isinstance(answers[1], BadImageError)
    assert isinstance(answers[2], RuntimeError)
    for i in (0, 3, 4, 5, 6, 7):
        (found,) = answers[i].body["detections"]
        assert (found["class_name"], found["confidence"]) == ("dog", i / 10)  # each with its own threshold
        assert answers[i].body["image"] == {"height": 48, "width": 64}


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not loaded in a child process first: it would know no fake ones."""
    monkeypatch.setattr(loading, "try_in_child", lambda *_, **__: None)


def test_weights_are_swapped_beside_running_requests(
    detectors: dict[str, FakeDetector], no_trial: None, tmp_path: Path
) -> None:
    async def scene() -> None:
        one = Replica({}, "cpu")
        with pytest.raises(ValueError, match="it takes 'weights'"):
            await one.reconfigure({})
        await one.reconfigure({"weights": str(tmp_path / "a.pt"), "name": "first"})
        detectors["a"].hold()
        running = asyncio.create_task(one.detect(encode_png(IMAGE), 0.5, 0.7, 10))
        await asyncio.to_thread(detectors["a"].has_begun.wait, 60)
        await one.reconfigure({"weights": str(tmp_path / "b.pt")})
        assert not running.done()
        detectors["a"].may_end.set()
        answer = await running
        assert answer.body["model"] == {"name": "first", "sha256": hashlib.sha256(b"a").hexdigest()}
        assert answer.body["detections"][0]["class_name"] == "dog"
        await one.reconfigure({"weights": str(tmp_path / "c.pt")})  # not there: those in use go on
        info = await one.info()
        assert info == {
            "name": "b.pt",
            "sha256": hashlib.sha256(b"b").hexdigest(),
            "task": "detect",
            "class_names": ["cow", "pig"],
            "imgsz": 32,
        }

    asyncio.run(scene())


def test_an_export_folder_is_copied_whole(tmp_path: Path) -> None:
    source = tmp_path / "best_openvino_model"
    (source / "deep").mkdir(parents=True)
    (source / "a.xml").write_bytes(b"a")
    (source / "deep" / "b.bin").write_bytes(b"b")

    local, sha256 = replica.download(str(source), tmp_path / "copy")

    assert local.name == "best_openvino_model"
    assert (local / "deep" / "b.bin").read_bytes() == b"b"
    (source / "deep" / "b.bin").write_bytes(b"c")
    assert replica.download(str(source), tmp_path / "again")[1] != sha256


def test_health_is_lost_only_when_the_model_fails_by_itself(
    detectors: dict[str, FakeDetector], tmp_path: Path
) -> None:
    async def scene() -> None:
        one = Replica({}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        with pytest.raises(RuntimeError):
            await one.detect(encode_png(np.full((8, 8, 3), (255, 0, 0), np.uint8)), 0.5, 0.7, 10)
        await one.check_health()  # the image was to blame
        detectors["a"].is_broken = True
        with pytest.raises(RuntimeError):
            await one.detect(encode_png(IMAGE), 0.5, 0.7, 10)
        with pytest.raises(RuntimeError):
            await one.check_health()

    asyncio.run(scene())


def test_decoded_images_that_wait_are_bounded(
    detectors: dict[str, FakeDetector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 8  # images of max_pixels
    num_decoded = 0

    def counted(*args: Any) -> Any:
        nonlocal num_decoded
        num_decoded += 1
        return decode(*args)

    monkeypatch.setattr(replica.images, "decode", counted)

    async def scene() -> list[Any]:
        one = Replica({"max_batch_size": 4 * most, "max_pixels": IMAGE.shape[0] * IMAGE.shape[1]}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        detectors["a"].hold()
        requests = [asyncio.create_task(one.detect(encode_png(IMAGE), 0.5, 0.7, 10)) for _ in range(4 * most)]
        await asyncio.to_thread(detectors["a"].has_begun.wait, 60)
        for _ in range(3):  # the threads take work in turn: all that was there before has begun
            await asyncio.get_running_loop().run_in_executor(one._image_threads, int)
        assert num_decoded <= most
        detectors["a"].may_end.set()
        return await asyncio.gather(*requests)

    answers = asyncio.run(scene())

    assert all(isinstance(answer, Answer) for answer in answers)
    assert num_decoded == 4 * most


def test_a_room_lets_in_what_fits_in_the_order_of_arrival() -> None:
    inside: list[str] = []

    async def visit(room: Room, name: str, size: int, leave: asyncio.Event) -> None:
        async with room.hold(size):
            inside.append(name)
            await leave.wait()
        inside.remove(name)

    async def settle() -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def scene() -> None:
        room, events = Room(10), {name: asyncio.Event() for name in "abcdef"}
        sizes = {"a": 6, "b": 6, "c": 4, "d": 99, "e": 1, "f": 1}
        tasks = {name: asyncio.create_task(visit(room, name, sizes[name], events[name])) for name in "abcdef"}
        await settle()
        assert inside == ["a"]  # b does not fit, and nobody goes before it
        tasks["b"].cancel()
        await settle()
        assert inside == ["a", "c"]
        events["a"].set()
        events["c"].set()
        await settle()
        assert inside == ["d"]  # larger than the room: alone
        tasks["d"].cancel()
        await settle()
        assert inside == ["d", "e", "f"]
        events["e"].set()
        events["f"].set()
        await settle()
        async with asyncio.timeout(60), room.hold(10):
            pass

    asyncio.run(scene())


@pytest.mark.parametrize("request_timeout_s", [1e-9, 3600])
def test_a_forward_pass_that_hangs_is_unhealthy(
    detectors: dict[str, FakeDetector], tmp_path: Path, request_timeout_s: float
) -> None:
    async def scene() -> None:
        one = Replica({"request_timeout_s": request_timeout_s}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        await one.check_health()
        detectors["a"].hold()
        running = asyncio.create_task(one.detect(encode_png(IMAGE), 0.5, 0.7, 10))
        await asyncio.to_thread(detectors["a"].has_begun.wait, 60)
        if request_timeout_s < 1:
            with pytest.raises(RuntimeError, match="a forward pass has run for more than"):
                await one.check_health()
        else:
            await one.check_health()  # busy, not hanging
        detectors["a"].may_end.set()
        await running
        await one.check_health()

    asyncio.run(scene())


def test_weights_that_kill_who_loads_them_cost_no_replica(
    detectors: dict[str, FakeDetector],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Killer:
        def __reduce__(self) -> Any:
            return signal.raise_signal, (signal.SIGSEGV,)

    torch.save({"model": Killer()}, tmp_path / "killer.pt")

    async def scene() -> dict[str, Any]:
        one = Replica({}, "cpu", trusted=True)
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        await one.reconfigure({"weights": str(tmp_path / "killer.pt")})
        return await one.info()

    with caplog.at_level("ERROR", "ray.serve"):
        info = asyncio.run(scene())

    assert info["name"] == "a.pt"
    assert "a process that loads these weights is killed by SIGSEGV" in caplog.text


def test_the_shapes_of_most_pictures_are_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "WARM_UP_S", 3600)
    shapes: list[tuple[int, ...]] = []

    class Model(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(images.shape[2:]))
            return torch.rand(len(images), 6, 20)

    detector = Detector(Model(), ["cat", "dog"], imgsz=640)

    loading.warm_up(detector)

    warm = set(shapes)
    assert len(warm) == len(shapes) == 7
    pictures = [(480, 640), (3000, 4000), (2000, 3000), (1080, 1920), (1000, 1000)]
    for height, width in pictures + [(width, height) for height, width in pictures]:
        detector([np.zeros((height, width, 3), np.uint8)])
    assert set(shapes) == warm
    for is_square, seconds in ((True, 3600), (False, -1)):  # an export of one shape; a slow model
        shapes.clear()
        detector.square = is_square
        monkeypatch.setattr(loading, "WARM_UP_S", seconds)
        loading.warm_up(detector)
        assert shapes == [(640, 640)]


# --- readiness ---------------------------------------------------------------------------------------------------------------------------


def test_a_busy_service_is_ready(client: TestClient, service: FakeService) -> None:
    service.error = BusyError("too many requests wait already")
    assert is_problem(client.get("/v1/model"), 503)
    assert client.get("/readyz").status_code == 200
    service.works = False
    response = client.get("/readyz")
    assert is_problem(response, 503)
    assert response.headers["retry-after"] == "1"
    assert client.get("/livez").status_code == 200


def test_readiness_is_what_serve_last_said(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, int] | None = {"STARTING": 2}

    def status() -> ServeStatus:
        if states is None:
            raise RuntimeError("the controller is gone")
        detector = DeploymentStatusOverview(DeploymentStatus.UPDATING, "CONFIG_UPDATE_STARTED", states, "")
        application = ApplicationStatusOverview(
            ApplicationStatus.DEPLOYING, "", 0.0, {"Detector": detector, "Ingress": detector}
        )
        return ServeStatus({}, {"raypar": application})

    monkeypatch.setattr(replica.serve, "status", status)
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="raypar"))
    ingress: Any = Ingress(None, Limits(), ())  # type: ignore[arg-type]
    client = TestClient(ingress.__serve_build_asgi_app__())

    assert client.get("/readyz").status_code == 503
    for states, is_ready in (
        ({"RUNNING": 1, "STARTING": 1}, True),
        (None, True),  # nothing new is known
        ({"UPDATING": 1}, True),  # serves, while it loads other weights
        ({"STOPPING": 2, "STARTING": 2}, False),
        (None, False),
    ):
        asyncio.run(ingress.check_health())
        assert (client.get("/readyz").status_code == 200) == is_ready, states


def test_the_model_does_not_block_the_event_loop(detectors: dict[str, FakeDetector], tmp_path: Path) -> None:
    num_threads = threading.active_count()  # earlier tests may have left some

    async def scene() -> None:
        one = Replica({}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        detectors["a"].hold()
        running = asyncio.create_task(one.annotate(encode_png(IMAGE), 0.5, 0.7, 10))
        await asyncio.to_thread(detectors["a"].has_begun.wait, 60)
        await one.info()
        assert not running.done()  # the loop answered while the model was busy
        detectors["a"].may_end.set()
        answer = await running
        assert decode(answer.jpeg).shape == IMAGE.shape

    asyncio.run(scene())
    # one that loads, one for the model, some for images, and that of this test
    assert threading.active_count() <= num_threads + 3 + replica.IMAGE_THREADS


# --- starting and stopping ---------------------------------------------------------------------------------------------------------------


class FakeServe:
    """Ray Serve: the applications that it runs, and what was done to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_running: bool) -> None:
        self.is_running, self.host, self.port = is_running, "127.0.0.1", 8000
        self.applications: dict[str, Any] = {}
        self.route_prefixes: dict[str, str | None] = {}
        self.done: list[str] = []
        self.failure = ""
        for name in ("start", "run", "delete", "shutdown", "status"):
            monkeypatch.setattr(f"ray.serve.{name}", getattr(self, name))
        monkeypatch.setattr(raypar.serve, "_running_serve", self.running)
        monkeypatch.setattr(raypar.serve, "build_app", lambda _: None)

    def running(self) -> raypar.serve.RunningServe | None:
        if not self.is_running:
            return None
        return raypar.serve.RunningServe(self.host, self.port, True, False, dict(self.route_prefixes))

    def add(self, name: str, route_prefix: str) -> None:
        deployment = SimpleNamespace(message=self.failure)
        self.applications[name] = SimpleNamespace(
            last_deployed_time_s=float(len(self.done)), deployments={"Detector": deployment}
        )
        self.route_prefixes[name] = route_prefix

    def start(self, **options: Any) -> None:
        self.is_running = True
        self.done.append("start")

    def run(self, app: None, *, name: str, route_prefix: str) -> None:
        self.done.append(f"run {name}")
        self.add(name, route_prefix)
        if self.failure:
            raise RuntimeError(f"Deploying application {name} failed")

    def delete(self, name: str) -> None:
        self.done.append(f"delete {name}")
        del self.applications[name], self.route_prefixes[name]

    def shutdown(self) -> None:
        self.done.append("shutdown")

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications)


def service_config(tmp_path: Path, name: str, **settings: Any) -> RunConfig:
    return RunConfig.model_validate({"name": name, "storage": str(tmp_path), "serve": settings})


def test_serve_is_shut_down_by_who_started_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = FakeServe(monkeypatch, is_running=False)
    first = raypar.serve.start(service_config(tmp_path, "first"))
    second = raypar.serve.start(service_config(tmp_path, "second", route_prefix="/second", port=9000))
    assert (first.url, second.url) == ("http://127.0.0.1:8000", "http://127.0.0.1:8000/second")
    raypar.serve.stop(first)
    raypar.serve.stop(second)
    assert fake.done == ["start", "run first", "run second", "delete first", "delete second"]
    raypar.serve.stop(raypar.serve.start(service_config(tmp_path, "third")))
    assert "shutdown" not in fake.done  # it ran before
    fake.is_running, fake.done = False, []
    raypar.serve.stop(raypar.serve.start(service_config(tmp_path, "fourth")))
    assert fake.done == ["start", "run fourth", "delete fourth", "shutdown"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name=running: a service of this name runs on this Ray already"),
        (
            {"route_prefix": "/used/"},
            r"serve.route_prefix=/used/: the service 'running' answers there already",
        ),
    ],
)
def test_another_service_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    fake = FakeServe(monkeypatch, is_running=True)
    fake.add("running", "/used")
    name = "running" if not settings else "new"

    with pytest.raises(ValueError, match=message):
        raypar.serve.run(service_config(tmp_path, name, **settings))

    assert fake.done == []


def test_a_service_that_another_one_replaced_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeServe(monkeypatch, is_running=True)
    service = raypar.serve.start(service_config(tmp_path, "run"))
    fake.done.append("another deployment")
    fake.add("run", "/")

    raypar.serve.stop(service)

    assert "run" in fake.applications


def test_a_start_that_fails_takes_down_only_what_it_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = FakeServe(monkeypatch, is_running=True)
    fake.add("other", "/other")
    fake.failure = (
        "Retrying.\nTraceback (most recent call last):\n  File x\nValueError: weights w.pt cannot be read"
    )

    with pytest.raises(ValueError, match=r"^the service could not be started: weights w.pt cannot be read$"):
        raypar.serve.run(service_config(tmp_path, "run"))

    assert fake.done == ["run run", "delete run"]


# --- the deploy file ---------------------------------------------------------------------------------------------------------------------


def test_the_deploy_file_fits_rays_schema_and_builds() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "jobs" / "serve.yaml").read_text()
    assert text.splitlines()[0].startswith("# serve deploy jobs/serve.yaml")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    assert application.import_path == "raypar.serve:build_app"
    app = raypar.serve.build_app(application.args)  # unknown settings raise
    assert app._bound_deployment.name == "Ingress"
    assert {d.name for d in application.deployments} == {"Detector"}
    with pytest.raises(ValueError, match="max_batch"):
        raypar.serve.build_app({"max_batch": 3})
