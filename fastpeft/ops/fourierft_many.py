"""FourierFT for a batch whose rows have different adapters. Formula and source: fastpeft/reference/fourierft.py.

With X = fft(x[t]) and S[u_k] += c_k · conj(X[v_k]), the delta of row t is (α / in) · Re ifft(S). All rows share the
transforms; coefficients are the row's own, and so may be the places. Compiled kernels compute a row's delta in one go
(csrc/cpu/fourierft_many.cpp, csrc/cuda/fourierft_many.cuh). What a plan is, and what numbers in tables may be:
ops/many.py. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import reference
from fastpeft.backend import Operator, where_it_fits
from fastpeft.ops import many

FOURIER_MANY = Operator(
    "fourier_many_(Tensor(a!) y, Tensor x, Tensor arena_spectrum, Tensor row_spectrum, Tensor places, Tensor place,"
    " Tensor scaling, Tensor rows, Tensor slots) -> ()",
    fake=lambda *_: None,
    order=("native", "torch"),
)


def fourier_many_(
    y: Tensor,  # (T, out)
    x: Tensor,  # (T, in)
    arena_spectrum: Tensor,  # (·, n)
    row_spectrum: Tensor,  # (S,) int32
    places: Tensor,  # (P, 2, n) int32
    place: Tensor,  # (S,) int32
    scaling: Tensor,  # (S,) float32
    rows: Tensor,  # (T,) int32
    slots: Tensor,  # (T,) int32
) -> None:
    """y[t] += α · Re ifft2(S) x[t] in place, S of the slot of row t: FourierFT, arXiv 2405.03003, equations 2 to 4.

    Computed in the widest of float32 and the dtypes of x and the spectrum, rounded once.

    Args:
        y: (T, out) in the dtype of x.
        x: (T, in), any floating-point dtype.
        arena_spectrum: its rows are coefficients, (n,).
        row_spectrum: (S,), int32: the arena's row of each slot, −1 where the slot adds nothing in this layer.
        places: (P, 2, n), int32: places[p, 0] in [0, out) and places[p, 1] in [0, in); no two places of a p are equal.
        place: (S,), int32: which places a slot's coefficients stand at.
        scaling: (S,), float32: α.
        rows: (T,), int32, see ops/many.py.
        slots: (T,), int32, likewise.

    Raises:
        ValueError: a shape or a device does not fit, on a CPU a number that is needed is out of range, or an argument
            requires a gradient while gradients are recorded.
        TypeError: a dtype does not fit.
    """
    x = many.beside(x)
    backend = many.choose(FOURIER_MANY, x, arena_spectrum, y=y, arena_spectrum=arena_spectrum)
    # As in plan_fourier_many of csrc/cuda/fourierft_many.cuh, which needs little shared memory for any length.
    backend = where_it_fits(backend, x, lambda _: max(x.shape[-1], y.shape[-1]) <= 1 << 27)
    if backend == "native":
        FOURIER_MANY.call("native", y, x, arena_spectrum, row_spectrum, places, place, scaling, rows, slots)
        return
    many.check_rows(x, rows, slots, y)
    many.check_table("places", places, ("P", 2, "n"), torch.int32, x)
    many.check_arena("arena_spectrum", arena_spectrum, places.shape[2], x)
    many.check_table("row_spectrum", row_spectrum, ("S",), torch.int32, x)
    many.check_table("place", place, (row_spectrum.shape[0],), torch.int32, x)
    many.check_table("scaling", scaling, (row_spectrum.shape[0],), torch.float32, x)
    if 0 in (y.numel(), x.numel(), arena_spectrum.numel(), places.shape[0], row_spectrum.shape[0]):
        return
    add = _add_reference if backend == "reference" else _add
    add(y, x, arena_spectrum, row_spectrum, places, place, scaling, rows, slots)


def _add(
    y: Tensor,
    x: Tensor,
    arena_spectrum: Tensor,
    row_spectrum: Tensor,
    places: Tensor,
    place: Tensor,
    scaling: Tensor,
    rows: Tensor,
    slots: Tensor,
) -> None:
    wide = torch.promote_types(arena_spectrum.dtype, torch.promote_types(x.dtype, torch.float32))
    out_features, in_features = y.shape[1], x.shape[1]
    slot = many.slot_of_rows(rows, slots, row_spectrum.shape[0])
    named = slot.clamp(min=0)
    row = torch.where(slot >= 0, row_spectrum[named], -1)
    there = row != -1
    row = many.inside("row_spectrum", row, there, arena_spectrum.shape[0])
    which = many.inside("place", place[named], there, places.shape[0])
    for part in many.chunks(x.shape[0], 4 * (in_features + out_features + places.shape[2])):
        used = there[part, None].expand(-1, places.shape[2])
        u = many.inside("places[:, 0]", places[which[part], 0], used, out_features)
        v = many.inside("places[:, 1]", places[which[part], 1], used, in_features)
        coefficients = arena_spectrum[row[part]].to(wide) * (scaling[named[part], None].to(wide) / in_features)
        read = _transforms(torch.fft.fft, x[part].to(wide)).gather(1, v).conj() * coefficients
        # Complex numbers are added up as pairs of real ones, which every device has.
        target = x.new_zeros(u.shape[0], out_features, 2, dtype=wide)
        target.scatter_add_(1, u[..., None].expand(-1, -1, 2), torch.view_as_real(read))
        delta = _transforms(torch.fft.ifft, torch.view_as_complex(target)).real
        y[part] = torch.where(there[part, None], (y[part].to(wide) + delta).to(y.dtype), y[part])


def _transforms(transform, rows: Tensor) -> Tensor:
    """Row by row on a CPU: a library that transforms several at once may round each of them in another way."""
    if rows.device.type != "cpu":
        return transform(rows)
    return torch.stack([transform(row) for row in rows])


def _add_reference(
    y: Tensor,
    x: Tensor,
    arena_spectrum: Tensor,
    row_spectrum: Tensor,
    places: Tensor,
    place: Tensor,
    scaling: Tensor,
    rows: Tensor,
    slots: Tensor,
) -> None:
    wide = torch.promote_types(arena_spectrum.dtype, torch.promote_types(x.dtype, torch.float32))
    for slot, members in many.groups(rows, slots, len(row_spectrum)).items():
        if (row := int(row_spectrum[slot])) == -1:
            continue
        u, v = places[int(place[slot])].long()
        shape = (y.shape[1], x.shape[1])
        delta = reference.fourierft.fourier_weight(arena_spectrum[row].to(wide), u, v, shape, float(scaling[slot]))
        y[members] = (y[members].to(wide) + x[members].to(wide) @ delta.T).to(y.dtype)
