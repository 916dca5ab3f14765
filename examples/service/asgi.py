"""A request to an ASGI application that runs in another process: what of it travels, and the answer piece by piece."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Scope

TRAVELS = (
    "type",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)

log = logging.getLogger("ray.serve")


class Head(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]


def portable(scope: Scope) -> dict[str, Any]:
    """A request's scope without what belongs to the server that took it."""
    return {key: scope[key] for key in TRAVELS if key in scope}


async def answer(app: ASGIApp, scope: Scope, body: bytes) -> AsyncIterator[Head | bytes]:
    """Runs a request whose body has come. The head of the answer comes first, then its body as it is made.

    A client that goes away ends this by cancelling it.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    bodies = [body]

    async def receive() -> Message:
        if not bodies:
            await asyncio.Event().wait()  # nothing more comes
        return {"type": "http.request", "body": bodies.pop(), "more_body": False}

    task = asyncio.ensure_future(app(scope, receive, messages.put))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    whole = False
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], list(message.get("headers", ())))
            elif piece := message.get("body", b""):
                yield piece
            whole = whole or (message["type"] == "http.response.body" and not message.get("more_body", False))
        if error := task.exception():
            if not whole:
                raise error
            log.error("a request failed, and was told so", exc_info=error)
    finally:
        task.cancel()
        await asyncio.wait([task])
