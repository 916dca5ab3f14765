"""LoRA (Hu et al. 2021, arXiv 2106.09685) on a frozen linear layer, in one kernel.

    h = x Aᵀ                        (T, r)    float32, kept for the backward
    y = x Wᵀ + b + s · h Bᵀ         (T, out)  in x's dtype, rounded once

    x (T, in), weight W (out, in), bias b (out,) or None, lora_A A (r, in), lora_B B (out, r)

A program owns a tile of y. On its one walk over in_features it multiplies each tile of x with the
tile of W and with the tile of A, so nothing is read again for the adapter; s · h Bᵀ joins the same
accumulator when the walk is over. All the programs of a row of tiles find the same h, and the one
of the first output tile stores it: BLOCK_R / BLOCK_O more products, instead of a second launch, a
second pass over x and a round trip of h.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device
from fastpeft.kernels.device import SHARED_MEMORY, check_dtypes, count_tiles
from fastpeft.kernels.dots import dot, dot_down, dot_up, to_bfloat16


# tokens changes from call to call, and no address is cheaper for knowing that it is 1 or a multiple
# of 16: without this, three kernels would be compiled for each layer shape.
@triton.jit(do_not_specialize=["tokens"])
def lora_fwd_kernel(
    x_ptr,  # (tokens, in_features)
    weight_ptr,  # (out_features, in_features)
    bias_ptr,  # (out_features,) or None
    lora_A_ptr,  # (rank, in_features)
    lora_B_ptr,  # (out_features, rank)
    y_ptr,  # (tokens, out_features), contiguous
    h_ptr,  # (tokens, rank), contiguous, float32
    scaling,
    tokens,
    out_features,
    in_features,
    rank,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_b,
    stride_Ar,
    stride_Ai,
    stride_Bo,
    stride_Br,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,  # the whole rank, padded
    GROUP_T: tl.constexpr,
    EVEN_I: tl.constexpr,  # BLOCK_I divides in_features: no mask along it
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

    # W and A are addressed transposed, (i, o) and (i, r): the right-hand operands of x.
    x_ptrs = x_ptr + t[:, None] * stride_xt + i[None, :] * stride_xi
    w_ptrs = weight_ptr + o[None, :] * stride_wo + i[:, None] * stride_wi
    a_ptrs = lora_A_ptr + r[None, :] * stride_Ar + i[:, None] * stride_Ai

    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, in_features, BLOCK_I):
        if EVEN_I:
            x = tl.load(x_ptrs, mask=in_t[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=in_o[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=in_r[None, :], other=0.0)
        else:
            in_i = i < in_features - start
            x = tl.load(x_ptrs, mask=in_t[:, None] & in_i[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=in_o[None, :] & in_i[:, None], other=0.0)
            a = tl.load(a_ptrs, mask=in_r[None, :] & in_i[:, None], other=0.0)
        acc = dot(x, w, acc)
        h = dot_down(x, a, h)
        x_ptrs += step * stride_xi
        w_ptrs += step * stride_wi
        a_ptrs += step * stride_Ai

    if tile_o == 0:
        tl.store(h_ptr + t[:, None] * rank + r[None, :], h, mask=in_t[:, None] & in_r[None, :])

    b_ptrs = lora_B_ptr + o[None, :] * stride_Bo + r[:, None] * stride_Br
    b = tl.load(b_ptrs, mask=in_o[None, :] & in_r[:, None], other=0.0)
    acc = dot_up(h * scaling, b, acc, exact=y_ptr.dtype.element_ty == tl.float32)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o * stride_b, mask=in_o, other=0.0).to(tl.float32)[None, :]
    if y_ptr.dtype.element_ty == tl.bfloat16:
        y = to_bfloat16(acc)
    else:
        y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + t[:, None] * out_features + o[None, :], y, mask=in_t[:, None] & in_o[None, :])


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
) -> dict[str, int | bool]:
    """The tile sizes, num_warps and num_stages of `lora_fwd_kernel`, from shapes and dtypes alone.

    It is the first tile above that fits and leaves PROGRAMS programs, else the last one, with as
    many stages as `shared_memory`, in bytes per program, holds.
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
    return {
        "BLOCK_T": block_t,
        "BLOCK_O": block_o,
        "BLOCK_I": block_i,
        "BLOCK_R": block_r,
        "GROUP_T": 8,
        "EVEN_I": in_features % block_i == 0,
        "num_warps": warps,
        "num_stages": max(1, min(stages, fitting_stages)),
    }


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
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have x's dtype, {x.dtype}, got {weight.dtype}")

    (tokens, in_features), (out_features, rank) = x.shape, lora_B.shape
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
        lora_A.dtype,
        device.shared_memory_of(x.device),
    )
    tiles_t = count_tiles(tokens, config["BLOCK_T"])
    tiles_o = count_tiles(out_features, config["BLOCK_O"])
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        lora_fwd_kernel[(tiles_t * tiles_o,)](
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            y,
            h,
            float(scaling),
            tokens,
            out_features,
            in_features,
            rank,
            *x.stride(),
            *weight.stride(),
            0 if bias is None else bias.stride(0),
            *lora_A.stride(),
            *lora_B.stride(),
            **config,
        )
    return y, h
