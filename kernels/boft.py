"""BOFT (Liu et al., ICLR 2024, arXiv 2311.06243): its rotation of the activation, and a layer in all.

    y = x R,  R = B̃_{m−1} … B̃_0                          (T, d), in x's dtype, rounded once
    dx = g Rᵀ
    dQ_f = the blocks of P_fᵀ (xᵀ g) S_fᵀ,  P_f = B̃_{m−1} … B̃_{f+1},  S_f = B̃_{f−1} … B̃_0

    x (T, d), blocks Q (m, d / b, b, b) float32, from boft_cayley.py; factor f of them is B̃_f

No product leaves a window of b · 2^(m−1) features, so R is a diagonal of window² matrices. A program
multiplies the factors of its windows with each other first, once, and then its tokens with that one
matrix. Where that is wider than registers and shared memory allow (WIDEST), as many consecutive factors as fit
take one pass: k of them mix b · 2^(k−1) features, wherever these lie. Blocks wider than that, and windows up to
WIDEST_WINDOW beside many tokens, go to boft_wide.py, one pass for one factor. Between passes is float32.

The permutations become addresses, x is read and y written once in each pass, no other intermediate of a token
exists, and all that grows with T is two products of tiles: x R, and xᵀ g, from which the gradients of a pass's
factors follow by the chain rule when the tokens are gone. Between rotation and scale (boft_scale.py) stands the
library's product with W.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.boft_scale import scale_bwd, scale_fwd
from fastpeft.kernels.boft_wide import mixed_places, wide_bwd, wide_fwd
from fastpeft.kernels.device import SHARED_MEMORY, check_dtypes, check_float32, count_tiles
from fastpeft.kernels.dots import dot_float32, dot_parts, dot_up, dot_whole, operand_parts, rounded


@triton.jit
def tile_places(
    tile,
    features,
    FIRST: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The features of a tile, those that factors FIRST to FIRST + FACTORS − 1 mix side by side, and which there are.

    A tile has SPAN features, whole sets of them, and is filled up to WIDTH.
    """
    n = tl.arange(0, WIDTH)
    i = tile.to(tl.int64) * SPAN + n
    inside = i < features
    if SPAN < WIDTH:
        inside = inside & (n < SPAN)
    return mixed_places(i, FIRST, FACTORS, BLOCK), inside


@triton.jit
def block_places(i, inside, features, f, BLOCK: tl.constexpr):
    """Where the entries of B̃_f over features i lie among the blocks, and which are not zero.

    In a window of 2H half-blocks, H = 2^f, block s takes half-blocks s and s + H, and puts its result there.
    """
    if BLOCK % 2 == 1:  # one factor, without halves
        block, place = i // BLOCK, i % BLOCK
    else:
        half = i // (BLOCK // 2)
        block = (half >> (f + 1) << f) + (half & ((1 << f) - 1))
        place = (half >> f & 1) * (BLOCK // 2) + i % (BLOCK // 2)
    row = (features // BLOCK * f + block) * BLOCK + place
    joined = (block[:, None] == block[None, :]) & inside[:, None] & inside[None, :]
    return row[:, None] * BLOCK + place[None, :], joined


@triton.jit
def load_factor(blocks_ptr, i, inside, features, f, BLOCK: tl.constexpr):
    """B̃_f over features i, dense. Masked entries are not fetched."""
    offsets, joined = block_places(i, inside, features, f, BLOCK)
    return tl.load(blocks_ptr + offsets, mask=joined, other=0.0)


@triton.jit
def load_rotation(
    blocks_ptr,
    i,
    inside,
    features,
    exact: tl.constexpr,
    FIRST: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The product of the factors over features i, the last one first."""
    r = load_factor(blocks_ptr, i, inside, features, FIRST + FACTORS - 1, BLOCK)
    # One stage, or each factor on its way would take shared memory from the tiles of tokens.
    for done in tl.range(1, FACTORS, num_stages=1):
        q = load_factor(blocks_ptr, i, inside, features, FIRST + FACTORS - 1 - done, BLOCK)
        if exact:
            r = dot_float32(r, q, tl.zeros_like(r))
        else:
            r = dot_up(r, q, tl.zeros_like(r), exact=False)
    return r


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
    FIRST: tl.constexpr,  # of the factors, and how many
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,  # features of a tile, up to WIDTH
    BLOCK_T: tl.constexpr,
    EXACT: tl.constexpr,  # true float32 throughout
):
    # Programs that run at one time take neighbouring features of the same tokens: whole rows of memory.
    tiles_i = tl.cdiv(features, SPAN)
    program = tl.program_id(0)
    group = program // tiles_i
    i, inside = tile_places(program % tiles_i, features, FIRST, FACTORS, BLOCK, WIDTH, SPAN)
    r = load_rotation(blocks_ptr, i, inside, features, EXACT, FIRST, FACTORS, BLOCK)
    r_high, r_low = operand_parts(r, EXACT)

    # int64: tokens · features passes 2³¹ at 524288 tokens of a 4096-wide layer.
    t = group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = groups.to(tl.int64) * BLOCK_T
    for _ in range(group, tl.cdiv(tokens, BLOCK_T), groups):
        mask = (t < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi, mask=mask, other=0.0)
        y = dot_parts(x, r_high, r_low, tl.zeros((BLOCK_T, WIDTH), tl.float32), EXACT)
        y = rounded(y, y_ptr.dtype.element_ty)
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
    FIRST: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXACT: tl.constexpr,
):
    tiles_i = tl.cdiv(features, SPAN)
    program = tl.program_id(0)
    group = program // tiles_i
    i, inside = tile_places(program % tiles_i, features, FIRST, FACTORS, BLOCK, WIDTH, SPAN)
    if NEED_X:
        r = load_rotation(blocks_ptr, i, inside, features, EXACT, FIRST, FACTORS, BLOCK)
        r_high, r_low = operand_parts(tl.trans(r), EXACT)

    t = group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    step = groups.to(tl.int64) * BLOCK_T
    sums = tl.zeros((WIDTH, WIDTH), tl.float32)
    for _ in range(group, tl.cdiv(tokens, BLOCK_T), groups):
        mask = (t < tokens)[:, None] & inside[None, :]
        grad = tl.load(grad_ptr + t[:, None] * stride_gt + i[None, :] * stride_gi, mask=mask, other=0.0)
        if NEED_BLOCKS:
            x = tl.load(x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi, mask=mask, other=0.0)
            sums = dot_whole(tl.trans(x), grad, sums)
        if NEED_X:
            dx = dot_parts(grad, r_high, r_low, tl.zeros((BLOCK_T, WIDTH), tl.float32), EXACT)
            dx = rounded(dx, dx_ptr.dtype.element_ty)
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
    FIRST: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    WINDOW: tl.constexpr,  # the diagonal of a tile in squares of so many
    PART: tl.constexpr,  # features, of which these are the ones that there are: PART divides SPAN
):
    part = tl.program_id(0)
    n = tl.arange(0, WINDOW)
    i, inside = tile_places(part, features, FIRST, FACTORS, BLOCK, WINDOW, PART)
    row = (part // (SPAN // PART)).to(tl.int64) * WIDTH + part % (SPAN // PART) * PART + n
    offsets = row[:, None] * WIDTH + (row % WIDTH)[None, :]
    group_size = tl.cdiv(features, SPAN).to(tl.int64) * WIDTH * WIDTH
    g = tl.zeros((WINDOW, WINDOW), tl.float32)
    for _ in range(groups):
        if PART < WINDOW:
            g += tl.load(sums_ptr + offsets, mask=inside[:, None] & inside[None, :], other=0.0)
        else:
            g += tl.load(sums_ptr + offsets)
        offsets += group_size

    # g is (xᵀ g) S_fᵀ. Loops that are not unrolled, and no branch around the last product, keep operands in registers.
    for f in tl.range(FIRST, FIRST + FACTORS, num_stages=1):
        d = g
        for done in tl.range(1, FIRST + FACTORS - f, num_stages=1):
            q = load_factor(blocks_ptr, i, inside, features, FIRST + FACTORS - done, BLOCK)
            d = dot_float32(tl.trans(q), d, tl.zeros_like(d))
        places, joined = block_places(i, inside, features, f, BLOCK)
        tl.store(dblocks_ptr + places, d, mask=joined)
        q = load_factor(blocks_ptr, i, inside, features, f, BLOCK)
        g = dot_float32(g, tl.trans(q), tl.zeros_like(g))


# The most features that factors mix for a program to hold their product beside its tokens, and the least that tensor
# cores multiply.
WIDEST, NARROWEST = 64, 16
# A window of up to so many goes through as one matrix of a wide block, in one pass over x. Of twice as many it would be
# 1024 operations a feature in bfloat16, which take longer than the 8 bytes of another pass.
WIDEST_WINDOW = 128
FREE = ("BLOCK_T", "num_warps", "num_stages")  # of the settings: what tuning may change


def passes_of(block: int, factors: int) -> list[tuple[int, int]]:
    """Which factors each pass over the tokens takes, the first one and how many, in the order of the factors.

    k factors from any one on mix b · 2^(k−1) features, which a program multiplies with one matrix: as many as leave
    that at WIDEST, or one, of any block size. Passes are alike, so that no matrix is wider than it must be.
    """
    most = 1
    while block << most <= WIDEST:
        most += 1
    count = count_tiles(factors, most)
    ends = [factors * (k + 1) // count for k in range(count)]
    return [(end - size, size) for end, size in zip(ends, map(int.__sub__, ends, [0, *ends]), strict=False)]


def dense_pays(tokens: int, block: int, factors: int) -> bool:
    """Whether windows too wide for a program are multiplied out, so that one pass over x is enough.

    That takes the passes over as many tokens as a window has features: no gain for fewer.
    """
    window = block << (factors - 1)
    return factors > 1 and WIDEST < window <= WIDEST_WINDOW and tokens >= 4 * window


def tile_sizes(span: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a tile for factors that mix `span` features, and of the squares that its diagonal falls into.

    A tile has whole spans, and a whole cache line of 128 bytes of each row. Narrower tiles would multiply fewer zeros,
    but in 16 bits that is not what is waited for.
    """
    window = max(1 << (span - 1).bit_length(), NARROWEST)
    part = window // span * span
    width = max(window, 128 // dtype.itemsize)
    return {"WIDTH": width, "SPAN": width // part * part, "WINDOW": window, "PART": part}


def butterfly_config(
    tokens: int,
    features: int,
    block: int,
    factors: int,
    dtype: torch.dtype,
    programs: int,
    processors: int,
    shared_memory: int = SHARED_MEMORY,
    alone: bool = True,
) -> tuple[dict[str, int], int, int]:
    """Settings of the kernels over tokens, the number of tiles of features and that of groups of token tiles.

    dtype: of what is multiplied. programs: how many are wanted for each of the processors. shared_memory: bytes that
    one may use. alone: whether one pass takes all factors.
    """
    sizes = tile_sizes(block << (factors - 1), dtype)
    width, tiles = sizes["WIDTH"], count_tiles(features, sizes["SPAN"])
    # From Hopper on (227 KiB) tensor cores read from shared memory. Before (163 KiB and less), and in float32, operands
    # take registers, and those of a 64-wide product more than four warps have; so do the addresses of features that do
    # not lie side by side, and conversions between passes.
    in_registers = dtype == torch.float32 or shared_memory < 200 * 1024
    # 64 rows are what a wgmma takes; fewer only where they are not there, or processors would stay idle, or where
    # operands share registers with more than a few addresses.
    block_t = 32 if in_registers and (sizes["SPAN"] < width or not alone) else 64
    while block_t > NARROWEST and (block_t >= 2 * tokens or tiles * count_tiles(tokens, block_t) < processors):
        block_t //= 2
    # A group has one program for each tile of features, which multiplies its factors once for all its tokens.
    groups = min(count_tiles(tokens, block_t), count_tiles(programs * processors, tiles))
    config = {
        "FACTORS": factors,
        "BLOCK": block,
        "WIDTH": width,
        "SPAN": sizes["SPAN"],
        "BLOCK_T": block_t,
        "num_warps": 8 if in_registers and (width == 64 or not alone) else 4,
        "num_stages": 3,
    }
    return config, tiles, groups


def check_butterfly(blocks: torch.Tensor, features: int, **rows: torch.Tensor) -> None:
    check_dtypes(**rows)
    check_float32(blocks=blocks)
    factors, n_blocks, block, _ = blocks.shape
    halves = factors == 1 or (block % 2 == 0 and features % (block << (factors - 1)) == 0)
    if n_blocks * block != features or not halves:
        raise ValueError(
            "blocks must be (m, d / b, b, b), with an even b and windows b · 2^(m−1) that divide the d features if "
            f"m > 1, got {tuple(blocks.shape)} for {features} features"
        )


def settings_of(
    name: str, x: torch.Tensor, blocks: torch.Tensor, first: int, factors: int, dtype: torch.dtype, programs: int
) -> tuple[dict[str, int], int, int]:
    (tokens, features), block = x.shape, blocks.shape[2]
    processors, shared_memory = device.processors_of(x.device), device.shared_memory_of(x.device)
    config, tiles, groups = butterfly_config(
        tokens, features, block, factors, dtype, programs, processors, shared_memory, factors == blocks.shape[0]
    )
    config = tuning.settle(name, (features, block, first, factors, dtype), tokens, x.device, config, FREE)
    return config | {"FIRST": first, "EXACT": dtype == torch.float32}, tiles, groups


def pass_fwd(
    x: torch.Tensor,  # (T, d)
    blocks: torch.Tensor,  # (m, d / b, b, b), contiguous
    first: int,
    factors: int,
    dtype: torch.dtype,
) -> torch.Tensor:  # (T, d)
    """x B̃_{first + factors − 1} … B̃_first; in true float32 if x or the result has that dtype."""
    tokens, features = x.shape
    if blocks.shape[2] > WIDEST:
        return wide_fwd(x, blocks[first], first, dtype)
    y = torch.empty((tokens, features), dtype=dtype, device=x.device)
    # Four programs on a processor: while one waits for memory the others have something under way.
    multiplied = torch.promote_types(x.dtype, dtype)
    config, tiles, groups = settings_of("butterfly_fwd", x, blocks, first, factors, multiplied, 4)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        butterfly_fwd_kernel[(tiles * groups,)](x, blocks, y, tokens, features, groups, *x.stride(), **config)
    return y


def pass_bwd(
    grad: torch.Tensor,  # (T, d)
    x: torch.Tensor,  # (T, d)
    blocks: torch.Tensor,  # (m, d / b, b, b), contiguous
    first: int,
    factors: int,
    dtype: torch.dtype,
    need_x: bool,
    dblocks: torch.Tensor | None,  # like blocks
) -> torch.Tensor:  # (T, d)
    """The gradient of x, without rows if it is not needed; those of the pass's factors go into dblocks."""
    tokens, features = x.shape
    block = blocks.shape[2]
    if block > WIDEST:
        if dblocks is not None:
            wide_bwd(grad, x, first, dblocks[first])
        return wide_fwd(grad, blocks[first].mT, first, dtype) if need_x else x.new_empty((0, features))
    dx = torch.empty((tokens if need_x else 0, features), dtype=dtype, device=x.device)
    # Two programs on a processor: each has sums to write at its end.
    multiplied = torch.promote_types(torch.promote_types(grad.dtype, x.dtype), dtype)
    config, tiles, groups = settings_of("butterfly_bwd", x, blocks, first, factors, multiplied, 2)
    width, need_blocks = config["WIDTH"], dblocks is not None
    sums = torch.empty((groups if need_blocks else 0, tiles, width, width), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        butterfly_bwd_kernel[(tiles * groups,)](
            grad, x, blocks, dx, sums, tokens, features, groups, *grad.stride(), *x.stride(),
            NEED_X=need_x, NEED_BLOCKS=need_blocks, **config,
        )  # fmt: skip
        if need_blocks:
            sizes = tile_sizes(block << (factors - 1), multiplied)
            warps = sizes["WINDOW"] ** 2 // 256  # eight entries of a matrix for each thread: more of them spill
            blocks_bwd_kernel[(count_tiles(features, sizes["PART"]),)](
                sums, blocks, dblocks, features, groups,
                FIRST=first, FACTORS=factors, BLOCK=block, **sizes, num_warps=warps,
            )  # fmt: skip
    return dx


def passes_fwd(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x R, the last factor first. What goes from pass to pass is float32: only the end is rounded."""
    z = x
    for first, factors in reversed(passes_of(blocks.shape[2], blocks.shape[0])):
        z = pass_fwd(z, blocks, first, factors, torch.float32 if first else x.dtype)
    return z


def window_matrices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """R as blocks of one factor, (1, d / window, window, window), and the rows, identities, that it comes from."""
    factors, n_blocks, block, _ = blocks.shape
    window = block << (factors - 1)
    rows = torch.eye(window, dtype=torch.float32, device=blocks.device).repeat(1, n_blocks * block // window)
    return passes_fwd(rows, blocks).unflatten(1, (-1, window)).transpose(0, 1).unsqueeze(0), rows


def butterfly_fwd(
    x: torch.Tensor,  # (T, d)
    blocks: torch.Tensor,  # (m, d / b, b, b), float32
) -> torch.Tensor:  # (T, d)
    """y = x R in x's dtype; any strides."""
    check_butterfly(blocks, x.shape[1], x=x)
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    blocks = blocks.contiguous()
    if dense_pays(x.shape[0], blocks.shape[2], blocks.shape[0]):
        blocks, _ = window_matrices(blocks)
    return passes_fwd(x, blocks)


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
    shape = (factors if need_blocks else 0, n_blocks, block, block)
    if tokens == 0 or not (need_x or need_blocks):
        return x.new_empty((tokens if need_x else 0, features)), blocks.new_zeros(shape)
    blocks = blocks.contiguous()
    if dense_pays(tokens, block, factors):
        matrices, rows = window_matrices(blocks)
        dx, dR = butterfly_bwd(grad, x, matrices, need_x, need_blocks)
        # R is the rotation of those rows, and so the gradient of the blocks follows from dR as from any other's.
        dR = dR.flatten(0, 1).transpose(0, 1).flatten(1) if need_blocks else rows
        return dx, butterfly_bwd(dR, rows, blocks, False, need_blocks)[1]
    passes = passes_of(block, factors)
    inputs = [x]  # of each pass, in the order of the factors: the last one is the first to see x
    for first, size in reversed(passes[1:]):
        inputs.insert(0, pass_fwd(inputs[0], blocks, first, size, torch.float32) if need_blocks else x)
    dblocks = torch.empty(shape, dtype=torch.float32, device=x.device)
    for z, (first, size) in zip(inputs, passes, strict=True):
        last = first + size == factors
        dtype, need = (x.dtype, need_x) if last else (torch.float32, True)
        grad = pass_bwd(grad, z, blocks, first, size, dtype, need, dblocks if need_blocks else None)
    return grad, dblocks


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
