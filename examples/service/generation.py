"""The prompts of one HTTP request: into the engine, and their texts out of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from .engine import Engine, Event, Request
from .metrics import Metrics
from .protocol import Options
from .sampling import Sampling
from .text import TextStream


class Piece(NamedTuple):
    prompt: int  # its number
    text: str
    finish: str | None  # with the last piece of a prompt


class Generation:
    """Submits all prompts at once; ``pieces`` gives their texts as they come. ``close`` ends what still runs.

    Args:
        prompts: token ids of each.
        adapter: the bank's name, or None.
        max_tokens: of each answer.

    Raises:
        As ``Engine.submit``; no prompt is left running then.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        metrics: Metrics,
        prompts: Sequence[Sequence[int]],
        adapter: str | None,
        max_tokens: Sequence[int],
        options: Options,
        stop_tokens: frozenset[int],
    ) -> None:
        self.tokens = 0  # that have come
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._texts = [TextStream(tokenizer, options.stops) for _ in prompts]
        self._last = [time.monotonic()] * len(prompts)
        self._started = [False] * len(prompts)
        self._requests: list[Request] = []
        try:
            for index, prompt in enumerate(prompts):
                seed = None if options.seed is None else options.seed + index
                request = Request(
                    prompt,
                    max_tokens[index],
                    self._receiver(index),
                    adapter,
                    Sampling(options.temperature, options.top_p, seed),
                    stop_tokens,
                )
                engine.submit(request)
                self._requests.append(request)
        except BaseException:
            self.close()
            raise

    def _receiver(self, index: int):
        return lambda event: self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    async def pieces(self) -> AsyncIterator[Piece]:
        """Raises what ended a request."""
        running = set(range(len(self._requests)))
        while running:
            index, event = await self._events.get()
            if index not in running:  # a stop string ended it while one more token came
                continue
            if event.error is not None:
                raise event.error
            piece = self._piece(index, event)
            if piece.finish is not None:
                running.discard(index)
                self._engine.cancel(self._requests[index])
            if piece.text or piece.finish is not None:
                yield piece

    def _piece(self, index: int, event: Event) -> Piece:
        stream, text = self._texts[index], ""
        if event.token is not None:
            self._measure(index)
            self.tokens += 1
            text = stream.feed(event.token)
        if stream.stopped:
            return Piece(index, text, "stop")
        if event.finish is not None:
            text += stream.finish()
        return Piece(index, text, "stop" if stream.stopped else event.finish)

    def _measure(self, index: int) -> None:
        now = time.monotonic()
        histogram = self._metrics.next_token if self._started[index] else self._metrics.first_token
        histogram.observe(now - self._last[index])
        self._last[index], self._started[index] = now, True

    def close(self) -> None:
        for request in self._requests:
            self._engine.cancel(request)
