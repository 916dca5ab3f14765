"""BOFT: orthogonal butterfly factors (Liu et al., ICLR 2024, arXiv 2311.06243), in the convention of PEFT."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cayley(
    skew: Tensor,  # (..., b, b)
) -> Tensor:  # (..., b, b)
    """Q = (I − S)(I + S)⁻¹, orthogonal where S = −Sᵀ (section 4, Cayley parametrization)."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return divided(identity - skew, identity + skew)


def divided(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator · denominator⁻¹ for batches of square matrices."""
    if denominator.is_cpu and denominator.dim() > 2 and denominator.shape[-1] > 128:
        # One by one: for batches of such sizes torch.linalg.solve fails on several threads (2.13, MKL, from 160 on).
        pairs = zip(numerator.flatten(0, -3), denominator.flatten(0, -3), strict=True)
        return torch.stack([divided(*pair) for pair in pairs]).reshape(numerator.shape)
    return torch.linalg.solve_ex(denominator, numerator, left=False)[0]  # on a GPU nothing waits for a check


def butterfly_permutation(features: int, block_size: int, factor: int) -> Tensor:  # (features,)
    """The permutation P_i of factor i: (P v)[j] = v[permutation[j]].

    In every window of 2^i blocks it takes the half-blocks (b / 2 entries) at even places first, then those at odd
    places. P_0 is the identity.
    """
    if factor == 0:
        return torch.arange(features)
    half, window = block_size // 2, block_size << factor
    halves = torch.arange(window).reshape(-1, half)
    order = torch.cat([halves[0::2], halves[1::2]]).flatten()
    return (torch.arange(0, features, window)[:, None] + order).flatten()


def butterfly_matrix(
    blocks: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (d, d)
    """R = B̃_{m−1} … B̃_0 with B̃_i = P_i diag(Q_i) P_iᵀ (equation 5)."""
    _, n_blocks, block_size, _ = blocks.shape
    result = torch.eye(n_blocks * block_size, dtype=blocks.dtype, device=blocks.device)
    for factor, q in enumerate(blocks):
        permutation = butterfly_permutation(n_blocks * block_size, block_size, factor).to(blocks.device)
        # (P D Pᵀ)[i, j] = D[permutation[i], permutation[j]]
        result = torch.block_diag(*q)[permutation][:, permutation] @ result
    return result


def butterfly(
    x: Tensor,  # (..., d)
    blocks: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (..., d)
    """x R."""
    return (x.to(blocks.dtype) @ butterfly_matrix(blocks)).to(x.dtype)


def boft_blocks(
    boft_R: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (m, d / b, b, b)
    """Orthogonal blocks from the trained ones: the Cayley transform of S = ½ (R − Rᵀ)."""
    return cayley((boft_R - boft_R.mT) / 2)


def reflectors(
    blocks: Tensor,  # (..., b, b)
) -> Tensor:  # (..., b (b + 1) / 2 − 1)
    """Orthogonal blocks of determinant 1 as reflections: Q = H_0 … H_{b−2} D with D = diag(−1, …, −1, 1).

    H_j = I − τ_j v_j v_jᵀ, where v_j is zero before entry j and one there: Householder's QR, with v scaled as LAPACK
    has it (Golub and Van Loan, Matrix Computations, algorithm 5.2.1), and every column taken to −e_j. A reflector is
    τ_j and then the entries of v_j after the one. Near the identity v is near e_j and τ near 2, exact numbers.
    """
    left, size = blocks.clone(), blocks.shape[-1]
    rounding = torch.finfo(blocks.dtype).eps ** 2
    found = []
    for j in range(size - 1):
        first, rest = left[..., j, j], left[..., j + 1 :, j].clone()
        # 1 + first, where that cancels from what the column's length is known to be. Half a turn, which has no such v,
        # becomes one of a little less.
        half_turn = (first < 0) & (rest.square().sum(-1) < rounding**2)
        rest[..., 0] = torch.where(half_turn, rounding, rest[..., 0])
        height = torch.where(first < 0, rest.square().sum(-1) / (1 - first), 1 + first)
        v = rest / height[..., None]
        tau = 2 / (1 + v.square().sum(-1))
        found += [tau[..., None], v]
        below = left[..., j + 1 :, j + 1 :]
        step = tau[..., None] * (left[..., j, j + 1 :] + (v[..., None, :] @ below).squeeze(-2))
        below -= v[..., :, None] * step[..., None, :]
    return torch.cat(found, -1) if found else blocks.new_empty(*blocks.shape[:-2], 0)


def reflected_blocks(
    reflectors: Tensor,  # (..., b (b + 1) / 2 − 1)
    block_size: int,
) -> Tensor:  # (..., b, b)
    """The way back: Q = H_0 … H_{b−2} D."""
    identity = torch.eye(block_size, dtype=reflectors.dtype, device=reflectors.device)
    result, start = identity.expand(*reflectors.shape[:-1], -1, -1), 0
    for j in range(block_size - 1):
        stop = start + block_size - j
        v = identity[j].expand(*reflectors.shape[:-1], -1).clone()
        v[..., j + 1 :] = reflectors[..., start + 1 : stop]
        result = result @ (identity - reflectors[..., start, None, None] * v[..., :, None] * v[..., None, :])
        start = stop
    last = block_size - 1
    return torch.cat([-result[..., :last], result[..., last:]], -1)


def boft_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    boft_R: Tensor,  # (m, in / b, b, b)
    boft_s: Tensor,  # (out, 1)
) -> Tensor:  # (..., out)
    """y = ((x R) Wᵀ) ⊙ s + b: the rotation acts on the input side of a frozen W, the bias is not scaled."""
    rotated = butterfly(x, boft_blocks(boft_R))
    y = F.linear(rotated, weight).to(boft_s.dtype) * boft_s.squeeze(-1)
    return (y if bias is None else y + bias).to(x.dtype)
