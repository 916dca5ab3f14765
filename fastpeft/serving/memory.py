"""The memory of a bank: one buffer, of which every arena is a view.

An arena of some width and dtype is the whole buffer seen as rows of that kind, so memory is no arena's own: what one
method leaves another one takes, nothing is sized in advance, and no tensor that an operator has seen is ever replaced.
Rows of different kinds just never lie in one place, which the list of free extents sees to.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import mmap

import torch
from torch import Tensor

MOST_ROWS = (1 << 31) - 1  # tables hold row numbers in 32 bits

Pieces = list[tuple[int, int]]  # (first row, rows)


class Buffer:
    """So many bytes on a device. A CPU's are not touched before they are written."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self._bytes = (
            _large_pages(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)
        )
        self._arenas: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}

    def arena(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffer as rows of a shape, (rows, *shape)."""
        arena = self._arenas.get((shape, dtype))
        if arena is None:
            width = math.prod(shape) * dtype.itemsize
            count = min(self.size // max(width, 1), MOST_ROWS)
            arena = self._bytes[: count * width].view(dtype).view(count, *shape)
            self._arenas[shape, dtype] = arena
        return arena


def _large_pages(size: int) -> Tensor:
    """Memory in large pages where the system has them: an adapter's numbers are read once for a batch, all over the
    buffer, and with small pages a tenth to a fifth of that time goes by in looking addresses up.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # other than Linux
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Extents:
    """Which bytes are free: sorted extents (start, stop) that do not touch."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)] if size else []

    def copy(self) -> Extents:
        twin = Extents(0)
        twin._free = self._free.copy()
        return twin

    @property
    def free_bytes(self) -> int:
        return sum(stop - start for start, stop in self._free)

    def take(self, count: int, width: int) -> Pieces | None:
        """Rows of so many bytes, each at a multiple of that, in one piece where there is one; None where they are not.

        The lowest place is taken, so that what is free stays together at the end.
        """
        if count == 0 or width == 0:  # rows of no numbers are anywhere
            return [(0, count)] if count else []
        pieces: Pieces = []
        missing = count
        for start, stop in self._free:
            first, end = -(-start // width), min(stop // width, MOST_ROWS)
            if end - first >= count:
                pieces, missing = [(first, count)], 0
                break
            if end > first and missing:
                pieces.append((first, min(missing, end - first)))
                missing -= pieces[-1][1]
        if missing:
            return None
        for first, rows in pieces:
            self._cut(first * width, (first + rows) * width)
        return pieces

    def give(self, pieces: Pieces, width: int) -> None:
        for first, rows in pieces:
            start, stop = first * width, (first + rows) * width
            if start == stop:
                continue
            at = bisect.bisect(self._free, (start, stop))
            if at < len(self._free) and self._free[at][0] == stop:
                stop = self._free.pop(at)[1]
            if at and self._free[at - 1][1] == start:
                at -= 1
                start = self._free.pop(at)[0]
            self._free.insert(at, (start, stop))

    def _cut(self, start: int, stop: int) -> None:
        at = bisect.bisect(self._free, (start, math.inf)) - 1
        before, after = self._free[at]
        left = [(before, start)] if before < start else []
        right = [(stop, after)] if stop < after else []
        self._free[at : at + 1] = left + right
