"""FourierFT by products with DFT matrices, checked where there is no GPU: as tests/test_kernels_fourierft.py, in the
dtypes and sizes that kernels/dft.py takes. The interpreter rounds float16 operands as tensor cores see them.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from fastpeft.kernels import device, dft
from fastpeft.kernels import fourierft as kernel
from gpu_compile import SHARED_MEMORY, check_records, compiled_cases, meta
from helpers import in_turn
from test_kernels_fourierft import LAYOUTS, check, draw, exact, launched
from test_kernels_fourierft import two_processors as two_processors  # fixtures of every test here
from test_kernels_fourierft import unwritten_memory_is_nan as unwritten_memory_is_nan

from fastpeft.ops.fourierft import make_tables

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"bf16": BF16, "fp16": FP16}

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------

# T, in, out, n
SHAPES = [
    (1, 384, 384, 7),  # one token alone in its pair
    (3, 768, 384, 1000),  # 24 · 32 and 24 · 16: padded rows
    (5, 525, 418, 200),  # 21 · 25 and 19 · 22: padded rows and columns, odd strides
    (2, 1024, 1024, 1000),  # 32 · 32
    (2, 4096, 1024, 1000),  # the largest
    (9, 256, 1536, 1),  # one coefficient, several pairs for a program of the backward
]


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whatever pays."""
    monkeypatch.setattr(kernel, "dft_pays", lambda *_, **__: True)


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def shared_memory(request, monkeypatch):
    """How many columns go through the stages together follows from the chip."""
    monkeypatch.setattr(device, "shared_memory_of", lambda _: SHARED_MEMORY[request.param])


@pytest.mark.parametrize("shape, dtype", in_turn(SHAPES, DTYPES.values()))
@pytest.mark.usefixtures("shared_memory")
def test_forward_and_backward(dtype, shape):
    draws = [draw(shape, dtype, seed) for seed in range(3)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_delta_alone(dtype):
    # Rounding of the base product does not hide what the delta loses.
    inputs = x, weight, _, spectrum, rows, cols, scaling, _ = draw((3, 384, 384, 400), dtype, bias=False)
    tables, scale = make_tables(rows, cols, (384, 384)), scaling / weight.numel()
    delta = kernel.fourier_fwd(x, None, None, spectrum, *tables.forward, scale)
    want = exact(x, torch.zeros_like(weight), *inputs[2:])[0]
    rounding = (want.to(dtype).double() - want).norm()
    assert (delta.double() - want).norm() <= 1.1 * rounding


@pytest.mark.parametrize("row", [0, 3, 192], ids=["zero", "odd", "middle"])
def test_many_samples_in_one_bin(row):
    check(draw((3, 384, 384, 380), FP16, places=torch.arange(380) + 384 * row))


@pytest.mark.parametrize("col", [0, 3, 192], ids=["zero", "odd", "middle"])
def test_many_samples_from_one_bin(col):
    check(draw((3, 384, 384, 380), FP16, places=384 * torch.arange(380) + col))


def test_places_that_are_their_own_mirror_images():
    check(draw((3, 384, 512, 4), FP16, places=torch.tensor([0, 192, 256 * 384, 256 * 384 + 192])))


@pytest.mark.parametrize("n", [16, 17, 1024])
def test_padded_samples(n):
    check(draw((3, 256, 384, n), FP16))


def test_without_a_base():
    x, weight, _, spectrum, rows, cols, scaling, grad = draw((5, 384, 256, 60), BF16)
    tables, scale = make_tables(rows, cols, (256, 384)), scaling / weight.numel()
    places = (tables.rows, tables.cols, *tables.backward)
    y = kernel.fourier_fwd(x, None, None, spectrum, *tables.forward, scale)
    dx, _ = kernel.fourier_bwd(grad, None, None, spectrum, *places, scale, True)
    with_base = launched(x, torch.zeros_like(weight), None, spectrum, rows, cols, scaling, grad)
    assert torch.equal(y, with_base[0]) and torch.equal(dx, with_base[1])


@pytest.mark.parametrize("by_dft", [(True, False), (False, True)], ids=["dx", "dspectrum"])
def test_forms_mix(by_dft, monkeypatch):
    """Each gradient alone, and each beside the other form of the other."""
    x, weight, _, spectrum, rows, cols, scaling, grad = inputs = draw((5, 384, 256, 60), FP16)
    monkeypatch.setattr(kernel, "dft_pays", lambda *_, backward: by_dft[backward])
    check(inputs)
    _, dx, dspectrum = launched(*inputs)
    tables, scale = make_tables(rows, cols, (256, 384)), scaling / weight.numel()
    places = (tables.rows, tables.cols, *tables.backward)
    only_x = kernel.fourier_bwd(grad, None, weight, spectrum, *places, scale, True)
    only_spectrum = kernel.fourier_bwd(grad, x, None, spectrum, *places, scale, False)
    assert torch.equal(only_x[0], dx) and only_x[1].shape == (0,)
    assert only_spectrum[0].shape == (0, 384) and torch.equal(only_spectrum[1], dspectrum)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    inputs = draw((5, 384, 256, 60), BF16)
    moved = [LAYOUTS[layout](i) if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in inputs]
    check(moved)
    # The library's product has other roundings for other strides of weight.
    found = launched(moved[0], inputs[1], None, *moved[3:])
    assert all(map(torch.equal, found, launched(*inputs[:2], None, *inputs[3:])))


def test_broadcast_x_and_grad():
    x, *rest, grad = draw((1, 384, 256, 60), FP16)
    check((x.expand(5, 384), *rest, grad.expand(5, 256)))


@pytest.mark.parametrize("processors", [1, 40])
def test_tiles_change_no_forward_bit(processors, monkeypatch):
    inputs = draw((7, 256, 384, 50), BF16)
    y, dx, _ = launched(*inputs)
    monkeypatch.setattr(device, "processors_of", lambda _: processors)
    found = launched(*inputs)
    assert torch.equal(found[0], y) and torch.equal(found[1], dx)
    assert all(map(torch.equal, launched(*inputs), found))  # nor does chance any
    check(inputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_one_token_does_not_reach_another(value):
    """One that is not finite is to the other of its pair as if it were zero."""
    x, *rest, grad = draw((6, 384, 256, 60), BF16)
    x[2], grad[3] = 0, 0
    expected = launched(x, *rest, grad)
    x[2, 5], grad[3, 7] = value, value
    y, dx, dspectrum = launched(x, *rest, grad)
    not_y, not_dx = torch.arange(6) != 2, torch.arange(6) != 3
    assert torch.equal(y[not_y], expected[0][not_y]) and torch.equal(dx[not_dx], expected[1][not_dx])
    assert y[2].isnan().all() and dx[3].isnan().all() and dspectrum.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tokens_of_different_magnitudes(dtype):
    """A large token leaves the other of its pair as exact as if that were alone."""
    x, *rest, grad = draw((4, 384, 256, 60), dtype)
    sizes = torch.tensor([1e3, 1e-3, 1.0, 0.0])[:, None]
    x, grad = (x * sizes).to(dtype), (grad * sizes.flip(0)).to(dtype)
    y, dx, _ = launched(x, *rest, grad)
    for t in range(4):
        one = (x[t : t + 1], *rest, grad[t : t + 1])
        for found, alone, want in zip((y[t], dx[t]), launched(*one), exact(*one), strict=False):
            assert (found.double() - want).norm() <= 1.1 * (alone.double() - want).norm()


def test_magnitudes_at_the_ends_of_float32():
    x, weight, bias, spectrum, rows, cols, scaling, grad = draw((3, 384, 256, 60), BF16, bias=False)
    for size in (1e30, 1e-30):
        check((x * size, weight, bias, spectrum / size, rows, cols, scaling, grad))


def test_a_coefficient_that_is_not_finite():
    x, weight, bias, spectrum, *rest = draw((3, 384, 256, 60), BF16)
    spectrum[7] = float("inf")
    y, dx, dspectrum = launched(x, weight, bias, spectrum, *rest)
    assert y.isnan().all() and dx.isnan().all() and dspectrum.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fresh_adapter_gives_the_base(dtype):
    x, weight, bias, spectrum, *rest, grad = draw((5, 384, 256, 60), dtype)
    y, dx, _ = launched(x, weight, bias, torch.zeros_like(spectrum), *rest, grad)
    assert torch.equal(y, F.linear(x, weight, bias)) and torch.equal(dx, grad @ weight)


@pytest.mark.parametrize("shape", [(0, 384, 256, 60), (3, 384, 256, 0)], ids=str)
def test_nothing_to_do_no_launch(shape, monkeypatch):
    monkeypatch.setattr(dft, "dft_fwd_kernel", None)
    monkeypatch.setattr(dft, "dft_bwd_kernel", None)
    x, weight, bias, *rest, grad = draw(shape, BF16)
    y, dx, dspectrum = launched(x, weight, bias, *rest, grad)
    assert torch.equal(y, F.linear(x, weight, bias)) and torch.equal(dx, grad @ weight)
    assert torch.equal(dspectrum, torch.zeros(shape[3]))


# ------------------------------------------------------------------------------------------------
# Tables and decisions
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [256, 384, 525, 768, 1536, 3584, 4096])
def test_tables_are_the_transform(length):
    rows, cols = dft.factors_of(length)
    matrices, twiddles = dft.dft_tables(length, torch.device("cpu"))
    first, last = matrices.split([4 * dft.padded(rows) ** 2, 4 * dft.padded(cols) ** 2])

    def whole(table, size):
        high_re, high_im, low_re, low_im = table.double().view(4, dft.padded(size), dft.padded(size))
        assert not high_re[size:].any() and not high_re[:, size:].any()  # padding
        return torch.complex(high_re + low_re, high_im + low_im)[:size, :size]

    x = torch.randn(rows, cols, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = torch.complex(*twiddles.double())[:rows, :cols]
    found = (whole(first, rows) @ x.to(torch.complex128) * factor) @ whole(last, cols)
    want = torch.fft.fft(x.flatten())
    assert (found.t().flatten() - want).norm() <= 3e-7 * want.norm()  # float32's twiddles, and 22 bits of matrices


@pytest.mark.parametrize(
    ("length", "factors"),
    [
        (384, (24, 16)), (768, (24, 32)), (1024, (32, 32)), (2048, (64, 32)), (3072, (48, 64)), (3584, (56, 64)),
        (4096, (64, 64)), (251, None), (255, None), (2 * 257, None), (4160, None), (11008, None), (18944, None),
    ],
)  # fmt: skip
def test_factors(length, factors):
    assert dft.factors_of(length) == factors


def test_what_pays():
    for size in (384, 768, 1024, 2048, 3584, 4096):
        assert dft.dft_pays(size, size, 1000, BF16, backward=False)
        assert not dft.dft_pays(size, size, 1000, FP32, backward=False)
        assert not dft.dft_pays(size, size, 1000, FP32, backward=True)
        assert not dft.dft_pays(size, 11008, 1000, BF16, backward=False)
        assert not dft.dft_pays(11008, size, 1000, BF16, backward=True)
        assert not dft.dft_pays(size, size, 1025, BF16, backward=False)
        assert not dft.dft_pays(size, size, 0, BF16, backward=False)
        # Three products for one are too many for matrices of 64 × 64.
        assert dft.dft_pays(size, size, 1000, FP16, backward=False) == (size <= 2048)
        assert dft.dft_pays(size, size, 1000, BF16, backward=True) == (size <= 2048)


def test_float32_goes_the_other_way(monkeypatch):
    monkeypatch.setattr(kernel, "dft_pays", dft.dft_pays)
    monkeypatch.setattr(dft, "dft_fwd_kernel", None)
    monkeypatch.setattr(dft, "dft_bwd_kernel", None)
    check(draw((2, 256, 256, 30), FP32))


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, T, in, out, n, dtype, whether the base product is there to add to: MiniLM (384), BERT (768), Llama-3-8B's
# and Qwen2.5-7B's attention.
CASES = [
    (90, 1, 4096, 4096, 1000, "bf16"),  # decode: half a pair
    (90, 16, 4096, 4096, 1000, "bf16"),
    (90, 4096, 4096, 4096, 1000, "bf16"),
    (90, 4096, 4096, 1024, 1000, "bf16"),
    (90, 16, 3584, 3584, 1000, "bf16"),
    (90, 4096, 3584, 512, 1000, "bf16"),
    (90, 4096, 1024, 1024, 1000, "bf16"),
    (90, 4096, 2048, 2048, 1000, "fp16"),
    (90, 16, 768, 768, 1000, "fp16"),
    (90, 4096, 384, 384, 100, "bf16"),
    (90, 4096, 525, 418, 300, "bf16"),  # odd strides
    (80, 1, 4096, 4096, 1000, "bf16"),
    (80, 4096, 4096, 1024, 1000, "bf16"),
    (80, 4096, 3584, 512, 1000, "bf16"),
    (80, 4096, 2048, 2048, 1024, "fp16"),  # the most registers
    (80, 16, 1024, 4096, 1000, "fp16", False),  # 64 × 64 bins in two parts, and the pointers of the delta alone
    (80, 4096, 2048, 2048, 64, "bf16"),
    (80, 4096, 768, 768, 1000, "bf16"),
    (89, 4096, 2048, 2048, 1000, "bf16"),  # 99 KiB
    (100, 16, 4096, 4096, 1000, "bf16"),
    (100, 4096, 4096, 1024, 1000, "bf16"),
    (100, 4096, 2048, 2048, 1000, "fp16"),
    (100, 4096, 768, 768, 1000, "bf16"),
]

KERNELS = {"dft": ["dft_fwd_kernel", "dft_bwd_kernel"]}


def launch(tokens, in_features, out_features, n, dtype, add=True):
    """The forward, dx, and the gradient of the coefficients where it pays."""
    x, grad = (meta(tokens, size, dtype=DTYPES[dtype]) for size in (in_features, out_features))
    spectrum, rows, samples = meta(n), meta(n, dtype=torch.int32), meta(2 * n, dtype=torch.int32)
    forward, backward = (meta(size + 1, dtype=torch.int32) for size in (out_features, in_features))
    dft.dft_fwd(x, grad if add else None, spectrum, forward, samples, samples, 1e-5)
    dft.dft_fwd(grad, x if add else None, spectrum, backward, samples, samples, 1e-5)
    if dft.dft_pays(in_features, out_features, n, DTYPES[dtype], backward=True):
        dft.dft_bwd(grad, x, rows, rows, 1e-5)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    capability, _, in_features, out_features, n, dtype, *_ = case
    check_records(__file__, case, compiled[case])
    backward = ["dft_bwd_kernel"] * dft.dft_pays(in_features, out_features, n, DTYPES[dtype], backward=True)
    assert [record["kernel"] for record in compiled[case]] == ["dft_fwd_kernel", "dft_fwd_kernel", *backward]
    newest = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for record in compiled[case]:
        rows = {record["config"]["IN_ROWS"], record["config"]["OUT_ROWS"]}
        # As many rows as the newest take; fewer go the old way.
        assert set(record["tensor_cores"]) == {newest if size == 64 else "mma.sync" for size in rows}
