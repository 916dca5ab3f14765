"""BOFT's Cayley transform (Liu et al., ICLR 2024, arXiv 2311.06243, section 4) of every block, and its gradient.

    Q = (I − S)(I + S)⁻¹,  S = ½ (boft_R − boft_Rᵀ)
    dR = ½ (dS − dSᵀ),  dS = −½ Pᵀ G Pᵀ,  P = Q + I          as fastpeft/ops/boft.py derives

    boft_R, Q, G and dR (m, d / b, b, b) float32

By elimination without pivoting: the symmetric part of I + S is the identity, so that no pivot is below one. Rows that
grow on the way lose digits, which one step of refinement brings back, with (I + S)⁻¹ = ½ (I + Q).
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.device import check_float32, count_tiles
from fastpeft.kernels.dots import dot_float32


@triton.jit
def matrix_places(rows, BLOCK: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """Where the entries of a program's matrices lie, and which entries of a tile they are.

    The matrices of a tile stand on its diagonal, each in the first corner of its slot, a power of two wide.
    """
    i = tl.arange(0, WIDTH)
    row = (tl.program_id(0).to(tl.int64) * (WIDTH // SLOT) + i // SLOT) * BLOCK + i % SLOT
    within = (i % SLOT < BLOCK) & (row < rows)
    mask = within[:, None] & within[None, :]
    if SLOT < WIDTH:
        mask = mask & (i[:, None] // SLOT == i[None, :] // SLOT)
    return row[:, None] * BLOCK + (i % SLOT)[None, :], mask


# Floor. Bytes: boft_R and Q once, 8 · b a row. Operations: 8 · WIDTH² for each of b steps and 4 · WIDTH³ to refine, for
# each WIDTH of rows. What counts is neither but the b steps that wait for each other.
@triton.jit
def cayley_fwd_kernel(
    boft_R_ptr,  # (features / BLOCK, BLOCK, BLOCK), contiguous, float32
    q_ptr,  # like boft_R
    rows,  # of all matrices
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,  # for one matrix
    WIDTH: tl.constexpr,  # whole slots
):
    offsets, mask = matrix_places(rows, BLOCK, SLOT, WIDTH)
    s = tl.load(boft_R_ptr + offsets, mask=mask, other=0.0)
    s = 0.5 * (s - tl.trans(s))
    i = tl.arange(0, WIDTH)
    eye = (i[:, None] == i[None, :]).to(tl.float32)
    inside = i[:, None] // SLOT == i[None, :] // SLOT
    a, q = eye + s, eye - s
    for k in range(BLOCK):
        # Rows k of all blocks at once: no column has entries of two blocks, so a sum over the rows picks its own.
        at_k = i % SLOT == k
        column = tl.sum(tl.where(at_k[None, :], a, 0.0), axis=1)
        if SLOT < WIDTH:
            pivot = tl.sum(tl.where(at_k[:, None] & inside, column[:, None], 0.0), axis=0)
        else:
            pivot = tl.sum(tl.where(at_k, column, 0.0), axis=0)
        a_row = tl.sum(tl.where(at_k[:, None], a, 0.0), axis=0) / pivot
        q_row = tl.sum(tl.where(at_k[:, None], q, 0.0), axis=0) / pivot
        column = tl.where(at_k, 0.0, column)[:, None]
        a = tl.where(at_k[:, None], a_row[None, :], a - column * a_row[None, :])
        q = tl.where(at_k[:, None], q_row[None, :], q - column * q_row[None, :])
        if SLOT < WIDTH:
            a, q = tl.where(inside, a, 0.0), tl.where(inside, q, 0.0)
    p = eye + q
    rest = dot_float32(-s, p, eye - q)
    q = dot_float32(0.5 * p, rest, q)
    tl.store(q_ptr + offsets, q, mask=mask)


# Floor. Bytes: G, Q and dR once, 12 · b a row. Operations: 4 · WIDTH³ for each WIDTH of rows.
@triton.jit
def cayley_bwd_kernel(
    grad_ptr,  # (features / BLOCK, BLOCK, BLOCK), contiguous, float32
    q_ptr,  # like grad
    dR_ptr,  # like grad
    rows,
    BLOCK: tl.constexpr,
    SLOT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offsets, mask = matrix_places(rows, BLOCK, SLOT, WIDTH)
    i = tl.arange(0, WIDTH)
    p = tl.trans(tl.load(q_ptr + offsets, mask=mask, other=0.0)) + (i[:, None] == i[None, :]).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
    zeros = tl.zeros_like(grad)
    ds = dot_float32(dot_float32(p, grad, zeros), p, zeros)
    tl.store(dR_ptr + offsets, 0.25 * (tl.trans(ds) - ds), mask=mask)


# The widest block that one program transforms, and the narrowest tile that a product takes.
WIDEST, NARROWEST = 64, 16


def cayley_config(matrices: torch.Tensor) -> tuple[dict[str, int], int, int]:
    """Settings of the kernels of the Cayley transform, the rows of all matrices and the programs that share them."""
    block = matrices.shape[-1]
    slot = 1 << (block - 1).bit_length()
    width = max(slot, NARROWEST)
    rows = matrices.numel() // block
    # Eight entries of a matrix for each thread; in one warp, for most blocks, no step waits for another warp. Twice as
    # many of the largest, or half of the registers that a thread can have, which would not do.
    settings = {"BLOCK": block, "SLOT": slot, "WIDTH": width, "num_warps": min(width * width // 256, 8)}
    return settings, rows, count_tiles(rows, width // slot * block)


def cayley_fwd(
    boft_R: torch.Tensor,  # (m, d / b, b, b), float32
) -> torch.Tensor:  # (m, d / b, b, b)
    """Q = (I − S)(I + S)⁻¹ with S = ½ (boft_R − boft_Rᵀ), of every block."""
    check_float32(boft_R=boft_R)
    if boft_R.shape[-1] > WIDEST:  # no matrix for one program, and work enough for the library's solve
        eye = torch.eye(boft_R.shape[-1], dtype=torch.float32, device=boft_R.device)
        skew = (boft_R - boft_R.mT) / 2
        return torch.linalg.solve_ex(eye + skew, eye - skew, left=False)[0].contiguous()
    config, rows, programs = cayley_config(boft_R)
    q = torch.empty(boft_R.shape, dtype=torch.float32, device=boft_R.device)
    with torch.cuda.device_of(boft_R):
        cayley_fwd_kernel[(programs,)](boft_R.contiguous(), q, rows, **config)
    return q


def cayley_bwd(
    grad: torch.Tensor,  # (m, d / b, b, b), float32
    blocks: torch.Tensor,  # (m, d / b, b, b), float32: what cayley_fwd returned
) -> torch.Tensor:  # (m, d / b, b, b)
    """The gradient of boft_R from that of its Cayley transform."""
    check_float32(grad=grad, blocks=blocks)
    if blocks.shape[-1] > WIDEST:
        p = (blocks + torch.eye(blocks.shape[-1], dtype=torch.float32, device=blocks.device)).mT
        ds = p @ grad @ p
        return 0.25 * (ds.mT - ds).contiguous()
    config, rows, programs = cayley_config(blocks)
    dR = torch.empty(blocks.shape, dtype=torch.float32, device=blocks.device)
    with torch.cuda.device_of(blocks):
        cayley_bwd_kernel[(programs,)](grad.contiguous(), blocks.contiguous(), dR, rows, **config)
    return dR
