"""Gradients of adapted layers: which there are, and that nothing dense is made or kept for them."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    BOFT,
    DTYPES,
    FOURIERFT,
    IN,
    LORA,
    MANY,
    METHODS,
    MOS,
    OFT,
    OUT,
    WITH_DROPOUT,
    Allocations,
    Method,
    adapted,
    check,
    every_method,
    make_linear,
    randn,
    run,
)
from small_models import make_conv1d
from torch import Tensor, nn

import fastpeft


@every_method
def test_gradients_reach_the_adapter_and_x_alone(method: Method):
    layer = adapted(method)
    found = run(layer, randn(7, IN))
    assert found.dx is not None
    assert set(found.gradients) == {f"adapters.default.{name}" for name in method.parameters}
    assert all(gradient.abs().max() > 0 for gradient in found.gradients.values())


@every_method
def test_gradients_where_only_one_side_wants_them(method: Method):
    layer, x = adapted(method), randn(7, IN)
    expected = run(layer, x)
    layer(x).backward(randn(7, OUT, seed=2))  # x wants none
    for name, parameter in layer.adapters["default"].named_parameters():
        assert torch.equal(parameter.grad, expected.gradients[f"adapters.default.{name}"])
    layer.adapters.requires_grad_(False)  # the adapter wants none
    assert torch.equal(run(layer, x).dx, expected.dx)
    assert not layer(x).requires_grad


@every_method
def test_each_parameter_alone(method: Method):
    """Skipping one gradient must not disturb another."""
    layer, x = adapted(method), randn(7, IN)
    expected = run(layer, x)
    for name, parameter in layer.adapters["default"].named_parameters():
        layer.adapters.requires_grad_(False)
        parameter.requires_grad_(True)
        found = run(layer, x)
        assert torch.equal(found.dx, expected.dx)
        assert set(found.gradients) == {f"adapters.default.{name}"}
        assert torch.equal(found.gradients[f"adapters.default.{name}"], expected.gradients[f"adapters.default.{name}"])


@every_method
def test_a_frozen_adapter_after_inference_mode(method: Method):
    """What was remembered in inference mode cannot be saved for a backward pass."""
    layer, x = adapted(method).eval(), randn(7, IN)
    expected = run(layer, x).dx
    layer.adapters.requires_grad_(False)
    with torch.inference_mode():
        layer(x)
    assert torch.equal(run(layer, x).dx, expected)


@every_method
def test_a_base_weight_that_is_set_free_gets_its_gradient(method: Method):
    layer = adapted(method)
    layer.weight.requires_grad_(True)
    layer.bias.requires_grad_(True)
    assert {"weight", "bias"} <= set(run(layer, randn(7, IN)).gradients)
    check(layer, randn(7, IN))


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("free", [False, True], ids=["frozen base", "free base"])
def test_many_tokens(method: Method, dtype: torch.dtype, free: bool):
    layer = adapted(method, make_linear(dtype=dtype))
    layer.weight.requires_grad_(free)
    layer.bias.requires_grad_(free)
    check(layer, randn(2, MANY // 2, IN, dtype=dtype), draws=2)


# Sizes for which no small tensor can be mistaken for a dense one: out · in = 9568, T · in = 728.
BIG_IN, BIG_OUT, TOKENS = 8 * 13, 4 * 23, 7
MANY_AND_BIG = 2003  # enough for every way that an operator has of doing it


def assert_nothing_dense(layer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Few tokens: nothing as large as a weight. Many tokens: nothing large that does not grow with them."""
    for tokens in (TOKENS, MANY_AND_BIG):
        x = randn(tokens, BIG_IN, dtype=dtype).requires_grad_()
        layer.zero_grad()
        with Allocations() as allocations:
            y = layer(x)
            y.backward(torch.ones_like(y))
        assert allocations.made
        dense = min(BIG_IN * BIG_IN, BIG_OUT * BIG_IN, BIG_OUT * BIG_OUT)
        big = [(name, shape) for name, shape in allocations.made if torch.Size(shape).numel() >= dense]
        counts_tokens = 2 * BIG_IN + 2  # no feature, bin or part of one has a number above
        assert not [made for made in big if tokens == TOKENS or len(made[1]) == 1 or max(made[1]) <= counts_tokens]


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # a bfloat16 weight must not be widened
@pytest.mark.parametrize("training", [True, False])
def test_nothing_dense_is_made(method: Method, dtype: torch.dtype, training: bool):
    layer = adapted(method, make_linear(BIG_IN, BIG_OUT, dtype=dtype)).train(training)
    assert_nothing_dense(layer, dtype)


@pytest.mark.parametrize("base", ["linear", "Conv1D"])
def test_nothing_dense_is_made_by_several_adapters(base: str):
    layer = make_linear(BIG_IN, BIG_OUT) if base == "linear" else make_conv1d(BIG_IN, BIG_OUT)
    for method in METHODS:
        adapted(method, layer, method.name)
    fastpeft.set_adapter(layer, [method.name for method in METHODS])
    assert_nothing_dense(layer)


@pytest.mark.parametrize("method", WITH_DROPOUT, ids=str)
def test_nothing_dense_is_made_with_dropout(method: Method):
    layer = adapted(method, make_linear(BIG_IN, BIG_OUT), **{method.dropout: 0.5}).train()
    assert_nothing_dense(layer)


def saved_numbers(layer: nn.Module, tokens: int) -> float:
    """How many float32 numbers backward keeps, but for the model's own tensors."""
    own = {tensor.untyped_storage()._cdata for tensor in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, Tensor] = {}  # holds on to the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(randn(tokens, layer.in_features).requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 4


@pytest.mark.parametrize(
    "method, beside_x",
    [
        pytest.param(LORA, 4, id="lora"),  # h = A x, T × r
        pytest.param(MOS, 3, id="mos"),  # the same
        pytest.param(BOFT, BIG_OUT, id="boft"),  # what boft_s scales, T × out
        pytest.param(FOURIERFT, 0, id="fourierft"),
        pytest.param(OFT, 0, id="oft"),
    ],
)
@pytest.mark.parametrize("tokens", [64, 2000])
def test_what_is_kept_for_backward(method: Method, beside_x: int, tokens: int):
    layer = adapted(method, make_linear(BIG_IN, BIG_OUT))
    few, many = saved_numbers(layer, tokens), saved_numbers(layer, tokens + 128)
    for_each_token = (many - few) / 128
    assert for_each_token <= BIG_IN + beside_x
    whatever_the_tokens = few - tokens * for_each_token
    assert whatever_the_tokens < BIG_IN * BIG_OUT / 2
