"""The service without Ray: routes, errors, limits and keys over a fake model; the replica's batches over a fake detector."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fastapi.testclient import TestClient

import raypar.serve
from raypar.config import RunConfig
from raypar.detector import Detections, Detector
from raypar.images import decode, encode_jpeg, encode_png
from raypar.serve import replica
from raypar.serve.api import Answer, Limits, build_api, digest
from raypar.serve.batch import Batcher
from raypar.serve.problem import BadImageError, BusyError
from raypar.serve.replica import Replica

JPEG = {"Content-Type": "image/jpeg"}
MODEL = {"name": "fake", "sha256": "0" * 64}
IMAGE = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)


class FakeDetector:
    """Answers each image with one box whose confidence is the image's conf; fails a batch that holds a wholly red image."""

    def __init__(self, class_names: Sequence[str] = ("cat", "dog"), seconds: float = 0.0) -> None:
        self.class_names, self.imgsz, self.task = list(class_names), 32, "detect"
        self.seconds, self.batches = seconds, list[int]()
        self.is_broken, self.square = False, False

    def warm_up(self, batch_size: int = 1) -> None:
        if self.is_broken:
            raise RuntimeError("the model failed")

    def __call__(
        self, images: Sequence[Any], *, conf: Any = None, iou: Any = None, max_det: Any = None
    ) -> list[Detections]:
        self.batches.append(len(images))
        time.sleep(self.seconds)
        if self.is_broken or any((image == (255, 0, 0)).all() for image in images):
            raise RuntimeError("the model failed")
        confs = conf or [0.5] * len(images)
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
        self.wait_s = 0.0

    async def detect(self, data: bytes, conf: float, iou: float, max_det: int) -> Answer:
        self.calls.append((data, conf, iou, max_det))
        await asyncio.sleep(self.wait_s)
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


def client_of(service: FakeService, keys: Sequence[str] = (), **limits: Any) -> TestClient:
    api = build_api(
        service.detect, service.annotate, service.info, Limits(**limits), [digest(key) for key in keys]
    )
    return TestClient(api, raise_server_exceptions=False)


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
        client.get("/readyz"),
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
    api = build_api(service.detect, service.annotate, service.info, Limits(request_timeout_s=0.1))
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
    host: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        serve = {"host": host, "port": taken.getsockname()[1]}
        config = RunConfig.model_validate({"name": "run", "storage": str(tmp_path), "serve": serve})
        (config.folder / "train").write("best.pt", b"PK\3\4 weights")
        monkeypatch.setattr(raypar.serve, "read_facts", lambda *_, **__: None)
        with pytest.raises(ValueError, match=f"serve.port={serve['port']}: nothing can listen there"):
            raypar.serve.check(config)
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        raypar.serve.check(config)  # another machine's port
    if host == "127.0.0.1":
        monkeypatch.delenv("RAY_ADDRESS")
        raypar.serve.check(config)


# --- batches -----------------------------------------------------------------------------------------------------------------------------


def test_what_comes_while_the_model_is_busy_is_one_batch() -> None:
    sizes: list[int] = []
    is_released = threading.Event()

    def run(items: Sequence[int]) -> list[int]:
        sizes.append(len(items))
        if len(sizes) == 1:
            assert is_released.wait(60)
        return [item * 10 for item in items]

    async def scene() -> list[int]:
        batcher = Batcher(run, ThreadPoolExecutor(1), max_size=8, wait_s=0.001)
        tasks = [asyncio.create_task(batcher(0))]
        while not sizes:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher(i)) for i in range(1, 12)]  # while the first is computed
        for _ in range(20):
            await asyncio.sleep(0.001)
        is_released.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(scene()) == [i * 10 for i in range(12)]
    assert sizes == [1, 8, 3]


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


def test_weights_are_swapped_beside_running_requests(
    detectors: dict[str, FakeDetector], tmp_path: Path
) -> None:
    detectors["a"].seconds = 0.2

    async def scene() -> None:
        one = Replica({}, "cpu")
        with pytest.raises(ValueError, match="it takes 'weights'"):
            await one.reconfigure({})
        await one.reconfigure({"weights": str(tmp_path / "a.pt"), "name": "first"})
        running = asyncio.create_task(one.detect(encode_png(IMAGE), 0.5, 0.7, 10))
        await asyncio.sleep(0.1)
        await one.reconfigure({"weights": str(tmp_path / "b.pt")})
        assert not running.done()
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


def test_the_model_does_not_block_the_event_loop(detectors: dict[str, FakeDetector], tmp_path: Path) -> None:
    detectors["a"].seconds = 0.5
    num_threads = threading.active_count()  # earlier tests may have left some

    async def scene() -> None:
        one = Replica({}, "cpu")
        await one.reconfigure({"weights": str(tmp_path / "a.pt")})
        running = asyncio.create_task(one.annotate(encode_png(IMAGE), 0.5, 0.7, 10))
        await asyncio.sleep(0.05)
        await one.info()
        assert not running.done()  # the loop answered while the model was busy
        answer = await running
        assert decode(answer.jpeg).shape == IMAGE.shape

    asyncio.run(scene())
    # one that loads, one for the model, some for images
    assert threading.active_count() <= num_threads + 2 + replica.IMAGE_THREADS


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
