"""MoS (ICLR 2025, arXiv 2410.00938) on a frozen linear layer: low-rank products, A and Bᵀ read where their shards lie.

    row j of A is   pool_A[index_A[j, 0]], …, pool_A[index_A[j, l − 1]]   side by side, and so is row j of Bᵀ

Neither matrix is ever in memory. The gradient of each is, as the parts of a sum over tokens, and one kernel adds its
shards into the gradient of the pool, which the layers that share the pool add up. Shards may repeat in an index: the
program of the first place that names a shard adds up all the places in their order, so nobody else writes there, no
atomics are needed, and the result is the same bit for bit from run to run.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels.device import check_dtypes, count_tiles
from fastpeft.kernels.dots import rounded
from fastpeft.kernels.lora import low_rank_dx, low_rank_fwd
from fastpeft.kernels.low_rank import Factor, down, outer_parts


# dpool[index[j, k]] += Σ parts[:, j, shard k]. A program owns a tile of the shard at one place (j, k); it
# has nothing to do where an earlier place names the same shard.
#
# Floor: 4 · splits · r d bytes, which L2 has just been given, and each shard of dpool that is named, read
# and written; the index, 8 r l bytes, is read by every program from L2.
@triton.jit(do_not_specialize=["splits"])
def mos_bwd_pool_kernel(
    parts_ptr,  # (splits, places, width), contiguous, float32: (splits, rank, features) by shards
    index_ptr,  # (places,): (rank, shards), contiguous
    dpool_ptr,  # (n_shards, width)
    splits,
    places,
    width,
    stride_n,
    stride_c,
    BLOCK_P: tl.constexpr,  # all places, padded
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    place = tl.program_id(0)
    shard = tl.load(index_ptr + place.to(tl.int64))
    p = tl.arange(0, BLOCK_P)
    same = tl.load(index_ptr + p.to(tl.int64), mask=p < places, other=-1) == shard
    first = tl.min(tl.where(same, p, BLOCK_P), axis=0)
    last = tl.max(tl.where(same, p, -1), axis=0)
    if first == place:
        c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        s = tl.arange(0, BLOCK_S).to(tl.int64)
        in_c = c < width
        size = tl.full((), 1, tl.int64) * places * width
        acc = tl.zeros((BLOCK_C,), tl.float32)
        for other in range(place, last + 1):
            offset = tl.full((), 1, tl.int64) * other
            if tl.load(index_ptr + offset) == shard:
                for start in range(0, splits, BLOCK_S):
                    part_ptrs = parts_ptr + (start + s)[:, None] * size + (offset * width + c)[None, :]
                    mask = (start + s < splits)[:, None] & in_c[None, :]
                    acc += tl.sum(tl.load(part_ptrs, mask=mask, other=0.0), axis=0)
        dpool_ptrs = dpool_ptr + shard * stride_n + c * stride_c
        acc += tl.load(dpool_ptrs, mask=in_c, other=0.0).to(tl.float32)
        tl.store(dpool_ptrs, rounded(acc, dpool_ptr.dtype.element_ty), mask=in_c)


def add_to_pool(
    dpool: torch.Tensor,  # (n_shards, d / l)
    parts: torch.Tensor,  # (splits, r, d)
    index: torch.Tensor,  # (r, l), contiguous
) -> None:
    places, width = index.numel(), dpool.shape[1]
    block = min(256, max(16, 1 << (width - 1).bit_length()))
    with torch.cuda.device_of(dpool):
        mos_bwd_pool_kernel[(places, count_tiles(width, block))](
            parts,
            index,
            dpool,
            parts.shape[0],
            places,
            width,
            *dpool.stride(),
            BLOCK_P=max(16, 1 << (places - 1).bit_length()),
            BLOCK_S=8,
            BLOCK_C=block,
            num_warps=4,
        )


def factors(
    pool_A: torch.Tensor, index_A: torch.Tensor, pool_B: torch.Tensor, index_B: torch.Tensor
) -> tuple[Factor, Factor]:
    return Factor(pool_A, index_A.contiguous()), Factor(pool_B, index_B.contiguous())


def mos_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    pool_A: torch.Tensor,  # (n_shards, in / l)
    index_A: torch.Tensor,  # (r, l)
    pool_B: torch.Tensor,  # (n_shards, out / l)
    index_B: torch.Tensor,  # (r, l)
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + s · h Bᵀ in x's dtype, and h = x Aᵀ in float32; any strides."""
    check_dtypes(x=x, weight=weight, bias=bias, pool_A=pool_A, pool_B=pool_B)
    return low_rank_fwd(x, weight, bias, *factors(pool_A, index_A, pool_B, index_B), scaling)


def mos_bwd_(
    dpool_A: torch.Tensor | None,  # (n_shards, in / l)
    dpool_B: torch.Tensor | None,  # (n_shards, out / l)
    grad: torch.Tensor,  # (T, out)
    x: torch.Tensor | None,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    pool_A: torch.Tensor,  # (n_shards, in / l)
    index_A: torch.Tensor,  # (r, l)
    pool_B: torch.Tensor,  # (n_shards, out / l)
    index_B: torch.Tensor,  # (r, l)
    h: torch.Tensor | None,  # (T, r)
    scaling: float,
    need_x: bool,
) -> torch.Tensor:  # (T, in)
    """Adds dA's shards into dpool_A (from x) and dB's into dpool_B (from h), where these are given.

    Returns dx, without rows where it is not needed. Deterministic, without atomics.
    """
    check_dtypes(grad=grad, x=x, weight=weight, pool_A=pool_A, pool_B=pool_B, h=h, dpool_A=dpool_A, dpool_B=dpool_B)
    A, B = factors(pool_A, index_A, pool_B, index_B)
    dx = grad.new_empty((0, A.features))
    if grad.shape[0] == 0:
        return dx
    if need_x or dpool_A is not None:
        gB = down(grad, B, scaling)
        if need_x:
            dx = low_rank_dx(grad, weight, A, gB)
        if dpool_A is not None:
            add_to_pool(dpool_A, outer_parts(gB, x, 1.0), A.index)
    if dpool_B is not None:
        add_to_pool(dpool_B, outer_parts(h, grad, scaling), B.index)
    return dx
