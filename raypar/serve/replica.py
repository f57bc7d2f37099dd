"""The two deployments: ``Ingress`` speaks HTTP, ``Replica`` holds the model and joins the images of all clients into batches.

Runs in: Serve replicas. Images are decoded and drawn on a few threads; the model runs on a thread of its own, so that no event loop waits
for it. A broken image fails alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.fs as pafs
import ray.exceptions
from ray import serve
from ray.serve import metrics
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from raypar import draw, images
from raypar.config import Autoscaling, ServeConfig
from raypar.image_header import check_header
from raypar.serve import loading
from raypar.serve.api import Answer, build_api
from raypar.serve.batch import Batcher
from raypar.serve.body import Limits
from raypar.serve.problem import BadImageError, BusyError, bad_image
from raypar.serve.room import Room
from raypar.storage import Folder

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.handle import DeploymentHandle
    from ray.serve.schema import ApplicationStatusOverview

    from raypar.detector import Detections, Detector

T = TypeVar("T")

log = logging.getLogger("ray.serve")

DETECTOR = "Detector"  # the deployment
WORKING = (
    "RUNNING",
    "UPDATING",
    "PENDING_MIGRATION",
)  # states of a replica; UPDATING: it loads other weights
IMAGE_THREADS = 4  # decoding and drawing let go of the GIL
HELD_IMAGES = 8  # of max_pixels, decoded at a time: 1.2 GB at the default; smaller ones are more
ATTEMPTS = 3  # replicas that a request is sent to, one after the other, when they die
BOX_DIGITS, CONFIDENCE_DIGITS = 2, 5
BATCH_SIZES = [1.0, 2, 4, 8, 16, 32, 64, 128]
FORWARD_SECONDS = [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


class Ingress:
    """HTTP: checks what comes in and hands it to a replica.

    Whether a detector works is known from Serve's controller, not from asking one, which would wait behind the other requests.

    Args:
        detector: of the deployment ``Detector``.
        limits: of :func:`raypar.serve.api.build_api`.
        key_digests: sha256 of each accepted API key; none leaves the service open.
    """

    def __init__(
        self, detector: DeploymentHandle[Any], limits: Limits, key_digests: tuple[bytes, ...]
    ) -> None:
        self._detector, self._limits, self._key_digests = detector, limits, key_digests
        self._is_ready, self._refreshing = False, asyncio.Lock()

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it
        return build_api(
            self._detect,
            self._annotate,
            self._info,
            self._limits,
            self._key_digests,
            is_ready=self._ready,
        )

    async def check_health(self) -> None:
        """Never fails; Serve calls it at the start and every few seconds, which keeps the answer of ``/readyz`` up to date."""
        await self._refresh()

    async def _ready(self) -> bool:
        if not self._is_ready:  # that may have changed just now
            await self._refresh()
        return self._is_ready

    async def _refresh(self) -> None:
        async with self._refreshing:
            try:
                status = await asyncio.to_thread(serve.status)
            except Exception:  # the controller is being restarted: the detectors go on
                log.warning("Serve's status is not available", exc_info=True)
                return
        application = status.applications.get(serve.get_replica_context().app_name)
        if application is not None:
            self._is_ready = has_detector(application)

    async def _detect(self, image: bytes, conf: float, iou: float, max_det: int) -> Answer:
        return await self._ask("detect", image, conf, iou, max_det)

    async def _annotate(self, image: bytes, conf: float, iou: float, max_det: int) -> Answer:
        return await self._ask("annotate", image, conf, iou, max_det)

    async def _info(self) -> dict[str, Any]:
        return await self._ask("info")

    async def _ask(self, method: str, *args: Any) -> Any:
        """A replica's answer; another one's if it dies meanwhile, for detecting twice changes nothing."""
        for _ in range(ATTEMPTS):
            try:
                answer = await getattr(self._detector, method).remote(*args)
            except BackPressureError as error:
                raise BusyError("too many requests wait already") from error
            except DeploymentUnavailableError as error:
                raise BusyError("the model could not be started: the service's log says why") from error
            except (ray.exceptions.RayActorError, ray.exceptions.ActorUnavailableError):
                continue
            if isinstance(answer, BadImageError):
                raise answer
            return answer
        raise BusyError("the replicas that worked on this request died")


def has_detector(application: ApplicationStatusOverview) -> bool:
    """Whether a replica has loaded its weights, and has not failed its health checks since."""
    detector = application.deployments.get(DETECTOR)
    return detector is not None and any(detector.replica_states.get(state, 0) for state in WORKING)


@dataclass(frozen=True)
class Loaded:
    """A detector, and the ``name`` and ``sha256`` of its weights."""

    detector: Detector
    model: dict[str, str]


@dataclass(frozen=True)
class Pending:
    """A decoded image (uint8 (H, W, 3) RGB) that waits for the model."""

    image: images.Image
    conf: float
    iou: float
    max_det: int


class Replica:
    """The deployment ``Detector``. Its weights come through ``user_config``: ``{"weights": path or URI, "name": what to call them}``.

    Args:
        settings: a :class:`ServeConfig` as a plain dict.
        device: ``cpu`` or ``cuda:0``; said outright, because Ray leaves GPUs visible to actors that asked for none.
        trusted: whether code that weights hold may run.
    """

    def __init__(self, settings: dict[str, Any], device: str, trusted: bool = False) -> None:
        self._config, self._device = ServeConfig.model_validate(settings), device
        self._trusted = trusted
        threads = _num_threads(self._config) if device == "cpu" else 1
        self._loaded: Loaded | None = None
        self._loader = ThreadPoolExecutor(1, "load", _set_num_threads, (threads,))
        self._model_thread = ThreadPoolExecutor(1, "model", _set_num_threads, (threads,))
        self._image_threads = ThreadPoolExecutor(IMAGE_THREADS, "images")
        self._pixels = Room(HELD_IMAGES * self._config.max_pixels)
        self._batch_size = metrics.Histogram(
            "raypar_batch_size", "Images in a forward pass.", boundaries=BATCH_SIZES
        )
        self._forward_s = metrics.Histogram(
            "raypar_forward_s", "Seconds of a forward pass.", boundaries=FORWARD_SECONDS
        )
        self._bad_images = metrics.Counter("raypar_bad_images", "Images that could not be decoded.")
        self._batched = Batcher(
            self._forward, self._model_thread, self._config.max_batch_size, self._config.batch_wait_s
        )
        self._is_suspect = False  # the last forward pass failed: the next health check tries the model
        self._forward_began: float | None = None  # time.monotonic() of the forward pass that runs

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Loads weights beside those in use, warms them up and swaps. Serve calls it at the start and when ``user_config`` changes.

        Weights that cannot be loaded stop a replica that starts, but not one that serves: it logs the error and goes on with what it has
        (Serve would otherwise replace it by one that cannot start). ``GET /v1/model`` tells which weights are in use.
        """
        try:
            self._loaded = await asyncio.get_running_loop().run_in_executor(
                self._loader, self._load, user_config
            )
        except Exception:
            if self._loaded is None:
                raise
            log.exception("keeping %s: %s cannot be loaded", self._loaded.model, user_config)
        else:
            log.info("serving %s from %s", self._loaded.model, user_config["weights"])

    async def check_health(self) -> None:
        """Raises when the model itself cannot run any more (a lost GPU, say) or hangs: Serve then replaces the replica.

        A forward pass hangs when it has run for ``request_timeout_s``: nobody waits for its answers any more.
        """
        if not self._batched.is_alive:
            raise RuntimeError("the loop that makes batches has ended")
        began = self._forward_began
        if began is not None and time.monotonic() - began > self._config.request_timeout_s:
            raise RuntimeError(f"a forward pass has run for more than {self._config.request_timeout_s:g} s")
        if self._is_suspect and self._loaded is not None:
            await asyncio.get_running_loop().run_in_executor(
                self._model_thread, self._loaded.detector.warm_up
            )
            self._is_suspect = False

    async def info(self) -> dict[str, Any]:
        """name, sha256, task, class_names and imgsz of the model in use."""
        detector = self._current.detector
        return {
            **self._current.model,
            "task": detector.task,
            "class_names": detector.class_names,
            "imgsz": detector.imgsz,
        }

    async def detect(self, image: bytes, conf: float, iou: float, max_det: int) -> Answer | BadImageError:
        """What is in an encoded image. A bad image is an answer, not an error of the replica."""
        return await self._answer(image, conf, iou, max_det, is_drawn=False)

    async def annotate(self, image: bytes, conf: float, iou: float, max_det: int) -> Answer | BadImageError:
        """What is in an encoded image, and the image with it drawn."""
        return await self._answer(image, conf, iou, max_det, is_drawn=True)

    @property
    def _current(self) -> Loaded:
        assert self._loaded is not None, "Serve calls reconfigure before it sends requests"
        return self._loaded

    async def _answer(
        self, image: bytes, conf: float, iou: float, max_det: int, *, is_drawn: bool
    ) -> Answer | BadImageError:
        try:
            header = await self._on_image_thread(check_header, image, self._config.max_pixels)
        except ValueError as error:
            return self._rejected(error)
        async with self._pixels.hold(header.height * header.width):
            try:
                pixels = await self._on_image_thread(images.decode, image)
            except ValueError as error:
                return self._rejected(error)
            answer = await self._batched(Pending(pixels, conf, iou, max_det))
            return await self._on_image_thread(_drawn, pixels, answer) if is_drawn else answer

    async def _on_image_thread(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._image_threads, work, *args)

    def _rejected(self, error: ValueError) -> BadImageError:
        self._bad_images.inc()
        return bad_image(error)

    def _forward(self, batch: Sequence[Pending]) -> list[Answer | Exception]:
        """One forward pass; if it fails, one for each image, so that only the culprit's request fails."""
        loaded, start = self._current, time.perf_counter()
        thresholds = {
            "conf": [p.conf for p in batch],
            "iou": [p.iou for p in batch],
            "max_det": [p.max_det for p in batch],
        }
        self._forward_began = time.monotonic()
        try:
            found = loaded.detector([p.image for p in batch], **thresholds)  # type: ignore[arg-type]
        except Exception as error:
            self._is_suspect = True
            log.exception("a forward pass of %d images failed", len(batch))
            return (
                [error]
                if len(batch) == 1
                else [answer for pending in batch for answer in self._forward([pending])]
            )
        finally:
            self._forward_began = None
        seconds = time.perf_counter() - start
        self._batch_size.observe(len(batch))
        self._forward_s.observe(seconds)
        return [Answer(_body(loaded, each), len(batch), seconds) for each in found]

    def _load(self, user_config: dict[str, Any]) -> Loaded:
        if not user_config.get("weights") or set(user_config) - {"weights", "name"}:
            raise ValueError(
                f"user_config of Detector is {user_config}: it takes 'weights' (a path or URI) and 'name'"
            )
        weights, config = str(user_config["weights"]), self._config
        with tempfile.TemporaryDirectory(prefix="raypar-serve-") as folder:
            local, sha256 = download(weights, Path(folder))
            if self._loaded is not None:  # else there is nothing to lose
                loading.try_in_child(local, config, self._device, trusted=self._trusted)
            detector = loading.load(local, config, self._device, trusted=self._trusted)
        return Loaded(
            detector, {"name": str(user_config.get("name") or Path(weights).name), "sha256": sha256}
        )


def download(weights: str, into: Path) -> tuple[Path, str]:
    """Copies weights, a file or the folder of an export, and hashes the copy: what is served is what was hashed.

    Returns:
        The local path, and the sha256 of the file, or of all names and files of the folder.

    Raises:
        ValueError: nothing is there.
    """
    source, name = Folder.holding(weights)
    is_export = _is_folder(source, name)
    names = source.list(name, recursive=True) if is_export else [name]
    if not names or not source.exists(name):
        raise ValueError(f"there are no weights at {weights}: every node that serves must reach them")
    sha256 = hashlib.sha256()
    for each in names:
        data = source.download(each, into / each).read_bytes()
        sha256.update(each.removeprefix(name).encode() + b"\0" + data if is_export else data)
    return into / name, sha256.hexdigest()


def _is_folder(parent: Folder, name: str) -> bool:
    """Whether the weights of that name are the folder of an export (OpenVINO's, say) and not a file."""
    return bool(parent.fs.get_file_info(f"{parent.path}/{name}").type == pafs.FileType.Directory)


def _body(loaded: Loaded, found: Detections) -> dict[str, Any]:
    height, width = found.image_hw
    rows = zip(found.class_ids.tolist(), found.confidences.tolist(), found.boxes_xyxy.tolist(), strict=True)
    names = loaded.detector.class_names
    detections = []
    for i, confidence, box in rows:
        rounded = round(confidence, CONFIDENCE_DIGITS), [round(v, BOX_DIGITS) for v in box]
        detections.append(
            {"class_id": i, "class_name": names[i], "confidence": rounded[0], "box_xyxy": rounded[1]}
        )
    return {"model": loaded.model, "image": {"height": height, "width": width}, "detections": detections}


def _drawn(image: images.Image, answer: Answer) -> Answer:
    import numpy as np

    found = answer.body["detections"]
    names = {each["class_id"]: each["class_name"] for each in found}
    boxes = np.array([each["box_xyxy"] for each in found], np.float32).reshape(-1, 4)
    ids = np.array([each["class_id"] for each in found], np.int32)
    confidences = np.array([each["confidence"] for each in found], np.float32)
    drawn = draw.boxes_on(
        image, boxes, ids, [names.get(i, "") for i in range(max(names, default=-1) + 1)], confidences
    )
    return replace(answer, jpeg=images.encode_jpeg(drawn))


def _num_threads(config: ServeConfig) -> int:
    """torch threads of a replica on a CPU: its share of the node's cores. (Ray would leave it one for each CPU reserved.)"""
    replicas = (
        config.num_replicas.max if isinstance(config.num_replicas, Autoscaling) else config.num_replicas
    )
    return config.threads_per_replica or max(
        len(os.sched_getaffinity(0)) // replicas, int(config.num_cpus), 1
    )


def _set_num_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)  # of the calling thread: OpenMP keeps one number for each
