"""Merging and unmerging: the same numbers, everything given back, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    BOFT,
    DTYPES,
    IN,
    LORA,
    METHODS,
    OUT,
    Errors,
    Method,
    assert_unchanged,
    every_method,
    fill,
    plain_forward,
    randn,
    run,
    snapshot,
    widened,
)
from small_models import ALL_LINEAR, Model, QuantisedLinear, adapted_model, plain_model
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft
from fastpeft.nn import Adapted


def merged_in_plain(layer: nn.Module, x: Tensor) -> Tensor:
    """The composition that merging is measured by: the adapted weight, rounded once to the base's dtype."""
    if not isinstance(layer, Adapted):
        return layer(x)
    adapters = [layer.adapters[name] for name in layer.active]
    wide = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32))
    identity = torch.eye(layer.in_features, dtype=wide.dtype)
    weight = plain_forward(adapters, identity, lambda z: z @ wide.T).T
    return F.linear(x, weight.to(layer.weight.dtype), layer.bias)


MERGED_TOGETHER = [
    ["lora"],
    ["mos"],
    ["boft"],
    ["fourierft"],
    ["oft"],
    ["lora", "fourierft"],
    ["boft", "lora", "mos"],
    ["oft", "boft", "mos"],
]


@pytest.mark.parametrize("names", MERGED_TOGETHER, ids="+".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_computes_the_same(names: list[str], dtype: torch.dtype):
    model = Model().to(dtype)
    for method in METHODS:
        fastpeft.adapt(model, method.config(), method.name)
    fastpeft.set_adapter(model, names)
    errors, x = Errors(), randn(20, IN, dtype=dtype)
    with torch.no_grad():
        for seed in range(4):
            exact = plain_model(widened(fill(model, seed)), x.double())
            narrow = copy.deepcopy(model).float() if dtype == torch.float64 else model
            narrow_x = x.to(next(narrow.parameters()).dtype)
            composed, composed_exact = (
                narrow(narrow_x, merged_in_plain),
                plain_model(widened(narrow), narrow_x.double()),
            )
            fastpeft.merge(model)
            errors.add("y", model(x), exact, (composed, composed_exact))
            fastpeft.unmerge(model)
    errors.check()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unmerge_gives_everything_back(method: Method, dtype: torch.dtype):
    model = adapted_model(method, model=Model().to(dtype))
    before, x = snapshot(model), randn(5, IN, dtype=dtype)
    expected = run(model, x)
    for _ in range(2):
        fastpeft.merge(model)
        for path in ALL_LINEAR:
            layer = model.get_submodule(path)
            assert layer.merged == ("default",)
            assert not torch.equal(layer.weight, before["state"][f"{path}.weight"])
            z = randn(3, layer.in_features, dtype=dtype)
            assert torch.equal(layer(z), F.linear(z, layer.weight, layer.bias))
        assert {name: id(p) for name, p in model.named_parameters()} == {
            name: identity for name, (identity, _) in before["parameters"].items()
        }
        fastpeft.unmerge(model)
        assert_unchanged(model, before)
    found = run(model, x)
    assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in found.tensors().items())


@every_method
def test_a_merged_state_dict_needs_no_adapter(method: Method):
    model = adapted_model(method)
    fastpeft.merge(model)
    plain_state = {key: value for key, value in model.state_dict().items() if ".adapters." not in key}
    other = Model(seed=5)
    other.load_state_dict(plain_state, strict=True)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_merging_for_good(method: Method):
    model, reference = adapted_model(method), adapted_model(method)
    fastpeft.merge(model, keep_base=False)
    fastpeft.merge(reference)
    assert torch.equal(model(randn(5, IN)), reference(randn(5, IN)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.q'.*keep_base=False"):
        fastpeft.unmerge(model)
    assert_unchanged(model, before)


def test_merged_models_refuse_what_would_mix_them_up(tmp_path: Path):
    model = adapted_model(LORA, "a")
    fastpeft.save_adapter(model, tmp_path)
    fastpeft.merge(model)
    before = snapshot(model)
    for refused in (
        lambda: fastpeft.merge(model),
        lambda: fastpeft.adapt(model, BOFT.config(), "b"),
        lambda: fastpeft.set_adapter(model, None),
        lambda: fastpeft.load_adapter(model, tmp_path, "b"),
        lambda: fastpeft.load_adapter(model, tmp_path, "a"),
    ):
        with pytest.raises(ValueError, match=r"'blocks\.0\.attention\.q' has a merged: unmerge first"):
            refused()
        assert_unchanged(model, before)


@every_method
def test_a_merged_adapter_can_be_saved(method: Method, tmp_path: Path):
    model = adapted_model(method)
    expected = model(randn(5, IN))
    fastpeft.merge(model)
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(randn(5, IN)), expected)


def test_nothing_to_merge():
    model = Model()
    fastpeft.unmerge(model)
    with pytest.raises(ValueError, match="no active adapter"):
        fastpeft.merge(model)
    fastpeft.adapt(model, LORA.config())
    fastpeft.set_adapter(model, None)
    with pytest.raises(ValueError, match="no active adapter"):
        fastpeft.merge(model)
    fastpeft.unmerge(model)


def share_parameter(model: Model) -> tuple[str, str]:
    model.head.weight = model.embed.weight
    return "'head'", "'embed'"


def share_parameter_of_a_layer(model: Model) -> tuple[str, str]:
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return "'blocks.0.up'", "'blocks.1.up'"


def share_memory(model: Model) -> tuple[str, str]:
    """Two Parameters over the same numbers, as a transposed tie is written."""
    model.blocks[1].down.weight = nn.Parameter(model.blocks[0].up.weight.T)
    return "'blocks.0.up'", "'blocks.1.down'"


@pytest.mark.parametrize("share", [share_parameter, share_parameter_of_a_layer, share_memory])
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging_into_a_shared_weight_is_refused(share: Callable, keep_base: bool):
    model = Model()
    names = share(model)
    adapted_model(LORA, model=model, target_modules=["q", "up", "head"])
    before = snapshot(model)
    with pytest.raises(ValueError) as caught:
        fastpeft.merge(model, keep_base=keep_base)
    assert all(word in str(caught.value) for word in ("share", *names)), caught.value
    assert_unchanged(model, before)


def test_merging_a_module_that_is_used_twice():
    model = Model(n_blocks=1)
    model.blocks.append(model.blocks[0])
    adapted_model(BOFT, model=model)
    expected = model(randn(5, IN))
    fastpeft.merge(model)
    torch.testing.assert_close(model(randn(5, IN)), expected)
    fastpeft.unmerge(model)
    assert torch.equal(model(randn(5, IN)), expected)


@every_method
@pytest.mark.parametrize("keep_base", [True, False])
def test_merging_into_a_quantised_layer_is_refused(method: Method, keep_base: bool):
    model = Model()
    model.blocks[1].down = QuantisedLinear(OUT, IN)
    adapted_model(method, model=model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.1\.down'.*QuantisedLinear"):
        fastpeft.merge(model, keep_base=keep_base)
    assert_unchanged(model, before)


@every_method
@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_what_is_not_finite_is_refused(method: Method, keep_base: bool, value: float):
    for name in method.parameters:
        model = adapted_model(method)
        parameter = getattr(model.blocks[1].down.adapters["default"], name)
        with torch.no_grad():
            parameter.view(-1)[-1] = value
            if name in ("pool_A", "pool_B"):  # every shard, since not every one is read
                parameter.fill_(value)
            if name == "boft_R":  # an entry off the diagonal, which is the only part that counts
                parameter[0, 0, 0, 1] = value
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"'blocks\.[01]\.down'.*default.*not finite"):
            fastpeft.merge(model, keep_base=keep_base)
        assert_unchanged(model, before)


def test_merging_what_the_base_cannot_hold_is_refused():
    """Finite in float32, infinite once rounded to the base's float16."""
    model = adapted_model(LORA, model=Model().half())
    with torch.no_grad():
        model.blocks[1].down.adapters["default"].lora_B.fill_(1e30)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'blocks\.1\.down'.*not finite"):
        fastpeft.merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@every_method
def test_a_merge_that_breaks_off_is_taken_back(method: Method, error: type[BaseException], monkeypatch):
    model = adapted_model(method)
    before = snapshot(model)
    adapter = model.blocks[1].down.adapters["default"]

    def fail(*args):
        raise error

    monkeypatch.setattr(type(adapter), "rotate_weight" if adapter.rotates else "add_to_weight", fail_for(adapter, fail))
    with pytest.raises(error):
        fastpeft.merge(model)
    monkeypatch.undo()
    assert_unchanged(model, before)


def fail_for(adapter: nn.Module, fail: Callable) -> Callable:
    original = type(adapter).rotate_weight if adapter.rotates else type(adapter).add_to_weight

    def method(self, *args):
        return fail() if self is adapter else original(self, *args)

    return method


@every_method
def test_merging_transposed_weights(method: Method):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = Model()
    for block in model.blocks:
        block.up, block.down = conv1d(OUT, IN), conv1d(IN, OUT)
    with torch.no_grad():
        for block in model.blocks:
            block.up.weight.copy_(randn(IN, OUT) / 4)
            block.down.weight.copy_(randn(OUT, IN) / 4)
    adapted_model(method, model=model)
    before, expected = snapshot(model), model(randn(5, IN))
    fastpeft.merge(model)
    torch.testing.assert_close(model(randn(5, IN)), expected, rtol=1e-4, atol=1e-4)
    fastpeft.unmerge(model)
    assert_unchanged(model, before)
