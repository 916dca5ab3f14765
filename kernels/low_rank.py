"""The products of a frozen layer's low-rank adapters, LoRA and MoS, with what is as long as a layer is wide.

    down     h = s · x Aᵀ                   (T, r)    float32
    up       y = s · h B + b                (T, d)
    outer    s · leftᵀ right                (r, d)

    x (T, d), A and B (r, d), h and left (T, r), right (T, d); in a layer B is lora_B transposed

A and B are matrices, or read where their shards lie in a pool. x, y and right can be behind dropout, which drops the
same entries of each for the same seed. Sums that are split over programs are left as parts in a workspace and added in
a fixed order by one more kernel, so that every result is the same bit for bit from run to run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.device import SHARED_MEMORY, count_tiles
from fastpeft.kernels.dots import dot_down, dot_up, rounded

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


@triton.jit
def kept(
    seed_ptr,  # (1,), int64
    p,
    t,  # (T,), rows
    first,  # column, a multiple of 4
    BLOCK_D: tl.constexpr,
):  # (T, BLOCK_D)
    """Which entries dropout leaves: a function of the seed and of the place alone, so that no mask is ever stored.

    The generator is Philox4x32 (Salmon et al., SC 2011) with 7 rounds, the fewest that pass its authors' tests. It
    gives four numbers at a time, to four neighbours of a row.
    """
    quad = first // 4 + tl.arange(0, BLOCK_D // 4)
    row = t[:, None].to(tl.int64) + tl.zeros((1, BLOCK_D // 4), tl.int64)
    column = (quad[None, :] + tl.zeros_like(row)).to(tl.uint32)
    seed = tl.load(seed_ptr)
    a, b, c, d = tl.philox(seed, column, row.to(tl.uint32), (row >> 32).to(tl.uint32), column * 0, n_rounds=7)
    number = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (t.shape[0], BLOCK_D))
    return (number >> 8).to(tl.float32) * 2.0**-24 >= p


# A program owns a tile of tokens and a chunk of features; it is one of few where tokens are few, and then
# the features are split and the parts added up by low_rank_sum_kernel.
#
# Floor: size · T d bytes, x once; 2 T d BLOCK_R p operations, p the products that dot_down makes of one.
@triton.jit(do_not_specialize=["tokens"])
def low_rank_down_kernel(
    x_ptr,  # (tokens, features)
    factor_ptr,  # (rank, features), or its pool
    index_ptr,  # None, or (rank, shards)
    seed_ptr,  # None, or (1,): dropout of x
    h_ptr,  # (splits, tokens, rank), contiguous, float32
    scaling,
    p,
    tokens,
    features,
    rank,
    shards,
    chunk,  # of features for one split, a multiple of BLOCK_D
    stride_xt,
    stride_xd,
    stride_r,
    stride_d,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,  # all shards, padded
    ONE_SHARD: tl.constexpr,
):
    split = tl.program_id(2)
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_t, in_r = t < tokens, r < rank
    width, row = features // shards, r
    if index_ptr is not None and ONE_SHARD:
        index = load_index(index_ptr, r, in_r, shards, BLOCK_L)
        shard, within = split * chunk // width, split * chunk % width
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(split * chunk, min(split * chunk + chunk, features), BLOCK_D):
        in_d = d < features - start
        x_ptrs = x_ptr + t[:, None] * stride_xt + (d + start)[None, :] * stride_xd
        x = tl.load(x_ptrs, mask=in_t[:, None] & in_d[None, :], other=0.0)
        if seed_ptr is not None:
            x = tl.where(kept(seed_ptr, p, t, start, BLOCK_D), x, 0.0)
        first = start
        if index_ptr is not None and ONE_SHARD:
            row, first = rows_in_shard(index, shard, BLOCK_L), within
            shard += (within + BLOCK_D == width).to(tl.int32)
            within = tl.where(within + BLOCK_D == width, 0, within + BLOCK_D)
        a = load_factor(
            factor_ptr, index_ptr, stride_r, stride_d, shards, width, r[None, :], row[None, :], first, d[:, None],
            in_r[None, :] & in_d[:, None], ONE_SHARD,
        )  # fmt: skip
        acc = dot_down(x, a, acc)
    h_ptrs = h_ptr + (split.to(tl.int64) * tokens + t)[:, None] * rank + r[None, :]
    tl.store(h_ptrs, acc * scaling, mask=in_t[:, None] & in_r[None, :])


# Not the library's product: it wants its operands in one dtype, so that a float32 B over a 16-bit base, and
# h with it, would be rounded or y widened.
#
# Floor: size · T d bytes, y once; 2 T d BLOCK_R p operations, p the products that dot_up makes of one.
@triton.jit(do_not_specialize=["tokens"])
def low_rank_up_kernel(
    h_ptr,  # (tokens, rank), contiguous, float32
    factor_ptr,  # (rank, features), or its pool
    index_ptr,  # None, or (rank, shards)
    bias_ptr,  # (features,) or None
    seed_ptr,  # None, or (1,): dropout of y
    y_ptr,  # (tokens, features), contiguous
    scaling,
    p,
    tokens,
    features,
    rank,
    shards,
    stride_r,
    stride_d,
    stride_b,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ONE_SHARD: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_d = tl.program_id(1).to(tl.int64) * BLOCK_D
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    in_t, in_d = t < tokens, first_d + d < features
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        in_r = r < rank
        h_ptrs = h_ptr + t[:, None] * rank + r[None, :]
        h = tl.load(h_ptrs, mask=in_t[:, None] & in_r[None, :], other=0.0)
        width, row, first = features // shards, r, first_d
        if index_ptr is not None and ONE_SHARD:
            row = tl.load(index_ptr + (r * shards + first_d // width), mask=in_r, other=0)
            first = tl.multiple_of(first_d % width, BLOCK_D)
        b = load_factor(
            factor_ptr, index_ptr, stride_r, stride_d, shards, width, r[:, None], row[:, None], first,
            d[None, :], in_r[:, None] & in_d[None, :], ONE_SHARD,
        )  # fmt: skip
        acc = dot_up(h, b, acc, exact=y_ptr.dtype.element_ty == tl.float32)
    acc *= scaling
    if seed_ptr is not None:
        acc = tl.where(kept(seed_ptr, p, t, first_d, BLOCK_D), acc, 0.0)
    d += first_d
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + d * stride_b, mask=in_d, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + t[:, None] * features + d[None, :]
    tl.store(y_ptrs, rounded(acc, y_ptr.dtype.element_ty), mask=in_t[:, None] & in_d[None, :])


# The gradient of A from that of h and from x, that of B from h and from the gradient of y. A program owns a tile of
# features and a chunk of tokens. The features are the rows of its accumulator: a tensor core has at
# least 64 of these (wgmma), and 8 columns will do.
#
# Floor: size · T d bytes, right once; 2 T d BLOCK_R p operations; and the parts, 4 · splits · r d bytes
# each way.
@triton.jit(do_not_specialize=["tokens", "chunk"])
def low_rank_outer_kernel(
    left_ptr,  # (tokens, rank)
    right_ptr,  # (tokens, features)
    seed_ptr,  # None, or (1,): dropout of right
    out_ptr,  # (splits, rank, features)
    scaling,
    p,
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
        if seed_ptr is not None:
            first = tl.program_id(0).to(tl.int64) * BLOCK_D
            right = tl.where(tl.trans(kept(seed_ptr, p, token, first, BLOCK_D)), right, 0.0)
        left_ptrs = left_ptr + token[:, None] * stride_lt + r[None, :] * stride_lr
        left = tl.load(left_ptrs, mask=in_t[:, None] & in_r[None, :], other=0.0)
        acc = dot_down(right, left, acc)
    out_ptrs = out_ptr + split * stride_os + r[None, :] * stride_or + d[:, None] * stride_od
    value = rounded(acc * scaling, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, value, mask=in_d[:, None] & in_r[None, :])


# The parts of one matrix, added up in a fixed order. Floor: 4 · splits · rows · columns bytes, which L2
# has just been given.
@triton.jit(do_not_specialize=["splits", "rows"])
def low_rank_sum_kernel(
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


class Dropout(NamedTuple):
    """Of the adapter's input: what the generator starts from, (1,) int64 on the device, and the share that it drops."""

    seed: torch.Tensor | None = None
    p: float = 0.0

    @property
    def scaling(self) -> float:
        """Of what is left."""
        return 1 / (1 - self.p)


NO_DROPOUT = Dropout()
# From as much of it on, Hopper's 227 KiB, tensor cores read from shared memory; before, operands take registers.
IN_SHARED_MEMORY = 200 * 1024
FREE = ("BLOCK_T", "BLOCK_D", "num_warps")  # of the settings: what tuning may change


def rank_tile(rank: int, most: int) -> int:
    """A power of two, as Triton's tiles are, from 16, the least that a product takes.

    A rank above `most` takes several programs, or turns of a loop: a wider tile would not fit into registers.
    """
    return min(most, max(16, 1 << (rank - 1).bit_length()))


def down_config(
    tokens: int, features: int, rank: int, dtype: torch.dtype, processors: int, shared_memory: int = SHARED_MEMORY
) -> dict[str, int]:
    """Tiles of `low_rank_down_kernel`, and `splits`, which is taken out before the launch.

    Every program reads A, from L2: half as much of it as of x with 32 tokens and a rank of 16. Fewer
    tokens, down to the least that tensor cores take, where there are not programs for all processors.
    """
    block_t = 32 if tokens > 16 and count_tiles(tokens, 32) >= processors else 16
    block_r = rank_tile(rank, 64)
    block_d, stages = 128 if dtype == torch.bfloat16 and block_r <= 32 else 64, 4
    if dtype.itemsize == 2 and shared_memory < IN_SHARED_MEMORY:
        block_d //= 2
    elif dtype == torch.float16:
        # Split, as A is: five products of a wider part spill. As many features are on their way, in steps half as long.
        block_d, stages = 32, 7
    programs = count_tiles(tokens, block_t) * count_tiles(rank, block_r)
    # Adding the parts up takes as long as a few steps of the walk: each split keeps eight.
    splits = max(1, min(processors // programs, count_tiles(features, block_d) // 8))
    return {
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "splits": splits,
        "num_warps": 4,
        "num_stages": stages,
    }


def down(
    x: torch.Tensor,  # (T, d)
    A: Factor,  # (r, d)
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:  # (T, r)
    """s · x Aᵀ in float32; with dropout of x, whose entries that are left are scaled up."""
    (tokens, features), rank = x.shape, A.rank
    config = down_config(
        tokens, features, rank, x.dtype, device.processors_of(x.device), device.shared_memory_of(x.device)
    )
    config = tuning.settle("low_rank_down", (features, rank, A.shards, x.dtype), tokens, x.device, config, FREE)
    splits, block_d = config.pop("splits"), config["BLOCK_D"]
    if A.index is not None:
        # The index takes registers beside a tile of A, which 128 features in three parts would fill.
        block_d = A.fit(min(block_d, 64))
    parts = torch.empty((splits, tokens, rank), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        low_rank_down_kernel[(count_tiles(tokens, config["BLOCK_T"]), count_tiles(rank, config["BLOCK_R"]), splits)](
            x,
            A.rows,
            A.index,
            dropout.seed,
            parts,
            float(scaling * dropout.scaling),
            float(dropout.p),
            tokens,
            features,
            rank,
            A.shards,
            count_tiles(features, splits * block_d) * block_d,
            *x.stride(),
            *A.rows.stride(),
            **config | {"BLOCK_D": block_d, "BLOCK_L": A.block_l, "ONE_SHARD": A.in_one_shard(block_d)},
        )
    return parts[0] if splits == 1 else sum_parts(parts, torch.empty_like(parts[0]))


def up(
    h: torch.Tensor,  # (T, r), contiguous
    B: Factor,  # (r, d)
    scaling: float,
    bias: torch.Tensor | None,  # (d,)
    dtype: torch.dtype,
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:  # (T, d)
    """s · h B + b; dropout is of the product alone."""
    (tokens, rank), features = h.shape, B.features
    y = torch.empty((tokens, features), dtype=dtype, device=h.device)
    # Every row of a tile is two whole lines of memory, and 256 threads hold at most 16 numbers each: with more of them
    # some chips' registers do not suffice for the parts of B.
    block_t, block_d = 32 if tokens > 16 else 16, B.fit(128 if dtype.itemsize == 2 else 64)
    with torch.cuda.device_of(h):
        low_rank_up_kernel[(count_tiles(tokens, block_t), count_tiles(features, block_d))](
            h,
            B.rows,
            B.index,
            bias,
            dropout.seed,
            y,
            float(scaling * dropout.scaling),
            float(dropout.p),
            tokens,
            features,
            rank,
            B.shards,
            *B.rows.stride(),
            0 if bias is None else bias.stride(0),
            BLOCK_T=block_t,
            BLOCK_D=block_d,
            BLOCK_R=rank_tile(rank, 32),
            ONE_SHARD=B.in_one_shard(block_d),
            num_warps=8,
            # With an index there is nothing to pipeline: rows wait for it, and the rank is rarely more than one turn.
            num_stages=3 if B.index is None else 1,
        )
    return y


def outer_config(
    tokens: int, features: int, rank: int, itemsize: int, processors: int, shared_memory: int = SHARED_MEMORY
) -> dict[str, int]:
    """Tiles of `low_rank_outer_kernel`, and `splits`, which is taken out before the launch.

    Two programs for each processor, one of which works while the other waits: so the parts are never
    more than two accumulators for each processor, 2 MiB at rank 16, however large the layer. A split
    has at least 256 tokens, or the parts would be as many bytes as the activation.
    """
    block_r = rank_tile(rank, 64 if itemsize == 2 else 32)
    block_d = 64 if features <= 1024 or itemsize == 4 else 128
    block_t = 32 if itemsize == 4 or (block_d == 128 and shared_memory < IN_SHARED_MEMORY) else 64
    programs = count_tiles(features, block_d) * count_tiles(rank, block_r)
    return {
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "splits": max(1, min(2 * processors // programs, tokens // 256)),
        "num_warps": 4,
    }


def outer_parts(
    left: torch.Tensor,  # (T, r)
    right: torch.Tensor,  # (T, d)
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
    out: torch.Tensor | None = None,  # (r, d), of any strides
) -> torch.Tensor | None:  # (splits, r, d), float32
    """s · leftᵀ right, with dropout of right, as parts to be added up.

    Straight into `out` and None where it is given and one part is enough.
    """
    (tokens, rank), features = left.shape, right.shape[1]
    processors, shared_memory = device.processors_of(right.device), device.shared_memory_of(right.device)
    config = outer_config(tokens, features, rank, right.element_size(), processors, shared_memory)
    config = tuning.settle("low_rank_outer", (features, rank, right.dtype), tokens, right.device, config, FREE)
    splits, block_t = config.pop("splits"), config["BLOCK_T"]
    if splits > 1 or out is None:
        parts = torch.empty((splits, rank, features), dtype=torch.float32, device=right.device)
        target, strides = parts, parts.stride()
    else:
        parts, target, strides = None, out, (0, *out.stride())
    with torch.cuda.device_of(right):
        low_rank_outer_kernel[(count_tiles(features, config["BLOCK_D"]), count_tiles(rank, config["BLOCK_R"]), splits)](
            left,
            right,
            dropout.seed,
            target,
            float(scaling * dropout.scaling),
            float(dropout.p),
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
        low_rank_sum_kernel[(count_tiles(rows * columns, block),)](
            parts, out, splits, rows, columns, *out.stride(), BLOCK_S=16, BLOCK=block, num_warps=4
        )
    return out


def outer(
    left: torch.Tensor,  # (T, r)
    right: torch.Tensor,  # (T, d)
    scaling: float,
    out: torch.Tensor,  # (r, d), of any strides
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """out = s · leftᵀ right."""
    parts = outer_parts(left, right, scaling, dropout, out)
    if parts is not None:
        sum_parts(parts, out)
