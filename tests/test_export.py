"""export_lora: adapters of every method as LoRA folders, read back by ours and by PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import BOFT, FOURIERFT, IN, LORA, METHODS, MOS, OFT, OUT, adapted, every_method, fill, make_linear, randn
from torch import nn

import fastpeft
from fastpeft.interop.export import low_rank_of, truncated


def chain() -> nn.Sequential:
    return nn.Sequential(make_linear(IN, IN), nn.GELU(), make_linear(IN, IN, seed=1), nn.GELU(), make_linear(seed=2))


def filled(method, **changes) -> nn.Sequential:
    return fill(fastpeft.adapt(chain(), method.config(**changes)))


@every_method
def test_exact_without_a_rank(method, tmp_path: Path):
    model, x = filled(method), randn(5, IN)
    errors = fastpeft.export_lora(model, tmp_path)
    assert errors.keys() == {"0", "2", "4"} and all(error < 1e-6 for error in errors.values())
    lora = fastpeft.load_adapter(chain(), tmp_path)
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=4e-6 * model(x).abs().max().item())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_rank_gives_the_nearest_matrix(method, tmp_path: Path):
    layer = adapted(method)
    x = torch.eye(IN)
    delta = (layer(x) - nn.Linear.forward(layer, x)).double().T
    for rank in (1, 2, OUT):
        A, B, error = low_rank_of(layer, "default", rank)
        assert A.shape[0] == B.shape[1] <= rank
        rest = torch.linalg.svdvals(delta)[rank:].norm()
        left = (delta - B.double() @ A.double()).norm()
        assert left <= rest + 1e-5 * delta.norm()
        assert error == pytest.approx(float(left / delta.norm()), abs=1e-5)


def test_large_matrices_go_by_products_alone():
    left, right = randn(300, 6, dtype=torch.float64), randn(6, 200, seed=2, dtype=torch.float64)
    noise = 1e-3 * randn(300, 200, seed=3, dtype=torch.float64)
    state = torch.get_rng_state()
    A, B = truncated(left @ right + noise, 6)
    assert torch.equal(torch.get_rng_state(), state)
    best = torch.linalg.svdvals(left @ right + noise)[6:].norm()
    assert (left @ right + noise - B @ A).norm() <= 1.01 * best


def test_dora_and_conv1d(tmp_path: Path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(IN, IN), make_linear())
    fill(fastpeft.adapt(model, LORA.config(use_dora=True)))
    errors = fastpeft.export_lora(model, tmp_path)
    assert max(errors.values()) < 1e-6
    bare = nn.Sequential(conv1d(IN, IN), make_linear())
    bare[0].load_state_dict({name: getattr(model[0], name) for name in ("weight", "bias")})
    x = randn(5, IN)
    lora = fastpeft.load_adapter(bare, tmp_path)
    torch.testing.assert_close(lora(x), model(x), rtol=0, atol=4e-6 * model(x).abs().max().item())


@pytest.mark.parametrize("method", [MOS, FOURIERFT, BOFT, OFT], ids=str)
def test_peft_reads_it(method, tmp_path: Path):
    peft = pytest.importorskip("peft")
    model, x = filled(method), randn(5, IN)
    fastpeft.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(chain(), str(tmp_path))
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=4e-6 * model(x).abs().max().item())


def test_an_adapter_that_changes_nothing(tmp_path: Path):
    model, x = fastpeft.adapt(chain(), FOURIERFT.config()), randn(5, IN)
    assert set(fastpeft.export_lora(model, tmp_path).values()) == {0.0}
    assert torch.equal(fastpeft.load_adapter(chain(), tmp_path)(x), chain()(x))


def test_layers_of_different_ranks(tmp_path: Path):
    model = filled(LORA, rank_pattern={"2": 7})
    fastpeft.export_lora(model, tmp_path, rank=5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (5, {"0": 4, "4": 4})


def test_what_cannot_be_exported(tmp_path: Path):
    model = filled(BOFT)
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        fastpeft.export_lora(model, tmp_path, rank=0)
    with pytest.raises(ValueError, match="adapter_name must be one of default, got 'other'"):
        fastpeft.export_lora(model, tmp_path, "other")
    fastpeft.merge(model)
    with pytest.raises(ValueError, match="unmerge first"):
        fastpeft.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())
