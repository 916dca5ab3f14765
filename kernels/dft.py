"""FourierFT's delta in one pass over the tokens: transforms as products with small DFT matrices, on tensor cores.

    y += delta, delta = irfft(scale / 2 · conj Σ c[e] · rfft(x)[v]), without its factor 1 / out

as in kernels/fourierft.py, with whole spectra: ΔW is real, so that two tokens go as one complex row z = x1 + i x2,
and ΔW x1 and ΔW x2 are the real and the imaginary part of ΔW z. The conjugate of a real row's bin v is its bin -v, so
that S[k] = scale / 2 · Σ c[e] · Z[-v] is linear in z, over the 2n samples (v, e) of the tables.

A row of d = R · C elements is a matrix, element j = r C + c at (r, c), and its transform is

    Z = ((F_R x) ∘ twiddles) F_C         F_R[k, r] = e^(-2πi k r / R),  twiddles[k, c] = e^(-2πi k c / d)

with bin k + R l at (k, l). Nothing is transposed on the way: the gather between the two transforms moves bins to where
the next transform wants its elements.

Backward: dx is the same walk from grad to x. With W the transform of a pair of rows of grad, conj W[-u] Z[v] and
W[u] conj Z[-v] hold G1 X1 + G2 X2 and the same cross terms G1 X2 - G2 X1 with opposite signs; here bins u and -u are
taken apart into those of the two tokens, because each token has its own scale.

Precision. Operands are float16, with powers of two taken out of each token and of each pair's samples: no magnitude is
out of range, a large token does not round its neighbour away, and tensor cores see 11 bits, as many as tf32 has at half
the speed and twice the shared memory. x itself, with its 8 or 11 bits, is exact. What is left are the roundings of four
matrices and three intermediate results, together 4.5e-4 of the delta in root mean square, where the rounding of the
result to bfloat16 leaves 1.7e-3. The result's rounding to float16 leaves 2.1e-4, and so for float16 x matrices and
intermediate results go in two parts of 11 bits (SPLIT), three products for one; the gradient of the coefficients is
float32 and takes two parts always.

A token's result depends on which token it shares its row with, by these roundings alone.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from fastpeft.kernels import device
from fastpeft.kernels.device import count_tiles
from fastpeft.kernels.dots import to_bfloat16


@triton.jit
def complex_dot(a_re, a_im, b_re, b_im, re, im, TABLE_LEFT: tl.constexpr):
    """(re + i im) + a b. One of the two is a table that many products share, and so the other changes its sign."""
    re = tl.dot(a_re, b_re, re)
    im = tl.dot(a_im, b_re, im)
    im = tl.dot(a_re, b_im, im)
    if TABLE_LEFT:
        re = tl.dot(a_im, -b_im, re)
    else:
        re = tl.dot(-a_im, b_im, re)
    return re, im


@triton.jit
def float16_parts(x):
    """x = high + low, up to 2⁻²² of x or 2⁻²⁵."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def load_complex(ptr, offsets, size: tl.constexpr):
    """Real parts, and imaginary parts that begin `size` later."""
    return tl.load(ptr + offsets), tl.load(ptr + size + offsets)


@triton.jit
def add_transform(
    z_re,  # (ROWS, BLOCK) float32, columns of z from `start` on
    z_im,
    start,
    re,  # (ROWS, COLS) float32
    im,
    matrices_ptr,  # those of `dft_tables`
    twiddles_ptr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    EXACT: tl.constexpr,  # z fits in float16
):
    """re + i im + ((F_R z) ∘ twiddles) F_C, of some columns of z."""
    r, b = tl.arange(0, ROWS).to(tl.int64)[:, None], tl.arange(0, BLOCK).to(tl.int64)
    p_re = tl.zeros((ROWS, BLOCK), tl.float32)
    p_im = tl.zeros((ROWS, BLOCK), tl.float32)
    high_re, low_re = float16_parts(z_re)
    high_im, low_im = float16_parts(z_im)
    at = r * ROWS + tl.arange(0, ROWS).to(tl.int64)[None, :]
    f_re, f_im = load_complex(matrices_ptr, at, ROWS * ROWS)
    if SPLIT:
        f_low_re, f_low_im = load_complex(matrices_ptr + 2 * ROWS * ROWS, at, ROWS * ROWS)
        p_re, p_im = complex_dot(f_low_re, f_low_im, high_re, high_im, p_re, p_im, True)
        if not EXACT:
            p_re, p_im = complex_dot(f_re, f_im, low_re, low_im, p_re, p_im, True)
    p_re, p_im = complex_dot(f_re, f_im, high_re, high_im, p_re, p_im, True)

    t_re, t_im = load_complex(twiddles_ptr + start, r * COLS + b[None, :], ROWS * COLS)
    high_re, low_re = float16_parts(p_re * t_re - p_im * t_im)
    high_im, low_im = float16_parts(p_re * t_im + p_im * t_re)

    matrices_ptr += 4 * ROWS * ROWS + start * COLS
    at = b[:, None] * COLS + tl.arange(0, COLS).to(tl.int64)[None, :]
    f_re, f_im = load_complex(matrices_ptr, at, COLS * COLS)
    if SPLIT:
        re, im = complex_dot(low_re, low_im, f_re, f_im, re, im, False)
        f_low_re, f_low_im = load_complex(matrices_ptr + 2 * COLS * COLS, at, COLS * COLS)
        re, im = complex_dot(high_re, high_im, f_low_re, f_low_im, re, im, False)
    return complex_dot(high_re, high_im, f_re, f_im, re, im, False)


@triton.jit
def largest_bits(x):
    """The bits of the largest magnitude; those of NaN are the largest of all."""
    return tl.max(tl.ravel(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def scales_of(bits):
    """A power of two that brings the largest magnitude to [1, 4), and what undoes it: NaN where it is not finite."""
    exponent = tl.minimum(tl.maximum(bits & 0x7F800000, 1 << 23), 253 << 23)
    down = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    up = tl.where(bits < 0x7F800000, exponent, 0x7FC00000).to(tl.float32, bitcast=True)
    return down, up


@triton.jit
def load_columns(
    ptr,  # row of a token
    stride,
    exists,  # whether there is such a token
    start,
    R: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns from `start` on of a token as an R × C matrix, (ROWS, BLOCK) float32."""
    r, c = tl.arange(0, ROWS).to(tl.int64)[:, None], start + tl.arange(0, BLOCK).to(tl.int64)[None, :]
    mask = (r < tl.where(exists, R, 0)) & (c < C)
    return tl.load(ptr + (r * C + c) * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def pair_spectrum(
    ptr,  # (tokens, R · C)
    stride_t,
    stride_d,
    pair,  # int64
    tokens,
    matrices_ptr,
    twiddles_ptr,
    R: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The spectrum of tokens 2 pair and 2 pair + 1 as one complex row, both parts (ROWS · COLS,), and their scales.

    A token that is not finite gives zeros: the other must not see it.
    """
    first, second = ptr + 2 * pair * stride_t, ptr + (2 * pair + 1) * stride_t
    bits1 = largest_bits(load_columns(first, stride_d, 2 * pair < tokens, 0, R, C, ROWS, COLS))
    bits2 = largest_bits(load_columns(second, stride_d, 2 * pair + 1 < tokens, 0, R, C, ROWS, COLS))
    exists1 = tl.where(bits1 < 0x7F800000, 2 * pair < tokens, False)
    exists2 = tl.where(bits2 < 0x7F800000, 2 * pair + 1 < tokens, False)
    down1, up1 = scales_of(bits1)
    down2, up2 = scales_of(bits2)
    re = tl.zeros((ROWS, COLS), tl.float32)
    im = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, COLS, BLOCK, num_stages=1):
        x1 = load_columns(first, stride_d, exists1, start, R, C, ROWS, BLOCK)
        x2 = load_columns(second, stride_d, exists2, start, R, C, ROWS, BLOCK)
        re, im = add_transform(
            x1 * down1, x2 * down2, start, re, im, matrices_ptr, twiddles_ptr, ROWS, COLS, BLOCK, SPLIT, True
        )
    return tl.ravel(re), tl.ravel(im), up1, up2


@triton.jit
def place_of(k, R: tl.constexpr, COLS: tl.constexpr):
    """Where bin k lies in a flattened spectrum."""
    return k % R * COLS + k // R


@triton.jit
def mirrored(k, D: tl.constexpr):
    return tl.where(k == 0, 0, D - k)


@triton.jit
def sum_before(sums, sample):
    """The sum of all samples before one, from sums that include their own."""
    return tl.where(sample == 0, 0.0, tl.gather(sums, tl.maximum(sample - 1, 0), 0))


@triton.jit
def store_rows(
    ptr,  # row of a token
    delta,  # (ROWS, COLS)
    stride,
    exists,
    R: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ADD: tl.constexpr,
):
    """Stores element k + R l of delta from (k, l), added to what is there where ADD, rounded once."""
    r, c = tl.arange(0, ROWS).to(tl.int64), tl.arange(0, COLS).to(tl.int64)
    mask = (r[:, None] < tl.where(exists, R, 0)) & (c[None, :] < C)
    pointers = ptr + (r[:, None] + R * c[None, :]) * stride
    if ADD:
        delta += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(pointers, to_bfloat16(delta), mask=mask)
    else:
        tl.store(pointers, delta.to(ptr.dtype.element_ty), mask=mask)


# Floor: with 16-bit x and y tokens · (2 in + 4 out) bytes, and tokens · 4 · (in (R + C) + out (R + C)) operations of
# tensor cores, each with its own R and C: 23 and 22 µs for 4096 tokens of a layer 4096 → 4096 on an H200, whose base
# product takes 174 µs. SPLIT makes the operations 2.75 times as many. What keeps from it: every pair reads 176 KiB of
# matrices, twiddles, offsets and samples, from L1 where its 96 KiB of different ones stay there; products wait for each
# other; gathers of scattered elements take their turns at the banks of shared memory.
@triton.jit(do_not_specialize=["tokens"])
def dft_fwd_kernel(
    x_ptr,  # (tokens, IN_R · IN_C)
    y_ptr,  # (tokens, OUT_R · OUT_C), contiguous
    spectrum_ptr,  # (n,)
    offsets_ptr,  # (out + 1,), contiguous, first sample of each target bin
    sources_ptr,  # (2n,), contiguous, bin that a sample reads
    entries_ptr,  # (2n,), contiguous, which coefficient it takes
    in_matrices_ptr,
    in_twiddles_ptr,
    out_matrices_ptr,
    out_twiddles_ptr,
    half_scale,
    tokens,
    n,
    stride_xt,
    stride_xd,
    stride_spectrum,
    IN_R: tl.constexpr,
    IN_C: tl.constexpr,
    IN_ROWS: tl.constexpr,
    IN_COLS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    OUT_R: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a power of two, n or more
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,  # y holds the base product
):
    pair = tl.program_id(0).to(tl.int64)
    re, im, up1, up2 = pair_spectrum(
        x_ptr, stride_xt, stride_xd, pair, tokens,
        in_matrices_ptr, in_twiddles_ptr, IN_R, IN_C, IN_ROWS, IN_COLS, IN_BLOCK, SPLIT,
    )  # fmt: skip

    e = tl.arange(0, BLOCK_N).to(tl.int64)
    coefficients = tl.load(spectrum_ptr + e * stride_spectrum, mask=e < n, other=0.0)
    s = tl.arange(0, 2 * BLOCK_N).to(tl.int64)
    v = tl.load(sources_ptr + s, mask=s < 2 * n, other=0)
    c = tl.gather(coefficients, tl.load(entries_ptr + s, mask=s < 2 * n, other=0), 0)
    c = tl.where(s < 2 * n, c, 0.0)
    place = place_of(mirrored(v, IN_R * IN_C), IN_R, IN_COLS)
    re, im = c * tl.gather(re, place, 0), c * tl.gather(im, place, 0)
    # With each part of a sample below 4, no sum of bins, and so no result of the first product, passes 2n · 4 √2: that
    # is within float16 for any 1024 coefficients.
    down, up = scales_of(tl.maximum(largest_bits(re), largest_bits(im)))
    # Running sums over the samples in the order of their bins, and for each bin the sum at its end less that at its
    # beginning: what a sum of thousands loses in float32 is far below the 11 bits of the next product.
    sums_re, sums_im = tl.cumsum(re * down, 0), tl.cumsum(im * -down, 0)

    # The inverse transform is the conjugate of the transform of the conjugate.
    re = tl.zeros((OUT_ROWS, OUT_COLS), tl.float32)
    im = tl.zeros((OUT_ROWS, OUT_COLS), tl.float32)
    for start in tl.range(0, OUT_COLS, OUT_BLOCK, num_stages=1):
        q = tl.arange(0, OUT_ROWS * OUT_BLOCK)
        row, col = q // OUT_BLOCK, start + q % OUT_BLOCK
        k = (row * OUT_C + col).to(tl.int64)
        mask = (row < OUT_R) & (col < OUT_C)
        begin = tl.load(offsets_ptr + k, mask=mask, other=0)
        end = tl.load(offsets_ptr + 1 + k, mask=mask, other=0)
        bins_re = tl.reshape(sum_before(sums_re, end) - sum_before(sums_re, begin), (OUT_ROWS, OUT_BLOCK))
        bins_im = tl.reshape(sum_before(sums_im, end) - sum_before(sums_im, begin), (OUT_ROWS, OUT_BLOCK))
        re, im = add_transform(
            bins_re, bins_im, start, re, im, out_matrices_ptr, out_twiddles_ptr,
            OUT_ROWS, OUT_COLS, OUT_BLOCK, SPLIT, False,
        )  # fmt: skip
    up *= half_scale
    y_ptr += 2 * pair * (OUT_R * OUT_C)
    store_rows(y_ptr, re * up * up1, 1, 2 * pair < tokens, OUT_R, OUT_C, OUT_ROWS, OUT_COLS, ADD)
    y_ptr += OUT_R * OUT_C
    store_rows(y_ptr, im * -up * up2, 1, 2 * pair + 1 < tokens, OUT_R, OUT_C, OUT_ROWS, OUT_COLS, ADD)


@triton.jit
def gather_parts(re, im, k, D: tl.constexpr, R: tl.constexpr, COLS: tl.constexpr):
    """Twice the bins k of the two tokens of a pair: real and imaginary part of the first, and of the second."""
    here, there = place_of(k, R, COLS), place_of(mirrored(k, D), R, COLS)
    a_re, a_im = tl.gather(re, here, 0), tl.gather(im, here, 0)
    b_re, b_im = tl.gather(re, there, 0), tl.gather(im, there, 0)
    return a_re + b_re, a_im - b_im, a_im + b_im, b_re - a_re


# Floor: tokens · 2 (in + out) bytes, 4 for each sample and group, and tokens · 10 · (in (R + C) + out (R + C))
# operations of tensor cores, always in two parts, because the gradient of the coefficients is float32.
@triton.jit(do_not_specialize=["tokens", "group_pairs"])
def dft_bwd_kernel(
    grad_ptr,  # (tokens, OUT_R · OUT_C)
    x_ptr,  # (tokens, IN_R · IN_C)
    rows_ptr,  # (n,), contiguous
    cols_ptr,  # (n,), contiguous
    partials_ptr,  # (groups, n), contiguous
    in_matrices_ptr,
    in_twiddles_ptr,
    out_matrices_ptr,
    out_twiddles_ptr,
    scale,
    tokens,
    n,
    stride_gt,
    stride_gd,
    stride_xt,
    stride_xd,
    group_pairs,
    IN_R: tl.constexpr,
    IN_C: tl.constexpr,
    IN_ROWS: tl.constexpr,
    IN_COLS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    OUT_R: tl.constexpr,
    OUT_C: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    OUT_COLS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((BLOCK_N,), tl.float32)
    end = min((group + 1) * group_pairs, tl.cdiv(tokens, 2))
    # Matrices are loaded again for each pair, from L1: kept, those of both transforms would take up shared memory.
    for pair in tl.range(group * group_pairs, end, num_stages=1, disable_licm=True):
        re, im, x_up1, x_up2 = pair_spectrum(
            x_ptr, stride_xt, stride_xd, pair, tokens,
            in_matrices_ptr, in_twiddles_ptr, IN_R, IN_C, IN_ROWS, IN_COLS, IN_BLOCK, True,
        )  # fmt: skip
        v = tl.load(cols_ptr + e, mask=e < n, other=0)
        x1_re, x1_im, x2_re, x2_im = gather_parts(re, im, v, IN_R * IN_C, IN_R, IN_COLS)
        re, im, g_up1, g_up2 = pair_spectrum(
            grad_ptr, stride_gt, stride_gd, pair, tokens,
            out_matrices_ptr, out_twiddles_ptr, OUT_R, OUT_C, OUT_ROWS, OUT_COLS, OUT_BLOCK, True,
        )  # fmt: skip
        u = tl.load(rows_ptr + e, mask=e < n, other=0)
        g1_re, g1_im, g2_re, g2_im = gather_parts(re, im, u, OUT_R * OUT_C, OUT_R, OUT_COLS)
        total += (g1_re * x1_re - g1_im * x1_im) * g_up1 * x_up1
        total += (g2_re * x2_re - g2_im * x2_im) * g_up2 * x_up2
    tl.store(partials_ptr + (group * n + e), total * (0.25 * scale), mask=e < n)


# The least and the most rows and columns of a matrix: below, tiles of tensor cores stand half empty; above, the two
# parts of a spectrum and of a product do not fit in the registers of a program.
LEAST, MOST = 16, 64
# Samples lie in registers as well, two arrays of 2n padded to a power of two. Most adapters have n = 1000.
MOST_ENTRIES = 1024
# A warp for 16 of 64 rows: with more of them tensor cores of Hopper would do all work twice.
WARPS = 4
# By registers; in the backward their number is that of the partial sums.
PROGRAMS_PER_PROCESSOR = 2
# Products that a transform costs with operands in two parts: three, and two where one operand is x itself.
SPLIT_FORWARD, SPLIT_BACKWARD = 2.75, 2.5
# H200: 790 TFLOP/s in 16 bits, of which a third is expected here (a product of 64 × 64 is waited for before the next
# stage begins, and gathers and sums come between), over 4.3 TB/s. A100 and B200 have 52 and 94. Not measured.
OPERATIONS_PER_BYTE = 61


def padded(size: int) -> int:
    return 1 << (size - 1).bit_length()


def operations(rows: int, cols: int) -> int:
    """Multiplications and additions of one transform of a pair of tokens, by tiles: four real products a stage."""
    return 8 * padded(rows) * padded(cols) * (padded(rows) + padded(cols))


@functools.lru_cache(maxsize=256)
def factors_of(length: int) -> tuple[int, int] | None:
    """R and C with R · C = length, or None where neither lies within bounds: the least work, the most rows."""
    pairs = [(r, length // r) for r in range(LEAST, MOST + 1) if length % r == 0 and LEAST <= length // r <= MOST]
    return min(pairs, key=lambda pair: (operations(*pair), -padded(pair[0])), default=None)


def dft_pays(in_features: int, out_features: int, n: int, dtype: torch.dtype, backward: bool) -> bool:
    """Whether transforms on tensor cores cost less than those of the library: of x and the delta's, or for the gradient
    of the coefficients those of x and grad.

    Both forms grow with the tokens alike, and this one is one launch for half a dozen; what is compared is the time of
    its products, over which its own bytes are loaded, with the time of the bytes that only the library's form moves
    (counted at the top of kernels/fourierft.py). float32 has no exact products on tensor cores.

    The gradient of the coefficients at 4096 → 4096 is the closest call: 10.5e6 operations a token, for which the
    library moves 131 kB, are 80 a byte, above what is expected and below the 184 of an H200's peaks. In two parts a
    transform of 64 × 64 does not fit in registers either: compiled for Hopper, it spills with four warps and with
    eight. Together with dx, which could share the transform of grad, it would be 12.6e6 operations for 4.2e6 and the
    131 kB, 48 against 47 ns a token at a third of the peak: no gain.
    """
    factors = factors_of(in_features), factors_of(out_features)
    if dtype == torch.float32 or not 0 < n <= MOST_ENTRIES or None in factors:
        return False
    if backward:
        products, moved = SPLIT_BACKWARD, 16 * (in_features + out_features)
    else:
        products, moved = (SPLIT_FORWARD if dtype == torch.float16 else 1.0), 16 * in_features + 24 * out_features
    work = sum(operations(*pair) for pair in factors if pair is not None) / 2  # for one token
    return products * work <= OPERATIONS_PER_BYTE * moved


def columns_at_once(cols: int, split: bool, shared_memory: int) -> int:
    """How many columns of a matrix go through both stages together, of `cols`.

    All of them where registers allow: fewer stages to wait for. Operands in two parts take too many, and so does every
    operand on the chips whose tensor cores do not read shared memory, which are those with less than 200 KiB of it.
    """
    return 16 if split or shared_memory < 200 * 1024 else cols


def most_registers(where: torch.device) -> int | None:
    """All that a thread can have where operands take registers: there the compiler would spill a few of them to make
    room for a third program.
    """
    return 255 if device.shared_memory_of(where) < 200 * 1024 else None


def warps_of(out: dict[str, int], split: bool, where: torch.device) -> int:
    """Twice as many where both parts of operands and of 64 × 64 bins share the registers of a thread: four warps do not
    have them for the pointers of a store as well.
    """
    whole = out["OUT_ROWS"] * out["OUT_COLS"] == MOST**2
    return 2 * WARPS if split and whole and device.shared_memory_of(where) < 200 * 1024 else WARPS


def dft_matrix(size: int) -> torch.Tensor:
    """(4, padded size, padded size) float16: real and imaginary part, and what their rounding leaves."""
    k = torch.arange(size, device="cpu")
    angle = (-2 * math.pi / size) * (k[:, None] * k % size).double()
    exact = torch.zeros(2, padded(size), padded(size), dtype=torch.float64, device="cpu")
    exact[:, :size, :size] = torch.stack([angle.cos(), angle.sin()])
    high = exact.half()
    return torch.cat([high, (exact - high.double()).half()])


# The first call for a length copies from the host: before a CUDA graph is captured, like the kernels' compilation.
@functools.lru_cache(maxsize=64)
def dft_tables(length: int, where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices of both factors, one after the other, float16, and the twiddles, float32; padded with zeros."""
    factors = factors_of(length)
    assert factors is not None
    rows, cols = factors
    matrices = torch.cat([dft_matrix(size).flatten() for size in factors])
    k, c = torch.arange(rows, device="cpu"), torch.arange(cols, device="cpu")
    angle = (-2 * math.pi / length) * (k[:, None] * c).double()
    twiddles = torch.zeros(2, padded(rows), padded(cols), device="cpu")
    twiddles[:, :rows, :cols] = torch.stack([angle.cos(), angle.sin()])
    return matrices.to(where), twiddles.to(where)


def sizes_of(name: str, length: int, split: bool, where: torch.device) -> dict[str, int]:
    factors = factors_of(length)
    assert factors is not None
    rows, cols = map(padded, factors)
    block = min(cols, columns_at_once(cols, split, device.shared_memory_of(where)))
    sizes = {"R": factors[0], "C": factors[1], "ROWS": rows, "COLS": cols, "BLOCK": block}
    return {f"{name}_{key}": size for key, size in sizes.items()}


def dft_fwd(
    x: torch.Tensor,  # (T, in), any strides
    y: torch.Tensor | None,  # (T, out), contiguous
    spectrum: torch.Tensor,  # (n,), any stride
    offsets: torch.Tensor,  # (out + 1,)
    sources: torch.Tensor,  # (2n,)
    entries: torch.Tensor,  # (2n,)
    scale: float,
) -> torch.Tensor:  # (T, out)
    """y + delta, in place, or the delta alone."""
    (tokens, in_features), n, out_features = x.shape, spectrum.shape[0], offsets.shape[0] - 1
    split = x.dtype == torch.float16
    sizes_out = sizes_of("OUT", out_features, split, x.device)
    target = x.new_empty(tokens, out_features) if y is None else y
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever x is
        dft_fwd_kernel[(count_tiles(tokens, 2),)](
            x,
            target,
            spectrum,
            offsets,
            sources,
            entries,
            *dft_tables(in_features, x.device),
            *dft_tables(out_features, x.device),
            0.5 * scale,
            tokens,
            n,
            *x.stride(),
            spectrum.stride(0),
            **sizes_of("IN", in_features, split, x.device),
            **sizes_out,
            BLOCK_N=max(16, padded(n)),
            SPLIT=split,
            ADD=y is not None,
            num_warps=warps_of(sizes_out, split, x.device),
            maxnreg=most_registers(x.device),
        )
    return target


def dft_bwd(
    grad: torch.Tensor,  # (T, out), any strides
    x: torch.Tensor,  # (T, in), any strides
    rows: torch.Tensor,  # (n,)
    cols: torch.Tensor,  # (n,)
    scale: float,
) -> torch.Tensor:  # (n,)
    """The gradient of the coefficients."""
    (tokens, in_features), n, out_features = x.shape, rows.shape[0], grad.shape[1]
    pairs = count_tiles(tokens, 2)
    group_pairs = count_tiles(pairs, PROGRAMS_PER_PROCESSOR * device.processors_of(x.device))
    groups = count_tiles(pairs, group_pairs)
    partials = torch.empty((groups, n), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        dft_bwd_kernel[(groups,)](
            grad,
            x,
            rows,
            cols,
            partials,
            *dft_tables(in_features, x.device),
            *dft_tables(out_features, x.device),
            float(scale),
            tokens,
            n,
            *grad.stride(),
            *x.stride(),
            group_pairs,
            **sizes_of("IN", in_features, True, x.device),
            **sizes_of("OUT", out_features, True, x.device),
            BLOCK_N=max(16, padded(n)),
            num_warps=WARPS,
            maxnreg=most_registers(x.device),
        )
    return partials.sum(0)
