"""What a bank holds: names, room, versions, and many more adapters than fit."""

from __future__ import annotations

import copy
import json
import shutil
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import BOFT, IN, LORA, MOS, make_linear, randn
from safetensors.torch import load_file
from serving_models import OPTIONS, make_bank, save, save_all
from small_models import ALL_LINEAR, Model
from torch import nn

import fastpeft
from fastpeft.serving import AdapterBank, AdapterInUseError, BankFullError, UnknownAdapterError
from fastpeft.serving.memory import Buffer, Extents


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Adapters of one size with different values."""
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save(folder / name, LORA.config(), seed) for seed, name in enumerate("abcdef")}


def output(bank: AdapterBank, model: nn.Module, name: str | None):
    with torch.no_grad(), bank.route([name], timeout=0):
        return model(randn(1, IN))


def resident(bank: AdapterBank) -> set[str]:
    return {version.name for version, is_resident, _ in bank._residency.registered() if is_resident}


def books(bank: AdapterBank):
    """Everything that a refused call must leave as it was."""
    stats = {key: value for key, value in bank.stats().items() if key not in ("hits", "misses", "evictions")}
    return bank.names(), resident(bank), stats, bank._residency._space.extents._free


# Memory


def test_extents_come_back_whole():
    """Whatever was taken in whatever order, what is given back is one extent again, and nothing overlaps."""
    generator = torch.Generator().manual_seed(0)

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    extents = Extents(10_000)
    held: list[tuple[list[tuple[int, int]], int]] = []
    refused = 0
    for _ in range(2000):
        if held and draw(2) == 1:
            extents.give(*held.pop(draw(len(held)) - 1))
        else:
            count, width = draw(20), draw(60)
            pieces = extents.take(count, width)
            if pieces is None:
                refused += 1
                continue
            assert sum(rows for _, rows in pieces) == count
            held.append((pieces, width))
        taken = sorted((first * width, (first + rows) * width) for pieces, width in held for first, rows in pieces)
        both = sorted(taken + extents._free)
        assert both[0][0] == 0 and both[-1][1] == 10_000
        assert all(stop == start for (_, stop), (start, _) in pairwise(both))
    assert refused
    for pieces, width in held:
        extents.give(pieces, width)
    assert extents._free == [(0, 10_000)]


def test_rows_of_one_adapter_in_several_places():
    extents = Extents(100)
    parts = [extents.take(1, 10) for _ in range(10)]
    assert extents.take(1, 1) is None
    for place in parts[::2]:
        extents.give(place, 10)
    assert extents.take(6, 10) is None
    assert extents.free_bytes == 50  # a call that fails takes nothing
    assert extents.take(4, 10) == [(0, 1), (2, 1), (4, 1), (6, 1)]
    assert extents._free == [(80, 90)]
    assert extents.take(1, 7) is None  # 77 and 84 are the multiples of 7, and neither row lies in it
    assert extents.take(1, 8) == [(10, 1)] and extents._free == [(88, 90)]


def test_arenas_are_views_of_one_buffer():
    buffer = Buffer(1000, torch.device("cpu"))
    wide, narrow = buffer.arena((10,), torch.float32), buffer.arena((2, 5), torch.int32)
    assert wide.shape == (25, 10) and narrow.shape == (25, 2, 5)
    assert wide.data_ptr() == narrow.data_ptr() and buffer.arena((10,), torch.float32) is wide
    assert buffer.arena((2000,), torch.float32).shape == (0, 2000)


# Names


def test_names_and_what_is_known(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model)
    assert bank.names() == [] and bank.stats()["registered"] == 0
    base = output(bank, model, None)
    bank.load("a", folders["a"])
    bank.register("org/b-1.5", str(folders["b"]))
    assert bank.names() == ["a", "org/b-1.5"]
    assert resident(bank) == {"a"}
    expected = fastpeft.load_adapter(Model(), folders["b"])(randn(1, IN))
    torch.testing.assert_close(output(bank, model, "org/b-1.5"), expected.detach())
    bank.unload("org/b-1.5")
    assert bank.names() == ["a"]
    for call in (bank.unload, bank.pin, bank.unpin, lambda name: output(bank, model, name)):
        with pytest.raises(UnknownAdapterError, match=r"no adapter is named 'org/b-1\.5'; there are: a"):
            call("org/b-1.5")
    bank.unload("a")
    assert bank.stats()["bytes"] == bank.stats()["table_bytes"] == 0
    assert torch.equal(output(bank, model, None), base)


@pytest.mark.parametrize(
    "name", ["", "../a", "/etc/passwd", "a//b", "a/", "a\\b", ".hidden", "a/../b", "a\nb", "a\0b", "x" * 300, 3, None]
)
def test_names_that_are_none(name, folders: dict[str, Path]):
    bank = make_bank(Model())
    for call in (bank.load, bank.register):
        with pytest.raises(ValueError, match="name must be"):
            call(name, folders["a"])
    assert bank.names() == []


def test_a_state_in_place_of_a_folder(folders: dict[str, Path]):
    """As the files give it, with a dict, our configuration or PEFT's; later changes are the caller's own."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"folder": folders["a"]}, max_resident=1)
    config = json.loads((folders["a"] / "adapter_config.json").read_text())
    tensors = load_file(folders["a"] / "adapter_model.safetensors")
    expected = output(bank, model, "folder")
    configs = {"dict": config, "ours": LORA.config(), "peft": config}
    if peft := pytest.importorskip("peft"):
        configs["peft"] = peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL_LINEAR)
    for name, given in configs.items():
        mine = {key: tensor.clone() for key, tensor in tensors.items()}
        bank.load(name, (given, mine))
        for tensor in mine.values():
            tensor.zero_()
        assert torch.equal(output(bank, model, "folder"), expected)  # puts the other one out
        assert torch.equal(output(bank, model, name), expected)
    with pytest.raises(TypeError, match="a folder or a pair"):
        bank.load("x", config)
    with pytest.raises(TypeError, match="map names to tensors"):
        bank.load("x", (config, {"a": 1}))


# Versions


def test_a_new_version(folders: dict[str, Path]):
    """Running batches finish on the one that they began with, and its memory is free when the last of them ends."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"x": folders["a"]})
    first = output(bank, model, "x")
    used = bank.stats()["bytes"]
    with torch.no_grad(), bank.route(["x"]), bank.plan(["x"]) as plan:
        bank.load("x", folders["b"])
        assert torch.equal(model(randn(1, IN)), first)
        second = output(bank, model, "x")
        assert not torch.equal(second, first)
        assert torch.equal(model(randn(1, IN)), first)
        assert bank.stats()["bytes"] == 2 * used
        plan.refill(["x"])
        assert torch.equal(model(randn(1, IN)), second)
    plan.close()
    assert bank.names() == ["x"] and bank.stats()["bytes"] == used
    assert torch.equal(output(bank, model, "x"), second)


def test_a_load_that_fails_leaves_the_old_version(folders: dict[str, Path], tmp_path: Path):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"x": folders["a"]})
    first, before = output(bank, model, "x"), books(bank)
    with pytest.raises(ValueError):
        bank.load("x", save(tmp_path, LORA.config(r=9)))
    with pytest.raises(FileNotFoundError):
        bank.load("x", tmp_path / "nowhere")
    assert books(bank) == before
    assert torch.equal(output(bank, model, "x"), first)


@pytest.mark.parametrize("pinned", [True, False])
def test_a_new_version_in_a_full_bank(pinned: bool, folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"x": folders["a"]}, max_resident=1)
    if pinned:
        bank.pin("x")
    with bank.route(["x"]), pytest.raises(BankFullError):
        bank.load("x", folders["b"], timeout=0)
    bank.load("x", folders["b"], timeout=0)
    assert bank.stats()["pinned"] == pinned
    torch.testing.assert_close(output(bank, model, "x"), fastpeft.load_adapter(Model(), folders["b"])(randn(1, IN)))


def test_files_that_change_are_no_version(folders: dict[str, Path], tmp_path: Path):
    """What is on disk was checked when it was registered."""
    model = Model().requires_grad_(False)
    shutil.copytree(folders["a"], tmp_path / "a")
    bank = make_bank(model, {"x": tmp_path / "a", "y": folders["b"]}, max_resident=1)
    shutil.copy(folders["c"] / "adapter_model.safetensors", tmp_path / "a" / "adapter_model.safetensors")
    before = books(bank)
    with pytest.raises(ValueError, match=r"changed since it was registered: load it again"):
        output(bank, model, "x")
    assert books(bank) == before
    bank.load("x", tmp_path / "a")
    torch.testing.assert_close(output(bank, model, "x"), fastpeft.load_adapter(Model(), folders["c"])(randn(1, IN)))
    bank.load("y", folders["b"])
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        output(bank, model, "x")
    output(bank, model, "y")


# Unloading


def test_unloading_what_is_used(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"a": folders["a"]})
    expected = output(bank, model, "a")
    with torch.no_grad(), bank.route(["a"]):
        before = books(bank)
        with pytest.raises(AdapterInUseError, match=r"'a' is used by 1 batch"):
            bank.unload("a", wait=False)
        assert books(bank) == before
        with pytest.raises(TimeoutError, match="still used by 1 batch"):
            bank.unload("a", timeout=0.01)
        assert bank.names() == []
        assert torch.equal(model(randn(1, IN)), expected)
        bank.load("a", folders["b"])
    assert len(bank._residency._resident) == 1
    bank.unload("a", wait=False)
    assert bank.stats()["bytes"] == 0


# Room


def test_least_recently_used_leave_first(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, max_resident=3)
    for name, folder in folders.items():
        bank.register(name, folder)
    expected = {name: fastpeft.load_adapter(Model(), folder)(randn(1, IN)).detach() for name, folder in folders.items()}
    for name, there in (("a", "a"), ("b", "ab"), ("c", "abc"), ("a", "abc"), ("d", "acd"), ("e", "ade"), ("a", "ade")):
        torch.testing.assert_close(output(bank, model, name), expected[name])
        assert resident(bank) == set(there), name
    bank.pin("b")  # puts d out
    assert resident(bank) == set("aeb")
    for name, there in (("c", "acb"), ("d", "cdb"), ("e", "deb"), ("f", "efb")):
        output(bank, model, name)
        assert resident(bank) == set(there), name
    with bank.route(["e"]):
        output(bank, model, "a")
        assert resident(bank) == set("eab")
        output(bank, model, "c")
        assert resident(bank) == set("ecb")
    bank.unpin("b")
    output(bank, model, "a")
    output(bank, model, "d")
    assert resident(bank) == set("cad")
    stats = bank.stats()
    assert stats["registered"] == 6 and stats["resident"] == 3 and stats["evictions"] == 11


def test_room_is_counted_in_bytes_too(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    probe = make_bank(Model(), {"a": folders["a"]})
    one = probe.stats()["bytes"]
    bank = make_bank(model, max_resident_bytes=2 * one + one // 2)
    for name, folder in folders.items():
        bank.load(name, folder)
        assert bank.stats()["bytes"] <= 2 * one
    assert resident(bank) == set("ef")
    with pytest.raises(BankFullError, match=f"3 adapter.* of {3 * one} bytes.*room for {2 * one + one // 2}"):
        bank.plan(["a", "b", "c"])


def test_a_batch_that_does_not_fit(folders: dict[str, Path]):
    """Says so before anything has changed."""
    model = Model().requires_grad_(False)
    bank = make_bank(model, {name: folders[name] for name in "abc"}, max_resident=3)
    bank.register("d", folders["d"])
    expected, before = output(bank, model, "a"), books(bank)
    with pytest.raises(BankFullError, match=r"4 adapters were asked for together, and there is room for 3"):
        bank.plan(["a", "b", "c", "d"])
    assert books(bank) == before
    bank.pin("a")
    before = books(bank)
    with pytest.raises(BankFullError, match="1 others are pinned"):
        bank.plan(["b", "c", "d"])
    assert books(bank) == before
    with bank.route(["a", "b"]):
        before = books(bank)
        start = time.monotonic()
        with pytest.raises(BankFullError, match=r"2 other\(s\) are used by batches that go on"):
            bank.plan(["c", "d"], timeout=0.05)
        assert time.monotonic() - start >= 0.05
        assert books(bank) == before
        with bank.route(["c"]), pytest.raises(BankFullError):
            bank.load("e", folders["e"], timeout=0)
        assert books(bank) == before
        bank.load("e", folders["e"], timeout=0)
    assert torch.equal(output(bank, model, "a"), expected)


def test_one_damaged_adapter_in_a_batch(folders: dict[str, Path], tmp_path: Path):
    """That batch fails, and names it; whoever else was to come with it is not harmed."""
    model = Model().requires_grad_(False)
    tensors = load_file(folders["a"] / "adapter_model.safetensors")
    tensors[f"base_model.model.{ALL_LINEAR[3]}.lora_B.weight"][2, 1] = float("nan")
    config = json.loads((folders["a"] / "adapter_config.json").read_text())
    bank = make_bank(model, {"b": folders["b"]}, max_resident=2)
    bank.register("bad", (config, tensors))
    bank.register("c", folders["c"])
    before = books(bank)
    with pytest.raises(ValueError, match=r"adapter 'bad'.*blocks\.0\.down\.lora_B\.weight holds values.*not finite"):
        bank.plan(["c", "bad"])
    assert books(bank) == before
    output(bank, model, "c")


@pytest.mark.parametrize("which", [0, 1])
def test_a_write_that_breaks_off(which: int, folders: dict[str, Path], tmp_path: Path, monkeypatch):
    """What had got a place gives it back, and what was there for the batch is not held by it."""
    from fastpeft.serving.version import Version

    model = Model().requires_grad_(False)
    bank = make_bank(model, {"b": folders["b"]}, max_resident=3)
    bank.register("c", folders["c"])
    bank.register("f", save(tmp_path, OPTIONS["fourierft"]))
    expected, before = output(bank, model, "b"), books(bank)
    write, calls = Version.write, []

    def breaking(self, *args):
        calls.append(self.name)
        if len(calls) > which:
            raise MemoryError("no more")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Version, "write", breaking)
        with pytest.raises(MemoryError):
            bank.plan(["b", "f", "c"])
    assert books(bank) == before
    assert bank._residency._made == set()
    assert torch.equal(output(bank, model, "b"), expected)
    torch.testing.assert_close(
        output(bank, model, "f"), fastpeft.load_adapter(Model(), tmp_path)(randn(1, IN)).detach()
    )


def test_families_go_with_their_last_adapter(tmp_path: Path):
    model = Model().requires_grad_(False)
    bank = make_bank(model, save_all(tmp_path, {name: OPTIONS[name] for name in ("lora", "mos", "boft", "fourierft")}))
    assert len(bank._residency.families()) == 4
    plan = bank.plan(["mos"])
    bank.load("boft", tmp_path / "lora")
    assert len(bank._residency.families()) == 4  # the plan could be given another one
    plan.close()
    assert len(bank._residency.families()) == 3
    for name in bank.names():
        bank.unload(name)
    assert bank._residency.families() == [] and bank.stats()["bytes"] == 0


def test_places_are_shared_by_seed(tmp_path: Path):
    model = Model().requires_grad_(False)
    n, shapes, layers = 37, 3, len(ALL_LINEAR)
    bank = make_bank(model)
    for i in range(3):
        bank.load(f"same{i}", save(tmp_path / str(i), OPTIONS["fourierft"], i))
        assert bank.stats()["bytes"] == (i + 1) * layers * n * 4 + shapes * n * 8
    other = copy.deepcopy(OPTIONS["fourierft"])
    other.random_loc_seed = 1
    bank.load("other", save(tmp_path / "other", other))
    assert bank.stats()["bytes"] == 4 * layers * n * 4 + 2 * shapes * n * 8
    bank.unload("same0")
    bank.unload("same1")
    assert bank.stats()["bytes"] == 2 * layers * n * 4 + 2 * shapes * n * 8
    expected = fastpeft.load_adapter(Model(), tmp_path / "2")(randn(1, IN)).detach()
    torch.testing.assert_close(output(bank, model, "same2"), expected)
    bank.unload("same2")
    assert bank.stats()["bytes"] == layers * n * 4 + shapes * n * 8


def test_places_that_move(tmp_path: Path):
    """The last adapter of a seed makes room for another one of it, which has fewer layers and lies elsewhere."""
    model = Model().requires_grad_(False)
    config = copy.deepcopy(OPTIONS["fourierft"])
    config.target_modules = ["up"]
    bank = make_bank(model, {"all": save(tmp_path / "all", OPTIONS["fourierft"])}, max_resident=1)
    bank.load("up", save(tmp_path / "up", config))
    expected = fastpeft.load_adapter(Model(), tmp_path / "up")(randn(1, IN)).detach()
    torch.testing.assert_close(output(bank, model, "up"), expected)


def test_mos_keeps_its_pools(tmp_path: Path):
    """Eight times the rank for the memory of LoRA with the pool's rank."""

    def make() -> Model:
        return Model(n_blocks=16).requires_grad_(False)

    config = MOS.config(r=8, pool_rank=1, private_rank=0, shards_per_vector=2, target_modules=["q", "up"])
    bank = make_bank(make(), {"mos": save(tmp_path / "mos", config, base=make)})
    numbers = 16 * (24 + 24 + 24 + 16)
    of = bank.stats()["methods"]["MOS"]
    assert of["bytes"] == bank.stats()["bytes"] == 4 * numbers
    assert of["expanded_bytes"] == 8 * of["bytes"]
    lora = make_bank(make(), {"lora": save(tmp_path / "lora", LORA.config(r=8, target_modules=["q", "up"]), base=make)})
    assert lora.stats()["bytes"] == of["expanded_bytes"] == lora.stats()["methods"]["LORA"]["expanded_bytes"]


def test_prefetching(folders: dict[str, Path]):
    model = Model().requires_grad_(False)
    bank = make_bank(model, max_resident=2)
    for name in "abc":
        bank.register(name, folders[name])
    assert bank.prefetch("a").result(30) is None
    assert resident(bank) == {"a"} and bank.stats()["in_use"] == 0
    with pytest.raises(UnknownAdapterError):
        bank.prefetch("z").result(30)
    for future in [bank.prefetch("b"), bank.prefetch("c")]:
        future.result(30)
    assert resident(bank) == {"b", "c"}
    assert bank.prefetch("b").done()  # nothing to bring in, and now c is the one that leaves
    deadline = time.monotonic() + 30  # the thread ends with its work
    while any(thread.name.startswith("fastpeft-prefetch") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert bank.prefetch("a").result(30) is None
    assert resident(bank) == {"a", "b"}
    bank.close()


def test_ten_thousand_adapters(tmp_path: Path):
    """Registering reads headers alone, and 500 of them are resident."""

    def make() -> nn.Module:
        return nn.Sequential(make_linear(8, 8)).requires_grad_(False)

    configs = {"lora": LORA.config(r=2), "boft": BOFT.config(), "fourierft": OPTIONS["fourierft"]}
    kinds = save_all(tmp_path, configs, make)
    model = make()
    bank = AdapterBank(model, max_resident=500, max_resident_bytes=1 << 22, max_rank=4)
    files = [(name, folder) for name, folder in kinds.items()]
    start = time.perf_counter()
    for i in range(10_000):
        bank.register(f"adapter-{i}", files[i % 3][1])
    took = time.perf_counter() - start
    assert took < 60, f"{took:.1f} s"
    assert len(bank.names()) == 10_000 and bank.stats()["resident"] == bank.stats()["bytes"] == 0
    oracle = {name: fastpeft.load_adapter(make(), folder) for name, folder in kinds.items()}
    x = randn(100, 8)
    expected = [oracle[name](x).detach() for name, _ in files]
    for first in range(0, 10_000, 970):
        with torch.no_grad(), bank.route([f"adapter-{i}" for i in range(first, first + 100)]):
            found = model(x)
        for i in range(100):
            torch.testing.assert_close(found[i], expected[(first + i) % 3][i])
    assert bank.stats()["resident"] == 500
