"""Tokens to text as they come, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """The text of one answer, piece by piece; the pieces together are the whole.

    Args:
        stop: strings that end the text and are no part of it.

    Attributes:
        stopped: whether one of them has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._from = self._to = 0  # the last piece is that of the ids between them
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        # A piece is what a token adds to the one before: some tokenizers put a space between, or none at the start.
        before, now = self._decoded(self._ids[self._from : self._to]), self._decoded(self._ids[self._from :])
        if now.endswith("\ufffd"):  # a character whose bytes have not all come
            return ""
        self._from, self._to = self._to, len(self._ids)
        return self._certain(now[len(before) :], last=False)

    def finish(self) -> str:
        """What was held back."""
        rest = self._decoded(self._ids[self._from :])[len(self._decoded(self._ids[self._from : self._to])) :]
        return "" if self.stopped else self._certain(rest, last=True)

    def _certain(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = 0
        if not last:
            for stop in self._stop:
                sizes = range(min(len(stop) - 1, len(text)), 0, -1)
                kept = max(kept, next((size for size in sizes if text.endswith(stop[:size])), 0))
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
