"""BOFT's operators: the Cayley transform and the butterfly product. Formulas and sources: fastpeft/reference/boft.py.

The rotation acts on the activation, one butterfly factor after the other. Factor f works in windows of 2H half-blocks
(b / 2 features each, H = 2^f): half-blocks s and s + H together are the input of block s, and its output takes their
place. So no permutation is ever carried out, and a factor costs 2·T·d·b operations.
"""

from __future__ import annotations

import importlib
import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.backend import Operator, triton_available, where_it_fits, where_it_pays
from fastpeft.ops import base

# On a GPU the order is by counting, not measured (bench/floors.py): CUDA C++ and Triton read x and write y once, where
# the composition passes over them for every factor. Which of the two, see _triton_pays.
BUTTERFLY_FWD = Operator(
    "butterfly_fwd(Tensor x, Tensor blocks) -> Tensor",
    fake=lambda x, blocks: x.new_empty(x.shape),
    order=("native", "triton", "torch"),
)


def _butterfly_bwd_fake(grad, x, blocks, need_x, need_blocks):
    dx = x.new_empty(*(x.shape[:-1] if need_x else (0,)), x.shape[-1])
    return dx, blocks.new_empty(blocks.shape[0] if need_blocks else 0, *blocks.shape[1:])


# A gradient that is not needed comes back with no rows.
BUTTERFLY_BWD = Operator(
    "butterfly_bwd(Tensor grad, Tensor x, Tensor blocks, bool need_x, bool need_blocks) -> (Tensor, Tensor)",
    fake=_butterfly_bwd_fake,
    order=("native", "triton", "torch"),
)


CAYLEY_FWD = Operator(
    "cayley_fwd(Tensor boft_R) -> Tensor",
    fake=torch.empty_like,
    order=("native", "triton", "torch"),
    dtypes=(torch.float32,),
)

CAYLEY_BWD = Operator(
    "cayley_bwd(Tensor grad, Tensor blocks) -> Tensor",
    fake=lambda grad, blocks: torch.empty_like(blocks),
    order=("native", "triton", "torch"),
    dtypes=(torch.float32,),
)


def _boft_fwd_fake(x, weight, bias, blocks, scale, keep):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, y.new_empty(math.prod(x.shape[:-1]) if keep else 0, weight.shape[0])


# The whole layer: y (..., out), and y (T, out) before it was scaled where that is kept for the gradient of the scale.
BOFT_FWD = Operator(
    "boft_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor blocks, Tensor scale, bool keep) -> (Tensor, Tensor)",
    fake=_boft_fwd_fake,
    order=("native", "triton", "torch"),
)


def _boft_bwd_fake(grad, x, weight, bias, blocks, scale, y0, need_x, need_blocks):
    return *_butterfly_bwd_fake(grad, x, blocks, need_x, need_blocks), scale.new_empty(
        0 if y0 is None else len(scale), 1
    )


# Gradients of x, blocks and scale; the last where y0 is given.
BOFT_BWD = Operator(
    "boft_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor blocks, Tensor scale, Tensor? y0, bool need_x,"
    " bool need_blocks) -> (Tensor, Tensor, Tensor)",
    fake=_boft_bwd_fake,
    order=("native", "triton", "torch"),
)

if triton_available():

    def _in_triton(operator: Operator, module: str) -> None:
        def launch(*args):
            # Importing triton takes a second: only where it runs.
            return getattr(importlib.import_module(f"fastpeft.kernels.{module}"), operator.name)(*args)

        operator.implement_triton(launch)

    for _operator in (BUTTERFLY_FWD, BUTTERFLY_BWD, BOFT_FWD, BOFT_BWD):
        _in_triton(_operator, "boft")
    for _operator in (CAYLEY_FWD, CAYLEY_BWD):
        _in_triton(_operator, "boft_cayley")


class CayleyFunction(torch.autograd.Function):
    """With M = (I + S)⁻¹ = ½ (Q + I): Q = 2 M − I, so dQ = −2 M dS M and ∂L/∂S = −2 Mᵀ G Mᵀ = −½ (Q + I)ᵀ G (Q + I)ᵀ.

    Q itself comes from a solve: doubling an inverse would double its error.
    """

    @staticmethod
    def forward(ctx, skew):
        identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
        q = reference.boft.divided(identity - skew, identity + skew)
        ctx.save_for_backward(q)
        return q

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        (q,) = ctx.saved_tensors
        with base.without_autocast(grad):
            twice = (q + torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).mT
            return twice @ grad @ twice * -0.5


def cayley(
    skew: Tensor,  # (..., b, b)
) -> Tensor:  # (..., b, b)
    """The Cayley transform Q = (I − S)(I + S)⁻¹ of a batch of matrices; orthogonal where S = −Sᵀ.

    Solved in float32 or wider whatever the dtype. Differentiable once. Source: BOFT (Liu et al., ICLR 2024, arXiv
    2311.06243), section 4.

    Raises:
        ValueError: the last two sizes differ.
        TypeError: not a floating-point tensor.
    """
    base.check_floating("skew", skew)
    if skew.dim() < 2 or skew.shape[-1] != skew.shape[-2]:
        raise ValueError(f"skew must have shape (..., b, b), got {tuple(skew.shape)}")
    if BUTTERFLY_FWD.choose(skew, skew) == "reference":
        return reference.boft.cayley(skew)
    with base.without_autocast(skew):
        wide = skew.to(torch.promote_types(skew.dtype, torch.float32))
        return CayleyFunction.apply(wide).to(skew.dtype)


class BlocksFunction(torch.autograd.Function):
    """The compiled Cayley transform of boft_R, which takes its skew part by itself."""

    @staticmethod
    def forward(ctx, boft_R, backend):
        q = CAYLEY_FWD.call(backend, boft_R)
        ctx.save_for_backward(q)
        ctx.backend = backend
        return q

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        return CAYLEY_BWD.call(ctx.backend, grad, *ctx.saved_tensors), None


def boft_blocks(
    boft_R: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (m, d / b, b, b), float32 or wider
    """The orthogonal blocks Q of the trained ones: Cayley of S = ½ (R − Rᵀ)."""
    wide = boft_R.to(torch.promote_types(boft_R.dtype, torch.float32))
    backend = where_it_fits(CAYLEY_FWD.choose(wide, wide), wide, lambda _: _cayley_fits(wide))
    if backend in ("native", "triton"):
        return BlocksFunction.apply(wide, backend)
    return cayley((wide - wide.mT) / 2)


def _factor_view(x: Tensor, block_size: int, factor: int) -> Tensor:
    """(T, d) seen as the inputs of a factor's blocks, (T, d / b, b), in the order of the blocks."""
    tokens, features = x.shape
    if factor == 0:
        return x.reshape(tokens, features // block_size, block_size)
    half, places = block_size // 2, 1 << factor
    halves = x.reshape(tokens, features // (block_size * places), 2, places, half)  # window, half of it, place, feature
    return halves.transpose(2, 3).reshape(tokens, features // block_size, block_size)


def _factor_unview(z: Tensor, factor: int) -> Tensor:
    """The way back from (T, d / b, b) to (T, d)."""
    tokens, blocks, block_size = z.shape
    if factor == 0:
        return z.reshape(tokens, blocks * block_size)
    halves = z.reshape(tokens, blocks >> factor, 1 << factor, 2, block_size // 2)
    return halves.transpose(2, 3).reshape(tokens, blocks * block_size)


def _apply_factor(x: Tensor, q: Tensor, factor: int) -> Tensor:
    z = _factor_view(x, q.shape[-1], factor).transpose(0, 1)  # (d / b, T, b)
    return _factor_unview(torch.bmm(z, q).transpose(0, 1), factor)


def butterfly_fwd(x: Tensor, blocks: Tensor) -> Tensor:
    """The composition: x R by one batched product for each factor, last factor first; (T, d)."""
    z = x.to(blocks.dtype)
    for factor in reversed(range(blocks.shape[0])):
        z = _apply_factor(z, blocks[factor], factor)
    return z.to(x.dtype)


def butterfly_bwd(
    grad: Tensor, x: Tensor, blocks: Tensor, need_x: bool, need_blocks: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and blocks. With z the input of factor f: dQ = zᵀ g for each block, then g ← g Qᵀ."""
    g = grad.to(blocks.dtype)
    inputs = [x.to(blocks.dtype)]  # of the last factor, the one before, …
    if need_blocks:
        for factor in reversed(range(1, blocks.shape[0])):
            inputs.append(_apply_factor(inputs[-1], blocks[factor], factor))
    dblocks = []
    for factor in range(blocks.shape[0]):
        if need_blocks:
            z = _factor_view(inputs.pop(), blocks.shape[-1], factor)
            dblocks.append(torch.einsum("tka,tkc->kac", z, _factor_view(g, blocks.shape[-1], factor)))
        g = _apply_factor(g, blocks[factor].mT, factor)
    return g.to(grad.dtype) if need_x else None, torch.stack(dblocks) if need_blocks else None


class ButterflyFunction(torch.autograd.Function):
    """Keeps x alone: the factors' inputs are computed again on the way back."""

    @staticmethod
    def forward(ctx, x, blocks, backend):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, blocks)
        ctx.backend = backend
        return _butterfly(backend, x, blocks)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        x, blocks = ctx.saved_tensors
        need_x, need_blocks, _ = ctx.needs_input_grad
        x = grad if x is None else x  # a stand-in of the right shape: the values are not read
        if ctx.backend == "native":
            dx, dblocks = BUTTERFLY_BWD.call("native", grad, x, blocks, need_x, need_blocks)
            return dx if need_x else None, dblocks if need_blocks else None, None
        arguments = base.as_rows(grad), base.as_rows(x), blocks, need_x, need_blocks
        if ctx.backend == "triton":
            dx, dblocks = BUTTERFLY_BWD.call("triton", *arguments)
        else:
            with base.without_autocast(grad):
                dx, dblocks = butterfly_bwd(*arguments)
        return base.like_rows(dx, grad) if need_x else None, dblocks if need_blocks else None, None


def _butterfly(backend: str, x: Tensor, blocks: Tensor) -> Tensor:
    if backend == "native":
        return BUTTERFLY_FWD.call("native", x, blocks)
    if backend == "triton":
        return base.like_rows(BUTTERFLY_FWD.call("triton", base.as_rows(x), blocks), x)
    with base.without_autocast(x):
        return base.like_rows(butterfly_fwd(base.as_rows(x), blocks), x)


def check_blocks(name: str, blocks: Tensor, features: int) -> None:
    """Checks the shape (m, features / b, b, b) and that m factors of block size b fit.

    Raises:
        ValueError: they do not.
        TypeError: not a floating-point tensor.
    """
    base.check_floating(name, blocks)
    if blocks.dim() != 4 or blocks.shape[2] != blocks.shape[3] or 0 in blocks.shape:
        raise ValueError(f"{name} must have shape (m, in/b, b, b), got {tuple(blocks.shape)}")
    factors, n_blocks, block_size, _ = blocks.shape
    if n_blocks * block_size != features:
        raise ValueError(f"{name} must cover {features} features, got {n_blocks} blocks of {block_size}")
    if reason := butterfly_misfit(features, block_size, factors):
        raise ValueError(f"{name} of shape {tuple(blocks.shape)}: {reason}")


def butterfly_misfit(features: int, block_size: int, factors: int) -> str | None:
    """Why m butterfly factors of block size b cannot act on so many features, or None where they can."""
    if features % block_size:
        return f"block size {block_size} does not divide {features} features"
    if factors > 1 and block_size % 2:
        return f"block size {block_size} is odd, and {factors} butterfly factors need half-blocks"
    if factors > 1 and features % (block_size << (factors - 1)):
        window = block_size << (factors - 1)
        return f"{factors} butterfly factors of block size {block_size} need a multiple of {window} features"
    return None


def butterfly(
    x: Tensor,  # (..., d)
    blocks: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (..., d)
    """x R with R = B̃_{m−1} … B̃_0, the butterfly product of BOFT (Liu et al., ICLR 2024, arXiv 2311.06243, eq. 5).

    Differentiable once in x and blocks. Computed in the wider of float32 and the dtype of blocks, rounded once.

    Args:
        x: (..., d), any floating-point dtype.
        blocks: (m, d / b, b, b); factor i is blocks[i]. Orthogonal in BOFT, but any blocks are right here.

    Returns:
        (..., d) in the dtype of x.

    Raises:
        ValueError: m factors of block size b do not fit d features, or devices differ.
        TypeError: not floating-point tensors.
    """
    base.check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., d), got ()")
    check_blocks("blocks", blocks, x.shape[-1])
    base.check_same_device(x, blocks=blocks)
    return apply_butterfly(x, blocks)


def _window_fits(blocks: Tensor, shared_memory: int) -> bool:
    """Whether CUDA C++ has room for a window of b·2^(m−1) features: the backward holds two rows of it in float32, or
    three where block sizes have no kernel of their own.
    """
    factors, _, block_size, _ = blocks.shape
    rows = 2 if block_size in (2, 4, 8, 16, 32) else 3
    return 4 * rows * ((block_size << (factors - 1)) + 31) <= shared_memory


def _cayley_fits(matrices: Tensor) -> bool:
    """Whether CUDA C++ transforms blocks of this size."""
    return matrices.shape[-1] <= 64


def apply_butterfly(x: Tensor, blocks: Tensor) -> Tensor:
    """butterfly for arguments that are known to fit."""
    backend = where_it_fits(BUTTERFLY_FWD.choose(x, blocks), x, partial(_window_fits, blocks))
    if backend == "reference":
        return reference.boft.butterfly(x, blocks)
    wide = torch.promote_types(torch.promote_types(blocks.dtype, x.dtype), torch.float32)
    blocks = blocks.to(wide)
    if base.needs_autograd(x, blocks):
        return ButterflyFunction.apply(x, blocks, backend)
    return _butterfly(backend, x, blocks)


def butterfly_transposed(x: Tensor, blocks: Tensor) -> Tensor:
    """x Rᵀ, (T, d): what the backward pass does to a gradient, without a derivative of its own."""
    rotated, _ = butterfly_bwd(x, x, blocks, need_x=True, need_blocks=False)
    assert rotated is not None
    return rotated


def scale_rows(y: Tensor, boft_s: Tensor, bias: Tensor | None) -> Tensor:
    """(y − b) ⊙ s + b for y (..., out) and boft_s (out, 1), in the wider dtype and rounded once.

    Written as y + (y − b) ⊙ (s − 1), which leaves y as it is, to the last bit, where s is one: a fresh adapter changes
    nothing. The price is that a bias far larger than the product costs digits of y − b, as it does in PEFT.
    """
    scale = boft_s.squeeze(-1)
    if bias is None:
        return (y * scale).to(y.dtype)
    wide = y.to(torch.promote_types(y.dtype, scale.dtype))
    return torch.addcmul(wide, wide - bias, scale - 1).to(y.dtype)


class BOFTFunction(torch.autograd.Function):
    """The whole layer in compiled operators. Keeps x, and y before it was scaled if s is trained.

    matrices: orthogonal blocks, or boft_R where from_R is set, whose Cayley transform is then part of the layer.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, matrices, boft_s, from_R, backend):
        need_s = ctx.needs_input_grad[4]
        blocks = CAYLEY_FWD.call(backend, matrices) if from_R else matrices
        y, y0 = _run(backend, x, weight, bias, blocks, boft_s, need_s)
        ctx.save_for_backward(x, weight, bias, blocks, boft_s, y0 if need_s else None)
        ctx.from_R, ctx.backend = from_R, backend
        return y

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        need_x, _, _, need_blocks, *_ = ctx.needs_input_grad
        x, weight, bias, blocks, boft_s, y0 = ctx.saved_tensors
        arguments = (weight, bias, blocks, boft_s, y0, need_x, need_blocks)
        if ctx.backend == "native":
            dx, dblocks, ds = BOFT_BWD.call("native", grad, x, *arguments)
        else:
            with base.without_autocast(grad):
                dx, dblocks, ds = BOFT_BWD.call(ctx.backend, base.as_rows(grad), base.as_rows(x), *arguments)
            dx = base.like_rows(dx, grad) if need_x else None
        if ctx.from_R and need_blocks:
            dblocks = CAYLEY_BWD.call(ctx.backend, dblocks, blocks)
        return (
            dx if need_x else None, None, None, dblocks if need_blocks else None, None if y0 is None else ds, None, None
        )  # fmt: skip


def _run(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, blocks: Tensor, boft_s: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    if backend == "native":
        return BOFT_FWD.call("native", x, weight, bias, blocks, boft_s, keep)
    y, y0 = BOFT_FWD.call(backend, base.as_rows(x), weight, bias, blocks, boft_s, keep)
    return base.like_rows(y, x), y0


def rotated_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    blocks: Tensor,  # (m, in / b, b, b)
    boft_s: Tensor,  # (out, 1)
) -> Tensor:  # (..., out)
    """y = ((x R) Wᵀ) ⊙ s + b from orthogonal blocks that are at hand."""
    if backend := _in_one_operator(x, weight, bias, blocks, boft_s, False):
        return base.through_autocast(_apply, x, weight, bias, blocks, boft_s, False, backend)
    return scale_rows(F.linear(apply_butterfly(x, blocks), weight, bias), boft_s, bias)


def apply_boft(x: Tensor, weight: Tensor, bias: Tensor | None, boft_R: Tensor, boft_s: Tensor) -> Tensor:
    """boft_linear for arguments that are known to fit."""
    if backend := _in_one_operator(x, weight, bias, boft_R, boft_s, True):
        return base.through_autocast(_apply, x, weight, bias, boft_R, boft_s, True, backend)
    return rotated_linear(x, weight, bias, boft_blocks(boft_R), boft_s)


def _triton_pays(x: Tensor, matrices: Tensor) -> bool:
    """By counting, not measured. CUDA C++ reads shared memory and multiplies outside tensor cores, b · m of both for a
    feature of a token; Triton multiplies a window by one matrix of at most 64 on tensor cores, which 16-bit elements
    have, but makes that matrix in launches of its own. At 4096 features, forward and training over the frozen layer:
    (8, 4), T 16: 1.03 / 1.09 here, 1.03 / 1.12 there; T 4096: 1.30 / 1.53 and 1.18 / 1.24; (4, 2) the same throughout.
    """
    factors, _, block_size, _ = matrices.shape
    many = x.numel() >= 256 * x.shape[-1]
    return many and x.dtype.itemsize == 2 and block_size * factors >= 32 and block_size << (factors - 1) <= 64


def _in_one_operator(
    x: Tensor, weight: Tensor, bias: Tensor | None, matrices: Tensor, boft_s: Tensor, from_R: bool
) -> str | None:
    """The backend that has the whole layer, if the one that is chosen does."""

    def fits(shared_memory: int) -> bool:
        return _window_fits(matrices, shared_memory) and (not from_R or _cayley_fits(matrices))

    backend = where_it_fits(BOFT_FWD.choose(x, matrices), x, fits)
    backend = where_it_pays(backend, x, lambda: _triton_pays(x, matrices))
    if backend not in ("native", "triton") or not base.is_frozen(weight, bias):
        return None
    return backend if boft_s.dtype == matrices.dtype or BOFT_FWD.choose(x, boft_s) == backend else None


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    matrices: Tensor,
    boft_s: Tensor,
    from_R: bool,
    backend: str,
) -> Tensor:
    if matrices.dtype != torch.float32 or boft_s.dtype != torch.float32:
        matrices, boft_s = matrices.float(), boft_s.float()
    if base.needs_autograd(x, matrices, boft_s):
        return BOFTFunction.apply(x, weight, bias, matrices, boft_s, from_R, backend)
    blocks = CAYLEY_FWD.call(backend, matrices) if from_R else matrices
    return _run(backend, x, weight, bias, blocks, boft_s, False)[0]


def boft_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    boft_R: Tensor,  # (m, in / b, b, b)
    boft_s: Tensor,  # (out, 1)
) -> Tensor:  # (..., out)
    """y = ((x R) Wᵀ) ⊙ s + b, R from m butterfly factors: BOFT (Liu et al., ICLR 2024, arXiv 2311.06243, equation 5).

    The blocks of R are the Cayley transform of ½ (boft_R − boft_Rᵀ). The bias is not scaled. Differentiable once in x,
    boft_R and boft_s, and in weight and bias where they ask for it.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        boft_R: (m, in / b, b, b).
        boft_s: (out, 1).

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, or m factors of block size b do not fit in.
        TypeError: a dtype does not fit.
    """
    base.check_floating("boft_s", boft_s)
    base.check_shape("boft_s", boft_s, ("out", 1))
    base.check_floating("x", x)
    check_blocks("boft_R", boft_R, x.shape[-1] if x.dim() else 0)
    base.check_base(x, weight, bias, boft_R.shape[1] * boft_R.shape[2], boft_s.shape[0])
    base.check_same_device(x, boft_R=boft_R, boft_s=boft_s)
    if BUTTERFLY_FWD.choose(x, boft_R) == "reference":
        return reference.boft.boft_linear(x, weight, bias, boft_R, boft_s)
    return apply_boft(x, weight, bias, boft_R, boft_s)
