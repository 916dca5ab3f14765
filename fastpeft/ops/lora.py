"""LoRA's operator: y = W x + b + s · B (A x). Formula and source: fastpeft/reference/lora.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.backend import Operator, triton_available
from fastpeft.ops import base


def _lora_fwd_fake(x, weight, bias, lora_A, lora_B, scaling, dropped=None):
    lead = x.shape[:-1]
    return x.new_empty(*lead, lora_B.shape[0]), x.new_empty(math.prod(lead), lora_A.shape[0], dtype=torch.float32)


# Returns y (..., out) and h = x Aᵀ (T, r), or h = dropped Aᵀ: x as dropout left it for the adapter. On a GPU Triton
# comes before the library's composition by counting, not measured (bench/floors.py): one launch for three to decode.
LORA_FWD = Operator(
    "lora_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling,"
    " Tensor? dropped=None) -> (Tensor, Tensor)",
    fake=_lora_fwd_fake,
    order=("native", "triton", "torch"),
)


def _lora_bwd_fake(grad, x, weight, lora_A, lora_B, h, scaling, need_x):
    dx = grad.new_empty(*(grad.shape[:-1] if need_x else (0,)), lora_A.shape[1])
    dA = lora_A.new_empty(0 if x is None else lora_A.shape[0], lora_A.shape[1])
    return dx, dA, lora_B.new_empty(0, lora_B.shape[1]) if h is None else torch.empty_like(lora_B)


# Gradients of x, lora_A (if x is given) and lora_B (if h is given); one that is not needed comes back with no rows.
# Triton leaves g W to the library and reads x and g once for the rest.
LORA_BWD = Operator(
    "lora_bwd(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? h, float scaling,"
    " bool need_x) -> (Tensor, Tensor, Tensor)",
    fake=_lora_bwd_fake,
    order=("native", "triton", "torch"),
)

# With dropout of A's input by a generator that counts: the mask is a function of the seed (1,) and of the place, worked
# out where it is needed, forward and backward, and nowhere kept. Takes x as rows.
LORA_DROPOUT_FWD = Operator(
    "lora_dropout_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor lora_A, Tensor lora_B, float scaling, Tensor seed,"
    " float p) -> (Tensor, Tensor)",
    fake=lambda x, weight, bias, lora_A, lora_B, scaling, seed, p: _lora_fwd_fake(
        x, weight, bias, lora_A, lora_B, scaling
    ),
    order=("triton", "torch"),
)
LORA_DROPOUT_BWD = Operator(
    "lora_dropout_bwd(Tensor grad, Tensor? x, Tensor? weight, Tensor lora_A, Tensor lora_B, Tensor? h, float scaling,"
    " bool need_x, Tensor seed, float p) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, x, weight, lora_A, lora_B, h, scaling, need_x, seed, p: _lora_bwd_fake(
        grad, x, weight, lora_A, lora_B, h, scaling, need_x
    ),
    order=("triton", "torch"),
)

if triton_available():

    def _lora_fwd_triton(*args):
        from fastpeft.kernels.lora import lora_fwd  # importing triton takes a second: only where it runs

        return lora_fwd(*args)

    def _lora_bwd_triton(grad, *rest):
        from fastpeft.kernels.lora import lora_bwd

        with base.without_autocast(grad):
            return lora_bwd(grad, *rest)

    for _operator in (LORA_FWD, LORA_DROPOUT_FWD):
        _operator.implement_triton(_lora_fwd_triton)
    for _operator in (LORA_BWD, LORA_DROPOUT_BWD):
        _operator.implement_triton(_lora_bwd_triton)


def lora_fwd(
    x: Tensor,  # (T, in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
    dropped: Tensor | None = None,  # (T, in)
) -> tuple[Tensor, Tensor]:  # y (T, out), h (T, r)
    """The composition: one pass over x for h = x Aᵀ, and s · h Bᵀ added into the base product's output."""
    y = None if weight is None else F.linear(x, weight, bias)
    h = (x if dropped is None else dropped).to(lora_A.dtype) @ lora_A.T
    if y is not None and y.dtype == h.dtype:
        return y.addmm_(h, lora_B.T, alpha=scaling), h
    return base.add_rounded(y, (h * scaling) @ lora_B.T, x.dtype), h


def lora_bwd(
    grad: Tensor,  # (T, out)
    x: Tensor | None,  # (T, in)
    weight: Tensor | None,  # (out, in)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    h: Tensor | None,  # (T, r)
    scaling: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, A and B: gB = s · g B, dx = g W + gB A, dA = gBᵀ x, dB = s · gᵀ h."""
    need_x, need_A, need_B = needs
    wide = grad.to(lora_B.dtype)
    grad_B = (wide @ lora_B) * scaling if need_x or need_A else None
    dx = dA = dB = None
    if need_x:
        assert grad_B is not None
        dx = None if weight is None else grad @ weight
        if dx is not None and dx.dtype == grad_B.dtype:
            dx.addmm_(grad_B, lora_A)
        else:
            dx = base.add_rounded(dx, grad_B @ lora_A, grad.dtype)
    if need_A:
        assert grad_B is not None and x is not None
        dA = grad_B.T @ x.to(grad_B.dtype)
    if need_B:
        assert h is not None
        # In this order of factors the libraries at hand lose up to five times fewer digits over many tokens.
        dB = (h.to(wide.dtype).T @ wide).T.mul(scaling)
    return dx, dA, dB


class Dropout(NamedTuple):
    """Of A's input: x as dropout left it, or the probability and what the Triton lane's generator starts from."""

    dropped: Tensor | None = None
    seed: Tensor | None = None
    p: float = 0.0


NO_DROPOUT = Dropout()


def draw_dropout(x: Tensor, p: float, backend: str) -> Dropout:
    if p == 0:
        return NO_DROPOUT
    if backend == "triton":
        # Drawn on the device, so that a CUDA graph draws another one each time it is replayed.
        return Dropout(seed=torch.randint(1 << 62, (1,), device=x.device), p=p)
    return Dropout(dropped=F.dropout(x, p))


def _run(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout: Dropout,
) -> tuple[Tensor, Tensor]:
    dropped, seed, p = dropout
    if backend == "native":
        return LORA_FWD.call("native", x, weight, bias, lora_A, lora_B, scaling, dropped)
    arguments = base.as_rows(x), weight, bias, lora_A, lora_B, scaling
    if backend == "torch":
        y, h = lora_fwd(*arguments, dropped if dropped is None else base.as_rows(dropped))
    elif seed is None:
        y, h = LORA_FWD.call(backend, *arguments)
    else:
        y, h = LORA_DROPOUT_FWD.call(backend, *arguments, seed, p)
    return base.like_rows(y, x), h


def _gradients(ctx, grad, x, weight, lora_A, lora_B, seed, h, need_x):
    """Of what A was applied to, of A and of B; with weight what x gets from the base is in the first."""
    if ctx.backend == "native":
        return LORA_BWD.call("native", grad, x, weight, lora_A, lora_B, h, ctx.scaling, need_x)
    arguments = base.as_rows(grad), x if x is None else base.as_rows(x), weight, lora_A, lora_B, h, ctx.scaling
    if ctx.backend == "torch":
        with base.without_autocast(grad):
            dx, dA, dB = lora_bwd(*arguments, (need_x, x is not None, h is not None))
    elif seed is None:
        dx, dA, dB = LORA_BWD.call(ctx.backend, *arguments, need_x)
    else:
        dx, dA, dB = LORA_DROPOUT_BWD.call(ctx.backend, *arguments, need_x, seed, ctx.p)
    return dx if dx is None or not need_x else base.like_rows(dx, grad), dA, dB


class LoRAFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, lora_A, lora_B, scaling, backend, dropped, seed, p):
        y, h = _run(backend, x, weight, bias, lora_A, lora_B, scaling, Dropout(dropped, seed, p))
        need_x, _, _, need_A, need_B, *_ = ctx.needs_input_grad
        source = x if dropped is None else dropped
        ctx.save_for_backward(
            source if need_A else None, weight if need_x else None, lora_A, lora_B, seed, h if need_B else None
        )
        ctx.scaling, ctx.backend, ctx.drops, ctx.p = scaling, backend, dropped is not None, p
        return y

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        need_x, _, _, need_A, need_B, _, _, need_dropped, *_ = ctx.needs_input_grad
        source, weight, lora_A, lora_B, seed, h = ctx.saved_tensors
        if not ctx.drops:
            dx, dA, dB = _gradients(ctx, grad, source, weight, lora_A, lora_B, seed, h, need_x)
            ddropped = None
        else:
            dx = base.base_gradient(grad, weight) if need_x and weight is not None else None
            ddropped, dA, dB = _gradients(ctx, grad, source, None, lora_A, lora_B, seed, h, need_dropped)
        return (
            dx if need_x else None, None, None, dA if need_A else None, dB if need_B else None, None, None,
            ddropped if need_dropped else None, None, None,
        )  # fmt: skip


def lora_linear(
    x: Tensor,  # (..., in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + s · B (A x): LoRA (Hu et al., ICLR 2022, arXiv 2106.09685, equation 3).

    Differentiable in x, lora_A and lora_B once, and in weight and bias where they ask for it. The adapter's product is
    computed in the dtype of lora_A and lora_B (float32 adapters over a bfloat16 base are usual) and rounded once.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x, or None for the delta alone.
        bias: (out,) in the dtype of x, or None.
        lora_A: (r, in).
        lora_B: (out, r) in the dtype of lora_A.
        scaling: s, usually alpha / r.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    base.check_shape("lora_A", lora_A, ("r", "in"))
    base.check_shape("lora_B", lora_B, ("out", lora_A.shape[0]))
    base.check_base(x, weight, bias, lora_A.shape[1], lora_B.shape[0])
    base.check_floating("lora_A", lora_A)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_B must have the dtype of lora_A, {lora_A.dtype}, got {lora_B.dtype}")
    base.check_same_device(x, lora_A=lora_A, lora_B=lora_B)
    return apply_lora(x, weight, bias, lora_A, lora_B, scaling)


def apply_lora(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """lora_linear for arguments that are known to fit; of what A is applied to a share of dropout_p is dropped."""
    backend = LORA_FWD.choose(x, lora_A)
    if backend == "reference":
        delta = reference.lora.lora_weight(lora_A, lora_B, scaling)
        if dropout_p == 0:
            return base.dense_linear(x, weight, bias, delta)
        y = base.dense_linear(F.dropout(x, dropout_p), None, None, delta)
        return y if weight is None else F.linear(x, weight, bias) + y
    return base.through_autocast(_apply, x, weight, bias, lora_A, lora_B, scaling, backend, dropout_p)


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    backend: str,
    dropout_p: float,
) -> Tensor:
    if backend == "native" and lora_A.dtype != torch.float32:
        lora_A, lora_B = lora_A.float(), lora_B.float()
    dropout = draw_dropout(x, dropout_p, backend)
    if not base.needs_autograd(x, weight, bias, lora_A, lora_B):
        return _run(backend, x, weight, bias, lora_A, lora_B, scaling, dropout)[0]
    if base.is_frozen(weight, bias):
        return LoRAFunction.apply(x, weight, bias, lora_A, lora_B, scaling, backend, *dropout)
    delta = LoRAFunction.apply(x, None, None, lora_A, lora_B, scaling, backend, *dropout)
    return F.linear(x, weight, bias) + delta  # type: ignore[arg-type]
