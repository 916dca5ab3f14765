"""BOFT where every row has its own adapter: its CUDA C++ kernels without a GPU as in test_cuda_boft.py, and on one.

tests/cuda_host/run_boft_many.cpp runs the kernels on the CPU over awkward shapes.
"""

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

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
    rare,
    read_raw,
    replayed,
    write_raw,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpeft
from fastpeft import reference
from fastpeft.ops.boft import butterfly
from fastpeft.ops.boft_many import (
    BOFT_ROTATE_MANY,
    BOFT_SCALE_MANY,
    _by_block,
    _strip_fits,
    boft_reflectors,
    boft_rotate_many,
    boft_scale_many_,
    reflectors_width,
    strip_features,
)
from fastpeft.ops.many import plan_rows

build, compiled, on_the_cpu = fixtures()

ADAPTERS = 3  # in slots 0, 1 and 2; slot 3 has nothing for this layer
SLOTS = ADAPTERS + 1


@dataclass(frozen=True)
class RotateCase:
    """Slot of token t: t modulo all of them and none, or the one that all have."""

    tokens: int
    features: int
    b: int
    factors: int
    same: int | None = None
    padding: int = 0  # elements between the end of a row of x and the next one
    offset: int = 0  # elements of x from a 16-byte boundary
    arena_offset: int = 0
    processors: int = 132
    max_shared: int = SM_90_SHARED

    mode = "rotate"

    @property
    def width(self) -> int:
        return reflectors_width(self.features, self.b, self.factors)

    def __str__(self) -> str:
        shape = f"T{self.tokens}", f"d{self.features}", f"b{self.b}", f"m{self.factors}"
        return "-".join([*shape, *rare(self, 4)])


ROTATE_CASES = [
    RotateCase(1, 8, 2, 1, same=0),
    RotateCase(5, 24, 2, 3),  # strips of 8 features, since 16 do not fit
    RotateCase(70, 48, 2, 4, processors=1),  # tiles of 16 positions, most rows of their own
    RotateCase(5, 5, 1, 1),  # blocks of a single entry, which no rotation moves
    RotateCase(6, 104, 4, 1),
    RotateCase(70, 96, 4, 3, processors=1),
    RotateCase(9, 48, 8, 2),
    RotateCase(70, 96, 8, 2, same=1, processors=1),  # 16 rows of one adapter, in four groups of threads
    RotateCase(70, 88, 8, 1, same=1, processors=1),  # strips of half a vector
    RotateCase(3, 384, 8, 2, processors=1),  # two tiles side by side, the second one narrower
    RotateCase(2, 528, 16, 1),  # a last tile of few strips
    RotateCase(11, 96, 16, 2, processors=2),
    RotateCase(11, 128, 32, 3),
    RotateCase(66, 64, 32, 2, same=2, processors=1),
    RotateCase(2, 1024, 8, 8),  # a single strip
    RotateCase(6, 512, 8, 7, max_shared=9 << 10, processors=0),  # fewer positions, because shared memory is short
    RotateCase(3, 2048, 8, 9, same=0),  # more blocks than threads
    RotateCase(2, 4096, 8, 7, max_shared=9 << 10),  # fewer strips than a sector, likewise
    RotateCase(1, 4096, 8, 4, same=0),
    RotateCase(5, 35, 5, 1),  # odd b, odd strips
    RotateCase(9, 64, 1, 1),
    RotateCase(40, 24, 6, 3, processors=1),  # even b without a kernel of its own
    RotateCase(5, 72, 12, 2),
    RotateCase(7, 48, 8, 2, padding=8),  # rows apart, still aligned
    RotateCase(7, 48, 8, 2, padding=3),  # each with another alignment
    RotateCase(7, 48, 8, 2, padding=-48),  # all rows of x are one
    RotateCase(9, 64, 32, 2, offset=1),  # no row aligned
    RotateCase(70, 96, 8, 2, offset=1, processors=1),
    RotateCase(9, 252, 6, 1),  # rows that are no multiple of 16 bytes
    RotateCase(9, 96, 16, 2, arena_offset=1),
    RotateCase(3, 64, 8, 2, padding=1 << 29),  # offsets beyond 2^31
]


@dataclass(frozen=True)
class ScaleCase:
    tokens: int
    features: int
    bias: bool = True
    same: int | None = None
    padding: int = 0  # elements between the end of a row of y and the next one
    offset: int = 0  # elements of y and the bias from a 16-byte boundary
    arena_offset: int = 0
    processors: int = 132

    mode = "scale"

    @property
    def width(self) -> int:
        return self.features

    def __str__(self) -> str:
        return "-".join([f"T{self.tokens}", f"d{self.features}", *rare(self, 2)])


SCALE_CASES = [
    ScaleCase(1, 1, same=0),
    ScaleCase(6, 37),  # no row but the first is aligned
    ScaleCase(7, 264, bias=False),
    ScaleCase(5, 1032),  # a second tile, most of it missing
    ScaleCase(70, 96, processors=0),  # eight positions to a tile, in two batches
    ScaleCase(70, 40, same=2, processors=0),
    ScaleCase(9, 96, padding=8),
    ScaleCase(9, 96, padding=3),
    ScaleCase(9, 96, offset=1),
    ScaleCase(9, 96, arena_offset=1),
    ScaleCase(3, 64, padding=1 << 29),  # offsets beyond 2^31
]
CASES = [*ROTATE_CASES, *SCALE_CASES]


@dataclass
class Sample:
    x: Tensor  # (T, d): x, or y before
    arena: Tensor
    table: Tensor
    bias: Tensor | None
    adapter: Tensor  # (T,) int32

    def plan(self) -> tuple[Tensor, Tensor]:
        return plan_rows(self.adapter, SLOTS)

    def without(self) -> Tensor:
        """(T,) bool: the rows that have no adapter."""
        return (self.adapter < 0) | (self.adapter >= ADAPTERS)


def sample(case: RotateCase | ScaleCase, dtype: torch.dtype) -> Sample:
    """What is nobody's is NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.features, generator=generator)
    if case.padding < 0:
        x = x[:1].expand(case.tokens, -1)
    arena = torch.full((ADAPTERS + 2, case.width), float("nan"))
    places = torch.randperm(len(arena), generator=generator)[:ADAPTERS]
    if isinstance(case, RotateCase):
        shape = ADAPTERS * case.factors, case.features // case.b, case.b, case.b
        boft_R = torch.randn(shape, generator=generator, dtype=torch.float64)
        arena[places] = boft_reflectors(boft_R, case.factors).float()
        bias = None
    else:
        arena[places] = 1 + torch.randn(ADAPTERS, case.features, generator=generator) / 2
        bias = torch.randn(case.features, generator=generator).to(dtype) if case.bias else None
    numbers = torch.arange(case.tokens, dtype=torch.int32) % (SLOTS + 1) - 1
    adapter = numbers if case.same is None else torch.full_like(numbers, case.same)
    return Sample(x.to(dtype), arena, torch.tensor([*places.tolist(), -1], dtype=torch.int32), bias, adapter)


def composed(case: RotateCase | ScaleCase, of: Sample, rows: Tensor, slots: Tensor) -> Tensor:
    with fastpeft.use_backend("torch"):
        if isinstance(case, RotateCase):
            return boft_rotate_many(of.x, of.arena, of.table, case.factors, case.b, rows, slots)
        y = of.x.clone()
        boft_scale_many_(y, of.bias, of.arena, of.table, rows, slots)
        return y


def exactly(case: RotateCase | ScaleCase, of: Sample) -> Tensor:
    """Slot by slot in float64."""
    result = of.x.double()
    for slot in set(of.adapter.tolist()) & set(range(ADAPTERS)):
        rows, parameters = of.adapter == slot, of.arena[int(of.table[slot])].double()
        if isinstance(case, RotateCase):
            reflectors = _by_block(parameters[None], case.features, case.b, case.factors)[0]
            result[rows] = butterfly(result[rows], reference.boft.reflected_blocks(reflectors, case.b))
        else:
            bias = 0.0 if of.bias is None else of.bias.double()
            result[rows] = (result[rows] - bias) * parameters + bias
    return result


def check(case: RotateCase | ScaleCase, found: Tensor, of: Sample) -> None:
    """Against float64, with twice the error that the composition has; rows without an adapter by their bits."""
    exact, by_torch = exactly(case, of), composed(case, of, *of.plan())
    error, allowed = (found.double() - exact).norm(), 2 * (by_torch.double() - exact).norm()
    assert error <= allowed, f"error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"
    assert torch.equal(found[of.without()], of.x[of.without()])


def run(build, tmp_path, case: RotateCase | ScaleCase, of: Sample, rows: Tensor, slots: Tensor) -> Tensor:
    names = {dtype: name for name, dtype in DTYPES.items()}
    files = {"x": of.x, "arena": of.arena, "table": of.table, "bias": of.bias, "rows": rows, "slots": slots}
    numbers = {
        **{name: value for name, value in vars(case).items() if isinstance(value, int)},
        "tokens": len(of.x),
        "stride": case.features + case.padding,
        "arena_rows": len(of.arena),
        "count": len(of.table),
        "seeds": 4,  # threads in ascending order, in descending order, and twice in a random one
    }
    command = [build("run_boft_many"), case.mode, names[of.x.dtype]]
    command += [f"{name}={int(number)}" for name, number in numbers.items() if name not in ("bias", "same", "padding")]
    for name, tensor in files.items():
        if tensor is not None:
            write_raw(tmp_path / name, tensor)
            command.append(f"{name}={tmp_path / name}")
    command.append(f"result={tmp_path / 'result'}")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return read_raw(tmp_path / "result", of.x.shape, of.x.dtype)


# Which two bytes x has matters only where they are widened and rounded.
RUNS = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16")]
RUNS += [(case, "float16") for case in (ROTATE_CASES[1], ROTATE_CASES[6], ROTATE_CASES[-5], *SCALE_CASES[1:3])]


@needs_cxx
@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_kernel_matches_float64(build, tmp_path, case, dtype):
    of = sample(case, DTYPES[dtype])
    check(case, run(build, tmp_path, case, of, *of.plan()), of)


@needs_cxx
@pytest.mark.parametrize("case", [SCALE_CASES[3], SCALE_CASES[2]], ids=str)
def test_a_scale_of_one_changes_nothing(build, tmp_path, case):
    of = sample(case, torch.bfloat16)
    of.arena.fill_(1.0)
    assert torch.equal(run(build, tmp_path, case, of, *of.plan()), of.x)


ALONE = [
    RotateCase(45, 96, 8, 2, processors=1),
    RotateCase(45, 128, 32, 2, processors=1),
    RotateCase(45, 48, 2, 3, processors=1),
    RotateCase(45, 48, 6, 2, processors=1),
    ScaleCase(45, 96, processors=0),
]


@needs_cxx
@pytest.mark.parametrize("case", ALONE, ids=str)
def test_bits_of_a_row_do_not_depend_on_its_neighbours(build, tmp_path, case):
    """Beside other rows of its adapter and of others, alone, and however the launch is cut."""
    of = sample(case, torch.float32)
    of.adapter[5:30] = 1
    together = run(build, tmp_path, case, of, *of.plan())
    for rows in ([0], [3], [7], [2, 9, 11, 40], list(range(44, 20, -1))):
        part = replace(of, x=of.x[rows], adapter=of.adapter[rows])
        for processors in (0, 132):
            found = run(build, tmp_path, replace(case, processors=processors), part, *part.plan())
            assert torch.equal(found, together[rows])


HOSTILE = [RotateCase(6, 48, 8, 2), RotateCase(6, 48, 8, 2, processors=0), RotateCase(6, 35, 5, 1), ScaleCase(6, 40)]


@needs_cxx
@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_numbers_that_name_nothing(build, tmp_path, case):
    """Slots outside of the table and row numbers outside of x are nobody's, and rows that nobody names stay."""
    of = sample(case, torch.bfloat16)
    rows = torch.tensor([4, -1, 6, 1, 3, 1 << 30], dtype=torch.int32)
    slots = torch.tensor([0, 0, 0, -(1 << 31), SLOTS, 0], dtype=torch.int32)
    found = run(build, tmp_path, case, of, rows, slots)
    whole = replace(of, adapter=torch.tensor([-1, -1, -1, -1, 0, -1], dtype=torch.int32))
    check(case, found, whole)
    nothing = replace(of, arena=of.arena[:0], table=of.table[:0])
    assert torch.equal(run(build, tmp_path, case, nothing, rows, slots), of.x)


@needs_cxx
@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_kernel_reads_nothing_outside_of_broken_tables(build, tmp_path, case):
    """The buffers end where the tensors end, so AddressSanitizer sees it."""
    for bad in (-2, ADAPTERS + 2, 1 << 30, -(1 << 31)):
        of = sample(replace(case, same=None), torch.bfloat16)
        of.table[0] = bad
        right = replace(of, adapter=torch.where(of.adapter == 0, -1, of.adapter))
        found = run(build, tmp_path, case, of, *of.plan())
        touched = of.adapter != 0
        assert torch.equal(found[touched], run(build, tmp_path, case, right, *right.plan())[touched])


def plan(build, mode: str, dtype: str, **numbers: int) -> dict:
    command = [build("run_boft_many"), f"plan_{mode}", dtype, *(f"{name}={value}" for name, value in numbers.items())]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


def rotate_plan(build, tokens: int, features: int, b: int, factors: int, **changed: int) -> dict:
    numbers = {"tokens": tokens, "features": features, "b": b, "factors": factors}
    return plan(build, "rotate", "bfloat16", **{**numbers, "processors": 132, "max_shared": SM_90_SHARED, **changed})


@needs_cxx
@pytest.mark.parametrize("b", [2, 4, 8, 16, 32, 48])
@pytest.mark.parametrize("factors", [1, 5])
def test_rotate_plan_covers_x_and_fits(build, b, factors):
    window = b << (factors - 1)
    for tokens in (1, 6, 100, 3000):
        for features, max_shared in ((window, SM_90_SHARED), (7 * window, 48 << 10), (64 * window, SM_90_SHARED)):
            shape = rotate_plan(build, tokens, features, b, factors, max_shared=max_shared)
            threads = shape["block"][0]
            assert threads % 32 == 0 and threads <= 256 and shape["block"][1] == 1
            assert shape["shared_bytes"] <= max_shared
            strips = features // strip_features(features, b, factors)
            assert shape["strips"] * shape["across"] >= strips > shape["strips"] * (shape["across"] - 1)
            groups = shape["grid"] // shape["across"]
            assert shape["positions"] * groups >= tokens > shape["positions"] * (groups - 1)
            assert shape["positions"] == 1 or shape["grid"] >= 4 * 132


@needs_cxx
def test_rotate_plan_reads_whole_sectors(build):
    def shape(tokens, b=8, factors=4):
        found = rotate_plan(build, tokens, 4096, b, factors)
        return found["positions"], found["strips"], found["grid"]

    assert [shape(tokens) for tokens in (1, 8, 16, 128, 2048)] == [
        (1, 8, 8),
        (1, 8, 64),
        (1, 8, 128),
        (1, 8, 1024),
        (16, 8, 1024),
    ]
    assert [shape(tokens, 4, 2) for tokens in (1, 16)] == [(1, 8, 32), (1, 16, 256)]


@needs_cxx
def test_rotate_plan_refuses_a_strip_that_does_not_fit(build):
    fitting = {(8, 13, SM_80_SHARED), (8, 13, SM_90_SHARED), (3, 1, 300)}
    for b, factors, max_shared in (*fitting, (8, 14, SM_90_SHARED), (60000, 1, SM_90_SHARED), (75, 1, 307)):
        features = b << (factors - 1)
        assert _strip_fits(features, factors, b, max_shared) == ((b, factors, max_shared) in fitting)
        if (b, factors, max_shared) in fitting:
            rotate_plan(build, 3, features, b, factors, max_shared=max_shared)
            continue
        with pytest.raises(ValueError, match="a row of one strip does not fit the shared memory"):
            rotate_plan(build, 3, features, b, factors, max_shared=max_shared)


@needs_cxx
@pytest.mark.parametrize("packed", [0, 1])
def test_scale_plan_covers_y(build, packed):
    for tokens, features in ((1, 8), (64, 4096), (4097, 4096), (100, 40000)):
        numbers = {"tokens": tokens, "features": features, "processors": 132, "packed": packed}
        shape = plan(build, "scale", "bfloat16", **numbers)
        width = 128 * (8 if packed else 1)
        assert width * shape["across"] >= features > width * (shape["across"] - 1)
        groups = shape["grid"] // shape["across"]
        assert shape["positions"] * groups >= tokens > shape["positions"] * (groups - 1)
        assert shape["positions"] == 1 or shape["grid"] >= 16 * 132


def bank_degrees(
    build, dtype: str, tokens: int, features: int, b: int, factors: int, processors: int, offset=0
) -> dict:
    arguments = dtype, tokens, features, b, factors, processors, offset
    command = [build("run_boft_many_banks", watched=True), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@needs_cxx
@pytest.mark.parametrize("features", [256, 1024])
@pytest.mark.parametrize(("b", "factors"), [(2, 8), (2, 4), (4, 7), (4, 2), (8, 6), (8, 4), (16, 5), (16, 2), (32, 4)])
def test_few_bank_conflicts(build, b, factors, features):
    """One row, and tiles of 16 positions: a warp meets no bank more than twice, or four times in pairs of features."""
    for tokens, processors in ((1, 132), (64, 1)):
        degrees = bank_degrees(build, "float32", tokens, features, b, factors, processors)
        assert max(degrees.values()) <= (4 if b == 2 else 2), degrees


@pytest.mark.parametrize("arena_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("window", [64, 1 << 16])
def test_what_kernels_do_not_take_goes_to_the_composition(monkeypatch, window, arena_dtype):
    """On a GPU whose tensors are fakes: arenas that are not float32, and windows that do not fit."""
    called = []

    def composed(*args):
        raise NotImplementedError("the composition")

    for operator in (BOFT_ROTATE_MANY, BOFT_SCALE_MANY):
        monkeypatch.setattr(operator, "compiled_for", ["cuda"])
        monkeypatch.setattr(operator, "_chosen", {})
        monkeypatch.setattr(operator, "call", lambda lane, *args, name=operator.name: called.append(name))
    monkeypatch.setattr(fastpeft.ops.boft_many, "_rows_of", composed)
    monkeypatch.setattr(fastpeft.backend, "extension", fastpeft)
    monkeypatch.setattr(fastpeft.backend, "_shared_memory", lambda device: SM_90_SHARED)
    factors = (window // 8).bit_length()
    with FakeTensorMode(), torch.device("cuda"):
        x, table = torch.empty(3, window, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int32)
        widths = reflectors_width(window, 8, factors), window
        reflectors, scale = (torch.empty(1, width, dtype=arena_dtype) for width in widths)
        plan = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        with suppress(NotImplementedError):
            boft_rotate_many(x, reflectors, table, factors, 8, *plan)
        with suppress(NotImplementedError):
            boft_scale_many_(x, None, scale, table, *plan)
    taken = arena_dtype == torch.float32
    assert called == ["boft_rotate_many"] * (taken and window == 64) + ["boft_scale_many_"] * taken


def on_gpu_call(case: RotateCase | ScaleCase, of: Sample, plan: Sequence[Tensor]):
    """A call of the operator on the GPU, with strides and alignment as the case has them."""
    x = torch.nn.functional.pad(of.x, (case.offset, max(case.padding, 0))).cuda()
    arena = torch.nn.functional.pad(of.arena.flatten(), (case.arena_offset, 0)).cuda()
    arena = arena[case.arena_offset :].view_as(of.arena)
    tables = arena, of.table.cuda()
    bias = None if of.bias is None else of.bias.cuda()
    plan = [tensor.cuda() for tensor in plan]

    def call():
        rows = x.clone()[:, case.offset :][:, : case.features]
        if isinstance(case, ScaleCase):
            torch.ops.fastpeft.boft_scale_many_(rows, bias, *tables, *plan)
            return [rows]
        return [torch.ops.fastpeft.boft_rotate_many(rows, *tables, case.factors, case.b, *plan)]

    return call


GPU_CASES = [case for case in CASES if case.padding < 1 << 20 and getattr(case, "max_shared", 0) != 9 << 10]
GPU_CASES += [RotateCase(16, 4096, 8, 4), RotateCase(2000, 1024, 8, 4), RotateCase(2000, 1024, 2, 3)]
GPU_CASES += [ScaleCase(4097, 4096)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_operators_on_a_gpu(case, dtype):
    if not has_gpu_kernel("boft_rotate_many"):
        pytest.skip("no GPU, or an extension without kernels for it")
    of = sample(case, DTYPES[dtype])
    call = on_gpu_call(case, of, of.plan())
    found = call()[0]
    check(case, found.cpu(), of)
    for again in (call(), replayed(call)):
        assert torch.equal(again[0], found)
    for t in (0, case.tokens // 2, case.tokens - 1):
        alone = replace(of, x=of.x[t : t + 1], adapter=of.adapter[t : t + 1])
        assert torch.equal(on_gpu_call(case, alone, alone.plan())()[0][0], found[t])


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_hostile_numbers_on_a_gpu(case):
    if not has_gpu_kernel("boft_rotate_many"):
        pytest.skip("no GPU, or an extension without kernels for it")
    of = sample(case, torch.float32)
    rows = torch.tensor([4, -1, 6, 1, 3, 1 << 30], dtype=torch.int32)
    slots = torch.tensor([0, 0, 0, -(1 << 31), SLOTS, 1], dtype=torch.int32)
    found = on_gpu_call(case, of, (rows, slots))()[0].cpu()
    check(case, found, replace(of, adapter=torch.tensor([-1, -1, -1, -1, 0, -1], dtype=torch.int32)))
    of.table[1] = 1 << 30
    assert torch.equal(on_gpu_call(case, of, (rows, slots))()[0].cpu(), found)


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("boft_many")
    rotations = [kernel for kernel in kernels if "boft_rotate_many_kernel" in kernel.name]
    scales = [kernel for kernel in kernels if "boft_scale_many_kernel" in kernel.name]
    assert len(rotations) == len(ARCHS) * len(["0", "2", "4", "8", "16", "32"])
    assert len(scales) == len(ARCHS) * len(DTYPES) and len(kernels) == len(rotations) + len(scales)
    check_figures("boft_many", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        wide = any(f"ILi{b}E" in kernel.name for b in (16, 32))
        # Two blocks of 256 threads, or of 128 where blocks of Q are wide; eight of 128.
        assert kernel.registers <= ((255 if wide else 128) if kernel in rotations else 64)
