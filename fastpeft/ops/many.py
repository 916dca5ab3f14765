"""What the operators for a batch of many adapters share: the plan of a batch, and how numbers in tables are looked at.

A batch is described by two vectors of one entry for each row of x: ``rows``, row numbers in an order in which the rows
of one slot are neighbours, and ``slots``, the slot whose adapter each of these rows has. A slot outside of [0, S) says
that the row has none; such positions come last. A row number outside of x names no row, and no row is named twice.

Numbers in tables lead to memory. On a CPU an operator raises where one that it needs leads outside; on a GPU, where to
look would be to wait for the device, what such a number does to its row is not defined, but nothing is read or written
outside of the tensors.

Every row's sums have one order, which its adapter and the sizes decide: not its neighbours, nor how many threads run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import backend
from fastpeft.backend import Operator
from fastpeft.ops import base

CHUNK = 1 << 24  # numbers that a composition holds at a time


def plan_rows(
    adapter: Tensor,  # (T,) int32
    count: int,
) -> tuple[Tensor, Tensor]:  # (T,), (T,) int32
    """The plan of a batch whose row t has the adapter of slot adapter[t], or none where that is not in [0, count)."""
    there = (adapter >= 0) & (adapter < count)
    slots, rows = torch.sort(torch.where(there, adapter, count), stable=True)
    return rows.int(), torch.where(slots < count, slots, -1).int()


def slot_of_rows(rows: Tensor, slots: Tensor, count: int) -> Tensor:
    """(T,) int64: the slot of each row of x, −1 for none. The plan backwards, without waiting for a device."""
    tokens = rows.shape[0]
    named = (rows >= 0) & (rows < tokens)
    there = (slots >= 0) & (slots < count)
    found = torch.full((tokens + 1,), -1, dtype=torch.int64, device=rows.device)
    found[torch.where(named, rows, tokens).long()] = torch.where(there, slots, -1).long()
    return found[:tokens]


def choose(
    operator: Operator, x: Tensor, arena: Tensor, *, narrow_on_gpu: bool = False, **wanting: Tensor | None
) -> str:
    """The backend for x and an arena. Kernels take float32 arenas, CUDA C++ also those of 16 bits where it is said to;
    others go to the composition.

    Raises:
        ValueError: an argument requires a gradient while gradients are recorded.
    """
    for name, tensor in {"x": x, **wanting}.items():
        if base.needs_autograd(tensor):
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True: there is no backward")
    chosen = operator.choose(x, arena)
    taken = arena.dtype == torch.float32 or (narrow_on_gpu and x.is_cuda)
    return "torch" if chosen == "native" and not taken and backend._forced is None else chosen


def beside(x: Tensor) -> Tensor:
    """x with its features side by side, as kernels take it, and so that sums do not depend on how it came; its rows may
    lie at any distance.
    """
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_rows(x: Tensor, rows: Tensor, slots: Tensor, y: Tensor | None = None) -> None:
    """Checks x (T, in), y (T, out) and the plan against each other.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    base.check_shape("x", x, ("T", "in"))
    base.check_floating("x", x)
    if y is not None:
        base.check_shape("y", y, (x.shape[0], "out"))
        if y.dtype != x.dtype:
            raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
        base.check_same_device(x, y=y)
    for name, tensor in (("rows", rows), ("slots", slots)):
        check_table(name, tensor, (x.shape[0],), torch.int32, x)


def check_table(name: str, table: Tensor, shape: tuple[int | str, ...], dtype: torch.dtype, x: Tensor) -> None:
    """Checks a table over slots.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    base.check_shape(name, table, shape)
    if table.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {table.dtype}")
    base.check_same_device(x, **{name: table})


def check_arena(name: str, arena: Tensor, width: int, x: Tensor) -> None:
    """Checks an arena: rows of one width, any floating-point dtype.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    base.check_shape(name, arena, ("rows", width))
    base.check_floating(name, arena)
    base.check_same_device(x, **{name: arena})


def inside(name: str, numbers: Tensor, used: Tensor, count: int) -> Tensor:
    """numbers as int64 in [0, count): those that are not used are 0, the used ones are looked at on a CPU.

    Raises:
        ValueError: on a CPU, a number that is used is out of range.
    """
    bad = used & ((numbers < 0) | (numbers >= count))
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling() and bool(bad.any()):
        raise ValueError(f"{name} must hold numbers in [0, {count}), got {numbers[bad][0]}")
    return torch.where(used & ~bad, numbers, 0).long()


def chunks(tokens: int, numbers_per_row: int) -> list[slice]:
    """Rows in parts, so that a composition's memory is bounded."""
    size = max(CHUNK // max(numbers_per_row, 1), 1)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def groups(rows: Tensor, slots: Tensor, count: int) -> dict[int, Tensor]:
    """For the reference: the row numbers of each slot that the batch asks for."""
    slot_of = slot_of_rows(rows, slots, count)
    return {slot: (slot_of == slot).nonzero()[:, 0] for slot in slot_of.unique().tolist() if slot >= 0}
