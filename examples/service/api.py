"""HTTP: OpenAI's protocol, adapters brought and taken away, metrics, health."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastpeft.serving import AdapterInUseError, BankFullError, UnknownAdapterError

from .catalog import Catalog, CatalogFullError
from .engine import BusyError, Engine, StoppedError
from .generation import Generation
from .metrics import CONTENT_TYPE, Metrics
from .protocol import Answer, ApiError, Chat, Completion, Options, error_body, usage

FILES = ("config", "tensors")  # the parts of an upload, beside its name


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. How many run and wait, and how long they are, is the engine's."""

    body_bytes: int = 1 << 18
    upload_bytes: int = 64 << 20
    prompts: int = 8
    default_tokens: int = 256  # of an answer, where the request does not say
    shutdown_seconds: float = 20.0


class Service:
    """What the endpoints share.

    Args:
        token: what a client must show to bring or remove adapters; None: nobody may.
    """

    def __init__(
        self, engine: Engine, catalog: Catalog, tokenizer: Any, token: str | None, limits: Limits = Limits()
    ) -> None:
        self.engine, self.catalog, self.tokenizer, self.limits = engine, catalog, tokenizer, limits
        self.metrics = Metrics()
        self._token = token
        self._stop_tokens = frozenset({tokenizer.eos_token_id} - {None})
        self._vocabulary = engine.vocabulary

    async def answer(self, http: Request, body: Completion | Chat) -> Response:
        """Runs a request, and ends it when its client goes away."""
        chat = isinstance(body, Chat)
        prompts = [self._chat_tokens(body)] if isinstance(body, Chat) else self._prompt_tokens(body)
        with contextlib.ExitStack() as stack:  # what is in it ends with the answer, which may be a stream
            entry = stack.enter_context(self.catalog.using(body.model))
            generation = Generation(
                self.engine, self.tokenizer, self.metrics, prompts, entry.inner,
                [self._max_tokens(body, prompt) for prompt in prompts], body, self._stop_tokens,
            )  # fmt: skip
            stack.callback(generation.close)
            answer = Answer(body.model, chat)
            prompt_tokens = sum(map(len, prompts))
            if body.stream:
                return _Stream(self._chunks(body, answer, generation, len(prompts), prompt_tokens), stack.pop_all())
            texts, finishes = [""] * len(prompts), [""] * len(prompts)

            async def collect() -> None:
                async for piece in generation.pieces():
                    texts[piece.prompt] += piece.text
                    finishes[piece.prompt] = piece.finish or ""

            await _unless_gone(http, collect())
            return JSONResponse(answer.whole(texts, finishes, usage(prompt_tokens, generation.tokens)))

    async def _chunks(
        self, body: Options, answer: Answer, generation: Generation, count: int, prompt_tokens: int
    ) -> AsyncIterator[str]:
        try:
            if isinstance(body, Chat):
                for index in range(count):
                    yield _event(answer.chunk(index, "", first=True))
            async for piece in generation.pieces():
                yield _event(answer.chunk(piece.prompt, piece.text or None, piece.finish))
            if body.with_usage:
                yield _event(answer.usage_chunk(usage(prompt_tokens, generation.tokens)))
        except Exception as error:  # the status has been sent
            told = told_as(error)
            yield _event(error_body(told.status_code, told.detail, told.code))
        yield "data: [DONE]\n\n"

    def _chat_tokens(self, body: Chat) -> list[int]:
        messages = [message.plain() for message in body.messages]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _prompt_tokens(self, body: Completion) -> list[list[int]]:
        prompts = body.prompts()
        if len(prompts) > self.limits.prompts:
            raise ApiError(400, f"there may be {self.limits.prompts} prompts, got {len(prompts)}")
        tokens = [self.tokenizer(each)["input_ids"] if isinstance(each, str) else each for each in prompts]
        if any(max(each, default=0) >= self._vocabulary for each in tokens):
            raise ApiError(400, f"prompt has a token outside of the model's vocabulary of {self._vocabulary}")
        return tokens

    def _max_tokens(self, body: Options, prompt: list[int]) -> int:
        return body.limit or max(1, min(self.limits.default_tokens, self.engine.max_length - len(prompt)))

    def authorise(self, http: Request) -> None:
        if self._token is None:
            raise ApiError(403, "the service was started without a token: its adapters stay as they are")
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token.encode()):
            raise ApiError(401, "a bearer token is needed", "invalid_token", {"WWW-Authenticate": "Bearer"})

    def model_card(self, entry: Any) -> dict[str, Any]:
        card = {"id": entry.name, "object": "model", "created": entry.created, "owned_by": "fastpeft"}
        return card if entry.inner is None else {**card, "parent": self.catalog.base}

    def metrics_page(self) -> str:
        running, waiting = self.engine.load
        bank = self.catalog.bank.stats()
        counters = {
            **{f"engine_{name}": value for name, value in self.engine.counts.items()},
            **{f"bank_{name}": bank[name] for name in ("hits", "misses", "evictions")},
        }
        gauges = {
            "requests_running": running,
            "requests_waiting": waiting,
            **{f"adapters_{name}": bank[name] for name in ("registered", "resident", "in_use")},
            "bank_bytes": bank["bytes"],
            "bank_capacity_bytes": bank["capacity_bytes"],
        }
        return self.metrics.page(counters, gauges)


def create_app(service: Service) -> FastAPI:
    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.stop, service.limits.shutdown_seconds)

    app = FastAPI(title="fastpeft", lifespan=lifespan)
    app.add_middleware(_Guard, service=service)  # type: ignore[arg-type]
    for kind in (*_TOLD, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _respond)

    @app.post("/v1/completions")
    async def completions(http: Request, body: Completion) -> Response:
        return await service.answer(http, body)

    @app.post("/v1/chat/completions")
    async def chat_completions(http: Request, body: Chat) -> Response:
        return await service.answer(http, body)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.model_card(entry) for entry in service.catalog.entries()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return service.model_card(service.catalog.find(name))

    @app.post("/v1/adapters")
    async def upload(http: Request) -> dict[str, Any]:
        service.authorise(http)  # before anything of the body is read
        async with http.form(max_files=len(FILES), max_fields=1, max_part_size=1024) as form:
            name, config, tensors = _parts(form)
            await run_in_threadpool(service.catalog.upload, name, config.file, tensors.file)
        return service.model_card(service.catalog.find(name))

    @app.delete("/v1/adapters/{name:path}")
    async def remove(http: Request, name: str, even_in_use: bool = True) -> dict[str, Any]:
        service.authorise(http)
        await run_in_threadpool(service.catalog.remove, name, even_in_use=even_in_use)
        return {"id": name, "object": "model", "deleted": True}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.engine.alive:
            raise ApiError(503, "the engine has stopped")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics_page(), media_type=CONTENT_TYPE)

    return app


def _parts(form: FormData) -> tuple[str, UploadFile, UploadFile]:
    """Names of files are the client's own business and are not looked at."""
    name, files = form.get("name"), [form.get(each) for each in FILES]
    if not isinstance(name, str) or not all(isinstance(each, UploadFile) for each in files):
        raise ApiError(400, "an upload is a form (multipart/form-data) with a field name and files config and tensors")
    return name, *files  # type: ignore[return-value]


# Answers


class _Stream(StreamingResponse):
    """Server-sent events, and what ends with them, whether they are read to the end or not."""

    def __init__(self, chunks: AsyncIterator[str], ends: contextlib.ExitStack) -> None:
        super().__init__(chunks, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ends = ends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._ends:
            await super().__call__(scope, receive, send)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _unless_gone(http: Request, work: Any) -> None:
    """Awaits work; a client that goes away ends it."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ApiError(499, "the client has gone")
    finally:
        for task in tasks:
            task.cancel()


# Errors

# Whose fault an error is, and what it is called. The first that fits counts.
_TOLD: dict[type[Exception], tuple[int, str | None]] = {
    UnknownAdapterError: (404, "model_not_found"),
    BusyError: (429, "rate_limit_exceeded"),
    BankFullError: (429, "adapters_in_use"),
    AdapterInUseError: (409, "adapter_in_use"),
    CatalogFullError: (409, "too_many_adapters"),
    StoppedError: (503, "shutting_down"),
    FileNotFoundError: (400, "bad_adapter"),
    ValueError: (400, None),
}


def told_as(error: Exception) -> ApiError:
    """What a client is told of an error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return ApiError(400, f"{where}: {first['msg']}" if where else first["msg"])
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=dict(error.headers or {}))
    for kind, (status, code) in _TOLD.items():
        if isinstance(error, kind):
            return ApiError(status, str(error), code, {"Retry-After": "1"} if status == 429 else None)
    return ApiError(500, "an error of the service", "internal_error")


async def _respond(http: Request, error: Exception) -> JSONResponse:
    told = told_as(error)
    return JSONResponse(error_body(told.status_code, told.detail, told.code), told.status_code, told.headers)


class _Guard:
    """Around everything: bodies have a limit, every answer is counted, and what nobody foresaw is a JSON body too."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limits = self._service.limits
        endpoint = next((each for each in _ENDPOINTS if scope["path"].startswith(each)), "other")
        most = limits.upload_bytes if endpoint == "/v1/adapters" else limits.body_bytes
        came, status = 0, 0

        async def limited() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > most:
                raise ApiError(413, f"the body of a request may have {most} bytes", headers={"Connection": "close"})
            return message

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._service.metrics.responded(endpoint, status)
            await send(message)

        try:
            await self._app(scope, limited, counted)
        except Exception as error:
            if status:
                raise
            await (await _respond(Request(scope), error))(scope, receive, counted)
            if not isinstance(error, ApiError):
                raise  # for the log


_ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/adapters", "/health", "/metrics")
