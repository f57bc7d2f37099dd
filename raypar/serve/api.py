"""The HTTP routes of the service: an image in, JSON or JPEG out, errors as ``application/problem+json`` (RFC 9457).

Runs in: the ingress replicas of Ray Serve, or any ASGI server. Imports no Ray and no torch: what detects is a function it is given.
"""

import asyncio
import contextlib
import hashlib
import hmac
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import raypar
from raypar.serve.body import Limits, Receiver
from raypar.serve.problem import PROBLEMS, RETRY_AFTER, explain_errors, problems

MAX_DET = 3000  # the most boxes a request can ask for
READY_TIMEOUT_S = 2.0
PAGE_TYPES = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
        },
    }
}


class ModelName(BaseModel):
    """Which weights answered."""

    name: str
    sha256: str = Field(description="of the weights")


class ImageSize(BaseModel):
    """Of the upright image, px."""

    height: int
    width: int


class Detection(BaseModel):
    """One object."""

    class_id: int
    class_name: str
    confidence: float = Field(ge=0, le=1)
    box_xyxy: tuple[float, float, float, float] = Field(
        description="left, top, right, bottom, in px of the upright image"
    )


class DetectAnswer(BaseModel):
    """What is in an image, the most confident first."""

    model: ModelName
    image: ImageSize
    detections: list[Detection]


class ModelAnswer(ModelName):
    """The model that is loaded now, and the defaults of the query parameters."""

    task: str
    class_names: list[str]
    imgsz: int = Field(description="px of the longer side that images are scaled to")
    conf: float
    iou: float
    max_det: int


@dataclass(frozen=True)
class Answer:
    """What was found in one image.

    Attributes:
        body: a :class:`DetectAnswer` as a plain dict.
        batch_size: images in the forward pass that this one was part of.
        forward_s: seconds of that pass, NMS included.
        jpeg: the image with its objects drawn, where it was asked for.
    """

    body: dict[str, Any]
    batch_size: int
    forward_s: float
    jpeg: bytes | None = None


# (image, conf, iou, max_det); raises BadImageError, BusyError
Find = Callable[[bytes, float, float, int], Awaitable[Answer]]
Info = Callable[[], Awaitable[dict[str, Any]]]  # name, sha256, task, class_names, imgsz; raises BusyError


class Thresholds:
    """The query of a request."""

    def __init__(
        self,
        conf: Annotated[
            float | None, Query(ge=0, le=1, description="boxes below this confidence are dropped")
        ] = None,
        iou: Annotated[
            float | None, Query(ge=0, le=1, description="overlap above which the weaker box is dropped")
        ] = None,
        max_det: Annotated[
            int | None, Query(ge=1, le=MAX_DET, description="boxes kept, the most confident first")
        ] = None,
    ) -> None:
        self.conf, self.iou, self.max_det = conf, iou, max_det

    def resolved(self, limits: Limits) -> tuple[float, float, int]:
        """conf, iou and max_det, each the service's default where the request has none."""
        return (
            limits.conf if self.conf is None else self.conf,
            limits.iou if self.iou is None else self.iou,
            limits.max_det if self.max_det is None else self.max_det,
        )


def build_api(
    detect: Find,
    annotate: Find,
    info: Info,
    limits: Limits | None = None,
    key_digests: Iterable[bytes] = (),
    *,
    is_ready: Callable[[], Awaitable[bool]],
) -> FastAPI:
    """The service around four functions.

    Args:
        detect: finds the objects in an image whose header was checked.
        annotate: the same, and draws them.
        info: tells which model is loaded now.
        limits: sizes, times and defaults.
        key_digests: :func:`digest` of each accepted API key; none leaves the service open.
        is_ready: whether a detector works; answers from what is known already, not from asking one.
    """
    limits, digests = limits or Limits(), tuple(key_digests)
    api = FastAPI(
        title="raypar",
        version=raypar.__version__,
        summary="Object detection: Ultralytics YOLO on Ray",
        redoc_url=None,
    )
    explain_errors(api)
    _add_page(api)
    _add_probes(api, is_ready)
    receiver = Receiver(limits)

    async def check_key(request: Request) -> None:
        if digests and not _has_key(request, digests):
            detail = "send an accepted API key, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            raise HTTPException(401, detail, {"WWW-Authenticate": 'Bearer realm="raypar"'})

    async def find(how: Find, request: Request, query: Thresholds) -> Answer:
        deadline = asyncio.get_running_loop().time() + limits.request_timeout_s
        async with receiver.image(request, deadline) as image:
            return await _in_time(how(image, *query.resolved(limits)), deadline)

    takes_image: Any = {"dependencies": [Depends(check_key)], "openapi_extra": IMAGE_BODY}

    @api.post("/v1/detect", **takes_image, responses=problems(*PROBLEMS), response_model=DetectAnswer)
    async def detect_objects(request: Request, query: Annotated[Thresholds, Depends()]) -> Response:
        """The objects in an image."""
        answer = await find(detect, request, query)
        return JSONResponse(answer.body, headers=_timing(answer))

    picture: Any = {200: {"description": "The image with its objects drawn", "content": {"image/jpeg": {}}}}

    @api.post("/v1/annotate", **takes_image, responses=picture | problems(*PROBLEMS), response_class=Response)
    async def annotate_image(request: Request, query: Annotated[Thresholds, Depends()]) -> Response:
        """The image with its objects drawn."""
        answer = await find(annotate, request, query)
        return Response(answer.jpeg, media_type="image/jpeg", headers=_timing(answer))

    @api.get(
        "/v1/model",
        dependencies=[Depends(check_key)],
        responses=problems(401, 503, 504),
        response_model=ModelAnswer,
    )
    async def model() -> dict[str, Any]:
        """The model that is loaded now, and the defaults of the query parameters."""
        found = await _in_time(info(), asyncio.get_running_loop().time() + limits.request_timeout_s)
        return {**found, "conf": limits.conf, "iou": limits.iou, "max_det": limits.max_det}

    return api


def digest(key: str) -> bytes:
    """What is kept of an API key: equally long for all of them."""
    return hashlib.sha256(key.encode()).digest()


def _has_key(request: Request, digests: tuple[bytes, ...]) -> bool:
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    key = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    given = digest(key)
    # a list: every one is compared, whichever fits
    return any([hmac.compare_digest(given, each) for each in digests])


async def _in_time(work: Awaitable[Any], deadline: float) -> Any:
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise HTTPException(
            504, "the detector did not answer in time: try again, or with a smaller image", RETRY_AFTER
        ) from None


def _timing(answer: Answer) -> dict[str, str]:
    return {"Server-Timing": f"forward;dur={1000 * answer.forward_s:.1f}, batch;desc={answer.batch_size}"}


def _add_probes(api: FastAPI, is_ready: Callable[[], Awaitable[bool]]) -> None:
    @api.get("/livez")
    async def live() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "alive"}

    @api.get("/readyz", responses=problems(503))
    async def ready() -> dict[str, str]:
        """Whether a detector has loaded its weights and works; a busy one does."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READY_TIMEOUT_S):
                if await is_ready():
                    return {"status": "ready"}
        raise HTTPException(503, "no detector has loaded its weights and works", RETRY_AFTER)


def _add_page(api: FastAPI) -> None:
    for name, kind in PAGE_TYPES.items():
        text = (files("raypar.serve") / "page" / name).read_text(encoding="utf-8")
        path = "/" if name == "index.html" else f"/{name}"
        api.add_api_route(path, _page_file(text, kind), methods=["GET"], include_in_schema=False)


def _page_file(text: str, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page_file() -> Response:
        return Response(text, media_type=kind, headers=PAGE_HEADERS)

    return page_file
