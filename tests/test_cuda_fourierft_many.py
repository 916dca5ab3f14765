"""The CUDA C++ kernel of FourierFT with an adapter for every row, without a GPU as in test_cuda_fourierft.py.

tests/cuda_host/run_fourierft_many.cpp runs the kernel on the CPU over awkward lengths and places.
"""

import json
import subprocess
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_build import (
    ARCHS,
    DTYPES,
    SM_90_SHARED,
    check_figures,
    fixtures,
    has_gpu_kernel,
    needs_cxx,
    needs_nvcc,
    rare,
    read_raw,
    replayed,
    write_raw,
)
from torch import Tensor

import fastpeft
from fastpeft.ops.fourierft_many import FOURIER_MANY, fourier_many_
from fastpeft.ops.many import choose, plan_rows

build, compiled, on_the_cpu = fixtures()

SLOTS = 4  # the last one has no adapter


@dataclass(frozen=True)
class Case:
    """Row t has the adapter of slot t modulo what is between −1 and SLOTS, or the one that all have."""

    tokens: int
    in_features: int
    out_features: int
    n: int
    same: int | None = None
    sets: int = 1  # of places
    bins: int = 0  # of the target, that all places are in; 0: any
    x_padding: int = 0  # elements between the end of a row of x and the next one
    y_padding: int = 0
    x_offset: int = 0  # elements from a 16-byte boundary
    y_offset: int = 0
    max_shared: int = SM_90_SHARED
    multiprocessors: int = 132
    seeds: int = 4  # threads in ascending order, in descending order, and twice in a random one

    def __str__(self) -> str:
        return "-".join([f"T{self.tokens}", f"{self.in_features}to{self.out_features}", f"n{self.n}", *rare(self, 4)])


def squeezed(case: Case, bytes_left: int) -> Case:
    """With so little shared memory beside the list of places that signals are split."""
    claims = 1 << max(5, (min(case.out_features, 4096) - 1).bit_length())
    return replace(case, max_shared=4 * claims + 12 * min(case.n, 4096) + bytes_left)


CASES = [
    (Case(1, 1, 1, 1, same=0), "float32"),  # the shortest signal
    (Case(5, 2, 2, 4), "float16"),  # all places of a spectrum
    (Case(6, 7, 24, 40, sets=2), "float32"),  # single passes of 7 and of 8 with 3
    (Case(17, 16, 60, 40, sets=3, x_padding=3, x_offset=1), "bfloat16"),  # one pass of 16; 4, 3 and 5
    (Case(5, 24, 16, 40, y_padding=1, y_offset=3), "float16"),
    (Case(5, 24, 16, 40, x_padding=-24), "float32"),  # all rows of x are one
    (Case(3, 37, 128, 40), "float32"),  # one odd pass that reads global memory; 16 and 8
    (Case(3, 128, 37, 1000), "bfloat16"),  # many more places than bins
    (Case(3, 131, 60, 40), "float32"),  # a convolution
    (Case(3, 60, 131, 1000, sets=3), "float32"),
    (Case(2, 257, 262, 40, same=2), "float16"),  # convolutions of both
    (Case(3, 1517, 407, 1000), "float32"),  # 37 · 41 and 11 · 37: odd passes with twiddle factors
    (Case(2, 343, 375, 1000, same=1), "float32"),  # 7 · 7 · 7 and 3 · 5 · 5 · 5
    (Case(4, 768, 384, 1000, sets=2, y_padding=5, y_offset=1), "bfloat16"),
    (Case(3, 384, 768, 500, bins=2), "float32"),  # bins with hundreds of places, and most with none
    (Case(1, 500, 32, 500, bins=1, same=0), "float32"),  # every place in one bin
    (Case(2, 1000, 1000, 1000, same=0, x_padding=24), "float16"),
    (Case(2, 127, 1000, 40, same=0), "float32"),  # the largest odd radix
    (Case(1, 4096, 4096, 1000, same=0), "float32"),
    (Case(1, 64, 64, 4096, same=0, seeds=2), "float32"),  # a full spectrum: as many turns as bins of the source
    (Case(1, 1024, 512, 5000, same=0, seeds=2), "float32"),
    (Case(1, 512, 64, 20000, same=0, seeds=2), "float32"),  # more places than shared memory has room for
    (Case(1, 4096, 11008, 1000, same=0, seeds=2), "float32"),  # bins that share an entry of the table
    (Case(1, 14336, 8192, 4000, same=0, seeds=2), "bfloat16"),
    (Case(3, 64, 32, 20, same=1, y_padding=1 << 30), "float32"),  # offsets beyond 2^31
    # Signals that go through global memory, as real ones do,
    (Case(1, 28672, 8192, 1000, same=0, seeds=2), "bfloat16"),
    (Case(1, 128, 32768, 1000, same=0, seeds=2), "float16"),
    (Case(1, 16411, 60, 1000, same=0, seeds=2), "float32"),  # a prime, its convolution has 40960
    # and as they would if shared memory were smaller still.
    (squeezed(Case(6, 7, 24, 40, sets=2, multiprocessors=2), 150), "float32"),
    (squeezed(Case(3, 16, 60, 40, y_padding=3, y_offset=1), 100), "bfloat16"),
    (squeezed(Case(7, 37, 128, 40, multiprocessors=3), 400), "float32"),
    (squeezed(Case(5, 131, 60, 40, multiprocessors=1), 1000), "float32"),  # a convolution
    (squeezed(Case(3, 257, 262, 40, sets=3), 1000), "float16"),
    (squeezed(Case(3, 384, 768, 500, bins=2), 300), "float32"),
    (squeezed(Case(1, 64, 1024, 9000, same=0, seeds=2), 100), "float32"),  # three rounds of places
]


@dataclass(frozen=True)
class Sample:
    """The arguments of the operator, and the adapters of the rows."""

    x: Tensor
    y: Tensor
    tables: dict[str, Tensor]
    adapter: Tensor

    def plan(self) -> tuple[Tensor, Tensor]:
        rows, slots = plan_rows(self.adapter, SLOTS)
        if len(rows) == 17:  # slots that are not there, and rows
            slots[-1], slots[-2], rows[-3] = SLOTS, -7, 17
        return rows, slots


def different(count: int, n: int, generator: torch.Generator) -> Tensor:
    """n different numbers below count, which may be far more."""
    drawn = torch.arange(count) if count < 1 << 20 else torch.randint(count, (2 * n,), generator=generator).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)][:n]


def sample(case: Case, dtype: torch.dtype) -> Sample:
    generator = torch.Generator().manual_seed(0)
    sizes = case.in_features, case.out_features
    flat = [different((case.bins or sizes[1]) * sizes[0], case.n, generator) for _ in range(case.sets)]
    # Rows of the arena that are not named are NaN. Deltas come out somewhat larger than y.
    arena = torch.full((2 * SLOTS, case.n), torch.nan)
    named = torch.randperm(2 * SLOTS, generator=generator)[: SLOTS - 1]
    arena[named] = torch.randn(SLOTS - 1, case.n, generator=generator)
    tables = {
        "arena_spectrum": arena,
        "row_spectrum": torch.tensor([*named.tolist(), -1], dtype=torch.int32),
        "places": torch.stack([torch.stack([p // sizes[0], p % sizes[0]]) for p in flat]).int(),
        "place": torch.tensor([*(slot % case.sets for slot in range(SLOTS - 1)), 1 << 30], dtype=torch.int32),
        "scaling": torch.linspace(2.0, 8.0, SLOTS) * sizes[1] * (sizes[0] / case.n) ** 0.5,
    }
    numbers = torch.arange(case.tokens, dtype=torch.int32) % (SLOTS + 1) - 1
    adapter = numbers if case.same is None else torch.full_like(numbers, case.same)
    if case.tokens == 17:  # numbers that are no adapter's
        adapter[5], adapter[6] = SLOTS, -7
    x, y = (torch.randn(case.tokens, size, generator=generator).to(dtype) for size in sizes)
    return Sample(x[:1].expand(case.tokens, -1) if case.x_padding < 0 else x, y, tables, adapter)


def dense(s: Sample) -> Tensor:
    """In float64, row by row, by the formula at the top of fastpeft/ops/fourierft_many.py."""
    result = s.y.double()
    for t, slot in enumerate(s.adapter.tolist()):
        if not 0 <= slot < SLOTS or (row := int(s.tables["row_spectrum"][slot])) == -1:
            continue
        u, v = s.tables["places"][int(s.tables["place"][slot])].long()
        read = s.tables["arena_spectrum"][row].double() * torch.fft.fft(s.x[t].double())[v].conj()
        bins = torch.zeros(result.shape[1], dtype=torch.complex128).index_add_(0, u, read)
        result[t] += float(s.tables["scaling"][slot]) / s.x.shape[1] * torch.fft.ifft(bins).real
    return result


def check(found: Tensor, s: Sample) -> None:
    """Against float64, with twice the error of the composition; where that is exact, with that of one rounding."""
    exact, composed = dense(s), s.y.clone()
    with fastpeft.use_backend("torch"):
        fourier_many_(composed, s.x, *s.tables.values(), *plan_rows(s.adapter, SLOTS))
    alone = (s.adapter < 0) | (s.adapter >= SLOTS - 1)
    assert torch.equal(found[alone], s.y[alone]) and found.isfinite().all()
    error, allowed = (found.double() - exact).norm(), 2 * (composed.double() - exact).norm()
    allowed = max(allowed, torch.finfo(found.dtype).eps * exact.norm())
    assert error <= allowed, f"error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"


def run(build, tmp_path, case: Case, s: Sample, plan: tuple[Tensor, Tensor] | None = None) -> Tensor:
    names = {dtype: name for name, dtype in DTYPES.items()}
    rows, slots = s.plan() if plan is None else plan
    numbers = {
        "tokens": len(s.x),
        "in": case.in_features,
        "out": case.out_features,
        "n": case.n,
        "spectra": len(s.tables["arena_spectrum"]),
        "sets": len(s.tables["places"]),
        "count": SLOTS,
        "x_stride": case.in_features + case.x_padding,
        "y_stride": case.out_features + case.y_padding,
        **{name: getattr(case, name) for name in ("x_offset", "y_offset", "max_shared", "multiprocessors", "seeds")},
    }
    command = [build("run_fourierft_many"), "run", names[s.x.dtype]]
    command += [f"{name}={number}" for name, number in numbers.items()]
    for name, tensor in {"x": s.x, "y": s.y, **s.tables, "rows": rows, "slots": slots}.items():
        write_raw(tmp_path / name, tensor)
        command.append(f"{name}={tmp_path / name}")
    command.append(f"result={tmp_path / 'result'}")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return read_raw(tmp_path / "result", s.y.shape, s.y.dtype)


@needs_cxx
@pytest.mark.parametrize(("case", "dtype"), CASES, ids=str)
def test_kernel_matches_float64(build, tmp_path, case, dtype):
    s = sample(case, DTYPES[dtype])
    check(run(build, tmp_path, case, s), s)


@needs_cxx
@pytest.mark.parametrize("split", [False, True])
def test_bits_of_a_row_do_not_depend_on_its_neighbours(build, tmp_path, split):
    """Nor on how many blocks there are, nor on whether signals are split."""
    case = Case(9, 60, 131, 200, sets=2, seeds=1)
    s = sample(case, torch.float32)
    together = run(build, tmp_path, case, s)
    case = squeezed(case, 200) if split else case
    for multiprocessors in (1, 2, 132):
        case = replace(case, multiprocessors=multiprocessors)
        assert torch.equal(run(build, tmp_path, case, s), together)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    mixed = Sample(s.x[order], s.y[order], s.tables, s.adapter[order])
    assert torch.equal(run(build, tmp_path, case, mixed), together[order])
    for t in range(9):
        one = Sample(s.x[t : t + 1], s.y[t : t + 1], s.tables, s.adapter[t : t + 1])
        assert torch.equal(run(build, tmp_path, case, one), together[t : t + 1])


@needs_cxx
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("broken", ["row_spectrum", "place", "places", "scaling", "arena_spectrum"])
def test_kernel_stays_inside_with_broken_tables(build, tmp_path, broken, split):
    """The buffers end where the tensors end, so AddressSanitizer sees it. Other rows do not see it."""
    case = Case(7, 60, 131, 200, sets=3)
    case = squeezed(case, 200) if split else case
    s = sample(case, torch.bfloat16)
    right = run(build, tmp_path, case, s)
    table = s.tables[broken]
    number = int(s.tables["row_spectrum"][0]) if broken == "arena_spectrum" else 0  # what slot 0 has
    for values in ((1 << 30, -5), (-(1 << 31), 131)) if table.dtype == torch.int32 else ((torch.nan, torch.inf),):
        table[number].view(-1)[::2] = values[0]
        table[number].view(-1)[1::2] = values[1]
        found = run(build, tmp_path, replace(case, seeds=1), s)
        others = s.adapter != 0
        assert torch.equal(found[others], right[others])


@needs_cxx
def test_rows_that_nobody_names_stay(build, tmp_path):
    case = Case(6, 24, 16, 40)
    s = sample(case, torch.float32)
    right = run(build, tmp_path, case, replace(s, adapter=torch.zeros(6, dtype=torch.int32)))
    rows = torch.tensor([4, -1, 6, 1, 3, 1 << 30], dtype=torch.int32)
    slots = torch.tensor([0, 0, 0, -(1 << 31), SLOTS, 0], dtype=torch.int32)
    found = run(build, tmp_path, case, s, (rows, slots))
    assert torch.equal(found[4], right[4])
    assert torch.equal(found[[0, 1, 2, 3, 5]], s.y[[0, 1, 2, 3, 5]])


def plan(build, *numbers: int) -> dict:
    command = [str(part) for part in (build("run_fourierft_many"), "plan", *numbers)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "n", "threads", "claims"),
    [
        (1, 1, 1, 32, 32),
        (64, 128, 1000, 256, 128),
        (4096, 4096, 1000, 256, 4096),
        (4096, 1024, 1000, 256, 1024),
        (1024, 1024, 8000, 640, 1024),
        (4096, 11008, 1000, 640, 4096),
        (14336, 4096, 1000, 640, 4096),
        (16384, 18944, 3000, 640, 4096),
    ],
)
def test_plan_has_a_block_for_each_row(build, in_features, out_features, n, threads, claims):
    shape = plan(build, 5, in_features, out_features, n, SM_90_SHARED, 132)
    length = max(in_features, out_features)
    assert not shape["split"] and (shape["grid"], shape["threads"], shape["claims"]) == (5, threads, claims)
    assert shape["listed"] == n
    least = 8 * length + 4 * claims + 12 * n
    assert least <= shape["shared_bytes"] <= least + 8 * (length // 15 + 1)


@needs_cxx
@pytest.mark.parametrize(
    ("in_features", "out_features", "n", "max_shared", "scratch"),
    [
        (28672, 4096, 1000, SM_90_SHARED, 28672 + 4096),
        (32771, 128, 1000, SM_90_SHARED, 81920 + 128),  # a prime
        (14336, 4096, 1000, 99 << 10, 14336 + 4096),
        (4096, 4096, 16384, SM_90_SHARED, 8192),  # more places than fit
        (128, 1 << 27, 1000, SM_90_SHARED, 128 + (1 << 27)),
    ],
)
def test_plan_splits_what_does_not_fit(build, in_features, out_features, n, max_shared, scratch):
    shape = plan(build, 4096, in_features, out_features, n, max_shared, 132)
    assert shape["split"] and shape["scratch"] == scratch and shape["shared_bytes"] <= max_shared
    assert shape["listed"] == min(4096, n)
    assert shape["threads"] == 512 and shape["room"] == min(8192, max(in_features, out_features))
    assert shape["grid"] == max(1, min(132, (1 << 26) // scratch))
    assert plan(build, 3, in_features, out_features, n, max_shared, 132)["grid"] == min(3, shape["grid"])


@needs_cxx
def test_plan_has_an_end(build):
    with pytest.raises(ValueError, match="more than 2\\^27 features"):
        plan(build, 5, 128, (1 << 27) + 1, 5, SM_90_SHARED, 132)
    with pytest.raises(ValueError, match="2\\^30 places or more"):
        plan(build, 5, 1 << 20, 1 << 20, 1 << 30, SM_90_SHARED, 132)
    with pytest.raises(ValueError, match="more rows than a grid has blocks"):
        plan(build, 1 << 31, 128, 128, 5, SM_90_SHARED, 132)


@pytest.mark.parametrize(("case", "dtype"), [run for run in CASES if run[0].max_shared == SM_90_SHARED], ids=str)
def test_operator_on_a_gpu(case, dtype):
    if not has_gpu_kernel("fourier_many_"):
        pytest.skip("no GPU, or an extension without kernels for it")
    if case.y_padding > 1 << 20:
        pytest.skip("gigabytes between the rows, which the emulator looks at")
    s = sample(case, DTYPES[dtype])
    padded = torch.nn.functional.pad(s.x, (case.x_offset, max(case.x_padding, 0))).cuda()
    x = padded[:, case.x_offset :][:, : case.in_features]
    tables, plan = [table.cuda() for table in s.tables.values()], plan_rows(s.adapter.cuda(), SLOTS)
    before = torch.nn.functional.pad(s.y, (case.y_offset, case.y_padding)).cuda()

    def call():
        wide = before.clone()
        y = wide[:, case.y_offset :][:, : case.out_features]
        torch.ops.fastpeft.fourier_many_(y, x, *tables, *plan)
        return [y]

    found = call()[0]
    check(found.cpu(), s)
    assert torch.equal(call()[0], found) and torch.equal(replayed(call)[0], found)
    for t in range(min(case.tokens, 4)):  # alone
        y = s.y[t : t + 1].cuda()
        torch.ops.fastpeft.fourier_many_(y, x[t : t + 1], *tables, *plan_rows(s.adapter[t : t + 1].cuda(), SLOTS))
        assert torch.equal(y, found[t : t + 1])


def test_choice_on_a_gpu():
    if not has_gpu_kernel("fourier_many_"):
        pytest.skip("no GPU, or an extension without kernels for it")
    s = sample(Case(5, 24, 16, 40), torch.bfloat16)
    arena, x = s.tables["arena_spectrum"].cuda(), s.x.cuda()
    assert choose(FOURIER_MANY, x, arena) == "native"
    assert choose(FOURIER_MANY, x, arena.bfloat16()) == "torch" and choose(FOURIER_MANY, x, arena.double()) == "torch"
    with fastpeft.use_backend("native"), pytest.raises(RuntimeError, match="arena_spectrum must be"):
        tables = {**s.tables, "arena_spectrum": arena.bfloat16()}
        fourier_many_(s.y.cuda(), x, *(table.cuda() for table in tables.values()), *plan_rows(s.adapter.cuda(), SLOTS))


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("fourierft_many")
    assert len(kernels) == len(ARCHS) * 2 * len(DTYPES)
    check_figures("fourierft_many", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= (96 if "WholeRow" in kernel.name else 128)
