"""What stands before the replicas: reads which adapter a request is for, and hands it to a replica that has it.

It knows nothing of models, and its process does not load PyTorch.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from .asgi import portable
from .metrics import CONTENT_TYPE, together
from .protocol import ApiError, error_body

ASKS = ("/v1/completions", "/v1/chat/completions")  # requests that name an adapter in their bodies

log = logging.getLogger("ray.serve")


class Ingress:
    """The first deployment of the application.

    Args:
        replicas: a handle on the others, whose ``respond`` runs a request.
        base: the model that every replica has.
        body_bytes, upload_bytes: what a request and an upload may have.
    """

    def __init__(self, replicas: Any, base: str, body_bytes: int, upload_bytes: int) -> None:
        self._replicas, self._base = replicas, base
        self._body_bytes, self._upload_bytes = body_bytes, upload_bytes

    async def __call__(self, http: Request) -> Response:
        try:
            if http.url.path == "/metrics":
                return PlainTextResponse(await self._metrics(), media_type=CONTENT_TYPE)
            return await self._pass_on(http)
        except Exception as error:
            told = _told_as(error)
            return JSONResponse(error_body(told.status_code, told.detail, told.code), told.status_code, told.headers)

    async def _metrics(self) -> str:
        pages = await self._replicas.broadcast("metrics").results_async(return_exceptions=True)
        return together(dict(page for page in pages if not isinstance(page, BaseException)))  # one may have died

    async def _pass_on(self, http: Request) -> Response:
        body = await self._body(http)
        name = _model(body) if http.url.path in ASKS else ""
        handle = self._replicas.options(stream=True, multiplexed_model_id="" if name == self._base else name)
        answer = handle.respond.remote(portable(http.scope), body)
        try:
            head = await anext(answer)
        except asyncio.CancelledError:  # the client has gone
            answer.cancel()
            raise
        response = StreamingResponse(_pieces(answer, head), head.status)
        response.raw_headers = head.headers
        return response

    async def _body(self, http: Request) -> bytes:
        most = self._upload_bytes if http.url.path.startswith("/v1/adapters") else self._body_bytes
        body = bytearray()
        async for piece in http.stream():
            body += piece
            if len(body) > most:
                raise ApiError(413, f"the body of a request may have {most} bytes", headers={"Connection": "close"})
        return bytes(body)


def _model(body: bytes) -> str:
    """What a request asks for; nothing where it is wrong, which the replica finds out and says."""
    try:
        name = json.loads(body)["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) and len(name) <= 300 else ""


async def _pieces(answer: Any, head: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in answer:
            yield piece
    except Exception as error:
        if (b"content-type", b"text/event-stream; charset=utf-8") not in head.headers:
            raise
        told = _told_as(error)  # the status has been sent
        yield f"data: {json.dumps(error_body(told.status_code, told.detail, told.code))}\n\ndata: [DONE]\n\n".encode()
    except BaseException:  # the client has gone
        answer.cancel()
        raise


def _told_as(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BackPressureError):
        return ApiError(
            429, "too many requests wait already: try again later", "rate_limit_exceeded", {"Retry-After": "1"}
        )
    log.error("a request failed", exc_info=error)
    if isinstance(error, RayActorError):
        return ApiError(503, "the replica of this request has ended: try again", "replica_lost", {"Retry-After": "1"})
    return ApiError(500, "an error of the service", "internal_error")
