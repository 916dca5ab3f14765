"""Adapted layers under what PyTorch does with modules, from copies and compilers to fused encoder layers."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from helpers import (
    BOFT,
    COPIES,
    IN,
    LORA,
    OUT,
    WITH_DROPOUT,
    Errors,
    Forward,
    Method,
    adapted,
    assert_same,
    assert_unchanged,
    call,
    check,
    every_method,
    fill,
    make_linear,
    plain_linear,
    randn,
    run,
    snapshot,
    widened,
)
from small_models import BASES, check_block, make_block, plain_block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastpeft

# Copies, state dicts, moves


@every_method
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("base", BASES)
def test_copies(method: Method, how: str, base: str):
    layer, x = adapted(method, BASES[base]()), randn(5, IN)
    expected = run(layer, x)
    with torch.no_grad():
        layer(x)  # so that what is remembered between calls is there to be copied
    other = COPIES[how](layer)
    assert type(other) is type(layer)
    assert not {id(p) for p in layer.parameters()} & {id(p) for p in other.parameters()}
    assert_same(run(other, x), expected)
    fill(other, seed=9)
    assert not torch.equal(other(x), expected.y)
    assert_same(run(layer, x), expected)
    fastpeft.adapt(other, LORA.config(), "second")  # it can go on being adapted


@every_method
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_merged_layers(method: Method, how: str):
    layer, x = adapted(method), randn(5, IN)
    expected = run(layer, x)
    fastpeft.merge(layer)
    other = COPIES[how](layer)
    assert torch.equal(other(x), layer(x))
    fastpeft.unmerge(other)
    assert_same(run(other, x), expected)
    assert layer.merged == ("default",)


@every_method
def test_state_dict(method: Method):
    layer, x = adapted(method), randn(5, IN)
    other = fill(fastpeft.adapt(make_linear(seed=8), method.config()), seed=9)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert_same(run(other, x), run(layer, x))


@every_method
def test_a_base_state_dict_still_loads(method: Method):
    layer, base = adapted(method), make_linear(seed=5)
    missing, unexpected = layer.load_state_dict(base.state_dict(), strict=False)
    assert not unexpected
    assert all(key.startswith("adapters.default.") for key in missing)
    assert torch.equal(layer.weight, base.weight)


@every_method
def test_moving_between_dtypes(method: Method):
    layer, x = adapted(method), randn(5, IN)
    before = run(layer, x)
    objects = [id(parameter) for parameter in layer.parameters()]
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    check(layer, x.double())
    layer.to(torch.float32)
    assert_same(run(layer, x), before)
    assert [id(parameter) for parameter in layer.parameters()] == objects


@every_method
def test_moving_to_another_dtype_while_an_old_graph_lives(method: Method):
    layer = adapted(method)
    loss = layer(randn(5, IN)).sum()  # say, kept in a notebook's variable
    layer.double()
    found = run(layer, x := randn(5, IN, dtype=torch.float64))
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float64}
    del loss
    assert_same(found, run(copy.deepcopy(layer), x))


@every_method
def test_moving_to_the_meta_device(method: Method):
    layer = adapted(method).to("meta")
    assert {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())} == {"meta"}
    assert layer(torch.empty(5, IN, device="meta")).shape == (5, OUT)


# Compilers, autocast, checkpointing, replicas, modules used twice, hooks


def check_compiled(block: nn.Sequential, x: Tensor, compiled: Callable[[Tensor], Tensor]) -> None:
    """Against eager, whose own errors say what may differ."""
    errors = Errors()
    for seed in range(4):
        fill(block, seed)
        eager, exact, found = (
            run(block, x),
            run(widened(block), x.double(), plain_block),
            run(block, x, lambda _, x: compiled(x)),
        )
        assert found.tensors().keys() == eager.tensors().keys()
        for name, tensor in found.tensors().items():
            assert tensor.dtype == eager.tensors()[name].dtype
            errors.add(name, tensor, exact.tensors()[name], (eager.tensors()[name], exact.tensors()[name]))
        with torch.no_grad():
            errors.add("y without gradients", compiled(x), exact.y, (eager.y, exact.y))
    errors.check()


@every_method
def test_compiled_as_one_graph(method: Method):
    torch._dynamo.reset()
    for operator in fastpeft.backend.OPERATORS.values():
        operator._chosen.clear()  # as if nothing had run before
    block, x = make_block(method).eval(), randn(2, 5, IN)  # in evaluation some things are remembered between calls
    check_compiled(block, x, torch.compile(block, fullgraph=True, backend="aot_eager"))


def test_compiled_by_the_default_compiler():
    torch._dynamo.reset()
    block, x = make_block(LORA), randn(2, 5, IN)
    check_compiled(block, x, torch.compile(block, fullgraph=True))


def autocast_bf16(forward: Forward) -> Forward:
    def in_autocast(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(layer, x)

    return in_autocast


@every_method
@pytest.mark.parametrize("training", [True, False])
def test_autocast(method: Method, training: bool):
    layer, x = adapted(method).train(training), randn(19, IN)
    found = run(layer, x, autocast_bf16(call))
    assert found.y.dtype == torch.bfloat16
    assert found.dx.dtype == torch.float32
    assert {gradient.dtype for gradient in found.gradients.values()} == {torch.float32}
    check(layer, x, autocast_bf16(call), composition=autocast_bf16(plain_linear))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), found.y)


@every_method
@pytest.mark.parametrize("base", BASES)
def test_autocast_gives_the_dtype_that_the_base_gives(method: Method, base: str):
    layer, x = BASES[base](), randn(5, IN)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x).dtype
        adapted(method, layer)
        assert layer(x).dtype == expected
        adapted(LORA if method is BOFT else BOFT, layer, "second")
        fastpeft.set_adapter(layer, ["default", "second"])
        assert layer(x).dtype == expected


@every_method
def test_autocast_leaves_float64_alone(method: Method):
    layer, x = adapted(method).double(), randn(5, IN, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x))
        assert layer(x).dtype == torch.float64


@every_method
def test_autocast_over_a_bfloat16_base(method: Method):
    """A float32 activation meets a bfloat16 weight: without autocast an error, with it the usual thing."""
    layer = adapted(method, make_linear(dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(randn(5, IN)).dtype == torch.bfloat16


@every_method
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(method: Method, reentrant: bool):
    def checkpointed(block: nn.Sequential, x: Tensor) -> Tensor:
        x = checkpoint(block[:2], x, use_reentrant=reentrant)
        x = block[2](x)  # not checkpointed, and sharing pools with one that is
        return checkpoint(block[3:], x, use_reentrant=reentrant)

    check_block(make_block(method), randn(7, IN), checkpointed)


@pytest.mark.parametrize("method", WITH_DROPOUT, ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_drops_the_same_again(method: Method, reentrant: bool):
    layer, x = adapted(method, **{method.dropout: 0.5}).train(), randn(7, IN)
    torch.manual_seed(3)
    expected = run(layer, x)
    torch.manual_seed(3)
    assert_same(run(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant)), expected)


def replicate(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes them: plain tensors, differentiable in the parameters, in the same places."""
    replicas = {original: original._replicate_for_data_parallel() for original in module.modules()}
    copies = {id(parameter): parameter.clone() for parameter in module.parameters()}
    for original, replica in replicas.items():
        for key, child in original._modules.items():
            replica._modules[key] = None if child is None else replicas[child]
        for key, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, copies[id(parameter)])
        for key, buffer in original._buffers.items():
            replica._buffers[key] = None if buffer is None else buffer.clone()
    return replicas[module]


@every_method
def test_replicas_in_threads(method: Method):
    def in_replicas(block: nn.Sequential, x: Tensor) -> Tensor:
        parts = list(x.chunk(2))
        outputs: dict[int, Tensor] = {}

        def work(i: int, replica: nn.Module) -> None:
            outputs[i] = replica(parts[i])

        threads = [threading.Thread(target=work, args=(i, replicate(block))) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([outputs[0], outputs[1]])

    check_block(make_block(method), randn(8, IN), in_replicas)


@every_method
def test_parameters_given_by_functional_call(method: Method):
    def with_values(block: nn.Sequential, x: Tensor) -> Tensor:
        values = {name: parameter * 1 for name, parameter in block.named_parameters()}
        return torch.func.functional_call(block, values, (x,))

    check_block(make_block(method), randn(8, IN), with_values)


@every_method
def test_a_layer_used_twice(method: Method):
    layer = adapted(method, make_linear(IN, IN))

    def twice(forward: Forward) -> Forward:
        return lambda layer, x: forward(layer, torch.tanh(forward(layer, x)))

    check(layer, randn(7, IN), twice(call), twice(plain_linear))


@every_method
def test_one_module_in_two_places(method: Method):
    shared = make_linear(IN, IN)
    model = fastpeft.adapt(nn.Sequential(shared, nn.GELU(), shared), method.config())
    assert model[0] is model[2]
    assert list(model[0].adapters) == ["default"]
    check_block(fill(model), randn(7, IN))


@every_method
def test_two_layers_with_one_weight(method: Method):
    model = nn.Sequential(make_linear(IN, IN), nn.GELU(), make_linear(IN, IN, seed=1))
    model[2].weight = model[0].weight
    fastpeft.adapt(model, method.config(target_modules=["0"]))
    assert model[2].weight is model[0].weight
    assert type(model[2]) is nn.Linear
    fastpeft.adapt(model, method.config(target_modules=["2"]), "other")
    for layer in (model[0], model[2]):  # both adapters at work, each on its layer
        layer.active = tuple(layer.adapters)
    check_block(fill(model), randn(7, IN))


@every_method
def test_hooks_fire(method: Method):
    layer, fired = make_linear(), Counter()
    layer.register_forward_pre_hook(lambda module, args: fired.update(["before adapt"]))
    adapted(method, layer)
    expected = run(layer, randn(5, IN))
    fired.clear()

    def double_output(module, args, output):
        fired.update(["forward"])
        return output * 2

    layer.register_forward_pre_hook(lambda module, args: fired.update(["pre"]))
    layer.register_forward_hook(double_output)
    layer.register_full_backward_pre_hook(lambda module, grad: fired.update(["backward pre"]))
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: fired.update(["backward"]))
    found = run(layer, randn(5, IN))
    assert fired == {"before adapt": 1, "pre": 1, "forward": 1, "backward pre": 1, "backward": 1}
    assert torch.equal(found.y, 2 * expected.y)
    assert found.gradients.keys() == expected.gradients.keys()


@every_method
def test_what_follows_may_work_in_place(method: Method):
    layer, x = adapted(method), randn(5, IN)
    expected = run(layer, x, lambda layer, x: layer(x).relu())
    assert_same(run(layer, x, lambda layer, x: layer(x).relu_()), expected)


@every_method
def test_x_may_be_given_by_its_name(method: Method):
    layer, x = adapted(method), randn(5, IN)
    assert torch.equal(layer(input=x), layer(x))  # nn.Linear's own name for it


@every_method
def test_optimizer_steps_are_seen(method: Method):
    """In evaluation some numbers are remembered between calls."""
    layer, x = adapted(method), randn(5, IN)
    optimizer = torch.optim.SGD(layer.adapters.parameters(), lr=0.1)
    for change in (
        optimizer.step,
        lambda: fill(layer, seed=5),
        lambda: [p.data.mul_(1.5) for p in layer.adapters.parameters()],
        lambda: layer.load_state_dict(fill(copy.deepcopy(layer), seed=6).state_dict()),
    ):
        with torch.no_grad():
            before = layer.eval()(x)
        layer.train()(x).sum().backward()
        change()
        with torch.no_grad():
            after = layer.eval()(x)
        assert not torch.equal(after, before)
        assert torch.equal(after, run(layer, x).y)


# Layers that PyTorch reads without calling them


def make_encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(IN, 2, OUT, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def by_adapt(method: Method, encoder: nn.TransformerEncoder) -> None:
    fastpeft.adapt(encoder, method.config())


def by_adapt_beside_a_hook(method: Method, encoder: nn.TransformerEncoder) -> None:
    linears = [module for layer in encoder.layers for module in (layer.linear1, layer.linear2)]
    handles = [linear.register_forward_pre_hook(lambda module, args: None) for linear in linears]
    fastpeft.adapt(encoder, method.config())
    for handle in handles:
        handle.remove()


def by_from_linear(method: Method, encoder: nn.TransformerEncoder) -> None:
    for layer in encoder.layers:
        for name in ("linear1", "linear2"):
            setattr(layer, name, method.layer_class.from_linear(getattr(layer, name), method.config()))


def by_adapting_the_layers_alone(method: Method, encoder: nn.TransformerEncoder) -> None:
    for layer in encoder.layers:
        for linear in (layer.linear1, layer.linear2):
            fastpeft.adapt(linear, method.config())


WAYS_TO_ADAPT = [by_adapt, by_adapt_beside_a_hook, by_from_linear, by_adapting_the_layers_alone]


@every_method
@pytest.mark.parametrize(
    "adapt, padded",
    [
        *((way, False) for way in WAYS_TO_ADAPT),
        (by_adapt, True),  # with padding, the encoder around the layers turns everything into nested tensors
    ],
)
def test_transformer_encoder_layers_use_their_adapters(method: Method, adapt: Callable, padded: bool):
    """In evaluation PyTorch hands the weights of a whole encoder layer to one fused kernel."""
    encoder, x = make_encoder(), randn(2, 5, IN)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padded else None
    base = encoder(x, src_key_padding_mask=mask).detach()
    adapt(method, encoder)
    fill(encoder)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        expected = encoder(x, src_key_padding_mask=mask).detach()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    real = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    assert (expected - base)[real].abs().max() > 0.1
    for grad in (False, True):  # with a frozen base PyTorch takes the fast path with gradients as well
        with torch.set_grad_enabled(grad):
            found = encoder(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found[real], expected[real])


@every_method
def test_attention_output_is_refused_by_name_and_left_out_otherwise(method: Method):
    encoder = make_encoder()
    before = snapshot(encoder)
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\.out_proj'.*MultiheadAttention"):
        fastpeft.adapt(encoder, method.config(target_modules=["out_proj", "linear1"]))
    assert_unchanged(encoder, before)
    fastpeft.adapt(encoder, method.config())
    held = [path for path, module in encoder.named_modules() if isinstance(module, fastpeft.nn.Adapted)]
    assert held == [f"layers.{i}.{name}" for i in range(2) for name in ("linear1", "linear2")]
