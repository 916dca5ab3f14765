"""The CUDA C++ kernels of FourierFT, checked without a GPU.

csrc/cuda/fourierft.cuh is compiled for the CPU against the stand-ins for CUDA's headers in tests/cuda_host, with
AddressSanitizer and UndefinedBehaviorSanitizer, and run over awkward lengths. Where there is an nvcc,
csrc/cuda/fourierft.cu is compiled for three GPUs, and what ptxas says about registers and spills is checked.
"""

import json
import subprocess
from dataclasses import dataclass, fields

import pytest
import torch
from cuda_build import (
    ARCHS,
    DTYPES,
    SM_80_SHARED,
    SM_90_SHARED,
    check_figures,
    compile_device,
    has_gpu_kernel,
    host_builder,
    needs_cxx,
    needs_nvcc,
    read_raw,
    replayed,
    write_raw,
)
from torch import Tensor

from fastpeft import reference
from fastpeft.ops import fourierft

SCALING = 300.0


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return host_builder(tmp_path_factory.mktemp("cuda_host"))("run_fourierft")


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int
    n: int
    padding: int = 0  # elements between the end of a row and the next one
    offset: int = 0  # elements from a 16-byte boundary
    stride: int = 1  # of the coefficients
    groups: int = 0  # blocks that share the tokens in the backward, 0: one for each pair
    repeats: bool = False  # all places in a few bins
    seeds: int = 4

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rare = [f"{f.name}{values[f.name]}" for f in fields(self)[4:] if values[f.name] != f.default]
        return "-".join([f"T{self.tokens}", f"{self.in_features}x{self.out_features}", f"n{self.n}", *rare])


CASES = [
    (Case(1, 1, 1, 3), "float32"),  # the shortest signal, without a partner
    (Case(2, 2, 2, 5), "float16"),
    (Case(5, 7, 24, 40, groups=2), "float32"),  # single passes of 7 and of 8 with 3; two pairs for a block
    (Case(3, 16, 60, 40, padding=3, offset=1), "bfloat16"),  # one pass of 16; 4, 3 and 5
    (Case(5, 24, 16, 40, padding=1, offset=3), "float16"),
    (Case(2, 37, 128, 0), "float32"),  # no coefficients
    (Case(3, 37, 128, 40, stride=3), "float32"),  # one odd pass that reads global memory; 16 and 8
    (Case(3, 128, 37, 1000), "bfloat16"),  # many more samples than bins
    (Case(5, 131, 60, 40, groups=1), "float32"),  # a convolution; one block sums over all tokens
    (Case(3, 60, 131, 1000, groups=2), "float32"),
    (Case(1, 257, 262, 40), "float16"),  # convolutions of both
    (Case(3, 1517, 407, 1000), "float32"),  # 37 · 41 and 11 · 37: odd passes with twiddle factors
    (Case(2, 343, 375, 1000), "float32"),  # 7 · 7 · 7 and 3 · 5 · 5 · 5
    (Case(3, 384, 768, 1000, padding=5, offset=1), "float32"),
    (Case(2, 768, 384, 1000, repeats=True), "float32"),  # bins with hundreds of samples, and most with none
    (Case(5, 768, 768, 1000, groups=2, repeats=True), "bfloat16"),
    (Case(2, 1000, 1000, 1000, padding=24), "float16"),
    (Case(3, 127, 1000, 40), "float32"),  # the largest odd radix
    (Case(1, 4096, 4096, 1000), "float32"),
    (Case(2, 512, 1024, 5000, seeds=2), "float32"),
    (Case(1, 11008, 4096, 1000, seeds=2), "bfloat16"),
    (Case(2, 4096, 11008, 1000, seeds=2), "float32"),
    (Case(1, 14336, 14336, 1000, seeds=2), "float32"),  # the kernel for long signals
]


@dataclass(frozen=True)
class Sample:
    x: Tensor  # (T, in)
    base: Tensor  # (T, out)
    grad: Tensor  # (T, out)
    base_grad: Tensor  # (T, in)
    spectrum: Tensor  # (n,)
    tables: fourierft.Tables
    shape: tuple[int, int]


def sample(case: Case, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(0)
    shape = case.out_features, case.in_features
    matrices = [torch.randn(case.tokens, width, generator=generator).to(dtype) for width in shape[::-1] + shape]
    some = (min(3, shape[0]), min(2, shape[1])) if case.repeats else shape
    rows, cols = (torch.randint(size, (case.n,), generator=generator) for size in some)
    spectrum = torch.randn(case.n, generator=generator)
    return Sample(*matrices, spectrum, fourierft.make_tables(rows, cols, shape), shape)


class Emulator:
    """Runs run_fourierft with tensors as files."""

    def __init__(self, program, folder, case: Case, dtype: str):
        self.program, self.folder, self.case, self.dtype = program, folder, case, dtype

    def matrix(self, x: Tensor) -> Tensor:
        """Rows with NaN between them, without what would lie behind the last one."""
        wide = torch.full((x.shape[0], x.shape[1] + self.case.padding), float("nan"), dtype=x.dtype)
        wide[:, : x.shape[1]] = x
        return wide.flatten()[: wide.numel() - self.case.padding]

    def run(self, tokens: int, lengths: tuple[int, int], mix: fourierft.Mix, spectrum: Tensor, **options):
        """y and sums, which are wanted where their names are in options; tensors become files."""
        case, n = self.case, spectrum.shape[0]
        strided = torch.full((n, case.stride), float("nan"))
        strided[:, 0] = spectrum
        strided = strided.flatten()[: max(0, (n - 1) * case.stride + 1)]
        numbers = {"tokens": tokens, "in": lengths[0], "out": lengths[1], "n": n, "samples": mix.sources.shape[0]}
        numbers |= {"scale": SCALING / (lengths[0] * lengths[1]), "padding": case.padding, "offset": case.offset}
        numbers |= {"stride": case.stride, "seeds": case.seeds}
        for name, value in {**mix._asdict(), "spectrum": strided, **options}.items():
            if isinstance(value, Tensor):
                write_raw(self.folder / name, self.matrix(value) if value.dim() == 2 else value)
                value = self.folder / name
            if value is not None:
                numbers[name] = value
        outputs = [self.folder / "y.out", self.folder / "sums.out"]
        command = [self.program, "run", self.dtype, *(f"{name}={value}" for name, value in numbers.items())]
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        y = sums = None
        if "y" in options:
            flat = read_raw(outputs[0], (tokens * (lengths[1] + case.padding) - case.padding,), DTYPES[self.dtype])
            y = torch.stack([row[: lengths[1]] for row in flat.split(lengths[1] + case.padding)])
        if "sums" in options:
            sums = read_raw(outputs[1], (n,), torch.float32)
        return y, sums


def delta(x: Tensor, spectrum: Tensor, sources: Tensor, targets: Tensor, length: int) -> Tensor:
    """By the formulas at the top of fastpeft/ops/fourierft.py, in float64."""
    spectrum_of_x = torch.fft.fft(x.double())
    bins = torch.zeros(x.shape[0], length, dtype=torch.complex128)
    bins.index_add_(1, targets, spectrum.double() * spectrum_of_x[:, sources].conj())
    return SCALING / x.shape[1] * torch.fft.ifft(bins).real


def check_error(result: Tensor, exact: Tensor, composed: Tensor) -> None:
    """At most twice the error of the library's composition in float32; where that is exact, of one rounding."""
    assert result.isfinite().all()
    error, allowed = (result.double() - exact).norm(), 2 * (composed.double() - exact).norm()
    allowed = max(allowed, torch.finfo(result.dtype).eps * exact.norm())
    assert error <= allowed, f"error {error:.3g}, the composition in float32 is at {allowed / 2:.3g}"


@needs_cxx
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_forward_matches_float64(program, tmp_path, case, dtype):
    s = sample(case, DTYPES[dtype])
    emulator = Emulator(program, tmp_path, case, dtype)
    lengths = case.in_features, case.out_features
    paths = {"y": tmp_path / "y.out"}
    y, _ = emulator.run(case.tokens, lengths, s.tables.forward, s.spectrum, source=s.x, base=s.base, **paths)

    rows, cols = s.tables.rows.long(), s.tables.cols.long()
    exact = s.base.double() + delta(s.x, s.spectrum, cols, rows, case.out_features)
    composed = s.base.float() + fourierft.fourier_fwd(s.x.float(), None, None, s.spectrum, s.tables, s.shape, SCALING)
    check_error(y, exact, composed.to(s.x.dtype))


@needs_cxx
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_backward_matches_float64(program, tmp_path, case, dtype):
    s = sample(case, DTYPES[dtype])
    emulator = Emulator(program, tmp_path, case, dtype)
    lengths = case.out_features, case.in_features
    tensors = {"source": s.grad, "base": s.base_grad, "x": s.x, "rows": s.tables.rows, "cols": s.tables.cols}
    paths = {"y": tmp_path / "y.out", "sums": tmp_path / "sums.out"}
    dx, sums = emulator.run(case.tokens, lengths, s.tables.backward, s.spectrum, groups=case.groups, **tensors, **paths)

    rows, cols = s.tables.rows.long(), s.tables.cols.long()
    exact_dx = s.base_grad.double() + delta(s.grad, s.spectrum, rows, cols, case.in_features)
    products = torch.fft.fft(s.grad.double())[:, rows] * torch.fft.fft(s.x.double())[:, cols]
    exact_sums = SCALING / (case.in_features * case.out_features) * products.real.sum(0)
    arguments = (s.grad.float(), s.x.float(), None, s.spectrum, s.tables, s.shape, SCALING, (True, True))
    composed_dx, composed_sums = fourierft.fourier_bwd(*arguments)
    check_error(dx, exact_dx, (s.base_grad.float() + composed_dx).to(s.x.dtype))
    check_error(sums, exact_sums, composed_sums)


@needs_cxx
def test_each_gradient_alone(program, tmp_path):
    case = Case(5, 60, 131, 40, groups=2)
    s = sample(case, torch.float32)
    emulator = Emulator(program, tmp_path, case, "float32")
    run = {"mix": s.tables.backward, "spectrum": s.spectrum, "source": s.grad, "groups": 2}
    places = {"x": s.x, "rows": s.tables.rows, "cols": s.tables.cols, "sums": tmp_path / "sums.out"}
    both = emulator.run(5, (131, 60), **run, **places, y=tmp_path / "y.out")
    dx, _ = emulator.run(5, (131, 60), **run, y=tmp_path / "y.out")
    _, sums = emulator.run(5, (131, 60), **run, **places)
    assert torch.equal(both[0], dx) and torch.equal(both[1], sums)


MERGES = [
    (Case(0, 24, 7, 40), "float32"),  # an odd number of rows, the last one without a partner
    (Case(0, 16, 60, 40, padding=3, offset=1), "bfloat16"),
    (Case(0, 131, 37, 1000, stride=2), "float16"),
    (Case(0, 128, 131, 40), "float32"),
    (Case(0, 384, 24, 1000), "float32"),
]


@needs_cxx
@pytest.mark.parametrize(("case", "dtype"), MERGES, ids=str)
def test_merge_matches_float64(program, tmp_path, case, dtype):
    s = sample(case, DTYPES[dtype])
    weight = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    emulator = Emulator(program, tmp_path, case, dtype)
    lengths = case.out_features, case.in_features
    merged, _ = emulator.run(
        case.out_features, lengths, s.tables.backward, s.spectrum, base=weight, y=tmp_path / "y.out"
    )

    places = s.tables.rows.long(), s.tables.cols.long()
    dense = torch.zeros(s.shape, dtype=torch.float64).index_put(places, s.spectrum.double(), accumulate=True)
    exact = weight.double() + SCALING * torch.fft.ifft2(dense).real
    composed = weight.float() + fourierft._dense_weight(s.spectrum, *places, s.shape, SCALING)
    check_error(merged, exact, composed.to(weight.dtype))


def test_formulas_are_the_methods():
    case = Case(3, 24, 60, 40)
    s = sample(case, torch.float64)
    rows, cols = s.tables.rows.long(), s.tables.cols.long()
    places, unique = torch.unique(torch.stack([rows, cols]), dim=1, return_inverse=True)
    spectrum = torch.zeros(places.shape[1], dtype=torch.float64).index_add_(0, unique, s.spectrum.double())
    weight = reference.fourierft.fourier_weight(spectrum, places[0], places[1], s.shape, SCALING)
    torch.testing.assert_close(delta(s.x, s.spectrum, cols, rows, 60), s.x @ weight.T)


def plan(program, in_features: int, out_features: int, tokens: int, groups: int, max_shared: int) -> dict:
    numbers = [in_features, out_features, tokens, groups, max_shared]
    result = subprocess.run([program, "plan", *map(str, numbers)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "max_shared", "threads", "radices"),
    [
        (4096, 4096, SM_80_SHARED, 256, [16, 16, 16]),
        (4096, 11008, SM_80_SHARED, 704, [16, 16, 16]),
        (11008, 4096, SM_80_SHARED, 704, [16, 16, 43]),
        (14336, 14336, SM_80_SHARED, 512, [16, 16, 8, 7]),
        (18944, 18944, SM_80_SHARED, 512, [16, 8, 4, 37]),
        (27136, 8192, SM_90_SHARED, 512, [16, 8, 4, 53]),
        (1, 1, SM_80_SHARED, 32, [1]),
    ],
)
def test_plan_takes_one_buffer(program, in_features, out_features, max_shared, threads, radices):
    shape = plan(program, in_features, out_features, 5, 0, max_shared)
    length = max(in_features, out_features)
    assert (shape["threads"], shape["radices"]) == (threads, radices)
    assert shape["grid"] == 3 and 8 * length <= shape["shared_bytes"] <= max_shared
    assert shape["shared_bytes"] <= 8 * (length + length // 15 + 1)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "max_shared", "message"),
    [
        (28672, 4096, SM_90_SHARED, "a signal does not fit the shared memory"),
        (32771, 128, SM_90_SHARED, "a signal does not fit the shared memory"),
        (16411, 128, SM_90_SHARED, "a signal does not fit the shared memory"),  # a prime: a convolution of 40960
        (128, 24576, SM_90_SHARED, "a spectrum does not fit the registers"),
    ],
)
def test_plan_refuses_what_does_not_fit(program, in_features, out_features, max_shared, message):
    with pytest.raises(ValueError, match=message):
        plan(program, in_features, out_features, 5, 0, max_shared)


GPU_CASES = [Case(1, 768, 768, 1000), Case(5, 1000, 384, 40), Case(3, 11008, 4096, 1000), Case(2000, 4096, 4096, 1000)]


def run_operators(s: Sample, weight: Tensor) -> list[Tensor]:
    mix, scale = s.tables.forward, SCALING / weight.numel()
    places = (s.tables.rows, s.tables.cols, *s.tables.backward)
    ops = torch.ops.fastpeft
    y = ops.fourier_fwd(s.x, weight, None, s.spectrum, *mix, scale)
    return [y, *ops.fourier_bwd(s.grad, s.x, weight, s.spectrum, *places, scale, True)]


def moved(value, device: str):
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(moved(item, device) for item in value)) if hasattr(value, "_fields") else value


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_operators_on_a_gpu(case, dtype, device="cuda"):
    if not has_gpu_kernel("fourier_bwd") and device == "cuda":
        pytest.skip("no GPU, or an extension without kernels for it")
    s = sample(case, DTYPES[dtype])
    weight = (torch.randn(s.shape, generator=torch.Generator().manual_seed(1)) / case.in_features**0.5).to(s.x.dtype)
    rows, cols = s.tables.rows.long(), s.tables.cols.long()
    products = torch.fft.fft(s.grad.double())[:, rows] * torch.fft.fft(s.x.double())[:, cols]
    exact = [
        s.x.double() @ weight.double().T + delta(s.x, s.spectrum, cols, rows, case.out_features),
        s.grad.double() @ weight.double() + delta(s.grad, s.spectrum, rows, cols, case.in_features),
        SCALING / weight.numel() * products.real.sum(0),
    ]
    y = fourierft.fourier_fwd(s.x, weight, None, s.spectrum, s.tables, s.shape, SCALING)
    arguments = (s.grad, s.x, weight, s.spectrum, s.tables, s.shape, SCALING, (True, True))
    composed = [y, *fourierft.fourier_bwd(*arguments)]
    there, on_device = Sample(*(moved(getattr(s, f.name), device) for f in fields(s))), weight.to(device)
    found = run_operators(there, on_device)
    for value, exactly, plain in zip(found, exact, composed, strict=True):
        check_error(value.cpu(), exactly, plain)
    if device == "cuda":
        again = replayed(lambda: run_operators(there, on_device))
        assert all(torch.equal(value, other) for value, other in zip(found, again, strict=True))
        merged = fourierft.merge_fourier(on_device, there.spectrum, there.tables, SCALING)
        dense = fourierft._dense_weight(s.spectrum, rows, cols, s.shape, SCALING)
        check_error(merged.cpu(), weight.double() + dense.double(), (weight.float() + dense).to(weight.dtype))


@needs_nvcc
def test_nvcc_compiles_without_spills(tmp_path):
    kernels = compile_device("fourierft", tmp_path)
    assert len(kernels) == len(ARCHS) * (2 * len(DTYPES) + 1)
    check_figures("fourierft", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= (80 if "ShortSignals" in kernel.name else 128)
