"""BOFT for a batch whose rows have different adapters: the rotation of x before the frozen layer, the scale of y after.

Formulas and sources: fastpeft/reference/boft.py; how a factor works in place, without a permutation: ops/boft.py. What
a plan is, and what numbers in tables may be: ops/many.py. Blocks have been through the Cayley transform: that is done
once, when an adapter is loaded. Forward only.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastpeft import reference
from fastpeft.backend import Operator, where_it_fits
from fastpeft.ops import base, many
from fastpeft.ops.boft import _factor_unview, _factor_view, butterfly_misfit

BOFT_ROTATE_MANY = Operator(
    "boft_rotate_many(Tensor x, Tensor arena_blocks, Tensor row_blocks, int factors, int block_size, Tensor rows,"
    " Tensor slots) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    order=("native", "torch"),
)

BOFT_SCALE_MANY = Operator(
    "boft_scale_many_(Tensor(a!) y, Tensor? bias, Tensor arena_scale, Tensor row_scale, Tensor rows, Tensor slots)"
    " -> ()",
    fake=lambda *_: None,
    order=("native", "torch"),
)


def boft_rotate_many(
    x: Tensor,  # (T, in)
    arena_blocks: Tensor,  # (·, m · in · b)
    row_blocks: Tensor,  # (S,) int32
    factors: int,
    block_size: int,
    rows: Tensor,  # (T,) int32
    slots: Tensor,  # (T,) int32
) -> Tensor:  # (T, in)
    """z[t] = x[t] R of the slot of row t, and x[t] where the row has none. BOFT, arXiv 2311.06243, equation 5.

    Computed in the widest of float32 and the dtypes of x and the blocks, rounded once.

    Args:
        x: (T, in), any floating-point dtype.
        arena_blocks: its rows are orthogonal blocks, (m, in/b, b, b) flattened.
        row_blocks: (S,), int32: the arena's row of each slot, −1 where the slot rotates nothing in this layer.
        factors: m.
        block_size: b.
        rows: (T,), int32, see ops/many.py.
        slots: (T,), int32, likewise.

    Returns:
        (T, in) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, on a CPU a row of the arena is out of range, or an argument
            requires a gradient while gradients are recorded.
        TypeError: a dtype does not fit.
    """
    x = many.beside(x)
    backend = many.choose(BOFT_ROTATE_MANY, x, arena_blocks, arena_blocks=arena_blocks)
    backend = where_it_fits(backend, x, partial(_window_fits, factors, block_size))
    if backend == "native":
        return BOFT_ROTATE_MANY.call("native", x, arena_blocks, row_blocks, factors, block_size, rows, slots)
    many.check_rows(x, rows, slots)
    features = x.shape[1]
    if factors < 1 or block_size < 1:
        raise ValueError(f"factors and block_size must be at least 1, got {factors} and {block_size}")
    if reason := butterfly_misfit(features, block_size, factors):
        raise ValueError(f"factors and block_size: {reason}")
    many.check_arena("arena_blocks", arena_blocks, factors * features * block_size, x)
    many.check_table("row_blocks", row_blocks, ("S",), torch.int32, x)
    run = _rotate_reference if backend == "reference" else _rotate
    return run(x, arena_blocks, row_blocks, (factors, features // block_size, block_size, block_size), rows, slots)


def _window_fits(factors: int, block_size: int, shared_memory: int) -> bool:
    """Whether CUDA C++ has room for two rows of a window of b·2^(m−1) features in float32, and what it knows of them.

    Numbers that make no window are left to the operator, which says so.
    """
    if not (0 < factors < 32 and block_size > 0):
        return True
    lines = ((block_size << (factors - 1)) + 31) // 32
    return 2 * (4 * 32 * lines + 4) <= shared_memory


def _rows_of(
    name: str, table: Tensor, arena: Tensor, rows: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:  # (T,), (T,)
    """For each row of x the arena's row of its slot, and whether there is one."""
    if table.shape[0] == 0:
        return torch.zeros_like(rows, dtype=torch.int64), torch.zeros_like(rows, dtype=torch.bool)
    slot = many.slot_of_rows(rows, slots, table.shape[0])
    row = torch.where(slot >= 0, table[slot.clamp(min=0)], -1)
    there = row != -1
    return many.inside(name, row, there, arena.shape[0]), there & (row >= 0) & (row < arena.shape[0])


def _rotate(
    x: Tensor, arena_blocks: Tensor, row_blocks: Tensor, sizes: tuple[int, int, int, int], rows: Tensor, slots: Tensor
) -> Tensor:
    wide = torch.promote_types(arena_blocks.dtype, torch.promote_types(x.dtype, torch.float32))
    z = x.clone(memory_format=torch.contiguous_format)
    row, there = _rows_of("row_blocks", row_blocks, arena_blocks, rows, slots)
    if arena_blocks.shape[0] == 0:
        return z
    for part in many.chunks(x.shape[0], arena_blocks.shape[1]):
        blocks = arena_blocks[row[part]].to(wide).unflatten(1, sizes)
        rotated = x[part].to(wide)
        for factor in reversed(range(sizes[0])):
            inputs = _factor_view(rotated, sizes[-1], factor)  # (T, in / b, b)
            rotated = _factor_unview((inputs[..., None] * blocks[:, factor]).sum(-2), factor)
        z[part] = torch.where(there[part, None], rotated.to(x.dtype), x[part])
    return z


def _rotate_reference(
    x: Tensor, arena_blocks: Tensor, row_blocks: Tensor, sizes: tuple[int, int, int, int], rows: Tensor, slots: Tensor
) -> Tensor:
    z = x.clone(memory_format=torch.contiguous_format)
    wide = torch.promote_types(arena_blocks.dtype, torch.promote_types(x.dtype, torch.float32))
    for slot, members in many.groups(rows, slots, len(row_blocks)).items():
        if (row := int(row_blocks[slot])) != -1:
            z[members] = reference.boft.butterfly(x[members], arena_blocks[row].to(wide).view(sizes))
    return z


def boft_scale_many_(
    y: Tensor,  # (T, out)
    bias: Tensor | None,  # (out,)
    arena_scale: Tensor,  # (·, out)
    row_scale: Tensor,  # (S,) int32
    rows: Tensor,  # (T,) int32
    slots: Tensor,  # (T,) int32
) -> None:
    """y[t] = (y[t] − bias) ⊙ s + bias in place with s of the slot of row t; exact where s is 1. BOFT, section 6.

    Computed in the widest of float32 and the dtypes of y and the scale as y + (y − bias) (s − 1), rounded once.

    Args:
        y: (T, out), any floating-point dtype: what the frozen layer made of the rotated x, its bias included.
        bias: (out,) in the dtype of y: the bias of the frozen layer, which the scale leaves alone; or None.
        arena_scale: its rows are scales, (out,).
        row_scale: (S,), int32: the arena's row of each slot, −1 where the slot scales nothing in this layer.
        rows: (T,), int32, see ops/many.py.
        slots: (T,), int32, likewise.

    Raises:
        ValueError: a shape or a device does not fit, on a CPU a row of the arena is out of range, or an argument
            requires a gradient while gradients are recorded.
        TypeError: a dtype does not fit.
    """
    backend = many.choose(BOFT_SCALE_MANY, y, arena_scale, bias=bias, arena_scale=arena_scale)
    if backend == "native":
        BOFT_SCALE_MANY.call("native", y, bias, arena_scale, row_scale, rows, slots)
        return
    base.check_shape("y", y, ("T", "out"))
    many.check_rows(y, rows, slots)
    if bias is not None:
        many.check_table("bias", bias, (y.shape[1],), y.dtype, y)
    many.check_arena("arena_scale", arena_scale, y.shape[1], y)
    many.check_table("row_scale", row_scale, ("S",), torch.int32, y)
    row, there = _rows_of("row_scale", row_scale, arena_scale, rows, slots)
    if arena_scale.shape[0] == 0:
        return
    wide = torch.promote_types(arena_scale.dtype, torch.promote_types(y.dtype, torch.float32))
    for part in many.chunks(y.shape[0], y.shape[1]):
        before = y[part].to(wide)
        unbiased = before if bias is None else before - bias
        scaled = before + unbiased * (arena_scale[row[part]].to(wide) - 1)
        y[part] = torch.where(there[part, None], scaled.to(y.dtype), y[part])
