"""PEFT as the oracle of outputs, gradients, random draws and merged weights, model against model."""

import copy

import pytest
import torch
from peft_oracle import (
    CONV1D,
    EVERYWHERE,
    MARKS,
    TOKENS,
    adapter_values,
    assert_same_values,
    compare,
    compare_models,
    copy_values,
    make_gpt2,
    make_inputs,
    make_tower,
    our_model,
    peft,
    peft_model,
    wide_delta_weight,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

import fastpeft

pytestmark = MARKS

# Outputs and gradients

LORA = [
    # width, hidden, options
    pytest.param(35, 21, {"r": 4, "lora_alpha": 7}, id="odd"),
    pytest.param(13, 31, {"r": 1}, id="prime-rank-one"),
    pytest.param(6, 10, {"r": 16, "lora_alpha": 4}, id="rank-above-both-sides"),
    pytest.param(35, 21, {"r": 9, "lora_alpha": 6, "use_rslora": True}, id="rslora"),
    pytest.param(
        20,
        50,
        {
            "r": 3,
            "lora_alpha": 5,
            # a last part, a whole path, a regular expression
            "rank_pattern": {"down": 5, "layers.0.up": 2},
            "alpha_pattern": {r"layers\.[1-9]\.\w+": 11},
        },
        id="patterns",
    ),
    pytest.param(
        20,
        50,
        {"r": 3, "use_rslora": True, "rank_pattern": {"down": 8}, "alpha_pattern": {"up": 2}},
        id="rslora-patterns",
    ),
]


@pytest.mark.parametrize("width, hidden, options", LORA)
def test_lora(monkeypatch, width, hidden, options):
    config = peft.LoraConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


FOURIERFT = [
    pytest.param(35, 21, {"n_frequency": 50, "random_loc_seed": 0}, id="odd-seed-0"),
    pytest.param(13, 31, {"n_frequency": 50, "random_loc_seed": 2024}, id="prime-seed-2024"),
    pytest.param(24, 40, {"n_frequency": 200}, id="even"),  # the middles of both spectra are hit
    pytest.param(6, 10, {"n_frequency": 60}, id="full"),  # every place
    pytest.param(12, 5, {"n_frequency": 1, "scaling": 300.0}, id="one-frequency"),
    pytest.param(35, 21, {"n_frequency": 20, "n_frequency_pattern": {"down": 37, "layers.0.up": 5}}, id="patterns"),
]


@pytest.mark.parametrize("width, hidden, options", FOURIERFT)
def test_fourierft(monkeypatch, width, hidden, options):
    options = {"scaling": 20.0, **options}
    config = peft.FourierFTConfig(target_modules=EVERYWHERE, init_weights=False, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


BOFT = [
    # width, hidden, options
    pytest.param(35, 21, {"boft_block_size": 7}, id="odd-blocks"),
    pytest.param(12, 20, {"boft_block_size": 4}, id="usual-blocks"),
    pytest.param(24, 16, {"boft_block_size": 8}, id="large-blocks"),
    pytest.param(13, 26, {"boft_block_size": 13}, id="one-prime-block"),
    pytest.param(9, 5, {"boft_block_size": 1}, id="blocks-of-one"),  # R is the identity; s alone does something
    pytest.param(15, 25, {"boft_block_size": 0, "boft_block_num": 5}, id="by-number"),  # blocks of 3 and of 5
]


@pytest.mark.parametrize("width, hidden, options", BOFT)
def test_boft(monkeypatch, width, hidden, options):
    config = peft.BOFTConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


BOFT_FACTORS = [
    # width, hidden, block size, factors
    pytest.param(24, 40, 4, 2, id="usual"),
    pytest.param(24, 40, 2, 3, id="half-of-one"),
    pytest.param(24, 48, 6, 3, id="half-of-three-one-window"),  # the last factor spans all of width
    pytest.param(28, 84, 14, 2, id="half-of-seven"),
    pytest.param(16, 48, 2, 4, id="four-factors"),
]


@pytest.mark.parametrize("width, hidden, block_size, factors", BOFT_FACTORS)
def test_boft_with_more_factors(monkeypatch, cuda_helper, width, hidden, block_size, factors):
    config = peft.BOFTConfig(target_modules=EVERYWHERE, boft_block_size=block_size, boft_n_butterfly_factor=factors)
    assert (
        peft_model(make_tower(width, hidden), config).base_model.model.layers[0].up.boft_R["default"].shape[0]
        == factors
    )
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


OFT = [
    # width, hidden, options
    pytest.param(24, 32, {"oft_block_size": 8}, id="usual"),
    pytest.param(24, 32, {"oft_block_size": 8, "use_cayley_neumann": False}, id="exact"),
    *(
        pytest.param(20, 28, {"oft_block_size": 4, "num_cayley_neumann_terms": terms}, id=f"{terms}-terms")
        for terms in (2, 3, 4, 6, 9)  # one term has no gradient at PEFT's
    ),
    pytest.param(35, 21, {"oft_block_size": 7, "use_cayley_neumann": False}, id="odd-blocks"),
    pytest.param(13, 26, {"oft_block_size": 13}, id="one-prime-block"),
    pytest.param(15, 25, {"oft_block_size": 0, "r": 5}, id="by-number"),  # blocks of 3 and of 5
    pytest.param(24, 32, {"oft_block_size": 8, "block_share": True}, id="shared"),
    pytest.param(24, 32, {"oft_block_size": 4, "block_share": True, "use_cayley_neumann": False}, id="shared-exact"),
]


@pytest.mark.parametrize("width, hidden, options", OFT)
def test_oft(monkeypatch, width, hidden, options):
    config = peft.OFTConfig(target_modules=EVERYWHERE, **options)
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width))


METHODS = [
    pytest.param(peft.LoraConfig(r=4, lora_alpha=7, target_modules=EVERYWHERE), id="lora"),
    pytest.param(peft.FourierFTConfig(n_frequency=50, scaling=20.0, target_modules=EVERYWHERE), id="fourierft"),
    pytest.param(peft.BOFTConfig(boft_block_size=8, target_modules=EVERYWHERE), id="boft"),
    pytest.param(
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE), id="boft-two-factors"
    ),
    pytest.param(peft.OFTConfig(oft_block_size=8, target_modules=EVERYWHERE), id="oft"),
    pytest.param(peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=EVERYWHERE), id="oft-exact"),
    pytest.param(peft.OFTConfig(oft_block_size=8, block_share=True, target_modules=EVERYWHERE), id="oft-shared"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", METHODS)
def test_a_narrow_base(monkeypatch, cuda_helper, config, dtype):
    """The adapter stays in float32 over it, in PEFT as here."""
    base = make_tower(24, 40).to(dtype)
    theirs, exact = peft_model(base, config, dtype=dtype), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config, dtype=dtype)
    for model in (theirs, ours):
        assert {value.dtype for value in adapter_values(model).values()} == {torch.float32}
    inputs = [x.to(dtype) for x in make_inputs(24)]
    compare_models(monkeypatch, exact, theirs, ours, None, inputs, dtype)


@pytest.mark.parametrize("config", METHODS)
def test_merged_weights(monkeypatch, cuda_helper, config):
    base = make_tower(24, 40)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config)
    copy_values(theirs, exact)
    fastpeft.merge(ours)
    monkeypatch.setattr(peft.tuners.fourierft.layer.FourierFTLayer, "get_delta_weight", wide_delta_weight)
    weights = [dict(model.merge_and_unload().named_parameters()) for model in (theirs, exact)]
    worst = {"ours": 0.0, "theirs": 0.0}
    for path in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"):
        right = weights[1][f"{path}.weight"]
        for whose, weight in (("ours", ours.get_submodule(path).weight), ("theirs", weights[0][f"{path}.weight"])):
            worst[whose] = max(worst[whose], float((weight.double() - right).abs().max() / right.abs().max()))
    assert worst["ours"] <= 2 * worst["theirs"] + torch.finfo(torch.float32).eps


# Dropout: the same random numbers are drawn in the same order, so one seed gives one result


@pytest.mark.parametrize("p", [0.2, 0.75])
def test_lora_dropout(monkeypatch, p):
    config = peft.LoraConfig(r=4, lora_dropout=p, target_modules=EVERYWHERE)
    compare(monkeypatch, make_tower(35, 21), config, make_inputs(35, count=6))


@pytest.mark.parametrize("factors, width, hidden", [(1, 24, 40), (3, 48, 80)])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])  # of 6 to 20 blocks: none or one, a half, all but one
def test_boft_dropout(monkeypatch, cuda_helper, factors, width, hidden, p):
    config = peft.BOFTConfig(
        target_modules=EVERYWHERE, boft_block_size=4, boft_n_butterfly_factor=factors, boft_dropout=p
    )
    compare(monkeypatch, make_tower(width, hidden), config, make_inputs(width, count=8))


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=EVERYWHERE), id="lora"),
        pytest.param(peft.BOFTConfig(boft_block_size=4, boft_dropout=0.5, target_modules=EVERYWHERE), id="boft"),
    ],
)
def test_dropout_is_for_training_alone(monkeypatch, config):
    base, inputs = make_tower(24, 40), make_inputs(24)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours = our_model(base, theirs, config)
    trained = ours(inputs[0])
    for model in (theirs, exact, ours):
        model.eval()
    assert torch.equal(ours(inputs[0]), ours(inputs[0])) and not torch.equal(ours(inputs[0]), trained)
    compare_models(monkeypatch, exact, theirs, ours, None, inputs)


# Several adapters together


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize(
    "first, second",
    [
        pytest.param(
            peft.LoraConfig(r=3, target_modules=EVERYWHERE),
            peft.LoraConfig(r=5, lora_alpha=3, target_modules=["up"]),
            id="lora",
        ),
        # Rotations do not commute, so that order counts. With one factor alone: PEFT keeps one permutation for all.
        pytest.param(
            peft.BOFTConfig(boft_block_size=5, target_modules=EVERYWHERE),
            peft.BOFTConfig(boft_block_size=15, target_modules=EVERYWHERE),
            id="boft",
        ),
        pytest.param(
            peft.FourierFTConfig(n_frequency=40, scaling=20.0, target_modules=EVERYWHERE),
            peft.FourierFTConfig(n_frequency=9, scaling=30.0, random_loc_seed=1, target_modules=["down"]),
            id="fourierft",
        ),
    ],
)
def test_two_adapters_together(monkeypatch, first, second, order):
    base, names = make_tower(45, 15), ("one", "two")
    theirs = peft_model(base, first, second, names=names)
    exact = peft_model(base, first, second, names=names, dtype=torch.float64)
    ours = our_model(base, theirs, first, second, names=names)
    wide = our_model(base, theirs, first, second, names=names, dtype=torch.float64)
    for model in (theirs, exact):
        model.base_model.set_adapter(order)
    for model in (ours, wide):
        fastpeft.set_adapter(model, order)
    compare_models(monkeypatch, exact, theirs, ours, wide, make_inputs(45))


# transformers' Conv1D, whose weight is (in, out)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(peft.LoraConfig(r=4, target_modules=CONV1D, fan_in_fan_out=True), id="lora"),
        pytest.param(
            peft.FourierFTConfig(n_frequency=100, scaling=30.0, target_modules=CONV1D, fan_in_fan_out=True),
            id="fourierft",
        ),
    ],
)
def test_conv1d(monkeypatch, tmp_path, config):
    base = make_gpt2()
    assert isinstance(base.transformer.h[0].attn.c_attn, Conv1D)
    compare(monkeypatch, base, config, TOKENS)

    theirs = peft_model(base, config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    assert_same_values(theirs, ours)
    fastpeft.save_adapter(ours, tmp_path / "ours")
    assert_same_values(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"), ours)


@pytest.mark.parametrize("block_size, factors", [(8, 1), (3, 1), (4, 2)])
def test_conv1d_boft(monkeypatch, cuda_helper, block_size, factors):
    """PEFT's BOFT does not take a Conv1D, so its oracle is the same model with nn.Linear in their place."""
    base = make_gpt2()
    linear = copy.deepcopy(base)
    for path, module in list(linear.named_modules()):
        if isinstance(module, Conv1D):
            replacement = nn.Linear(*module.weight.shape)
            replacement.weight.data, replacement.bias.data = module.weight.data.T.contiguous(), module.bias.data
            linear.set_submodule(path, replacement)
    config = peft.BOFTConfig(boft_block_size=block_size, boft_n_butterfly_factor=factors, target_modules=CONV1D)
    theirs, exact = peft_model(linear, config), peft_model(linear, config, dtype=torch.float64)
    ours, wide = our_model(base, theirs, config), our_model(base, theirs, config, dtype=torch.float64)
    compare_models(monkeypatch, exact, theirs, ours, wide, TOKENS)
