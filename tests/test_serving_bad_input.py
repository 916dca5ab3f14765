"""Adapters that are wrong, and files that mean harm: an error to that call, with the bank and its batches unharmed."""

from __future__ import annotations

import json
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BOFT, FOURIERFT, IN, LORA, MOS, OFT, randn
from safetensors.torch import load_file, save_file
from serving_models import OPTIONS, make_bank, save
from small_models import ALL_LINEAR, Model, adapted_model
from torch import Tensor, nn

from fastpeft.serving import AdapterBank

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
UP = "base_model.model.blocks.0.up."


def with_config(**changes: Any) -> Callable[[Path], None]:
    """And the fingerprint of the old one gone, as it is in PEFT's files."""

    def corrupt(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))
        save_file(load_file(folder / TENSORS), folder / TENSORS)

    return corrupt


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / TENSORS)

    return corrupt


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The header as JSON changed in place, and what follows left as it is."""

    def corrupt(folder: Path) -> None:
        content = (folder / TENSORS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / TENSORS).write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])

    return corrupt


def entry(name: str, **changes: Any) -> Callable[[Path], None]:
    return with_header(lambda header: header[name].update(changes))


def content(name: str, value: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(value) and None


def truncated(keep: Callable[[int], int]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        whole = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(whole[: keep(len(whole))])

    return corrupt


def pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def set_value(key: str, value: float) -> Callable[[Path], None]:
    return with_tensors(lambda tensors: tensors[key].flatten()[:1].fill_(value))


# name -> (method, what is done to its files, what the error says); found by the header alone
IN_HEADERS: dict[str, tuple[Any, Callable[[Path], object], str]] = {
    "a pickle": (LORA, pickled, r"pickled \.bin files are not read"),
    "a pickle by another name": (LORA, content(TENSORS, pickle.dumps({"a": 1})), "truncated or not a safetensors"),
    "nothing": (LORA, content(TENSORS, b""), "truncated or not a safetensors"),
    "half a file": (LORA, truncated(lambda size: size // 2), "truncated or not a safetensors"),
    "a byte short": (LORA, truncated(lambda size: size - 1), "truncated or not a safetensors"),
    "half a header": (LORA, truncated(lambda _: 100), "truncated or not a safetensors"),
    "a header longer than any file": (LORA, content(TENSORS, b"\xff" * 64), "truncated or not a safetensors"),
    "a huge header": (LORA, content(TENSORS, struct.pack("<Q", 1 << 25) + b" " * (1 << 25)), "at most 16777216 bytes"),
    "a header that is a list": (LORA, with_header(lambda _: b"[]"), "must hold a JSON object"),
    "a header that is nested": (LORA, with_header(lambda _: b"[" * 100_000), "is not JSON"),
    "a header with NaN": (LORA, entry(UP + "lora_A.weight", shape=[float("nan"), 4]), "no shape and place"),
    "a tensor that is no dict": (LORA, with_header(lambda h: h.update({UP + "lora_A.weight": 3})), "must have a dtype"),
    "an unknown dtype": (LORA, entry(UP + "lora_A.weight", dtype="F8_E4M3"), "must have a dtype"),
    "a negative size": (LORA, entry(UP + "lora_A.weight", shape=[-4, -24]), "no shape and place"),
    "a size that is text": (LORA, entry(UP + "lora_A.weight", shape=["4", 24]), "no shape and place"),
    "a place before the file": (LORA, entry(UP + "lora_A.weight", data_offsets=[-384, 0]), "no shape and place"),
    "a place behind the file": (
        LORA,
        entry(UP + "lora_A.weight", data_offsets=[1 << 40, (1 << 40) + 384]),
        "does not lie where",
    ),
    "a place of another size": (LORA, entry(UP + "lora_A.weight", data_offsets=[0, 8]), "does not lie where"),
    "sizes whose product wraps": (LORA, entry(UP + "lora_A.weight", shape=[1 << 40, 1 << 40]), "does not lie where"),
    "a path in a name": (
        LORA,
        with_header(lambda h: h.update({"../../etc/passwd": h.pop(UP + "lora_A.weight")})),
        "is missing",
    ),
    "a missing tensor": (LORA, with_tensors(lambda t: t.pop(UP + "lora_B.weight")), r"up\.lora_B\.weight is missing"),
    "a tensor too many": (LORA, with_tensors(lambda t: t.update(more=torch.ones(1))), "more is not expected"),
    "another rank": (
        LORA,
        with_tensors(lambda t: t.update({UP + "lora_A.weight": torch.ones(5, IN)})),
        r"shape \(5, 24\), expected",
    ),
    "integers": (
        LORA,
        with_tensors(lambda t: t.update({UP + "lora_A.weight": torch.ones(4, IN).long()})),
        "expected floats",
    ),
    "a config that is no JSON": (LORA, content(CONFIG, b"{"), "is not JSON"),
    "a config that is nested": (LORA, content(CONFIG, b'{"a":' * 100_000), "is not JSON"),
    "a huge config": (LORA, content(CONFIG, b" " * (2 << 20)), "at most 1048576 bytes"),
    "a config of a list": (LORA, content(CONFIG, b"[1]"), "must hold a JSON object"),
    "a config that was edited": (
        LORA,
        lambda folder: (folder / CONFIG).write_text((folder / CONFIG).read_text().replace('alpha": 6', 'alpha": 7')),
        "is not the one",
    ),
    "no method": (LORA, with_config(peft_type=None), "peft_type must be one of"),
    "an unknown method": (LORA, with_config(peft_type="IA3"), "peft_type must be one of .* got 'IA3'"),
    "trained biases": (LORA, with_config(bias="all"), r"option bias='all' is not supported"),
    "DoRA": (LORA, with_config(use_dora=True), "use_dora=True is not served"),
    "OFT": (OFT, lambda folder: None, "OFT adapters are not served by a bank"),
    "a rank of two billion": (LORA, with_config(r=2_000_000_000), "r must be an integer"),
    "a rank that is text": (LORA, with_config(r="8"), "r must be an integer"),
    "a scaling that is no number": (LORA, with_config(lora_alpha=float("nan")), "lora_alpha must be a finite"),
    "a target of another kind": (LORA, with_config(target_modules=7), "target_modules must be"),
    "no target": (LORA, with_config(target_modules=None), "target_modules must be given"),
    "a target that is nowhere": (LORA, with_config(target_modules=["q_proj"]), "matches no layer of the bank"),
    "a target without tensors": (LORA, with_config(target_modules=["q"]), "is not expected"),
    "a slow expression": (LORA, with_config(target_modules=r"(.*.*)*x"), "repeat no group"),
    "a slow pattern": (LORA, with_config(rank_pattern={r"(a|a)+$": 3}), "repeat no group"),
    "many repetitions": (LORA, with_config(target_modules=".*" * 30), "6 repetitions"),
    "half an expression": (LORA, with_config(target_modules="(q"), "regular expression"),
    "MoS of another pool": (MOS, with_config(pool_rank=8), r"expected \("),
    "MoS that cuts unevenly": (MOS, with_config(shards_per_vector=5), "does not divide"),
    "BOFT of other blocks": (BOFT, with_config(boft_block_size=2), r"has shape .* expected"),
    "BOFT that does not fit": (BOFT, with_config(boft_block_size=5), "does not divide"),
    "BOFT of many factors": (BOFT, with_config(boft_n_butterfly_factor=10_000), "butterfly factors"),
    "FourierFT of other numbers": (FOURIERFT, with_config(n_frequency=36), "expected"),
    "FourierFT of too many": (FOURIERFT, with_config(n_frequency=1 << 40), "n_frequency must be at most"),
}

# Found in the numbers.
IN_NUMBERS: dict[str, tuple[Any, Callable[[Path], object], str]] = {
    "NaN in A": (LORA, set_value(UP + "lora_A.weight", float("nan")), r"up\.lora_A\.weight holds values .* not finite"),
    "infinity in B": (LORA, set_value(UP + "lora_B.weight", float("inf")), r"up\.lora_B\.weight holds .* not finite"),
    "more than float32 holds": (
        LORA,
        with_tensors(lambda t: t.update({UP + "lora_A.weight": torch.full((4, IN), 1e300, dtype=torch.float64)})),
        "not finite in torch.float32",
    ),
    "a scaling beyond float32": (LORA, with_config(lora_alpha=1e300), "scaling is not finite"),
    "NaN in a pool": (MOS, set_value("pools.up.16x24.pool_A", float("nan")), r"pool_A holds values"),
    "an index beyond the pool": (
        MOS,
        set_value("layers.blocks.1.up.index_A", 1 << 40),
        r"index_A must hold shard numbers in \[0",
    ),
    "a negative index": (MOS, set_value("layers.blocks.0.up.index_B", -1), r"index_B must hold shard numbers in \[0"),
    "infinity in a block": (BOFT, set_value(UP + "boft_R", float("inf")), r"boft_R holds values"),
    "NaN in a scale": (BOFT, set_value(UP + "boft_s", float("nan")), r"boft_s holds values"),
    "NaN in a spectrum": (FOURIERFT, set_value(UP + "fourierft_spectrum", float("nan")), "spectrum holds values"),
    "FourierFT's scaling beyond float32": (FOURIERFT, with_config(scaling=1e300), "scaling is not finite"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("good"), OPTIONS["lora"])


class Guard:
    """A bank that serves; what a refused call must not have changed."""

    def __init__(self, good: Path) -> None:
        self.model = Model().requires_grad_(False)
        self.bank = make_bank(self.model, {"good": good}, max_resident=1)
        self.expected, self.before = self.output(), self.state()

    def output(self) -> Tensor:
        with torch.no_grad(), self.bank.route(["good", None]):
            return self.model(randn(2, IN))

    def state(self) -> Any:
        stats = self.bank.stats()
        del stats["hits"]
        return self.bank.names(), stats, len(self.bank._residency.families()), self.bank._residency._space.extents._free

    def check(self) -> None:
        assert self.state() == self.before
        assert torch.equal(self.output(), self.expected)


@pytest.mark.parametrize("case", IN_HEADERS)
def test_what_a_header_shows(case: str, good: Path, tmp_path: Path):
    method, corrupt, said = IN_HEADERS[case]
    folder = save(tmp_path / "bad", method.config())
    corrupt(folder)
    guard = Guard(good)
    for call in (guard.bank.register, guard.bank.load):
        start = time.monotonic()
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            call("bad", folder)
        assert time.monotonic() - start < 20
        assert len(str(caught.value)) < 5000
        guard.check()


@pytest.mark.parametrize("case", IN_NUMBERS)
def test_what_numbers_show(case: str, good: Path, tmp_path: Path):
    method, corrupt, said = IN_NUMBERS[case]
    folder = save(tmp_path / "bad", method.config())
    corrupt(folder)
    guard = Guard(good)
    with pytest.raises(ValueError, match=said) as caught:
        guard.bank.load("bad", folder)
    assert "adapter 'bad'" in str(caught.value)
    guard.check()
    guard.bank.register("bad", folder)  # its header is in order
    with pytest.raises(ValueError, match=said):
        guard.bank.plan(["bad"])
    assert torch.equal(guard.output(), guard.expected)
    guard.bank.unload("bad")
    guard.check()


def test_a_rank_over_the_limit(good: Path, tmp_path: Path):
    guard = Guard(good)
    for config in (LORA.config(r=9), LORA.config(rank_pattern={"up": 9}), MOS.config(r=12, pool_rank=16)):
        with pytest.raises(ValueError, match=r"has rank \d+, and the bank's max_rank is 8"):
            guard.bank.load("x", save(tmp_path / "x", config))
        guard.check()


def test_an_adapter_for_another_base(good: Path, tmp_path: Path):
    def other() -> nn.Module:
        return nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(IN, 20)})])})

    def deeper() -> nn.Module:
        return Model(n_blocks=3)

    guard = Guard(good)
    for make, said in ((other, r"up\.lora_B\.weight has shape \(20, 4\)"), (deeper, r"blocks\.2\..* is not expected")):
        with pytest.raises(ValueError, match=said):
            guard.bank.load("x", save(tmp_path / "x", LORA.config(), base=make))
        guard.check()
    model = Model()
    narrow = make_bank(model, target_modules=["up"])
    with pytest.raises(ValueError, match="is not expected"):
        narrow.load("x", good)


def test_files_that_lie_unevenly(good: Path, tmp_path: Path):
    """A header of any length: a number may start anywhere."""
    folder = save(tmp_path / "x", LORA.config())
    with_header(lambda header: json.dumps(header).encode() + b" ")(folder)
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"good": good, "x": folder})
    with torch.no_grad(), bank.route(["good", "x"]):
        first, second = model(randn(1, IN).expand(2, IN))
    torch.testing.assert_close(first, second)


def test_arguments_of_a_bank():
    for options, said in (
        ({"max_resident": 0}, "max_resident must be"),
        ({"max_resident_bytes": -1}, "max_resident_bytes must be"),
        ({"max_rank": 0}, "max_rank must be"),
        ({"target_modules": ["nowhere"]}, "matches no layer"),
        ({"target_modules": ["norm"]}, "not a linear layer"),
    ):
        model = Model()
        with pytest.raises(ValueError, match=said):
            AdapterBank(model, **options)
        assert type(model.blocks[0].up) is nn.Linear
    with pytest.raises(TypeError, match="dtype must be"):
        AdapterBank(Model(), dtype=torch.int32)
    with pytest.raises(TypeError, match=r"must be an nn\.Module"):
        AdapterBank(None)
    with pytest.raises(ValueError, match="model holds adapters"):
        AdapterBank(adapted_model(LORA))


@pytest.mark.parametrize("rows", ["good", None, [1], ["good", 2.0], {"good"}])
def test_rows_that_are_none(rows, good: Path):
    guard = Guard(good)
    for call in (guard.bank.route, guard.bank.plan):
        with pytest.raises(TypeError, match="rows must be a list of names"):
            call(rows)
    guard.check()


def test_a_plan_of_another_bank(good: Path):
    first, second = Guard(good), Guard(good)
    plan = first.bank.plan(["good"])
    with pytest.raises(ValueError, match="must be one of this bank"):
        second.bank.bind(plan)
    with pytest.raises(ValueError, match="tokens must be"):
        first.bank.plan(["good"], tokens=0)
    assert len(ALL_LINEAR) == len(first.bank.sites)
