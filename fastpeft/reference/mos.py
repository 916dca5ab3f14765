"""MoS: Mixture of Shards (ICLR 2025, arXiv 2410.00938)."""

from __future__ import annotations

from torch import Tensor

from fastpeft.reference.lora import lora_linear, lora_weight


def mos_matrices(
    pool_A: Tensor,  # (n_shards, in / l)
    index_A: Tensor,  # (r, l)
    pool_B: Tensor,  # (n_shards, out / l)
    index_B: Tensor,  # (r, l)
) -> tuple[Tensor, Tensor]:  # (r, in), (out, r)
    """A and B of a LoRA: row j of A and column j of B are l shards of their pool, side by side (section 3.2)."""
    r = index_A.shape[0]
    return pool_A[index_A].reshape(r, -1), pool_B[index_B].reshape(r, -1).T


def mos_weight(pool_A: Tensor, index_A: Tensor, pool_B: Tensor, index_B: Tensor, scaling: float) -> Tensor:
    """ΔW = s · B A, (out, in)."""
    return lora_weight(*mos_matrices(pool_A, index_A, pool_B, index_B), scaling)


def mos_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    pool_A: Tensor,  # (n_shards, in / l)
    index_A: Tensor,  # (r, l)
    pool_B: Tensor,  # (n_shards, out / l)
    index_B: Tensor,  # (r, l)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + s · B A x."""
    return lora_linear(x, weight, bias, *mos_matrices(pool_A, index_A, pool_B, index_B), scaling)
