"""The compiled operators of the CPU lane called by name: PyTorch's own checks, threads, bad arguments, every ISA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fastpeft
from fastpeft.ops import fourierft

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_threads(run) -> list[tuple[torch.Tensor, ...]]:
    """What `run` returns on one thread, two and five."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def assert_same_bits(results: list[tuple[torch.Tensor, ...]]) -> None:
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------- butterfly

BUTTERFLIES = [(24, 2, 3), (48, 8, 2), (35, 5, 1), (640, 4, 5), (512, 8, 2)]  # d, b, m


def butterfly_inputs(d: int, b: int, m: int, dtype: torch.dtype = torch.float32, tokens: int = 37):
    g = torch.Generator().manual_seed(0)
    blocks = torch.linalg.qr(torch.randn(m, d // b, b, b, generator=g)).Q.contiguous()
    x, grad = (torch.randn(tokens, d, generator=g).to(dtype) for _ in range(2))
    return x, blocks, grad


@pytest.mark.parametrize("size", BUTTERFLIES, ids=str)
def test_butterfly_does_not_depend_on_the_number_of_threads(size: tuple[int, int, int]):
    x, blocks, grad = butterfly_inputs(*size, tokens=100)
    butterfly = torch.ops.fastpeft
    assert_same_bits(
        with_threads(
            lambda: (butterfly.butterfly_fwd(x, blocks), *butterfly.butterfly_bwd(grad, x, blocks, True, True))
        )
    )


@pytest.mark.parametrize("size", BUTTERFLIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_butterfly_opcheck(size: tuple[int, int, int], dtype: torch.dtype):
    x, blocks, grad = butterfly_inputs(*size, dtype)
    torch.library.opcheck(torch.ops.fastpeft.butterfly_fwd, (x, blocks))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.fastpeft.butterfly_bwd, (grad, x, blocks, *needs))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3, 4, 5), torch.zeros(1, 1, 5, 5)), "x must have shape"),
        ((torch.zeros(3, 6), torch.zeros(1, 1, 5, 5)), "blocks cover 5 features, x has 6"),
        ((torch.zeros(3, 5), torch.zeros(2, 1, 5, 5)), "2 factors of block size 5 do not fit 5"),
        ((torch.zeros(3, 12), torch.zeros(3, 3, 4, 4)), "3 factors of block size 4 do not fit 12"),
        ((torch.zeros(3, 5), torch.zeros(1, 1, 5, 5, dtype=torch.float64)), "blocks must be float32"),
        ((torch.zeros(3, 5, dtype=torch.int64), torch.zeros(1, 1, 5, 5)), "x must be float32, bfloat16 or float16"),
        ((torch.zeros(3, 5), torch.zeros(1, 5, 5)), "blocks must have shape"),
    ],
)
def test_butterfly_operator_called_directly_checks_its_arguments(arguments, message: str):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.butterfly_fwd(*arguments)
    if arguments[0].dtype.is_floating_point:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastpeft.butterfly_bwd(arguments[0], *arguments, True, True)


# ---------------------------------------------------------------------- Fourier

# in, out, n, tokens
FOURIERS = [
    (16, 24, 40, 7),
    (17, 13, 60, 33),  # primes; a tile of 32 tokens and one more
    (1021, 148, 300, 70),  # a prime that becomes a convolution, and 4 · 37
    (768, 3072, 1000, 65),
    (1, 1, 1, 1),
    (5, 3, 0, 4),  # no coefficients
]


def fourier_inputs(d_in: int, d_out: int, n: int, tokens: int, dtype: torch.dtype = torch.float32):
    """y, x, spectrum, grad, dx and tables."""
    g = torch.Generator().manual_seed(0)
    places = torch.randperm(d_in * d_out, generator=g)[:n]
    tables = fourierft.make_tables(places // d_in, places % d_in, (d_out, d_in))
    y, grad = (torch.randn(tokens, d_out, generator=g).to(dtype) for _ in range(2))
    x, dx = (torch.randn(tokens, d_in, generator=g).to(dtype) for _ in range(2))
    return y, x, torch.randn(n, generator=g), grad, dx, tables


def fourier_fwd(y, x, spectrum, tables, scale=0.5):
    y = y.clone()
    torch.ops.fastpeft.fourier_fwd_(y, x, spectrum, *tables.forward, scale)
    return y


def fourier_bwd(dx, grad, x, spectrum, tables, scale=0.5):
    dx = None if dx is None else dx.clone()
    return dx, torch.ops.fastpeft.fourier_bwd_(dx, grad, x, spectrum, tables.rows, tables.cols, *tables.backward, scale)


@pytest.mark.parametrize("size", FOURIERS, ids=str)
def test_fourier_does_not_depend_on_the_number_of_threads(size: tuple[int, int, int, int]):
    y, x, spectrum, grad, dx, tables = fourier_inputs(*size[:3], tokens=200)
    assert_same_bits(
        with_threads(lambda: (fourier_fwd(y, x, spectrum, tables), *fourier_bwd(dx, grad, x, spectrum, tables)))
    )


@pytest.mark.parametrize("size", FOURIERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fourier_opcheck(size: tuple[int, int, int, int], dtype: torch.dtype):
    y, x, spectrum, grad, dx, tables = fourier_inputs(*size, dtype)
    torch.library.opcheck(torch.ops.fastpeft.fourier_fwd_, (y, x, spectrum, *tables.forward, 0.5))
    places = (spectrum, tables.rows, tables.cols, *tables.backward, 0.5)
    for arguments in ((dx, grad, x), (None, grad, x), (dx, grad, None), (None, grad, None)):
        torch.library.opcheck(torch.ops.fastpeft.fourier_bwd_, (*arguments, *places))


@pytest.mark.parametrize("length", [*range(1, 41), 127, 128, 131, 254, 262, 1000, 1021, 2187, 4098, 11008, 18944])
def test_fourier_of_every_kind_of_length(length: int):
    """One coefficient at bin (u, v) turns a wave of frequency v into one of frequency u: every factor takes part."""
    g = torch.Generator().manual_seed(length)
    u, v = (int(torch.randint(length, (), generator=g)) for _ in range(2))
    tables = fourierft.make_tables(torch.tensor([u]), torch.tensor([v]), (length, length))
    x = torch.randn(3, length, generator=g)
    y = fourier_fwd(torch.zeros(3, length), x, torch.ones(1), tables, scale=1.0)
    turns = torch.arange(length, dtype=torch.float64) / length
    bins = (x.double() * torch.exp(2j * torch.pi * (turns * v % 1))).sum(1, keepdim=True)
    exact = (bins * torch.exp(2j * torch.pi * (turns * u % 1))).real
    plain = torch.fft.ifft(torch.zeros(3, length, dtype=torch.complex64).index_copy(
        1, torch.tensor([u]), torch.fft.fft(x)[:, [-v]]), norm="forward").real  # fmt: skip
    allowed = 2 * max(float((plain - exact).square().mean().sqrt()), 1.2e-7 * float(exact.square().mean().sqrt()))
    assert float((y - exact).square().mean().sqrt()) <= allowed


def test_fourier_leaves_rows_outside_alone():
    """y and x as slices of wider tensors: what lies between their rows is neither read nor written."""
    y, x, spectrum, _, _, tables = fourier_inputs(48, 40, 100, 35)
    wide_y, wide_x = torch.full((35, 45), torch.nan), torch.full((35, 50), torch.nan)
    wide_y[:, 2:42], wide_x[:, 1:49] = y, x
    torch.ops.fastpeft.fourier_fwd_(wide_y[:, 2:42], wide_x[:, 1:49], spectrum, *tables.forward, 0.5)
    assert torch.equal(wide_y[:, 2:42], fourier_fwd(y, x, spectrum, tables))
    assert wide_y[:, :2].isnan().all() and wide_y[:, 42:].isnan().all()


def fourier_mistakes():
    y, x, spectrum, _, _, tables = fourier_inputs(6, 5, 4, 3)
    offsets, sources, entries = tables.forward
    yield "x must have shape", (y, x[0], spectrum, offsets, sources, entries)
    yield "y must have the tokens and the dtype of x", (y[:2], x, spectrum, offsets, sources, entries)
    yield "y must have the tokens and the dtype of x", (y.half(), x, spectrum, offsets, sources, entries)
    yield "y must have rows without gaps", (y.T.contiguous().T, x, spectrum, offsets, sources, entries)
    yield "y must have rows without gaps", (y[:1].expand(3, 5), x, spectrum, offsets, sources, entries)
    yield "spectrum must be a float32 vector", (y, x, spectrum.double(), offsets, sources, entries)
    yield "spectrum must be a float32 vector", (y, x, spectrum[None], offsets, sources, entries)
    yield "sources must lie in", (y, x, spectrum, offsets, sources + 6, entries)
    yield "sources must lie in", (y, x, spectrum, offsets, sources - 6, entries)
    yield "entries must lie in", (y, x, spectrum, offsets, sources, entries + 4)
    yield "entries must have 8 entries, got 7", (y, x, spectrum, offsets, sources, entries[1:])
    yield "offsets must have 6 entries, got 5", (y, x, spectrum, offsets[1:], sources, entries)
    yield "offsets must rise from 0 to 8", (y, x, spectrum, offsets.flip(0), sources, entries)
    yield "offsets must rise from 0 to 8", (y, x, spectrum, torch.zeros_like(offsets), sources, entries)
    yield "sources must be a contiguous int32 vector", (y, x, spectrum, offsets, sources.long(), entries)


@pytest.mark.parametrize("message, arguments", fourier_mistakes())
def test_fourier_operator_called_directly_checks_its_arguments(message: str, arguments: tuple):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.fourier_fwd_(*arguments, 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": torch.full((4,), 5, dtype=torch.int32)}, "rows must lie in"),
        ({"cols": torch.full((4,), -1, dtype=torch.int32)}, "cols must lie in"),
        ({"grad": torch.zeros(3, 4)}, "offsets|sources"),
        ({"x": torch.zeros(3, 7)}, "dx and x must have one shape"),
        ({"dx": torch.zeros(2, 6)}, "dx and x must have one shape"),
        ({"x": torch.zeros(3, 6).half()}, "dtype of grad"),
    ],
    ids=str,
)
def test_fourier_gradient_called_directly_checks_its_arguments(change: dict, message: str):
    _, x, spectrum, grad, dx, tables = fourier_inputs(6, 5, 4, 3)
    given = {"dx": dx, "grad": grad, "x": x, "spectrum": spectrum, "rows": tables.rows, "cols": tables.cols} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.fourier_bwd_(*given.values(), *tables.backward, 1.0)


# ---------------------------------------------------------------------- every instruction set


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str):
    """The chosen set is fixed when the library loads, so each runs in a process of its own."""
    extension = fastpeft.backend.extension
    assert extension is not None, fastpeft.backend.extension_status
    if isa not in extension.supported_isas:
        pytest.skip(f"this processor does not run {isa}")
    script = f"""
import torch, fastpeft, test_ops as t, test_native as n
assert fastpeft.backend.extension.isa == {isa!r}
for case in t.CASES:
    if case.name.startswith(("boft", "fourierft")):
        for dtype in n.DTYPES if case.name in ("boft-b8m2", "fourierft-n200") else n.DTYPES[:1]:
            t.check_against_formula(case, dtype)
for length in (1, 7, 64, 127, 131, 524, 1000):
    n.test_fourier_of_every_kind_of_length(length)
"""
    folder = os.path.dirname(__file__)
    env = {**os.environ, "FASTPEFT_ISA": isa, "PYTHONPATH": folder}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, cwd=folder)
