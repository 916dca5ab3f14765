"""Adapters on whole models: which layers, switching, merging, files; and a refused call changes nothing."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    BOFT,
    DTYPES,
    FOURIERFT,
    IN,
    LORA,
    METHODS,
    MOS,
    OUT,
    Errors,
    Method,
    QuantisedLinear,
    assert_unchanged,
    check,
    fill,
    plain_forward,
    plain_linear,
    randn,
    run,
    snapshot,
    widened,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft
from fastpeft.nn import Adapted

every_method = pytest.mark.parametrize("method", METHODS, ids=str)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"q": nn.Linear(IN, IN), "v": nn.Linear(IN, IN, bias=False)})
        self.norm = nn.LayerNorm(IN)
        self.up, self.down = nn.Linear(IN, OUT), nn.Linear(OUT, IN)


class Model(nn.Module):
    """Two blocks and an output layer; its forward takes the function that computes a layer."""

    def __init__(self, seed: int = 0, n_blocks: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(11, IN)
            self.blocks = nn.ModuleList(Block() for _ in range(n_blocks))
            self.head = nn.Linear(IN, 11, bias=False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, x: Tensor, linear: Callable = lambda layer, x: layer(x)) -> Tensor:
        for block in self.blocks:
            q = linear(block.attention["q"], block.norm(x))
            x = x + linear(block.attention["v"], F.gelu(q))
            x = x + linear(block.down, F.gelu(linear(block.up, x)))
        return linear(self.head, x)


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return plain_linear(layer, x) if isinstance(layer, Adapted) else layer(x)


def plain_model(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, plain)


def adapted(method: Method, name: str = "default", values: int = 0, model: nn.Module | None = None, **changes) -> Model:
    """A model with an adapter that changes it; values says which random ones."""
    return fill(fastpeft.adapt(Model() if model is None else model, method.config(**changes), name), values)


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Adapted)]


ALL_LINEAR = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.q", "attention.v", "up", "down")]


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
    check(adapted(method), randn(20, IN), formula=plain_model, draws=8)


def test_adapter_parameters_follow_the_active_adapters():
    model = Model()
    assert list(fastpeft.adapter_parameters(model)) == []
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)

    def names() -> set[str]:
        given = {id(parameter) for parameter in fastpeft.adapter_parameters(model)}
        parts = {name.split(".adapters.")[1] for name, parameter in model.named_parameters() if id(parameter) in given}
        return {part.split(".")[0] for part in parts}

    assert names() == {"fourierft"}
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
    alone = {name: adapted(method, name, values) for name, values in (("a", 1), ("b", 2))}
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
    model = adapted(first, "a")
    adapted(second, "b", model=model, target_modules=["q", "down"])
    fastpeft.set_adapter(model, ["a", "b"])
    found = run(fill(model), randn(5, IN))
    assert {name.split(".adapters.")[1].split(".")[0] for name in found.gradients} == {"a", "b"}
    check(model, randn(20, IN), formula=plain_model, draws=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_methods_together(dtype: torch.dtype):
    model = Model().to(dtype)
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)
    fastpeft.set_adapter(model, ["boft", "lora", "fourierft", "mos"])
    check(model, randn(20, IN, dtype=dtype), formula=plain_model, draws=8)


def test_the_order_of_rotations_matters():
    model = adapted(BOFT, "a", values=1)
    adapted(BOFT, "b", values=2, model=model)
    fill(model)
    fastpeft.set_adapter(model, ["a", "b"])
    one_way = model(randn(5, IN))
    fastpeft.set_adapter(model, ["b", "a"])
    assert not torch.allclose(model(randn(5, IN)), one_way, rtol=1e-3, atol=1e-3)
    check(model, randn(20, IN), formula=plain_model, draws=8)


def test_an_adapter_on_some_layers_leaves_the_others_to_the_base():
    model = adapted(LORA, "some", target_modules=["q"])
    adapted(LORA, "others", model=model, target_modules=["up"])
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
    model = adapted(LORA, "a")
    adapted(BOFT, "b", model=model)
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
    model = adapted(LORA, "a")
    adapted(BOFT, "b", model=model)
    assert adapted_paths(model) == ALL_LINEAR
    assert all(list(layer.adapters) == ["a", "b"] for layer in model.modules() if isinstance(layer, Adapted))


@every_method
def test_lazy_layers_wait_until_they_have_sizes(method: Method):
    model = nn.ModuleDict({"q": nn.Linear(IN, OUT), "lazy": nn.LazyLinear(OUT)})
    with pytest.raises(ValueError, match="'lazy'"):
        fastpeft.adapt(model, method.config(target_modules=["q", "lazy"]))
    assert type(model["q"]) is nn.Linear


# What cannot be adapted


@pytest.mark.parametrize(
    "method, changes, layer, words",
    [
        (BOFT, {"boft_block_size": 12, "boft_n_butterfly_factor": 1}, "blocks.0.down", ["boft_block_size=12", "16"]),
        (BOFT, {"boft_n_butterfly_factor": 3}, "blocks.0.attention.q", ["boft_n_butterfly_factor=3", "24"]),
        (FOURIERFT, {"n_frequency": 500}, "blocks.0.up", ["n_frequency", "384", "500"]),  # fits 24 × 24 alone
        (FOURIERFT, {"n_frequency_pattern": {"v": 577}}, "blocks.0.attention.v", ["n_frequency", "576", "577"]),
        (MOS, {"shards_per_vector": 3}, "blocks.0.up", ["shards_per_vector=3", "16"]),
        (MOS, {"r": 8}, "blocks.0.attention.q", ["r=8", "pool_rank=4", "14", "12"]),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_a_layer(method: Method, changes: dict, layer: str, words: list[str]):
    """Some layers fit: they must not be touched either."""
    model = adapted(LORA, "before")
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        fastpeft.adapt(model, method.config(**changes), "new")
    assert all(word in str(caught.value) for word in (f"{layer!r}", *words)), caught.value
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "name",
    [None, 5, b"a", "", ".", "a.b", "keys", "items", "pop", "forward", "training", "_modules", "_parameters"],
    ids=repr,
)
def test_adapter_names_that_are_refused(name, tmp_path: Path):
    """Names go into module names and state-dict keys: dots would nest, and some are attributes already."""
    fastpeft.save_adapter(adapted(LORA), tmp_path)
    model = Model()
    before = snapshot(model)
    for refused in (
        lambda: fastpeft.adapt(model, LORA.config(), name),
        lambda: fastpeft.load_adapter(model, tmp_path, name),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            refused()
        assert "adapter_name" in str(caught.value)
        assert repr(name) in str(caught.value)
        assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["0", "a-b", "my adapter", "ä", "weight", "bias", "adapters", "a/b", "lora_A"])
def test_adapter_names_that_are_fine(name: str, tmp_path: Path):
    model = adapted(LORA, name)
    fastpeft.save_adapter(model, tmp_path, name)
    other = fastpeft.load_adapter(Model(), tmp_path, name)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_name_that_is_taken():
    model = adapted(LORA, "mine")
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_name 'mine' is taken"):
        fastpeft.adapt(model, BOFT.config(), "mine")
    assert_unchanged(model, before)


@pytest.mark.parametrize("config", [None, {"r": 4}, "lora", fastpeft.LoraConfig, 5], ids=repr)
def test_what_is_no_configuration(config):
    model = Model()
    before = snapshot(model)
    with pytest.raises(TypeError, match="config must be one of LoraConfig, MosConfig, BOFTConfig, FourierFTConfig"):
        fastpeft.adapt(model, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: fastpeft.adapt(model, LORA.config()),
        lambda model, folder: fastpeft.set_adapter(model, "default"),
        lambda model, folder: fastpeft.merge(model),
        lambda model, folder: fastpeft.unmerge(model),
        lambda model, folder: fastpeft.save_adapter(model, folder),
        lambda model, folder: fastpeft.load_adapter(model, folder),
        lambda model, folder: list(fastpeft.adapter_parameters(model)),
    ],
    ids=["adapt", "set_adapter", "merge", "unmerge", "save_adapter", "load_adapter", "adapter_parameters"],
)
def test_what_is_no_model(call: Callable, tmp_path: Path):
    for wrong in (None, [nn.Linear(2, 2)], nn.Linear):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
            call(wrong, tmp_path)


def spread_over_devices() -> Model:
    model = Model()
    model.blocks[1].to("meta")
    return model


@every_method
def test_layers_on_several_devices(method: Method):
    """Each adapter lives with its layer. A MoS pool cannot live on two devices, and has to say so at once."""
    model = spread_over_devices()
    before = snapshot(model)
    if method is MOS:
        with pytest.raises(ValueError, match=r"'blocks\.1\.attention\.q'.*(meta|cpu).*(meta|cpu)"):
            fastpeft.adapt(model, method.config())
        assert_unchanged(model, before)
        return
    fastpeft.adapt(model, method.config())
    for i, device in enumerate(("cpu", "meta")):
        assert {p.device.type for p in model.blocks[i].parameters()} == {device}


@every_method
def test_an_adapter_left_on_another_device(method: Method):
    """Whatever says so, it must not be silence: on meta PyTorch itself lets much pass."""
    model = adapted(method)
    model.blocks[0].attention["q"].adapters.to("meta")
    with pytest.raises((ValueError, RuntimeError)):
        model(randn(5, IN))


@every_method
def test_a_base_on_another_device(method: Method):
    model = adapted(method)
    q = model.blocks[0].attention["q"]
    q.weight = nn.Parameter(q.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError) as caught:
        model(randn(5, IN))
    assert all(word in str(caught.value) for word in ("x", "weight", "cpu", "meta")), caught.value


# Merging


def merged_in_plain(layer: nn.Module, x: Tensor) -> Tensor:
    """The composition that merging is measured by: the adapted weight, rounded once to the base's dtype."""
    if not isinstance(layer, Adapted):
        return layer(x)
    adapters = [layer.adapters[name] for name in layer.active]
    wide = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
    identity = torch.eye(layer.in_features, dtype=wide.dtype)
    weight = plain_forward(adapters, identity, lambda z: z @ wide.T).T
    return F.linear(x, weight.to(layer.weight.dtype), layer.bias)


MERGED_TOGETHER = [["lora"], ["mos"], ["boft"], ["fourierft"], ["lora", "fourierft"], ["boft", "lora", "mos"]]


@pytest.mark.parametrize("names", MERGED_TOGETHER, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_computes_the_same(names: list[str], dtype: torch.dtype):
    model = Model().to(dtype)
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)
    fastpeft.set_adapter(model, names)
    errors, x = Errors(), randn(20, IN, dtype=dtype)
    with torch.no_grad():
        for seed in range(4):
            exact = plain_model(widened(fill(model, seed)), x.double())
            narrow = copy.deepcopy(model).float() if dtype == torch.float64 else model
            narrow_x = x.to(next(narrow.parameters()).dtype)
            composed, composed_exact = (
                narrow(narrow_x, merged_in_plain),
                plain_model(widened(narrow), narrow_x.double()),
            )
            fastpeft.merge(model)
            errors.add("y", model(x), composed, exact, composed_exact)
            fastpeft.unmerge(model)
    errors.check()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerge_gives_everything_back(method: Method, dtype: torch.dtype):
    model = adapted(method, model=Model().to(dtype))
    before, x = snapshot(model), randn(5, IN, dtype=dtype)
    expected = run(model, x)
    for _ in range(2):
        fastpeft.merge(model)
        for path in ALL_LINEAR:
            layer = model.get_submodule(path)
            assert layer.merged == ("default",)
            assert not torch.equal(layer.weight, before["state"][f"{path}.weight"])
            z = randn(3, layer.in_features, dtype=dtype)
            assert torch.equal(layer(z), F.linear(z, layer.weight, layer.bias))
        assert {name: id(p) for name, p in model.named_parameters()} == {
            name: identity for name, (identity, _) in before["parameters"].items()
        }
        fastpeft.unmerge(model)
        assert_unchanged(model, before)
    found = run(model, x)
    assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in found.tensors().items())


@every_method
def test_a_merged_state_dict_needs_no_adapter(method: Method):
    model = adapted(method)
    fastpeft.merge(model)
    plain_state = {key: value for key, value in model.state_dict().items() if ".adapters." not in key}
    other = Model(seed=5)
    other.load_state_dict(plain_state, strict=True)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_merging_for_good(method: Method):
    model, reference = adapted(method), adapted(method)
    fastpeft.merge(model, keep_base=False)
    fastpeft.merge(reference)
    assert torch.equal(model(randn(5, IN)), reference(randn(5, IN)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.q'.*keep_base=False"):
        fastpeft.unmerge(model)
    assert_unchanged(model, before)


def test_merged_models_refuse_what_would_mix_them_up(tmp_path: Path):
    model = adapted(LORA, "a")
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.merge(model)
    before = snapshot(model)
    for refused in (
        lambda: fastpeft.merge(model),
        lambda: fastpeft.adapt(model, BOFT.config(), "b"),
        lambda: fastpeft.set_adapter(model, None),
        lambda: fastpeft.load_adapter(model, tmp_path, "b"),
        lambda: fastpeft.load_adapter(model, tmp_path, "a"),
    ):
        with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.q' has a merged: unmerge first"):
            refused()
        assert_unchanged(model, before)


@every_method
def test_a_merged_adapter_can_be_saved(method: Method, tmp_path: Path):
    model = adapted(method)
    expected = model(randn(5, IN))
    fastpeft.merge(model)
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(randn(5, IN)), expected)


def test_nothing_to_merge():
    model = Model()
    fastpeft.unmerge(model)
    with pytest.raises(ValueError, match="no active adapter"):
        fastpeft.merge(model)
    fastpeft.adapt(model, LORA.config())
    fastpeft.set_adapter(model, None)
    with pytest.raises(ValueError, match="no active adapter"):
        fastpeft.merge(model)
    fastpeft.unmerge(model)


def share_parameter(model: Model) -> tuple[str, str]:
    model.head.weight = model.embed.weight
    return "'head'", "'embed'"


def share_parameter_of_a_layer(model: Model) -> tuple[str, str]:
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return "'blocks.0.up'", "'blocks.1.up'"


def share_memory(model: Model) -> tuple[str, str]:
    """Two Parameters over the same numbers, as a transposed tie is written."""
    model.blocks[1].down.weight = nn.Parameter(model.blocks[0].up.weight.T)
    return "'blocks.0.up'", "'blocks.1.down'"


@pytest.mark.parametrize("share", [share_parameter, share_parameter_of_a_layer, share_memory])
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging_into_a_shared_weight_is_refused(share: Callable, keep_base: bool):
    model = Model()
    names = share(model)
    adapted(LORA, model=model, target_modules=["q", "up", "head"])
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        fastpeft.merge(model, keep_base=keep_base)
    assert all(word in str(caught.value) for word in ("share", *names)), caught.value
    assert_unchanged(model, before)


def test_merging_a_module_that_is_used_twice():
    model = Model(n_blocks=1)
    model.blocks.append(model.blocks[0])
    adapted(BOFT, model=model)
    expected = model(randn(5, IN))
    fastpeft.merge(model)
    torch.testing.assert_close(model(randn(5, IN)), expected)
    fastpeft.unmerge(model)
    assert torch.equal(model(randn(5, IN)), expected)


@every_method
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging_into_a_quantised_layer_is_refused(method: Method, keep_base: bool):
    model = Model()
    model.blocks[1].down = QuantisedLinear(OUT, IN)
    adapted(method, model=model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.1\.down'.*QuantisedLinear"):
        fastpeft.merge(model, keep_base=keep_base)
    assert_unchanged(model, before)


@every_method
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_what_is_not_finite_is_refused(method: Method, keep_base: bool, value: float):
    for name in method.parameters:
        model = adapted(method)
        parameter = getattr(model.blocks[1].down.adapters["default"], name)
        with torch.no_grad():
            parameter.view(-1)[-1] = value
            if name in ("pool_A", "pool_B"):  # every shard, since not every one is read
                parameter.fill_(value)
            if name == "boft_R":  # an entry off the diagonal, which is the only part that counts
                parameter[0, 0, 0, 1] = value
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'blocks\.[01]\.down'.*default.*not finite"):
            fastpeft.merge(model, keep_base=keep_base)
        assert_unchanged(model, before)


def test_merging_what_the_base_cannot_hold_is_refused():
    """Finite in float32, infinite once rounded to the base's float16."""
    model = adapted(LORA, model=Model().half())
    with torch.no_grad():
        model.blocks[1].down.adapters["default"].lora_B.fill_(1e30)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.1\.down'.*not finite"):
        fastpeft.merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@every_method
def test_a_merge_that_breaks_off_is_taken_back(method: Method, error: type[BaseException], monkeypatch):
    model = adapted(method)
    before = snapshot(model)
    adapter = model.blocks[1].down.adapters["default"]

    def fail(*args):
        raise error

    monkeypatch.setattr(type(adapter), "rotate_weight" if adapter.rotates else "delta_weight", fail_for(adapter, fail))
    with pytest.raises(error):
        fastpeft.merge(model)
    monkeypatch.undo()
    assert_unchanged(model, before)


def fail_for(adapter: nn.Module, fail: Callable) -> Callable:
    original = type(adapter).rotate_weight if adapter.rotates else type(adapter).delta_weight

    def method(self, *args):
        return fail() if self is adapter else original(self, *args)

    return method


@every_method
def test_merging_transposed_weights(method: Method):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = Model()
    for block in model.blocks:
        block.up, block.down = conv1d(OUT, IN), conv1d(IN, OUT)
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight.copy_(randn(IN, OUT) / 4)
            block.down.weight.copy_(randn(OUT, IN) / 4)
    adapted(method, model=model)
    before, expected = snapshot(model), model(randn(5, IN))
    fastpeft.merge(model)
    torch.testing.assert_close(model(randn(5, IN)), expected, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert_unchanged(model, before)


# Files


def files_of(folder: Path) -> set[str]:
    return set(os.listdir(folder))


FILES = {"adapter_model.safetensors", "adapter_config.json"}


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(method: Method, dtype: torch.dtype, tmp_path: Path):
    model, x = adapted(method, model=Model().to(dtype)), randn(5, IN, dtype=dtype)
    folder = tmp_path / "new" / "folder"
    fastpeft.save_adapter(model, str(folder))
    assert files_of(folder) == FILES
    other = Model().to(dtype)
    assert fastpeft.load_adapter(other, folder) is other
    assert torch.equal(other(x), model(x))
    assert run(other, x).gradients.keys() == run(model, x).gradients.keys()
    assert adapted_paths(other) == ALL_LINEAR
    assert snapshot(other)["types"] == snapshot(model)["types"]


@every_method
def test_what_the_configuration_file_says(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted(method), tmp_path / "all")
    values = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert values["peft_type"] == method.make_config.peft_type
    assert values["target_modules"] == sorted(ALL_LINEAR)  # what "all-linear" meant
    assert all(values[name] == value for name, value in method.options)
    fastpeft.save_adapter(adapted(method, target_modules=["q", "up"]), tmp_path / "some")
    assert json.loads((tmp_path / "some" / "adapter_config.json").read_text())["target_modules"] == ["q", "up"]


def test_mos_writes_each_pool_once(tmp_path: Path):
    model = adapted(MOS)
    fastpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = ["q.24x24", "v.24x24", "up.16x24", "down.24x16"]
    assert {key for key in tensors if key.startswith("pools.")} == {f"pools.{k}.pool_{s}" for k in kinds for s in "AB"}
    indices = {f"layers.{path}.index_{side}" for path in ALL_LINEAR for side in "AB"}
    assert {key for key in tensors if not key.startswith("pools.")} == indices
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("pools."))
    assert numbers == sum(parameter.numel() for parameter in fastpeft.adapter_parameters(model))


def test_mos_files_do_not_rest_on_a_random_generator(tmp_path: Path):
    model = adapted(MOS)
    fastpeft.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if "index" in key:
            tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, path)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Adapted):
                for name in ("index_A", "index_B"):
                    index = getattr(layer.adapters["default"], name)
                    index.copy_(index.flip(0))
    torch.testing.assert_close(fastpeft.load_adapter(Model(), tmp_path)(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_loading_into_the_same_adapter_keeps_its_parameters(method: Method, tmp_path: Path):
    saved = adapted(method, values=1)
    fastpeft.save_adapter(saved, tmp_path)
    model = adapted(method, values=2)
    optimizer = torch.optim.SGD(fastpeft.adapter_parameters(model), lr=0.1)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    fastpeft.load_adapter(model, tmp_path)
    assert torch.equal(model(randn(5, IN)), saved(randn(5, IN)))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    model(randn(5, IN)).sum().backward()
    optimizer.step()
    assert not torch.equal(model(randn(5, IN)), saved(randn(5, IN)))


@every_method
def test_loading_into_another_adapter_of_that_name_is_refused(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted(method), tmp_path)
    other = next(candidate for candidate in METHODS if candidate is not method)
    changes = {
        LORA: {"lora_alpha": 7},
        MOS: {"seed": 3},
        BOFT: {"boft_dropout": 0.5},
        FOURIERFT: {"scaling": 7.0},
    }
    for model in (
        adapted(method, **changes[method]),
        adapted(other),
        adapted(method, target_modules=["q"]),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError) as caught:
            fastpeft.load_adapter(model, tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert_unchanged(model, before)


@every_method
def test_loading_beside_another_adapter(method: Method, tmp_path: Path):
    saved = adapted(method)
    fastpeft.save_adapter(saved, tmp_path)
    model = adapted(LORA, "first", values=5)
    expected = model(randn(5, IN))
    fastpeft.load_adapter(model, tmp_path, adapter_name="second")
    assert torch.equal(model(randn(5, IN)), saved(randn(5, IN)))
    fastpeft.set_adapter(model, "first")
    assert torch.equal(model(randn(5, IN)), expected)


@every_method
def test_loading_a_file_of_another_dtype(method: Method, tmp_path: Path):
    """Values come in the file's dtype and parameters in the layer's."""
    model = adapted(method)
    for parameter in fastpeft.adapter_parameters(model):  # numbers that bfloat16 holds
        parameter.data = parameter.data.bfloat16().float()
    fastpeft.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for dtype in (torch.bfloat16, torch.float64):
        save_file({k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(path).items()}, path)
        other = fastpeft.load_adapter(Model(), tmp_path)
        assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
        assert {parameter.dtype for parameter in fastpeft.adapter_parameters(other)} == {torch.float32}


def test_patterns_survive_a_file(tmp_path: Path):
    model = adapted(LORA, rank_pattern={"q": 2, r".*\.0\.up": 5}, alpha_pattern={"down": 3.0})
    fastpeft.save_adapter(model, tmp_path)
    other = fastpeft.load_adapter(Model(), tmp_path)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
    assert other.blocks[0].up.adapters["default"].r == 5
    assert other.blocks[1].up.adapters["default"].r == 4


@every_method
def test_one_module_in_two_places_is_saved_once(method: Method, tmp_path: Path):
    def make() -> Model:
        model = Model(n_blocks=1)
        model.blocks.append(model.blocks[0])
        return model

    model = adapted(method, model=make())
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(make(), tmp_path)(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_layers_made_one_by_one_are_saved_right_or_not_at_all(method: Method, tmp_path: Path):
    """Such layers do not know where in a model they stand; writing them over one another would lose them silently."""

    def make(seed: int) -> nn.Sequential:
        model = Model().blocks[0].attention
        layers = [method.layer_class.from_linear(model[name], method.config()) for name in "qv"]
        return fill(nn.Sequential(*layers), seed)

    model, other = make(seed=1), make(seed=2)
    try:
        fastpeft.save_adapter(model, tmp_path)
    except ValueError:
        return
    fastpeft.load_adapter(other, tmp_path)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))


def test_which_adapter_is_saved(tmp_path: Path):
    model = adapted(LORA, "a", values=1)
    adapted(BOFT, "b", values=2, model=model)
    fastpeft.set_adapter(model, ["a", "b"])
    for name, words in ((None, ["adapter_name", "'a', 'b'"]), ("c", ["adapter_name", "a, b", "'c'"])):
        with pytest.raises(ValueError) as caught:
            fastpeft.save_adapter(model, tmp_path / "x", name)
        assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "x").exists()
    fastpeft.save_adapter(model, tmp_path, "b")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOFT"
    fastpeft.set_adapter(model, "a")
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    fastpeft.set_adapter(model, None)
    with pytest.raises(ValueError, match="adapter_name must be given"):
        fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name must be .*\(none\)|adapter_name must be given"):
        fastpeft.save_adapter(Model(), tmp_path)


def test_saving_where_a_file_stands(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="folder must name a folder"):
        fastpeft.save_adapter(adapted(LORA), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    fastpeft.save_adapter(adapted(LORA), tmp_path)
    assert files_of(tmp_path) == FILES | {"README.md"}


# Saving that breaks off


def fail_at(function: Callable, which: int, error: type[BaseException]) -> Callable:
    """The function, but its n-th call raises instead."""
    calls = iter(range(which + 1))

    def wrapped(*args, **kwargs):
        if next(calls, None) == which:
            raise error("stopped")
        return function(*args, **kwargs)

    return wrapped


def full_disk(size: int) -> Callable[[], Callable[[], None]]:
    """No file may grow beyond a size; the call that it returns undoes it."""

    def begin() -> Callable[[], None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return begin


def patched(name: str, which: int, error: type[BaseException]) -> Callable[[], Callable[[], None]]:
    def begin() -> Callable[[], None]:
        patch = pytest.MonkeyPatch()
        patch.setattr(os, name, fail_at(getattr(os, name), which, error))
        return patch.undo

    return begin


BREAKS = {
    "disk full at once": full_disk(0),
    "disk full after some bytes": full_disk(1000),
    **{
        f"{error.__name__} in {name} of file {which}": patched(name, which, error)
        for name in ("fsync", "replace")
        for which in (0, 1)
        for error in (OSError, KeyboardInterrupt)
    },
}
# What the second save, the one that breaks off, writes over the first.
SECOND_SAVES = {
    "the same adapter trained on": (LORA, {}),
    "another alpha, so the same shapes": (LORA, {"lora_alpha": 60}),
    "another rank": (LORA, {"r": 2}),
    "another method": (BOFT, {}),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("second", SECOND_SAVES)
def test_a_save_that_breaks_off_leaves_an_adapter(broken: str, second: str, tmp_path: Path):
    """What is in the folder is the old adapter or the new one, never a mixture that loads."""
    x, old = randn(5, IN), adapted(LORA, values=1)
    method, changes = SECOND_SAVES[second]
    new = adapted(method, values=2, **changes)
    fastpeft.save_adapter(old, tmp_path)
    undo = BREAKS[broken]()
    try:
        with pytest.raises((OSError, KeyboardInterrupt)):
            fastpeft.save_adapter(new, tmp_path)
    finally:
        undo()
    assert files_of(tmp_path) == FILES
    y = fastpeft.load_adapter(Model(), tmp_path)(x)
    assert torch.equal(y, old(x)) or torch.equal(y, new(x))
    fastpeft.save_adapter(new, tmp_path)  # and then it works again
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(x), new(x))


@pytest.mark.parametrize("broken", BREAKS)
def test_a_first_save_that_breaks_off_leaves_no_litter(broken: str, tmp_path: Path):
    undo = BREAKS[broken]()
    try:
        with pytest.raises((OSError, KeyboardInterrupt)):
            fastpeft.save_adapter(adapted(LORA), tmp_path)
    finally:
        undo()
    assert files_of(tmp_path) < FILES
    with pytest.raises(FileNotFoundError):
        fastpeft.load_adapter(Model(), tmp_path)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_save_that_is_killed_leaves_no_mixture(moved: int, tmp_path: Path):
    """Killed after none or one of the two files was moved into its place: nothing can be put back then."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_model import LORA, adapted, fastpeft
replace, moved = os.replace, []
def replace_or_die(*args):
    if len(moved) == {moved}:
        os._exit(9)
    moved.append(replace(*args))
os.replace = replace_or_die
fastpeft.save_adapter(adapted(LORA, values=2, lora_alpha=60), sys.argv[1])
"""
    x, old, new = randn(5, IN), adapted(LORA, values=1), adapted(LORA, values=2, lora_alpha=60)
    fastpeft.save_adapter(old, tmp_path)
    assert subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode == 9
    try:
        y = fastpeft.load_adapter(Model(), tmp_path)(x)
    except ValueError:
        assert moved  # two files cannot be moved in one step, but the mixture can be seen
    else:
        assert torch.equal(y, old(x)) or torch.equal(y, new(x))
    fastpeft.save_adapter(new, tmp_path)
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(x), new(x))


# Files that are wrong


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def with_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        tensors = tensors_of(folder)
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return corrupt


def with_config(**changes) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        path = folder / "adapter_config.json"
        values = json.loads(path.read_text())
        values.update(changes)
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not DROP}))

    return corrupt


DROP = object()


def named_as(method: Method) -> Callable[[Path], None]:
    values = {**method.config(target_modules=ALL_LINEAR).to_dict(), "base_model_name_or_path": None}
    return lambda folder: (folder / "adapter_config.json").write_text(json.dumps(values)) and None


def truncated(keep: Callable[[int], int], name: str = "adapter_model.safetensors") -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: keep(len(content))])

    return corrupt


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def removed(*names: str) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return corrupt


class Explosive:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def pickled_only(folder: Path) -> None:
    removed(*FILES - {"adapter_config.json"})(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Explosive(str(folder / "exploded"))))


def pickled_under_the_right_name(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Explosive(str(folder / "exploded"))))


def one(tensors: dict[str, Tensor], end: str = "") -> str:
    return sorted(key for key in tensors if key.endswith(end))[-1]


def put(end: str, value: float, dtype: torch.dtype | None = None) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = tensors[key].to(dtype or tensors[key].dtype).clone()
        tensors[key].view(-1)[-1] = value

    return with_tensors(change)


def recast(end: str, dtype: torch.dtype) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = tensors[key].to(dtype)

    return with_tensors(change)


def reshaped(end: str, change_shape: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        key = one(tensors, end)
        tensors[key] = change_shape(tensors[key]).contiguous()

    return with_tensors(change)


TENSOR_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
LAST = {LORA: "lora_B.weight", MOS: "pool_B", BOFT: "boft_s", FOURIERFT: "fourierft_spectrum"}

# Method, what is done to a good folder, and what the error has to name beside the folder.
WRONG_FILES: dict[str, tuple[Method, Callable[[Path], None], list[str]]] = {
    # bytes
    "empty": (LORA, truncated(lambda size: 0), [TENSOR_FILE, "truncated"]),
    "cut in the header's length": (LORA, truncated(lambda size: 4), [TENSOR_FILE, "truncated"]),
    "cut in the header": (LORA, truncated(lambda size: 200), [TENSOR_FILE, "truncated"]),
    "cut in the middle": (LORA, truncated(lambda size: size // 2), [TENSOR_FILE, "truncated"]),
    "last byte missing": (LORA, truncated(lambda size: size - 1), [TENSOR_FILE, "truncated"]),
    "header of 2⁶⁴ bytes": (LORA, replaced(TENSOR_FILE, b"\xff" * 64), [TENSOR_FILE]),
    "text": (LORA, replaced(TENSOR_FILE, b"not tensors, but quite some text about them"), [TENSOR_FILE]),
    "a pickle of that name": (LORA, pickled_under_the_right_name, [TENSOR_FILE]),
    "configuration cut": (LORA, truncated(lambda size: size // 2, CONFIG_FILE), [CONFIG_FILE, "not JSON"]),
    "configuration empty": (LORA, replaced(CONFIG_FILE, b""), [CONFIG_FILE, "not JSON"]),
    "configuration not UTF-8": (LORA, replaced(CONFIG_FILE, b"\xff\xfe{}"), [CONFIG_FILE, "not JSON"]),
    "configuration a list": (LORA, replaced(CONFIG_FILE, b"[1, 2]"), [CONFIG_FILE, "object", "list"]),
    # tensors
    "tensor missing": (LORA, with_tensors(lambda t: t.pop(one(t))), ["up.lora_B.weight is missing"]),
    "tensor too many": (LORA, with_tensors(lambda t: t.update({"more": torch.ones(1)})), ["more is not expected"]),
    "tensor renamed": (
        LORA,
        with_tensors(lambda t: t.update({"wrong": t.pop(one(t))})),
        ["up.lora_B.weight is missing", "wrong is not expected"],
    ),
    "no tensors": (LORA, with_tensors(dict.clear), ["is missing", "8 more"]),
    "transposed": (LORA, reshaped("up.lora_B.weight", lambda t: t.T), ["(4, 16)", "(16, 4)"]),
    "other rank of one tensor": (LORA, reshaped("q.lora_A.weight", lambda t: t[:2]), ["(2, 24)", "(4, 24)"]),
    "flat": (BOFT, reshaped("up.boft_s", torch.flatten), ["(16,)", "(16, 1)"]),
    "no elements": (FOURIERFT, reshaped("spectrum", lambda t: t[:0]), ["(0,)", "(37,)"]),
    "other pool": (MOS, reshaped("pool_A", lambda t: t[:-1]), ["pool_A", "(15, 12)", "(16, 12)"]),
    "complex": (FOURIERFT, recast("spectrum", torch.complex64), ["spectrum", "complex64"]),
    "integers": (LORA, recast("lora_A.weight", torch.int64), ["lora_A.weight", "int64", "float32"]),
    "8-bit floats": (LORA, recast("lora_A.weight", torch.float8_e4m3fn), ["lora_A.weight", "float8_e4m3fn"]),
    **{
        f"{value} in {method.name}": (method, put(end, value), [end, "not finite"])
        for method, end in LAST.items()
        for value in (float("nan"), float("-inf"))
    },
    "finite in the file's dtype alone": (LORA, put("lora_A.weight", 1e300, torch.float64), ["lora_A.weight", "finite"]),
    # MoS indices
    "index too large": (MOS, put("index_A", 16), ["index_A", "[0, 16)", "16"]),
    "index negative": (MOS, put("index_B", -1), ["index_B", "[0, 16)", "-1"]),
    "index huge": (MOS, put("index_B", 2**62), ["index_B", "[0, 16)", str(2**62)]),
    "index of floats": (MOS, recast("index_A", torch.float32), ["index_A", "float32"]),
    "index of bools": (MOS, recast("index_A", torch.bool), ["index_A", "bool"]),
    "index of another rank": (MOS, reshaped("index_A", lambda t: t[:1]), ["index_A", "(1, 2)", "(3, 2)"]),
    # configuration
    "no method": (LORA, with_config(peft_type=DROP), ["peft_type", "LORA, MOS, BOFT, FOURIERFT", "None"]),
    "unknown method": (LORA, with_config(peft_type="VERA"), ["peft_type", "LORA, MOS, BOFT, FOURIERFT", "'VERA'"]),
    "method that is no name": (LORA, with_config(peft_type=["LORA"]), ["peft_type", "['LORA']"]),
    "another method": (LORA, named_as(BOFT), ["attention.q.boft_R is missing"]),
    "DoRA": (LORA, with_config(use_dora=True), ["use_dora", "True", "LORA"]),
    "trained biases": (LORA, with_config(bias="all"), ["bias", "'all'"]),
    "more modules saved": (LORA, with_config(modules_to_save=["head"]), ["modules_to_save", "['head']"]),
    "option nobody knows": (FOURIERFT, with_config(wavelets=3), ["wavelets", "3", "FOURIERFT"]),
    "rank that is not the tensors'": (LORA, with_config(r=5), ["(4, 24)", "(5, 24)"]),
    "rank that no memory holds": (LORA, with_config(r=2**50), ["r", "4"]),
    "rank a string": (LORA, with_config(r="4"), ["r", "integer", "'4'"]),
    "alpha NaN": (LORA, with_config(lora_alpha=float("nan")), ["lora_alpha", "finite"]),
    "alpha that no float holds": (LORA, with_config(lora_alpha=10**400), ["lora_alpha", "finite"]),
    "pattern null": (LORA, with_config(rank_pattern=None), ["rank_pattern", "None"]),
    "pattern that is no regular expression": (LORA, with_config(rank_pattern={"(": 4}), ["rank_pattern", "'('"]),
    "target that is no regular expression": (LORA, with_config(target_modules="("), ["target_modules", "'('"]),
    "target a number": (LORA, with_config(target_modules=7), ["target_modules", "7"]),
    "no target": (LORA, with_config(target_modules=None), ["target_modules", "must be given"]),
    "targets that are not there": (LORA, with_config(target_modules=["query"]), ["['query']", "no layer"]),
    "targets that are no layers": (LORA, with_config(target_modules=["norm"]), ["norm", "LayerNorm"]),
    "fewer targets than tensors": (LORA, with_config(target_modules=["q"]), ["up.lora_A.weight is not expected"]),
    "more targets than tensors": (
        LORA,
        with_config(target_modules=[*ALL_LINEAR, "head"]),
        ["head.lora_A.weight is missing"],
    ),
    "block that does not divide": (BOFT, with_config(boft_block_size=5), ["boft_block_size=5", "24"]),
    "too many factors": (BOFT, with_config(boft_n_butterfly_factor=9), ["boft_n_butterfly_factor=9"]),
    "too many frequencies": (FOURIERFT, with_config(n_frequency=10**6), ["n_frequency", "576", "1000000"]),
    "seed that is no seed": (FOURIERFT, with_config(random_loc_seed=2**70), ["random_loc_seed", str(2**70)]),
    "pool too small": (MOS, with_config(pool_rank=1), ["r=3", "pool_rank=1"]),
}
# Errors of a configuration that a model with this adapter in it does not meet: its layers are known.
ABOUT_TARGETS = {
    "no target",
    "target that is no regular expression",
    "targets that are not there",
    "targets that are no layers",
    "fewer targets than tensors",
    "more targets than tensors",
}


@pytest.mark.parametrize("wrong", WRONG_FILES)
@pytest.mark.parametrize("into", ["a fresh model", "a model with that adapter", "a model with another"])
def test_wrong_files_are_refused(wrong: str, into: str, tmp_path: Path):
    method, corrupt, words = WRONG_FILES[wrong]
    if into == "a model with that adapter":
        if wrong in ABOUT_TARGETS:
            return
        model = adapted(method, values=1)
    else:
        model = Model() if into == "a fresh model" else adapted(BOFT, "other", values=1)
    fastpeft.save_adapter(adapted(method, values=2), tmp_path)
    corrupt(tmp_path)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError)) as caught:
        fastpeft.load_adapter(model, tmp_path)
    if into != "a model with that adapter":  # there it can be enough to say that the configurations differ
        assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(model, before)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "corrupt, words",
    [
        (removed(TENSOR_FILE), [TENSOR_FILE]),
        (removed(CONFIG_FILE), [CONFIG_FILE]),
        (removed(TENSOR_FILE, CONFIG_FILE), [CONFIG_FILE]),
        (pickled_only, [TENSOR_FILE, "pickle"]),
        (shutil.rmtree, [CONFIG_FILE]),
        (lambda folder: shutil.rmtree(folder) or folder.write_text("a file"), [CONFIG_FILE]),
        (lambda folder: removed(TENSOR_FILE)(folder) or (folder / TENSOR_FILE).mkdir(), [TENSOR_FILE]),
    ],
    ids=["no tensors", "no configuration", "neither", "only a pickle", "no folder", "a file", "a folder as a file"],
)
def test_missing_files_are_named(corrupt: Callable, words: list[str], tmp_path: Path):
    folder = tmp_path / "folder"
    fastpeft.save_adapter(adapted(LORA), folder)
    corrupt(folder)
    model = Model()
    before = snapshot(model)
    with pytest.raises(OSError) as caught:
        fastpeft.load_adapter(model, folder)
    assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value
    assert_unchanged(model, before)
    assert not (folder / "exploded").exists()


@every_method
def test_an_adapter_of_another_model(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted(method), tmp_path)
    for model in (Model(n_blocks=1), Model(n_blocks=3), nn.Sequential(nn.Linear(IN, IN))):
        before = snapshot(model)
        try:
            fastpeft.load_adapter(model, tmp_path)
        except ValueError as error:
            assert str(tmp_path) in str(error) or "target_modules" in str(error)
            assert_unchanged(model, before)
        else:
            assert len(model.blocks) == 3  # the file's layers are all there


def test_layers_that_the_file_does_not_name_are_missing(tmp_path: Path):
    fastpeft.save_adapter(adapted(LORA, target_modules=["q"], model=Model(n_blocks=1)), tmp_path)
    model = Model(n_blocks=2)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attention\.q\.lora_A\.weight is missing"):
        fastpeft.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
