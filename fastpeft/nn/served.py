"""What a method declares so that ``fastpeft.serving`` can hold many of its adapters at once.

A **family** is a method with its static sizes. Its adapters lie as rows in arenas, 2-D tensors that hold rows of one
width and dtype for a whole model, and small tables say for each layer and slot which rows are meant. Tables and arenas
go by the names of the grouped operator's arguments (ops/<method>_many.py), so a family hands them on as they are.

``Adapter.serve`` says what one adapter puts there: its tensors in a file, its rows, and its entries in the tables, with
its own rows counted from 0; the bank turns that into numbers of an arena. All of it lies on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastpeft.nn.adapter import Site

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Column:
    """A table over layers and slots; the entry of one layer and slot has this shape."""

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int32
    empty: int = 0  # the entry of an adapter of the family that leaves the layer alone
    numbers_rows: bool = False  # whether entries are row numbers; −1 stands for none


class Family:
    """Adapters that one call of an operator can mix. A frozen dataclass of static sizes: equal ones are one family."""

    rotates: ClassVar[bool] = False

    def columns(self, max_rank: int) -> dict[str, Column]:
        raise NotImplementedError

    def arenas(self, site: Site, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """Shape and dtype of a row in each of a layer's arenas, in a bank of this dtype; None where none can be."""
        raise NotImplementedError

    def enlist(self, calls: Any, number: int, tables: dict[str, Any]) -> None:
        """Enters the family into the ``_C.LayerCalls`` of a layer on a CPU.

        Args:
            number: the family's own in the batches.
            tables: arrays over the tensors' memory.
        """
        raise NotImplementedError

    def rotate(self, x: Tensor, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> Tensor:
        """z (T, in): rows of x as their adapters' ``pre`` has them."""
        raise NotImplementedError

    def scale_(self, y: Tensor, bias: Tensor | None, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> None:
        """y (T, out) in place: what ``post`` makes of the frozen layer's output."""
        raise NotImplementedError

    def add_(self, y: Tensor, x: Tensor, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> None:
        """y (T, out) += delta of x (T, in), in place."""
        raise NotImplementedError


@dataclass
class Rows:
    """Rows of one width: how many, and how they come from a file's tensors."""

    count: int
    width: int
    dtype: torch.dtype
    make: Callable[[Tensors], Tensor]  # the rows, of count · width numbers of that dtype, on the CPU
    key: Hashable = None  # rows with equal keys are equal, whichever adapter they come with: the bank keeps one copy


@dataclass
class Part:
    """What one adapter puts into a bank for one family.

    Args:
        sites: the layers, in the order of the entries.
        rows: counted one after the other, from 0.
        entries: (tensors, max_rank) -> the entries of each column, (layers, *shape).
        rank: the largest, where the method has one.
        expanded_numbers: how many numbers the adapter would take where every layer has its own matrices.
    """

    family: Family
    sites: Sequence[Site]
    rows: list[Rows]
    entries: Callable[[Tensors, int], dict[str, Tensor]]
    rank: int = 0
    expanded_numbers: int = 0


@dataclass(frozen=True)
class Expected:
    """A tensor of a file."""

    shape: tuple[int, ...]
    integers: bool = False


@dataclass
class Serving:
    """An adapter as a bank takes it."""

    tensors: dict[str, Expected]
    parts: list[Part]


def stack_rows(matrices: Sequence[tuple[str, bool, int, int]], dtype: torch.dtype) -> tuple[list[Rows], Tensor]:
    """Matrices as rows, those of one width together.

    Args:
        matrices: of each (key in the file, whether it lies transposed, rows, width).

    Returns:
        The rows, and the number of each matrix's first one, (matrices,).
    """
    widths: dict[int, list[int]] = {}
    for i, (_, _, _, width) in enumerate(matrices):
        widths.setdefault(width, []).append(i)
    starts, rows, total = [0] * len(matrices), [], 0
    for width, members in widths.items():
        first = total
        for i in members:
            starts[i] = total
            total += matrices[i][2]
        rows.append(Rows(total - first, width, dtype, _stacker([matrices[i] for i in members], dtype)))
    return rows, torch.tensor(starts, dtype=torch.int64, device="cpu")


def _stacker(matrices: Sequence[tuple[str, bool, int, int]], dtype: torch.dtype) -> Callable[[Tensors], Tensor]:
    def make(tensors: Tensors) -> Tensor:
        pieces = [
            tensors[key].T if transposed else tensors[key].reshape(count, width)
            for key, transposed, count, width in matrices
        ]
        return torch.cat(pieces).to(dtype)

    return make


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError where a number is not finite. No copy of the size of the tensor is made, as isfinite does."""
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        raise ValueError(f"{name} holds values that are not finite in {tensor.dtype}")
