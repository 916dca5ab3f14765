"""What the tests adapt: linear layers of other kinds, a chain of layers, and a model of two blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import IN, OUT, Forward, Method, call, check, fill, make_linear, plain_linear, randn
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft
from fastpeft.nn import Adapted


class Scaled(nn.Linear):
    """A subclass of nn.Linear that computes something else."""

    def forward(self, x: Tensor, gain: float = 2.0) -> Tensor:
        return gain * super().forward(x)


class QuantisedLinear(nn.Module):
    """A weight in eight bits and a scale for each row, as buffers, as quantisation libraries keep them."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, d_in: int, d_out: int, seed: int = 0) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        dense = randn(d_out, d_in, seed=seed)
        scale = dense.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (dense / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", randn(d_out, seed=seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias.to(x.dtype))


def make_conv1d(d_in: int = IN, d_out: int = OUT):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(d_out, d_in)
    with torch.no_grad():
        conv1d.weight.copy_(randn(d_in, d_out, seed=3))
        conv1d.bias.copy_(randn(d_out, seed=4))
    return conv1d


def make_scaled(bias: bool = False) -> nn.Module:
    layer = Scaled(IN, OUT, bias)
    layer.load_state_dict(make_linear(bias=bias).state_dict())
    return layer


# Layers that are called as they are: how to make one, and the matrix that its forward multiplies with.
OTHER_BASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "subclass": (make_scaled, lambda layer: 2 * layer.weight),
    "Conv1D": (make_conv1d, lambda layer: layer.weight.T),  # (in, out), no nn.Linear
    "quantised": (lambda: QuantisedLinear(IN, OUT), lambda layer: layer.weight.to(layer.scale.dtype) * layer.scale),
}
BASES = {"linear": make_linear, **{name: make for name, (make, _) in OTHER_BASES.items()}}


def make_block(method: Method) -> nn.Sequential:
    """Two layers of one kind, so that MoS shares its pools, and one of another."""
    layers = nn.ModuleDict({"first": nn.ModuleDict({"q": make_linear(IN, IN)}), "second": nn.ModuleDict({})})
    layers["second"]["q"] = make_linear(IN, IN, seed=1)
    layers["second"]["up"] = make_linear(IN, OUT, seed=2)
    fastpeft.adapt(layers, method.config())
    chain = nn.Sequential(layers["first"]["q"], nn.GELU(), layers["second"]["q"], nn.GELU(), layers["second"]["up"])
    return fill(chain)


def plain_block(block: nn.Sequential, x: Tensor) -> Tensor:
    for module in block:
        x = plain_linear(module, x) if isinstance(module, nn.Linear) else module(x)
    return x


def check_block(block: nn.Sequential, x: Tensor, forward: Forward = call) -> None:
    check(block, x, forward, plain_block)


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


ALL_LINEAR = [f"blocks.{i}.{name}" for i in range(2) for name in ("attention.q", "attention.v", "up", "down")]


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    return plain_linear(layer, x) if isinstance(layer, Adapted) else layer(x)


def plain_model(model: nn.Module, x: Tensor) -> Tensor:
    return model(x, plain)


def adapted_model(
    method: Method, name: str = "default", values: int = 0, model: nn.Module | None = None, **changes
) -> Model:
    """A model with an adapter that changes it; values says which random ones."""
    return fill(fastpeft.adapt(Model() if model is None else model, method.config(**changes), name), values)


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, Adapted)]
