"""OFT: orthogonal finetuning (Qiu et al., NeurIPS 2023, arXiv 2306.07280), on the input side as OFTv2 (Qiu et al. 2025,
arXiv 2506.19847) writes it, in the convention of PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.reference.boft import cayley


def skew_blocks(
    oft_R: Tensor,  # (r, b (b − 1) / 2), or (1, …) where all blocks share one
    block_size: int,
) -> Tensor:  # (r, b, b)
    """S = U − Uᵀ: the numbers are the entries of S above its diagonal, row by row."""
    rows, cols = torch.triu_indices(block_size, block_size, 1, device=oft_R.device)
    upper = oft_R.new_zeros(oft_R.shape[0], block_size, block_size).index_put(
        (torch.arange(oft_R.shape[0], device=oft_R.device)[:, None], rows, cols), oft_R
    )
    return upper - upper.mT


def neumann(
    skew: Tensor,  # (..., b, b)
    terms: int,
) -> Tensor:  # (..., b, b)
    """I + 2 S + 2 S² + … + 2 S^(k−1) + S^k ≈ (I + S)(I − S)⁻¹, the Cayley–Neumann form: near the transpose of `cayley`.

    The powers are those of PEFT from 0.18 on: k = 0 for one term, 1 for two, and max(3, terms − 1) for more. The last
    power counts once where k ≥ 3, else twice.
    """
    power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    result = power
    last = terms - 1 if terms < 3 else max(3, terms - 1)
    for k in range(1, last + 1):
        power = power @ skew
        result = result + (power if k == last >= 3 else 2 * power)
    return result


def project(
    oft_R: Tensor,  # (r, b (b − 1) / 2)
    eps: float,
) -> Tensor:  # (r, b (b − 1) / 2)
    """COFT, the constrained form: every S is brought into the ball ‖S‖ ≤ ε / √r around 0. Gradients pass as if it were
    not there: what is trained is the projected numbers.
    """
    radius = eps / oft_R.shape[0] ** 0.5
    norm = 2**0.5 * torch.linalg.vector_norm(oft_R, dim=1, keepdim=True)  # ‖S‖ counts every number twice
    return oft_R + (torch.where(norm <= radius, oft_R, oft_R * (radius / norm)) - oft_R).detach()


def oft_blocks(
    oft_R: Tensor,  # (r, b (b − 1) / 2) or (1, …)
    block_size: int,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Tensor:  # (r, b, b) or (1, b, b)
    """The blocks of R: Q = (I − S)(I + S)⁻¹, or the Neumann series where a number of terms is given."""
    skew = skew_blocks(oft_R if eps is None else project(oft_R, eps), block_size)
    return cayley(skew) if neumann_terms is None else neumann(skew, neumann_terms)


def oft_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    oft_R: Tensor,  # (in / b, b (b − 1) / 2) or (1, …)
    block_size: int,
    neumann_terms: int | None = None,
    eps: float | None = None,
) -> Tensor:  # (..., out)
    """y = (x R) Wᵀ + b with R = diag(Q_1, …, Q_r)."""
    blocks = oft_blocks(oft_R, block_size, neumann_terms, eps).expand(x.shape[-1] // block_size, -1, -1)
    return F.linear((x.to(oft_R.dtype) @ torch.block_diag(*blocks)).to(x.dtype), weight, bias)
