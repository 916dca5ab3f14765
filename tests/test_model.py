"""Adapters on whole models: switching, several together, and which layers are adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import (
    BOFT,
    DTYPES,
    IN,
    LORA,
    METHODS,
    OUT,
    Method,
    assert_unchanged,
    check,
    every_method,
    fill,
    randn,
    run,
    snapshot,
)
from small_models import ALL_LINEAR, Model, adapted_model, adapted_paths, plain_model
from torch import nn

import fastpeft
from fastpeft.nn import Adapted

# Adapting and switching


@every_method
def test_adapt_freezes_the_rest(method: Method):
    model = Model()
    expected = model(randn(5, IN))
    assert fastpeft.adapt(model, method.config()) is model
    assert torch.equal(model(randn(5, IN)), expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(".adapters.default." in name for name in trainable)
    given = list(fastpeft.adapter_parameters(model))
    assert [id(p) for p in given] == [id(p) for p in model.parameters() if p.requires_grad]
    model.head.requires_grad_(True)  # what is trained beside the adapter
    found = run(fill(model), randn(5, IN))
    assert set(found.gradients) == trainable | {"head.weight"}


@every_method
def test_a_model_computes_its_formula(method: Method):
    check(adapted_model(method), randn(20, IN), formula=plain_model, draws=8)


def test_adapter_parameters_follow_the_active_adapters():
    model = Model()
    assert list(fastpeft.adapter_parameters(model)) == []
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)

    def names() -> set[str]:
        given = {id(parameter) for parameter in fastpeft.adapter_parameters(model)}
        parts = {name.split(".adapters.")[1] for name, parameter in model.named_parameters() if id(parameter) in given}
        return {part.split(".")[0] for part in parts}

    assert names() == {METHODS[-1].name}
    fastpeft.set_adapter(model, ["lora", "boft"])
    assert names() == {"lora", "boft"}
    fastpeft.set_adapter(model, "mos")
    assert names() == {"mos"}
    assert len(list(fastpeft.adapter_parameters(model))) == 8  # two pools for each of the four kinds
    fastpeft.set_adapter(model, None)
    assert names() == set()
    assert all(p.requires_grad for name, p in model.named_parameters() if ".adapters." in name)


@every_method
def test_switching(method: Method):
    x, base = randn(5, IN), Model()(randn(5, IN))
    alone = {name: adapted_model(method, name, values) for name, values in (("a", 1), ("b", 2))}
    model = Model()
    for name in alone:
        fastpeft.adapt(model, method.config(), name)
        for path, layer in model.named_modules():
            if isinstance(layer, Adapted):
                layer.adapters[name].load_state_dict(alone[name].get_submodule(path).adapters[name].state_dict())
    for names, expected in (
        ("a", alone["a"](x)),
        (["b"], alone["b"](x)),
        (None, base),
        ("a", alone["a"](x)),
        ([], base),
    ):
        fastpeft.set_adapter(model, names)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("first", METHODS, ids=str)
@pytest.mark.parametrize("second", METHODS, ids=str)
def test_two_adapters_together(first: Method, second: Method):
    """Deltas add up, rotations compose; the second sits on some of the layers only."""
    model = adapted_model(first, "a")
    adapted_model(second, "b", model=model, target_modules=["q", "down"])
    fastpeft.set_adapter(model, ["a", "b"])
    found = run(fill(model), randn(5, IN))
    assert {name.split(".adapters.")[1].split(".")[0] for name in found.gradients} == {"a", "b"}
    check(model, randn(20, IN), formula=plain_model, draws=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_methods_together(dtype: torch.dtype):
    model = Model().to(dtype)
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)
    fastpeft.set_adapter(model, ["boft", "lora", "oft", "fourierft", "mos"])
    check(model, randn(20, IN, dtype=dtype), formula=plain_model, draws=8)


def test_the_order_of_rotations_matters():
    model = adapted_model(BOFT, "a", values=1)
    adapted_model(BOFT, "b", values=2, model=model)
    fill(model)
    fastpeft.set_adapter(model, ["a", "b"])
    one_way = model(randn(5, IN))
    fastpeft.set_adapter(model, ["b", "a"])
    assert not torch.allclose(model(randn(5, IN)), one_way, rtol=1e-3, atol=1e-3)
    check(model, randn(20, IN), formula=plain_model, draws=8)


def test_an_adapter_on_some_layers_leaves_the_others_to_the_base():
    model = adapted_model(LORA, "some", target_modules=["q"])
    adapted_model(LORA, "others", model=model, target_modules=["up"])
    assert all(layer.active == ("others",) for layer in (block.up for block in model.blocks))
    assert all(layer.active == () for layer in (block.attention["q"] for block in model.blocks))
    check(model, randn(20, IN), formula=plain_model, draws=8)


@pytest.mark.parametrize(
    "names, kind, words",
    [
        ("c", ValueError, ["a, b", "'c'"]),
        (["a", "c"], ValueError, ["a, b", "'c'"]),
        (["a", "a"], ValueError, ["once", "a"]),
        ("", ValueError, ["a, b", "''"]),
        (5, (TypeError, ValueError), ["adapter", "5"]),
        ([None], (TypeError, ValueError), ["adapter", "None"]),
    ],
)
def test_wrong_names_for_set_adapter(names, kind, words: list[str]):
    model = adapted_model(LORA, "a")
    adapted_model(BOFT, "b", model=model)
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        fastpeft.set_adapter(model, names)
    assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(model, before)


@every_method
def test_a_configuration_that_is_used_again(method: Method, tmp_path: Path):
    """Changing it for a second adapter must not change what is known about the first."""
    config = method.config()
    model = fill(fastpeft.adapt(Model(), config, "first"))
    expected = model(randn(5, IN))
    for name, value in {"lora_alpha": 99, "scaling": 99.0, "boft_block_size": 2, "target_modules": ["q"]}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(randn(5, IN)), expected)


# Which layers


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"target_modules": "all-linear"}, ALL_LINEAR),  # not the output embeddings, not the embedding
        ({"target_modules": ["q", "v"]}, [path for path in ALL_LINEAR if path[-1] in "qv"]),
        ({"target_modules": {"down"}}, ["blocks.0.down", "blocks.1.down"]),
        ({"target_modules": ("attention.q",)}, ["blocks.0.attention.q", "blocks.1.attention.q"]),  # several parts
        ({"target_modules": ["blocks.1.up"]}, ["blocks.1.up"]),  # a whole path
        ({"target_modules": ["p", "own", "up"]}, ["blocks.0.up", "blocks.1.up"]),  # whole parts, not ends of names
        ({"target_modules": ["head"]}, ["head"]),  # asked for by name
        ({"target_modules": r".*\.(q|down)"}, [path for path in ALL_LINEAR if path.endswith(("q", "down"))]),
        ({"target_modules": r"blocks\.0\..*(q|v|up)"}, ["blocks.0.attention.q", "blocks.0.attention.v", "blocks.0.up"]),
        ({"target_modules": "all-linear", "exclude_modules": ["q", "v"]}, [p for p in ALL_LINEAR if p[-1] not in "qv"]),
        ({"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"}, ALL_LINEAR[4:]),
        ({"target_modules": ["q"], "exclude_modules": ["blocks.0.attention.q"]}, ["blocks.1.attention.q"]),
        ({"target_modules": "all-linear", "layers_to_transform": 1}, ALL_LINEAR[4:]),
        ({"target_modules": ["q", "up"], "layers_to_transform": [0]}, ["blocks.0.attention.q", "blocks.0.up"]),
        ({"target_modules": ["q"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"}, ALL_LINEAR[::4]),
        ({"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h", "blocks"]}, [ALL_LINEAR[4]]),
    ],
    ids=str,
)
def test_target_selection(options: dict, expected: list[str]):
    model = fastpeft.adapt(Model(), fastpeft.LoraConfig(**options))
    assert adapted_paths(model) == expected


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, ["target_modules", "must be given"]),
        ({"target_modules": []}, ["target_modules=[]", "no layer"]),
        ({"target_modules": ["query"]}, ["['query']", "no layer", "'down', 'head', 'q', 'up', 'v'"]),
        ({"target_modules": "q"}, ["'q'", "no layer"]),  # a regular expression matches whole paths
        ({"target_modules": ["q", "norm"]}, ["'blocks.0.norm'", "LayerNorm", "not a linear layer"]),
        ({"target_modules": ["embed"]}, ["'embed'", "Embedding"]),
        ({"target_modules": ["blocks.0"]}, ["'blocks.0'", "Block"]),
        ({"target_modules": ".*"}, ["layer ''", "Model"]),
        ({"target_modules": "all-linear", "exclude_modules": ".*"}, ["no layer"]),
        ({"target_modules": ["q"], "layers_to_transform": 2}, ["no layer"]),
        ({"target_modules": ["q"], "layers_to_transform": 0, "layers_pattern": "h"}, ["no layer"]),
    ],
    ids=str,
)
@every_method
def test_targets_that_match_nothing_or_something_else(method: Method, options: dict, words: list[str]):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        fastpeft.adapt(model, method.config(**{"target_modules": None, **options}))
    assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(model, before)


def test_all_linear_without_output_embeddings():
    model = Model()
    model.get_output_embeddings = lambda: None
    assert adapted_paths(fastpeft.adapt(model, LORA.config())) == [*ALL_LINEAR, "head"]


@every_method
def test_a_model_that_is_one_layer(method: Method, tmp_path: Path):
    def make() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(IN, OUT)

    layer = fill(fastpeft.adapt(make(), method.config()))
    fastpeft.save_adapter(layer, tmp_path)
    assert torch.equal(fastpeft.load_adapter(make(), tmp_path)(randn(5, IN)), layer(randn(5, IN)))


def test_a_module_of_the_users_own_named_adapters(tmp_path: Path):
    model = nn.ModuleDict({"adapters": nn.Sequential(nn.Linear(IN, OUT)), "q": nn.Linear(IN, OUT)})
    fastpeft.adapt(model, LORA.config())
    assert adapted_paths(model) == ["adapters.0", "q"]


def test_a_second_adapter_finds_the_same_layers():
    model = adapted_model(LORA, "a")
    adapted_model(BOFT, "b", model=model)
    assert adapted_paths(model) == ALL_LINEAR
    assert all(list(layer.adapters) == ["a", "b"] for layer in model.modules() if isinstance(layer, Adapted))


@every_method
def test_lazy_layers_wait_until_they_have_sizes(method: Method):
    model = nn.ModuleDict({"q": nn.Linear(IN, OUT), "lazy": nn.LazyLinear(OUT)})
    with pytest.raises(ValueError, match="'lazy'"):
        fastpeft.adapt(model, method.config(target_modules=["q", "lazy"]))
    assert type(model["q"]) is nn.Linear
