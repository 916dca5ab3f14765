"""Wrong input, configurations and names: an error that says what is wrong, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    BOFT,
    FOURIERFT,
    IN,
    LORA,
    METHODS,
    MOS,
    OUT,
    Method,
    adapted,
    assert_unchanged,
    check,
    every_method,
    make_linear,
    randn,
    snapshot,
)
from small_models import Model, adapted_model, make_conv1d
from torch import nn

import fastpeft
from fastpeft import functional

# Layers and functions


@every_method
@pytest.mark.parametrize(
    "make, kind, words",
    [
        (lambda: randn(5, IN + 1), ValueError, ["x", "24", "(5, 25)"]),
        (lambda: randn(5, OUT), ValueError, ["x", "24", "(5, 16)"]),
        (lambda: torch.tensor(1.0), ValueError, ["x", "24", "()"]),
        (lambda: torch.ones(5, IN, dtype=torch.int64), TypeError, ["x", "float", "int64"]),
        (lambda: torch.ones(5, IN, dtype=torch.bool), TypeError, ["x", "float", "bool"]),
        (lambda: randn(5, IN, dtype=torch.float64), TypeError, ["weight", "float64", "float32"]),
        (lambda: randn(5, IN, dtype=torch.bfloat16), TypeError, ["weight", "bfloat16", "float32"]),
        (lambda: torch.empty(5, IN, device="meta"), ValueError, ["meta", "cpu"]),
        (lambda: [1.0] * IN, (TypeError, ValueError), ["x", "tensor", "list"]),
        (lambda: None, (TypeError, ValueError), ["x", "tensor", "NoneType"]),
    ],
    ids=["wide", "narrow", "no dimensions", "integers", "bool", "float64", "bfloat16", "device", "list", "None"],
)
@pytest.mark.parametrize("several", [False, True])  # several adapters go another way
def test_wrong_x(method: Method, make: Callable, kind: type[Exception], words: list[str], several: bool):
    for training in (True, False):
        layer = adapted(method).train(training)
        if several:
            adapted(LORA, layer, "second")
            fastpeft.set_adapter(layer, ["default", "second"])
        with pytest.raises(kind) as caught, torch.set_grad_enabled(training):
            layer(make())
        assert all(word in str(caught.value) for word in words), caught.value
    check(layer, randn(5, IN))


@pytest.mark.parametrize(
    "make, kind, words",
    [
        (lambda: fastpeft.LoraConfig(r=0), ValueError, ["r", "at least 1", "0"]),
        (lambda: fastpeft.LoraConfig(r=2.0), ValueError, ["r", "integer", "2.0"]),
        (lambda: fastpeft.LoraConfig(r="8"), ValueError, ["r", "integer", "'8'"]),
        (lambda: fastpeft.LoraConfig(r=True), ValueError, ["r", "integer", "True"]),
        (lambda: fastpeft.LoraConfig(lora_alpha=float("nan")), ValueError, ["lora_alpha", "finite", "nan"]),
        (lambda: fastpeft.LoraConfig(lora_alpha="16"), ValueError, ["lora_alpha", "finite number", "'16'"]),
        (lambda: fastpeft.LoraConfig(lora_dropout=1.0), ValueError, ["lora_dropout", "[0, 1)", "1.0"]),
        (lambda: fastpeft.LoraConfig(lora_dropout=-0.1), ValueError, ["lora_dropout", "[0, 1)", "-0.1"]),
        (lambda: fastpeft.LoraConfig(lora_dropout=float("nan")), ValueError, ["lora_dropout", "nan"]),
        (lambda: fastpeft.LoraConfig(init_lora_weights="pissa"), ValueError, ["init_lora_weights", "'pissa'"]),
        (lambda: fastpeft.LoraConfig(rank_pattern={"q": 0}), ValueError, ["rank_pattern", "'q'", "0"]),
        (lambda: fastpeft.LoraConfig(rank_pattern=None), (TypeError, ValueError), ["rank_pattern", "None"]),
        (lambda: fastpeft.LoraConfig(rank_pattern={"(": 4}), ValueError, ["rank_pattern", "'('"]),
        (lambda: fastpeft.LoraConfig(alpha_pattern=[1]), (TypeError, ValueError), ["alpha_pattern", "[1]"]),
        (lambda: fastpeft.LoraConfig(target_modules=5), TypeError, ["target_modules", "string", "5"]),
        (lambda: fastpeft.LoraConfig(target_modules=["q", 1]), TypeError, ["target_modules", "strings", "1"]),
        (lambda: fastpeft.LoraConfig(target_modules="("), ValueError, ["target_modules", "'('"]),
        (lambda: fastpeft.LoraConfig(exclude_modules=b"q"), TypeError, ["exclude_modules", "b'q'"]),
        (lambda: fastpeft.LoraConfig(exclude_modules="["), ValueError, ["exclude_modules", "'['"]),
        (
            lambda: fastpeft.LoraConfig(layers_to_transform="all"),
            (TypeError, ValueError),
            ["layers_to_transform", "'all'"],
        ),
        (
            lambda: fastpeft.LoraConfig(layers_to_transform=[0.5]),
            (TypeError, ValueError),
            ["layers_to_transform", "0.5"],
        ),
        (lambda: fastpeft.LoraConfig(layers_pattern=3), (TypeError, ValueError), ["layers_pattern", "3"]),
        (lambda: fastpeft.LoraConfig(layers_pattern="("), ValueError, ["layers_pattern", "'('"]),
        (lambda: fastpeft.MosConfig(pool_rank=0), ValueError, ["pool_rank", "at least 1", "0"]),
        (lambda: fastpeft.MosConfig(shards_per_vector=0), ValueError, ["shards_per_vector", "0"]),
        (lambda: fastpeft.MosConfig(private_rank=-1), ValueError, ["private_rank", "-1"]),
        (lambda: fastpeft.MosConfig(private_rank=3), ValueError, ["private_rank", "2", "3"]),
        (lambda: fastpeft.MosConfig(seed=-1), ValueError, ["seed", "-1"]),
        (lambda: fastpeft.BOFTConfig(boft_block_size=-4), ValueError, ["boft_block_size", "-4"]),
        (lambda: fastpeft.BOFTConfig(boft_block_size=0), ValueError, ["boft_block_size", "boft_block_num", "0"]),
        (lambda: fastpeft.BOFTConfig(boft_block_num=4), ValueError, ["boft_block_size", "boft_block_num", "4"]),
        (lambda: fastpeft.BOFTConfig(boft_n_butterfly_factor=0), ValueError, ["boft_n_butterfly_factor", "0"]),
        (lambda: fastpeft.BOFTConfig(boft_dropout=2), ValueError, ["boft_dropout", "2"]),
        (lambda: fastpeft.OFTConfig(r=8), ValueError, ["r and oft_block_size", "8 and 32"]),
        (lambda: fastpeft.OFTConfig(oft_block_size=0), ValueError, ["r and oft_block_size", "0 and 0"]),
        (lambda: fastpeft.OFTConfig(oft_block_size=-4), ValueError, ["oft_block_size", "-4"]),
        (lambda: fastpeft.OFTConfig(module_dropout=1.0), ValueError, ["module_dropout", "1.0"]),
        (lambda: fastpeft.OFTConfig(coft=1), ValueError, ["coft", "True or False", "1"]),
        (lambda: fastpeft.OFTConfig(eps=float("nan")), ValueError, ["eps", "finite", "nan"]),
        (lambda: fastpeft.OFTConfig(eps=-1.0), ValueError, ["eps", "-1.0"]),
        (lambda: fastpeft.OFTConfig(num_cayley_neumann_terms=0), ValueError, ["num_cayley_neumann_terms", "1", "0"]),
        (lambda: fastpeft.FourierFTConfig(n_frequency=0), ValueError, ["n_frequency", "at least 1", "0"]),
        (lambda: fastpeft.FourierFTConfig(n_frequency=-3), ValueError, ["n_frequency", "-3"]),
        (lambda: fastpeft.FourierFTConfig(scaling=float("inf")), ValueError, ["scaling", "finite", "inf"]),
        (lambda: fastpeft.FourierFTConfig(random_loc_seed=0.5), ValueError, ["random_loc_seed", "0.5"]),
        (lambda: fastpeft.FourierFTConfig(random_loc_seed=2**64), ValueError, ["random_loc_seed", str(2**64)]),
        (
            lambda: fastpeft.FourierFTConfig(n_frequency_pattern=None),
            (TypeError, ValueError),
            ["n_frequency_pattern", "None"],
        ),
        (lambda: fastpeft.FourierFTConfig(init_weights="yes"), (TypeError, ValueError), ["init_weights", "'yes'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_configurations(make: Callable, kind: type[Exception], words: list[str]):
    with pytest.raises(kind) as caught:
        make()
    assert all(word in str(caught.value) for word in words), caught.value


# Configurations that do not fit 24 -> 16, and what the message has to name beside the sizes.
MISFITS = [
    (BOFT, {"boft_block_size": 5}, ["boft_block_size=5", "24"]),  # does not divide
    (BOFT, {"boft_block_size": 32}, ["boft_block_size=32", "24"]),  # larger than the layer
    (BOFT, {"boft_block_size": 0, "boft_block_num": 7}, ["boft_block_num=7", "24"]),
    (BOFT, {"boft_block_size": 3}, ["boft_block_size=3", "odd"]),  # no half-blocks to permute
    (BOFT, {"boft_n_butterfly_factor": 3}, ["boft_n_butterfly_factor=3", "16"]),  # 24 is no multiple of 4 · 2²
    (BOFT, {"boft_n_butterfly_factor": 500}, ["boft_n_butterfly_factor=500"]),  # must not try to hold 2⁵⁰⁰
    (FOURIERFT, {"n_frequency": 385}, ["n_frequency", "384", "385"]),
    (FOURIERFT, {"n_frequency": 2**62}, ["n_frequency", "384"]),
    (MOS, {"r": 5}, ["r=5", "pool_rank=4", "8", "6"]),  # 4 public rows of 2 shards, 3 in the pool
    (MOS, {"shards_per_vector": 5}, ["shards_per_vector=5", "24"]),
    (MOS, {"shards_per_vector": 3}, ["shards_per_vector=3", "16"]),  # divides in but not out
]


@pytest.mark.parametrize("method, changes, words", MISFITS, ids=str)
def test_configurations_that_do_not_fit_the_layer(method: Method, changes: dict, words: list[str]):
    layer = make_linear()
    before = snapshot(layer)
    for make in (
        lambda config: method.layer_class.from_linear(layer, config),
        lambda config: method.layer_class(IN, OUT, config=config),
        lambda config: fastpeft.adapt(layer, config),
    ):
        with pytest.raises(ValueError) as caught:
            make(method.config(**changes))
        assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(layer, before)


@every_method
def test_wrong_arguments_of_from_linear(method: Method):
    other = next(candidate for candidate in METHODS if candidate is not method)
    linear = make_linear()
    before = snapshot(linear)
    wanted = type(method.config()).__name__
    for arguments, kind, words in (
        ((nn.ReLU(), method.config()), TypeError, ["linear", "nn.Linear", "ReLU"]),
        ((make_conv1d(), method.config()), TypeError, ["linear", "nn.Linear", "Conv1D"]),
        ((linear, other.config()), TypeError, ["config", wanted, type(other.config()).__name__]),
        ((linear, {"r": 4}), TypeError, ["config", wanted, "dict"]),
        ((linear, method.config(), "a.b"), ValueError, ["adapter_name", "'a.b'"]),
        ((linear, method.config(), ""), ValueError, ["adapter_name", "''"]),
        ((linear, method.config(), "training"), ValueError, ["adapter_name", "'training'"]),
    ):
        with pytest.raises(kind) as caught:
            method.layer_class.from_linear(*arguments)
        assert all(word in str(caught.value) for word in words), caught.value
    assert_unchanged(linear, before)


X, W, B = randn(5, 6), randn(4, 6), randn(4)
INDEX = torch.zeros(2, 3, dtype=torch.int64)
PLACES = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "function, arguments, kind, words",
    [
        ("lora_linear", (X, W, B, randn(3, 5), randn(4, 3), 1.0), ValueError, ["x", "5", "(5, 6)"]),
        ("lora_linear", (X, W, B, randn(3, 6), randn(4, 2), 1.0), ValueError, ["lora_B", "3", "(4, 2)"]),
        ("lora_linear", (X, W, B, randn(3, 6), randn(5, 3), 1.0), ValueError, ["weight", "(5, 6)", "(4, 6)"]),
        ("lora_linear", (X, W, randn(5), randn(3, 6), randn(4, 3), 1.0), ValueError, ["bias", "(4)", "(5,)"]),
        ("lora_linear", (X, W, B, randn(6), randn(4, 3), 1.0), ValueError, ["lora_A", "(r, in)", "(6,)"]),
        ("lora_linear", (X, W, B, randn(3, 6), randn(4, 3).double(), 1.0), TypeError, ["lora_B", "float32", "float64"]),
        ("lora_linear", (X, W, B.double(), randn(3, 6), randn(4, 3), 1.0), TypeError, ["bias", "float32", "float64"]),
        ("lora_linear", (X, W, B, randn(3, 6).long(), randn(4, 3).long(), 1.0), TypeError, ["lora_A", "int64"]),
        ("lora_linear", (X, W, B, randn(3, 6).to("meta"), randn(4, 3), 1.0), ValueError, ["lora_A", "cpu", "meta"]),
        ("mos_linear", (X, W, B, randn(8, 2), INDEX, randn(8, 2), INDEX, 1.0), ValueError, ["weight", "6", "(4, 6)"]),
        ("mos_linear", (X, W, B, randn(8, 2), INDEX.int(), randn(8, 2), INDEX, 1.0), TypeError, ["index_A", "int32"]),
        ("mos_linear", (X, W, B, randn(8, 2), INDEX, randn(8, 2), INDEX[:1], 1.0), ValueError, ["index_B", "(1, 3)"]),
        ("mos_linear", (X, W, B, randn(8), INDEX, randn(8, 2), INDEX, 1.0), ValueError, ["pool_A", "(8,)"]),
        ("boft_linear", (X, W, B, randn(1, 2, 2, 2), torch.ones(4, 1)), ValueError, ["boft_R", "6", "2 blocks of 2"]),
        ("boft_linear", (X, W, B, randn(1, 2, 3, 2), torch.ones(4, 1)), ValueError, ["boft_R", "(1, 2, 3, 2)"]),
        ("boft_linear", (X, W, B, randn(2, 2, 3, 3), torch.ones(4, 1)), ValueError, ["boft_R", "odd"]),
        ("boft_linear", (X, W, B, randn(1, 3, 2, 2), torch.ones(4)), ValueError, ["boft_s", "(out, 1)", "(4,)"]),
        ("boft_linear", (X, W, B, randn(1, 3, 2, 2), torch.ones(5, 1)), ValueError, ["weight", "(5, 6)", "(4, 6)"]),
        ("oft_linear", (X, W, B, randn(3, 1), 4), ValueError, ["block_size", "6", "4"]),
        ("oft_linear", (X, W, B, randn(3, 1), 0), ValueError, ["block_size", "6", "0"]),
        ("oft_linear", (X, W, B, randn(2, 1), 2), ValueError, ["oft_R", "3 rows or 1", "(2, 1)"]),
        ("oft_linear", (X, W, B, randn(2, 4), 3), ValueError, ["oft_R", "3)", "(2, 4)"]),
        ("oft_linear", (X, randn(4, 5), B, randn(2, 3), 3), ValueError, ["weight", "6", "(4, 5)"]),
        ("oft_linear", (X, W, B, randn(2, 3).long(), 3), TypeError, ["oft_R", "int64"]),
        ("oft_linear", (X, W, B, randn(2, 3).to("meta"), 3), ValueError, ["oft_R", "cpu", "meta"]),
        ("oft_linear", (X, W, B, randn(2, 3), 3, 0), ValueError, ["neumann_terms", "1", "0"]),
        ("oft_linear", (X, W, B, randn(2, 3), 3, None, -0.1), ValueError, ["eps", "-0.1"]),
        ("fourier_linear", (X, W, B, randn(3), PLACES, PLACES, 1.0), ValueError, ["spectrum", "2", "(3,)"]),
        ("fourier_linear", (X, W, B, randn(2), PLACES + 3, PLACES, 1.0), ValueError, ["rows", "[0, 4)", "[3, 4]"]),
        ("fourier_linear", (X, W, B, randn(2), PLACES, PLACES - 1, 1.0), ValueError, ["cols", "[0, 6)", "[-1, 0]"]),
        ("fourier_linear", (X, W, B, randn(2), PLACES.int(), PLACES, 1.0), TypeError, ["rows", "int64", "int32"]),
        ("butterfly", (X, randn(1, 3, 3, 3)), ValueError, ["blocks", "6", "3 blocks of 3"]),
        ("cayley", (randn(2, 3),), ValueError, ["skew", "(..., b, b)", "(2, 3)"]),
        ("cayley", (torch.ones(2, 2, dtype=torch.int64),), TypeError, ["skew", "int64"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_of_functions(function: str, arguments: tuple, kind: type[Exception], words: list[str]):
    with pytest.raises(kind) as caught:
        getattr(functional, function)(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


# Models


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
    model = adapted_model(LORA, "before")
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
    fastpeft.save_adapter(adapted_model(LORA), tmp_path)
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
    model = adapted_model(LORA, name)
    fastpeft.save_adapter(model, tmp_path, name)
    other = fastpeft.load_adapter(Model(), tmp_path, name)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_name_that_is_taken():
    model = adapted_model(LORA, "mine")
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
    model = adapted_model(method)
    model.blocks[0].attention["q"].adapters.to("meta")
    with pytest.raises((ValueError, RuntimeError)):
        model(randn(5, IN))


@every_method
def test_a_base_on_another_device(method: Method):
    model = adapted_model(method)
    q = model.blocks[0].attention["q"]
    q.weight = nn.Parameter(q.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError) as caught:
        model(randn(5, IN))
    assert all(word in str(caught.value) for word in ("x", "weight", "cpu", "meta")), caught.value
