"""FourierFT (Gao et al., ICML 2024, arXiv 2405.03003), in the convention of PEFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fourier_weight(
    spectrum: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    cols: Tensor,  # (n,)
    shape: tuple[int, int],
    scaling: float,
) -> Tensor:  # (out, in)
    """ΔW = α · Re ifft2(S), S zero but for S[rows[k], cols[k]] = spectrum[k] (equations 2 to 4)."""
    dense = spectrum.new_zeros(shape).index_put((rows, cols), spectrum)
    return scaling * torch.fft.ifft2(dense).real


def fourier_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    spectrum: Tensor,  # (n,)
    rows: Tensor,  # (n,)
    cols: Tensor,  # (n,)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + ΔW x."""
    delta = fourier_weight(spectrum, rows, cols, (weight.shape[0], weight.shape[1]), scaling)
    return F.linear(x, weight + delta.to(weight.dtype), bias)
