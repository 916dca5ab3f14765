"""What an adapted layer promises, for every method: the points of "What an adapted layer promises" in their order."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import threading
from collections import Counter
from collections.abc import Callable

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
    Forward,
    Method,
    QuantisedLinear,
    Scaled,
    adapted,
    assert_same,
    assert_unchanged,
    call,
    check,
    fill,
    make_linear,
    plain_delta,
    plain_forward,
    plain_linear,
    randn,
    run,
    snapshot,
    widened,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import functional

every_method = pytest.mark.parametrize("method", METHODS, ids=str)
WITH_DROPOUT = [method for method in METHODS if method.dropout]


class Allocations(TorchDispatchMode):
    """Notes the shape of everything that an operator returns and that is not a view of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made.append((str(func), tuple(tensor.shape)))
        return result

    def count(self, shape: torch.Size) -> int:
        return sum(made == tuple(shape) for _, made in self.made)


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


# 1. The layer stays the layer it was


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_keeps_its_identity(method: Method, bias: bool):
    model = nn.Sequential(nn.Linear(IN, OUT, bias=bias), nn.Tanh())
    layer, weight, bias_parameter = model[0], model[0].weight, model[0].bias
    base_state = {key: value.clone() for key, value in model.state_dict().items()}

    assert fastpeft.adapt(model, method.config(), "mine") is model
    assert model[0] is layer
    assert isinstance(layer, nn.Linear)
    assert layer.weight is weight
    assert layer.bias is bias_parameter
    assert (layer.in_features, layer.out_features) == (IN, OUT)
    state = model.state_dict()
    added = state.keys() - base_state.keys()
    assert all(torch.equal(state[key], value) for key, value in base_state.items())
    assert added
    assert all(key.startswith("0.adapters.mine.") for key in added)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"0.adapters.mine.{name}" for name in method.parameters}
    assert "mine" in repr(model)


@every_method
@pytest.mark.parametrize("base", OTHER_BASES)
def test_other_layers_keep_their_identity(method: Method, base: str):
    layer = BASES[base]()
    kind, keys = type(layer), list(layer.state_dict())
    weight = layer.weight
    fastpeft.adapt(layer, method.config())
    assert isinstance(layer, kind)
    assert layer.weight is weight
    assert [key for key in layer.state_dict() if not key.startswith("adapters.default.")] == keys


@pytest.mark.parametrize("base", BASES)
def test_one_class_for_each_base(base: str):
    first, second = (adapted(LORA, BASES[base]()) for _ in range(2))
    assert type(first) is type(second)


# 2. A fresh adapter changes nothing


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_fresh_adapter_computes_exactly_what_the_base_computes(method: Method, dtype: torch.dtype, bias: bool):
    for tokens in (1, 5, 64):  # a vector, a few rows, and enough of them for another matrix kernel
        layer, x = make_linear(bias=bias, dtype=dtype), randn(tokens, IN, dtype=dtype)
        expected = layer(x)
        fastpeft.adapt(layer, method.config())
        assert torch.equal(layer(x), expected)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)


@every_method
@pytest.mark.parametrize("base", OTHER_BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_adapter_changes_nothing_in_other_layers(method: Method, base: str, dtype: torch.dtype):
    layer, x = BASES[base]().to(dtype), randn(2000, IN, dtype=dtype)
    expected = layer(x)
    assert torch.equal(fastpeft.adapt(layer, method.config())(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [1.0, 300.0])  # 300: taking a large bias away and adding it again loses digits
def test_fresh_adapters_change_nothing_together(dtype: torch.dtype, bias: float):
    layer, x = make_linear(dtype=dtype), randn(33, IN, dtype=dtype)
    nn.init.constant_(layer.bias, bias)
    expected = layer(x)
    for method in METHODS:
        fastpeft.adapt(layer, method.config(), method.name)
    fastpeft.set_adapter(layer, [method.name for method in METHODS])
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("method", WITH_DROPOUT, ids=str)
def test_a_fresh_adapter_changes_nothing_while_it_drops(method: Method):
    layer, x = make_linear(), randn(9, IN)
    expected = layer(x)
    fastpeft.adapt(layer, method.config(**{method.dropout: 0.5})).train()
    assert torch.equal(layer(x), expected)


# 3. Gradients


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


# More tokens than this and a fused node pays for its overhead: small and large inputs may go different ways.
MANY = 6000


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


# 4. Shapes, strides, dtypes


@every_method
@pytest.mark.parametrize(
    "shape",
    [
        (),  # one token and no batch
        (1,),
        (0,),  # zero rows
        (13,),
        (2, 0, 3),  # zero rows between others
        (2, 3, 5),
        (1, 1, 1, 2),
    ],
    ids=str,
)
def test_leading_shapes(method: Method, shape: tuple[int, ...]):
    layer, x = adapted(method), randn(*shape, IN)
    assert layer(x).shape == (*shape, OUT)
    check(layer, x)
    expected = run(layer, x).y
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


AWKWARD = {
    "transposed": lambda: randn(IN, 7).T,
    "every second feature": lambda: randn(7, 2 * IN)[:, ::2],
    "inside a larger tensor": lambda: randn(9, IN + 5)[2:, 5:],  # rows start at odd addresses
    "swapped batch and time": lambda: randn(3, 2, IN).transpose(0, 1),
    "every second row": lambda: randn(14, IN)[::2],
    "broadcast rows": lambda: randn(1, 1, IN).expand(3, 5, IN),
    "broadcast features": lambda: randn(7, 1).expand(7, IN),
    "backwards": lambda: randn(7, IN).flip(0).T.contiguous().T,
}


@every_method
@pytest.mark.parametrize("awkward", AWKWARD)
def test_strides(method: Method, awkward: str):
    check(adapted(method), AWKWARD[awkward]())


@every_method
@pytest.mark.parametrize(
    "gradient",
    [
        pytest.param(lambda: randn(OUT).expand(7, OUT), id="broadcast rows"),  # what y.sum(0) sends on
        pytest.param(lambda: randn(7, 1).expand(7, OUT), id="broadcast features"),
        pytest.param(lambda: randn(OUT, 7).T, id="transposed"),
        pytest.param(lambda: randn(7, 2 * OUT)[:, 1::2], id="every second"),
    ],
)
def test_strides_of_the_gradient(method: Method, gradient: Callable[[], Tensor]):
    check(adapted(method), randn(7, IN), gradient=gradient())


@every_method
def test_the_gradient_of_a_sum_has_no_strides_at_all(method: Method):
    layer, x = adapted(method).double(), randn(7, IN, dtype=torch.float64)
    found = run(layer, x, gradient=torch.ones(()).expand(7, OUT)).tensors()
    for name, tensor in run(layer, x, gradient=torch.ones(7, OUT)).tensors().items():
        torch.testing.assert_close(found[name], tensor)


SIZES = [
    (LORA, 13, 7, {"r": 5}),  # primes
    (LORA, 3, 2, {"r": 8}),  # a rank above both sizes
    (LORA, 1, 1, {"r": 1}),
    (MOS, 13, 7, {"shards_per_vector": 1}),
    (MOS, 21, 35, {"shards_per_vector": 7}),  # odd shards
    (MOS, 24, 16, {"private_rank": 0}),  # all shards public
    (MOS, 24, 16, {"private_rank": 3}),  # all shards private
    (BOFT, 13, 7, {"boft_block_size": 13, "boft_n_butterfly_factor": 1}),  # one dense block
    (BOFT, 13, 7, {"boft_block_size": 1, "boft_n_butterfly_factor": 1}),  # nothing to rotate
    (BOFT, 15, 9, {"boft_block_size": 5, "boft_n_butterfly_factor": 1}),  # an odd block
    (BOFT, 18, 7, {"boft_block_size": 6, "boft_n_butterfly_factor": 1}),  # three blocks: no power of two
    (BOFT, 32, 7, {"boft_block_size": 2, "boft_n_butterfly_factor": 5}),  # the deepest butterfly
    (BOFT, 48, 7, {"boft_block_size": 0, "boft_block_num": 12, "boft_n_butterfly_factor": 3}),
    (FOURIERFT, 13, 7, {}),
    (FOURIERFT, 7, 13, {"n_frequency": 91}),  # every entry of an odd spectrum
    (FOURIERFT, 6, 4, {"n_frequency": 24}),  # every entry of an even one: all the mirror images
    (FOURIERFT, 1, 5, {"n_frequency": 5}),
    (FOURIERFT, 5, 1, {"n_frequency": 3}),
]


@pytest.mark.parametrize("method, d_in, d_out, changes", SIZES, ids=str)
def test_sizes(method: Method, d_in: int, d_out: int, changes: dict):
    check(adapted(method, make_linear(d_in, d_out), **changes), randn(11, d_in))


@every_method
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_in_one_dtype(method: Method, dtype: torch.dtype):
    layer = adapted(method).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer(randn(19, IN, dtype=dtype)).dtype == dtype
    check(layer, randn(19, IN, dtype=dtype))


@every_method
@pytest.mark.parametrize(
    "dtype, of_adapter",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),  # float32 would lose the base's digits
    ],
    ids=str,
)
def test_adapters_over_a_base_of_another_dtype(method: Method, dtype: torch.dtype, of_adapter: torch.dtype):
    layer = adapted(method, make_linear(dtype=dtype))
    assert {p.dtype for p in layer.adapters.parameters()} == {of_adapter}
    found = run(layer, randn(19, IN, dtype=dtype))
    assert found.y.dtype == found.dx.dtype == dtype
    assert {gradient.dtype for gradient in found.gradients.values()} == {of_adapter}
    check(layer, randn(19, IN, dtype=dtype))


# 5. Copies, files, compilers, autocast, checkpointing, replicas, tied layers


def through_a_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_a_file,
}


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
            errors.add(name, tensor, eager.tensors()[name], exact.tensors()[name], exact.tensors()[name])
        with torch.no_grad():
            errors.add("y without gradients", compiled(x), eager.y, exact.y, exact.y)
    errors.check()


@every_method
def test_compiled_as_one_graph(method: Method):
    torch._dynamo.reset()
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
@pytest.mark.parametrize("tokens", [7, MANY])
def test_gradient_checkpointing(method: Method, reentrant: bool, tokens: int):
    def checkpointed(block: nn.Sequential, x: Tensor) -> Tensor:
        x = checkpoint(block[:2], x, use_reentrant=reentrant)
        x = block[2](x)  # not checkpointed, and sharing pools with one that is
        return checkpoint(block[3:], x, use_reentrant=reentrant)

    check_block(make_block(method), randn(tokens, IN), checkpointed)


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


# Dropout


@pytest.mark.parametrize("method", WITH_DROPOUT, ids=str)
def test_dropout_is_for_training(method: Method):
    layer, plain, x = adapted(method, **{method.dropout: 0.5}), adapted(method), randn(33, IN)
    assert_same(run(layer.eval(), x), run(plain, x))
    assert not torch.equal(layer.train()(x), layer(x))


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


# Bases that are not a plain nn.Linear


@every_method
@pytest.mark.parametrize("base", OTHER_BASES)
def test_other_layers_are_called_as_they_are(method: Method, base: str):
    make, matrix = OTHER_BASES[base]
    layer, x = adapted(method, make()), randn(2, 5, IN)

    def formula(layer: nn.Module, x: Tensor) -> Tensor:
        return plain_forward(layer.adapters.values(), x, lambda z: F.linear(z, matrix(layer)), layer.bias)

    check(layer, x, formula=formula)


@every_method
def test_further_arguments_reach_the_base(method: Method):
    layer, x = adapted(method, make_scaled()), randn(5, IN)
    tripled = layer(x, gain=3.0)
    fastpeft.set_adapter(layer, None)
    assert torch.equal(layer(x, gain=3.0), 3.0 * F.linear(x, layer.weight))
    assert not torch.equal(tripled, layer(x, gain=3.0))


@every_method
def test_a_forward_that_was_put_on_the_module(method: Method):
    """As libraries do that move weights around a call: forward is an attribute of the module itself."""
    layer, x, called = make_linear(), randn(5, IN), []
    original = layer.forward

    def forward(*args, **kwargs):
        called.append(True)
        return original(*args, **kwargs)

    layer.forward = forward
    try:
        adapted(method, layer)
    except ValueError:
        return  # saying that it cannot be adapted is right as well
    expected = adapted(method)(x)
    assert torch.equal(layer(x), expected)
    assert called


# Layers of their own


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_from_linear(method: Method, bias: bool):
    linear, x = make_linear(bias=bias).eval(), randn(5, IN)
    fired = []
    linear.register_forward_hook(lambda *args: fired.append(True))
    expected = linear(x)
    layer = method.layer_class.from_linear(linear, method.config(), "mine")
    assert type(layer) is method.layer_class
    assert isinstance(layer, nn.Linear)
    assert not layer.training
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert list(layer.adapters) == ["mine"]
    assert torch.equal(layer(x), expected)
    assert len(fired) == 2  # the hooks came along
    check(fill(layer), x)
    assert type(linear) is nn.Linear
    assert list(linear.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert torch.equal(linear(x), expected)


@every_method
def test_from_linear_does_not_lose_a_subclass(method: Method):
    """A new layer of another class would compute something else than the one it came from."""
    layer, x = make_scaled(), randn(5, IN)
    try:
        made = method.layer_class.from_linear(layer, method.config())
    except TypeError as error:
        assert "Scaled" in str(error)
    else:
        assert torch.equal(made(x), layer(x))


@every_method
def test_constructor(method: Method):
    layer = method.layer_class(IN, OUT, bias=False, dtype=torch.float64, config=method.config(target_modules=None))
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        f"adapters.default.{name}" for name in method.parameters
    }
    check(fill(layer), randn(5, IN, dtype=torch.float64))
    on_meta = method.layer_class(IN, OUT, device="meta", config=method.config(), adapter_name="mine")
    assert list(on_meta.adapters) == ["mine"]
    assert {tensor.device.type for tensor in (*on_meta.parameters(), *on_meta.buffers())} == {"meta"}


@every_method
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_layers_of_their_own(method: Method, how: str):
    layer, x = fill(method.layer_class.from_linear(make_linear(), method.config())), randn(5, IN)
    other = COPIES[how](layer)
    assert type(other) is method.layer_class
    assert_same(run(other, x), run(layer, x))


@every_method
def test_more_adapters_on_a_layer_of_its_own(method: Method):
    model = nn.Sequential(fill(method.layer_class.from_linear(make_linear(), method.config())))
    fastpeft.adapt(model, LORA.config(), "second")
    fill(model)
    fastpeft.set_adapter(model, ["default", "second"])
    assert type(model[0]) is method.layer_class
    check(model[0], randn(5, IN))


# 6. Wrong input


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


@pytest.mark.parametrize("value", [8, -1])  # one past the pool's end, and one that would silently wrap around
def test_shard_numbers_from_a_state_dict_are_checked(value: int):
    layer, x = adapted(MOS), randn(5, IN)
    state = layer.state_dict()
    state["adapters.default.index_A"] = state["adapters.default.index_A"].clone().fill_(value)
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        layer.load_state_dict(state)
        run(layer, x)


# MoS: the layers of a kind add up one gradient of their pool

N_LAYERS = 3
how_many = {"tokens": 7}


@pytest.fixture(params=[7, MANY], ids=["few tokens", "many tokens"])
def tokens(request, monkeypatch) -> int:
    monkeypatch.setitem(how_many, "tokens", request.param)
    return request.param


few_and_many = pytest.mark.usefixtures("tokens")


def tokens_in(seed: int = 1) -> Tensor:
    return randn(how_many["tokens"], IN, seed=seed) / how_many["tokens"] ** 0.5


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
        errors.add(name, gradient, composed, exact, exact)
    errors.check()


def test_pools_are_shared():
    model = make_sharing()
    assert len(pools(model)) == 2
    adapters = [layer.adapters["default"] for layer in model]
    assert all(adapter.pool_A is adapters[0].pool_A and adapter.pool_B is adapters[0].pool_B for adapter in adapters)
    used = {int(i) for adapter in adapters for i in adapter.index_A.flatten()}
    reads = sum(adapter.index_A.numel() for adapter in adapters)
    assert len(used) < reads  # some shards really have several readers


@few_and_many
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


@few_and_many
def test_no_pool_sized_array_where_only_x_is_asked_for():
    model, x = make_sharing(), tokens_in().requires_grad_()
    model.requires_grad_(False)
    loss = model(x).square().sum()
    with Allocations() as allocations:
        loss.backward()
    assert allocations.count(pools_shape := model[0].adapters["default"].pool_A.shape) == 0, pools_shape


@few_and_many
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool_gradients(dtype: torch.dtype):
    model = make_sharing().to(dtype)
    check_block(model, tokens_in().to(dtype))


@few_and_many
def test_two_forwards_before_one_backward():
    model = make_sharing()
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    assert_gradients(model, 1, 2)


@few_and_many
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_backwards_of_two_graphs(order: tuple[int, int]):
    model = make_sharing()
    losses = [loss_of(model, 1), loss_of(model, 2)]
    losses[order[0]].backward()
    assert_gradients(model, order[0] + 1)
    model.zero_grad()
    losses[order[1]].backward()
    assert_gradients(model, order[1] + 1)


@few_and_many
def test_gradients_accumulate_over_steps():
    model = make_sharing()
    for seed in (1, 2, 3):
        loss_of(model, seed).backward()
    assert_gradients(model, 1, 2, 3)


@few_and_many
def test_one_graph_backward_twice():
    model = make_sharing()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    once = pool_gradients(model)
    loss.backward()
    assert all(torch.equal(two, 2 * one) for two, one in zip(pool_gradients(model), once, strict=True))
    assert_gradients(model, 1, found=once)


@few_and_many
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


@few_and_many
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


@few_and_many
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


@few_and_many
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


@few_and_many
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


@few_and_many
@pytest.mark.parametrize("how", COPIES)
def test_pools_stay_shared_in_copies(how: str):
    model = make_sharing()
    other = COPIES[how](model)
    assert len(pools(other)) == 2
    assert not {id(pool) for pool in pools(other)} & {id(pool) for pool in pools(model)}
    loss_of(other).backward()
    assert_gradients(other, 1)
    assert all(pool.grad is None for pool in pools(model))


@few_and_many
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


@few_and_many
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


@few_and_many
def test_a_hook_may_change_the_gradient_of_a_pool():
    model = make_sharing()
    for pool in pools(model):
        pool.register_hook(lambda gradient: gradient * 3)
    loss_of(model).backward()
    assert_gradients(model, 1, weights=(3.0,))


@few_and_many
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
