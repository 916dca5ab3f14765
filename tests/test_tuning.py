"""Measured launch settings: found, kept in a file, and taken from there. The stopwatch is ours: there may be no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastpeft.kernels import tuning
from fastpeft.kernels.boft import FREE, butterfly_fwd

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch) -> Path:
    path = tmp_path / "caches" / "tuned.json"
    monkeypatch.setenv("FASTPEFT_TUNED", str(path))
    tuning.measured.cache_clear()
    yield path
    tuning.measured.cache_clear()


def settled(tokens: int = 100, warps: int = 4) -> dict[str, int]:
    settings = {"BLOCK_T": 32, "num_warps": warps, "FIXED": 3}
    return tuning.settle("some_kernel", (384, torch.bfloat16), tokens, DEVICE, settings, ("BLOCK_T", "num_warps"))


def stopwatch(monkeypatch, cost):
    """Calls take as long as `cost` says for the settings they see; what was seen is returned."""
    seen: list[dict[str, int]] = []

    def seconds(call):
        seen.append(call())
        return cost(**seen[-1])

    monkeypatch.setattr(tuning, "seconds", seconds)
    return seen


def test_finds_and_keeps_what_is_faster(file: Path, monkeypatch):
    seen = stopwatch(monkeypatch, lambda BLOCK_T, num_warps, FIXED: abs(BLOCK_T - 128) + abs(num_warps - 2) + 1)
    found = tuning.tune(settled)
    assert list(found.values()) == [{"BLOCK_T": 128, "num_warps": 2}]
    assert all(settings["FIXED"] == 3 for settings in seen)
    assert settled() == {"BLOCK_T": 128, "num_warps": 2, "FIXED": 3}
    tuning.measured.cache_clear()  # as in a new process
    assert settled(tokens=65) == settled(tokens=128) == {"BLOCK_T": 128, "num_warps": 2, "FIXED": 3}
    assert settled(tokens=129)["BLOCK_T"] == settled(tokens=64)["BLOCK_T"] == 32
    assert json.loads(file.read_text()) == {tuning.chip_of(DEVICE): found}


def test_goes_on_from_what_was_kept(monkeypatch):
    stopwatch(monkeypatch, lambda BLOCK_T, **_: abs(BLOCK_T - 64) + 1)
    tuning.tune(settled)
    stopwatch(monkeypatch, lambda BLOCK_T, num_warps, **_: abs(BLOCK_T - 64) + abs(num_warps - 8) + 1)
    assert list(tuning.tune(settled).values()) == [{"BLOCK_T": 64, "num_warps": 8}]
    assert settled()["BLOCK_T"] == 64


def test_small_gains_are_noise(file: Path, monkeypatch):
    stopwatch(monkeypatch, lambda BLOCK_T, **_: 1 - 1e-4 * BLOCK_T)
    assert tuning.tune(settled) == {}
    assert settled()["BLOCK_T"] == 32


def test_settings_that_do_not_compile_are_left(monkeypatch):
    def cost(BLOCK_T, num_warps, FIXED):
        if BLOCK_T > 64:
            raise RuntimeError("out of resources")
        return 1 / BLOCK_T

    stopwatch(monkeypatch, cost)
    assert list(tuning.tune(settled).values()) == [{"BLOCK_T": 64, "num_warps": 4}]


def test_a_call_that_fails_leaves_nothing_behind(file: Path):
    def call():
        settled()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        tuning.tune(call)
    assert not file.exists() and settled()["BLOCK_T"] == 32
    with pytest.raises(RuntimeError, match="running already"):
        tuning.tune(lambda: tuning.tune(settled))


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": {"k": {"BLOCK_T": "32"}}}', '{"cpu": {"k": {"BLOCK_T": 24}}}'])
def test_a_broken_file_is_named(file: Path, text: str):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=str(file)):
        settled()
    assert file.read_text() == text


def test_a_launcher_takes_them(monkeypatch):
    """And computes the same."""
    g = torch.Generator().manual_seed(0)
    x, blocks = torch.randn(40, 32, generator=g), torch.randn(2, 8, 4, 4, generator=g)
    before = butterfly_fwd(x, blocks)
    wanted = {"BLOCK_T": 16, "num_warps": 2, "num_stages": 3}

    def cost() -> float:
        (given,) = tuning._search.given.values() or [{}]
        return 1 + sum(given.get(name) != wanted[name] for name in FREE)

    monkeypatch.setattr(tuning, "seconds", lambda call: (call(), cost())[1])
    assert list(tuning.tune(lambda: butterfly_fwd(x, blocks)).values()) == [wanted]
    assert torch.allclose(butterfly_fwd(x, blocks), before, rtol=1e-6, atol=1e-6)
