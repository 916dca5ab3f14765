"""Layers that serve in two C++ calls give the bits of the operators, and give way to them where somebody looks on."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import IN, randn
from serving_models import OPTIONS, make_bank, save_all
from small_models import Model
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import backend
from fastpeft.serving import AdapterBank, calls, layer

if backend.extension is None:
    pytest.skip("the extension is not built", allow_module_level=True)

BatchRows, LayerCalls = backend.extension.BatchRows, backend.extension.LayerCalls
MIXED: list[str | None] = [None, *OPTIONS, None, *reversed(OPTIONS), "boft"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def bank(folders: dict[str, Path]) -> AdapterBank:
    return make_bank(Model().requires_grad_(False), folders)


def served(bank: AdapterBank, x, rows=MIXED):
    with torch.no_grad(), bank.route(rows):
        return bank._model(x)


def by_operators(monkeypatch, bank: AdapterBank, x, rows=MIXED):
    with monkeypatch.context() as patch:
        patch.setattr(layer, "calls_of", lambda *_: None)
        return served(bank, x, rows)


@pytest.fixture
def seen(monkeypatch) -> list[object]:
    """Layers that were called in C++."""
    found: list[object] = []
    call = layer.Served._call
    monkeypatch.setattr(layer.Served, "_call", lambda self, *args: found.append(self) or call(self, *args))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(), (1,), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_of_the_operators(monkeypatch, folders, seen, dtype, tokens, threads):
    model = Model().to(dtype).requires_grad_(False)
    bank = make_bank(model, folders)
    x = randn(len(MIXED), *tokens, IN, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = served(bank, x)
        assert len(seen) == len(bank.sites)
        assert torch.equal(found, by_operators(monkeypatch, bank, x)) and len(seen) == len(bank.sites)
    finally:
        torch.set_num_threads(before)


def test_rows_without_an_adapter_call_the_base_alone(bank, seen):
    x = randn(3, IN)
    with torch.no_grad():
        expected = copy.deepcopy(bank._model)(x)
    assert torch.equal(served(bank, x, [None] * 3), expected) and len(seen) == len(bank.sites)


def test_a_plan_that_is_refilled(monkeypatch, bank, seen):
    x = randn(3, IN)
    plan = bank.plan(["lora", "boft", None])
    with torch.no_grad(), plan:
        for rows in (["fourierft", None, "mos"], [None] * 3, ["boft", "boft", "lora"]):
            plan.refill(rows)
            assert torch.equal(bank._model(x), by_operators(monkeypatch, bank, x, rows))
    plan.close()
    assert seen


def test_a_plan_in_two_threads_at_once(bank):
    """What a layer keeps for rotated inputs is each thread's own."""
    inputs = [randn(64, IN) for _ in range(2)]
    plan = bank.plan(["boft"] * 64)
    with torch.no_grad(), plan:
        expected = [bank._model(x) for x in inputs]

    def work(which: int) -> None:
        with torch.no_grad(), plan:
            for _ in range(50):
                assert torch.equal(bank._model(inputs[which]), expected[which])

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work, which) for which in range(2)]:
            done.result()
    plan.close()


def test_a_base_that_returns_its_input(folders, seen):
    """Gets memory of its own for every call."""

    class Passing(nn.Linear):
        def forward(self, input):
            return input

    model = nn.ModuleDict({"up": Passing(IN, IN), "q": Passing(IN, IN)}).requires_grad_(False)
    bank = make_bank(model)
    config = copy.deepcopy(OPTIONS["boft"])
    config.target_modules = "all-linear"
    root = folders["lora"].parent / "passing"
    bank.load("boft", save_all(root, {"boft": config}, lambda: copy_of(IN))["boft"])
    x = randn(2, IN)
    with torch.no_grad(), bank.route(["boft", None]):
        first = model["up"](x)
        kept = first.clone()
        model["q"](randn(2, IN))
    assert seen and torch.equal(first, kept)


@pytest.mark.parametrize("name", ["boft", "lora"])
def test_families_that_come_and_go(monkeypatch, folders, seen, name):
    """What a layer's calls were made of is let go with the family, and is not taken for one that comes later."""
    bank = make_bank(Model().requires_grad_(False), {name: folders[name]})
    x = randn(2, IN)
    for _ in range(2):
        assert torch.equal(served(bank, x, [name, None]), by_operators(monkeypatch, bank, x, [name, None]))
        assert bank._residency.layer_calls
        bank.unload(name)
        assert not bank._residency.layer_calls
        bank.load(name, folders[name])
    assert seen


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_the_operators_are_called_where_somebody_looks_on(monkeypatch, bank, seen):
    x = randn(len(MIXED), IN)
    expected = by_operators(monkeypatch, bank, x)
    with backend.use_backend("torch"):
        served(bank, x)
    with Watching():
        assert torch.equal(served(bank, x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        served(bank, x)
    assert torch.equal(served(bank, x.as_subclass(type("Own", (torch.Tensor,), {}))), expected)
    assert not seen
    assert torch.equal(served(bank, x), expected) and len(seen) == len(bank.sites)
    seen.clear()
    served(bank, x.T.contiguous().T)
    assert len(seen) < len(bank.sites)


def test_what_a_base_of_another_kind_returns(monkeypatch, folders, seen):
    """Is no memory for the calls to write to unless it is as a linear layer's."""

    class Wide(nn.Linear):
        def forward(self, input):
            return super().forward(input).double()

    model = nn.ModuleDict({"up": Wide(IN, IN), "q": nn.Linear(IN, IN)}).requires_grad_(False)
    bank = make_bank(model)
    for name in ("boft", "lora"):
        config = copy.deepcopy(OPTIONS[name])
        config.target_modules = "all-linear"
        bank.load(name, save_all(folders["lora"].parent / "wide" / name, {name: config}, lambda: copy_of(IN))[name])
    x = randn(2, IN)
    with torch.no_grad(), bank.route(["boft", "lora"]):
        found = model["up"](x)
    with monkeypatch.context() as patch, torch.no_grad(), bank.route(["boft", "lora"]):
        patch.setattr(layer, "calls_of", lambda *_: None)
        assert torch.equal(model["up"](x), found)
    assert seen and found.dtype == torch.float64


@pytest.mark.parametrize("name", ["boft", "lora"])
def test_an_input_from_elsewhere(bank, name):
    """Is an error, also where one of its shape was here before: nothing is read from where it is not."""
    x = randn(2, IN)
    with torch.no_grad(), bank.route([name, None]):
        bank._model(x)
        with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
            bank._model(x.to("meta"))
        bank._model(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("how", ["pruned", "parametrized", "patched"])
def test_a_base_that_has_changed_since(monkeypatch, folders, seen, how):
    """Computes with what it has now, which need not be parameters of its own."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, folders)
    x = randn(len(MIXED), IN)
    before = served(bank, x)
    seen.clear()
    for module in bank._layers:
        if how == "pruned":
            for name, _ in list(module.named_parameters()):
                prune.l1_unstructured(module, name, 0.5)
        elif how == "parametrized":
            parametrize.register_parametrization(module, "weight", Halved())
    if how == "patched":
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: nn.functional.linear(x, 2 * self.weight, self.bias))
    found = served(bank, x)
    assert len(seen) == len(bank.sites)
    assert torch.equal(found, by_operators(monkeypatch, bank, x)) and not torch.equal(found, before)


def copy_of(features: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(features, features) for name in ("up", "q")})


def test_numbers_that_lead_outside(folders):
    """Tables are looked at in every call: what a corrupted one names is not read."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, folders)
    x = randn(len(MIXED), IN)
    for tables in bank._residency.families():
        for name in ("index_A", "index_B", "rank", "row_reflectors", "row_scale", "row_spectrum", "place"):
            if name in tables._tables:
                kept = tables._tables[name].clone()
                for number in (1 << 30, -(1 << 30)):
                    tables._tables[name].fill_(number)
                    with pytest.raises(RuntimeError, match=name):
                        served(bank, x)
                tables._tables[name].copy_(kept)
    places = bank._residency.families()
    assert any("place" in tables._tables for tables in places)
    served(bank, x)


def test_rows_that_two_families_name():
    rows = BatchRows(np.array([[[0, 1], [0, 0]]] * 2, np.int32))
    x = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="at most once"):
        low_rank_calls(0, 1).after(rows, x.data_ptr(), x.clone().data_ptr(), 0)


def test_a_family_that_the_batch_has_not():
    rows = BatchRows(np.array([[[0, 1], [0, 0]]], np.int32))
    x = torch.zeros(2, 4)
    low_rank_calls(0).after(rows, x.data_ptr(), x.clone().data_ptr(), 0)
    with pytest.raises(RuntimeError, match="1 families, not a number 1"):
        low_rank_calls(1).after(rows, x.data_ptr(), x.clone().data_ptr(), 0)


def low_rank_calls(*families: int):
    made = LayerCalls("float32", 4, 4)
    for family in families:
        made.low_rank(family, **low_rank_tables())
    return made


def low_rank_tables() -> dict[str, np.ndarray]:
    return {
        "arena_A": np.zeros((1, 4), np.float32), "index_A": np.zeros((1, 1, 1), np.int32),
        "arena_B": np.zeros((1, 4), np.float32), "index_B": np.zeros((1, 1, 1), np.int32),
        "rank": np.ones(1, np.int32), "scaling": np.ones(1, np.float32),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("family", -1, ValueError),
        ("arena_A", np.zeros((1, 3), np.float32), ValueError),
        ("arena_A", np.zeros((1, 4), np.float64), TypeError),
        ("arena_B", np.zeros((4, 1), np.float32).T[:, ::2], TypeError),
        ("index_A", np.zeros((1, 1), np.int32), ValueError),
        ("index_A", np.zeros((1, 1, 3), np.int32), ValueError),
        ("index_B", np.zeros((2, 1, 1), np.int32), ValueError),
        ("rank", np.zeros(2, np.int32), ValueError),
        ("scaling", np.zeros((1, 1), np.float32), ValueError),
    ],
)
def test_tables_that_do_not_fit(name, value, error):
    tables = {"family": 0, **low_rank_tables()}
    LayerCalls("float32", 4, 4).low_rank(**tables)
    with pytest.raises(error):
        LayerCalls("float32", 4, 4).low_rank(**{**tables, name: value})


@pytest.mark.parametrize(
    "packed, error",
    [
        (np.zeros((1, 2, 0), np.int32), ValueError),
        (np.zeros((1, 3, 4), np.int32), ValueError),
        (np.zeros((2, 4), np.int32), ValueError),
        (np.zeros((1, 2, 4), np.int64), TypeError),
        (np.zeros((4, 2, 1), np.int32).T, TypeError),
    ],
)
def test_rows_that_do_not_fit(packed, error):
    with pytest.raises(error):
        BatchRows(packed)


def test_sizes_that_do_not_fit():
    for sizes in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match="at least 1"):
            LayerCalls("float32", *sizes)
    with pytest.raises(ValueError, match="float64"):
        LayerCalls("float64", 4, 4)
    table, blocks = np.zeros(1, np.int32), np.zeros((1, 64), np.float32)
    for factors, block_size in ((0, 2), (1, 3), (3, 4), (40, 2)):
        with pytest.raises(ValueError, match="factors and block_size"):
            LayerCalls("float32", 8, 8).boft(0, blocks, table, blocks, table, factors, block_size)


def test_memory_is_in_large_pages_or_plain():
    """Whatever the system has, a buffer is memory that can be written and read, lies where pages begin, and is zero."""
    from fastpeft.serving import memory

    buffer = memory._large_pages(3 << 20)
    assert buffer.dtype == torch.uint8 and buffer.numel() == 3 << 20 and buffer.data_ptr() % 4096 == 0
    buffer.fill_(7)
    assert bool((buffer == 7).all())


def test_names_of_dtypes():
    for dtype, name in calls.DTYPES.items():
        assert f"torch.{name}" == str(dtype)
        LayerCalls(name, 1, 1)
