"""DoRA's operator: y = m / ‖W + s · B A‖ ⊙ (W x + s · B (A x)) + b. Formula and source: fastpeft/reference/dora.py.

LoRA's operator, then one pass that scales. The norms come from products that are r wide, and no matrix of W's size is
built for them. They are constants in the backward pass, as in the paper (section 4.3) and in PEFT: what reaches A and B
is the gradient of a LoRA whose output was scaled by numbers that have nothing to do with them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.ops import base
from fastpeft.ops.lora import LORA_FWD, apply_lora


def row_squares(
    weight: Tensor,  # (out, in)
) -> Tensor:  # (out,), float32 or wider
    """‖W‖² of every row: what of the norms stays the same while W does."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.no_grad():
        return _by_rows(weight, wide, lambda rows: torch.linalg.vector_norm(rows, dim=1)).square_()


def _by_rows(weight: Tensor, wide: torch.dtype, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(weight in the wide dtype), whose rows follow from the weight's rows, never with all of them widened."""
    if weight.dtype == wide:
        return function(weight)
    return torch.cat([function(rows.to(wide)) for rows in weight.split(_rows_of_part(weight))])


def _rows_of_part(weight: Tensor) -> int:
    """How many rows of W are widened at a time: a quarter at most, and on a CPU what a second-level cache holds."""
    entries = 1 << (18 if weight.is_cpu else 22)
    return max(1, min(entries // max(1, weight.shape[1]), weight.shape[0] // 4))


def row_norms(
    weight: Tensor,  # (out, in)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
    squares: Tensor | None = None,  # (out,), of row_squares where they are at hand
) -> Tensor:  # (out,), float32 or wider, without a gradient
    """‖W + s · B A‖ of every row, by ‖W‖² + s · ⟨2 W Aᵀ + s · B (A Aᵀ), B⟩: r-wide products alone.

    Where what is added up nearly cancels, digits are lost: with κ² = (‖W‖² + s² Σ_k B_k² ‖A_k‖²) / ‖W + s · B A‖² the
    relative error is up to 2 κ² times that of a sum of as many squares, a few ε. On the CPU rows with κ > 2 are
    therefore summed up again entry by entry, a part at a time; on other devices, where looking for them would make the
    host wait, they are not.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
    with torch.no_grad(), base.without_autocast(weight):
        A, B = lora_A.to(wide), lora_B.to(wide)
        squares = (row_squares(weight) if squares is None else squares).to(wide)
        mixed = _by_rows(weight, wide, lambda rows: rows @ A.T)
        # In float32 libraries lose a digit of it over thousands of columns. MPS has nothing wider.
        precise = A if A.device.type == "mps" else A.double()
        products = (precise @ precise.T).to(wide)
        mixed.addmm_(B, products, beta=2, alpha=scaling)
        norms2 = torch.add(squares, mixed.mul_(B).sum(1), alpha=scaling).clamp_(min=0)
        norms = norms2.sqrt()
        if norms.is_cpu and not torch.compiler.is_compiling():
            uncancelled = torch.addmv(squares, B.square(), products.diagonal(), alpha=scaling**2)
            cancelled = norms2.mul_(4) < uncancelled
            if bool(cancelled.any()):
                for rows in cancelled.nonzero().squeeze(1).split(_rows_of_part(weight)):
                    sums = torch.addmm(weight[rows].to(wide), B[rows], A, alpha=scaling)
                    norms[rows] = torch.linalg.vector_norm(sums, dim=1)
        return norms


def _scaled(y: Tensor, bias: Tensor | None, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """b + c (y − b), computed in the wider dtype and rounded once; y itself, to the last bit, where c is one."""
    if bias is None:
        if y.dtype == scale.dtype:
            return torch.mul(y, scale, out=out)
        return (y * scale).to(y.dtype)
    wide = torch.promote_types(y.dtype, scale.dtype)
    # From c = ½ on lerp computes y − (y − b) (1 − c).
    if y.dtype == wide:
        return torch.lerp(bias.to(wide), y, scale.to(wide), out=out)
    return torch.lerp(bias.to(wide), y.to(wide), scale).to(y.dtype)


class ScaleFunction(torch.autograd.Function):
    """y' = c (y − b) + b with c = m / norm: dy = c g, dm = Σ_t g (y − b) / norm, db = (1 − c) Σ_t g."""

    @staticmethod
    def forward(ctx, y, bias, magnitude, norms):
        scale = magnitude / norms
        need_m = ctx.needs_input_grad[2]
        ctx.save_for_backward(y if need_m else None, bias if need_m else None, norms if need_m else None, scale)
        ctx.magnitude_dtype = magnitude.dtype
        return _scaled(y, bias, scale)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        need_y, need_b, need_m, _ = ctx.needs_input_grad
        y, bias, norms, scale = ctx.saved_tensors
        dy = dbias = dm = None
        with base.without_autocast(grad):
            if need_y:
                dy = (grad * scale).to(grad.dtype)
            if need_b:
                dbias = (base.as_rows(grad).sum(0, dtype=scale.dtype) * (1 - scale)).to(grad.dtype)
            if need_m:
                products = grad.to(scale.dtype) * (y if bias is None else y.to(scale.dtype) - bias)
                dm = (base.as_rows(products).sum(0) / norms).to(ctx.magnitude_dtype)
        return dy, dbias, dm, None


def scale_output(
    y: Tensor,  # (..., out), the bias in it
    bias: Tensor | None,  # (out,)
    magnitude: Tensor,  # (out,)
    norms: Tensor,  # (out,)
) -> Tensor:  # (..., out)
    """m / norm ⊙ (y − b) + b. May write into y where no gradient is wanted."""
    if base.needs_autograd(y, bias, magnitude):
        return ScaleFunction.apply(y, bias, magnitude, norms)
    return _scaled(y, bias, magnitude / norms, out=y)


def add_dora(
    y: Tensor,  # (..., out)
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    magnitude: Tensor,  # (out,)
    scaling: float,
    dropout_p: float,
    norms: Tensor,  # (out,)
) -> Tensor:  # (..., out)
    """DoRA on top of y = W x + b, or of what other adapters have made of that.

    With dropout only what the adapter changes sees x as dropout left it, as in PEFT:
    y + (c − 1) ⊙ W drop(x) + c ⊙ s · B A drop(x).
    """
    dropped = x if dropout_p == 0 else F.dropout(x, dropout_p)
    delta = apply_lora(dropped, None, None, lora_A, lora_B, scaling)
    if dropout_p == 0:
        return scale_output(y + delta, bias, magnitude, norms)
    scale = magnitude / norms
    return (y + (scale - 1) * F.linear(dropped, weight) + scale * delta).to(y.dtype)


def dora_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    magnitude: Tensor,  # (out,)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = m ⊙ (W + s · B A) x / ‖W + s · B A‖ + b: DoRA (Liu et al., ICML 2024, arXiv 2402.09353, equation 5).

    The norm is that of every row of the matrix. It is a constant in the backward pass (section 4.3). Differentiable
    once in x, lora_A, lora_B and magnitude, and in weight and bias where they ask for it. Norms are computed in float32
    or wider; a row whose norm is zero gives m / 0.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        lora_A: (r, in).
        lora_B: (out, r) in the dtype of lora_A.
        magnitude: m, (out,).
        scaling: s, usually alpha / r.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    base.check_shape("lora_A", lora_A, ("r", "in"))
    base.check_shape("lora_B", lora_B, ("out", lora_A.shape[0]))
    base.check_shape("magnitude", magnitude, (lora_B.shape[0],))
    if weight is None:
        raise ValueError("weight must be a tensor, got None: DoRA scales by the norm of its rows")
    base.check_base(x, weight, bias, lora_A.shape[1], lora_B.shape[0])
    base.check_floating("lora_A", lora_A)
    base.check_floating("magnitude", magnitude)
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_B must have the dtype of lora_A, {lora_A.dtype}, got {lora_B.dtype}")
    base.check_same_device(x, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude)
    return apply_dora(x, weight, bias, lora_A, lora_B, magnitude, scaling)


def apply_dora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    norms: Tensor | None = None,
) -> Tensor:
    """dora_linear for arguments that are known to fit; of what the adapter sees a share of dropout_p is dropped.

    norms: ‖W + s · B A‖ of every row where it is at hand, as ``fastpeft.nn.dora.RowNorms`` keeps it.
    """
    if LORA_FWD.choose(x, lora_A) == "reference":
        return _reference(x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p)
    if norms is None:
        norms = row_norms(weight, lora_A, lora_B, scaling)
    return base.through_autocast(_apply, x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, norms)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float,
    norms: Tensor,
) -> Tensor:
    if dropout_p > 0:
        y = F.linear(x, weight, bias)
        return add_dora(y, x, weight, bias, lora_A, lora_B, magnitude, scaling, dropout_p, norms)
    return scale_output(apply_lora(x, weight, bias, lora_A, lora_B, scaling), bias, magnitude, norms)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float,
    dropout_p: float,
) -> Tensor:
    adapter = (lora_A, lora_B, magnitude, scaling)
    if dropout_p == 0:
        return reference.dora.dora_linear(x, weight, bias, *adapter)
    change = reference.dora.dora_weight(weight, *adapter) - weight
    return F.linear(x, weight, bias) + F.linear(F.dropout(x, dropout_p), change.to(x.dtype))
