"""An adapted layer: what it keeps of its base, which inputs it takes, and over which bases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import (
    BOFT,
    COPIES,
    DTYPES,
    FOURIERFT,
    IN,
    LORA,
    METHODS,
    MOS,
    OFT,
    OUT,
    WITH_DROPOUT,
    Method,
    adapted,
    assert_same,
    check,
    every_method,
    fill,
    make_linear,
    plain_forward,
    randn,
    run,
)
from small_models import BASES, OTHER_BASES, make_scaled
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft

# The layer stays the layer it was


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


# A fresh adapter changes nothing


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


# Shapes, strides, dtypes


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
    (OFT, 13, 7, {"oft_block_size": 13}),  # one dense block
    (OFT, 13, 7, {"oft_block_size": 1}),  # nothing to rotate
    (OFT, 15, 9, {"oft_block_size": 5, "use_cayley_neumann": False}),  # odd blocks
    (OFT, 24, 7, {"oft_block_size": 0, "r": 4}),
    (OFT, 24, 7, {"block_share": True}),
    (OFT, 24, 7, {"block_share": True, "use_cayley_neumann": False}),
    (OFT, 64, 7, {"oft_block_size": 32}),  # the default
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
