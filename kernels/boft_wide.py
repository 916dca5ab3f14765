"""BOFT's butterfly factors whose blocks are too wide for one program: tiled products with a block for each batch.

    y = x B̃_f,  dQ = xᵀ g of each block              B̃_f block-diagonal over the features that it mixes side by side

    x, g and y (T, d), blocks of one factor (d / b, b, b)

Used for b above 64, and for windows of several factors whose product is such a block (kernels/boft.py).
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.device import count_tiles
from fastpeft.kernels.dots import dot_parts, dot_whole, operand_parts, rounded


@triton.jit
def mixed_places(i, FIRST: tl.constexpr, FACTORS: tl.constexpr, BLOCK: tl.constexpr):
    """Feature i of those that factors FIRST to FIRST + FACTORS − 1 mix, side by side.

    They mix sets of 2^FACTORS half-blocks, each 2^FIRST half-blocks from the next.
    """
    if FIRST > 0:
        half = i // (BLOCK // 2)
        set_of, member = half >> FACTORS, half & ((1 << FACTORS) - 1)
        half = (set_of >> FIRST << (FIRST + FACTORS)) + (member << FIRST) + (set_of & ((1 << FIRST) - 1))
        i = half * (BLOCK // 2) + i % (BLOCK // 2)
    return i


# Floor. Bytes: x and y once if BLOCK_N takes a block, and each tile of a block once for each tile of tokens, from L2.
# Operations: 2 · BLOCK a token and feature, twice that for bfloat16 x (two parts of a block), three times for float16.
# At 128 in bfloat16 that is 512 to 4 bytes, 128 a byte: two thirds of what an H200 has for each byte of its memory.
@triton.jit(do_not_specialize=["tokens"])
def wide_fwd_kernel(
    x_ptr,  # (tokens, features)
    blocks_ptr,  # (features / BLOCK, BLOCK, BLOCK), float32
    y_ptr,  # (tokens, features), contiguous
    tokens,
    features,
    stride_xt,
    stride_xi,
    stride_q,
    stride_qk,
    stride_qn,
    FIRST: tl.constexpr,  # the factor
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,  # true float32 throughout
):
    # Programs that run at one time take the blocks of the same tokens: whole rows of memory.
    tiles = features // BLOCK * tl.cdiv(BLOCK, BLOCK_N)
    program = tl.program_id(0)
    block = (program % tiles // tl.cdiv(BLOCK, BLOCK_N)).to(tl.int64)
    t = (program // tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = program % tl.cdiv(BLOCK, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_t, in_n = t < tokens, n < BLOCK
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, BLOCK, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        i = mixed_places(block * BLOCK + k, FIRST, 1, BLOCK)
        x_ptrs = x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi
        x = tl.load(x_ptrs, mask=in_t[:, None] & (k < BLOCK)[None, :], other=0.0)
        q_ptrs = blocks_ptr + (block * stride_q + k.to(tl.int64)[:, None] * stride_qk + n[None, :] * stride_qn)
        q = tl.load(q_ptrs, mask=(k < BLOCK)[:, None] & in_n[None, :], other=0.0)
        q_high, q_low = operand_parts(q, EXACT)
        acc = dot_parts(x, q_high, q_low, acc, EXACT)
    i = mixed_places(block * BLOCK + n, FIRST, 1, BLOCK)
    y_ptrs = y_ptr + t[:, None] * features + i[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=in_t[:, None] & in_n[None, :])


# Floor. Bytes: x and grad once for each tile of BLOCK_N or BLOCK_K of a block, from L2 but for the first; the sums,
# 4 · BLOCK a feature and group. Operations: 2 · BLOCK a token and feature, exact in 16 bits, without parts.
@triton.jit(do_not_specialize=["tokens", "chunk"])
def wide_bwd_kernel(
    x_ptr,  # (tokens, features)
    grad_ptr,  # (tokens, features)
    sums_ptr,  # (groups, features / BLOCK, BLOCK, BLOCK), contiguous, float32
    tokens,
    features,
    chunk,  # of tokens for one group
    stride_xt,
    stride_xi,
    stride_gt,
    stride_gi,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_k, tiles_n = tl.cdiv(BLOCK, BLOCK_K), tl.cdiv(BLOCK, BLOCK_N)
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = (program // (tiles_k * tiles_n)).to(tl.int64)
    k = program // tiles_n % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k, in_n = k < BLOCK, n < BLOCK
    x_ptr += mixed_places(block * BLOCK + k, FIRST, 1, BLOCK)[:, None] * stride_xi
    grad_ptr += mixed_places(block * BLOCK + n, FIRST, 1, BLOCK)[None, :] * stride_gi
    end = min(group * chunk + chunk, tokens)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(group * chunk, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        in_t = t < end
        x = tl.load(x_ptr + t[None, :] * stride_xt, mask=in_k[:, None] & in_t[None, :], other=0.0)
        grad = tl.load(grad_ptr + t[:, None] * stride_gt, mask=in_t[:, None] & in_n[None, :], other=0.0)
        acc = dot_whole(x, grad, acc)
    places = (group * features + block * BLOCK + k)[:, None] * BLOCK + n[None, :]
    tl.store(sums_ptr + places, acc, mask=in_k[:, None] & in_n[None, :])


FREE = ("BLOCK_T", "num_warps", "num_stages")  # of the settings: what tuning may change


def wide_config(tokens: int, dtype: torch.dtype, shared_memory: int) -> dict[str, int]:
    """Settings of `wide_fwd_kernel`. dtype: of what is multiplied.

    Where tensor cores read from shared memory (227 KiB), a program takes 128 features of a block, which is then all of
    one of 128. Elsewhere operands take registers.
    """
    rows = max(16, 1 << (tokens - 1).bit_length())
    if dtype == torch.float32:
        return {"BLOCK_T": min(rows, 64), "BLOCK_K": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if shared_memory < 200 * 1024 or rows < 64:
        return {"BLOCK_T": min(rows, 64), "BLOCK_K": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_T": min(rows, 128), "BLOCK_K": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}


def wide_fwd(
    x: torch.Tensor,  # (T, d), any strides
    blocks: torch.Tensor,  # (d / b, b, b), any strides
    first: int,  # the factor
    dtype: torch.dtype,
) -> torch.Tensor:  # (T, d)
    """x B̃_first; in true float32 if x or the result has that dtype."""
    (tokens, features), block = x.shape, blocks.shape[1]
    y = torch.empty((tokens, features), dtype=dtype, device=x.device)
    multiplied = torch.promote_types(x.dtype, dtype)
    config = wide_config(tokens, multiplied, device.shared_memory_of(x.device))
    config = tuning.settle("wide_fwd", (features, block, first, multiplied), tokens, x.device, config, FREE)
    tiles = features // block * count_tiles(block, config["BLOCK_N"])
    with torch.cuda.device_of(x):
        wide_fwd_kernel[(tiles * count_tiles(tokens, config["BLOCK_T"]),)](
            x, blocks, y, tokens, features, *x.stride(), *blocks.stride(),
            FIRST=first, BLOCK=block, EXACT=multiplied == torch.float32, **config,
        )  # fmt: skip
    return y


def wide_bwd(
    grad: torch.Tensor,  # (T, d), any strides
    x: torch.Tensor,  # (T, d), any strides
    first: int,
    dblocks: torch.Tensor,  # (d / b, b, b)
) -> None:
    """dblocks = xᵀ g of each block."""
    (tokens, features), (n_blocks, block, _) = x.shape, dblocks.shape
    exact = torch.float32 in (x.dtype, grad.dtype)
    block_t = 16 if exact else 64
    tiles = n_blocks * count_tiles(block, 64) ** 2
    # Two programs on a processor, and at least 256 tokens for each, or the sums would be as many bytes as x.
    groups = max(1, min(2 * device.processors_of(x.device) // tiles, tokens // 256))
    sums = torch.empty((groups, *dblocks.shape), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        wide_bwd_kernel[(tiles, groups)](
            x, grad, sums, tokens, features, count_tiles(tokens, groups * block_t) * block_t, *x.stride(),
            *grad.stride(), FIRST=first, BLOCK=block, BLOCK_T=block_t, BLOCK_K=64, BLOCK_N=64, num_warps=4,
            num_stages=3,
        )  # fmt: skip
    torch.sum(sums, 0, out=dblocks)
