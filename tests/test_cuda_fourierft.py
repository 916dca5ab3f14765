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
    fixtures,
    has_gpu_kernel,
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


build, compiled, on_the_cpu = fixtures()


@pytest.fixture(scope="module")
def program(build):
    return build("run_fourierft")


@dataclass(frozen=True)
class Case:
    tokens: int
    in_features: int
    out_features: int
    n: int
    padding: int = 0  # elements between the end of a row and the next one
    offset: int = 0  # elements from a 16-byte boundary
    stride: int = 1  # of the coefficients
    groups: int = 0  # of pairs of tokens, 0: one for each
    blocks: int = 0  # that share the groups of split signals, 0: one for each
    max_shared: int = SM_90_SHARED
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
    # Signals that go through global memory, as real ones do,
    (Case(1, 28672, 8192, 1000, seeds=2), "bfloat16"),
    (Case(2, 8192, 28672, 1000, seeds=2), "float32"),
    (Case(1, 128, 32768, 1000, seeds=2), "float16"),
    (Case(1, 19683, 64, 1000, seeds=2), "float32"),  # a pass of 3 in global memory
    (Case(1, 16411, 60, 1000, seeds=2), "float32"),  # a prime, its convolution has 40960
    # and as they would if shared memory were smaller still.
    (Case(5, 7, 24, 40, groups=2, max_shared=150), "float32"),  # one part of 7 or of 8 at a time
    (Case(3, 16, 60, 40, padding=3, offset=1, max_shared=100), "bfloat16"),  # a part at a time of 3 · 5
    (Case(3, 37, 128, 40, stride=3, max_shared=400), "float32"),
    (Case(3, 37, 128, 40, max_shared=200), "float32"),  # a pass of 37 in global memory
    (Case(5, 131, 60, 40, groups=1, max_shared=1000), "float32"),  # a convolution
    (Case(7, 60, 131, 1000, groups=2, blocks=1, max_shared=300), "float16"),
    (Case(1, 257, 262, 40, max_shared=1000), "float32"),
    (Case(3, 1517, 407, 1000, max_shared=1000), "float32"),
    (Case(2, 343, 375, 1000, max_shared=1000), "float32"),  # 7 · 7 · 7 as 7 and two parts at a time of 49
    (Case(2, 343, 375, 1000, max_shared=100), "float32"),
    (Case(5, 768, 384, 1000, padding=5, offset=1, groups=3, blocks=2, max_shared=3000), "bfloat16"),
    (Case(2, 768, 384, 1000, repeats=True, max_shared=300), "float32"),
    (Case(3, 127, 1000, 40, max_shared=500), "float32"),
    (Case(2, 512, 1024, 5000, seeds=2, max_shared=100), "float32"),  # two passes in global memory, and 4
    (Case(1, 4096, 4096, 1000, seeds=2, max_shared=5000), "float32"),
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
        numbers |= {"stride": case.stride, "seeds": case.seeds, "max_shared": case.max_shared}
        numbers |= {name: value for name in ("groups", "blocks") if (value := getattr(case, name))}
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
    dx, sums = emulator.run(case.tokens, lengths, s.tables.backward, s.spectrum, **tensors, **paths)

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
    run = {"mix": s.tables.backward, "spectrum": s.spectrum, "source": s.grad}
    places = {"x": s.x, "rows": s.tables.rows, "cols": s.tables.cols, "sums": tmp_path / "sums.out"}
    both = emulator.run(5, (131, 60), **run, **places, y=tmp_path / "y.out")
    dx, _ = emulator.run(5, (131, 60), **run, y=tmp_path / "y.out")
    _, sums = emulator.run(5, (131, 60), **run, **places)
    assert torch.equal(both[0], dx) and torch.equal(both[1], sums)


@needs_cxx
def test_blocks_do_not_change_a_bit(program, tmp_path):
    """Split signals have as many blocks as the GPU has multiprocessors."""
    results = []
    for blocks in (1, 2, 3):
        case = Case(9, 60, 131, 40, groups=3, blocks=blocks, max_shared=500)
        s = sample(case, torch.float32)
        tensors = {"source": s.grad, "x": s.x, "rows": s.tables.rows, "cols": s.tables.cols}
        paths = {"y": tmp_path / "y.out", "sums": tmp_path / "sums.out"}
        run = Emulator(program, tmp_path, case, "float32").run
        results.append(run(9, (131, 60), s.tables.backward, s.spectrum, **tensors, **paths))
    for dx, sums in results[1:]:
        assert torch.equal(dx, results[0][0]) and torch.equal(sums, results[0][1])


MERGES = [
    (Case(0, 24, 7, 40), "float32"),  # an odd number of rows, the last one without a partner
    (Case(0, 16, 60, 40, padding=3, offset=1), "bfloat16"),
    (Case(0, 131, 37, 1000, stride=2), "float16"),
    (Case(0, 128, 131, 40), "float32"),
    (Case(0, 384, 24, 1000), "float32"),
    (Case(0, 24, 7, 40, max_shared=100), "float32"),
    (Case(0, 131, 37, 1000, stride=2, max_shared=400), "float16"),
    (Case(0, 384, 128, 1000, max_shared=1000), "bfloat16"),
    (Case(0, 28672, 3, 1000, seeds=2), "bfloat16"),
    (Case(0, 16411, 2, 1000, seeds=2), "float32"),
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


def plan(program, in_features: int, out_features: int, tokens: int, n: int, max_shared: int) -> dict:
    numbers = [in_features, out_features, tokens, n, max_shared, 132]
    result = subprocess.run([program, "plan", *map(str, numbers)], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "max_shared", "kind", "threads", "radices"),
    [
        (4096, 4096, SM_80_SHARED, "short", 256, [16, 16, 16]),
        (4096, 11008, SM_80_SHARED, "short", 704, [16, 16, 16]),
        (11008, 4096, SM_80_SHARED, "short", 704, [16, 16, 43]),
        (14336, 14336, SM_80_SHARED, "long", 512, [16, 7, 16, 8]),
        (18944, 18944, SM_80_SHARED, "long", 512, [16, 8, 4, 37]),
        (27136, 8192, SM_90_SHARED, "long", 512, [16, 8, 4, 53]),
        (1, 1, SM_80_SHARED, "short", 32, [1]),
    ],
)
def test_plan_takes_one_buffer(program, in_features, out_features, max_shared, kind, threads, radices):
    shape = plan(program, in_features, out_features, 5, 0, max_shared)
    length = max(in_features, out_features)
    assert (shape["kind"], shape["threads"], shape["radices"]) == (kind, threads, radices)
    assert shape["groups"] == shape["blocks"] == 3 and 8 * length <= shape["shared_bytes"] <= max_shared
    assert shape["shared_bytes"] <= 8 * (length + length // 15 + 1)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "max_shared", "sizes"),
    [
        (28672, 4096, SM_90_SHARED, 28672 + 4096),
        (128, 24576, SM_90_SHARED, 128 + 24576),  # more bins than threads can hold in registers
        (32771, 128, SM_90_SHARED, 81920 + 128),  # a prime
        (14336, 4096, 99 << 10, 14336 + 4096),
        (128, 1 << 27, SM_90_SHARED, 128 + (1 << 27)),
    ],
)
def test_plan_splits_what_does_not_fit(program, in_features, out_features, max_shared, sizes):
    shape = plan(program, in_features, out_features, 4096, 0, max_shared)
    assert (shape["kind"], shape["threads"], shape["room"], shape["scratch"]) == ("split", 512, 8192, sizes)
    assert 8 * 8192 <= shape["shared_bytes"] <= max_shared
    assert shape["groups"] == 2048 and shape["blocks"] == max(1, min(132, (1 << 26) // sizes))


@needs_cxx
def test_plan_shares_tokens_evenly(program):
    def groups(tokens: int, n: int) -> int:
        return plan(program, 4096, 4096, tokens, n, SM_90_SHARED)["groups"]

    assert [groups(tokens, 1000) for tokens in (5, 4096, 8192)] == [3, 2048, 2048]  # of one pair, of one, of two
    assert (groups(8192, 0), groups(8192, 1 << 22)) == (4096, 1)


@needs_cxx
def test_plan_has_an_end(program):
    with pytest.raises(ValueError, match="2\\^27"):
        plan(program, 128, (1 << 27) + 1, 5, 0, SM_90_SHARED)
    with pytest.raises(ValueError, match="more pairs of tokens than a grid has blocks"):
        plan(program, 1, 1, 1 << 33, 0, SM_90_SHARED)


# How many lanes meet in a bank of shared memory, at most, between two barriers each: on the way to a spectrum, pass by
# pass, where an odd radix has several turns, and in the scatter. The way back is that of the way there.
BANKS = {
    384: ([2, 2, 1], 3),
    768: ([1, 1, 1], 3),
    1024: ([1, 2, 1], 1),
    1536: ([1, 1, 2, 1], 3),
    3072: ([1, 1, 2, 1], 3),
    3584: ([1, 1, 2, 1], 2),
    4096: ([1, 1, 1], 1),
    11008: ([1, 2, 3, 3, 3, 3], 3),
    14336: ([1, 1, 1, 1], 2),
    18944: ([1, 2, 2, 3, 3, 3, 3, 3, 3, 3], 2),
}


@needs_cxx
@pytest.mark.parametrize("length", BANKS)
def test_bank_conflicts(build, length):
    command = [build("run_fourier_banks", watched=True), str(length), str(SM_90_SHARED)]
    degrees = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    there, scatter = BANKS[length]
    gather = 1  # of nothing
    assert degrees == [*there, gather, scatter, *reversed(there)]


GPU_CASES = [
    Case(1, 768, 768, 1000),
    Case(5, 1000, 384, 40),
    Case(3, 11008, 4096, 1000),
    Case(3, 1024, 28672, 1000),
    Case(2, 16411, 128, 1000),
    Case(2000, 4096, 4096, 1000),
]


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


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("fourierft")
    assert len(kernels) == len(ARCHS) * (3 * len(DTYPES) + 1)
    check_figures("fourierft", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= (80 if "ShortSignals" in kernel.name else 128)
