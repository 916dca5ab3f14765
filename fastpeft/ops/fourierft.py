"""FourierFT's operator: the delta through FFTs of the activations. Formula and source: fastpeft/reference/fourierft.py.

With X = fft(x) over d2 = in_features and S[u_k] += c_k · conj(X[v_k]), the delta is (α / d2) · Re ifft(S) over
d1 = out_features. Both ends are real, so half spectra are enough: an entry (u, v) reads bin min(v, d2 − v) and writes
bin min(u, d1 − u), conjugated on the way if that crossed a middle, and with weight ½ where bin and mirror image differ.
Cost: T · (d1 log d1 + d2 log d2 + n) operations.

Gradients, with G = fft(grad): ∂L/∂c_k = α / (d1 d2) · Re Σ_t G[u_k] X[v_k], and ∂L/∂x is the same operator on grad
with (u, d1) and (v, d2) exchanged.

The compiled form (csrc/cpu/fourierft_loops.cpp) keeps whole spectra of two tokens at a time; what is many times d rows,
without gradients, goes through W + ΔW instead (`dense_pays`). The Triton kernels (kernels/fourierft.py) do the gather,
product and scatter between the library's transforms. In the form composed of PyTorch operations the gather, product and
scatter between two transforms is an embedding bag: the table holds one row of T numbers for each real and imaginary
part of a bin, a bag is a part of an output bin, and the coefficients are its weights.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from fastpeft import reference
from fastpeft.backend import Operator, triton_available, where_it_pays
from fastpeft.ops import base

# y, with the mix from bins of x to bins of y and scale = α / (d1 d2). On a GPU the order is by counting, not measured
# (bench/floors.py): one launch and 21 µs of memory traffic where the library's transforms need seven and 160 µs (an
# H200, 4096 features and tokens). CUDA C++ or Triton, see _triton_pays.
FOURIER_FWD = Operator(
    "fourier_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor spectrum, Tensor offsets, Tensor sources,"
    " Tensor entries, float scale) -> Tensor",
    fake=lambda x, weight, bias, spectrum, offsets, *_: x.new_empty(*x.shape[:-1], offsets.shape[0] - 1),
    order=("native", "triton", "torch"),
)


def _fourier_bwd_fake(grad, x, weight, spectrum, rows, cols, offsets, sources, entries, scale, need_x):
    dx = grad.new_empty(*(grad.shape[:-1] if need_x else (0,)), offsets.shape[0] - 1)
    return dx, spectrum.new_empty(0 if x is None else spectrum.shape[0])


# Gradients of x, by the mix from bins of grad to bins of x, and of spectrum where x is given.
FOURIER_BWD = Operator(
    "fourier_bwd(Tensor grad, Tensor? x, Tensor? weight, Tensor spectrum, Tensor rows, Tensor cols, Tensor offsets,"
    " Tensor sources, Tensor entries, float scale, bool need_x) -> (Tensor, Tensor)",
    fake=_fourier_bwd_fake,
    order=("native", "triton", "torch"),
)

# W + ΔW, rounded once, by the mix from bins of y to bins of x: row i of ΔW is the gradient of x for the gradient e_i.
FOURIER_MERGE = Operator(
    "fourier_merge(Tensor weight, Tensor spectrum, Tensor offsets, Tensor sources, Tensor entries, float scale)"
    " -> Tensor",
    fake=lambda weight, *_: torch.empty_like(weight),
    order=("native", "torch"),
)

if triton_available():

    def _fourier_fwd_triton(*args):
        from fastpeft.kernels.fourierft import fourier_fwd  # importing triton takes a second: only where it runs

        return fourier_fwd(*args)

    def _fourier_bwd_triton(*args):
        from fastpeft.kernels.fourierft import fourier_bwd

        return fourier_bwd(*args)

    FOURIER_FWD.implement_triton(_fourier_fwd_triton)
    FOURIER_BWD.implement_triton(_fourier_bwd_triton)


class Mix(NamedTuple):
    """The gather–multiply–scatter between two whole spectra, for the compiled lanes; 2n samples sorted by target bin.

    With H[u, v] = ½ (S[u, v] + S[−u, −v]) an entry stands at two places with half its coefficient.
    """

    offsets: Tensor  # (bins + 1,) int32, first sample of each target bin
    sources: Tensor  # (2n,) int32, bin that is read
    entries: Tensor  # (2n,) int32, which coefficient it takes


class Bags(NamedTuple):
    """The gather–multiply–scatter from one half spectrum to another, 2n samples sorted by bag.

    Bag 2k is the real part of output bin k, bag 2k + 1 its imaginary part; table rows are counted the same way.
    """

    source: Tensor  # (2n,) table row of each sample
    entry: Tensor  # (2n,) which coefficient it takes
    bag: Tensor  # (2n,) where it goes
    offsets: Tensor  # (2 bins,) first sample of each bag
    weight: Tensor  # (2n,) sign · ½, or the sign alone where an output bin is its own mirror image
    sign: Tensor  # (2n,) ±1


class Tables(NamedTuple):
    """What the operator needs to know about its places: from x to y, and back from the gradient of y to that of x."""

    rows: Tensor  # (n,) int32
    cols: Tensor  # (n,) int32
    forward: Mix
    backward: Mix
    forward_bags: Bags
    backward_bags: Bags


def _make_mix(source_place: Tensor, source_length: int, target_place: Tensor, target_length: int) -> Mix:
    n = source_place.shape[0]
    targets = torch.cat([target_place, (target_length - target_place) % target_length])
    sources = torch.cat([source_place, (source_length - source_place) % source_length])
    targets, order = torch.sort(targets, stable=True)
    offsets = torch.searchsorted(targets, torch.arange(target_length + 1, device=targets.device))
    return Mix(offsets.int(), sources[order].int(), (order % n).int())


def _make_bags(source_place: Tensor, source_length: int, target_place: Tensor, target_length: int) -> Bags:
    source_bin = torch.minimum(source_place, source_length - source_place)
    target_bin = torch.minimum(target_place, target_length - target_place)
    # The operator conjugates X once; so does every crossing of a middle.
    crossings = (source_place > source_bin).int() + (target_place > target_bin).int()
    imaginary_sign = 1.0 - 2.0 * ((crossings + 1) % 2)
    own_mirror = (2 * target_place) % target_length == 0
    fold = torch.where(own_mirror, 1.0, 0.5)
    sign = torch.cat([torch.ones_like(imaginary_sign), imaginary_sign])
    weight = torch.cat([fold, torch.where(own_mirror, 0.0, fold * imaginary_sign)])
    bag = torch.cat([2 * target_bin, 2 * target_bin + 1])
    source = torch.cat([2 * source_bin, 2 * source_bin + 1])
    bag, order = torch.sort(bag, stable=True)
    n_bags = 2 * (target_length // 2 + 1)
    offsets = torch.searchsorted(bag, torch.arange(n_bags, device=bag.device))
    return Bags(source[order], order % source_place.shape[0], bag, offsets, weight[order], sign[order])


def make_tables(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tables:
    """Tables for places that are known to lie inside (out, in)."""
    forward = cols, shape[1], rows, shape[0]
    backward = rows, shape[0], cols, shape[1]
    return Tables(
        rows.int(), cols.int(), _make_mix(*forward), _make_mix(*backward), _make_bags(*forward), _make_bags(*backward)
    )


def check_places(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> None:
    """Checks places (n,), int64, inside a spectrum of shape (out, in).

    Raises:
        ValueError: a shape does not fit or a place lies outside.
        TypeError: not int64.
    """
    base.check_shape("cols", cols, tuple(rows.shape))
    for name, places, size in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        if places.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {places.dtype}")
        base.check_shape(name, places, ("n",))
        if places.numel() and not (0 <= int(places.min()) and int(places.max()) < size):
            raise ValueError(f"{name} must lie in [0, {size}), got [{int(places.min())}, {int(places.max())}]")


# rows -> (weak cols, versions, shape, tables): checking and sorting places takes longer than a small layer.
_TABLES = WeakTensorKeyDictionary()


def tables_for(rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> Tables:
    """Checked tables for these places, remembered as long as the two tensors live unchanged."""
    if torch.compiler.is_compiling():
        return make_tables(rows, cols, shape)
    versions = (rows._version, cols._version)
    known = _TABLES.get(rows)
    if known is None or known[0]() is not cols or known[1:3] != (versions, shape):
        check_places(rows, cols, shape)
        known = (weakref.ref(cols), versions, shape, make_tables(rows, cols, shape))
        _TABLES[rows] = known
    return known[3]


def half_spectrum(x: Tensor) -> Tensor:
    """(T, d) real -> (2 (d // 2 + 1), T): rows are the real and the imaginary parts of the bins in turn."""
    return torch.view_as_real(torch.fft.rfft(x)).flatten(1).t().contiguous()


def _coefficients(bags: Bags, spectrum: Tensor, scale: float) -> Tensor:
    return spectrum[bags.entry] * (bags.weight.to(spectrum.dtype) * scale)


def _synthesise(table: Tensor, bags: Bags, coefficients: Tensor, length: int) -> Tensor:
    """(2 bins, T) -> (T, length): gather, multiply, scatter and transform back."""
    target = F.embedding_bag(bags.source, table, bags.offsets, mode="sum", per_sample_weights=coefficients)
    folded = torch.view_as_complex(target.t().contiguous().unflatten(1, (-1, 2)))
    return torch.fft.irfft(folded, n=length)


def _token_chunks(x: Tensor, width: int) -> range:
    """Starts of chunks of tokens. On a CPU the spectra of a chunk should stay in the second-level cache."""
    tokens = x.shape[0]
    size = tokens if x.device.type != "cpu" else max(16, (1 << 17) // max(width, 1))
    return range(0, tokens, max(size, 1))


def fourier_fwd(
    x: Tensor,  # (T, in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    spectrum: Tensor,  # (n,)
    tables: Tables,
    shape: tuple[int, int],
    scaling: float,
) -> Tensor:  # (T, out)
    """The composition: the base product with the delta added into it."""
    out_features, in_features = shape
    y = x.new_zeros(x.shape[0], out_features) if weight is None else F.linear(x, weight, bias)
    bags = tables.forward_bags
    coefficients = _coefficients(bags, spectrum, scaling / in_features)
    chunks = _token_chunks(x, max(shape))
    for start in chunks:
        part = slice(start, start + chunks.step)
        table = half_spectrum(x[part].to(spectrum.dtype))
        y[part] += _synthesise(table, bags, coefficients, out_features)
    return y


def fourier_bwd(
    grad: Tensor,  # (T, out)
    x: Tensor | None,  # (T, in)
    weight: Tensor | None,  # (out, in)
    spectrum: Tensor,  # (n,)
    tables: Tables,
    shape: tuple[int, int],
    scaling: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and spectrum; see the top of the file."""
    need_x, need_spectrum = needs
    out_features, in_features = shape
    dx = None
    if need_x:
        dx = grad.new_zeros(grad.shape[0], in_features) if weight is None else grad @ weight
    coefficients = _coefficients(tables.backward_bags, spectrum, scaling / out_features)
    bags = tables.forward_bags
    products = torch.zeros(len(bags.source), dtype=spectrum.dtype, device=spectrum.device)
    chunks = _token_chunks(grad, max(shape))
    for start in chunks:
        part = slice(start, start + chunks.step)
        grad_table = half_spectrum(grad[part].to(spectrum.dtype))
        if dx is not None:
            dx[part] += _synthesise(grad_table, tables.backward_bags, coefficients, in_features)
        if need_spectrum:
            assert x is not None
            table = half_spectrum(x[part].to(spectrum.dtype))
            products += _bag_products(grad_table, table, bags)
    dspectrum = None
    if need_spectrum:
        dspectrum = torch.zeros_like(spectrum).index_add_(0, bags.entry, products * bags.sign.to(spectrum.dtype))
        dspectrum *= scaling / (out_features * in_features)
    return dx, dspectrum


def _bag_products(grad_table: Tensor, table: Tensor, bags: Bags) -> Tensor:
    """For each sample the product over tokens of its bag's row and its source's row, (2n,)."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_table, table, bags.source, bags.offsets, bags.bag, 0
    )


def _triton_pays(x: Tensor, shape: tuple[int, int], n: int, backward: bool) -> bool:
    """By counting, not measured: where Triton's transforms on tensor cores pay at all, they cost less than CUDA C++'s
    in shared memory but for a few tokens. Forward over the frozen layer at T 4096: 2048 features 1.27 and 1.57, 4096
    1.14 and 1.29; backward both pay up to 2048, at 4096 the gradient of the coefficients is left to CUDA C++.
    """
    from fastpeft.kernels.dft import dft_pays  # importing triton takes a second: only where it runs

    out_features, in_features = shape
    if x.numel() < 16 * x.shape[-1] or not dft_pays(in_features, out_features, n, x.dtype, backward):
        return False
    return not backward or dft_pays(out_features, in_features, n, x.dtype, False)


def _run(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spectrum: Tensor,
    tables: Tables,
    shape: tuple[int, int],
    scaling: float,
) -> Tensor:
    scale = scaling / (shape[0] * shape[1])
    backend = where_it_pays(backend, x, lambda: _triton_pays(x, shape, len(spectrum), backward=False))
    if backend == "native":
        return FOURIER_FWD.call("native", x, weight, bias, spectrum, *tables.forward, scale)
    rows = base.as_rows(x)
    if backend == "triton":
        y = FOURIER_FWD.call("triton", rows, weight, bias, spectrum, *tables.forward, scale)
    else:
        y = fourier_fwd(rows, weight, bias, spectrum, tables, shape, scaling)
    return base.like_rows(y, x)


class FourierFunction(torch.autograd.Function):
    """Keeps x alone: its spectrum is computed again on the way back."""

    @staticmethod
    def forward(ctx, x, weight, bias, spectrum, tables, shape, scaling, backend):
        need_x, need_spectrum = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        ctx.save_for_backward(x if need_spectrum else None, weight if need_x else None, spectrum)
        ctx.settings = tables, shape, scaling, backend
        return _run(backend, x, weight, bias, spectrum, tables, shape, scaling)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        needs = need_x, need_spectrum = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        x, weight, spectrum = ctx.saved_tensors
        tables, shape, scaling, backend = ctx.settings
        backend = where_it_pays(backend, grad, lambda: _triton_pays(grad, shape, len(spectrum), backward=True))
        scale = scaling / (shape[0] * shape[1])
        places = (tables.rows, tables.cols, *tables.backward)
        if backend == "native":
            dx, dspectrum = FOURIER_BWD.call("native", grad, x, weight, spectrum, *places, scale, need_x)
        else:
            grad_rows, rows = base.as_rows(grad), x if x is None else base.as_rows(x)
            with base.without_autocast(grad):
                if backend == "triton":
                    arguments = (grad_rows, rows, weight, spectrum, *places, scale, need_x)
                    dx, dspectrum = FOURIER_BWD.call("triton", *arguments)
                else:
                    dx, dspectrum = fourier_bwd(grad_rows, rows, weight, spectrum, tables, shape, scaling, needs)
            dx = base.like_rows(dx, grad) if need_x else None
        return dx if need_x else None, None, None, dspectrum if need_spectrum else None, None, None, None, None


def fourier_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    spectrum: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    cols: Tensor,  # (n,)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + α · Re ifft2(S) x with n entries in S: FourierFT (Gao et al., ICML 2024, arXiv 2405.03003).

    S is zero but for S[rows[k], cols[k]] = spectrum[k]; no two places should be equal. Differentiable once in x and
    spectrum, and in weight and bias where they ask for it. Computed in float32 or wider and rounded once. The places
    are checked and sorted once for as long as the two tensors live unchanged.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        spectrum: (n,), real coefficients.
        rows: (n,), int64, in [0, out).
        cols: (n,), int64, in [0, in).
        scaling: α.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, or a place lies outside the spectrum.
        TypeError: a dtype does not fit.
    """
    base.check_shape("weight", weight, ("out", "in"))
    shape = (weight.shape[0], weight.shape[1])
    base.check_same_device(x, rows=rows, cols=cols)
    base.check_shape("spectrum", spectrum, tuple(rows.shape))
    base.check_floating("spectrum", spectrum)
    base.check_base(x, weight, bias, shape[1], shape[0])
    base.check_same_device(x, spectrum=spectrum)
    return apply_fourier(x, weight, bias, spectrum, tables_for(rows, cols, shape), shape, scaling)


def apply_fourier(
    x: Tensor,  # (..., in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    spectrum: Tensor,  # (n,)
    tables: Tables,
    shape: tuple[int, int],
    scaling: float,
) -> Tensor:  # (..., out)
    """fourier_linear for arguments that are known to fit, tables at hand, and weight=None for the delta alone."""
    backend = FOURIER_FWD.choose(x, spectrum)
    if backend == "reference":
        wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
        delta = reference.fourierft.fourier_weight(wide, tables.rows.long(), tables.cols.long(), shape, scaling)
        return base.dense_linear(x, weight, bias, delta)
    if not base.is_frozen(weight, bias):
        assert weight is not None
        delta = apply_fourier(x, None, None, spectrum, tables, shape, scaling)
        return F.linear(x, weight, bias) + delta
    return base.through_autocast(_apply, x, weight, bias, spectrum, tables, shape, scaling, backend)


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    spectrum: Tensor,
    tables: Tables,
    shape: tuple[int, int],
    scaling: float,
    backend: str,
) -> Tensor:
    if spectrum.dtype != torch.float32 or x.dtype == torch.float64:
        spectrum = spectrum.to(torch.promote_types(torch.promote_types(spectrum.dtype, x.dtype), torch.float32))
    if base.needs_autograd(x, spectrum):
        return FourierFunction.apply(x, weight, bias, spectrum, tables, shape, scaling, backend)
    if backend == "native" and weight is not None and x.dtype == torch.float32 and dense_pays(x.numel(), shape):
        delta = _dense_weight(spectrum, tables.rows.long(), tables.cols.long(), shape, scaling)
        return F.linear(x, delta.add_(weight), bias)
    return _run(backend, x, weight, bias, spectrum, tables, shape, scaling)


def merge_fourier(weight: Tensor, spectrum: Tensor, tables: Tables, scaling: float) -> Tensor:
    """weight (out, in) + ΔW, rounded once to the weight's dtype; not differentiable."""
    shape = (weight.shape[0], weight.shape[1])
    backend = FOURIER_MERGE.choose(weight, spectrum)
    if backend == "native":
        scale = scaling / (shape[0] * shape[1])
        return FOURIER_MERGE.call("native", weight, spectrum.float(), *tables.backward, scale)
    wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
    if backend == "reference":
        delta = reference.fourierft.fourier_weight(wide, tables.rows.long(), tables.cols.long(), shape, scaling)
    else:
        delta = _dense_weight(wide, tables.rows.long(), tables.cols.long(), shape, scaling)
    return delta.add_(weight).to(weight.dtype)


def dense_pays(numbers: int, shape: tuple[int, int]) -> bool:
    """Whether W + ΔW costs less than transforming an x of so many numbers, on a CPU and without gradients.

    The transforms of rows grow with T (in + out), the matrix with in · out. They cost the same where the first is about
    12 times the second. From 32 times on, T >= 16 d in a square layer, the matrix saves most of the transforms, 3 to
    15 % of a call, and takes a thirty-second part of the memory of x and y. A graph that is compiled keeps to one form.
    """
    if torch.compiler.is_compiling():
        return False
    out_features, in_features = shape
    return numbers * (in_features + out_features) >= 32 * in_features * out_features * in_features


def fourier_weight(
    spectrum: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    cols: Tensor,  # (n,)
    shape: tuple[int, int],
    scaling: float,
) -> Tensor:  # (out, in)
    """ΔW = α · Re ifft2(S), S[rows[k], cols[k]] = spectrum[k]: the dense update, for merging.

    The real part of a two-dimensional transform needs half of its columns, and of those only the occupied ones take
    part in the first pass. Differentiable in spectrum. Source: FourierFT (arXiv 2405.03003, equations 2 to 4).

    Library calls are the right form on a GPU too: the first pass has min(n, in / 2) columns, the second one reads a
    half and writes the whole of the result, and what is left beside them are n scattered numbers.

    Args:
        spectrum: (n,), real coefficients.
        rows: (n,), int64, in [0, shape[0]).
        cols: (n,), int64, in [0, shape[1]).
        shape: (out, in).
        scaling: α.

    Returns:
        shape, in float32 or the wider dtype of spectrum.

    Raises:
        ValueError: a shape does not fit or a place lies outside.
        TypeError: a dtype does not fit.
    """
    base.check_floating("spectrum", spectrum)
    check_places(rows, cols, shape)
    base.check_shape("spectrum", spectrum, tuple(rows.shape))
    wide = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
    if FOURIER_FWD.choose(spectrum, spectrum) == "reference":
        return reference.fourierft.fourier_weight(wide, rows, cols, shape, scaling)
    return _dense_weight(wide, rows, cols, shape, scaling)


def _dense_weight(wide: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int], scaling: float) -> Tensor:
    wide = wide * scaling  # n numbers, where out · in would be one more pass over the result
    out_features, in_features = shape
    # H[u, v] = ½ (S[u, v] + S[−u, −v]) is Hermitian, and Re ifft2(S) = ifft2(H). Keep each entry's half of it, and the
    # whole entry where v is its own mirror image: there S[−u, v] is in the half as well.
    mirrored = 2 * cols > in_features
    own_mirror = (2 * cols) % in_features == 0
    half_rows = torch.where(mirrored, (out_features - rows) % out_features, rows)
    half_cols = torch.where(mirrored, in_features - cols, cols)
    occupied, column = torch.unique(half_cols, return_inverse=True)
    compact = wide.new_zeros(out_features, occupied.shape[0])
    compact = compact.index_put((half_rows, column), wide / 2, accumulate=True)
    mirror_rows = (out_features - half_rows) % out_features
    compact = compact.index_put((mirror_rows, column), torch.where(own_mirror, wide / 2, 0), accumulate=True)
    first = torch.fft.ifft(compact, dim=0)
    half = first.new_zeros(out_features, in_features // 2 + 1).index_copy(1, occupied, first)
    return torch.fft.irfft(half, n=in_features, dim=1)
