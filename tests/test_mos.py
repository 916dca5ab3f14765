"""MoS: the layers of a kind share a pool, and add up one gradient of it."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable

import pytest
import torch
from helpers import COPIES, DTYPES, IN, MOS, Allocations, Errors, adapted, fill, make_linear, randn, run, widened
from small_models import check_block, plain_block
from torch import Tensor, nn

import fastpeft

N_LAYERS = 3
TOKENS = 7


def tokens_in(seed: int = 1) -> Tensor:
    return randn(TOKENS, IN, seed=seed) / TOKENS**0.5


def make_sharing(n_layers: int = N_LAYERS, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A chain of layers of one kind that share a pool of fewer shards than they read."""
    model = nn.ModuleList(nn.ModuleDict({"q": make_linear(IN, IN, dtype=dtype, seed=i)}) for i in range(n_layers))
    fastpeft.adapt(model, MOS.config(r=4, pool_rank=2, private_rank=1))
    return fill(nn.Sequential(*(part["q"] for part in model)))


def pools(model: nn.Module) -> list[nn.Parameter]:
    return list(fastpeft.adapter_parameters(model))


def pool_gradients(model: nn.Module) -> list[Tensor]:
    return [pool.grad.clone() for pool in pools(model)]


def loss_of(model: nn.Module, seed: int = 1) -> Tensor:
    return model(tokens_in(seed)).square().sum()


def assert_gradients(model: nn.Module, *seeds: int, weights: tuple[float, ...] = (), found=None) -> None:
    """The pools' gradients against those of Σ weight · loss through the formula."""
    exact_model, weights = widened(model), weights or (1.0,) * len(seeds)

    def gradients(model: nn.Module) -> list[Tensor]:
        dtype = model[0].weight.dtype
        total = sum(
            weight * plain_block(model, tokens_in(seed).to(dtype)).square().sum()
            for weight, seed in zip(weights, seeds, strict=True)
        )
        return list(torch.autograd.grad(total, pools(model)))

    found, errors = pool_gradients(model) if found is None else found, Errors()
    for name, gradient, composed, exact in zip("AB", found, gradients(model), gradients(exact_model), strict=True):
        errors.add(name, gradient, exact, (composed, exact))
    errors.check()


def test_pools_are_shared():
    model = make_sharing()
    assert len(pools(model)) == 2
    adapters = [layer.adapters["default"] for layer in model]
    assert all(adapter.pool_A is adapters[0].pool_A and adapter.pool_B is adapters[0].pool_B for adapter in adapters)
    used = {int(i) for adapter in adapters for i in adapter.index_A.flatten()}
    reads = sum(adapter.index_A.numel() for adapter in adapters)
    assert len(used) < reads  # some shards really have several readers


@pytest.mark.parametrize("n_layers", [1, 3, 6])
@pytest.mark.parametrize("wants_x", [True, False])
def test_one_gradient_array_per_pool_and_backward(n_layers: int, wants_x: bool):
    model = make_sharing(n_layers) if n_layers > 1 else nn.Sequential(adapted(MOS, make_linear(IN, IN)))
    loss = model(tokens_in().requires_grad_(wants_x)).square().sum()
    with Allocations() as allocations:
        loss.backward()
    pool_A, pool_B = pools(model)
    assert pool_A.shape == pool_B.shape  # so both are counted together
    assert allocations.count(pool_A.shape) == 2
    allocations.made.clear()
    with allocations:  # on top of a gradient that is there: autograd adds into it, one more array
        model(tokens_in()).square().sum().backward()
    assert allocations.count(pool_A.shape) == 2


def test_no_pool_sized_array_where_only_x_is_asked_for():
    model, x = make_sharing(), tokens_in().requires_grad_()
    model.requires_grad_(False)
    loss = model(x).square().sum()
    with Allocations() as allocations:
        loss.backward()
    assert allocations.count(pools_shape := model[0].adapters["default"].pool_A.shape) == 0, pools_shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_gradients(dtype: torch.dtype):
    model = make_sharing().to(dtype)
    check_block(model, tokens_in().to(dtype))


def test_two_forwards_before_one_backward():
    model = make_sharing()
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    assert_gradients(model, 1, 2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_backwards_of_two_graphs(order: tuple[int, int]):
    model = make_sharing()
    losses = [loss_of(model, 1), loss_of(model, 2)]
    losses[order[0]].backward()
    assert_gradients(model, order[0] + 1)
    model.zero_grad()
    losses[order[1]].backward()
    assert_gradients(model, order[1] + 1)


def test_gradients_accumulate_over_steps():
    model = make_sharing()
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()
    assert_gradients(model, 1, 2, 3)


def test_one_graph_backward_twice():
    model = make_sharing()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = pool_gradients(model)
    loss.backward()
    assert all(torch.equal(two, 2 * one) for two, one in zip(pool_gradients(model), once, strict=True))
    assert_gradients(model, 1, found=once)


def test_autograd_grad():
    model = make_sharing()
    both = pools(model)
    loss = loss_of(model)
    found = torch.autograd.grad(loss, both, retain_graph=True)
    assert all(pool.grad is None for pool in both)
    assert_gradients(model, 1, found=list(found))
    for i in (0, 1):  # one pool alone
        (alone,) = torch.autograd.grad(loss, both[i], retain_graph=True)
        assert torch.equal(alone, found[i])
    loss.backward(inputs=[both[1]])
    assert both[0].grad is None
    assert torch.equal(both[1].grad, found[1])


def test_gradients_of_x_alone_leave_nothing_behind():
    model, x = make_sharing(), tokens_in().requires_grad_()
    loss = model(x).square().sum()
    shape = pools(model)[0].shape

    def arrays() -> int:
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape == shape for thing in gc.get_objects())

    torch.autograd.grad(loss, x, retain_graph=True)
    before = arrays()
    for _ in range(4):
        torch.autograd.grad(loss, x, retain_graph=True)
    assert arrays() == before
    loss.backward()
    assert_gradients(model, 1)


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("where", range(N_LAYERS))
def test_an_exception_in_the_middle_of_backward_leaves_no_contribution(where: int):
    model = make_sharing()
    x = tokens_in().requires_grad_()
    hidden = [x]
    for layer in model:
        hidden.append(layer(hidden[-1]))
    loss = hidden[-1].square().sum()

    def interrupt(gradient: Tensor) -> None:
        raise InterruptError

    handle = hidden[where].register_hook(interrupt)
    with pytest.raises(InterruptError):
        loss.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    loss_of(model, 2).backward()  # another graph, while the first lives
    assert_gradients(model, 2)
    model.zero_grad()
    loss.backward()  # the first again
    assert_gradients(model, 1)


def test_backward_inside_backward():
    """A hook that runs a backward pass of its own, as reentrant checkpointing does."""
    model = make_sharing()
    hidden = model[0](tokens_in())

    def inner(gradient: Tensor) -> None:
        with torch.enable_grad():
            loss_of(model, 2).backward()

    hidden.register_hook(inner)
    model[1:](hidden).square().sum().backward()
    assert_gradients(model, 1, 2)


def test_backward_in_two_threads():
    model = make_sharing()
    losses = [loss_of(model, seed) for seed in (1, 2)]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        found[i] = list(torch.autograd.grad(losses[i], pools(model)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_gradients(model, 1, found=found[0])
    assert_gradients(model, 2, found=found[1])


@pytest.mark.parametrize("how", COPIES)
def test_pools_stay_shared_in_copies(how: str):
    model = make_sharing()
    other = COPIES[how](model)
    assert len(pools(other)) == 2
    assert not {id(pool) for pool in pools(other)} & {id(pool) for pool in pools(model)}
    loss_of(other).backward()
    assert_gradients(other, 1)
    assert all(pool.grad is None for pool in pools(model))


def test_a_copy_made_while_a_graph_lives():
    model = make_sharing()
    loss = loss_of(model, 1)
    other = copy.deepcopy(model)
    loss_of(other, 2).backward()
    loss.backward()
    assert_gradients(other, 2)
    assert_gradients(model, 1)


@pytest.mark.parametrize("move", [lambda model: model.double().float(), lambda model: model.to(torch.bfloat16)])
def test_pools_stay_shared_when_they_move(move: Callable[[nn.Module], nn.Module]):
    assert len(pools(move(make_sharing()))) == 2


def test_hooks_on_a_pool_fire_once():
    model, fired, accumulated = make_sharing(), [], []
    for pool in pools(model):
        pool.register_hook(lambda gradient: fired.append(gradient.clone()))
        pool.register_post_accumulate_grad_hook(lambda pool: accumulated.append(pool.grad.clone()))
    loss_of(model).backward()
    assert len(fired) == len(accumulated) == 2
    by_autograd = pool_gradients(model)
    for gradient in by_autograd:
        assert any(torch.equal(gradient, hooked) for hooked in fired)
        assert any(torch.equal(gradient, hooked) for hooked in accumulated)
    assert_gradients(model, 1)


def test_a_hook_may_change_the_gradient_of_a_pool():
    model = make_sharing()
    for pool in pools(model):
        pool.register_hook(lambda gradient: gradient * 3)
    loss_of(model).backward()
    assert_gradients(model, 1, weights=(3.0,))


def test_a_pool_frozen_between_graphs():
    model = make_sharing()
    pool_A, pool_B = pools(model)
    first = loss_of(model, 1)  # a graph that wants both
    pool_A.requires_grad_(False)
    loss_of(model, 2).backward()
    assert pool_A.grad is None
    expected = pool_B.grad.clone()
    pool_A.requires_grad_(True)
    model.zero_grad()
    first.backward()
    assert_gradients(model, 1)
    model.zero_grad()
    loss_of(model, 2).backward()
    assert torch.equal(pool_B.grad, expected)


def test_graphs_do_not_outlive_their_losses():
    """The place where gradients are added up must not keep activations alive."""
    model = make_sharing()
    shape = (11, IN)

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape == shape for thing in gc.get_objects())

    before = alive()
    for _ in range(3):
        model(randn(*shape)).sum().backward()
        model(randn(*shape)).sum()  # never run backward
    assert alive() <= before


@pytest.mark.parametrize("value", [8, -1])  # one past the pool's end, and one that would silently wrap around
def test_shard_numbers_from_a_state_dict_are_checked(value: int):
    layer, x = adapted(MOS), randn(5, IN)
    state = layer.state_dict()
    state["adapters.default.index_A"] = state["adapters.default.index_A"].clone().fill_(value)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        layer.load_state_dict(state)
        run(layer, x)
