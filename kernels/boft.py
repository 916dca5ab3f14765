"""BOFT (Liu et al., ICLR 2024, arXiv 2311.06243): its rotation of the activation, its scale and its Cayley transform.

    y = x R,  R = B̃_{m−1} … B̃_0                          (T, d), in x's dtype, rounded once
    dx = g Rᵀ
    dQ_f = the blocks of P_fᵀ (xᵀ g) S_fᵀ,  P_f = B̃_{m−1} … B̃_{f+1},  S_f = B̃_{f−1} … B̃_0
    Q = (I − S)(I + S)⁻¹,  S = ½ (boft_R − boft_Rᵀ)

    x (T, d), blocks Q (m, d / b, b, b) float32; factor f of them is B̃_f

No product leaves a window of b · 2^(m−1) features, so R is a diagonal of window² matrices. A program
multiplies the factors of its windows with each other first, once, and then its tokens with that one
matrix. The permutations become addresses, x is read and y written once whatever m is, no intermediate
of a token exists, and all that grows with T is two products of tiles: x R, and xᵀ g, from which the
gradients of all factors follow by the chain rule when the tokens are gone. Between rotation and scale stands the
library's product with W.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.device import SHARED_MEMORY, check_dtypes, count_tiles
from fastpeft.kernels.dots import bfloat16_parts, dot, dot_up, rounded


@triton.jit
def block_places(first, features, f, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Where the entries of B̃_f over WIDTH features from `first` on lie among the blocks, and which are not zero.

    In a window of 2H half-blocks, H = 2^f, block s takes half-blocks s and s + H, and puts its result there.
    """
    i = first + tl.arange(0, WIDTH)
    half = i // (BLOCK // 2)
    block = (half >> (f + 1) << f) + (half & ((1 << f) - 1))
    place = (half >> f & 1) * (BLOCK // 2) + i % (BLOCK // 2)
    row = (features // BLOCK * f + block) * BLOCK + place
    joined = (block[:, None] == block[None, :]) & (i < features)[:, None]
    return row[:, None] * BLOCK + place[None, :], joined


@triton.jit
def load_factor(blocks_ptr, first, features, f, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """B̃_f over WIDTH features from `first` on, dense. Masked entries are not fetched."""
    offsets, joined = block_places(first, features, f, BLOCK, WIDTH)
    return tl.load(blocks_ptr + offsets, mask=joined, other=0.0)


@triton.jit
def load_rotation(
    blocks_ptr,
    first,
    features,
    exact: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """R over WIDTH features: the product of all factors, the last one first."""
    r = load_factor(blocks_ptr, first, features, FACTORS - 1, BLOCK, WIDTH)
    # One stage, or each factor on its way would take shared memory from the tiles of tokens.
    for done in tl.range(1, FACTORS, num_stages=1):
        q = load_factor(blocks_ptr, first, features, FACTORS - 1 - done, BLOCK, WIDTH)
        if exact:
            r = dot_float32(r, q, tl.zeros_like(r))
        else:
            r = dot_up(r, q, tl.zeros_like(r), exact=False)
    return r


# The inner size of a true float32 product, whose operands lie in registers for all of it: 64 would not fit there.
INNER = tl.constexpr(16)


@triton.jit
def dot_float32(a, b, acc):
    """acc + a b for float32 operands, by halves of the inner size down to INNER."""
    if a.shape[1] > INNER:
        a_even, a_odd = tl.split(tl.reshape(a, (a.shape[0], a.shape[1] // 2, 2)))
        b_even, b_odd = tl.split(tl.permute(tl.reshape(b, (b.shape[0] // 2, 2, b.shape[1])), (0, 2, 1)))
        acc = dot_float32(a_even, b_even, acc)
        acc = dot_float32(a_odd, b_odd, acc)
    else:
        acc = dot(a, b, acc)
    return acc


@triton.jit
def operand_parts(r, dtype: tl.constexpr):
    """r for `rotate`: as it is beside float32, else in two bfloat16 parts; the 2⁻¹⁶ that is left is not seen."""
    if dtype == tl.float32:
        high, low = r, r
    else:
        high, low, _ = bfloat16_parts(r)
    return high, low


@triton.jit
def rotate(x, r_high, r_low):
    """x r before it is rounded to x's dtype, the smallest terms first. 16-bit x goes in whole: 11 bits are 8 + 3."""
    acc = tl.zeros((x.shape[0], r_high.shape[1]), tl.float32)
    if x.dtype == tl.float32:
        acc = dot_float32(x, r_high, acc)
    else:
        if x.dtype == tl.float16:
            x_high, x_low, _ = bfloat16_parts(x)
            acc = dot(x_low, r_high, acc)
        else:
            x_high = x
        acc = dot(x_high, r_low, acc)
        acc = dot(x_high, r_high, acc)
    return acc


# Floor. Bytes: x and y once; the blocks, 4 · b · m a feature, once for each of the groups of token tiles, of which
# there are at most a few: from L2. Operations: 2 · WIDTH a token and feature, twice that for bfloat16 x (two parts of
# R) and three times for float16, on tensor cores; (m − 1) · 2 · WIDTH² a feature and group for R. In bfloat16 with
# WIDTH 64 that is 256 operations to 4 bytes, 64 a byte: a quarter of what an H100 has for each byte of its memory.
# float32 has no tensor cores: 64 operations (WIDTH 32) to 8 bytes are 8 a byte, of the 20 that an H100 has; windows of
# 64 take 16.
@triton.jit(do_not_specialize=["tokens", "groups"])
def butterfly_fwd_kernel(
    x_ptr,  # (tokens, features)
    blocks_ptr,  # (FACTORS, features / BLOCK, BLOCK, BLOCK), contiguous, float32
    y_ptr,  # (tokens, features), contiguous
    tokens,
    features,
    groups,
    stride_xt,
    stride_xi,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # whole windows
    BLOCK_T: tl.constexpr,
):
    # Programs that run at one time take neighbouring features of the same tokens: whole rows of memory.
    tiles_i = tl.cdiv(features, WIDTH)
    program = tl.program_id(0)
    group = program // tiles_i
    first = (program % tiles_i).to(tl.int64) * WIDTH
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    r = load_rotation(blocks_ptr, first, features, dtype == tl.float32, FACTORS, BLOCK, WIDTH)
    r_high, r_low = operand_parts(r, dtype)

    # int64: tokens · features passes 2³¹ at 524288 tokens of a 4096-wide layer.
    i = first + tl.arange(0, WIDTH)
    t = group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = groups.to(tl.int64) * BLOCK_T
    for _ in range(group, tl.cdiv(tokens, BLOCK_T), groups):
        mask = (t < tokens)[:, None] & (i < features)[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi, mask=mask, other=0.0)
        y = rounded(rotate(x, r_high, r_low), y_ptr.dtype.element_ty)
        tl.store(y_ptr + t[:, None] * features + i[None, :], y, mask=mask)
        t += step


# Floor. Bytes: grad and x once, dx once, and WIDTH · 4 a feature and group of token tiles for the sums. Operations:
# forward's for dx and 2 · WIDTH a token and feature for xᵀ g, which is exact in 16 bits, without parts. In bfloat16
# 384 operations to 6 bytes: the same 64 a byte as forward.
@triton.jit(do_not_specialize=["tokens", "groups"])
def butterfly_bwd_kernel(
    grad_ptr,  # (tokens, features)
    x_ptr,  # (tokens, features); not read where SUMS is not set
    blocks_ptr,  # (FACTORS, features / BLOCK, BLOCK, BLOCK), contiguous, float32
    dx_ptr,  # (tokens, features), contiguous
    sums_ptr,  # (groups, tiles, WIDTH, WIDTH), float32: xᵀ g over the tokens of a group
    tokens,
    features,
    groups,
    stride_gt,
    stride_gi,
    stride_xt,
    stride_xi,
    NEED_X: tl.constexpr,
    NEED_BLOCKS: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tiles_i = tl.cdiv(features, WIDTH)
    program = tl.program_id(0)
    group = program // tiles_i
    first = (program % tiles_i).to(tl.int64) * WIDTH
    if NEED_X:
        dtype: tl.constexpr = grad_ptr.dtype.element_ty
        r = load_rotation(blocks_ptr, first, features, dtype == tl.float32, FACTORS, BLOCK, WIDTH)
        r_high, r_low = operand_parts(tl.trans(r), dtype)

    i = first + tl.arange(0, WIDTH)
    t = group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = groups.to(tl.int64) * BLOCK_T
    sums = tl.zeros((WIDTH, WIDTH), tl.float32)
    for _ in range(group, tl.cdiv(tokens, BLOCK_T), groups):
        mask = (t < tokens)[:, None] & (i < features)[None, :]
        grad = tl.load(grad_ptr + t[:, None] * stride_gt + i[None, :] * stride_gi, mask=mask, other=0.0)
        if NEED_BLOCKS:
            x = tl.load(x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi, mask=mask, other=0.0)
            if x.dtype == tl.float32:
                sums = dot_float32(tl.trans(x), grad, sums)
            else:
                sums = dot(tl.trans(x), grad, sums)
        if NEED_X:
            dx = rounded(rotate(grad, r_high, r_low), dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + t[:, None] * features + i[None, :], dx, mask=mask)
        t += step

    if NEED_BLOCKS:
        j = tl.arange(0, WIDTH)
        offsets = (program.to(tl.int64) * WIDTH + j)[:, None] * WIDTH + j[None, :]
        tl.store(sums_ptr + offsets, sums)


# Floor. Bytes: 4 · WINDOW a feature and group for the sums, from L2; 2 · 4 · b · m a feature for the blocks and their
# gradients. Operations: m (m + 1) / 2 products of 2 · WINDOW³ for each WINDOW of features, whatever the number of
# tokens.
@triton.jit(do_not_specialize=["groups"])
def blocks_bwd_kernel(
    sums_ptr,  # (groups, tiles, WIDTH, WIDTH), float32
    blocks_ptr,  # (FACTORS, features / BLOCK, BLOCK, BLOCK), contiguous, float32
    dblocks_ptr,  # like blocks
    features,
    groups,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * WINDOW
    i = first + tl.arange(0, WINDOW)
    offsets = i[:, None] * WIDTH + (i % WIDTH)[None, :]
    group_size = tl.cdiv(features, WIDTH).to(tl.int64) * WIDTH * WIDTH
    g = tl.zeros((WINDOW, WINDOW), tl.float32)
    for _ in range(groups):
        g += tl.load(sums_ptr + offsets)
        offsets += group_size

    # g is (xᵀ g) S_fᵀ. Loops that are not unrolled, and no branch around the last product, keep operands in registers.
    for f in tl.range(FACTORS, num_stages=1):
        d = g
        for done in tl.range(1, FACTORS - f, num_stages=1):
            q = load_factor(blocks_ptr, first, features, FACTORS - done, BLOCK, WINDOW)
            d = dot_float32(tl.trans(q), d, tl.zeros_like(d))
        places, joined = block_places(first, features, f, BLOCK, WINDOW)
        tl.store(dblocks_ptr + places, d, mask=joined)
        q = load_factor(blocks_ptr, first, features, f, BLOCK, WINDOW)
        g = dot_float32(g, tl.trans(q), tl.zeros_like(g))


@triton.jit
def matrix_places(rows, BLOCK: tl.constexpr, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """Where the entries of a program's matrices lie, and which entries of a tile they are.

    The matrices of a tile stand on its diagonal, each in the first corner of its slot, a power of two wide.
    """
    i = tl.arange(0, WIDTH)
    row = (tl.program_id(0).to(tl.int64) * (WIDTH // SLOT) + i // SLOT) * BLOCK + i % SLOT
    within = (i % SLOT < BLOCK) & (row < rows)
    mask = (i[:, None] // SLOT == i[None, :] // SLOT) & within[:, None] & within[None, :]
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
        pivot = tl.sum(tl.where(at_k[:, None] & inside, column[:, None], 0.0), axis=0)
        a_row = tl.sum(tl.where(at_k[:, None], a, 0.0), axis=0) / pivot
        q_row = tl.sum(tl.where(at_k[:, None], q, 0.0), axis=0) / pivot
        column = tl.where(at_k, 0.0, column)[:, None]
        a = tl.where(at_k[:, None], a_row[None, :], a - column * a_row[None, :])
        q = tl.where(at_k[:, None], q_row[None, :], q - column * q_row[None, :])
        a, q = tl.where(inside, a, 0.0), tl.where(inside, q, 0.0)
    p = eye + q
    rest = dot_float32(-s, p, eye - q)
    q = dot_float32(0.5 * p, rest, q)
    tl.store(q_ptr + offsets, q, mask=mask)


# dS = −½ Pᵀ G Pᵀ with P = Q + I, as fastpeft/ops/boft.py derives, and dR = ½ (dS − dSᵀ).
#
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


# Floor: y0 and y once, 2 · size a number; two operations.
@triton.jit(do_not_specialize=["tokens"])
def scale_fwd_kernel(
    y0_ptr,  # (tokens, features), contiguous: x R Wᵀ + b
    bias_ptr,  # (features,) or None
    scale_ptr,  # (features,)
    y_ptr,  # like y0, or y0 itself
    tokens,
    features,
    stride_b,
    stride_s,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < features
    mask = (t < tokens)[:, None] & in_d[None, :]
    places = t[:, None] * features + d[None, :]
    y0 = tl.load(y0_ptr + places, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + d * stride_s, mask=in_d, other=0.0)
    product = y0
    if bias_ptr is not None:
        product = y0 - tl.load(bias_ptr + d * stride_b, mask=in_d, other=0.0).to(tl.float32)[None, :]
    # Where the scale is one y is y0 to the last bit: a fresh adapter changes nothing.
    y = y0 + product * (scale - 1.0)[None, :]
    tl.store(y_ptr + places, rounded(y, y_ptr.dtype.element_ty), mask=mask)


# g ⊙ s, and Σ_t g ⊙ (y0 − b) over the tokens of a program. Floor: grad, y0 and the product once, 3 · size a number.
@triton.jit(do_not_specialize=["tokens", "chunk"])
def scale_bwd_kernel(
    grad_ptr,  # (tokens, features)
    y0_ptr,  # (tokens, features), contiguous, or None: no gradient of the scale
    bias_ptr,  # (features,) or None
    scale_ptr,  # (features,)
    scaled_ptr,  # (tokens, features), contiguous
    sums_ptr,  # (groups, features), contiguous, float32
    tokens,
    features,
    chunk,  # tokens of a program
    stride_gt,
    stride_gd,
    stride_b,
    stride_s,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < features
    scale = tl.load(scale_ptr + d * stride_s, mask=in_d, other=0.0)
    bias = tl.zeros((BLOCK_D,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + d * stride_b, mask=in_d, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    end = min(group * chunk + chunk, tokens)
    for start in range(group * chunk, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (t < end)[:, None] & in_d[None, :]
        places = t[:, None] * features + d[None, :]
        grad_ptrs = grad_ptr + t[:, None] * stride_gt + d[None, :] * stride_gd
        grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + places, rounded(grad * scale[None, :], scaled_ptr.dtype.element_ty), mask=mask)
        if y0_ptr is not None:
            y0 = tl.load(y0_ptr + places, mask=mask, other=0.0).to(tl.float32)
            sums += grad * (y0 - bias[None, :])
    if y0_ptr is not None:
        tl.store(sums_ptr + group * features + d, tl.sum(sums, 0), mask=in_d)


# The widest window whose R a program holds beside its tokens, and the least that tensor cores multiply.
WIDEST, NARROWEST = 64, 16
FREE = ("BLOCK_T", "num_warps", "num_stages")  # of the settings: what tuning may change


def butterfly_fits(features: int, block: int, factors: int) -> bool:
    """Whether these kernels take m = `factors` butterfly factors of block size b = `block`."""
    window = block << (factors - 1)
    return block >= 2 and block & (block - 1) == 0 and window <= WIDEST and features % window == 0


def tile_width(block: int, factors: int, dtype: torch.dtype) -> int:
    """Features of a tile: whole windows, and a whole cache line of 128 bytes of each row.

    Narrower tiles would multiply fewer zeros, but in 16 bits that is not what is waited for.
    """
    return max(block << (factors - 1), 128 // dtype.itemsize)


def butterfly_config(
    tokens: int,
    features: int,
    block: int,
    factors: int,
    dtype: torch.dtype,
    programs: int,
    processors: int,
    shared_memory: int = SHARED_MEMORY,
) -> tuple[dict[str, int], int, int]:
    """Settings of the kernels over tokens, the number of tiles of features and that of groups of token tiles.

    programs: how many are wanted for each of the processors. shared_memory: bytes that one may use.
    """
    width = tile_width(block, factors, dtype)
    tiles = count_tiles(features, width)
    # 64 rows are what a wgmma takes; fewer only where they are not there, or processors would stay idle.
    block_t = 64
    while block_t > NARROWEST and (block_t >= 2 * tokens or tiles * count_tiles(tokens, block_t) < processors):
        block_t //= 2
    # A group has one program for each tile of features, which multiplies its factors once for all its tokens.
    groups = min(count_tiles(tokens, block_t), count_tiles(programs * processors, tiles))
    # From Hopper on (227 KiB) tensor cores read from shared memory. Before (163 KiB and less), and in float32, operands
    # take registers, and those of a 64-wide product more than four warps have.
    in_registers = dtype == torch.float32 or shared_memory < 200 * 1024
    config = {
        "FACTORS": factors,
        "BLOCK": block,
        "WIDTH": width,
        "BLOCK_T": block_t,
        "num_warps": 8 if in_registers and width == 64 else 4,
        "num_stages": 3,
    }
    return config, tiles, groups


def check_butterfly(blocks: torch.Tensor, features: int, **rows: torch.Tensor) -> None:
    check_dtypes(**rows)
    check_float32(blocks=blocks)
    factors, n_blocks, block, _ = blocks.shape
    if n_blocks * block != features or not butterfly_fits(features, block, factors):
        raise ValueError(
            f"blocks must have a power of two from 2 to {WIDEST} as block size b and windows b · 2^(m−1) of at most "
            f"{WIDEST} that divide the features, got {tuple(blocks.shape)} for {features} features"
        )


def check_float32(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")


def butterfly_fwd(
    x: torch.Tensor,  # (T, d)
    blocks: torch.Tensor,  # (m, d / b, b, b), float32
) -> torch.Tensor:  # (T, d)
    """y = x R in x's dtype; any strides."""
    tokens, features = x.shape
    check_butterfly(blocks, features, x=x)
    y = torch.empty((tokens, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return y
    factors, _, block, _ = blocks.shape
    # Four programs on a processor: while one waits for memory the others have something under way.
    config, tiles, groups = butterfly_config(
        tokens,
        features,
        block,
        factors,
        x.dtype,
        4,
        device.processors_of(x.device),
        device.shared_memory_of(x.device),
    )
    config = tuning.settle("butterfly_fwd", (features, block, factors, x.dtype), tokens, x.device, config, FREE)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        butterfly_fwd_kernel[(tiles * groups,)](
            x, blocks.contiguous(), y, tokens, features, groups, *x.stride(), **config
        )  # fmt: skip
    return y


def butterfly_bwd(
    grad: torch.Tensor,  # (T, d)
    x: torch.Tensor,  # (T, d); its values are read for the gradient of blocks alone
    blocks: torch.Tensor,  # (m, d / b, b, b), float32
    need_x: bool,
    need_blocks: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # (T, d), (m, d / b, b, b)
    """Gradients of x and blocks; any strides. One that is not needed comes back with no rows."""
    tokens, features = x.shape
    check_butterfly(blocks, features, grad=grad, x=x)
    if grad.dtype != x.dtype:
        raise TypeError(f"grad must have x's dtype, {x.dtype}, got {grad.dtype}")
    factors, n_blocks, block, _ = blocks.shape
    dx = torch.empty((tokens if need_x else 0, features), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return dx, blocks.new_zeros((factors if need_blocks else 0, n_blocks, block, block))
    dblocks = torch.empty((factors if need_blocks else 0, n_blocks, block, block), dtype=torch.float32, device=x.device)
    if not (need_x or need_blocks):
        return dx, dblocks
    # Two programs on a processor: each has sums to write at its end.
    config, tiles, groups = butterfly_config(
        tokens,
        features,
        block,
        factors,
        x.dtype,
        2,
        device.processors_of(x.device),
        device.shared_memory_of(x.device),
    )
    config = tuning.settle("butterfly_bwd", (features, block, factors, x.dtype), tokens, x.device, config, FREE)
    width = config["WIDTH"]
    sums = torch.empty((groups if need_blocks else 0, tiles, width, width), dtype=torch.float32, device=x.device)
    blocks = blocks.contiguous()
    with torch.cuda.device_of(x):
        butterfly_bwd_kernel[(tiles * groups,)](
            grad, x, blocks, dx, sums, tokens, features, groups, *grad.stride(), *x.stride(),
            NEED_X=need_x, NEED_BLOCKS=need_blocks, **config,
        )  # fmt: skip
        if need_blocks:
            window = max(block << (factors - 1), NARROWEST)
            warps = window * window // 256  # eight entries of a matrix for each thread: more of them spill
            blocks_bwd_kernel[(count_tiles(features, window),)](
                sums, blocks, dblocks, features, groups,
                FACTORS=factors, BLOCK=block, WIDTH=width, WINDOW=window, num_warps=warps,
            )  # fmt: skip
    return dx, dblocks


# A tile of the scaling: 32 numbers for each of 128 threads, and whole cache lines of each row.
SCALE_TILE = {"BLOCK_T": 32, "BLOCK_D": 128, "num_warps": 4}


def scale_fwd(
    y0: torch.Tensor,  # (T, out), contiguous
    bias: torch.Tensor | None,  # (out,)
    scale: torch.Tensor,  # (out, 1)
    y: torch.Tensor,  # like y0, or y0 itself
) -> None:
    """y = (y0 − b) ⊙ s + b."""
    tokens, features = y0.shape
    stride_b = 0 if bias is None else bias.stride(0)
    grid = count_tiles(tokens, SCALE_TILE["BLOCK_T"]), count_tiles(features, SCALE_TILE["BLOCK_D"])
    with torch.cuda.device_of(y0):
        scale_fwd_kernel[grid](y0, bias, scale, y, tokens, features, stride_b, scale.stride(0), **SCALE_TILE)


def scale_bwd(
    grad: torch.Tensor,  # (T, out)
    y0: torch.Tensor | None,  # (T, out), contiguous
    bias: torch.Tensor | None,  # (out,)
    scale: torch.Tensor,  # (out, 1)
) -> tuple[torch.Tensor, torch.Tensor]:  # (T, out), (out, 1)
    """g ⊙ s, and the gradient of the scale, without rows where y0 is None."""
    tokens, features = grad.shape
    block_t = SCALE_TILE["BLOCK_T"]
    tiles_d = count_tiles(features, SCALE_TILE["BLOCK_D"])
    # Four programs on a processor, so that their sums, added up in one order, are few however many tokens there are.
    groups = min(count_tiles(tokens, block_t), count_tiles(4 * device.processors_of(grad.device), tiles_d))
    chunk = count_tiles(tokens, groups * block_t) * block_t
    scaled = torch.empty((tokens, features), dtype=grad.dtype, device=grad.device)
    rows = 0 if y0 is None else groups
    sums = torch.empty((rows, features), dtype=torch.float32, device=grad.device)
    stride_b = 0 if bias is None else bias.stride(0)
    with torch.cuda.device_of(grad):
        scale_bwd_kernel[(groups, tiles_d)](
            grad, y0, bias, scale, scaled, sums, tokens, features, chunk, *grad.stride(), stride_b, scale.stride(0),
            **SCALE_TILE,
        )  # fmt: skip
    return scaled, scale.new_empty((0, 1)) if y0 is None else sums.sum(0).unsqueeze(1)


def boft_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    blocks: torch.Tensor,  # (m, in / b, b, b), float32
    scale: torch.Tensor,  # (out, 1), float32
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = (x R Wᵀ) ⊙ s + b in x's dtype, and x R Wᵀ + b where it is to be kept, else no rows; any strides."""
    check_dtypes(weight=weight, bias=bias)
    check_float32(scale=scale)
    y0 = F.linear(butterfly_fwd(x, blocks), weight, bias)
    y = torch.empty_like(y0) if keep else y0
    if y0.numel():
        scale_fwd(y0, bias, scale, y)
    return y, y0 if keep else y0.new_empty((0, y0.shape[1]))


def boft_bwd(
    grad: torch.Tensor,  # (T, out)
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    blocks: torch.Tensor,  # (m, in / b, b, b), float32
    scale: torch.Tensor,  # (out, 1), float32
    y0: torch.Tensor | None,  # (T, out)
    need_x: bool,
    need_blocks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # (T, in), (m, in / b, b, b), (out, 1)
    """Gradients of x, blocks and scale, the last if y0 is given; any strides. What is not needed has no rows."""
    check_dtypes(weight=weight, bias=bias, y0=y0)
    check_float32(scale=scale)
    if grad.numel():
        scaled, dscale = scale_bwd(grad, None if y0 is None else y0.contiguous(), bias, scale)
    else:
        scaled, dscale = grad, scale.new_zeros((0 if y0 is None else len(scale), 1))
    rotated = scaled @ weight if need_x or need_blocks else x
    return *butterfly_bwd(rotated, x, blocks, need_x, need_blocks), dscale


def cayley_config(matrices: torch.Tensor) -> tuple[dict[str, int], int, int]:
    """Settings of the kernels of the Cayley transform, the rows of all matrices and the programs that share them."""
    block = matrices.shape[-1]
    if not 1 <= block <= WIDEST:
        raise ValueError(f"the block size must lie in [1, {WIDEST}], got {block}")
    slot = 1 << (block - 1).bit_length()
    width = max(slot, NARROWEST)
    rows = matrices.numel() // block
    # Eight entries of a matrix for each thread; in one warp, for most blocks, no step waits for another warp.
    settings = {"BLOCK": block, "SLOT": slot, "WIDTH": width, "num_warps": width * width // 256}
    return settings, rows, count_tiles(rows, width // slot * block)


def cayley_fwd(
    boft_R: torch.Tensor,  # (m, d / b, b, b), float32
) -> torch.Tensor:  # (m, d / b, b, b)
    """Q = (I − S)(I + S)⁻¹ with S = ½ (boft_R − boft_Rᵀ), of every block."""
    check_float32(boft_R=boft_R)
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
    config, rows, programs = cayley_config(blocks)
    dR = torch.empty(blocks.shape, dtype=torch.float32, device=blocks.device)
    with torch.cuda.device_of(blocks):
        cayley_bwd_kernel[(programs,)](grad.contiguous(), blocks.contiguous(), dR, rows, **config)
    return dR
