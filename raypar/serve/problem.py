"""Errors as ``application/problem+json`` (RFC 9457).

Runs in: the ingress replicas.
"""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

log = logging.getLogger("ray.serve")

RETRY_AFTER = {"Retry-After": "1"}
PROBLEMS = {
    400: "not an image", 401: "no or wrong API key", 408: "the image came too slowly", 413: "too many bytes or pixels",
    415: "neither image/* nor a form", 422: "a bad parameter", 503: "full: try again after Retry-After", 504: "not answered in time",
}  # fmt: skip


class Problem(BaseModel):
    """An error."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class BadImageError(Exception):
    """The image cannot be decoded; the message tells why."""


def bad_image(error: ValueError) -> BadImageError:
    """What a client reads about an image that raypar refuses; the text of a library, which may name files and addresses, stays here."""
    if error.__cause__ is None:
        return BadImageError(str(error))
    return BadImageError("the image is damaged, or of a format that cannot be read")


class BusyError(Exception):
    """Nobody can take the request now; the message tells why."""


def explain_errors(api: FastAPI) -> None:
    """Makes every error a problem, those of FastAPI included."""

    @api.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return _problem(
            422, "; ".join(f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}" for e in error.errors())
        )

    @api.exception_handler(BadImageError)
    async def bad_image(_: Request, error: BadImageError) -> Response:
        return _problem(400, str(error))

    @api.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        return _problem(503, str(error), RETRY_AFTER)

    @api.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> Response:
        return _problem(400, "the client went away before its image was here")

    @api.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return _problem(500, "the service failed on this request: its log says why")


def _problem(status: int, detail: str, headers: Any = None) -> Response:
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail).model_dump()
    return JSONResponse(body, status, headers, media_type="application/problem+json")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these errors."""
    content = {"application/problem+json": {"schema": Problem.model_json_schema()}}
    return {status: {"description": PROBLEMS[status], "content": content} for status in statuses}
