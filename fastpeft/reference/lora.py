"""LoRA: Low-Rank Adaptation (Hu et al., ICLR 2022, arXiv 2106.09685); rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s = α / r (section 4.1), or α / √r for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_weight(
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
) -> Tensor:  # (out, in)
    """ΔW = s · B A."""
    return scaling * (lora_B @ lora_A)


def lora_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    lora_A: Tensor,  # (r, in)
    lora_B: Tensor,  # (out, r)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + s · B A x (equation 3)."""
    return F.linear(x, weight + lora_weight(lora_A, lora_B, scaling).to(weight.dtype), bias)
