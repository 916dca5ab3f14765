"""OpenAI's completions and chat protocol: what comes in, and the objects that go out."""

from __future__ import annotations

import itertools
import time
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import BaseModel, ConfigDict, Field, model_validator

# What clients may send and the service has not: fine as long as it asks for nothing. Every other field is refused.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none",),
    "store": (False,),
}
IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}

Stop = Annotated[str, Field(min_length=1, max_length=100)]


class ApiError(HTTPException):
    """An answer with an error in it, as OpenAI's are."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


class Options(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=300)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    @model_validator(mode="after")
    def _has_all_that_is_asked(self):
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value not in ASKS_NOTHING.get(name, ()):
                raise ValueError(f"{name} is not supported here with the value {value!r:.100}")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Completion(Options):
    """POST /v1/completions."""

    prompt: str | Tokens | Annotated[list[str | Tokens], Field(min_length=1)]

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item,return-value]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": role, "content": text}


class Chat(Options):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


_numbers = itertools.count(1)


class Answer:
    """The objects of one answer, whole or in chunks."""

    def __init__(self, model: str, chat: bool) -> None:
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{time.time_ns():x}{next(_numbers):x}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], finishes: list[str], usage: dict[str, int]) -> dict[str, Any]:
        choices: list[dict[str, Any]] = []
        for index, (text, finish) in enumerate(zip(texts, finishes, strict=True)):
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": usage}

    def chunk(self, index: int, text: str | None, finish: str | None = None, first: bool = False) -> dict[str, Any]:
        """Some of choice number index; its first chunk says who speaks."""
        if self._chat:
            said = {"role": "assistant"} if first else {}
            said |= {} if text is None else {"content": text}
            choice: dict[str, Any] = {"index": index, "delta": said}
        else:
            choice = {"index": index, "text": text or ""}
        return self._chunk([{**choice, "logprobs": None, "finish_reason": finish}])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }
