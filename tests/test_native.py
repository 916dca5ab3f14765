"""The compiled operators of the CPU lane called by name: PyTorch's own checks, threads, bad arguments, every ISA."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import in_turn

import fastpeft
from fastpeft import reference
from fastpeft.ops import fourierft
from fastpeft.ops.boft import boft_blocks

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
    """x, weight, bias, spectrum, grad and tables."""
    g = torch.Generator().manual_seed(0)
    places = torch.randperm(d_in * d_out, generator=g)[:n]
    tables = fourierft.make_tables(places // d_in, places % d_in, (d_out, d_in))
    x, weight, bias, grad = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((tokens, d_in), (d_out, d_in), (d_out,), (tokens, d_out))
    )
    return x, weight, bias, torch.randn(n, generator=g), grad, tables


def fourier_fwd(x, weight, bias, spectrum, tables, scale=0.5):
    return torch.ops.fastpeft.fourier_fwd(x, weight, bias, spectrum, *tables.forward, scale)


def fourier_bwd(grad, x, weight, spectrum, tables, scale=0.5, need_x=True):
    places = (tables.rows, tables.cols, *tables.backward)
    return torch.ops.fastpeft.fourier_bwd(grad, x, weight, spectrum, *places, scale, need_x)


@pytest.mark.parametrize("size", FOURIERS, ids=str)
def test_fourier_does_not_depend_on_the_number_of_threads(size: tuple[int, int, int, int]):
    x, _, _, spectrum, grad, tables = fourier_inputs(*size[:3], tokens=200)
    assert_same_bits(
        with_threads(
            lambda: (fourier_fwd(x, None, None, spectrum, tables), *fourier_bwd(grad, x, None, spectrum, tables))
        )
    )


@pytest.mark.parametrize("size", FOURIERS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fourier_opcheck(size: tuple[int, int, int, int], dtype: torch.dtype):
    x, weight, bias, spectrum, grad, tables = fourier_inputs(*size, dtype)
    for base in ((weight, bias), (weight, None), (None, None)):
        torch.library.opcheck(torch.ops.fastpeft.fourier_fwd, (x, *base, spectrum, *tables.forward, 0.5))
    places = (spectrum, tables.rows, tables.cols, *tables.backward, 0.5)
    for source, matrix, need_x in ((x, weight, True), (x, None, False), (None, None, True), (None, None, False)):
        torch.library.opcheck(torch.ops.fastpeft.fourier_bwd, (grad, source, matrix, *places, need_x))


@pytest.mark.parametrize("length", [*range(1, 41), 127, 128, 131, 254, 262, 1000, 1021, 2187, 4098, 11008, 18944])
def test_fourier_of_every_kind_of_length(length: int):
    """One coefficient at bin (u, v) turns a wave of frequency v into one of frequency u: every factor takes part."""
    g = torch.Generator().manual_seed(length)
    u, v = (int(torch.randint(length, (), generator=g)) for _ in range(2))
    tables = fourierft.make_tables(torch.tensor([u]), torch.tensor([v]), (length, length))
    x = torch.randn(3, length, generator=g)
    y = fourier_fwd(x, None, None, torch.ones(1), tables, scale=1.0)
    turns = torch.arange(length, dtype=torch.float64) / length
    bins = (x.double() * torch.exp(2j * torch.pi * (turns * v % 1))).sum(1, keepdim=True)
    exact = (bins * torch.exp(2j * torch.pi * (turns * u % 1))).real
    plain = torch.fft.ifft(torch.zeros(3, length, dtype=torch.complex64).index_copy(
        1, torch.tensor([u]), torch.fft.fft(x)[:, [-v]]), norm="forward").real  # fmt: skip
    allowed = 2 * max(float((plain - exact).square().mean().sqrt()), 1.2e-7 * float(exact.square().mean().sqrt()))
    assert float((y - exact).square().mean().sqrt()) <= allowed


def test_fourier_of_many_rows_goes_through_the_matrix(monkeypatch):
    """Without gradients and in float32 alone, and to the same result."""
    d_in, d_out = 24, 40
    tokens = 32 * d_in * d_out // (d_in + d_out)
    x, weight, bias, spectrum, _, tables = fourier_inputs(d_in, d_out, 100, tokens)
    made = []
    dense = fourierft._dense_weight
    monkeypatch.setattr(fourierft, "_dense_weight", lambda *args: made.append(args) or dense(*args))

    def layer(x, weight, bias, spectrum):
        return fourierft.apply_fourier(x, weight, bias, spectrum, tables, (d_out, d_in), 2.0)

    few = layer(x[:-1], weight, bias, spectrum)
    layer(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), spectrum)
    layer(x, weight, bias, spectrum.clone().requires_grad_())
    layer(x, None, None, spectrum)
    assert not made
    many = layer(x, weight, bias, spectrum)
    assert len(made) == 1
    exact = reference.fourierft.fourier_weight(
        spectrum.double(), tables.rows.long(), tables.cols.long(), (d_out, d_in), 2.0
    )
    exact = x.double() @ (weight.double() + exact).T + bias.double()
    assert (many - exact).norm() <= 2 * torch.cat([few, many[-1:]]).sub(exact).norm()


def test_fourier_reads_slices_where_they_lie():
    """x and grad as slices of wider tensors: what lies between their rows is not read."""
    x, weight, bias, spectrum, grad, tables = fourier_inputs(48, 40, 100, 35)
    wide_x, wide_grad = torch.full((35, 50), torch.nan), torch.full((35, 45), torch.nan)
    wide_x[:, 1:49], wide_grad[:, 2:42] = x, grad
    assert torch.equal(
        fourier_fwd(wide_x[:, 1:49], weight, bias, spectrum, tables), fourier_fwd(x, weight, bias, spectrum, tables)
    )
    assert_same_bits(
        [
            fourier_bwd(wide_grad[:, 2:42], wide_x[:, 1:49], None, spectrum, tables),
            fourier_bwd(grad, x, None, spectrum, tables),
        ]
    )


def fourier_mistakes():
    x, weight, bias, spectrum, _, tables = fourier_inputs(6, 5, 4, 3)
    base, (offsets, sources, entries) = (weight, bias), tables.forward
    yield "x must have shape", (x[0, 0], *base, spectrum, offsets, sources, entries)
    yield "weight must have shape", (x[:, 1:], *base, spectrum, offsets, sources, entries)
    yield "weight must have shape", (x, weight[1:], bias, spectrum, offsets, sources, entries)
    yield "weight must have shape", (x.half(), *base, spectrum, offsets, sources, entries)
    yield "bias must be a vector of 5", (x, weight, bias[1:], spectrum, offsets, sources, entries)
    yield "bias must be a vector of 5", (x, weight, bias.half(), spectrum, offsets, sources, entries)
    yield "spectrum must be a float32 vector", (x, *base, spectrum.double(), offsets, sources, entries)
    yield "spectrum must be a float32 vector", (x, *base, spectrum[None], offsets, sources, entries)
    yield "sources must lie in", (x, *base, spectrum, offsets, sources + 6, entries)
    yield "sources must lie in", (x, *base, spectrum, offsets, sources - 6, entries)
    yield "entries must lie in", (x, *base, spectrum, offsets, sources, entries + 4)
    yield "entries must have 8 entries, got 7", (x, *base, spectrum, offsets, sources, entries[1:])
    yield "weight must have shape", (x, *base, spectrum, offsets[1:], sources, entries)
    yield "offsets must be a vector", (x, *base, spectrum, offsets[:0], sources, entries)
    yield "offsets must rise from 0 to 8", (x, *base, spectrum, offsets.flip(0), sources, entries)
    yield "offsets must rise from 0 to 8", (x, *base, spectrum, torch.zeros_like(offsets), sources, entries)
    yield "sources must be a contiguous int32 vector", (x, *base, spectrum, offsets, sources.long(), entries)


@pytest.mark.parametrize("message, arguments", fourier_mistakes())
def test_fourier_operator_called_directly_checks_its_arguments(message: str, arguments: tuple):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.fourier_fwd(*arguments, 1.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rows": torch.full((4,), 5, dtype=torch.int32)}, "rows must lie in"),
        ({"cols": torch.full((4,), -1, dtype=torch.int32)}, "cols must lie in"),
        ({"grad": torch.zeros(3, 4)}, "weight must have shape"),
        ({"weight": torch.zeros(5, 5)}, "weight must have shape"),
        ({"x": torch.zeros(3, 7)}, "x must have shape"),
        ({"x": torch.zeros(2, 6)}, "tokens and the dtype of grad"),
        ({"x": torch.zeros(3, 6).half()}, "dtype of grad"),
    ],
    ids=str,
)
def test_fourier_gradient_called_directly_checks_its_arguments(change: dict, message: str):
    x, weight, _, spectrum, grad, tables = fourier_inputs(6, 5, 4, 3)
    given = {
        "grad": grad, "x": x, "weight": weight, "spectrum": spectrum, "rows": tables.rows, "cols": tables.cols
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.fourier_bwd(*given.values(), *tables.backward, 1.0, True)


# ---------------------------------------------------------------------- LoRA

# in, out, rank, tokens
LORAS = [
    (48, 64, 4, 7),
    (37, 11, 3, 21),  # nothing is a multiple of a vector
    (256, 96, 16, 70),  # a rank that fills the registers, several tasks
    (130, 1, 1, 5),
    (1, 7, 9, 1),
    (40, 24, 2, 0),  # no tokens
]


def lora_inputs(d_in: int, d_out: int, rank: int, tokens: int, dtype: torch.dtype = torch.float32):
    """x, weight, bias, A, B and grad."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((tokens, d_in), (d_out, d_in), (d_out,), (tokens, d_out))
    )
    return x, weight, bias, torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), grad


@pytest.mark.parametrize("size", LORAS, ids=str)
def test_lora_does_not_depend_on_the_number_of_threads(size: tuple[int, int, int, int]):
    x, _, _, A, B, grad = lora_inputs(*size[:3], tokens=300)

    def run():  # without the base product, whose sums are the library's
        y, h = torch.ops.fastpeft.lora_fwd(x, None, None, A, B, 0.5)
        return y, h, *torch.ops.fastpeft.lora_bwd(grad, x, None, A, B, h, 0.5, True)

    assert_same_bits(with_threads(run))


@pytest.mark.parametrize("size, dtype", in_turn(LORAS, DTYPES))
def test_lora_opcheck(size: tuple[int, int, int, int], dtype: torch.dtype):
    x, weight, bias, A, B, grad = lora_inputs(*size, dtype)
    B_by_columns = B.T.contiguous().T  # as MoS gives it
    for base, matrix in (((weight, bias), B), ((weight, None), B_by_columns), ((None, None), B)):
        torch.library.opcheck(torch.ops.fastpeft.lora_fwd, (x, *base, A, matrix, 0.5))
        torch.library.opcheck(torch.ops.fastpeft.lora_fwd, (x, *base, A, matrix, 0.5, 2 * x))
    h = torch.randn(len(x), len(A))
    for matrix in (B, B_by_columns):
        for given in ((x, weight, h, True), (x, None, None, False), (None, weight, h, True), (None, None, None, False)):
            x_or_none, weight_or_none, h_or_none, need_x = given
            arguments = (grad, x_or_none, weight_or_none, A, matrix, h_or_none, 0.5, need_x)
            torch.library.opcheck(torch.ops.fastpeft.lora_bwd, arguments)


def test_lora_takes_any_strides_of_its_matrices():
    x, weight, bias, A, B, grad = lora_inputs(48, 40, 6, 9)
    expected = torch.ops.fastpeft.lora_fwd(x, weight, bias, A, B, 0.5)
    gradients = torch.ops.fastpeft.lora_bwd(grad, x, weight, A, B, expected[1], 0.5, True)
    wide_A, wide_B = torch.full((12, 96), torch.nan), torch.full((80, 12), torch.nan)
    wide_A[::2, ::2], wide_B[::2, ::2] = A, B
    for matrices in ((wide_A[::2, ::2], wide_B[::2, ::2]), (A.T.contiguous().T, B.T.contiguous().T)):
        found = torch.ops.fastpeft.lora_fwd(x, weight, bias, *matrices, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        found = torch.ops.fastpeft.lora_bwd(grad, x, weight, *matrices, expected[1], 0.5, True)
        assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


WIDE = torch.arange(4 * 6 * 5 * 9.0).reshape(4, 6, 5, 9)
LEADING = {
    "vector": WIDE[0, 0, 0],
    "sequences": WIDE[0],
    "four": WIDE,
    "a slice of the features": WIDE[..., 1:8],  # one stride from token to token
    "every other feature": WIDE[..., ::2],
    "a slice of the sequences": WIDE[:, :, 1:3],  # a copy
    "transposed": WIDE[0].transpose(0, 1),
    "broadcast": WIDE[:1, :1, :1].expand(2, 3, 5, 9),
    "broadcast inside": WIDE[:, :, :1].expand(4, 6, 5, 9),
    "of one": WIDE[:1, :, :1],
    "none": WIDE[:, :0],
}


@pytest.mark.parametrize("which", LEADING)
def test_any_leading_shape_and_strides(which: str):
    x = LEADING[which] / 1000
    A, B, weight = torch.randn(2, x.shape[-1]), torch.randn(3, 2), torch.randn(3, x.shape[-1])
    rows = x.reshape(-1, x.shape[-1]).clone()
    y, h = torch.ops.fastpeft.lora_fwd(x, weight, None, A, B, 0.5)
    expected, expected_h = torch.ops.fastpeft.lora_fwd(rows, weight, None, A, B, 0.5)
    assert y.shape == (*x.shape[:-1], 3) and y.is_contiguous()
    assert torch.equal(y, expected.view(y.shape)) and torch.equal(h, expected_h)
    grad = torch.randn_like(y)
    dx, *rest = torch.ops.fastpeft.lora_bwd(grad, x, weight, A, B, h, 0.5, True)
    dx2, *rest2 = torch.ops.fastpeft.lora_bwd(grad.reshape(-1, 3), rows, weight, A, B, h, 0.5, True)
    assert dx.shape == x.shape
    assert_same_bits([(dx.reshape(-1, x.shape[-1]), *rest), (dx2, *rest2)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(3, 7)}, "x has 7 features, lora_A 6"),
        ({"x": torch.zeros(())}, "x must have shape"),
        ({"bias": torch.zeros(4)}, "bias must be a vector of 5"),
        ({"bias": torch.zeros(5).half()}, "bias must be a vector of 5"),
        ({"x": torch.zeros(3, 6, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(5, 7)}, "weight must have shape"),
        ({"weight": torch.zeros(5, 6).half()}, "weight must have shape"),
        ({"A": torch.zeros(3, 6)}, "lora_A has rank 3, lora_B 2"),
        ({"A": torch.zeros(2, 6).half()}, "must be float32 matrices"),
        ({"B": torch.zeros(5)}, "must be float32 matrices"),
    ],
    ids=str,
)
def test_lora_operator_called_directly_checks_its_arguments(change: dict, message: str):
    x, weight, bias, A, B, _ = lora_inputs(6, 5, 2, 3)
    given = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.lora_fwd(*given.values(), 1.0)


@pytest.mark.parametrize("dropped", [torch.zeros(3, 5), torch.zeros(2, 6), torch.zeros(3, 6).half()], ids=str)
def test_what_dropout_left_must_fit_x(dropped: torch.Tensor):
    x, weight, bias, A, B, _ = lora_inputs(6, 5, 2, 3)
    with pytest.raises(RuntimeError, match="dropped must have the shape and the dtype of x"):
        torch.ops.fastpeft.lora_fwd(x, weight, bias, A, B, 1.0, dropped)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad": torch.zeros(3, 6)}, "grad has 6 features, lora_B 5"),
        ({"x": torch.zeros(2, 6)}, "x must have shape"),
        ({"h": torch.zeros(3, 3)}, "h must be float32 of shape"),
        ({"h": torch.zeros(3, 2).half()}, "h must be float32 of shape"),
    ],
    ids=str,
)
def test_lora_gradient_called_directly_checks_its_arguments(change: dict, message: str):
    x, weight, _, A, B, grad = lora_inputs(6, 5, 2, 3)
    given = {"grad": grad, "x": x, "weight": weight, "A": A, "B": B, "h": torch.zeros(3, 2)} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.lora_bwd(*given.values(), 1.0, True)


# ---------------------------------------------------------------------- MoS

# in, out, rank, shards of a vector, shards of a pool, tokens
MOSES = [
    (48, 64, 4, 2, 9, 7),
    (35, 21, 3, 7, 5, 33),  # shards of 5 and 3 numbers, drawn several times
    (400, 96, 16, 4, 64, 70),  # shards of more than one task
    (6, 5, 2, 1, 2, 0),  # no tokens
]


def mos_inputs(d_in: int, d_out: int, rank: int, l: int, n: int, tokens: int, dtype: torch.dtype = torch.float32):  # noqa: E741
    """x, weight, bias, then the pools with their indices, grad, h."""
    g = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (
        torch.randn(*shape, generator=g).to(dtype)
        for shape in ((tokens, d_in), (d_out, d_in), (d_out,), (tokens, d_out))
    )
    index_A, index_B = (torch.randint(n, (rank, l), generator=g) for _ in range(2))
    pool_A, pool_B = torch.randn(n, d_in // l, generator=g), torch.randn(n, d_out // l, generator=g)
    return x, weight, bias, (pool_A, index_A, pool_B, index_B), grad, torch.randn(tokens, rank, generator=g)


@pytest.mark.parametrize("size", MOSES, ids=str)
def test_mos_does_not_depend_on_the_number_of_threads(size: tuple[int, ...]):
    x, _, _, pools, grad, h = mos_inputs(*size[:5], tokens=300)

    def run():  # without the base product, whose sums are the library's
        gradients = torch.zeros_like(pools[0]), torch.zeros_like(pools[2])
        dx = torch.ops.fastpeft.mos_bwd_(*gradients, grad, x, None, *pools, h, 0.5, True)
        return *torch.ops.fastpeft.mos_fwd(x, None, None, *pools, 0.5), dx, *gradients

    assert_same_bits(with_threads(run))


@pytest.mark.parametrize("size, dtype", in_turn(MOSES, DTYPES))
def test_mos_opcheck(size: tuple[int, ...], dtype: torch.dtype):
    x, weight, bias, pools, grad, h = mos_inputs(*size, dtype)
    dA, dB = torch.ones_like(pools[0]), torch.ones_like(pools[2])
    for base in ((weight, bias), (None, None)):
        torch.library.opcheck(torch.ops.fastpeft.mos_fwd, (x, *base, *pools, 0.5))
        torch.library.opcheck(torch.ops.fastpeft.mos_fwd, (x, *base, *pools, 0.5, 2 * x))
    for gradients, given in (((dA, dB), (x, h)), ((None, dB), (None, h)), ((dA, None), (x, None)), ((None, None),) * 2):
        arguments = (*gradients, grad, given[0], weight, *pools, given[1], 0.5, True)
        torch.library.opcheck(torch.ops.fastpeft.mos_bwd_, arguments)


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, torch.zeros(4, 3), "(x|weight) must have shape"),
        (0, torch.zeros(3, 6), "index_A must lie in"),
        (1, torch.full((2, 2), 4), "index_A must lie in"),
        (1, torch.full((2, 2), -1), "index_A must lie in"),
        (1, torch.zeros(2, 2, dtype=torch.int32), "index_A must be an int64 matrix"),
        (2, torch.zeros(4, 5).half(), "pool_B must be a float32 matrix"),
        (3, torch.zeros(3, 2, dtype=torch.int64), "one shape"),
    ],
    ids=str,
)
def test_mos_operators_check_their_arguments(place: int, value: torch.Tensor, message: str):
    x, weight, bias, pools, grad, h = mos_inputs(12, 10, 2, 2, 4, 3)
    pools[1].fill_(3)
    changed = [*pools]
    changed[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.mos_fwd(x, weight, bias, *changed, 1.0)
    with pytest.raises(RuntimeError, match=f"{message}|grad must have shape"):
        torch.ops.fastpeft.mos_bwd_(None, None, grad, None, weight, *changed, None, 1.0, True)
    with pytest.raises(RuntimeError, match="dpool_A goes with x"):
        torch.ops.fastpeft.mos_bwd_(pools[0], None, grad, None, weight, *pools, h, 1.0, True)
    with pytest.raises(RuntimeError, match="dpool_A must be contiguous and have the shape of its pool"):
        torch.ops.fastpeft.mos_bwd_(pools[0].T.contiguous().T, None, grad, x, weight, *pools, None, 1.0, True)


def test_mos_takes_any_strides_of_its_pools():
    x, weight, bias, pools, _, _ = mos_inputs(12, 10, 2, 2, 4, 3)
    by_columns = [pool.T.contiguous().T for pool in pools]
    expected = torch.ops.fastpeft.mos_fwd(x, weight, bias, *pools, 1.0)
    assert_same_bits([expected, torch.ops.fastpeft.mos_fwd(x, weight, bias, *by_columns, 1.0)])


# ---------------------------------------------------------------------- BOFT's layer


def boft_inputs(d: int, b: int, m: int, dtype: torch.dtype = torch.float32, tokens: int = 37, out: int = 300):
    """x, weight, bias, blocks, scale, grad."""
    g = torch.Generator().manual_seed(1)
    x, blocks, _ = butterfly_inputs(d, b, m, dtype, tokens)
    weight, bias, grad = (torch.randn(*shape, generator=g).to(dtype) for shape in ((out, d), (out,), (tokens, out)))
    return x, weight, bias, blocks, torch.randn(out, 1, generator=g), grad


@pytest.mark.parametrize("size", BUTTERFLIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_boft_opcheck(size: tuple[int, int, int], dtype: torch.dtype):
    x, weight, bias, blocks, scale, grad = boft_inputs(*size, dtype)
    for keep in (True, False):
        torch.library.opcheck(torch.ops.fastpeft.boft_fwd, (x, weight, bias if keep else None, blocks, scale, keep))
    for y0, need_x, need_blocks in ((grad, True, True), (None, True, False), (None, False, True), (grad, False, False)):
        arguments = (grad, x, weight, bias, blocks, scale, y0, need_x, need_blocks)
        torch.library.opcheck(torch.ops.fastpeft.boft_bwd, arguments)


@pytest.mark.parametrize("size", BUTTERFLIES[:3], ids=str)
def test_boft_scale_does_not_depend_on_the_number_of_threads(size: tuple[int, int, int]):
    x, weight, bias, blocks, scale, grad = boft_inputs(*size, tokens=200, out=700)
    assert_same_bits(
        with_threads(lambda: torch.ops.fastpeft.boft_bwd(grad, x, weight, bias, blocks, scale, grad, False, False)[2:])
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(5, 7)}, "weight must have shape"),
        ({"bias": torch.zeros(4)}, "bias must be a contiguous vector of 5"),
        ({"scale": torch.zeros(5)}, r"scale must be float32 of shape \(5, 1\)"),
        ({"scale": torch.zeros(5, 1).double()}, r"scale must be float32 of shape \(5, 1\)"),
    ],
    ids=str,
)
def test_boft_operator_called_directly_checks_its_arguments(change: dict, message: str):
    x, weight, bias, blocks, scale, grad = boft_inputs(8, 4, 1, tokens=3, out=5)
    given = {"x": x, "weight": weight, "bias": bias, "blocks": blocks, "scale": scale} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.boft_fwd(*given.values(), True)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastpeft.boft_bwd(grad, *given.values(), grad, True, True)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (2, 17, 4), (1, 33, 8), (1, 3, 5), (1, 2, 32), (1, 1, 1), (1, 0, 4)], ids=str
)
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_cayley_of_blocks(shape: tuple[int, int, int], scale: float):
    """As exact as a library's solve, however far R is from zero; of that the worst of some draws."""
    m, n, b = shape

    def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        return scale * torch.randn(m, n, b, b, generator=g), torch.randn(m, n, b, b, generator=g)

    def computed(R: torch.Tensor, grad: torch.Tensor, backend: str) -> tuple[torch.Tensor, ...]:
        leaf = R.clone().requires_grad_()
        with fastpeft.use_backend(backend):
            q = boft_blocks(leaf)
        return q.detach(), *torch.autograd.grad(q, leaf, grad)

    def errors(found: tuple[torch.Tensor, ...], R: torch.Tensor, grad: torch.Tensor) -> list[float]:
        exact = computed(R.double(), grad.double(), "reference")
        eps = torch.finfo(torch.float32).eps
        return [max(float((a - e).norm() / e.norm().clamp(min=1e-30)), eps) for a, e in zip(found, exact, strict=True)]

    R, grad = draw(0)
    q = torch.ops.fastpeft.cayley_fwd(R)
    found = (q, torch.ops.fastpeft.cayley_bwd(grad, q))
    plain = [errors(computed(*draw(seed), "torch"), *draw(seed)) for seed in range(5)]
    for error, bound in zip(errors(found, R, grad), zip(*plain, strict=True), strict=True):
        assert error <= 2 * max(bound)
    torch.library.opcheck(torch.ops.fastpeft.cayley_fwd, (R,))
    torch.library.opcheck(torch.ops.fastpeft.cayley_bwd, (grad, q))
    assert_same_bits(with_threads(lambda: (torch.ops.fastpeft.cayley_fwd(R), torch.ops.fastpeft.cayley_bwd(grad, q))))


@pytest.mark.parametrize(
    "bad", [torch.zeros(2, 3, 3), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 3).half()], ids=str
)
def test_cayley_operators_check_their_arguments(bad: torch.Tensor):
    with pytest.raises(RuntimeError, match="boft_R must be float32 of shape"):
        torch.ops.fastpeft.cayley_fwd(bad)
    with pytest.raises(RuntimeError, match=r"must be float32 of shape|must have the shape"):
        torch.ops.fastpeft.cayley_bwd(torch.zeros(1, 2, 3, 3), bad)


# ---------------------------------------------------------------------- every instruction set


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa: str):
    """The chosen set is fixed when the library loads, so each runs in a process of its own."""
    extension = fastpeft.backend.extension
    assert extension is not None, fastpeft.backend.extension_status
    if isa not in extension.supported_isas:
        pytest.skip(f"this processor does not run {isa}")
    script = f"""
import torch, fastpeft, test_ops as t, test_native as n, test_many as m
assert fastpeft.backend.extension.isa == {isa!r}
for case in t.CASES:
    for dtype in n.DTYPES if case.name in ("lora-r3", "boft-b8m2", "fourierft-n200") else n.DTYPES[:1]:
        t.check_against_formula(case, dtype)
for size in n.LORAS[:1]:
    n.test_lora_opcheck(size, torch.bfloat16)
for length in (1, 7, 64, 127, 131, 524, 1000):
    n.test_fourier_of_every_kind_of_length(length)
for name in m.BANKS:
    m.test_every_row_against_float64(name, (torch.float32, torch.float32), "native")
    m.test_bits_of_a_row_do_not_depend_on_its_neighbours(name, torch.bfloat16, "native")
"""
    folder = os.path.dirname(__file__)
    env = {**os.environ, "FASTPEFT_ISA": isa, "PYTHONPATH": folder}
    subprocess.run([sys.executable, "-c", script], check=True, env=env, cwd=folder)
