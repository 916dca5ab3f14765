"""Checkpoints of others than PEFT's save_pretrained: raw state dicts, and the FourierFT authors' convention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import FOURIERFT, IN, OUT, adapted, fill, make_linear, randn
from safetensors.torch import load_file, save_file
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")


def base() -> nn.Sequential:
    return nn.Sequential(make_linear(IN, IN), make_linear())


CONFIGS = [
    peft.LoraConfig(r=4, target_modules=["0", "1"]),
    peft.LoraConfig(r=4, use_dora=True, target_modules=["0", "1"]),
    peft.BOFTConfig(boft_block_size=4, target_modules=["0", "1"]),
    peft.OFTConfig(oft_block_size=4, target_modules=["0", "1"]),
    peft.FourierFTConfig(n_frequency=20, target_modules=["0", "1"]),
]
NAMES = ["lora", "dora", "boft", "oft", "fourierft"]


def scramble(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_state_dict(model: nn.Module, folder: Path, more: dict) -> None:
    """The folder that somebody gets who saves the whole state dict's adapter part beside PEFT's configuration."""
    model.save_pretrained(folder)
    marks = ("lora_", "boft_", "oft_", "fourierft_")
    tensors = {
        key: value.clone() for key, value in model.state_dict().items() if any(f".{mark}" in key for mark in marks)
    }
    save_file({**tensors, **more}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_adapters_name_may_stand_in_the_keys(config, tmp_path: Path, monkeypatch):
    # PEFT tries to compile a CUDA helper for BOFT, for minutes.
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    theirs = scramble(peft.get_peft_model(base(), config, adapter_name="mine")).eval()
    write_state_dict(theirs, tmp_path, {})
    (folder,) = {path.parent for path in tmp_path.rglob("adapter_config.json")}
    (tmp_path / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")
    assert any(".mine" in key for key in load_file(folder / "adapter_model.safetensors"))
    ours, x = fastpeft.load_adapter(base(), folder), randn(5, IN)
    wanted = theirs(x)
    torch.testing.assert_close(ours.eval()(x), wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


def test_one_adapter_is_expected(tmp_path: Path):
    theirs = peft.get_peft_model(base(), CONFIGS[0])
    write_state_dict(theirs, tmp_path, {"base_model.model.0.lora_A.other.weight": torch.zeros(4, IN)})
    with pytest.raises(ValueError, match="holds the adapters default, other, one was expected"):
        fastpeft.load_adapter(base(), tmp_path)


def authors_layer(layer: nn.Linear, spectrum: torch.Tensor, n: int, seed: int, scale: float, x: torch.Tensor):
    """y = W x + b + x ΔW, ΔW = scale · Re ifft2 of an (in, out) spectrum (arXiv 2405.03003, the authors' code)."""
    d_in, d_out = layer.in_features, layer.out_features
    places = torch.randperm(d_in * d_out, generator=torch.Generator().manual_seed(seed))[:n]
    dense = torch.zeros(d_in, d_out, dtype=torch.float64)
    dense[places // d_out, places % d_out] = spectrum.double()
    delta = torch.fft.ifft2(dense).real * scale
    return x.double() @ layer.weight.double().T + layer.bias.double() + x.double() @ delta


@pytest.mark.parametrize("d_out", [OUT, IN])
def test_the_authors_convention(d_out: int, tmp_path: Path):
    layer = adapted(FOURIERFT, make_linear(IN, d_out), transposed=True, n_frequency=30, random_loc_seed=5)
    x, spectrum = randn(5, IN), layer.adapters["default"].spectrum
    exact = authors_layer(layer, spectrum.detach(), 30, 5, 20.0, x)
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=4e-6 * exact.abs().max().item())
    fastpeft.save_adapter(nn.Sequential(layer), tmp_path)
    again = fastpeft.load_adapter(nn.Sequential(make_linear(IN, d_out)), tmp_path)
    assert torch.equal(again(x), layer(x))


def test_it_is_not_taken_for_pefts(tmp_path: Path):
    model = fill(fastpeft.adapt(base(), FOURIERFT.config(transposed=True)))
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["transposed"] is True
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(base(), str(tmp_path))
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "transposed": False}))
    with pytest.raises(ValueError, match="fourierft_spectrum is missing"):
        fastpeft.load_adapter(base(), tmp_path)
