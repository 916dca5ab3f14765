"""Operators for batches of many adapters: every row against float64, alone and beside others, with hostile numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft import reference
from fastpeft.ops.boft_many import (
    BOFT_ROTATE_MANY,
    BOFT_SCALE_MANY,
    boft_reflectors,
    boft_rotate_many,
    boft_scale_many_,
    strip_features,
)
from fastpeft.ops.fourierft_many import FOURIER_MANY, fourier_many_
from fastpeft.ops.low_rank_many import LOW_RANK_MANY, low_rank_many_
from fastpeft.ops.many import plan_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPERATORS = (LOW_RANK_MANY, BOFT_ROTATE_MANY, BOFT_SCALE_MANY, FOURIER_MANY)
BACKENDS = ["torch", "native"]


@dataclass
class Bank:
    """Adapters of one layer, in arenas where what is not theirs is NaN. The last slot holds nothing."""

    sizes: tuple[int, int]  # in, out
    tables: dict[str, Tensor | None]
    call: Callable[..., Tensor]  # (y, x, tables, rows, slots) -> (T, out), y itself where it is changed in place
    exact: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]  # (y row, x row, slot, their dtype) in float64
    slots: int

    def run(self, y: Tensor, x: Tensor, adapter: list[int] | Tensor, **changed: Tensor) -> Tensor:
        rows, slots = plan_rows(torch.as_tensor(adapter, dtype=torch.int32), self.slots)
        return self.planned(y, x, rows, slots, **changed)

    def planned(self, y: Tensor, x: Tensor, rows: Tensor, slots: Tensor, **changed: Tensor) -> Tensor:
        return self.call(y.clone(), x, {**self.tables, **changed}, rows, slots)

    def batch(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """y, x and a slot for each row, −1 among them."""
        generator = torch.Generator().manual_seed(tokens)
        x, y = (
            torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype)
            for size in (self.sizes[0], self.sizes[1])
        )
        return y, x, torch.randint(-1, self.slots, (tokens,), generator=generator)

    def touches(self, slot: int) -> bool:
        return 0 <= slot < self.slots - 1


def scattered(vectors: list[Tensor], generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Vectors (k, width) somewhere in an arena, and where each of them is."""
    total = sum(len(part) for part in vectors)
    places = torch.randperm(2 * total + 1, generator=generator)[:total]
    arena = torch.full((2 * total + 1, vectors[0].shape[1]), torch.nan, dtype=dtype)
    arena[places] = torch.cat(vectors).to(dtype)
    return arena, list(places.int().split([len(part) for part in vectors]))


def low_rank_bank(sizes: tuple[int, int], ranks: tuple[int, ...], shards: int, dtype: torch.dtype) -> Bank:
    generator = torch.Generator().manual_seed(0)
    vectors = [
        [torch.randn(r * shards, size // shards, generator=generator, dtype=torch.float64) / scale for r in ranks]
        for size, scale in zip(sizes, (sizes[0] ** 0.5, 1.0), strict=True)
    ]
    ranks = (*ranks, 0)
    arenas, indices = [], []
    for part in vectors:
        arena, where = scattered(part, generator, dtype)
        arenas.append(arena)
        # What is beyond a rank is not to be read.
        index = torch.full((len(ranks), max(ranks) + 1, shards), -(1 << 30), dtype=torch.int32)
        for slot, places in enumerate(where):
            index[slot, : ranks[slot]] = places.view(-1, shards)
        indices.append(index)
    tables = {
        "arena_A": arenas[0],
        "index_A": indices[0],
        "arena_B": arenas[1],
        "index_B": indices[1],
        "rank": torch.tensor(ranks, dtype=torch.int32),
        "scaling": torch.linspace(0.5, 2.0, len(ranks)),
    }

    def call(y, x, tables, rows, slots):
        low_rank_many_(y, x, *tables.values(), rows, slots)
        return y

    def exact(y, x, slot, dtype):
        A, B = (
            arena[index[slot, : ranks[slot]].long()].double().reshape(ranks[slot], size)
            for arena, index, size in zip(arenas, indices, sizes, strict=True)
        )
        return y + float(tables["scaling"][slot]) * (A @ x) @ B

    return Bank(sizes, tables, call, exact, len(ranks))


def rotation_of(row: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """R, from a row of the arena as the docstring has it: block k is at place k mod S/b of strip k div S/b."""
    factors, n_blocks, b, _ = shape
    in_strip = strip_features(n_blocks * b, b, factors) // b
    numbers = row.view(factors, in_strip, -1, n_blocks // in_strip)
    blocks = torch.empty(shape, dtype=row.dtype)
    for factor in range(factors):
        for k in range(n_blocks):
            reflectors = numbers[factor, k % in_strip, :, k // in_strip]
            blocks[factor, k] = reference.boft.reflected_blocks(reflectors, b)
    return reference.boft.butterfly_matrix(blocks)


def rotation_bank(features: int, block_size: int, factors: int, dtype: torch.dtype) -> Bank:
    generator = torch.Generator().manual_seed(0)
    shape = factors, features // block_size, block_size, block_size
    trained = [0.3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    found = [boft_reflectors(boft_R, factors) for boft_R in trained]
    arena, where = scattered(found, generator, dtype)
    tables = {"arena_reflectors": arena, "row_reflectors": torch.tensor([*map(int, where), -1], dtype=torch.int32)}

    def call(y, x, tables, rows, slots):
        return boft_rotate_many(x, *tables.values(), factors, block_size, rows, slots)

    R = [rotation_of(arena[int(row)].double(), shape) for row in where]

    def exact(y, x, slot, dtype):
        return x @ R[slot]

    return Bank((features, features), tables, call, exact, len(found) + 1)


def scale_bank(features: int, with_bias: bool, dtype: torch.dtype) -> Bank:
    generator = torch.Generator().manual_seed(0)
    scales = [1 + torch.randn(1, features, generator=generator, dtype=torch.float64) for _ in range(5)]
    arena, where = scattered(scales, generator, dtype)
    bias = torch.randn(features, generator=generator, dtype=torch.float64) if with_bias else None
    tables = {"arena_scale": arena, "row_scale": torch.tensor([*map(int, where), -1], dtype=torch.int32)}

    def call(y, x, tables, rows, slots):
        boft_scale_many_(y, None if bias is None else bias.to(y.dtype), *tables.values(), rows, slots)
        return y

    def exact(y, x, slot, dtype):
        rounded = 0.0 if bias is None else bias.to(dtype).double()
        return (y - rounded) * arena[int(where[slot])].double() + rounded

    return Bank((1, features), tables, call, exact, len(scales) + 1)


def fourier_bank(sizes: tuple[int, int], n: int, own_places: bool, dtype: torch.dtype) -> Bank:
    generator = torch.Generator().manual_seed(0)
    in_features, out_features = sizes
    spectra = [torch.randn(1, n, generator=generator, dtype=torch.float64) for _ in range(5)]
    arena, where = scattered(spectra, generator, dtype)
    flat = [torch.randperm(in_features * out_features, generator=generator)[:n] for _ in range(5 if own_places else 1)]
    places = torch.stack([torch.stack([p // in_features, p % in_features]) for p in flat]).int()
    which = [slot % len(flat) for slot in range(len(spectra))]
    scaling = torch.linspace(10.0, 30.0, len(spectra) + 1)
    tables = {
        "arena_spectrum": arena,
        "row_spectrum": torch.tensor([*map(int, where), -1], dtype=torch.int32),
        "places": places,
        "place": torch.tensor([*which, 1 << 30], dtype=torch.int32),
        "scaling": scaling,
    }

    def call(y, x, tables, rows, slots):
        fourier_many_(y, x, *tables.values(), rows, slots)
        return y

    weights = [
        reference.fourierft.fourier_weight(
            arena[int(row)].double(), *places[which[slot]].long(), (out_features, in_features), float(scaling[slot])
        )
        for slot, row in enumerate(where)
    ]

    def exact(y, x, slot, dtype):
        return y + weights[slot] @ x

    return Bank(sizes, tables, call, exact, len(spectra) + 1)


# Sizes: nothing that is whole in any vector; a prime; whole vectors of every width; more than one chunk of threads.
BANKS: dict[str, Callable[[torch.dtype], Bank]] = {
    "lora-5to7": lambda dtype: low_rank_bank((5, 7), (1, 3, 2), 1, dtype),
    "lora-37to41": lambda dtype: low_rank_bank((37, 41), (8, 1, 16, 3, 5), 1, dtype),
    "lora-64to96": lambda dtype: low_rank_bank((64, 96), (16, 16, 16, 8, 40), 1, dtype),
    "lora-1024to160": lambda dtype: low_rank_bank((1024, 160), (16, 4, 16, 16, 7), 1, dtype),
    "lora-1000to2100": lambda dtype: low_rank_bank((1000, 2100), (16, 4, 16, 16, 7), 1, dtype),
    "mos-12to20": lambda dtype: low_rank_bank((12, 20), (3, 1, 4), 4, dtype),
    "mos-64to1024": lambda dtype: low_rank_bank((64, 1024), (8, 8, 8, 2, 8), 4, dtype),
    "mos-70to21": lambda dtype: low_rank_bank((70, 21), (17, 8), 7, dtype),
    "rotate-8-8-1": lambda dtype: rotation_bank(8, 8, 1, dtype),
    "rotate-21-7-1": lambda dtype: rotation_bank(21, 7, 1, dtype),
    "rotate-48-4-3": lambda dtype: rotation_bank(48, 4, 3, dtype),
    "rotate-24-6-2": lambda dtype: rotation_bank(24, 6, 2, dtype),
    "rotate-128-8-4": lambda dtype: rotation_bank(128, 8, 4, dtype),
    "rotate-64-2-5": lambda dtype: rotation_bank(64, 2, 5, dtype),
    "rotate-64-16-2": lambda dtype: rotation_bank(64, 16, 2, dtype),
    "rotate-128-32-2": lambda dtype: rotation_bank(128, 32, 2, dtype),
    "rotate-640-4-2": lambda dtype: rotation_bank(640, 4, 2, dtype),
    "scale-37": lambda dtype: scale_bank(37, False, dtype),
    "scale-64-bias": lambda dtype: scale_bank(64, True, dtype),
    "fourier-8to8": lambda dtype: fourier_bank((8, 8), 5, False, dtype),
    "fourier-64to96": lambda dtype: fourier_bank((64, 96), 100, False, dtype),
    "fourier-96to64-own": lambda dtype: fourier_bank((96, 64), 37, True, dtype),
    "fourier-37to50": lambda dtype: fourier_bank((37, 50), 60, False, dtype),
    "fourier-50to37-own": lambda dtype: fourier_bank((50, 37), 60, True, dtype),
    "fourier-1to6": lambda dtype: fourier_bank((1, 6), 3, False, dtype),
    "fourier-2to1": lambda dtype: fourier_bank((2, 1), 2, False, dtype),
}
parametrised = pytest.mark.parametrize("name", BANKS)
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def expected(bank: Bank, y: Tensor, x: Tensor, adapter: Tensor) -> Tensor:
    """Row by row in float64; NaN where nothing changes, which is compared by bits."""
    nothing = torch.full((bank.sizes[1],), torch.nan, dtype=torch.float64)
    found = [nothing] * len(adapter)
    for t, slot in enumerate(adapter.tolist()):
        if bank.touches(slot):
            found[t] = bank.exact(y[t].double(), x[t].double(), slot, y.dtype)
    return torch.stack(found) if found else nothing[None, :][:0]


def check(bank: Bank, found: Tensor, y: Tensor, x: Tensor, adapter: Tensor) -> None:
    exact = expected(bank, y, x, adapter)
    changed = ~exact[:, 0].isnan()
    before = x if found.shape == x.shape and "arena_reflectors" in bank.tables else y
    assert torch.equal(found[~changed], before[~changed])
    if not changed.any():
        return
    # Half a unit for the one rounding, and what float32 loses on the way, in sums of so many terms.
    inner = torch.float64 if torch.float64 in (y.dtype, next(iter(bank.tables.values())).dtype) else torch.float32
    terms = 4 * max(bank.sizes) ** 0.5
    size = exact[changed].norm() + before[changed].double().norm()
    allowed = torch.finfo(y.dtype).eps / 2 * exact[changed].norm() + terms * torch.finfo(inner).eps * size
    error = (found[changed].double() - exact[changed]).norm()
    assert error <= allowed, f"error {error:.3g}, allowed are {allowed:.3g}"


DTYPE_PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a == b or b == torch.float32]  # of x and of the arenas
# Compiled loops take float32 arenas.
RUNS = [("torch", pair) for pair in DTYPE_PAIRS]
RUNS += [("native", pair) for pair in DTYPE_PAIRS if pair[0] != torch.float64 and pair[1] == torch.float32]


@pytest.mark.parametrize(("backend", "dtypes"), RUNS, ids=str)
@parametrised
def test_every_row_against_float64(name, dtypes, backend):
    dtype, arena_dtype = dtypes
    bank = BANKS[name](arena_dtype)
    with fastpeft.use_backend(backend):
        for tokens in (0, 1, 7, 40):
            y, x, adapter = bank.batch(tokens, dtype)
            check(bank, bank.run(y, x, adapter), y, x, adapter)


@parametrised
def test_the_reference_says_the_same(name):
    bank = BANKS[name](torch.float64)
    y, x, adapter = bank.batch(19, torch.float64)
    with fastpeft.use_backend("reference"):
        found = bank.run(y, x, adapter)
    check(bank, found, y, x, adapter)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@parametrised
def test_bits_of_a_row_do_not_depend_on_its_neighbours(name, dtype, backend):
    """Alone, in groups from 1 to 48 rows, at any place, between any others, on one thread or more."""
    bank = BANKS[name](torch.float32)
    y, x, _ = bank.batch(48, dtype)
    generator = torch.Generator().manual_seed(1)
    with fastpeft.use_backend(backend):
        for slot in (0, 1):
            alone = torch.cat([bank.run(y[t : t + 1], x[t : t + 1], [slot]) for t in range(48)])
            threads = torch.get_num_threads()
            for tokens, count in ((2, 2), (3, 1), (9, 3), (17, 1), (33, 2), (48, 2)):
                others = torch.randint(-1, bank.slots, (tokens,), generator=generator, dtype=torch.int32)
                mine = torch.rand(tokens, generator=generator) < torch.rand(1, generator=generator)
                taken = torch.randperm(48, generator=generator)[:tokens]
                torch.set_num_threads(count)
                found = bank.run(y[taken], x[taken], torch.where(mine, slot, others))
                torch.set_num_threads(threads)
                assert torch.equal(found[mine], alone[taken[mine]])


@on_each_backend
@parametrised
def test_numbers_that_name_nothing(name, backend):
    """Slots outside of the tables and row numbers outside of x are no adapter's; rows that nobody names stay."""
    bank = BANKS[name](torch.float32)
    y, x, _ = bank.batch(6, torch.float32)
    with fastpeft.use_backend(backend):
        before = bank.run(y, x, [-1] * 6)
        alone = bank.run(y, x, [0] * 6)
        rows = torch.tensor([4, -1, 6, 1, 3, 1 << 30], dtype=torch.int32)
        slots = torch.tensor([0, 0, 0, -(1 << 31), bank.slots, 0], dtype=torch.int32)
        found = bank.planned(y, x, rows, slots)
        assert torch.equal(found[4], alone[4])
        assert torch.equal(found[[0, 1, 2, 3, 5]], before[[0, 1, 2, 3, 5]])
        empty = {key: value[:0] for key, value in bank.tables.items() if value is not None}
        assert torch.equal(bank.planned(y, x, rows, slots, **empty), before)


@on_each_backend
@parametrised
def test_hostile_tables(name, backend):
    """What a batch does not need is not looked at; what it needs is."""
    bank = BANKS[name](torch.float32)
    y, x, _ = bank.batch(3, torch.float32)
    numbers = {"rank", "row_reflectors", "row_scale", "row_spectrum", "place", "index_A", "index_B", "places"}
    with fastpeft.use_backend(backend):
        right = bank.run(y, x, [1, -1, 1])
        for table in numbers & bank.tables.keys():
            for bad in (-2, 1 << 30, -(1 << 31)):
                broken = bank.tables[table].clone()
                slot = 0 if table != "places" else int(bank.tables["place"][0])
                broken[slot].view(-1)[0] = bad
                if x.is_cuda:  # where to look is to wait: such a row gets anything, its neighbours what is theirs
                    found = bank.run(y, x, [1, 0, 1], **{table: broken})
                    assert table == "places" or torch.equal(found[::2], right[::2])
                    continue
                with pytest.raises((ValueError, RuntimeError), match=f"{table}.* must"):
                    bank.run(y, x, [1, 0, 1], **{table: broken})
                if table != "places" or len(broken) > 1:
                    assert torch.equal(bank.run(y, x, [1, -1, 1], **{table: broken}), right)


@on_each_backend
@parametrised
def test_wrong_tensors(name, backend):
    bank = BANKS[name](torch.float32)
    y, x, _ = bank.batch(3, torch.float32)
    rows, slots = plan_rows(torch.zeros(3, dtype=torch.int32), bank.slots)
    with fastpeft.use_backend(backend):
        for table, value in bank.tables.items():
            with pytest.raises((TypeError, RuntimeError), match=f"{table} must"):
                bank.planned(y, x, rows, slots, **{table: value.to(torch.int64)})
            with pytest.raises((ValueError, RuntimeError), match=f"{table} must"):
                bank.planned(y, x, rows, slots, **{table: value[..., None]})
        with pytest.raises((ValueError, RuntimeError), match="rows must"):
            bank.planned(y, x, rows[:2], slots)
        with pytest.raises((TypeError, RuntimeError), match="slots must"):
            bank.planned(y, x, rows, slots.long())
        with pytest.raises(ValueError, match="must not require a gradient"):
            bank.planned(y.requires_grad_(), x.requires_grad_(), rows, slots)


@on_each_backend
@parametrised
def test_strides(name, backend):
    bank = BANKS[name](torch.float32)
    y, x, adapter = bank.batch(9, torch.float32)
    with fastpeft.use_backend(backend):
        right = bank.run(y, x, adapter)
        assert torch.equal(bank.run(y, torch.nn.functional.pad(x, (3, 2))[:, 3:-2], adapter), right)
        assert torch.equal(bank.run(y, x.T.contiguous().T, adapter), right)
        if "arena_reflectors" not in bank.tables:
            wide = torch.nn.functional.pad(y, (1, 2))
            rows, slots = plan_rows(adapter.int(), bank.slots)
            bank.call(wide[:, 1:-2], x, bank.tables, rows, slots)
            assert torch.equal(wide[:, 1:-2], right) and not wide[:, 0].any() and not wide[:, -2:].any()


def test_plan():
    adapter = torch.tensor([3, -1, 0, 7, 3, 0, -5], dtype=torch.int32)
    rows, slots = plan_rows(adapter, 4)
    assert slots.tolist() == [0, 0, 3, 3, -1, -1, -1] and rows.tolist() == [2, 5, 0, 4, 1, 3, 6]
    assert rows.dtype == slots.dtype == torch.int32


@pytest.mark.parametrize("name", ["lora-37to41", "mos-12to20", "rotate-48-4-3", "scale-64-bias", "fourier-64to96"])
def test_compiled_graphs(name):
    bank = BANKS[name](torch.float32)
    y, x, adapter = bank.batch(7, torch.float32)
    rows, slots = plan_rows(adapter.int(), bank.slots)
    with fastpeft.use_backend("torch"):
        right = bank.planned(y, x, rows, slots)
        compiled = torch.compile(bank.planned, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(y, x, rows, slots), right)


def test_schemas_and_fakes():
    for operator in OPERATORS:
        schema = getattr(torch.ops.fastpeft, operator.name).default._schema
        changed = [argument.name for argument in schema.arguments if argument.alias_info]
        assert changed == ([] if operator is BOFT_ROTATE_MANY else ["y"])
        assert len(schema.returns) == (operator is BOFT_ROTATE_MANY)
