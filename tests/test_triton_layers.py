"""Whole layers through the Triton kernels, forward and backward, beside the formula and the PyTorch composition."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import (
    IN,
    LORA,
    METHODS,
    MOS,
    OUT,
    Method,
    adapted,
    assert_same,
    check,
    fill,
    make_linear,
    plain_delta,
    randn,
    run,
)
from small_models import check_block
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft

pytest.importorskip("triton")
from fastpeft.kernels import low_rank

FP32 = torch.float32
DTYPES = [FP32, torch.bfloat16, torch.float16]
SHAPES = {"one": (IN,), "rows": (19, IN), "sequences": (3, 7, IN), "none": (0, IN)}


@pytest.fixture(autouse=True)
def forced():
    with fastpeft.use_backend("triton"):
        yield


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers(method: Method, dtype: torch.dtype):
    check(adapted(method, make_linear(dtype=dtype)), randn(19, IN, dtype=dtype))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_leading_shape(method: Method, shape: tuple[int, ...]):
    layer, x = adapted(method), randn(*shape)
    found, rows = run(layer, x), x.reshape(-1, IN)
    grad = randn(*shape[:-1], OUT, seed=2).reshape(-1, OUT)
    expected = run(layer, rows, gradient=grad)
    assert found.y.shape == (*shape[:-1], OUT) and found.dx is not None and found.dx.shape == x.shape
    found.y, found.dx = found.y.reshape(-1, OUT), found.dx.reshape(-1, IN)
    assert_same(found, expected)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_results_repeat_bit_for_bit(method: Method):
    layer, x = adapted(method), randn(300, IN)
    assert_same(run(layer, x), run(layer, x))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_float64_is_refused(method: Method):
    with pytest.raises(RuntimeError, match="'triton' was asked for"):
        adapted(method, make_linear(dtype=torch.float64))(randn(3, IN, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_only_what_is_asked_for(method: Method):
    """The gradient of x alone, and of the adapter alone, are the same as together."""
    layer, x = adapted(method), randn(19, IN)
    both = run(layer, x)
    grad = randn(19, OUT, seed=2)
    y = layer(x)
    y.backward(grad)
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, both.gradients[name]), name
    leaf = x.clone().requires_grad_()
    layer.requires_grad_(False)
    layer(leaf).backward(grad)
    assert both.dx is not None and leaf.grad is not None and torch.equal(leaf.grad, both.dx)


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_without_a_mask(method: Method, dtype: torch.dtype):
    """What is kept between forward and backward is x, and the gradients belong to the mask that the output had."""
    p, layer, x = 0.4, adapted(method, make_linear(dtype=dtype), lora_dropout=0.4).train(), randn(19, IN, dtype=dtype)
    seed = torch.tensor([5])
    ones = torch.ones(19, 1)
    mask = low_rank.up(ones, low_rank.Factor(torch.ones(1, IN)), 1 - p, None, FP32, low_rank.Dropout(seed, p)).round()

    def seeded(layer: nn.Module, x: Tensor) -> Tensor:
        with mock.patch.object(torch, "randint", lambda *_, **__: seed):
            return layer(x)

    def formula(layer: nn.Module, x: Tensor) -> Tensor:
        delta = plain_delta(layer.adapters["default"])
        dropped = x * mask / (1 - p)
        return F.linear(x, layer.weight, layer.bias) + F.linear(dropped.to(delta.dtype), delta).to(x.dtype)

    check(layer, x, seeded, formula)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert sum(t.shape == x.shape for t in kept) == 1


@pytest.mark.parametrize("method", [LORA, MOS], ids=str)
def test_dropout_differs_from_call_to_call(method: Method):
    layer, x = adapted(method, lora_dropout=0.5).train(), randn(33, IN)
    torch.manual_seed(0)
    first, second = layer(x), layer(x)
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(layer(x), first)
    assert torch.equal(layer.eval()(x), adapted(method)(x))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_compiled_as_one_graph(method: Method):
    torch._dynamo.reset()
    layer, x = adapted(method), randn(19, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same(run(layer, x, lambda _, x: compiled(x)), run(layer, x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA GPU")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_captured_in_a_cuda_graph(method: Method):
    """A training step, replayed on other numbers: nothing in it waits for the host or keeps what the first call saw."""
    layer = adapted(method, make_linear(dtype=torch.bfloat16)).cuda()
    x, grad = (randn(19, d, dtype=torch.bfloat16).cuda() for d in (IN, OUT))
    leaf = x.clone().requires_grad_()
    wanted = [leaf, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def step():
        y = layer(leaf)
        return y, *torch.autograd.grad(y, wanted, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(randn(19, IN, seed=7))
        grad.copy_(randn(19, OUT, seed=8))
    graph.replay()
    assert all(torch.equal(found, expected) for found, expected in zip(captured, step(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_that_share_pools(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Their kernels add up one gradient of each pool, without A and B being assembled."""
    monkeypatch.setattr("fastpeft.ops.mos.assemble", None)
    model = nn.ModuleList(nn.ModuleDict({"q": make_linear(IN, IN, dtype=dtype, seed=i)}) for i in range(3))
    fastpeft.adapt(model, MOS.config(r=4, pool_rank=2, private_rank=1))
    check_block(fill(nn.Sequential(*(part["q"] for part in model))), randn(7, IN, dtype=dtype) / 7**0.5)


def test_opcheck_of_mos():
    x, weight, grad, h = randn(5, 12), randn(8, 12), randn(5, 8), randn(5, 2)
    pools = randn(3, 6), torch.tensor([[0, 1], [1, 1]]), randn(3, 4), torch.tensor([[2, 0], [2, 2]])
    torch.library.opcheck(torch.ops.fastpeft_triton.mos_fwd, (x, weight, None, *pools, 0.5))
    gradients = torch.ones_like(pools[0]), torch.ones_like(pools[2])
    torch.library.opcheck(torch.ops.fastpeft_triton.mos_bwd_, (*gradients, grad, x, weight, *pools, h, 0.5, True))
