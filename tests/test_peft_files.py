"""PEFT as the oracle of checkpoints and configurations: each reads what the other has written, and means the same."""

import copy
import dataclasses
import json
import warnings
from collections import OrderedDict

import pytest
import torch
from peft_oracle import (
    EVERYWHERE,
    MARKS,
    adapter_values,
    assert_same_values,
    compare_models,
    make_gpt2,
    make_inputs,
    make_tower,
    our_model,
    peft,
    peft_model,
    transformers,
)
from torch import nn

import fastpeft

pytestmark = MARKS

# Folders

FOLDERS = [
    pytest.param(peft.LoraConfig(r=4, lora_alpha=7, target_modules=EVERYWHERE), id="lora"),
    pytest.param(
        peft.LoraConfig(r=4, use_rslora=True, target_modules=r".*\.(up|down)"), id="rslora-regular-expression"
    ),
    pytest.param(
        peft.LoraConfig(
            r=4,
            rank_pattern={"down": 5},
            alpha_pattern={"layers.0.up": 3},
            lora_dropout=0.1,
            target_modules=["up", "layers.1.down"],
        ),
        id="lora-patterns",
    ),
    pytest.param(
        peft.LoraConfig(r=4, target_modules=EVERYWHERE, layers_to_transform=[1], layers_pattern="layers"),
        id="one-layer",
    ),
    pytest.param(peft.BOFTConfig(boft_block_size=8, boft_dropout=0.1, target_modules=EVERYWHERE), id="boft"),
    pytest.param(peft.BOFTConfig(boft_block_size=0, boft_block_num=4, target_modules=EVERYWHERE), id="boft-by-number"),
    pytest.param(
        peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE), id="boft-two-factors"
    ),
    pytest.param(
        peft.FourierFTConfig(n_frequency=50, scaling=20.0, random_loc_seed=3, target_modules=EVERYWHERE), id="fourierft"
    ),
    pytest.param(
        peft.FourierFTConfig(
            n_frequency=50,
            scaling=20.0,
            n_frequency_pattern={"down": 7},
            exclude_modules=["layers.0.up"],
            target_modules=EVERYWHERE,
        ),
        id="fourierft-pattern",
    ),
]


FOLDERS += [
    pytest.param(peft.OFTConfig(target_modules=EVERYWHERE, **options), id=name)
    for name, options in {
        "oft": {"oft_block_size": 8, "module_dropout": 0.1},
        "oft-exact": {"oft_block_size": 4, "use_cayley_neumann": False},
        "oft-terms": {"oft_block_size": 8, "num_cayley_neumann_terms": 7},
        "oft-by-number": {"oft_block_size": 0, "r": 4},
        "oft-shared": {"oft_block_size": 8, "block_share": True},
        "oft-shared-exact": {"oft_block_size": 0, "r": 2, "block_share": True, "use_cayley_neumann": False},
        "oft-constrained": {"oft_block_size": 8, "coft": True, "eps": 2.0, "use_cayley_neumann": False},
    }.items()
]


@pytest.mark.parametrize("config", FOLDERS)
def test_a_folder_of_pefts_is_read(monkeypatch, cuda_helper, tmp_path, config):
    base = make_tower(24, 40)
    theirs, exact = peft_model(base, config).eval(), peft_model(base, config, dtype=torch.float64).eval()
    theirs.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))


@pytest.mark.parametrize("config", FOLDERS)
def test_peft_reads_a_folder_of_ours(monkeypatch, cuda_helper, tmp_path, config):
    base = make_tower(24, 40)
    ours = our_model(base, peft_model(base, config), config).eval()
    fastpeft.save_adapter(ours, tmp_path)
    theirs, exact = read_with_peft(base, tmp_path), read_with_peft(copy.deepcopy(base).double(), tmp_path)
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))
    read = theirs.peft_config["default"]
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in {field.name for field in dataclasses.fields(fastpeft.nn.METHODS[read.peft_type.value].config_class)}:
        if name not in written:  # said only where it is switched on, because PEFT does not know it
            assert not hasattr(read, name), name
            continue
        before, after = getattr(config, name), getattr(read, name)
        assert before == after or (not before and not after), name


def read_with_peft(base, folder):
    # That a parameter asks for its gradient is the only thing that is_trainable changes.
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True).eval()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(fastpeft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear"), id="lora"),
        pytest.param(
            fastpeft.BOFTConfig(boft_block_size=8, init_weights=False, target_modules="all-linear"), id="boft"
        ),
        pytest.param(
            fastpeft.FourierFTConfig(n_frequency=60, init_weights=False, target_modules="all-linear"), id="fourierft"
        ),
        pytest.param(fastpeft.OFTConfig(oft_block_size=8, init_weights=False, target_modules="all-linear"), id="oft"),
    ],
)
def test_peft_reads_all_linear(monkeypatch, tmp_path, config):
    """PEFT knows what all-linear means for transformers' models alone, so the folder says what it meant."""
    base = make_tower(24, 40)
    ours = fastpeft.adapt(copy.deepcopy(base), config)
    fastpeft.save_adapter(ours, tmp_path)
    theirs, exact = read_with_peft(base, tmp_path), read_with_peft(copy.deepcopy(base).double(), tmp_path)
    assert len(theirs.targeted_module_names) == 5
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))


def test_one_factor_where_the_file_says_two(monkeypatch, tmp_path):
    """Where its helper does not build, PEFT trains one factor and goes on writing boft_n_butterfly_factor=2."""
    base = make_tower(24, 40)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=EVERYWHERE)
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 2
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor=2.*one factor"):
        ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path)
    assert_same_values(theirs, ours)
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))
    # Written again, the folder says what it holds.
    fastpeft.save_adapter(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


# Configurations

SIZES = {peft.FourierFTConfig: {"n_frequency": 9}, peft.OFTConfig: {"oft_block_size": 8}}  # that fit 24 → 40


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["up"]},
        {"target_modules": ["layers.0.up", "model.layers.1.down"]},
        {"target_modules": r"model\.layers\.\d\.up"},
        {"target_modules": r".*(down|head)"},
        {"target_modules": ["up", "down", "head"], "exclude_modules": ["layers.0.down"]},
        {"target_modules": ["up", "down"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["up", "down"], "layers_to_transform": 1},
        {"target_modules": ["up", "down"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["up", "down"], "layers_to_transform": [0, 1], "layers_pattern": ["blocks", "layers"]},
    ],
    ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items()),
)
@pytest.mark.parametrize("config_class", [peft.LoraConfig, peft.BOFTConfig, peft.FourierFTConfig, peft.OFTConfig])
def test_the_same_layers_are_adapted(config_class, options):
    base = nn.Sequential(OrderedDict(model=make_tower(24, 40)))  # PEFT tells layer lists by what stands before them
    sizes = SIZES.get(config_class, {})
    theirs = peft_model(base, config_class(**options, **sizes))
    ours = fastpeft.adapt(copy.deepcopy(base), config_class(**options, **sizes))
    assert {key[1] for key in adapter_values(ours)} == set(theirs.targeted_module_names)


@pytest.mark.parametrize(
    "pattern",
    [
        {"down": 7},
        {"layers.0.up": 5, "layers.1.up": 6},
        {"model.layers.0.up": 5},
        {r"layers\.\d\.up": 5, "up": 7},
        {"up": 7, "layers.0.up": 5},
        {"model.layers.0.up": 5, "up": 7},  # a whole path before a general rule
        {"up|down": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "config_class, name", [(peft.LoraConfig, "rank_pattern"), (peft.FourierFTConfig, "n_frequency_pattern")]
)
def test_patterns_mean_the_same(config_class, name, pattern):
    base = nn.Sequential(OrderedDict(model=make_tower(24, 40)))
    sizes = SIZES.get(config_class, {})
    config = config_class(target_modules=EVERYWHERE, **{name: pattern}, **sizes)
    theirs, ours = peft_model(base, config), fastpeft.adapt(copy.deepcopy(base), copy.deepcopy(config))
    shapes = [{key: value.shape for key, value in adapter_values(model).items()} for model in (theirs, ours)]
    assert shapes[0] == shapes[1]


TINY = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: make_gpt2(), id="gpt2"),  # Conv1D, and an output layer tied to the embedding
        pytest.param(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)), id="llama"),
        pytest.param(lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)), id="bert"),
    ],
)
def test_all_linear_means_the_same(make):
    base = make()
    theirs = peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    ours = fastpeft.adapt(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert {key[1] for key in adapter_values(ours)} == set(theirs.targeted_module_names)


@pytest.mark.parametrize("config_class", [peft.LoraConfig, peft.BOFTConfig, peft.FourierFTConfig, peft.OFTConfig])
def test_book_keeping_is_accepted(config_class):
    config = config_class(
        target_modules=["up"],
        task_type="FEATURE_EXTRACTION",
        inference_mode=True,
        base_model_name_or_path="x",
        revision="main",
        **SIZES.get(config_class, {}),
    )
    assert adapter_values(fastpeft.adapt(make_tower(24, 40), config))


UNSUPPORTED = [
    (peft.LoraConfig, "bias", "all"),
    (peft.LoraConfig, "bias", "lora_only"),
    (peft.LoraConfig, "modules_to_save", ["head"]),
    (peft.LoraConfig, "layer_replication", [(0, 2), (1, 2)]),
    (peft.LoraConfig, "lora_bias", True),
    (peft.LoraConfig, "trainable_token_indices", [0, 1]),
    (peft.LoraConfig, "target_parameters", ["up.weight"]),
    (peft.LoraConfig, "alora_invocation_tokens", [1, 2]),
    (peft.LoraConfig, "init_lora_weights", "pissa"),
    (peft.BOFTConfig, "bias", "boft_only"),
    (peft.BOFTConfig, "modules_to_save", ["head"]),
    (peft.FourierFTConfig, "bias", "all"),
    (peft.FourierFTConfig, "modules_to_save", ["head"]),
    (peft.OFTConfig, "bias", "oft_only"),
    (peft.OFTConfig, "modules_to_save", ["head"]),
]


@pytest.mark.parametrize(
    "config_class, option, value",
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{case[2]}") for case in UNSUPPORTED],
)
def test_an_option_that_is_not_supported_is_named(tmp_path, config_class, option, value):
    sizes = SIZES.get(config_class, {})
    base = make_tower(24, 40)
    with pytest.raises(ValueError, match=option):
        fastpeft.adapt(base, config_class(target_modules=["up"], **{option: value}, **sizes))

    # The same in a file.
    peft_model(base, config_class(target_modules=["up"], **sizes)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(ValueError, match=option):
        fastpeft.load_adapter(base, tmp_path)
    assert all(type(module) is nn.Linear and module.weight.requires_grad for module in (base.head, base.layers[0].up))


@pytest.mark.parametrize("task_type", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_task_that_trains_a_head_is_named(task_type):
    """For these tasks PEFT trains the classification head as well, as if modules_to_save had been given."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type=task_type)
    kind = {"SEQ_CLS": "Sequence", "TOKEN_CLS": "Token"}.get(task_type)
    name = f"BertFor{kind}Classification" if kind else "BertForQuestionAnswering"
    base = getattr(transformers, name)(transformers.BertConfig(**TINY))
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    assert any("modules_to_save" in name for name, value in theirs.named_parameters() if value.requires_grad)
    with pytest.raises(ValueError, match=r"task_type|modules_to_save"):
        fastpeft.adapt(base, config)


def test_another_method_of_pefts_is_refused():
    with pytest.raises(TypeError, match="LoHaConfig"):
        fastpeft.adapt(make_tower(24, 40), peft.LoHaConfig(target_modules=["up"]))
