"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al., ICML 2024, arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.reference.lora import lora_weight


def dora_norm(
    weight: Tensor,  # (out, in)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
) -> Tensor:  # (out,)
    """‖W + s · B A‖ of every row, that is over the inputs of one output: the paper's norm of a column, W transposed.

    A constant in the backward pass (section 4.3).
    """
    return torch.linalg.vector_norm(weight + lora_weight(lora_A, lora_B, scaling), dim=1).detach()


def dora_weight(
    weight: Tensor,  # (out, in)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    magnitude: Tensor,  # (out,)
    scaling: float,
) -> Tensor:  # (out, in)
    """W' = m (W + s · B A) / ‖W + s · B A‖ (equation 5)."""
    scale = magnitude / dora_norm(weight, lora_A, lora_B, scaling)
    return scale[:, None] * (weight + lora_weight(lora_A, lora_B, scaling))


def dora_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    magnitude: Tensor,  # (out,)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W' x + b. The bias is not scaled."""
    return F.linear(x, dora_weight(weight, lora_A, lora_B, magnitude, scaling).to(weight.dtype), bias)
