"""The next token of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sampling:
    """How a request chooses its tokens. A temperature of 0 takes the likeliest one.

    A request has a generator of its own, so a seed gives the same tokens in whatever company.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._generator: torch.Generator | None = None

    def draw(self, logits: Tensor) -> int:
        """A token by its logits (vocabulary,)."""
        if self._generator is None:
            self._generator = torch.Generator()
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
        p = torch.softmax(logits.float().cpu() / self.temperature, -1)
        if self.top_p < 1:
            p = nucleus(p, self.top_p)
        # The first of exponential clocks with rates p to ring is i with probability p_i.
        clocks = torch.empty_like(p).exponential_(generator=self._generator)
        return int((p / clocks.clamp_min_(1e-30)).argmax())


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """p (n,) without all but the likeliest that have top_p together. Sorting a whole vocabulary would be slow."""
    k = 64
    while True:
        top, at = p.topk(min(k, p.numel()))
        together = top.cumsum(0)
        if together[-1] >= top_p or k >= p.numel():
            break
        k *= 8
    kept = together - top < top_p
    return torch.zeros_like(p).scatter_(0, at[kept], top[kept])


def choose(logits: Tensor, samplings: Sequence[Sampling]) -> list[int | None]:
    """A token for each row of logits (n, vocabulary); None for a row whose logits are not finite."""
    highest = logits.max(-1)  # NaN and infinity come through
    finite, likeliest = torch.isfinite(highest.values).tolist(), highest.indices.tolist()
    tokens: list[int | None] = []
    for row, sampling in enumerate(samplings):
        if not finite[row]:
            tokens.append(None)
        else:
            tokens.append(likeliest[row] if sampling.temperature == 0 else sampling.draw(logits[row]))
    return tokens
