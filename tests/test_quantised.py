"""Adapters over quantised bases of other libraries, which are called as they are: bitsandbytes and torchao on a CPU.

Ours first, then PEFT's, accelerated.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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


# ---------------------------------------------------------------------- PEFT's models, accelerated

CASES = {
    "lora": ("LoraConfig", {"r": 4, "lora_alpha": 6}),
    "lora-options": ("LoraConfig", {"r": 4, "use_rslora": True, "lora_dropout": 0.3, "init_lora_weights": "gaussian"}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40, "scaling": 15.0}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
}
every_case = pytest.mark.parametrize("case", CASES)
no_cuda_helper = pytest.mark.usefixtures("no_cuda_helper")


class OneLayer(nn.Module):
    """With the marks that transformers leaves on a model it has loaded quantised, by which PEFT chooses its layers."""

    def __init__(self, base: str) -> None:
        super().__init__()
        self.layer = BASES[base]()
        self.is_loaded_in_4bit = base in ("bitsandbytes-nf4", "bitsandbytes-fp4")
        self.is_loaded_in_8bit = base == "bitsandbytes-int8"
        if base.startswith("torchao"):
            config = pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig
            self.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(get_apply_tensor_subclass=config))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def peft_model(base: str, case: str, **changes) -> nn.Module:
    peft = pytest.importorskip("peft")
    config_class, options = CASES[case]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        OneLayer(base), getattr(peft, config_class)(target_modules=["layer"], **options, **changes)
    )
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(randn(*parameter.shape, seed=seed) * (0.1 if "_R" in name or "boft_s" in name else 0.4))
    return model


def results(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    x = randn(7, D_IN).requires_grad_()
    torch.manual_seed(3)  # for dropout
    y = model(x)
    y.backward(randn(*y.shape, seed=2))
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@no_cuda_helper
@every_case
@every_base
def test_accelerated(base: str, case: str, calls):
    theirs, ours = peft_model(base, case), peft_model(base, case)
    assert fastpeft.accelerate(ours, strict=True).accelerated == ["base_model.model.layer"]
    for training in (True, False):
        found, wanted = results(ours.train(training)), results(theirs.train(training))
        assert found.keys() == wanted.keys() and len(found) > 2
        for name, tensor in wanted.items():
            # Two roundings of sums of at most D_OUT products in float32.
            share = 8 * D_OUT**0.5 * torch.finfo(torch.float32).eps
            if base == "bitsandbytes-int8" and case in ("boft", "oft"):  # the last bit of a rotated x can tip a step
                share = 1 / 127
            assert found[name].dtype == tensor.dtype
            assert (found[name] - tensor).norm() <= share * tensor.norm(), name
    assert calls["ours"] > 0 and calls["peft"] == 0


@no_cuda_helper
@every_base
def test_what_peft_does_over_a_quantised_base(base: str, tmp_path: Path):
    theirs, ours = peft_model(base, "lora").eval(), peft_model(base, "lora").eval()
    fastpeft.accelerate(ours, strict=True)
    x = randn(7, D_IN)
    wanted = theirs(x)
    for model in (ours, theirs):
        model.save_pretrained(tmp_path / str(model is ours))
    written, right = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("True", "False"))
    assert written == right
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    assert (copy.deepcopy(ours)(x) - wanted).norm() <= 1e-5 * wanted.norm()
    if base != "torchao-int4":  # PEFT knows how to merge into torchao's int8 alone
        for model in (ours, theirs):
            model.merge_adapter()
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


@every_base
def test_dora_stays_peft_s(base: str):
    """Its norms are those of the dense weight, which PEFT dequantises in every call."""
    model = peft_model(base, "lora", use_dora=True)
    report = fastpeft.accelerate(model)
    assert not report.accelerated and "use_dora needs a dense weight" in str(report)
    with pytest.raises(
        ValueError, match=r"layer 'base_model\.model\.layer' cannot be accelerated: adapter 'default': "
    ):
        fastpeft.accelerate(model, strict=True)
    assert type(model.base_model.model.layer).__module__.startswith("peft.")
