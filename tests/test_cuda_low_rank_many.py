"""Decoding with many adapters in a batch: the operator, and its CUDA C++ kernel without a GPU as in test_cuda_boft.py.

tests/cuda_host/run_low_rank_many.cpp runs the kernel on the CPU over awkward shapes.
"""

import json
import subprocess
from dataclasses import dataclass

import pytest
import torch
from cuda_build import (
    ARCHS,
    DTYPES,
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
from fastpeft.ops.low_rank_many import (
    LOW_RANK_MANY,
    ManyAdapters,
    check_tables,
    low_rank_many,
    low_rank_many_,
    pack_lora,
    pack_mos,
)
from fastpeft.ops.many import plan_rows

build, compiled, on_the_cpu = fixtures()


@dataclass(frozen=True)
class Case:
    """Adapter of token t: t modulo what is between −1 and the number of ranks, or the one that all have."""

    tokens: int
    in_features: int
    out_features: int
    ranks: tuple[int, ...]
    shards: int = 1  # of a vector
    same: int | None = None
    x_padding: int = 0  # elements between the end of a row of x and the next one
    y_padding: int = 0
    x_offset: int = 0  # elements from a 16-byte boundary
    y_offset: int = 0
    A_offset: int = 0
    B_offset: int = 0
    processors: int = 132

    def __str__(self) -> str:
        ranks = ".".join(map(str, self.ranks))
        return "-".join([f"T{self.tokens}", f"{self.in_features}to{self.out_features}", f"r{ranks}", *rare(self, 4)])


CASES = [
    Case(1, 1, 1, (1,), same=0),
    Case(3, 5, 37, (3, 0)),  # nothing to read 16 bytes of
    Case(17, 37, 100, (0, 1, 3, 8, 16)),  # rows of float32 of B are packed, those of A are not
    Case(6, 64, 64, (1, 3, 8, 16)),
    Case(4, 100, 5, (16, 3)),
    Case(5, 64, 64, (3,), same=0, processors=1),
    Case(1, 4096, 4096, (16,), same=0),
    Case(3, 4096, 64, (8, 1)),
    Case(2, 64, 4096, (8,), same=0, processors=4),
    Case(2, 16, 4160, (3,), same=0, processors=1),  # more outputs than one range can have
    Case(3, 64, 96, (16, 300)),  # a second slice of the rank
    Case(1, 37, 41, (300,), same=0),
    Case(1, 8208, 64, (17,), same=0),  # a second chunk of x
    Case(1, 8197, 24, (257,), same=0),  # and both, nothing aligned
    Case(5, 64, 64, (3, 8, 1), shards=2),  # shards that stand in several places
    Case(3, 96, 160, (16, 5, 0), shards=4),
    Case(3, 4096, 512, (7, 8), shards=8),
    Case(3, 60, 36, (16, 3), shards=12),  # shards of 5 and of 3
    Case(1, 16400, 32, (18,), shards=2, same=0),  # a shard over two chunks
    Case(3, 64, 64, (8, 3), x_padding=8, y_padding=8),
    Case(3, 64, 64, (8, 3), x_padding=3, y_padding=3),
    Case(3, 64, 64, (8, 3), x_padding=-64),  # all rows of x are one
    Case(3, 64, 64, (8, 3), x_offset=1, y_offset=1),
    Case(3, 64, 72, (8, 3), A_offset=1),
    Case(3, 64, 72, (8, 3), B_offset=1, shards=2),
    Case(3, 64, 32, (3, 1), same=1, y_padding=1 << 30),  # offsets beyond 2^31
]
# Of x and y, and of the adapters. Which two bytes they are matters only where they are widened and rounded.
DTYPE_PAIRS = [("float32", "float32"), ("bfloat16", "bfloat16")]
RARE_DTYPE_PAIRS = [
    ("float16", "float16"),
    ("bfloat16", "float32"),
    ("float32", "bfloat16"),
    ("float16", "bfloat16"),
    ("bfloat16", "float16"),
]
RUNS = [(case, dtypes) for case in CASES for dtypes in DTYPE_PAIRS]
RUNS += [(case, dtypes) for case in (CASES[1], CASES[3], CASES[15]) for dtypes in RARE_DTYPE_PAIRS]


def sample(case: Case, dtype: torch.dtype, shard_dtype: torch.dtype) -> tuple[Tensor, Tensor, ManyAdapters, Tensor]:
    """x, y before, the tables, and the adapters of the rows."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size):
        return torch.randn(size, generator=generator)

    slots, r_max, per_row = len(case.ranks), max(case.ranks), case.shards
    vectors = sum(case.ranks) * per_row
    counts = [vectors, vectors] if per_row == 1 else [vectors // 2 + 1, vectors // 3 + 1]
    # What is beyond a rank is not to be read.
    used = torch.arange(r_max) < torch.tensor(case.ranks)[:, None]
    indices = [torch.full((slots, r_max, per_row), 1 << 30, dtype=torch.int32) for _ in counts]
    for index, count in zip(indices, counts, strict=True):
        where = torch.randint(count, (vectors,), generator=generator, dtype=torch.int32)
        index[used] = (where if per_row > 1 else torch.randperm(count, generator=generator).int()).view(-1, per_row)
    rank, scaling = torch.tensor(case.ranks, dtype=torch.int32), torch.linspace(0.5, 2.0, slots)
    arena_A = (randn(counts[0], case.in_features // per_row) / case.in_features**0.5).to(shard_dtype)
    arena_B = randn(counts[1], case.out_features // per_row).to(shard_dtype)
    tables = ManyAdapters(arena_A, indices[0], arena_B, indices[1], rank, scaling)
    check_tables(tables)
    numbers = torch.arange(case.tokens, dtype=torch.int32) % (len(case.ranks) + 1) - 1
    adapter = numbers if case.same is None else torch.full_like(numbers, case.same)
    if case.tokens == 17:  # numbers that are no adapter's
        adapter[5], adapter[6] = len(case.ranks), -7
    x = randn(case.tokens, case.in_features)
    if case.x_padding < 0:
        x = x[:1].expand(case.tokens, -1)
    return x.to(dtype), randn(case.tokens, case.out_features).to(dtype), tables, adapter


def dense(x: Tensor, y: Tensor, tables: ManyAdapters, adapter: Tensor) -> Tensor:
    """In float64, row by row."""
    result = y.double()
    for t, slot in enumerate(adapter.tolist()):
        if 0 <= slot < len(tables.scaling):
            A, B_transposed = (part.double() for part in tables.vectors(slot))
            result[t] += float(tables.scaling[slot]) * (A @ x[t].double()) @ B_transposed
    return result


def untouched(tables: ManyAdapters, adapter: Tensor) -> Tensor:
    ranks = tables.rank.tolist()
    return torch.tensor([not 0 <= number < len(ranks) or ranks[number] == 0 for number in adapter.tolist()])


def check(found: Tensor, x: Tensor, y: Tensor, tables: ManyAdapters, adapter: Tensor) -> None:
    """Against float64, with twice the error that the composition has."""
    exact, composed = dense(x, y, tables, adapter), y.clone()
    with fastpeft.use_backend("torch"):
        low_rank_many_(composed, x, *tables, *plan_rows(adapter, len(tables.rank)))
    error, allowed = (found.double() - exact).norm(), 2 * (composed.double() - exact).norm() + 1e-7 * exact.norm()
    assert error <= allowed, f"error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"
    alone = untouched(tables, adapter)
    assert torch.equal(found[alone], y[alone])


def run(build, tmp_path, case: Case, x, y, tables: ManyAdapters, adapter) -> Tensor:
    names = {dtype: name for name, dtype in DTYPES.items()}
    rows, slots = plan_rows(adapter, len(case.ranks))
    if case.tokens == 17:  # slots that are not there, and rows
        slots[-1], slots[-2], rows[-3] = len(case.ranks), -7, 17
    files = {"x": x, "y": y, **tables._asdict(), "rows": rows, "slots": slots}
    numbers = {
        "tokens": case.tokens,
        "in": case.in_features,
        "out": case.out_features,
        "per_row": case.shards,
        "count_A": len(tables.arena_A),
        "count_B": len(tables.arena_B),
        "r_max": max(case.ranks),
        "count": len(case.ranks),
        "processors": case.processors,
        "seeds": 4,  # threads in ascending order, in descending order, and twice in a random one
        "x_stride": case.in_features + case.x_padding,
        "y_stride": case.out_features + case.y_padding,
        **{name: getattr(case, name) for name in ("x_offset", "y_offset", "A_offset", "B_offset")},
    }
    command = [build("run_low_rank_many"), "run", names[x.dtype], names[tables.arena_A.dtype]]
    command += [f"{name}={number}" for name, number in numbers.items()]
    for name, tensor in files.items():
        if tensor is not None:
            write_raw(tmp_path / name, tensor)
            command.append(f"{name}={tmp_path / name}")
    command.append(f"result={tmp_path / 'result'}")
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return read_raw(tmp_path / "result", y.shape, y.dtype)


@needs_cxx
@pytest.mark.parametrize(("case", "dtypes"), RUNS, ids=str)
def test_kernel_matches_float64(build, tmp_path, case, dtypes):
    x, y, tables, adapter = sample(case, *(DTYPES[name] for name in dtypes))
    check(run(build, tmp_path, case, x, y, tables, adapter), x, y, tables, adapter)


@needs_cxx
@pytest.mark.parametrize("broken", ["index_A", "index_B", "rank", "past"])
def test_kernel_reads_nothing_outside_of_broken_tables(build, tmp_path, broken):
    """The buffers end where the tensors end, so AddressSanitizer sees it."""
    case = Case(3, 64, 64, (8, 3), shards=2)
    x, y, tables, adapter = sample(case, torch.bfloat16, torch.bfloat16)
    if broken.startswith("index"):
        getattr(tables, broken)[::2] = 1 << 30
        getattr(tables, broken)[1::2] = -5
    elif broken == "rank":
        tables.rank.copy_(torch.tensor([-(1 << 31), -1]))
    else:
        tables.rank.copy_(torch.tensor([9, 1 << 30]))
    found = run(build, tmp_path, case, x, y, tables, adapter)
    if broken == "rank":
        assert torch.equal(found, y)


def plan(build, *numbers: int) -> dict:
    command = [str(part) for part in (build("run_low_rank_many"), "plan", *numbers)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@needs_cxx
@pytest.mark.parametrize("shard_bytes", [2, 4])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 4097), (4096, 4096), (4096, 14336), (14336, 4096)], ids=str)
def test_plan_covers_y(build, sizes, shard_bytes):
    in_features, out_features = sizes
    width = 16 // shard_bytes
    for tokens in (1, 16, 64, 1000):
        shape = plan(build, tokens, in_features, out_features, shard_bytes, 132)
        assert shape["grid"] == tokens * shape["ranges"]
        assert shape["outputs"] * shape["ranges"] >= out_features > shape["outputs"] * (shape["ranges"] - 1)
        assert shape["outputs"] % (32 * width) == 0 and shape["outputs"] <= 512 * width
        assert shape["shared_bytes"] <= 48 << 10  # no kernel has to ask for it
        fewest = -(-out_features // (512 * width))
        assert shape["ranges"] == fewest or shape["grid"] <= 132


@needs_cxx
def test_plan_fills_the_processors(build):
    assert [plan(build, tokens, 4096, 4096, 2, 132)["ranges"] for tokens in (1, 16, 64, 128)] == [8, 8, 2, 1]


@pytest.mark.parametrize(("case", "dtypes"), [run for run in RUNS if run[0].y_padding < 1 << 20], ids=str)
def test_operator_on_a_gpu(case, dtypes):
    if not has_gpu_kernel("low_rank_many_"):
        pytest.skip("no GPU, or an extension without kernels for it")
    x, y, tables, adapter = sample(case, *(DTYPES[name] for name in dtypes))
    padded = torch.nn.functional.pad(x, (case.x_offset, max(case.x_padding, 0))).cuda()
    on_gpu = ManyAdapters(*(tensor.cuda() for tensor in tables))
    x_gpu = padded[:, case.x_offset :][:, : case.in_features]
    plan_gpu = plan_rows(adapter.cuda(), len(case.ranks))

    def call():
        result = y.cuda()
        torch.ops.fastpeft.low_rank_many_(result, x_gpu, *on_gpu, *plan_gpu)
        return result

    found = call()
    check(found.cpu(), x, y, tables, adapter)
    # A graph may not copy from the host: y is there before.
    result = y.cuda()

    def again():
        fresh = result.clone()
        torch.ops.fastpeft.low_rank_many_(fresh, x_gpu, *on_gpu, *plan_gpu)
        return [fresh]

    assert torch.equal(call(), found) and torch.equal(replayed(again)[0], found)


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("low_rank_many")
    assert len(kernels) == len(ARCHS) * len(DTYPES)
    check_figures("low_rank_many", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= 128  # a thread block of 512 threads


def lora_adapters(dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(r, 12, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(10, r, generator=generator, dtype=torch.float64).to(dtype),
            0.5 + r,
        )
        for r in (4, 0, 1, 7)
    ]


def base_layer(dtype: torch.dtype, in_features: int = 12, out_features: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = (2, 5, in_features), (out_features, in_features), (out_features,)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)


NUMBERS = torch.tensor([[0, -1, 3, 3, 2], [1, 0, 9, -1, 3]], dtype=torch.int32, device="cpu")


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_lora_adapters_in_one_batch(backend):
    adapters, (x, weight, bias) = lora_adapters(torch.float64), base_layer(torch.float64)
    with fastpeft.use_backend(backend):
        y = low_rank_many(x, weight, bias, pack_lora(adapters), NUMBERS)
        delta = low_rank_many(x, None, None, pack_lora(adapters), NUMBERS)
    for place, number in zip([(i, j) for i in range(2) for j in range(5)], NUMBERS.flatten().tolist(), strict=True):
        alone = torch.nn.functional.linear(x, weight, bias)[place]
        if not 0 <= number < len(adapters):
            assert torch.equal(y[place], alone) and not delta[place].any()
            continue
        expected = reference.lora.lora_linear(x[place], weight, bias, *adapters[number])
        torch.testing.assert_close(y[place], expected)
        torch.testing.assert_close(delta[place], expected - alone)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_mos_adapters_in_one_batch(backend):
    generator = torch.Generator().manual_seed(2)
    shared, other = (
        [torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (4, 5)] for n in (6, 3)
    )
    adapters = []
    for (pool_A, pool_B), r in ((shared, 4), (other, 2), (shared, 3), (shared, 0)):
        pools = [(pool, torch.randint(len(pool), (r, 3), generator=generator)) for pool in (pool_A, pool_B)]
        adapters.append((*pools[0], *pools[1], 0.5 + r))
    packed = pack_mos(adapters)
    assert packed.arena_A.shape == (9, 4) and packed.arena_B.shape == (9, 5)  # a shared pool is there once
    assert packed.rank.tolist() == [4, 2, 3, 0] and packed.index_A.shape == (4, 4, 3)
    x, weight, bias = base_layer(torch.float64, 12, 15)
    with fastpeft.use_backend(backend):
        y = low_rank_many(x, weight, bias, packed, NUMBERS)
    for place, number in zip([(i, j) for i in range(2) for j in range(5)], NUMBERS.flatten().tolist(), strict=True):
        expected = torch.nn.functional.linear(x, weight, bias)[place]
        if 0 <= number < len(adapters) and len(adapters[number][1]) > 0:
            expected = reference.mos.mos_linear(x[place], weight, bias, *adapters[number])
        torch.testing.assert_close(y[place], expected)


def test_a_layer_on_a_gpu():
    if not has_gpu_kernel("low_rank_many_"):
        pytest.skip("no GPU, or an extension without kernels for it")
    packed, (x, weight, bias) = pack_lora(lora_adapters(torch.bfloat16)), base_layer(torch.float32)
    on_gpu = ManyAdapters(*(tensor.cuda() for tensor in packed))
    arguments = [tensor.cuda() for tensor in (x, weight, bias)]
    expected = low_rank_many(x, weight, bias, packed, NUMBERS)
    assert LOW_RANK_MANY.choose(arguments[0], on_gpu.arena_A) == "native"
    y = low_rank_many(*arguments, on_gpu, NUMBERS.cuda())
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-4)
    # Features that are not side by side, and numbers that are not either.
    x = arguments[0].mT.contiguous().mT
    numbers = NUMBERS.cuda().T.contiguous().T
    assert torch.equal(low_rank_many(x[0], *arguments[1:], on_gpu, numbers[0]), y[0])


@pytest.mark.parametrize("dtypes", [*DTYPE_PAIRS, *RARE_DTYPE_PAIRS], ids=str)
def test_composition_rounds_once(dtypes):
    dtype, shard_dtype = (DTYPES[name] for name in dtypes)
    packed = pack_lora(lora_adapters(shard_dtype))
    x, weight, bias = base_layer(dtype)
    y = low_rank_many(x, weight, bias, packed, NUMBERS)
    assert y.dtype == dtype and y.shape == (2, 5, 10)
    before = torch.nn.functional.linear(x, weight, bias)
    exact = dense(x.flatten(0, 1), before.flatten(0, 1), packed, NUMBERS.flatten()).view_as(y)
    # Half a unit for the rounding, and in float32 one for each term of the two sums, on what is added up.
    sizes = packed._replace(arena_A=packed.arena_A.abs(), arena_B=packed.arena_B.abs(), scaling=packed.scaling.abs())
    added = dense(x.abs().flatten(0, 1), before.abs().flatten(0, 1), sizes, NUMBERS.flatten()).view_as(y)
    terms = x.shape[-1] + packed.arena_A.shape[0] + 3  # and the base product, the scaling, the conversion
    allowed = torch.finfo(dtype).eps / 2 * exact.abs() + terms * torch.finfo(torch.float32).eps / 2 * added
    assert ((y.double() - exact).abs() <= allowed).all()


def test_no_rows_and_autocast():
    packed, (x, weight, bias) = pack_lora(lora_adapters(torch.float32)), base_layer(torch.float32)
    empty = low_rank_many(x[:0], weight, bias, packed, NUMBERS[:0])
    assert empty.shape == (0, 5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank_many(x, weight, bias, packed, NUMBERS)
    short = [tensor.bfloat16() for tensor in (x, weight, bias)]
    assert torch.equal(y, low_rank_many(*short, packed, NUMBERS))


def test_what_is_packed():
    adapters = lora_adapters(torch.bfloat16)
    packed = pack_lora([(A.requires_grad_(), B, s) for A, B, s in adapters])
    assert not packed.arena_A.requires_grad
    assert (packed.in_features, packed.out_features) == (12, 10)
    assert packed.arena_A.dtype == torch.bfloat16 and packed.arena_A.shape == (12, 12)
    for slot, (A, B, _) in enumerate(adapters):
        found = packed.vectors(slot)
        assert torch.equal(found[0], A) and torch.equal(found[1], B.T)
    torch.testing.assert_close(packed.scaling, torch.tensor([4.5, 0.5, 1.5, 7.5]))


def test_operator_has_a_schema_and_a_fake():
    schema = torch.ops.fastpeft.low_rank_many_.default._schema
    assert [argument.name for argument in schema.arguments if argument.alias_info] == ["y"] and not schema.returns
    packed = pack_lora(lora_adapters(torch.float32))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in packed]
        y, x = torch.empty(3, 10), torch.empty(3, 12)
        plan = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        assert torch.ops.fastpeft.low_rank_many_(y, x, *fake, *plan) is None


def test_bad_tables():
    adapters = lora_adapters(torch.float32)
    A, B, s = adapters[0]
    with pytest.raises(ValueError, match="adapters must hold at least one adapter, got none"):
        pack_lora([])
    with pytest.raises(ValueError, match="adapters must hold at least one adapter, got none"):
        pack_mos([])
    with pytest.raises(ValueError, match=r"lora_A of adapter 1 must have shape \(r, 12\), got \(4, 11\)"):
        pack_lora([(A, B, s), (A[:, 1:], B, s)])
    with pytest.raises(ValueError, match=r"lora_B of adapter 0 must have shape \(10, 4\), got \(10, 3\)"):
        pack_lora([(A, B[:, 1:], s)])
    with pytest.raises(TypeError, match=r"lora_B of adapter 1 must have the dtype of the first adapter"):
        pack_lora([(A, B, s), (A, B.half(), s)])
    pool, index = torch.zeros(3, 4), torch.tensor([[0, 2], [1, 3]])
    with pytest.raises(ValueError, match=r"index_B of adapter 0 must hold shard numbers in \[0, 3\), got \[0, 3\]"):
        pack_mos([(pool, index.clamp(max=2), pool, index, s)])
    with pytest.raises(ValueError, match=r"index_B of adapter 0 must have shape \(2, 2\), got \(2, 1\)"):
        pack_mos([(pool, index.clamp(max=2), pool, index[:, :1], s)])
    packed = pack_lora(adapters)
    with pytest.raises(ValueError, match=r"rank must lie in \[0, 7\], got \[0, 8\]"):
        check_tables(packed._replace(rank=torch.tensor([4, 0, 1, 8], dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"index_A must hold shard numbers in \[0, 12\), got \[0, 12\]"):
        check_tables(packed._replace(index_A=packed.index_A + packed.index_A.eq(11)))
    with pytest.raises(TypeError, match=r"rank must be int32, got torch\.int64"):
        check_tables(packed._replace(rank=packed.rank.long()))
    with pytest.raises(TypeError, match=r"scaling must be float32, got torch\.float64"):
        check_tables(packed._replace(scaling=packed.scaling.double()))
    with pytest.raises(ValueError, match="arena_A must be contiguous"):
        check_tables(packed._replace(arena_A=packed.arena_A.T.contiguous().T))


def test_bad_arguments():
    packed, (x, weight, bias) = pack_lora(lora_adapters(torch.float32)), base_layer(torch.float32)
    with pytest.raises(ValueError, match=r"adapter must have shape \(2, 5\), got \(5,\)"):
        low_rank_many(x, weight, bias, packed, NUMBERS[0])
    with pytest.raises(TypeError, match=r"adapter must be int32, got torch\.int64"):
        low_rank_many(x, weight, bias, packed, NUMBERS.long())
    with pytest.raises(ValueError, match=r"x must have shape \(..., 12\), got \(2, 5, 11\)"):
        low_rank_many(x[..., 1:], weight, bias, packed, NUMBERS)
    with pytest.raises(ValueError, match=r"weight must have shape \(10, 12\), got \(10, 11\)"):
        low_rank_many(x, weight[:, 1:], bias, packed, NUMBERS)
    for name, arguments in (
        ("x", (x.clone().requires_grad_(), weight, bias, packed)),
        ("weight", (x, weight.clone().requires_grad_(), bias, packed)),
        ("arena_B", (x, weight, bias, packed._replace(arena_B=packed.arena_B.clone().requires_grad_()))),
    ):
        with pytest.raises(ValueError, match=f"{name} must not require a gradient, got requires_grad=True"):
            low_rank_many(*arguments, NUMBERS)
        with torch.no_grad():
            low_rank_many(*arguments, NUMBERS)
    with (
        fastpeft.use_backend("triton"),
        pytest.raises(RuntimeError, match="low_rank_many_ has only native, torch"),
    ):
        low_rank_many(x, weight, bias, packed, NUMBERS)
