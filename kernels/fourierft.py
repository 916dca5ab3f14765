"""FourierFT (Gao et al. 2024, arXiv 2405.03003) on a frozen linear layer: the work between the library's FFTs.

    X = rfft(x)                                          (T, in // 2 + 1)   complex64
    S[k] = scale / 2 · conj Σ c[e] · X[v]                (T, out // 2 + 1)  over the samples (v, e) of target bin k
    y = x Wᵀ + b + irfft(S), without its factor 1 / out  (T, out)           in x's dtype, added in float32

    x (T, in), weight W (out, in) or None, bias b (out,) or None, spectrum c (n,) float32, scale = α / (d1 d2)

The samples are those of the table that the compiled loops walk on whole spectra (`Mix` of fastpeft/ops/fourierft.py):
each place (u, v) stands in bins u and -u with half its coefficient. Signals are real, so that only the bins up to the
middle are read and written, and bin v beyond it is the conjugate of bin in - v. In a bin that is its own mirror image a
place stands twice, with conjugate values, and its imaginary part cancels.

Backward, with G = rfft(grad): dc[k] = scale · Re Σ_t G[u_k] X[v_k], and dx = grad W + the forward's walk from bins of
grad to bins of x.

Where the bytes go, for every token: with 16-bit x and y, the conversion and the transform of x move 14 · in bytes,
the kernel here 4 · (in + out), and the transform back and the sum 24 · out, of which 8 are PyTorch's copy of the
spectrum before each inverse transform. Where both sizes are products of two small ones, kernels/dft.py does all of it
in one pass over x and y, 2 · in + 4 · out bytes.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastpeft.kernels import device, tuning
from fastpeft.kernels.device import check_dtypes, count_tiles
from fastpeft.kernels.dft import dft_bwd, dft_fwd, dft_pays


# Kernels see complex64 as 64-bit words: one load for both parts of a bin, where addresses are scattered and the number
# of loads counts.
@triton.jit
def parts_of(word):
    """The real and the imaginary part."""
    re = word.to(tl.int32).to(tl.float32, bitcast=True)
    im = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return re, im


@triton.jit
def word_of(re, im):
    low = re.to(tl.uint32, bitcast=True).to(tl.uint64)
    high = im.to(tl.uint32, bitcast=True).to(tl.uint64) << 32
    return (low | high).to(tl.int64, bitcast=True)


# Floor: 8 bytes for each bin of source (n samples leave few of its 32-byte sectors untouched) and of target, that is
# tokens · 4 · (source_length + target_length) bytes; 4 operations for each sample and token, which never count. What
# comes nearest to it is the gather: 32 bytes from L2 for the 8 that a sample uses, tokens · n · 32 in all. That is as
# much again as the floor at n = 1000 and lengths of 4096, and takes over for n in the tens of thousands.
#
# tokens changes from call to call, and no address is cheaper for knowing that it is 1 or a multiple of 16: without
# this, three kernels would be compiled for each layer shape.
@triton.jit(do_not_specialize=["tokens"])
def mix_fwd_kernel(
    source_ptr,  # (tokens, source_length // 2 + 1), contiguous
    spectrum_ptr,  # (n,)
    offsets_ptr,  # (target_length + 1,), contiguous, first sample of each target bin
    sources_ptr,  # (2n,), contiguous, bin that a sample reads, of the whole spectrum
    entries_ptr,  # (2n,), contiguous, which coefficient it takes
    target_ptr,  # (tokens, target_length // 2 + 1), contiguous
    half_scale,
    tokens,
    source_length,
    target_length,
    stride_spectrum,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # All the programs of one tile of tokens read the same rows of source: they run together, and L2 reads them once.
    source_bins = source_length // 2 + 1
    target_bins = target_length // 2 + 1
    tiles_k = tl.cdiv(target_bins, BLOCK_K)
    program = tl.program_id(0)

    # In int64: tokens · bins passes 2³¹ at a million tokens of a 4096-wide layer.
    t = (program // tiles_k).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = (program % tiles_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    in_t, in_k = t < tokens, k < target_bins
    rows = t[:, None, None] * source_bins

    first = tl.load(offsets_ptr + k, mask=in_k, other=0).to(tl.int64)
    count = tl.load(offsets_ptr + (k + 1), mask=in_k, other=0) - first
    re = tl.zeros((BLOCK_T, BLOCK_K, BLOCK_S), tl.float32)
    im = tl.zeros((BLOCK_T, BLOCK_K, BLOCK_S), tl.float32)
    for start in range(0, tl.max(count), BLOCK_S):
        # One look at the table serves all tokens of the tile; bins that have no more samples load nothing.
        in_s = start + s[None, :] < count[:, None]
        sample = first[:, None] + start + s[None, :]
        v = tl.load(sources_ptr + sample, mask=in_s, other=0).to(tl.int64)
        entry = tl.load(entries_ptr + sample, mask=in_s, other=0).to(tl.int64)
        c = tl.load(spectrum_ptr + entry * stride_spectrum, mask=in_s, other=0.0)
        crossed = v >= source_bins
        v = tl.where(crossed, source_length - v, v)
        word = tl.load(source_ptr + (rows + v[None, :, :]), mask=in_t[:, None, None] & in_s[None, :, :], other=0)
        x_re, x_im = parts_of(word)
        re += c[None, :, :] * x_re
        im += tl.where(crossed, c, -c)[None, :, :] * x_im  # the opposite sign: the sum is conjugated

    word = word_of(tl.sum(re, 2) * half_scale, tl.sum(im, 2) * half_scale)
    tl.store(target_ptr + (t[:, None] * target_bins + k[None, :]), word, mask=in_t[:, None] & in_k[None, :])


# Floor: 8 bytes for each bin of grad and of x, tokens · 4 · (out + in) bytes, and 4 for each sample and group of
# tokens; 5 operations for each sample and token. The gather is twice the forward's, tokens · n · 64 bytes from L2.
@triton.jit(do_not_specialize=["tokens", "group_tokens"])
def mix_bwd_kernel(
    grad_ptr,  # (tokens, out_features // 2 + 1), contiguous
    x_ptr,  # (tokens, in_features // 2 + 1), contiguous
    rows_ptr,  # (n,), contiguous
    cols_ptr,  # (n,), contiguous
    partials_ptr,  # (groups, n), contiguous
    scale,
    tokens,
    n,
    out_features,
    in_features,
    group_tokens,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # As in the forward, what reads the same tokens runs together.
    tiles_n = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    group = (program // tiles_n).to(tl.int64)
    k = (program % tiles_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_k = k < n
    grad_bins = out_features // 2 + 1
    x_bins = in_features // 2 + 1

    u = tl.load(rows_ptr + k, mask=in_k, other=0).to(tl.int64)
    v = tl.load(cols_ptr + k, mask=in_k, other=0).to(tl.int64)
    u_crossed, v_crossed = u >= grad_bins, v >= x_bins
    u = tl.where(u_crossed, out_features - u, u)
    v = tl.where(v_crossed, in_features - v, v)
    sign = tl.where(u_crossed == v_crossed, -1.0, 1.0)  # of the product of the two imaginary parts

    # A sum for each row of the tile, and those summed as a tree: shorter sums, smaller errors.
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    end = min((group + 1) * group_tokens, tokens)
    for start in range(group * group_tokens, end, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        mask = (t < end)[:, None] & in_k[None, :]
        g_re, g_im = parts_of(tl.load(grad_ptr + (t[:, None] * grad_bins + u[None, :]), mask=mask, other=0))
        x_re, x_im = parts_of(tl.load(x_ptr + (t[:, None] * x_bins + v[None, :]), mask=mask, other=0))
        total += g_re * x_re + sign[None, :] * (g_im * x_im)
    tl.store(partials_ptr + (group * n + k), tl.sum(total, 0) * scale, mask=in_k)


# Programs of four warps for each processor: loads from scattered addresses are waited for, and only other programs
# can use that time.
PROGRAMS_PER_PROCESSOR = 4
# With a tile of 16 tokens mix_fwd_kernel takes 126 registers, and half as many programs fit on a processor.
MOST_TOKENS = 8


def mix_fwd_config(tokens: int, n: int, target_length: int, processors: int) -> dict[str, int]:
    """The tile of `mix_fwd_kernel`: 128 samples at a time, one for each thread, of as many tokens as leave programs.

    A bin has 2n / target_length samples on average. BLOCK_S of them are read at once, so that a bin with many does not
    wait for them one after the other; at most 32, since 4 bins are a 32-byte sector of target.
    """
    samples = max(1, 2 * n // target_length)
    block_s = min(32, 1 << (samples.bit_length() - 1))
    block_k = 128 // block_s
    tiles_k = count_tiles(target_length // 2 + 1, block_k)
    block_t = min(MOST_TOKENS, 1 << (tokens - 1).bit_length())
    while block_t > 1 and count_tiles(tokens, block_t) * tiles_k < PROGRAMS_PER_PROCESSOR * processors:
        block_t //= 2
    return {"BLOCK_T": block_t, "BLOCK_K": block_k, "BLOCK_S": block_s, "num_warps": 4}


def mix_bwd_config(tokens: int, n: int, processors: int) -> dict[str, int]:
    """The tile of `mix_bwd_kernel` and `group_tokens`, how many tokens a program sums over.

    As many groups as give each processor its programs, so that the partial sums take a few hundred KiB and 4n bytes
    at most, however many tokens there are.
    """
    block_n = 128
    block_t = min(MOST_TOKENS, 1 << (tokens - 1).bit_length())
    groups = count_tiles(PROGRAMS_PER_PROCESSOR * processors, count_tiles(n, block_n))
    group_tokens = count_tiles(count_tiles(tokens, groups), block_t) * block_t
    return {"group_tokens": group_tokens, "BLOCK_T": block_t, "BLOCK_N": block_n, "num_warps": 4}


def check_arguments(spectrum: torch.Tensor, **others: torch.Tensor | None) -> None:
    check_dtypes(**others)
    if spectrum.dtype != torch.float32:
        raise TypeError(f"spectrum must be float32, got {spectrum.dtype}")


def half_spectrum(x: torch.Tensor) -> torch.Tensor:
    """(T, d) -> (T, d // 2 + 1), contiguous."""
    return torch.fft.rfft(x.float()).contiguous()


def mix_fwd(
    source: torch.Tensor,  # (T, source_length // 2 + 1), complex64, contiguous
    spectrum: torch.Tensor,  # (n,)
    offsets: torch.Tensor,  # (target_length + 1,)
    sources: torch.Tensor,  # (2n,)
    entries: torch.Tensor,  # (2n,)
    source_length: int,
    scale: float,
) -> torch.Tensor:  # (T, target_length // 2 + 1), complex64
    """The half spectrum whose inverse transform, without its factor 1 / target_length, is the delta."""
    tokens, n, target_length = source.shape[0], spectrum.shape[0], offsets.shape[0] - 1
    target_bins = target_length // 2 + 1
    target = torch.empty((tokens, target_bins), dtype=torch.complex64, device=source.device)
    config = mix_fwd_config(tokens, n, target_length, device.processors_of(source.device))
    case = target_length, source_length, n
    config = tuning.settle("mix_fwd", case, tokens, source.device, config, ("BLOCK_T", "num_warps"))
    tiles_t = count_tiles(tokens, config["BLOCK_T"])
    tiles_k = count_tiles(target_bins, config["BLOCK_K"])
    with torch.cuda.device_of(source):  # Triton launches on the current device, wherever source is
        mix_fwd_kernel[(tiles_t * tiles_k,)](
            source.view(torch.int64),
            spectrum,
            offsets,
            sources,
            entries,
            target.view(torch.int64),
            0.5 * scale,
            tokens,
            source_length,
            target_length,
            spectrum.stride(0),
            **config,
        )
    return target


def mix_bwd(
    grad: torch.Tensor,  # (T, out // 2 + 1), complex64, contiguous
    x: torch.Tensor,  # (T, in // 2 + 1), complex64, contiguous
    rows: torch.Tensor,  # (n,)
    cols: torch.Tensor,  # (n,)
    shape: tuple[int, int],
    scale: float,
) -> torch.Tensor:  # (n,)
    """The gradient of the coefficients from the half spectra of both sides."""
    tokens, n = grad.shape[0], rows.shape[0]
    config = mix_bwd_config(tokens, n, device.processors_of(grad.device))
    groups = count_tiles(tokens, config["group_tokens"])
    partials = torch.empty((groups, n), dtype=torch.float32, device=grad.device)
    with torch.cuda.device_of(grad):
        mix_bwd_kernel[(groups * count_tiles(n, config["BLOCK_N"]),)](
            grad.view(torch.int64),
            x.view(torch.int64),
            rows,
            cols,
            partials,
            float(scale),
            tokens,
            n,
            *shape,
            **config,
        )
    return partials.sum(0)


def add_delta(y: torch.Tensor | None, target: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """y + the inverse transform of target, in place; the sum is float32's, in one pass with its rounding."""
    delta = torch.fft.irfft(target, n=length, norm="forward")
    return delta.to(dtype) if y is None else y.add_(delta)


def fourier_fwd(
    x: torch.Tensor,  # (T, in)
    weight: torch.Tensor | None,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
    spectrum: torch.Tensor,  # (n,)
    offsets: torch.Tensor,  # (out + 1,)
    sources: torch.Tensor,  # (2n,)
    entries: torch.Tensor,  # (2n,)
    scale: float,
) -> torch.Tensor:  # (T, out)
    """y = x Wᵀ + b + delta in x's dtype; any strides of x, weight, bias and spectrum."""
    check_arguments(spectrum, x=x, weight=weight, bias=bias)
    (tokens, in_features), out_features = x.shape, offsets.shape[0] - 1
    y = None if weight is None else F.linear(x, weight, bias)
    if tokens == 0 or spectrum.shape[0] == 0:
        return x.new_zeros(tokens, out_features) if y is None else y
    if dft_pays(in_features, out_features, spectrum.shape[0], x.dtype, backward=False):
        return dft_fwd(x, y, spectrum, offsets, sources, entries, scale)
    target = mix_fwd(half_spectrum(x), spectrum, offsets, sources, entries, in_features, scale)
    return add_delta(y, target, out_features, x.dtype)


def fourier_bwd(
    grad: torch.Tensor,  # (T, out)
    x: torch.Tensor | None,  # (T, in), where the gradient of spectrum is wanted
    weight: torch.Tensor | None,  # (out, in)
    spectrum: torch.Tensor,  # (n,)
    rows: torch.Tensor,  # (n,)
    cols: torch.Tensor,  # (n,)
    offsets: torch.Tensor,  # (in + 1,)
    sources: torch.Tensor,  # (2n,)
    entries: torch.Tensor,  # (2n,)
    scale: float,
    need_x: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (T, in) in grad's dtype and dspectrum (n,); one that is not wanted has no rows. Any strides."""
    check_arguments(spectrum, grad=grad, x=x, weight=weight)
    (tokens, out_features), in_features = grad.shape, offsets.shape[0] - 1
    dx = None if weight is None or not need_x else grad @ weight
    if tokens == 0 or spectrum.shape[0] == 0:
        if dx is None:
            dx = grad.new_zeros(tokens if need_x else 0, in_features)
        return dx, spectrum.new_zeros(0 if x is None else spectrum.shape[0])
    n, dtype, need_spectrum = spectrum.shape[0], grad.dtype, x is not None
    x_by_dft = dft_pays(out_features, in_features, n, dtype, backward=False)
    spectrum_by_dft = dft_pays(in_features, out_features, n, dtype, backward=True)
    grad_spectrum = None
    if (need_x and not x_by_dft) or (need_spectrum and not spectrum_by_dft):
        grad_spectrum = half_spectrum(grad)
    if not need_x:
        dx = grad.new_empty(0, in_features)
    elif x_by_dft:
        dx = dft_fwd(grad, dx, spectrum, offsets, sources, entries, scale)
    else:
        target = mix_fwd(grad_spectrum, spectrum, offsets, sources, entries, out_features, scale)
        dx = add_delta(dx, target, in_features, dtype)
    if not need_spectrum:
        return dx, spectrum.new_empty(0)
    if spectrum_by_dft:
        return dx, dft_bwd(grad, x, rows, cols, scale)
    return dx, mix_bwd(grad_spectrum, half_spectrum(x), rows, cols, (out_features, in_features), scale)
