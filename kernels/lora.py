"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a frozen linear layer.

Forward:

    h = x Aᵀ                        (T, r)    float32, kept for the backward
    y = x Wᵀ + b + s · h Bᵀ         (T, out)  in x's dtype

in one kernel where that pays, else in the two kernels of low_rank.py around the library's product with W. Backward, for
g = ∂L/∂y, always around it:

    gB = s · g B                    (T, r)    float32
    dx = g W + gB A                 (T, in)
    dA = gBᵀ x                      (r, in)
    dB = s · gᵀ h                   (out, r)

    x (T, in), weight W (out, in) or None, bias b (out,) or None, lora_A A (r, in), lora_B B (out, r)

With dropout A is applied to x where `kept` of low_rank.py says so, and the gradients know it by the same rule.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.device import SHARED_MEMORY, check_dtypes, count_tiles
from fastpeft.kernels.dots import dot, dot_down, dot_up, rounded
from fastpeft.kernels.low_rank import (
    NO_DROPOUT,
    Dropout,
    Factor,
    down,
    load_factor,
    load_index,
    outer,
    rows_in_shard,
    up,
)

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


# A wider h would take the registers of the accumulators.
MOST_RANK = 256
FREE = ("BLOCK_T", "BLOCK_O", "num_warps", "num_stages")  # of the settings: what tuning may change
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
) -> dict[str, int | bool | None]:
    """The tile sizes and the compiler's settings of `lora_fwd_kernel`, from shapes and dtypes alone.

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
        # A split A takes registers, of which a wide tile for decode has none to spare where operands do (Ampere), nor
        # beside the index of the shards where x is split as well. A wide tile beyond decode has none for either.
        if split and tokens <= 16 and block_o == 64 and (not hopper or (sharded and dtype == torch.float16)):
            continue
        if (sharded or split) and size == 2 and not hopper and block_t * block_o > 64 * 128:
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
        while accumulators > most_accumulators and warps < 16:
            warps, accumulators = 2 * warps, accumulators // 2
    # In the smallest tile, float32 operands in registers leave none for the index of the shards.
    if sharded and size == 4 and not hopper and tokens > 64 and block_o == 32:
        block_i = 16
    # A large rank makes a large tile of A as well: at most 32 numbers of it for each thread.
    while block_i * block_r > 32 * 32 * warps and block_i > 16:
        block_i //= 2
    if split and dtype == torch.float16:
        # x is split as well. The long steps of decode leave no registers for the index of the shards then.
        block_i = max(16, block_i // (4 if sharded and tokens <= 16 else 2))
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


def most_registers(config: dict[str, int], tokens: int, dtype: torch.dtype, shared_memory: int) -> int | None:
    """A limit for decode, or None for the compiler's own.

    Few programs, so that registers are there: by itself the compiler would spill a few to make room for more programs.
    On Hopper and later it does so over narrow tiles of 16 bits alone; over others it spills if it is given a limit.
    """
    spills = shared_memory <= 200 * 1024 or (dtype.itemsize == 2 and config["BLOCK_O"] * config["BLOCK_I"] <= 2048)
    return 255 if tokens <= 64 and config["num_warps"] == 4 and spills else None


def fused_pays(tokens: int, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> bool:
    """Whether one kernel is to do the whole layer.

    Decode is over when W has come from memory, and h comes along for nothing. Beyond it the kernel multiplies A once
    for each tile of outputs, which is 12 % more products in bfloat16 and 37 % where A is float32, and is no match for
    the library's own product on the newest chips. In its place stand three launches and two passes, over x and over y.
    A launch takes some 2 µs in a CUDA graph: so the one kernel still wins where the product takes up to 25 µs or so.
    """
    few = 2e10 if dtype.itemsize == 2 else 1.5e9
    return rank <= MOST_RANK and (tokens <= 64 or 2 * tokens * out_features * in_features <= few)


def lora_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    lora_A: torch.Tensor,  # (r, in)
    lora_B: torch.Tensor,  # (out, r)
    scaling: float,
    seed: torch.Tensor | None = None,  # (1,), of dropout
    p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x Wᵀ + b + s · h Bᵀ in x's dtype, and h = x Aᵀ in float32; any strides. Without W the delta alone."""
    check_dtypes(x=x, weight=weight, bias=bias, lora_A=lora_A, lora_B=lora_B)
    return low_rank_fwd(x, weight, bias, Factor(lora_A), Factor(lora_B.T), scaling, Dropout(seed, p))


def low_rank_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    A: Factor,
    B: Factor,
    scaling: float,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[torch.Tensor, torch.Tensor]:  # y (T, out), h (T, r)
    (tokens, in_features), out_features, rank = x.shape, B.features, A.rank
    if tokens == 0:
        return x.new_empty((0, out_features)), x.new_empty((0, rank), dtype=torch.float32)
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype, {x.dtype}, got {weight.dtype}")
    if weight is not None and dropout.seed is None and fused_pays(tokens, out_features, in_features, rank, x.dtype):
        return fused_fwd(x, weight, bias, A, B, scaling)
    h = down(x, A, 1.0, dropout)
    y = up(h, B, scaling, bias, x.dtype)
    # Into what is there: the library reads y while it multiplies, and no other kernel has to pass over it again.
    return y if weight is None else y.addmm_(x, weight.T), h


def fused_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    A: Factor,
    B: Factor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # y (T, out), h (T, r)
    (tokens, in_features), out_features, rank = x.shape, B.features, A.rank
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    h = torch.empty((tokens, rank), dtype=torch.float32, device=x.device)
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
    case = out_features, in_features, rank, A.shards, x.dtype, A.rows.dtype
    config = tuning.settle("lora_fwd", case, tokens, x.device, config, FREE)
    block_i, splits = A.fit(config["BLOCK_I"]), config["SPLITS"]
    config |= {"BLOCK_I": block_i, "EVEN_I": in_features % block_i == 0, "ONE_SHARD_I": A.in_one_shard(block_i)}
    config["BLOCK_L"] = A.block_l
    config["ONE_SHARD_O"] = B.in_one_shard(config["BLOCK_O"])
    config["maxnreg"] = most_registers(config, tokens, x.dtype, device.shared_memory_of(x.device))
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


def low_rank_dx(
    grad: torch.Tensor,  # (T, out)
    weight: torch.Tensor | None,  # (out, in)
    A: Factor,
    gB: torch.Tensor,  # (T, r)
    dropout: Dropout = NO_DROPOUT,
) -> torch.Tensor:  # (T, in)
    """g W + gB A, or gB A alone."""
    dx = up(gB, A, 1.0, None, grad.dtype, dropout)
    return dx if weight is None else dx.addmm_(grad, weight)


def lora_bwd(
    grad: torch.Tensor,  # (T, out)
    x: torch.Tensor | None,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    lora_A: torch.Tensor,  # (r, in)
    lora_B: torch.Tensor,  # (out, r)
    h: torch.Tensor | None,  # (T, r)
    scaling: float,
    need_x: bool,
    seed: torch.Tensor | None = None,  # (1,), of dropout
    p: float = 0.0,
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
        gB, dropout = down(grad, Factor(lora_B.T), scaling), Dropout(seed, p)
        if need_x:
            dx = low_rank_dx(grad, weight, Factor(lora_A), gB, dropout)
        if x is not None:
            outer(gB, x, 1.0, dA, dropout)
    if h is not None:
        outer(h, grad, scaling, dB.T)
    return dx, dA, dB
