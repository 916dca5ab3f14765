"""Adapters over quantised bases of other libraries, which are called as they are: bitsandbytes and torchao on a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import assert_unchanged, every_method, fill, make_linear, plain_forward, randn, snapshot
from torch import nn

import fastpeft

D_IN, D_OUT = 64, 128  # bitsandbytes' blocks are 64 entries
OPTIONS = {"boft": {"boft_block_size": 8}, "mos": {"pool_rank": 4}}


def bitsandbytes(name: str, **options) -> nn.Module:
    layers = pytest.importorskip("bitsandbytes").nn
    layer = getattr(layers, name)(D_IN, D_OUT, bias=False, **options)
    layer.load_state_dict(make_linear(D_IN, D_OUT, bias=False).state_dict())
    return layer.to("cpu")


def torchao(config: str, **options) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(make_linear(D_IN, D_OUT, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, getattr(quantization, config)(**options))
    return model[0]


WEIGHT_ONLY: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes-nf4": lambda: bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="nf4"),
    "bitsandbytes-fp4": lambda: bitsandbytes("Linear4bit", compute_dtype=torch.float32, quant_type="fp4"),
    "torchao-int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao-int4": lambda: torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
}
BASES = {
    **WEIGHT_ONLY,
    "bitsandbytes-int8": lambda: bitsandbytes("Linear8bitLt", has_fp16_weights=False),  # its inputs are rounded as well
}
every_base = pytest.mark.parametrize("base", BASES)


def config_of(method):
    return method.config(**OPTIONS.get(method.name, {}))


def quantised(base: str, method) -> nn.Module:
    return fill(fastpeft.adapt(BASES[base](), config_of(method)))


@every_method
@every_base
def test_the_base_is_called_as_it_is(base: str, method):
    frozen, layer = BASES[base](), quantised(base, method)
    adapter = layer.adapters["default"]
    x = randn(7, D_IN).requires_grad_()
    y = layer(x)
    if adapter.rotates:
        wanted = adapter.post(frozen(adapter.pre(x)), None)
    else:
        wanted = frozen(x) + adapter.delta(x)
    assert torch.equal(y, wanted)
    y.backward(randn(*y.shape, seed=2))
    assert x.grad is not None and x.grad.isfinite().all()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for name, parameter in layer.named_parameters() if "adapters" not in name)


@every_method
@pytest.mark.parametrize("base", WEIGHT_ONLY)
def test_against_the_formula(base: str, method):
    layer = quantised(base, method)
    with torch.no_grad():
        dense = BASES[base]()(torch.eye(D_IN)).T.double()
        x = randn(7, D_IN)
        exact = plain_forward([copy.deepcopy(layer.adapters["default"]).double()], x.double(), lambda z: z @ dense.T)
        found = layer(x)
    # A sum of D_IN products in the base, as many and fewer in the adapter, each rounded to float32.
    bound = 4 * D_IN**0.5 * torch.finfo(torch.float32).eps * exact.norm()
    assert (found.double() - exact).norm() <= bound


@every_method
@every_base
def test_a_fresh_adapter_changes_nothing(base: str, method):
    x = randn(7, D_IN)
    assert torch.equal(fastpeft.adapt(BASES[base](), config_of(method))(x), BASES[base]()(x))


@every_method
@every_base
def test_merging_says_what_to_do(base: str, method):
    model = nn.Sequential(quantised(base, method))
    x = randn(7, D_IN)
    y, types = model(x), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"layer '0'.* no dense floating-point weight to merge into: keep the adapter"):
        fastpeft.merge(model)
    assert torch.equal(model(x), y) and types == [type(module) for module in model.modules()]


@every_method
@every_base
def test_saved_and_loaded(base: str, method, tmp_path: Path):
    model, x = nn.Sequential(quantised(base, method)), randn(7, D_IN)
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(nn.Sequential(BASES[base]()), tmp_path)(x), model(x))


@every_base
def test_dora_wants_a_dense_weight(base: str):
    layer = BASES[base]()
    before = None if base.startswith("torchao") else snapshot(layer)  # whose numbers cannot be compared
    with pytest.raises(ValueError, match="use_dora=True needs the norm of every row"):
        fastpeft.adapt(layer, fastpeft.LoraConfig(r=4, use_dora=True, target_modules="all-linear"))
    if before is not None:
        assert_unchanged(layer, before)
