"""OFT's operators: blocks from skew-symmetric numbers, and the product with them. Formulas: fastpeft/reference/oft.py.

A block-diagonal rotation is a butterfly product of one factor, so the activation goes through BOFT's operators, which
keep x alone for the way back. The blocks are made by compositions over all of them at once, and by BOFT's compiled
Cayley transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.ops import base
from fastpeft.ops.boft import BUTTERFLY_FWD, apply_butterfly, boft_blocks, cayley


class ProjectFunction(torch.autograd.Function):
    """COFT's projection. Gradients pass as if it were not there: what is trained is the projected numbers."""

    @staticmethod
    def forward(ctx, oft_R, eps):
        radius = eps / oft_R.shape[0] ** 0.5
        norm = math.sqrt(2) * torch.linalg.vector_norm(oft_R, dim=1, keepdim=True)  # ‖S‖ counts every number twice
        return torch.where(norm <= radius, oft_R, oft_R * (radius / norm))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def project(oft_R: Tensor, eps: float) -> Tensor:
    """oft_R with every row's S in the ball ‖S‖ ≤ ε / √rows. Gradients pass unchanged."""
    return ProjectFunction.apply(oft_R, eps)


def neumann(
    skew: Tensor,  # (r, b, b)
    terms: int,
) -> Tensor:  # (r, b, b)
    """I + 2 S + … + 2 S^(k−1) + S^k with the k of reference.oft.neumann, by Horner's rule in S²: k / 2 products."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    if terms < 3:
        return identity + 2 * (terms - 1) * skew
    last = max(3, terms - 1)
    square = skew @ skew
    pair = 2 * (identity + skew)
    result = 2 * identity + skew if last % 2 else pair + square
    for _ in range((last - 3) // 2):
        result = torch.baddbmm(pair, square, result)
    return torch.baddbmm(pair - identity, square, result)


def oft_blocks(
    oft_R: Tensor,  # (r, b (b − 1) / 2), or (1, …) where all blocks share one
    block_size: int,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Tensor:  # (r, b, b) or (1, b, b), float32 or wider
    """The blocks of R: the Cayley transform of S = U − Uᵀ, or its Neumann series."""
    with base.without_autocast(oft_R):
        wide = oft_R.to(torch.promote_types(oft_R.dtype, torch.float32))
        if eps is not None:
            wide = project(wide, eps)
        rows, cols = torch.triu_indices(block_size, block_size, 1, device=wide.device)
        upper = wide.new_zeros(wide.shape[0], block_size**2).index_copy_(1, rows * block_size + cols, wide)
        upper = upper.unflatten(1, (block_size, block_size))
        if neumann_terms is not None:
            return neumann(upper - upper.mT, neumann_terms)
        if block_size <= 64:  # what CUDA's kernel takes, and beyond it LAPACK is faster than the CPU's
            return boft_blocks(2 * upper[None])[0]  # of ½ (R − Rᵀ)
        return cayley(upper - upper.mT)


def rotate(
    x: Tensor,  # (..., in)
    blocks: Tensor,  # (in / b, b, b), or (1, b, b) where all share one
) -> Tensor:  # (..., in)
    """x R with R = diag(blocks)."""
    return apply_butterfly(x, blocks.expand(x.shape[-1] // blocks.shape[-1], -1, -1)[None])


def apply_oft(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    oft_R: Tensor,
    block_size: int,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Tensor:
    """oft_linear for arguments that are known to fit."""
    return F.linear(rotate(x, oft_blocks(oft_R, block_size, neumann_terms, eps)), weight, bias)


def oft_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    oft_R: Tensor,  # (in / b, b (b − 1) / 2) or (1, …)
    block_size: int,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Tensor:  # (..., out)
    """y = (x R) Wᵀ + b with R = diag(Q_1, …, Q_r): OFT (Qiu et al., NeurIPS 2023, arXiv 2306.07280) on the input side
    (OFTv2, Qiu et al. 2025, arXiv 2506.19847).

    Q = (I − S)(I + S)⁻¹ with the numbers of oft_R above the diagonal of the skew-symmetric S, row by row.
    Differentiable once in x and oft_R, and in weight and bias where they ask for it.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x.
        bias: (out,) in the dtype of x, or None.
        oft_R: (in / b, b (b − 1) / 2), or (1, b (b − 1) / 2): one block for all.
        block_size: b.
        neumann_terms: take PEFT's truncated series for (I + S)(I − S)⁻¹ (that is, near Qᵀ), with PEFT's count of terms.
        eps: COFT: bring every S into ‖S‖ ≤ eps / √rows first; the gradient is that at the projected numbers.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, or neumann_terms or eps is out of range.
        TypeError: a dtype does not fit.
    """
    base.check_floating("oft_R", oft_R)
    features = x.shape[-1] if x.dim() else 0
    base.check_base(x, weight, bias, features, weight.shape[0] if weight.dim() else 0)
    if block_size < 1 or features % block_size:
        raise ValueError(f"block_size must divide the {features} features of x, got {block_size}")
    base.check_shape("oft_R", oft_R, ("in/b or 1", block_size * (block_size - 1) // 2))
    if oft_R.shape[0] not in (1, features // block_size):
        raise ValueError(f"oft_R must have {features // block_size} rows or 1, got {tuple(oft_R.shape)}")
    if neumann_terms is not None and neumann_terms < 1:
        raise ValueError(f"neumann_terms must be at least 1, got {neumann_terms}")
    if eps is not None and not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    base.check_same_device(x, oft_R=oft_R)
    if BUTTERFLY_FWD.choose(x, oft_R) == "reference":
        return reference.oft.oft_linear(x, weight, bias, oft_R, block_size, neumann_terms, eps)
    return apply_oft(x, weight, bias, oft_R, block_size, neumann_terms, eps)
