"""bench/accelerated.py on tiny layers and models: all that it measures, and that what is wrong gets no figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import accelerated
import tax

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(tax, "PAIR_SECONDS", 0.0)
    monkeypatch.setattr(tax, "ROUNDS", 3)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setattr(accelerated, "LLAMA", {**small, "vocab_size": 50})
    monkeypatch.setattr(accelerated, "SEVEN_BILLION", {**small, "vocab_size": 50})
    monkeypatch.setattr(torch, "compile", lambda layer, **_: layer)
    monkeypatch.setattr(tax.warnings, "filterwarnings", lambda *_: None)
    monkeypatch.setattr(tax.logging, "disable", lambda *_: None)


COMMAND = ["--sizes", "64x64", "--tokens", "3", "--threads", "1"]


def test_everything_is_measured(tmp_path: Path, capsys, hurried):
    path = tmp_path / "figures.json"
    assert accelerated.main([*COMMAND, "--json", str(path)]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    record = json.loads(path.read_text())
    titles = ["LoRA r16", "BOFT b8 m1", "FourierFT n1000"]
    assert [(row["method"], row["dtype"]) for row in record["rows"]] == [
        (title, dtype) for dtype in ("float32", "bfloat16") for title in titles
    ]
    for row in record["rows"]:
        assert max(row["errors"].values()) <= row["limit"]
        for phase in ("forward", "training"):
            assert row[phase].keys() == {"PEFT", "accelerated", "fastpeft"} and min(row[phase].values()) > 0
            assert row[f"{phase}_over_ours"] > 0
    assert record["token"]["errors"]["PEFT"] == 1 and min(record["token"]["taxes"].values()) > 0
    assert [row["method"] for row in record["compiled"]] == ["LoRA r16", "BOFT b8 m4", "FourierFT n1000"]
    assert all(row["forward"] > 0 and row["training"] > 0 for row in record["compiled"])
    assert record["accelerate"]["layers"] == 7 * 2 and "takes over 14 layers" in printed
    assert "wrong" not in printed


def test_a_wrong_layer_gets_no_figures(monkeypatch, capsys, hurried):
    honest = accelerated.build_both

    def spoiled(*arguments):
        theirs, ours = honest(*arguments)
        with torch.no_grad():
            theirs.lora_B["default"].weight.mul_(1.01)
        return theirs, ours

    monkeypatch.setattr(accelerated, "build_both", spoiled)
    assert accelerated.main([*COMMAND, "--methods", "lora-r16", "--dtypes", "float32"]) == 1
    assert "| 64→64 | 3 | LoRA r16 | wrong | wrong | right | – | – |" in capsys.readouterr().out


def test_methods_that_peft_lacks(capsys):
    with pytest.raises(SystemExit):
        accelerated.parse(["--methods", "mos"])
    assert "PEFT has no MoS" in capsys.readouterr().err
