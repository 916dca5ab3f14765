"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a frozen linear layer.

Forward, in one kernel:

    h = x Aᵀ                        (T, r)    float32, kept for the backward
    y = x Wᵀ + b + s · h Bᵀ         (T, out)  in x's dtype, rounded once

Backward, for g = ∂L/∂y, around the library's product with W:

    gB = s · g B                    (T, r)    float32
    dx = g W + gB A                 (T, in)
    dA = gBᵀ x                      (r, in)
    dB = s · gᵀ h                   (out, r)

    x (T, in), weight W (out, in), bias b (out,) or None, lora_A A (r, in), lora_B B (out, r)

A and Bᵀ may also be read from pools of shards (see `load_factor`), for MoS, whose launchers are in mos.py.
Sums that are split over programs are left as parts in a workspace and added in a fixed order by one more kernel, so
that every result is the same bit for bit from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device
from fastpeft.kernels.device import SHARED_MEMORY, check_dtypes, count_tiles
from fastpeft.kernels.dots import dot, dot_down, dot_up, to_bfloat16


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if dtype == tl.bfloat16:
        return to_bfloat16(x)
    return x.to(dtype)


# A and Bᵀ are read by tiles, of a matrix or where its shards lie: row j of the matrix is the shards index[j, :] of a
# pool, side by side. Where a tile stays in one shard, each of its rows is one row of the pool, and what follows is
# contiguous, as wide loads and asynchronous copies need it. Elsewhere every element looks its shard up, in L1.


@triton.jit
def load_index(
    index_ptr,  # (rank, shards), contiguous, int64
    r,  # (BLOCK_R,), of which there are
    in_r,
    shards,
    BLOCK_L: tl.constexpr,  # all shards, padded
):  # (BLOCK_L, BLOCK_R), int32: half the registers, and no pool has 2³¹ shards
    s = tl.arange(0, BLOCK_L)
    mask = (s < shards)[:, None] & in_r[None, :]
    return tl.load(index_ptr + (r[None, :] * shards + s[:, None]), mask=mask, other=0).to(tl.int32)


# A walk over the shards of A or Bᵀ knows the index by heart, and selects: were it to load the rows of a
# shard at each step, the pipeline would have to be that much longer, or half as deep for all operands;
# and in a loop over shards around the walk, all addresses of a pipeline's start would stay in registers.
# For the same reason it counts its way through the shards: a division has many temporary values.
@triton.jit
def rows_in_shard(
    index,  # (BLOCK_L, BLOCK_R)
    shard,
    BLOCK_L: tl.constexpr,
):  # (BLOCK_R,), int64
    s = tl.arange(0, BLOCK_L)
    return tl.sum(tl.where(s[:, None] == shard, index, 0), axis=0).to(tl.int64)


@triton.jit
def load_factor(
    ptr,  # (rank, features), or a pool (n_shards, width)
    index_ptr,  # None, or (rank, shards), contiguous, int64
    stride_r,  # from row to row of the matrix or of the pool
    stride_d,
    shards,
    width,
    r,  # rows of the matrix, and
    row,  # where they are, for a matrix or a tile in one shard
    first,  # the tile's first feature, and
    d,  # 0, 1, 2, …: r and d have two dimensions, in either order, and so the tile has
    mask,
    ONE_SHARD: tl.constexpr,  # no tile crosses from one shard into the next
):
    column = first + d
    if index_ptr is not None and not ONE_SHARD:
        row = tl.load(index_ptr + (r * shards + column // width), mask=mask, other=0)
        column = column % width
    return tl.load(ptr + row * stride_r + column * stride_d, mask=mask, other=0.0)


# ------------------------------------------------------------------------------------------------
# Forward
# ------------------------------------------------------------------------------------------------


@triton.jit
def store_output(
    acc,  # x Wᵀ
    h,
    bias_ptr,
    factor_B_ptr,
    index_B_ptr,
    y_ptr,
    h_ptr,
    scaling,
    tokens,
    out_features,
    rank,
    shards,
    stride_b,
    stride_Br,
    stride_Bo,
    tile_t,
    tile_o,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_SHARD_O: tl.constexpr,
):
    """y = acc + s · h Bᵀ + b, rounded once, and h from the first tile of outputs."""
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_o = tile_o.to(tl.int64) * BLOCK_O
    o = tl.arange(0, BLOCK_O).to(tl.int64)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    in_t, in_o, in_r = t < tokens, first_o + o < out_features, r < rank
    if tile_o == 0:
        tl.store(h_ptr + t[:, None] * rank + r[None, :], h, mask=in_t[:, None] & in_r[None, :])
    width, row, first = out_features // shards, r, first_o
    if index_B_ptr is not None and ONE_SHARD_O:
        row = tl.load(index_B_ptr + (r * shards + first_o // width), mask=in_r, other=0)
        first = tl.multiple_of(first_o % width, BLOCK_O)
    b = load_factor(
        factor_B_ptr, index_B_ptr, stride_Br, stride_Bo, shards, width, r[:, None], row[:, None], first, o[None, :],
        in_o[None, :] & in_r[:, None], ONE_SHARD_O,
    )  # fmt: skip
    o += first_o
    acc = dot_up(h * scaling, b, acc, exact=y_ptr.dtype.element_ty == tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o * stride_b, mask=in_o, other=0.0).to(tl.float32)[None, :]
    y = rounded(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * out_features + o[None, :], y, mask=in_t[:, None] & in_o[None, :])


# A program owns a tile of y. On its one walk over in_features it multiplies each tile of x with the
# tile of W and with the tile of A, so nothing is read again for the adapter; s · h Bᵀ joins the same
# accumulator when the walk is over. All the programs of a row of tiles find the same h, and the one
# of the first output tile stores it: BLOCK_R / BLOCK_O more products, instead of a second launch, a
# second pass over x and a round trip of h.
#
# Floor: 2 T in (out + tiles_o BLOCK_R p) + 4 T out BLOCK_R operations, p the products that dot_down
# makes of one, and size · (T in + out in + T out) + 4 T r bytes; A and B are r rows beside W's.
#
# tokens changes from call to call, and no address is cheaper for knowing that it is 1 or a multiple
# of 16: without this, three kernels would be compiled for each layer shape.
@triton.jit(do_not_specialize=["tokens"])
def lora_fwd_kernel(
    x_ptr,  # (tokens, in_features)
    weight_ptr,  # (out_features, in_features)
    bias_ptr,  # (out_features,) or None
    factor_A_ptr,  # (rank, in_features) and
    factor_B_ptr,  # (rank, out_features), or the pools of both
    index_A_ptr,  # None, or (rank, shards)
    index_B_ptr,
    y_ptr,  # (tokens, out_features), contiguous; with SPLITS the parts (SPLITS, tokens, out_features), float32
    h_ptr,  # (tokens, rank), contiguous, float32; with SPLITS the parts
    scaling,
    tokens,
    out_features,
    in_features,
    rank,
    shards,
    chunk,  # of in_features for one split, a multiple of BLOCK_I
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_b,
    stride_Ar,
    stride_Ai,
    stride_Br,
    stride_Bo,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,  # the whole rank, padded
    GROUP_T: tl.constexpr,
    EVEN_I: tl.constexpr,  # BLOCK_I divides in_features: no mask along it
    BLOCK_L: tl.constexpr,  # all shards, padded
    ONE_SHARD_I: tl.constexpr,
    ONE_SHARD_O: tl.constexpr,
    SPLITS: tl.constexpr,  # programs that share the walk over in_features of one tile
):
    # GROUP_T token tiles go through all output tiles together, token tile innermost. The programs
    # that run at one time then share a block of x and a block of W of similar height, which L2
    # holds; row by row they would stream the whole of W past every single tile of x.
    tiles_t = tl.cdiv(tokens, BLOCK_T)
    tiles_o = tl.cdiv(out_features, BLOCK_O)
    program = tl.program_id(0)
    first_t = program // (GROUP_T * tiles_o) * GROUP_T
    group = min(tiles_t - first_t, GROUP_T)
    within = program % (GROUP_T * tiles_o)
    tile_t = first_t + within % group
    tile_o = within // group

    # Rows, and all that is multiplied by a stride, in int64: tokens · features passes 2³¹ at 524288
    # tokens of a 4096-wide layer.
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    step = tl.full((), BLOCK_I, tl.int64)
    in_t, in_o, in_r = t < tokens, o < out_features, r < rank

    split = tl.program_id(1)
    begin, end = 0, in_features
    if SPLITS > 1:
        begin = split * chunk
        end = min(begin + chunk, in_features)

    # W and A are addressed transposed, (i, o) and (i, r): the right-hand operands of x.
    x_ptrs = x_ptr + t[:, None] * stride_xt + (i + begin)[None, :] * stride_xi
    w_ptrs = weight_ptr + o[None, :] * stride_wo + (i + begin)[:, None] * stride_wi

    width, row = in_features // shards, r
    if index_A_ptr is not None and ONE_SHARD_I:
        index_A = load_index(index_A_ptr, r, in_r, shards, BLOCK_L)
        shard, within = begin // width, begin % width
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_I):
        if EVEN_I:
            x = tl.load(x_ptrs, mask=in_t[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=in_o[None, :], other=0.0)
            in_a = in_r[None, :]
        else:
            in_i = i < in_features - start
            x = tl.load(x_ptrs, mask=in_t[:, None] & in_i[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=in_o[None, :] & in_i[:, None], other=0.0)
            in_a = in_r[None, :] & in_i[:, None]
        first = start
        if index_A_ptr is not None and ONE_SHARD_I:
            row, first = rows_in_shard(index_A, shard, BLOCK_L), within
            shard += (within + BLOCK_I == width).to(tl.int32)
            within = tl.where(within + BLOCK_I == width, 0, within + BLOCK_I)
        a = load_factor(
            factor_A_ptr, index_A_ptr, stride_Ar, stride_Ai, shards, width, r[None, :], row[None, :], first, i[:, None],
            in_a, ONE_SHARD_I,
        )  # fmt: skip
        acc = dot(x, w, acc)
        h = dot_down(x, a, h)
        x_ptrs += step * stride_xi
        w_ptrs += step * stride_wi

    if SPLITS > 1:
        h_ptr += split.to(tl.int64) * tokens * rank
        y_ptr += split.to(tl.int64) * tokens * out_features
        if tile_o == 0:
            tl.store(h_ptr + t[:, None] * rank + r[None, :], h, mask=in_t[:, None] & in_r[None, :])
        tl.store(y_ptr + t[:, None] * out_features + o[None, :], acc, mask=in_t[:, None] & in_o[None, :])
    else:
        store_output(
            acc, h, bias_ptr, factor_B_ptr, index_B_ptr, y_ptr, h_ptr, scaling, tokens, out_features, rank, shards,
            stride_b, stride_Br, stride_Bo, tile_t, tile_o, BLOCK_T, BLOCK_O, BLOCK_R, ONE_SHARD_O,
        )  # fmt: skip


# The parts of a split walk, added up in their order. Floor: 4 · SPLITS · T (out + r) bytes, which L2 has just been
# given, and what y takes; 4 T out BLOCK_R operations.
@triton.jit(do_not_specialize=["tokens"])
def lora_fwd_sum_kernel(
    y_parts_ptr,  # (SPLITS, tokens, out_features)
    h_parts_ptr,  # (SPLITS, tokens, rank)
    bias_ptr,
    factor_B_ptr,
    index_B_ptr,
    y_ptr,
    h_ptr,
    scaling,
    tokens,
    out_features,
    rank,
    shards,
    stride_b,
    stride_Br,
    stride_Bo,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_SHARD_O: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile_t, tile_o = tl.program_id(0), tl.program_id(1)
    t = tile_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tile_o.to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for split in range(SPLITS):
        row = t + tl.full((), split, tl.int64) * tokens
        mask = (t < tokens)[:, None] & (o < out_features)[None, :]
        acc += tl.load(y_parts_ptr + row[:, None] * out_features + o[None, :], mask=mask, other=0.0)
        mask = (t < tokens)[:, None] & (r < rank)[None, :]
        h += tl.load(h_parts_ptr + row[:, None] * rank + r[None, :], mask=mask, other=0.0)
    store_output(
        acc, h, bias_ptr, factor_B_ptr, index_B_ptr, y_ptr, h_ptr, scaling, tokens, out_features, rank, shards,
        stride_b, stride_Br, stride_Bo, tile_t, tile_o, BLOCK_T, BLOCK_O, BLOCK_R, ONE_SHARD_O,
    )  # fmt: skip


# About one program for each processor of the chips aimed at: A100 has 108, H200 132, B200 148.
PROGRAMS = 120

# (BLOCK_T, BLOCK_O, BLOCK_I, num_warps, num_stages), from the most reuse to the most programs.
#
# Tensor cores: a tile loads BLOCK_T + BLOCK_O rows for BLOCK_T · BLOCK_O products, so big ones are
# wanted as far as registers go. A BLOCK_I of 64 fills the 128 bytes that a shared-memory swizzle
# spans. The 128 × 128 tile stops at three stages: then two programs fit on a Hopper processor, and
# one works while the other waits.
TILES_16BIT = (
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (64, 128, 64, 8, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 64, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 32, 64, 4, 4),
    (16, 16, 64, 4, 4),
)
# float32 has no tensor cores of its own: outer products in registers, and a short BLOCK_I, or the
# operands would crowd out the accumulators.
TILES_32BIT = (
    (64, 128, 16, 8, 3),
    (64, 64, 16, 4, 4),
    (64, 32, 16, 4, 4),
    (32, 64, 32, 4, 4),
    (32, 32, 32, 4, 4),
    (16, 16, 64, 4, 4),
)
# Decode is over when W has come from memory: a token tile of 16, the least that tensor cores take,
# and long rows of W on their way in each of many programs. Every program reads A too, from L2: with
# 16 outputs, as many rows of it as of W, so here as well the wide tiles come first.
TILES_DECODE_16BIT = ((16, 64, 128, 4, 4), (16, 32, 128, 4, 4), (16, 16, 128, 4, 4))
TILES_DECODE_32BIT = ((16, 64, 32, 4, 4), (16, 32, 32, 4, 4), (16, 16, 64, 4, 4))


def lora_fwd_config(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    shared_memory: int = SHARED_MEMORY,
    processors: int = PROGRAMS,
    sharded: bool = False,
) -> dict[str, int | bool]:
    """The tile sizes, num_warps and num_stages of `lora_fwd_kernel`, from shapes and dtypes alone.

    It is the first tile above that fits and leaves PROGRAMS programs, else the last one, with as
    many stages as `shared_memory`, in bytes per program, holds. SPLITS programs share the walk of
    one tile where few tokens are multiplied with so few outputs that half of the processors would
    have nothing to do, as in the keys and values of grouped-query attention.
    """
    size, adapter_size = dtype.itemsize, adapter_dtype.itemsize
    block_r = max(16, 1 << (rank - 1).bit_length())
    split = size == 2 and adapter_dtype != dtype
    # From Hopper on (227 KiB) tensor cores read both operands from shared memory; before (163 KiB
    # and less) the operands take registers too, and in float32 they take most of them.
    hopper = shared_memory > 200 * 1024
    most_accumulators = 40 if size == 4 else 96 if hopper else 80  # per thread
    if tokens <= 16:
        tiles = TILES_DECODE_16BIT if size == 2 else TILES_DECODE_32BIT
    else:
        tiles = TILES_16BIT if size == 2 else TILES_32BIT

    for tile in tiles:
        block_t, block_o, block_i, warps, stages = tile
        wide = block_o == 256
        # Splitting A makes the tensor cores wait inside the loop: two narrower programs on a
        # processor cover for each other. And below 1024 outputs too much of a wide tile may hang
        # over the edge.
        if wide and (not hopper or split or out_features < 1024):
            continue
        # The index of the shards takes registers, of which a wide tile for decode has none to spare
        # beside a split A where loads take more of them (Ampere), or where x is split as well.
        if sharded and split and tokens <= 16 and block_o == 64 and (not hopper or dtype == torch.float16):
            continue
        programs = count_tiles(tokens, block_t) * count_tiles(out_features, block_o)
        accumulators = block_t * (block_o + block_r) // (32 * warps)
        epilogue_bytes = (block_t + block_o) * block_r * 4  # h and B, in float32 or in two parts
        if (
            (block_t < 2 * tokens or block_t == 16)  # or half of it would be empty
            and programs >= PROGRAMS
            and accumulators <= (144 if wide else most_accumulators)
            and epilogue_bytes <= shared_memory
        ):
            break
    else:  # a small problem or a large rank: the last tile
        if epilogue_bytes > shared_memory:
            raise ValueError(f"lora_A: rank {rank} does not fit in {shared_memory} bytes")
        while accumulators > most_accumulators and warps < 16:
            warps, accumulators = 2 * warps, accumulators // 2
    # A large rank makes a large tile of A as well: at most 32 numbers of it for each thread.
    while block_i * block_r > 32 * 32 * warps and block_i > 16:
        block_i //= 2
    if split and dtype == torch.float16 and block_i > 16:
        block_i //= 2  # x is split as well
    # The pipeline holds num_stages tiles, or one less where the next operands wait in registers.
    # On Hopper the parts of A go back through shared memory, beside them.
    tile_bytes = block_i * ((block_t + block_o) * size + block_r * adapter_size)
    if hopper:
        parts_bytes = 16 * 1024 + 4 * block_i * block_r if split else 0
        fitting_stages = (shared_memory - parts_bytes) // tile_bytes
    else:
        fitting_stages = shared_memory // tile_bytes + 1
    splits = 1
    if tokens <= 64:
        # The second launch takes as long as some eight steps of a walk: each split keeps as many.
        splits = max(1, min(processors // programs, count_tiles(in_features, block_i) // 8, 8))
    return {
        "BLOCK_T": block_t,
        "BLOCK_O": block_o,
        "BLOCK_I": block_i,
        "BLOCK_R": block_r,
        "SPLITS": splits,
        "GROUP_T": 8,
        "EVEN_I": in_features % block_i == 0,
        "num_warps": warps,
        "num_stages": max(1, min(stages, fitting_stages)),
    }


class Factor(NamedTuple):
    """A, or Bᵀ: a matrix (r, d), or MoS's pool (n_shards, d / l) with its index (r, l)."""

    rows: torch.Tensor
    index: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return self.rows.shape[0] if self.index is None else self.index.shape[0]

    @property
    def shards(self) -> int:
        return 1 if self.index is None else self.index.shape[1]

    @property
    def block_l(self) -> int:
        return 1 << (self.shards - 1).bit_length()

    @property
    def features(self) -> int:
        return self.rows.shape[1] * self.shards

    def in_one_shard(self, block: int) -> bool:
        """Whether no tile of that width crosses from one shard into the next."""
        return self.index is None or self.rows.shape[1] % block == 0

    def fit(self, block: int) -> int:
        """The widest tile up to `block` that stays in one shard, or `block` where even the narrowest does not."""
        narrow = block
        while narrow > 16 and not self.in_one_shard(narrow):
            narrow //= 2
        return narrow if self.in_one_shard(narrow) else block


def lora_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    lora_A: torch.Tensor,  # (r, in)
    lora_B: torch.Tensor,  # (out, r)
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + s · h Bᵀ in x's dtype, and h = x Aᵀ in float32; any strides."""
    check_dtypes(x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
    return low_rank_fwd(x, weight, bias, Factor(lora_A), Factor(lora_B.T), scaling)


def low_rank_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    A: Factor,
    B: Factor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # y (T, out), h (T, r)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype, {x.dtype}, got {weight.dtype}")
    (tokens, in_features), out_features, rank = x.shape, B.features, A.rank
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    h = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return y, h
    config = lora_fwd_config(
        tokens,
        out_features,
        in_features,
        rank,
        x.dtype,
        A.rows.dtype,
        device.shared_memory_of(x.device),
        device.processors_of(x.device),
        A.index is not None,
    )
    block_i, splits = A.fit(config["BLOCK_I"]), config["SPLITS"]
    config |= {"BLOCK_I": block_i, "EVEN_I": in_features % block_i == 0, "ONE_SHARD_I": A.in_one_shard(block_i)}
    config["BLOCK_L"] = A.block_l
    config["ONE_SHARD_O"] = B.in_one_shard(config["BLOCK_O"])
    tiles_t = count_tiles(tokens, config["BLOCK_T"])
    tiles_o = count_tiles(out_features, config["BLOCK_O"])
    chunk = count_tiles(in_features, splits * block_i) * block_i
    y_parts, h_parts = y, h
    if splits > 1:
        y_parts = torch.empty((splits, tokens, out_features), dtype=torch.float32, device=x.device)
        h_parts = torch.empty((splits, tokens, rank), dtype=torch.float32, device=x.device)
    stride_b = 0 if bias is None else bias.stride(0)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        lora_fwd_kernel[(tiles_t * tiles_o, splits)](
            x,
            weight,
            bias,
            A.rows,
            B.rows,
            A.index,
            B.index,
            y_parts,
            h_parts,
            float(scaling),
            tokens,
            out_features,
            in_features,
            rank,
            A.shards,
            chunk,
            *x.stride(),
            *weight.stride(),
            stride_b,
            *A.rows.stride(),
            *B.rows.stride(),
            **config,
        )
        if splits > 1:
            lora_fwd_sum_kernel[(tiles_t, tiles_o)](
                y_parts,
                h_parts,
                bias,
                B.rows,
                B.index,
                y,
                h,
                float(scaling),
                tokens,
                out_features,
                rank,
                B.shards,
                stride_b,
                *B.rows.stride(),
                **{name: config[name] for name in ("BLOCK_T", "BLOCK_O", "BLOCK_R", "ONE_SHARD_O", "SPLITS")},
                num_warps=4,
            )
    return y, h


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------


# gB = s · g B. A program owns a tile of tokens and a chunk of outputs; it is one of few where tokens
# are few, and then the outputs are split and the parts added up by lora_bwd_sum_kernel.
#
# Floor: size · T out bytes, g once; 2 T out BLOCK_R p operations, p as in the forward.
@triton.jit(do_not_specialize=["tokens"])
def lora_bwd_h_kernel(
    grad_ptr,  # (tokens, out_features)
    factor_B_ptr,  # (rank, out_features), or its pool
    index_B_ptr,  # None, or (rank, shards)
    gB_ptr,  # (splits, tokens, rank), contiguous, float32
    scaling,
    tokens,
    out_features,
    rank,
    shards,
    chunk,  # of out_features for one split, a multiple of BLOCK_O
    stride_gt,
    stride_go,
    stride_Br,
    stride_Bo,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,  # all shards, padded
    ONE_SHARD: tl.constexpr,
):
    split = tl.program_id(2)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = tl.arange(0, BLOCK_O).to(tl.int64)
    in_t, in_r = t < tokens, r < rank
    width, row = out_features // shards, r
    if index_B_ptr is not None and ONE_SHARD:
        index_B = load_index(index_B_ptr, r, in_r, shards, BLOCK_L)
        shard, within = split * chunk // width, split * chunk % width
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(split * chunk, min(split * chunk + chunk, out_features), BLOCK_O):
        in_o = o < out_features - start
        g_ptrs = grad_ptr + t[:, None] * stride_gt + (o + start)[None, :] * stride_go
        g = tl.load(g_ptrs, mask=in_t[:, None] & in_o[None, :], other=0.0)
        first = start
        if index_B_ptr is not None and ONE_SHARD:
            row, first = rows_in_shard(index_B, shard, BLOCK_L), within
            shard += (within + BLOCK_O == width).to(tl.int32)
            within = tl.where(within + BLOCK_O == width, 0, within + BLOCK_O)
        b = load_factor(
            factor_B_ptr, index_B_ptr, stride_Br, stride_Bo, shards, width, r[None, :], row[None, :], first, o[:, None],
            in_r[None, :] & in_o[:, None], ONE_SHARD,
        )  # fmt: skip
        acc = dot_down(g, b, acc)
    gB_ptrs = gB_ptr + (split.to(tl.int64) * tokens + t)[:, None] * rank + r[None, :]
    tl.store(gB_ptrs, acc * scaling, mask=in_t[:, None] & in_r[None, :])


# dx = g W + gB A, into the library's g W. Not the library's addmm: it wants all its operands in one
# dtype, so that a float32 A over a 16-bit base, and gB with it, would be rounded or dx widened, and it
# reads and writes dx just the same.
#
# Floor: 2 size · T in bytes, half of it without g W; 2 T in BLOCK_R p operations, p the products that
# dot_up makes of one.
@triton.jit(do_not_specialize=["tokens"])
def lora_bwd_x_kernel(
    dx_ptr,  # (tokens, in_features), contiguous
    gB_ptr,  # (tokens, rank), contiguous, float32
    factor_A_ptr,  # (rank, in_features), or its pool
    index_A_ptr,  # None, or (rank, shards)
    tokens,
    in_features,
    rank,
    shards,
    stride_Ar,
    stride_Ai,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_SHARD: tl.constexpr,
    ADD: tl.constexpr,  # dx holds g W
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_i = tl.program_id(1).to(tl.int64) * BLOCK_I
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    in_t, in_i = t < tokens, first_i + i < in_features
    dx_ptrs = dx_ptr + t[:, None] * in_features + (first_i + i)[None, :]
    mask = in_t[:, None] & in_i[None, :]
    if ADD:
        acc = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_r = r < rank
        gB_ptrs = gB_ptr + t[:, None] * rank + r[None, :]
        gB = tl.load(gB_ptrs, mask=in_t[:, None] & in_r[None, :], other=0.0)
        width, row, first = in_features // shards, r, first_i
        if index_A_ptr is not None and ONE_SHARD:
            row = tl.load(index_A_ptr + (r * shards + first_i // width), mask=in_r, other=0)
            first = tl.multiple_of(first_i % width, BLOCK_I)
        a = load_factor(
            factor_A_ptr, index_A_ptr, stride_Ar, stride_Ai, shards, width, r[:, None], row[:, None], first,
            i[None, :], in_r[:, None] & in_i[None, :], ONE_SHARD,
        )  # fmt: skip
        acc = dot_up(gB, a, acc, exact=dx_ptr.dtype.element_ty == tl.float32)
    tl.store(dx_ptrs, rounded(acc, dx_ptr.dtype.element_ty), mask=mask)


# s · leftᵀ right, (r, d): dA from gB and x, dB transposed from h and g. A program owns a tile of
# features and a chunk of tokens. The features are the rows of its accumulator: a tensor core has at
# least 64 of these (wgmma), and 8 columns will do.
#
# Floor: size · T d bytes, right once; 2 T d BLOCK_R p operations; and the parts, 4 · splits · r d bytes
# each way.
@triton.jit(do_not_specialize=["tokens", "chunk"])
def lora_bwd_outer_kernel(
    left_ptr,  # (tokens, rank)
    right_ptr,  # (tokens, features)
    out_ptr,  # (splits, rank, features)
    scaling,
    tokens,
    features,
    rank,
    chunk,  # of tokens for one split
    stride_lt,
    stride_lr,
    stride_rt,
    stride_rd,
    stride_os,
    stride_or,
    stride_od,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    split = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    t = tl.arange(0, BLOCK_T).to(tl.int64)
    in_d, in_r = d < features, r < rank
    end = min(split * chunk + chunk, tokens)
    acc = tl.zeros((BLOCK_D, BLOCK_R), tl.float32)
    for start in range(split * chunk, end, BLOCK_T):
        token = start + t
        in_t = token < end
        right_ptrs = right_ptr + token[None, :] * stride_rt + d[:, None] * stride_rd
        right = tl.load(right_ptrs, mask=in_d[:, None] & in_t[None, :], other=0.0)
        left_ptrs = left_ptr + token[:, None] * stride_lt + r[None, :] * stride_lr
        left = tl.load(left_ptrs, mask=in_t[:, None] & in_r[None, :], other=0.0)
        acc = dot_down(right, left, acc)
    out_ptrs = out_ptr + split * stride_os + r[None, :] * stride_or + d[:, None] * stride_od
    value = rounded(acc * scaling, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, value, mask=in_d[:, None] & in_r[None, :])


# The parts of one matrix, added up in a fixed order. Floor: 4 · splits · rows · columns bytes, which L2
# has just been given.
@triton.jit(do_not_specialize=["splits", "rows"])
def lora_bwd_sum_kernel(
    parts_ptr,  # (splits, rows, columns), contiguous, float32
    out_ptr,  # (rows, columns)
    splits,
    rows,
    columns,
    stride_or,
    stride_oc,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    size = tl.full((), 1, tl.int64) * rows * columns
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK_S):
        part_ptrs = parts_ptr + (start + s)[:, None] * size + n[None, :]
        mask = (start + s < splits)[:, None] & (n < size)[None, :]
        acc += tl.sum(tl.load(part_ptrs, mask=mask, other=0.0), axis=0)
    out_ptrs = out_ptr + n // columns * stride_or + n % columns * stride_oc
    tl.store(out_ptrs, rounded(acc, out_ptr.dtype.element_ty), mask=n < size)


def rank_tile(rank: int, most: int) -> int:
    """A power of two, as Triton's tiles are, from 16, the least that a product takes.

    A rank above `most` takes several programs, or turns of a loop: a wider tile would not fit into registers.
    """
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def lora_bwd_h_config(tokens: int, out_features: int, rank: int, itemsize: int, processors: int) -> dict[str, int]:
    """Tiles of `lora_bwd_h_kernel`, and `splits`, which is taken out before the launch.

    Every program reads B, from L2: half as much of it as of g with 32 tokens and a rank of 16. Fewer
    tokens, down to the least that tensor cores take, where there are not programs for all processors.
    """
    block_t = 32 if tokens > 16 and count_tiles(tokens, 32) >= processors else 16
    block_r = rank_tile(rank, 64)
    block_o = 128 if itemsize == 2 and block_r <= 32 else 64
    programs = count_tiles(tokens, block_t) * count_tiles(rank, block_r)
    # Adding the parts up takes as long as a few steps of the walk: each split keeps eight.
    splits = max(1, min(processors // programs, count_tiles(out_features, block_o) // 8))
    return {"BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_R": block_r, "splits": splits, "num_warps": 4}


def gradient_of_h(
    grad: torch.Tensor,  # (T, out)
    B: Factor,
    scaling: float,
) -> torch.Tensor:  # (T, r)
    """gB = s · g B in float32."""
    (tokens, out_features), rank = grad.shape, B.rank
    config = lora_bwd_h_config(tokens, out_features, rank, grad.element_size(), device.processors_of(grad.device))
    splits, block_o = config.pop("splits"), config["BLOCK_O"]
    if B.index is not None:
        # The index takes registers beside a tile of B, which 128 outputs in three parts would fill.
        block_o = B.fit(min(block_o, 64))
    parts = torch.empty((splits, tokens, rank), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        lora_bwd_h_kernel[(count_tiles(tokens, config["BLOCK_T"]), count_tiles(rank, config["BLOCK_R"]), splits)](
            grad,
            B.rows,
            B.index,
            parts,
            float(scaling),
            tokens,
            out_features,
            rank,
            B.shards,
            count_tiles(out_features, splits * block_o) * block_o,
            *grad.stride(),
            *B.rows.stride(),
            **config | {"BLOCK_O": block_o, "BLOCK_L": B.block_l, "ONE_SHARD": B.in_one_shard(block_o)},
            num_stages=4,
        )
    return parts[0] if splits == 1 else sum_parts(parts, torch.empty_like(parts[0]))


def add_gradient_of_x(
    dx: torch.Tensor | None,  # g W, (T, in), contiguous; becomes dx
    gB: torch.Tensor,  # (T, r)
    A: Factor,
    dtype: torch.dtype,
) -> torch.Tensor:  # (T, in)
    """g W + gB A, or gB A alone."""
    (tokens, rank), in_features, add = gB.shape, A.features, dx is not None
    if dx is None:
        dx = torch.empty((tokens, in_features), dtype=dtype, device=gB.device)
    # With an index there is nothing to pipeline: the rows of A wait for it, and the rank is rarely more than one turn.
    # Every row of a tile is two whole lines of memory, and 128 threads hold at most 32 numbers each.
    block_t, block_i = 32 if tokens > 16 else 16, A.fit(128 if dx.element_size() == 2 else 64)
    with torch.cuda.device_of(dx):
        lora_bwd_x_kernel[(count_tiles(tokens, block_t), count_tiles(in_features, block_i))](
            dx,
            gB,
            A.rows,
            A.index,
            tokens,
            in_features,
            rank,
            A.shards,
            *A.rows.stride(),
            BLOCK_T=block_t,
            BLOCK_I=block_i,
            BLOCK_R=rank_tile(rank, 32),
            ONE_SHARD=A.in_one_shard(block_i),
            ADD=add,
            num_warps=4,
            num_stages=3 if A.index is None else 1,
        )
    return dx


def lora_bwd_outer_config(tokens: int, features: int, rank: int, itemsize: int, processors: int) -> dict[str, int]:
    """Tiles of `lora_bwd_outer_kernel`, and `splits`, which is taken out before the launch.

    Two programs for each processor, one of which works while the other waits: so the parts are never
    more than two accumulators for each processor, 2 MiB at rank 16, however large the layer. A split
    has at least 256 tokens, or the parts would be as many bytes as the activation.
    """
    block_r = rank_tile(rank, 64 if itemsize == 2 else 32)
    block_d = 64 if features <= 1024 or itemsize == 4 else 128
    programs = count_tiles(features, block_d) * count_tiles(rank, block_r)
    return {
        "BLOCK_T": 64 if itemsize == 2 else 32,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "splits": max(1, min(2 * processors // programs, tokens // 256)),
        "num_warps": 4,
    }


def outer_parts(
    left: torch.Tensor,  # (T, r)
    right: torch.Tensor,  # (T, d)
    scaling: float,
    out: torch.Tensor | None = None,  # (r, d), of any strides
) -> torch.Tensor | None:  # (splits, r, d), float32
    """s · leftᵀ right as parts to be added up; straight into `out` where it is given and one part is enough."""
    (tokens, rank), features = left.shape, right.shape[1]
    config = lora_bwd_outer_config(tokens, features, rank, right.element_size(), device.processors_of(right.device))
    splits, block_t = config.pop("splits"), config["BLOCK_T"]
    if splits > 1 or out is None:
        parts = torch.empty((splits, rank, features), dtype=torch.float32, device=right.device)
        target, strides = parts, parts.stride()
    else:
        parts, target, strides = None, out, (0, *out.stride())
    with torch.cuda.device_of(right):
        lora_bwd_outer_kernel[(count_tiles(features, config["BLOCK_D"]), count_tiles(rank, config["BLOCK_R"]), splits)](
            left,
            right,
            target,
            float(scaling),
            tokens,
            features,
            rank,
            count_tiles(tokens, splits * block_t) * block_t,
            *left.stride(),
            *right.stride(),
            *strides,
            **config,
            num_stages=3,
        )
    return parts


def sum_parts(
    parts: torch.Tensor,  # (splits, rows, columns)
    out: torch.Tensor,  # (rows, columns), of any strides
) -> torch.Tensor:
    splits, rows, columns = parts.shape
    block = 256
    with torch.cuda.device_of(out):
        lora_bwd_sum_kernel[(count_tiles(rows * columns, block),)](
            parts, out, splits, rows, columns, *out.stride(), BLOCK_S=16, BLOCK=block, num_warps=4
        )
    return out


def outer(left: torch.Tensor, right: torch.Tensor, scaling: float, out: torch.Tensor) -> None:
    """out = s · leftᵀ right, (r, d), of any strides."""
    parts = outer_parts(left, right, scaling, out)
    if parts is not None:
        sum_parts(parts, out)


def low_rank_dx(
    grad: torch.Tensor,  # (T, out)
    weight: torch.Tensor | None,  # (out, in)
    A: Factor,
    gB: torch.Tensor,  # (T, r)
) -> torch.Tensor:  # (T, in)
    # The product with W, nearly all of the work, is the library's: nothing could be saved in it but one pass over dx.
    return add_gradient_of_x(None if weight is None else torch.matmul(grad, weight), gB, A, grad.dtype)


def lora_bwd(
    grad: torch.Tensor,  # (T, out)
    x: torch.Tensor | None,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    lora_A: torch.Tensor,  # (r, in)
    lora_B: torch.Tensor,  # (out, r)
    h: torch.Tensor | None,  # (T, r)
    scaling: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dx, dA (if x is given) and dB (if h is given); one that is not needed has no rows. Any strides.

    Without W, dx is gB A alone. x and g are read once for each of the products that they are in.
    """
    check_dtypes(grad=grad, x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, h=h)
    tokens, (rank, in_features) = grad.shape[0], lora_A.shape
    dx = grad.new_empty((0, in_features))
    dA = lora_A.new_empty((0 if x is None else rank, in_features))
    dB = lora_B.new_empty((0 if h is None else lora_B.shape[0], rank))
    if tokens == 0:
        return dx, dA.zero_(), dB.zero_()
    if need_x or x is not None:
        gB = gradient_of_h(grad, Factor(lora_B.T), scaling)
        if need_x:
            dx = low_rank_dx(grad, weight, Factor(lora_A), gB)
        if x is not None:
            outer(gB, x, 1.0, dA)
    if h is not None:
        outer(h, grad, scaling, dB.T)
    return dx, dA, dB
