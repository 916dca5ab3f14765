"""Dropout: LoRA's and MoS's on x, BOFT's of whole blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import (
    BOFT,
    IN,
    LORA,
    MOS,
    OUT,
    WITH_DROPOUT,
    Method,
    adapted,
    assert_same,
    check,
    make_linear,
    plain_delta,
    randn,
    run,
    widened,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft


@pytest.mark.parametrize("method", WITH_DROPOUT, ids=str)
def test_dropout_is_for_training(method: Method):
    layer, plain, x = adapted(method, **{method.dropout: 0.5}), adapted(method), randn(33, IN)
    assert_same(run(layer.eval(), x), run(plain, x))
    layer.train()
    outputs = [layer(x) for _ in range(20)]  # BOFT's few blocks here: two calls may well drop the same ones
    assert not all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_a_share(method: Method, p: float):
    """With one input the delta is there or not."""
    one = {"r": 1, "private_rank": 1, "pool_rank": 1, "shards_per_vector": 1} if method is MOS else {"r": 1}
    layer = adapted(method, make_linear(1, 1, bias=False), **one, lora_dropout=p).train()
    n = 20_000
    x = torch.ones(n, 1)
    delta = layer(x) - F.linear(x, layer.weight)
    kept = plain_delta(layer.adapters["default"]) / (1 - p)
    dropped = delta.abs() < kept.abs() / 2
    assert torch.allclose(delta[~dropped], kept.expand(n, 1)[~dropped], rtol=1e-4)
    assert delta[dropped].abs().max() == 0
    assert abs(dropped.double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
def test_dropout_keeps_the_expectation(method: Method):
    layer, x = adapted(method, lora_dropout=0.3), randn(IN)
    with torch.no_grad():
        outputs = layer.train()(x.expand(20_000, IN)).double()
        expected = layer.eval()(x)
    standard_error = outputs.std(0) / 20_000**0.5
    assert ((outputs.mean(0) - expected).abs() < 5 * standard_error).all()


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_with_dropout(method: Method, dtype: torch.dtype):
    layer, x = adapted(method, make_linear(dtype=dtype), lora_dropout=0.4).train(), randn(19, IN, dtype=dtype)
    torch.manual_seed(11)
    mask = F.dropout(torch.ones_like(x), 0.4) != 0
    assert 0.2 < 1 - mask.float().mean() < 0.6

    def seeded(layer: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(11)
        return layer(x)

    def formula(layer: nn.Module, x: Tensor) -> Tensor:
        delta = plain_delta(layer.adapters["default"])
        dropped = x * mask / 0.6
        return F.linear(x, layer.weight, layer.bias) + F.linear(dropped.to(delta.dtype), delta).to(x.dtype)

    check(layer, x, seeded, formula)


def boft_with_dropped(layer: nn.Module, x: Tensor, factor: int, dropped: tuple[int, ...]) -> Tensor:
    """The formula with some blocks of one factor replaced by the identity."""
    adapter = layer.adapters["default"]
    blocks = fastpeft.reference.boft.boft_blocks(adapter.boft_R)
    mask = torch.zeros(blocks.shape[:2], dtype=torch.bool)
    mask[factor, list(dropped)] = True
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    R = fastpeft.reference.boft.butterfly_matrix(torch.where(mask[:, :, None, None], identity, blocks))
    return F.linear(x @ R, layer.weight) * adapter.boft_s.squeeze(-1) + layer.bias


@pytest.mark.parametrize(
    "factors, p, count",
    [
        (1, 0.5, 3),  # half of the 6 blocks
        (1, 0.1, 0),  # int(0.6)
        (1, 0.95, 5),  # int(5.7)
        (2, 0.5, 3),
        (2, 0.34, 2),
    ],
)
def test_multiplicative_dropout(factors: int, p: float, count: int):
    """int(p · blocks) blocks of one factor are the identity; which ones, the output tells."""
    layer = adapted(BOFT, boft_n_butterfly_factor=factors, boft_dropout=p).train()
    x, exact_layer = randn(9, IN), widened(layer)
    candidates = {
        (factor, dropped): boft_with_dropped(exact_layer, x.double(), factor, dropped)
        for factor in range(factors)
        for dropped in itertools.combinations(range(6), count)
    }
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = run(layer, x)
        distance = {choice: (found.y - y).norm().item() for choice, y in candidates.items()}
        (choice, nearest), *others = sorted(distance.items(), key=lambda item: item[1])
        assert nearest < 1e-5 * found.y.norm()
        assert all(other > 1e-3 * found.y.norm() for _, other in others if count)
        drawn.add(choice)
        if seed < 4:

            def seeded(layer: nn.Module, x: Tensor, seed=seed) -> Tensor:
                torch.manual_seed(seed)
                return layer(x)

            def formula(layer: nn.Module, x: Tensor, choice=choice) -> Tensor:
                return boft_with_dropped(layer, x, *choice)

            check(layer, x, seeded, formula)
    if count:
        assert {factor for factor, _ in drawn} == set(range(factors))
        assert {block for _, dropped in drawn for block in dropped} == set(range(6))


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
def test_several_adapters_drop_each_their_own(method: Method):
    """A layer without bias is linear in x whatever is dropped, so that ⟨g, y⟩ = ⟨dx, x⟩."""
    layer = adapted(method, make_linear(bias=False), lora_dropout=0.5)
    layer = adapted(method, layer, "second", lora_dropout=0.5).train().double()
    layer.active = ("default", "second")
    x, grad = randn(9, IN, dtype=torch.float64).requires_grad_(), randn(9, OUT, seed=2, dtype=torch.float64)
    for precision in (torch.float64, torch.float32):  # the composition, and the kernels
        inputs = x.detach().to(precision).requires_grad_()
        y = layer.to(precision)(inputs)
        y.backward(grad.to(precision))
        share = 1e-10 if precision == torch.float64 else 1e-4
        assert abs((grad * y).sum() - (inputs.grad * inputs).sum()) < share * (grad * y).abs().sum()
        assert all(p.grad is not None for p in layer.adapters.parameters())
