"""What an adapter makes of a parameter and keeps until the parameter changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastpeft.nn.adapter import same_numbers


class Cached:
    """The last value of a costly function of one tensor on the CPU. Copies and pickles start empty."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor] | None = None  # the numbers as they were, and what was made of them

    def get(self, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """make(source), without a gradient.

        Comparing the numbers themselves is far cheaper than what is kept here and cannot miss a change, however it was
        made: in place, through .data, by loading or by moving.
        """
        source = source.detach()
        if self._kept is None or not same_numbers(self._kept[0], source):
            with torch.inference_mode(False), torch.no_grad():  # kept beyond this call, whatever mode it is in
                self._kept = (source.clone(), make(source))
        return self._kept[1]

    def __getstate__(self) -> dict[str, None]:
        return {"_kept": None}
