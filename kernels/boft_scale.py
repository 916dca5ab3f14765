"""BOFT's scale of the outputs (Liu et al., ICLR 2024, arXiv 2311.06243), after the library's product with W.

    y = (y0 − b) ⊙ s + b                y0 = x R Wᵀ + b
    dy0 = g ⊙ s,  ds = Σ_t g ⊙ (y0 − b)

    y0, y and g (T, out), b (out,) or None, s (out, 1) float32

One pass over the outputs each way. What programs sum over their tokens is added up in one order.
"""

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device
from fastpeft.kernels.device import count_tiles
from fastpeft.kernels.dots import rounded


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
