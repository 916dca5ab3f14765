"""Which layers are taken over, which are left alone and why, and that the others stay as they were."""

from __future__ import annotations

import copy
import re
import sys

import pytest
import torch
from helpers import Allocations
from peft_models import (
    CASES,
    MARKS,
    PATHS,
    Tower,
    agree,
    every_case,
    fill,
    inputs,
    pair,
    peft,
    peft_model,
    results,
)
from torch import nn

import fastpeft
from fastpeft.interop.layer import Accelerated

pytestmark = MARKS


@every_case
def test_decelerate_gives_peft_s_model_back(case):
    ours, theirs = pair(case)
    ours.eval()(inputs())
    assert fastpeft.decelerate(ours) is ours
    for (path, mine), their in zip(ours.named_modules(), theirs.modules(), strict=True):
        assert type(mine) is type(their), path
        assert vars(mine).keys() == vars(their).keys(), path
    if case == "coft":  # its forward has written to the parameters
        theirs.load_state_dict(ours.state_dict())
    for (name, mine), (_, their) in zip(
        results(ours, inputs()).items(), results(theirs.eval(), inputs()).items(), strict=True
    ):
        assert torch.equal(mine, their), name


def test_twice_is_harmless():
    ours, theirs = pair("lora")
    ours(inputs())
    report = fastpeft.accelerate(ours)
    assert sorted(report.accelerated) == sorted(PATHS)
    agree(ours, theirs)
    fastpeft.decelerate(ours)
    fastpeft.decelerate(ours)
    assert not any(isinstance(module, Accelerated) for module in ours.modules())


def test_twice_takes_what_came_later(calls):
    ours, theirs = pair("lora", target_modules=["up"])
    for model in (ours, theirs):
        model.add_adapter("other", CASES["lora"](target_modules=["down"]))
        model.set_adapter("other")
        fill(model)
    assert len(fastpeft.accelerate(ours, strict=True).accelerated) == 4
    agree(ours, theirs)
    assert calls["peft"] > 0  # layers without an active adapter are the base alone


def test_twice_while_merged_keeps_what_is_accelerated():
    ours, theirs = pair("lora")
    ours.merge_adapter()
    assert len(fastpeft.accelerate(ours, strict=True).accelerated) == 6
    ours.unmerge_adapter()
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


def test_an_adapter_added_later_that_is_not_covered_is_computed_by_peft(calls):
    ours, theirs = pair("lora")
    ours(inputs())
    for model in (ours, theirs):
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, lora_bias=True, target_modules=["up"], init_lora_weights=False))
        model.set_adapter("other")
        fill(model)
    calls.clear()
    agree(ours, theirs)
    assert calls["ours"] == 0
    report = fastpeft.accelerate(ours)
    assert sorted(report.left_alone) == [path for path in PATHS if path.endswith("up")]
    assert "adapter 'other': lora_B has a bias (lora_bias)" in str(report)
    assert type(ours.base_model.model.blocks[0].inner["up"]) is peft.tuners.lora.Linear


def merged(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].merge()


def mixed_dtypes(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_B.bfloat16()


def integers(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"].weight = nn.Parameter(torch.ones(4, 16).char(), requires_grad=False)


def other_shape(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"].weight = nn.Parameter(torch.ones(4, 17))


def other_module(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"] = nn.Sequential()


def other_dropout(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_dropout["default"] = nn.AlphaDropout()


def replaced_forward(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].forward = block.inner["up"].forward


def new_option(model):
    for block in model.base_model.model.blocks:
        layer = block.inner["up"]
        layer.other_param_names = (*layer.other_param_names, "lora_gate")
        layer.lora_gate = {}


def older_version(model):
    for block in model.base_model.model.blocks:
        del block.inner["up"].lora_variant


def subclass(model):
    class Custom(peft.tuners.lora.Linear):
        pass

    for block in model.base_model.model.blocks:
        block.inner["up"].__class__ = Custom


REFUSED = {
    merged: "default merged already: unmerge first",
    mixed_dtypes: "lora_B is of torch.bfloat16 and lora_A of torch.float32",
    integers: "lora_A is of torch.int8",
    other_shape: "lora_A has shape (4, 17), not (4, 16)",
    other_module: "lora_A is a Sequential",
    other_dropout: "lora_dropout is a AlphaDropout",
    replaced_forward: "its forward was replaced on the instance",
    new_option: "its adapters have lora_gate, which this version of fastpeft does not know",
    older_version: "it has no lora_variant, so its version of PEFT is one that fastpeft does not know",
    subclass: "Custom",
}


def snapshot(model):
    return [(path, type(module), dict(vars(module))) for path, module in model.named_modules()]


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda f: f.__name__)
def test_layers_that_do_not_fit_are_listed_and_left_as_they_are(spoil):
    model = peft_model("lora", target_modules=["up", "down"])
    spoil(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layer 'base_model\.model\.blocks\.0\.inner\.up' cannot be accelerated"
    ) as error:
        fastpeft.accelerate(model, strict=True)
    assert REFUSED[spoil] in str(error.value) and ", and 1 more" in str(error.value)
    assert snapshot(model) == before
    report = fastpeft.accelerate(model)
    assert sorted(report.left_alone) == [path for path in PATHS if path.endswith("up")]
    assert sorted(report.accelerated) == [path for path in PATHS if path.endswith("down")]
    for reason in report.left_alone.values():
        assert REFUSED[spoil] in reason
    assert REFUSED[spoil] in str(report)
    fastpeft.decelerate(model)
    assert snapshot(model) == before


VARIANTS = {
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "ALoraLinearVariant"),
    "kasa": ({"kasa_config": peft.KasaConfig()}, "lora_diag"),
}


@pytest.mark.parametrize("option", VARIANTS)
def test_variants_of_lora_are_left_alone(option):
    options, reason = VARIANTS[option]
    model = peft.get_peft_model(Tower(), peft.LoraConfig(r=2, target_modules=["up"], **options))
    report = fastpeft.accelerate(model)
    assert not report.accelerated and all(reason in why for why in report.left_alone.values())


def test_what_else_is_left_alone_and_the_rest_accelerated():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.embedding = nn.Linear(8, 8), nn.Embedding(5, 8)
            self.conv, self.attention = nn.Conv2d(3, 4, 1), nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            y, _ = self.attention(x, x, x)
            return self.head(
                self.linear(y) + self.embedding(torch.arange(5)) + self.conv(torch.ones(1, 3, 2, 4)).flatten(2)[0, :1]
            )

    torch.manual_seed(0)
    targets = ["linear", "embedding", "conv", "attention"]
    theirs = peft.get_peft_model(Zoo(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"]))
    fill(theirs)
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert report.accelerated == ["base_model.model.linear"]
    reasons = {path.removeprefix("base_model.model."): why for path, why in report.left_alone.items()}
    assert reasons.keys() == {"embedding", "conv", "attention", "attention.base_layer.out_proj"}
    assert "nn.MultiheadAttention reads its weight without calling it" == reasons["attention.base_layer.out_proj"]
    assert "peft.tuners.lora.layer.Conv2d" in reasons["conv"]
    lines = str(report).splitlines()
    assert lines[0] == "1 PEFT layers accelerated, 4 left alone" and len(lines) == 5
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs(5, 8)), theirs(inputs(5, 8)), rtol=1e-4, atol=1e-5)


def test_other_methods_are_left_alone():
    model = peft.get_peft_model(Tower(), peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    report = fastpeft.accelerate(model)
    assert not report.accelerated and all("peft.tuners.ia3.layer.Linear" in why for why in report.left_alone.values())
    assert isinstance(model.base_model.model.blocks[0].inner["up"], peft.tuners.ia3.Linear)


def test_places_outside_the_spectrum_are_refused():
    model = peft_model("fourierft", target_modules=["up"])
    model.base_model.model.blocks[0].inner["up"].indices["default"][0, 3] = 10**6
    report = fastpeft.accelerate(model)
    assert list(report.left_alone.values()) == ["rows must lie in [0, 24), got [0, 1000000]"]


def test_boft_adapters_that_peft_gives_one_permutation_are_left_alone(cuda_helper):
    config = {"boft_n_butterfly_factor": 2, "target_modules": ["0"], "init_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.BOFTConfig(boft_block_size=2, **config))
    model.add_adapter("other", peft.BOFTConfig(boft_block_size=4, **config))
    assert "one permutation" in fastpeft.accelerate(model).left_alone["base_model.model.0"]


def test_a_series_of_another_peft_is_left_alone(monkeypatch):
    import fastpeft.interop.peft.oft as ours

    assert ours.SERIES_IS_KNOWN
    monkeypatch.setattr(ours, "SERIES_IS_KNOWN", False)
    assert len(fastpeft.accelerate(peft_model("oft")).left_alone) == 6
    assert not fastpeft.accelerate(peft_model("oft-options")).left_alone


def test_models_without_peft_layers():
    for model in (Tower(), nn.Sequential(), fastpeft.adapt(Tower(), fastpeft.LoraConfig(target_modules=["up"]))):
        with pytest.raises(ValueError, match=r"model must have PEFT layers, as peft\.get_peft_model makes them, got"):
            fastpeft.accelerate(model)
        assert fastpeft.decelerate(model) is model
    for function in (fastpeft.accelerate, fastpeft.decelerate):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            function("model")


def test_a_peft_that_lacks_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpeft.interop.peft", None)
    with pytest.raises(ValueError, match=rf"PEFT must be a version like 0\.21, got {re.escape(peft.__version__)}"):
        fastpeft.accelerate(peft_model("lora"))


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("case", ["lora", "dora", "oft"])  # PEFT cannot make the others there
def test_accelerating_a_skeleton_of_a_large_model_allocates_nothing(case):
    """In the shapes of seven billion parameters, four layers of the 32; bench/accelerated.py has the time of all."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name in "qkvo":
                setattr(self, name, nn.Linear(4096, 4096, bias=False))
            self.gate, self.up = nn.Linear(4096, 11008, bias=False), nn.Linear(4096, 11008, bias=False)
            self.down = nn.Linear(11008, 4096, bias=False)

    with torch.device("meta"):
        model = nn.Sequential(*(Layer() for _ in range(4)))
        config = CASES[case](target_modules=["q", "k", "v", "o", "gate", "up", "down"])
        model = peft.get_peft_model(model, config)
    with Allocations() as allocated:
        report = fastpeft.accelerate(model, strict=True)
        fastpeft.decelerate(model)
    assert len(report.accelerated) == 7 * 4
    assert max((torch.Size(shape).numel() for _, shape in allocated.made), default=0) <= 4096


def test_places_are_shared_by_layers_of_one_shape():
    ours, _ = pair("fourierft")
    ups = [block.inner["up"] for block in ours.base_model.model.blocks]
    assert ups[0]._prepared["default"] is ups[1]._prepared["default"]
    assert copy.deepcopy(ups[0])._prepared["default"] is ups[0]._prepared["default"]


def test_the_layers_of_four_methods_are_covered():
    from fastpeft.interop.peft import METHODS, method_of

    layers = peft.tuners.lora.layer, peft.tuners.boft.layer, peft.tuners.fourierft.layer, peft.tuners.oft.layer
    classes = [getattr(layer, "FourierFTLinear", None) or layer.Linear for layer in layers]
    assert [method_of(layer_class) for layer_class in classes] == list(METHODS)
    assert method_of(type("Linear", (classes[0],), {})) is None
    for name in METHODS[0].layer_classes:  # a name that PEFT no longer has would be taken for another library's layer
        module = pytest.importorskip(name.rpartition(".")[0])
        assert hasattr(module, name.rpartition(".")[2])
