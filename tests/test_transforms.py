"""Layers under PyTorch's transforms: torch.func, torch.export, one compiled graph for every T, second derivatives."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from helpers import IN, OUT, adapted, every_method, randn
from torch import Tensor, nn

import fastpeft


def near(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@every_method
def test_vmap(method):
    layer, x = adapted(method), randn(3, 5, IN)
    near(torch.func.vmap(layer)(x), layer(x))


@every_method
def test_functional_gradients(method):
    layer, x, grad = adapted(method), randn(5, IN), randn(5, OUT, seed=2)

    def objective(parameters: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(layer, parameters, (x,)) * grad).sum()

    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.func.grad(objective)(trained)
    layer(x).backward(grad)
    for name, parameter in trained.items():
        near(found[name], parameter.grad)


@every_method
def test_jacobian(method):
    layer, x = adapted(method), randn(IN)
    jacobian = torch.func.jacrev(layer)(x)
    near(jacobian, (layer(torch.eye(IN)) - layer(torch.zeros(IN))).T)


@every_method
def test_a_forced_kernel_says_that_it_cannot(method):
    layer = adapted(method)
    with fastpeft.use_backend("torch"), pytest.raises(RuntimeError, match=r"under a transform of torch\.func: only"):
        torch.func.vmap(layer)(randn(3, 5, IN))


@every_method
def test_second_derivatives_through_the_reference(method):
    layer, x = adapted(method).double(), randn(5, IN, dtype=torch.float64).requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]

    def penalty() -> Tensor:
        return torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)[0].square().sum()

    with fastpeft.use_backend("reference"):
        seconds = torch.autograd.grad(penalty(), [x, *trained])
        assert all(second.isfinite().all() and second.abs().sum() > 0 for second in seconds)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty().backward()


@every_method
def test_exported_for_any_number_of_tokens(method):
    layer = adapted(method).eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (randn(4, IN),), dynamic_shapes=({0: tokens},))
    for n in (2, 9, 300):
        near(program.module()(randn(n, IN)), layer(randn(n, IN)))


@every_method
@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_every_number_of_tokens(method, training: bool):
    """With the sizes marked as dynamic one graph, otherwise a second at the second size, as for any module."""
    layer = adapted(method).train(training)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    for dynamic, most in ((True, 1), (None, 2)):
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
        for n in (3, 5, 9, 40, 700):
            x = randn(n, IN).requires_grad_(training)
            with nullcontext() if training else torch.no_grad():
                y = compiled(x)
                near(y, layer(x))
            if training:
                y.sum().backward()
        assert len(graphs) <= most


@every_method
def test_a_parametrised_base(method):
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer, x = adapted(method), randn(5, IN)
    base = nn.Linear(IN, OUT)
    base.load_state_dict({name: getattr(layer, name) for name in ("weight", "bias")})
    with torch.no_grad():
        base.weight.mul_(2)
    wanted = adapted(method, base)(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    near(layer(x), wanted)
    layer(x).sum().backward()
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    near(layer(x), wanted)
