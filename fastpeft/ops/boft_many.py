"""BOFT for a batch whose rows have different adapters: the rotation of x before the frozen layer, the scale of y after.

Formulas and sources: fastpeft/reference/boft.py; how a factor works in place, without a permutation: ops/boft.py. What
a plan is, and what numbers in tables may be: ops/many.py. Forward only.

Rows of a batch with an adapter each use a number of a block once, so what a rotation costs is to read it. An orthogonal
block of b² numbers is b − 1 reflections of b (b + 1) / 2 − 1 (35 of 64 at b = 8), which take as many operations as a
product with the block. They are made once, when an adapter is loaded: ``boft_reflectors``.

A row of the arena is m · in/S · S/b · (b (b + 1) / 2 − 1) numbers. Features are cut into strips of S, which no factor
leaves; numbers of one kind from all strips lie side by side, (m, S/b, b (b + 1) / 2 − 1, in/S), since blocks at one
place of their strips are a vector's lanes, or neighbouring threads.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastpeft import reference
from fastpeft.backend import Operator, where_it_fits
from fastpeft.ops import base, many
from fastpeft.ops.boft import _factor_unview, _factor_view, boft_blocks, butterfly_misfit

Sizes = tuple[int, int, int]  # in, b, m

BOFT_REFLECTORS = Operator(
    "boft_reflectors(Tensor boft_R, int factors) -> Tensor",
    fake=lambda boft_R, factors: boft_R.new_empty(
        boft_R.shape[0] // factors, reflectors_width(boft_R.shape[1] * boft_R.shape[2], boft_R.shape[2], factors)
    ),
    order=("native", "torch"),
    dtypes=(torch.float32,),
)

BOFT_ROTATE_MANY = Operator(
    "boft_rotate_many(Tensor x, Tensor arena_reflectors, Tensor row_reflectors, int factors, int block_size,"
    " Tensor rows, Tensor slots) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    order=("native", "torch"),
)

BOFT_SCALE_MANY = Operator(
    "boft_scale_many_(Tensor(a!) y, Tensor? bias, Tensor arena_scale, Tensor row_scale, Tensor rows, Tensor slots)"
    " -> ()",
    fake=lambda *_: None,
    order=("native", "torch"),
)


def reflectors_width(features: int, block_size: int, factors: int) -> int:
    """How many numbers a row of the arena has."""
    return factors * features // block_size * (block_size * (block_size + 1) // 2 - 1)


def strip_features(features: int, block_size: int, factors: int) -> int:
    """S: whole windows of b · 2^(m−1) features, and whole vectors of 16 where the features allow it."""
    strip = block_size << (factors - 1)
    while strip % 16 and features % (2 * strip) == 0:
        strip *= 2
    return strip


def boft_reflectors(
    boft_R: Tensor,  # (n · m, in / b, b, b)
    factors: int,
) -> Tensor:  # (n, m · in/b · (b (b + 1) / 2 − 1))
    """The rows of the arena of ``boft_rotate_many`` for n layers of one size, from their trained blocks.

    The Cayley transform of ½ (R − Rᵀ) (BOFT, arXiv 2311.06243, section 4), then Householder's QR of the orthogonal
    block: reference.boft.reflectors. Computed in the wider of float32 and the dtype of boft_R. Not differentiable.

    Args:
        boft_R: (n · m, in/b, b, b), any floating-point dtype: factor i of layer l is boft_R[l · m + i].
        factors: m.

    Raises:
        ValueError: the shape does not fit, or boft_R requires a gradient while gradients are recorded.
        TypeError: not a floating-point tensor.
    """
    base.check_floating("boft_R", boft_R)
    if base.needs_autograd(boft_R):
        raise ValueError("boft_R must not require a gradient, got requires_grad=True: there is no backward")
    if boft_R.dim() != 4 or boft_R.shape[2] != boft_R.shape[3]:
        raise ValueError(f"boft_R must have shape (n * factors, in / b, b, b), got {tuple(boft_R.shape)}")
    count, n_blocks, block_size, _ = boft_R.shape
    if factors < 1 or count % factors:
        raise ValueError(f"factors must divide the {count} factors of boft_R, got {factors}")
    features = n_blocks * block_size
    if reason := butterfly_misfit(features, block_size, factors):
        raise ValueError(f"boft_R of shape {tuple(boft_R.shape)} with factors={factors}: {reason}")
    wide = boft_R.to(torch.promote_types(boft_R.dtype, torch.float32))
    if BOFT_REFLECTORS.choose(wide, wide) == "native":
        return BOFT_REFLECTORS.call("native", wide, factors)
    found = reference.boft.reflectors(boft_blocks(wide))
    in_strip = strip_features(features, block_size, factors) // block_size
    # (n, m, in / S, S / b, ·): blocks lie strip by strip.
    by_strip = found.reshape(count // factors, factors, n_blocks // in_strip, in_strip, found.shape[-1])
    return by_strip.permute(0, 1, 3, 4, 2).flatten(1)


def _by_block(rows: Tensor, features: int, block_size: int, factors: int) -> Tensor:
    """Rows of the arena, (T, ·), as (T, m, in / b, b (b + 1) / 2 − 1)."""
    strip = strip_features(features, block_size, factors)
    numbers = block_size * (block_size + 1) // 2 - 1
    by_place = rows.reshape(rows.shape[0], factors, strip // block_size, numbers, features // strip)
    return by_place.permute(0, 1, 4, 2, 3).reshape(rows.shape[0], factors, features // block_size, numbers)


def boft_rotate_many(
    x: Tensor,  # (T, in)
    arena_reflectors: Tensor,  # (·, m · in/b · (b (b + 1) / 2 − 1))
    row_reflectors: Tensor,  # (S,) int32
    factors: int,
    block_size: int,
    rows: Tensor,  # (T,) int32
    slots: Tensor,  # (T,) int32
) -> Tensor:  # (T, in)
    """z[t] = x[t] R of the slot of row t, and x[t] where the row has none. BOFT, arXiv 2311.06243, equation 5.

    Computed in the widest of float32 and the dtypes of x and the arena, rounded once.

    Args:
        x: (T, in), any floating-point dtype.
        arena_reflectors: its rows are blocks as reflections, as boft_reflectors makes them.
        row_reflectors: (S,), int32: the arena's row of each slot, −1 where the slot rotates nothing in this layer.
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
    backend = many.choose(BOFT_ROTATE_MANY, x, arena_reflectors, arena_reflectors=arena_reflectors)
    backend = where_it_fits(backend, x, partial(_strip_fits, x.shape[-1], factors, block_size))
    if backend == "native":
        return BOFT_ROTATE_MANY.call("native", x, arena_reflectors, row_reflectors, factors, block_size, rows, slots)
    many.check_rows(x, rows, slots)
    features = x.shape[1]
    if factors < 1 or block_size < 1:
        raise ValueError(f"factors and block_size must be at least 1, got {factors} and {block_size}")
    if reason := butterfly_misfit(features, block_size, factors):
        raise ValueError(f"factors and block_size: {reason}")
    many.check_arena("arena_reflectors", arena_reflectors, reflectors_width(features, block_size, factors), x)
    many.check_table("row_reflectors", row_reflectors, ("S",), torch.int32, x)
    run = _rotate_reference if backend == "reference" else _rotate
    return run(x, arena_reflectors, row_reflectors, (features, block_size, factors), rows, slots)


def _strip_fits(features: int, factors: int, block_size: int, shared_memory: int) -> bool:
    """Whether CUDA C++ has room for a row of one strip in float32, with its gaps, and what it knows of the row.

    Numbers that do not fit are left to the operator, which says so.
    """
    if not (0 < factors < 32 and block_size > 0) or butterfly_misfit(features, block_size, factors):
        return True
    strip = strip_features(features, block_size, factors)
    even = strip & -strip  # the power of two in it
    gaps = (strip // even if even > 1 else 0) + (strip // 32 if even > 32 else 0)
    return 4 * (strip + gaps + 2) <= shared_memory


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
    x: Tensor, arena_reflectors: Tensor, row_reflectors: Tensor, sizes: Sizes, rows: Tensor, slots: Tensor
) -> Tensor:
    wide = torch.promote_types(arena_reflectors.dtype, torch.promote_types(x.dtype, torch.float32))
    z = x.clone(memory_format=torch.contiguous_format)
    row, there = _rows_of("row_reflectors", row_reflectors, arena_reflectors, rows, slots)
    if arena_reflectors.shape[0] == 0:
        return z
    _, block_size, factors = sizes
    for part in many.chunks(x.shape[0], arena_reflectors.shape[1]):
        reflectors = _by_block(arena_reflectors[row[part]].to(wide), *sizes)
        rotated = x[part].to(wide)
        for factor in reversed(range(factors)):
            inputs = _factor_view(rotated, block_size, factor)  # (T, in / b, b)
            rotated = _factor_unview(_reflect(inputs, reflectors[:, factor]), factor)
        z[part] = torch.where(there[part, None], rotated.to(x.dtype), x[part])
    return z


def _reflect(
    z: Tensor,  # (..., b)
    reflectors: Tensor,  # (..., b (b + 1) / 2 − 1)
) -> Tensor:  # (..., b)
    """z Q, one reflection after the other."""
    done, start = [], 0
    while z.shape[-1] > 1:
        first, rest = z[..., :1], z[..., 1:]
        tau, v = reflectors[..., start : start + 1], reflectors[..., start + 1 : start + z.shape[-1]]
        step = tau * (first + (rest * v).sum(-1, keepdim=True))
        done.append(step - first)  # with the sign of D
        start += z.shape[-1]
        z = rest - step * v
    return torch.cat([*done, z], -1)


def _rotate_reference(
    x: Tensor, arena_reflectors: Tensor, row_reflectors: Tensor, sizes: Sizes, rows: Tensor, slots: Tensor
) -> Tensor:
    z = x.clone(memory_format=torch.contiguous_format)
    wide = torch.promote_types(arena_reflectors.dtype, torch.promote_types(x.dtype, torch.float32))
    for slot, members in many.groups(rows, slots, len(row_reflectors)).items():
        if (row := int(row_reflectors[slot])) != -1:
            reflectors = _by_block(arena_reflectors[row, None].to(wide), *sizes)[0]
            z[members] = reference.boft.butterfly(x[members], reference.boft.reflected_blocks(reflectors, sizes[1]))
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
