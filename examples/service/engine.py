"""One decode loop for many requests, each with an adapter of its own or none.

Requests join and leave between steps. A step begins those that have come, their prompts in one batch, and then adds a
token to every request that runs, in another. The loop runs on a thread of its own and knows tokens only. It works
for any causal model of transformers whose attention is full.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.serving import AdapterBank, BankFullError, Plan

from .cache import RowCache
from .sampling import Sampling, choose


class BusyError(RuntimeError):
    """Too many requests wait."""


class StoppedError(RuntimeError):
    """The engine stops, or has stopped."""


class Event(NamedTuple):
    """What happens to a request: a token, an end, or both. The last event has a finish or an error."""

    token: int | None = None
    finish: str | None = None  # "stop": a stop token came; "length": max_tokens have come
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """A prompt to go on with.

    Attributes:
        prompt: token ids, at least one.
        adapter: a name in the bank, or None. It must mean one adapter for as long as the request runs.
        emit: called from the engine's thread with each event; it must return at once.
        stop_tokens: tokens that end the answer, and are no part of it.
    """

    prompt: Sequence[int]
    max_tokens: int
    emit: Callable[[Event], None]
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.last = 0  # the token that comes in next
        self.made = 0
        self.cancelled = self.ended = False
        self.fetched: Future[None] | None = None  # its adapter, asked for when it was submitted
        self.lease: Plan | None = None  # keeps its adapter in place while it runs


class Engine:
    """Runs requests on a model that an AdapterBank serves.

    Args:
        max_rows: how many requests run at a time.
        max_length: tokens of a prompt and its answer together.
        max_waiting: how many requests may wait for a row.
        prefill_tokens: how many tokens of prompts, padding included, one step begins; a longer one comes alone.

    Raises:
        ValueError: the model's attention is not full.
    """

    def __init__(
        self,
        model: nn.Module,
        bank: AdapterBank,
        *,
        max_rows: int = 16,
        max_length: int = 1024,
        max_waiting: int = 64,
        prefill_tokens: int = 512,
    ) -> None:
        config: Any = model.config
        usual = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
        kinds = set(getattr(config, "layer_types", None) or [usual])
        if kinds != {"full_attention"}:
            raise ValueError(f"model must have full attention in every layer, got {sorted(kinds)}")
        longest = getattr(config, "max_position_embeddings", max_length)
        self.max_rows, self.max_length = max_rows, min(max_length, longest)
        self.max_waiting, self.prefill_tokens = max_waiting, prefill_tokens
        self.counts = dict.fromkeys(["requests", "prompt_tokens", "tokens", "steps", "cancelled", "failed"], 0)
        self.bank = bank
        self.vocabulary: int = config.vocab_size
        self._model = model
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._cache = RowCache(config.num_hidden_layers, max_rows, self.max_length)
        self._changed = threading.Condition()  # guards what follows
        self._waiting: list[Request] = []
        self._running: list[Request] = []  # by row; changed by the engine's thread only
        self._stopping = self._stopped = False
        self._blocked = False  # the bank has no room beside those that run
        self._routed = contextlib.ExitStack()  # the route of the requests that run
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return len(self._running), len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
            ValueError: it is too long, or empty.
            BusyError: too many wait.
            StoppedError: the engine stops.
        """
        most = self.max_length - len(request.prompt)
        if not request.prompt or not 1 <= request.max_tokens <= most:
            raise ValueError(
                f"the prompt and max_tokens must be at least 1 token each and at most {self.max_length} together, got "
                f"{len(request.prompt)} and {request.max_tokens}"
            )
        with self._changed:
            if self._stopping:
                raise StoppedError("the service is shutting down")
            if len(self._waiting) >= self.max_waiting:
                raise BusyError(f"{len(self._waiting)} requests wait already: try again later")
            if request.adapter is not None:
                request.fetched = self.bank.prefetch(request.adapter)
            self._waiting.append(request)
            self.counts["requests"] += 1
            self._changed.notify_all()
        if request.fetched is not None:
            request.fetched.add_done_callback(self._wake)

    def cancel(self, request: Request) -> None:
        """Ends a request before the next step, without a further event. One that has ended stays so."""
        if not request.ended:
            request.cancelled = True
            self._wake()

    def stop(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets those that came finish for so many seconds, and ends the others."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._stopping = True
            while (self._running or self._waiting) and self._thread.is_alive() and time.monotonic() < deadline:
                self._changed.wait(min(0.1, timeout))
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _wake(self, *_: object) -> None:
        with self._changed:
            self._changed.notify_all()

    # The engine's thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    self._turn()
        finally:
            with self._changed:
                self._stopping = self._stopped = True
                left = self._waiting + self._running
            for request in left:
                self._end(request, Event(error=StoppedError("the service has shut down")))
            self._running.clear()
            self._routed.close()

    def _wait(self) -> bool:
        """For something to do; whether to go on."""
        with self._changed:
            while not (self._stopped or self._running or any(map(_may_start, self._waiting))):
                self._changed.wait()
            return not self._stopped

    def _turn(self) -> None:
        for request in list(self._waiting):
            if request.cancelled:
                self._end(request)
        self._leave([request.cancelled for request in self._running])
        if joining := self._admitted():
            self._attempt(joining, self._begin)
        if self._running:
            self._attempt(list(self._running), self._step)

    def _attempt(self, requests: list[Request], work: Callable[[list[Request]], None]) -> None:
        """An error that is no request's own ends those that were worked on, and no others."""
        try:
            work(requests)
        except Exception as error:  # whatever it is, the loop goes on
            for request in requests:
                self._end(request, Event(error=error))
            self._leave([request.ended for request in self._running])

    def _admitted(self) -> list[Request]:
        """Those that begin now; each has a lease on its adapter."""
        joining: list[Request] = []
        longest = 0
        for request in list(self._waiting):
            if not _may_start(request):
                continue
            longest = max(longest, len(request.prompt))
            full = len(self._running) + len(joining) == self.max_rows
            if full or self._blocked or (joining and longest * (len(joining) + 1) > self.prefill_tokens):
                break
            try:
                if request.adapter is not None:
                    request.lease = self.bank.plan([request.adapter], timeout=0)
            except Exception as error:
                if isinstance(error, BankFullError) and (self._running or joining):
                    self._blocked = True  # until one of those ends
                else:
                    self._end(request, Event(error=error))
            else:
                joining.append(request)
        with self._changed:
            self._waiting = [request for request in self._waiting if request not in joining]
        return joining

    def _begin(self, joining: list[Request]) -> None:
        lengths = [len(request.prompt) for request in joining]
        tokens = torch.zeros(len(joining), max(lengths), dtype=torch.long)
        for row, request in zip(tokens, joining, strict=True):
            row[: len(request.prompt)] = torch.tensor(request.prompt)
        ends, at = torch.tensor([length - 1 for length in lengths]).unique(return_inverse=True)
        positions = torch.arange(tokens.shape[1], device=self._device)[None]
        self._cache.begin(lengths)
        self._running += joining
        with self.bank.route([request.adapter for request in joining], timeout=0):
            logits = self._forward(tokens, positions, None, ends.to(self._device))
        self.counts["prompt_tokens"] += sum(lengths)
        first = len(self._running) - len(joining)
        self._route()
        self._answer(first, logits[torch.arange(len(joining)), at])

    def _step(self, running: list[Request]) -> None:
        positions, mask = self._cache.extend(self._device, self._dtype)
        tokens = torch.tensor([[request.last] for request in running])
        logits = self._forward(tokens, positions, mask, 1)
        self._cache.extended()
        self.counts["steps"] += 1
        self._answer(0, logits[:, -1])

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, keep: Any) -> Tensor:
        return self._model(
            input_ids=tokens.to(self._device), position_ids=positions, attention_mask=mask,
            past_key_values=self._cache, use_cache=True, logits_to_keep=keep,
        ).logits  # fmt: skip

    def _answer(self, first: int, logits: Tensor) -> None:
        """Gives the requests from the first on their next tokens; those that end leave."""
        requests = self._running[first:]
        ended = [False] * first
        for request, token in zip(requests, choose(logits, [each.sampling for each in requests]), strict=True):
            ended.append(self._accept(request, token))
        self._leave(ended)

    def _accept(self, request: Request, token: int | None) -> bool:
        """One more token; whether it is the last one."""
        if token is None:
            name = "the base model" if request.adapter is None else f"adapter {request.adapter!r}"
            return self._end(request, Event(error=ValueError(f"{name} gave numbers that are not finite")))
        if token in request.stop_tokens:
            return self._end(request, Event(finish="stop"))
        request.last = token
        request.made += 1
        self.counts["tokens"] += 1
        if request.made == request.max_tokens:
            return self._end(request, Event(token, finish="length"))
        try:
            request.emit(Event(token))
        except Exception:  # nobody listens any more
            request.cancelled = True
        return False

    def _end(self, request: Request, event: Event | None = None) -> bool:
        """Ends a request, with an event unless it was cancelled."""
        with self._changed:
            if request in self._waiting:
                self._waiting.remove(request)
        if not request.ended:
            request.ended = True
            if request.lease is not None:
                request.lease.close()
            self.counts["cancelled"] += request.cancelled
            self.counts["failed"] += event is not None and event.error is not None and not request.cancelled
            if event is not None and not request.cancelled:
                with contextlib.suppress(Exception):  # nobody listens any more
                    request.emit(event)
        return True

    def _leave(self, which: Sequence[bool]) -> None:
        """Takes rows away, the last one first: what moves into the place of another one then stays."""
        rows = [row for row, leaves in enumerate(which) if leaves]
        for row in reversed(rows):
            self._end(self._running[row])
            self._cache.drop(row)
            self._running[row] = self._running[-1]
            self._running.pop()
        if rows:
            self._blocked = False
            self._route()

    def _route(self) -> None:
        """Of those that run. Each has a lease, so this fails only where a name means something else than it did."""
        self._routed.close()
        if self._running:
            try:
                self._routed.enter_context(self.bank.route([request.adapter for request in self._running], timeout=0))
            except Exception as error:
                for request in self._running:
                    self._end(request, Event(error=error))
                self._leave([True] * len(self._running))


def _may_start(request: Request) -> bool:
    """Whether its adapter has come, or has failed to, which is found out by asking for it again."""
    return request.cancelled or request.fetched is None or request.fetched.done()
