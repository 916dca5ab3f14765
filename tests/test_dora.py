"""DoRA, ``LoraConfig(use_dora=True)``: PEFT as the oracle, the norms, what is kept between calls, and the promises.

How results are compared with PEFT's is told in peft_oracle.py.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import Allocations, make_linear, randn, run, widened
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import fastpeft
from fastpeft import functional, reference
from fastpeft.nn import dora
from fastpeft.ops.dora import apply_dora, row_norms

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_oracle  # noqa: E402 (after the skip)
from peft_oracle import EVERYWHERE, MARKS, adapter_values, compare, compare_models, make_inputs, make_tower  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

pytestmark = MARKS


def peft_config(**options):
    return peft.LoraConfig(use_dora=True, **{"target_modules": EVERYWHERE, "r": 4, **options})


def dora_config(**options):
    return fastpeft.LoraConfig(**{"use_dora": True, "target_modules": "all-linear", "r": 4, **options})


def stirred(layer: nn.Module, **options) -> nn.Module:
    """With an adapter whose every number was moved off its start."""
    fastpeft.adapt(layer, dora_config(**options))
    with torch.no_grad():
        for seed, parameter in enumerate(fastpeft.adapter_parameters(layer)):
            parameter.add_(0.3 * randn(*parameter.shape, seed=seed).to(parameter))
    return layer


def adapter_of(layer: nn.Module) -> dora.DoRAAdapter:
    return layer.adapters["default"]


# ---------------------------------------------------------------------- PEFT


@pytest.mark.parametrize(
    "width, hidden, options",
    [
        pytest.param(35, 21, {"lora_alpha": 7}, id="odd"),
        pytest.param(13, 31, {"r": 1}, id="prime-rank-one"),
        pytest.param(6, 10, {"r": 16, "lora_alpha": 4}, id="rank-above-both-sides"),
        pytest.param(35, 21, {"r": 9, "lora_alpha": 6, "use_rslora": True}, id="rslora"),
        pytest.param(
            20,
            50,
            {"rank_pattern": {"down": 5, "layers.0.up": 2}, "alpha_pattern": {r"layers\.[1-9]\.\w+": 11}},
            id="patterns",
        ),
    ],
)
def test_outputs_and_gradients_are_pefts(monkeypatch, width, hidden, options):
    compare(monkeypatch, make_tower(width, hidden), peft_config(**options), make_inputs(width))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_narrow_base(monkeypatch, dtype, p):
    """The adapter and the norms stay in float32 over it."""
    base, config = make_tower(24, 40).to(dtype), peft_config(lora_dropout=p)
    theirs = peft_oracle.peft_model(base, config, dtype=dtype)
    exact = peft_oracle.peft_model(base, config, dtype=torch.float64)
    ours = peft_oracle.our_model(base, theirs, config, dtype=dtype)
    assert {value.dtype for value in adapter_values(ours).values()} == {torch.float32}
    inputs = [x.to(dtype) for x in make_inputs(24)]
    compare_models(monkeypatch, exact, theirs, ours, None, inputs, dtype)


def numbers_of(layer: nn.Module) -> tuple:
    adapter = adapter_of(layer)
    return adapter.lora_A, adapter.lora_B, adapter.lora_magnitude_vector, adapter.scaling


@pytest.mark.parametrize("p", [0.2, 0.75])
def test_dropout(monkeypatch, p):
    compare(monkeypatch, make_tower(35, 21), peft_config(lora_dropout=p), make_inputs(35, count=6))


def test_dropout_is_for_training_alone(monkeypatch):
    base, config = make_tower(24, 40), peft_config(lora_dropout=0.5)
    theirs, exact = (peft_oracle.peft_model(base, config, dtype=dtype) for dtype in (torch.float32, torch.float64))
    ours = peft_oracle.our_model(base, theirs, config)
    for model in (theirs, exact, ours):
        model.eval()
    compare_models(monkeypatch, exact, theirs, ours, None, make_inputs(24))


@pytest.mark.parametrize("order", [["one", "two"], ["two", "one"]])
@pytest.mark.parametrize("second_is_dora, p", [(True, 0.0), (True, 0.3), (False, 0.0)])
def test_two_adapters_together(monkeypatch, order, second_is_dora, p):
    """Each scales what the base and the adapters before it have given, by the norms over the base alone."""
    configs = (
        peft_config(r=3),
        peft.LoraConfig(r=5, lora_alpha=3, target_modules=["up"], use_dora=second_is_dora, lora_dropout=p),
    )
    base, names = make_tower(45, 15), ("one", "two")
    theirs, exact = (
        peft_oracle.peft_model(base, *configs, names=names, dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    ours, wide = (
        peft_oracle.our_model(base, theirs, *configs, names=names, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for model in (theirs, exact):
        model.base_model.set_adapter(order)
    for model in (ours, wide):
        fastpeft.set_adapter(model, order)
    compare_models(monkeypatch, exact, theirs, ours, wide, make_inputs(45))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_conv1d(monkeypatch, tmp_path, p):
    config = peft_config(target_modules=peft_oracle.CONV1D, fan_in_fan_out=True, lora_dropout=p)
    base = peft_oracle.make_gpt2()
    compare(monkeypatch, base, config, peft_oracle.TOKENS)
    theirs = peft_oracle.peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    peft_oracle.assert_same_values(theirs, fastpeft.load_adapter(copy.deepcopy(base), tmp_path))


@pytest.mark.parametrize("names", [["default"], ["default", "other"]], ids=str)
def test_merged_weights(names):
    base, configs = make_tower(24, 40), (peft_config(), peft_config(r=2, target_modules=["up"]))
    theirs, exact = (peft_oracle.peft_model(base, *configs, dtype=dtype) for dtype in (torch.float32, torch.float64))
    ours = peft_oracle.our_model(base, theirs, *configs)
    peft_oracle.copy_values(theirs, exact)
    for model in (theirs, exact):
        model.base_model.set_adapter(names)
    fastpeft.set_adapter(ours, names)
    x = make_inputs(24)[0]
    expected = ours(x)
    fastpeft.merge(ours)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    weights = [dict(model.merge_and_unload().named_parameters()) for model in (theirs, exact)]
    worst = {"ours": 0.0, "theirs": 0.0}
    for path in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"):
        right = weights[1][f"{path}.weight"]
        for whose, weight in (("ours", ours.get_submodule(path).weight), ("theirs", weights[0][f"{path}.weight"])):
            worst[whose] = max(worst[whose], float((weight.double() - right).abs().max() / right.abs().max()))
    assert worst["ours"] <= 2 * worst["theirs"] + torch.finfo(torch.float32).eps
    fastpeft.unmerge(ours)
    for path in ("layers.0.up", "layers.1.down"):
        assert torch.equal(ours.get_submodule(path).weight, base.get_submodule(path).weight)
    assert torch.equal(ours(x), expected)


def test_folders_go_both_ways(tmp_path):
    base = make_tower(24, 40)
    theirs = peft_oracle.peft_model(base, peft_config(lora_alpha=3, lora_dropout=0.1))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fastpeft.load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    peft_oracle.assert_same_values(theirs, ours)
    assert ours.layers[0].up.adapters["default"].config.use_dora
    fastpeft.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    peft_oracle.assert_same_values(again, ours)
    x = make_inputs(24)[0]
    torch.testing.assert_close(again.eval()(x), ours.eval()(x))
    fastpeft.load_adapter(ours, tmp_path / "ours")  # into the adapter that is there
    with pytest.raises(ValueError, match="use_dora"):
        fastpeft.load_adapter(fastpeft.adapt(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=EVERYWHERE)),
                              tmp_path / "ours")  # fmt: skip


def test_a_folder_without_magnitudes_is_refused(tmp_path):
    base = make_tower(24, 40)
    fastpeft.save_adapter(fastpeft.adapt(copy.deepcopy(base), dora_config(use_dora=False)), tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(ValueError, match="lora_magnitude_vector is missing"):
        fastpeft.load_adapter(base, tmp_path)


def test_pefts_parameters_go_into_the_operator():
    """As they lie in PEFT's layer, where W and the adapter are Parameters."""
    theirs = peft_oracle.peft_model(make_tower(24, 40), peft_config())
    layer = theirs.base_model.model.layers[0].up
    x = randn(5, 24)
    y = apply_dora(
        x,
        layer.base_layer.weight,
        layer.base_layer.bias,
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
        layer.scaling["default"],
    )
    torch.testing.assert_close(y, layer(x))


# ---------------------------------------------------------------------- the start


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_fresh_adapter_changes_nothing(dtype, bias):
    """To the last bit: m is the very norm that it is divided by."""
    base = make_linear(37, 53, bias, dtype)
    fresh = fastpeft.adapt(copy.deepcopy(base), dora_config())
    x = randn(7, 37, dtype=dtype)
    assert torch.equal(fresh(x), base(x))
    with torch.no_grad():
        assert torch.equal(fresh(x), base(x))
    with torch.inference_mode():
        assert torch.equal(fresh(x), base(x))
    fastpeft.adapt(fresh, dora_config(), "second")  # step by step
    fastpeft.set_adapter(fresh, ["default", "second"])
    assert torch.equal(fresh(x), base(x))
    fastpeft.merge(fresh)
    assert torch.equal(fresh.weight, base.weight)


def test_a_row_of_zeros_has_no_direction():
    """PEFT starts such an output from 0 / 0."""
    base = make_linear()
    with torch.no_grad():
        base.weight[3] = 0
    with pytest.raises(ValueError, match=r"'' \(24 -> 16\).* 1 are zero"):
        fastpeft.adapt(base, dora_config())
    assert type(base) is nn.Linear
    fastpeft.adapt(base, dora_config(init_lora_weights=False))  # where B A has something in it


class Quantised(nn.Module):
    """Has sizes like a linear layer, and no matrix."""

    in_features, out_features = 24, 16

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 24, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def test_a_base_without_a_dense_weight_is_refused():
    model = nn.Sequential(Quantised())
    with pytest.raises(ValueError, match=r"'0'.*use_dora=True needs the norm.*no dense"):
        fastpeft.adapt(model, dora_config())
    assert type(model[0]) is Quantised
    fastpeft.adapt(model, dora_config(use_dora=False))


def test_use_dora_is_a_flag():
    with pytest.raises(ValueError, match="use_dora must be True or False, got 'yes'"):
        fastpeft.LoraConfig(use_dora="yes")


def test_a_base_on_the_meta_device(tmp_path):
    model = make_tower(24, 40)
    fastpeft.save_adapter(stirred(copy.deepcopy(model)), tmp_path)
    on_meta = fastpeft.load_adapter(copy.deepcopy(model).to("meta"), tmp_path)
    assert all(parameter.is_meta for parameter in on_meta.parameters())
    assert on_meta(torch.empty(3, 24, device="meta")).shape == (3, 3)


# ---------------------------------------------------------------------- the norms


def error_of_norms(norms: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    exact = reference.dora.dora_norm(weight.double(), lora_A.double(), lora_B.double(), scaling)
    return float(((norms.double() - exact) / exact).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(1000, 300), (7, 3), (1, 5), (5000, 70)], ids=str)
def test_norms(sizes, dtype, adapter_dtype):
    d_in, d_out = sizes
    weight = (randn(d_out, d_in) / d_in**0.5).to(dtype)
    lora_A, lora_B = (randn(8, d_in) / d_in**0.5).to(adapter_dtype), randn(d_out, 8, seed=2).to(adapter_dtype)
    norms = row_norms(weight, lora_A, lora_B, 0.7)
    assert norms.dtype == torch.float32
    composed = reference.dora.dora_norm(weight.float(), lora_A.float(), lora_B.float(), 0.7)
    weight, lora_A, lora_B = weight.double(), lora_A.double(), lora_B.double()
    exact = reference.dora.dora_norm(weight, lora_A, lora_B, 0.7)
    uncancelled = weight.square().sum(1) + 0.7**2 * lora_B.square() @ lora_A.square().sum(1)
    own = max(float(((composed - exact) / exact).abs().max()), torch.finfo(torch.float32).eps)
    allowed = 2 * own * (uncancelled / exact.square()).clamp(min=1, max=4)
    assert (((norms - exact) / exact).abs() <= allowed).all()


@pytest.mark.parametrize("left", [0.5, 1e-2, 1e-4, 1e-6])
def test_norms_where_weight_and_delta_cancel(left):
    """W = −s B A + a little: the sum of three terms has no digits left, and the rows are summed up again."""
    lora_A, lora_B, scaling = randn(4, 200), randn(60, 4, seed=2), 0.7
    weight = -scaling * (lora_B.double() @ lora_A.double()).float()
    weight[::2] += left * randn(30, 200, seed=3)  # half the rows cancel to rounding errors
    norms = row_norms(weight, lora_A, lora_B, scaling)
    composed = reference.dora.dora_norm(weight, lora_A, lora_B, scaling)
    rows = slice(0, None, 2)
    arguments = weight[rows], lora_A, lora_B[rows], scaling
    eps = torch.finfo(torch.float32).eps
    allowed = max(2 * error_of_norms(composed[rows], *arguments), 16 * eps)
    assert error_of_norms(norms[rows], *arguments) <= allowed
    size = weight.norm(dim=1)
    exact = reference.dora.dora_norm(weight.double(), lora_A.double(), lora_B.double(), scaling)
    assert ((norms - exact).abs() <= 4 * eps * size).all()


def test_a_norm_of_zero_gives_what_peft_gives():
    """Small integers cancel exactly: m / 0, and 0 / 0 where m is zero too."""
    lora_A = torch.tensor([[1.0, 2.0, -3.0, 4.0]])
    lora_B = torch.tensor([[2.0], [-1.0], [0.0]])
    weight = -lora_B @ lora_A
    base = nn.Linear(4, 3, bias=False)
    theirs = peft.get_peft_model(nn.Sequential(base), peft_config(r=1, lora_alpha=1, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.lora_A["default"].weight.copy_(lora_A)
        layer.lora_B["default"].weight.copy_(lora_B)
        layer.lora_magnitude_vector["default"].weight.copy_(torch.tensor([1.0, 0.0, 1.0]))
    magnitude = layer.lora_magnitude_vector["default"].weight
    norms = row_norms(weight, lora_A, lora_B, 1.0)
    assert torch.equal(norms, torch.zeros(3))
    scale = magnitude / norms
    assert scale[0] == float("inf") and scale[1].isnan() and scale[2] == float("inf")
    x = randn(2, 4)
    y = functional.dora_linear(x, weight, None, lora_A, lora_B, magnitude, 1.0)
    assert not y.isfinite().any() and not layer(x).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_no_matrix_of_the_weights_size_is_made(dtype, p):
    layer = stirred(make_linear(768, 1024, dtype=dtype), lora_dropout=p)
    x = randn(2, 768, dtype=dtype)
    with Allocations() as allocations:
        layer(x.requires_grad_()).sum().backward()
        layer.eval()
        with torch.no_grad():
            layer(x)
    most = 768 * 1024 // 4 if dtype == torch.bfloat16 else 1024 * 16  # in 16 bits W is widened in parts
    sizes = [torch.Size(shape).numel() for _, shape in allocations.made]
    assert max(sizes) <= most


# ---------------------------------------------------------------------- gradients


def test_the_norm_is_a_constant_in_the_backward():
    """gradcheck holds with the norm fixed at its value, and the gradient differs from that through the norm."""
    x, weight, bias = (t.double() for t in (randn(3, 7), randn(5, 7), randn(5)))
    lora_A, lora_B, magnitude = (t.double() for t in (randn(2, 7, seed=3), randn(5, 2, seed=4), 2 + randn(5, seed=5)))
    norms = row_norms(weight, lora_A, lora_B, 0.7)

    def fixed(x, lora_A, lora_B, magnitude):
        return apply_dora(x, weight, bias, lora_A, lora_B, magnitude, 0.7, 0.0, norms)

    leaves = [t.requires_grad_() for t in (x, lora_A, lora_B, magnitude)]
    assert torch.autograd.gradcheck(fixed, leaves)

    def through(lora_A):
        whole = weight + 0.7 * lora_B @ lora_A
        return F.linear(x, (magnitude / whole.norm(dim=1))[:, None] * whole, bias)

    y = functional.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, 0.7)
    torch.testing.assert_close(y, through(lora_A))
    (found,) = torch.autograd.grad(y.sum(), lora_A)
    (other,) = torch.autograd.grad(through(lora_A).sum(), lora_A)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "lora_magnitude_vector"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    layer, x = stirred(make_linear()), randn(5, 24)
    everything = run(layer, x)
    getattr(adapter_of(layer), frozen).requires_grad_(False)
    rest = run(layer, x)
    assert everything.gradients.keys() - rest.gradients.keys() == {f"adapters.default.{frozen}"}
    assert torch.equal(rest.dx, everything.dx)
    for name, gradient in rest.gradients.items():
        assert torch.equal(gradient, everything.gradients[name]), name


def test_the_output_can_be_changed_in_place():
    layer, x = stirred(make_linear()), randn(5, 24)
    expected = run(layer, x, lambda layer, x: torch.relu(layer(x)))
    found = run(layer, x, lambda layer, x: layer(x).relu_())
    assert torch.equal(found.dx, expected.dx)


# ---------------------------------------------------------------------- what is kept between calls


class Counter:
    """How often the norms, and the sums of squares for them, were worked out."""

    def __init__(self, monkeypatch):
        self.norms = self.squares = 0
        for name in ("row_norms", "row_squares"):
            monkeypatch.setattr(dora, name, self._counting(getattr(dora, name), name.removeprefix("row_")))

    def _counting(self, function, name):
        def counting(*args):
            setattr(self, name, getattr(self, name) + 1)
            return function(*args)

        return counting

    def take(self):
        counts, self.norms, self.squares = (self.norms, self.squares), 0, 0
        return counts


def exact_output(layer, x):
    return reference.dora.dora_linear(x, layer.weight, layer.bias, *numbers_of(layer))


CHANGES_OF_THE_ADAPTER = {
    "in place": lambda adapter: adapter.lora_A.add_(0.1),
    "through data": lambda adapter: adapter.lora_B.data.mul_(1.3),
    "new data": lambda adapter: setattr(adapter.lora_A, "data", adapter.lora_A.data * 1.2),
    "loaded": lambda adapter: adapter.load_state_dict({k: v * 1.1 for k, v in adapter.state_dict().items()}),
}
CHANGES_OF_THE_WEIGHT = {
    "in place": lambda layer: layer.weight.mul_(1.2),
    "a part in place": lambda layer: layer.weight[2].mul_(1.2),
    "loaded": lambda layer: layer.load_state_dict({**layer.state_dict(), "weight": layer.weight * 1.2}),
    "another Parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight * 1.2, requires_grad=False)),
    "new data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 1.2),
    "moved": lambda layer: layer.double().float(),
    "rounded": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=lambda m: m.__name__)
def test_norms_are_kept_until_something_changes(mode, monkeypatch):
    layer, x, counter = stirred(make_linear()), randn(5, 24), Counter(monkeypatch)
    with mode():
        first = layer(x)
        assert counter.take() == (1, 1)
        assert torch.equal(layer(x), first) and counter.take() == (0, 0)
    with torch.no_grad():
        adapter_of(layer).lora_magnitude_vector.mul_(2)  # stands above the norms
        torch.testing.assert_close(layer(x), exact_output(layer, x))
        assert counter.take() == (0, 0)


@pytest.mark.parametrize("change", CHANGES_OF_THE_ADAPTER.values(), ids=CHANGES_OF_THE_ADAPTER)
def test_a_changed_adapter_is_seen(change, monkeypatch):
    layer, x = stirred(make_linear()), randn(5, 24)
    with torch.no_grad():
        layer(x)
        counter = Counter(monkeypatch)
        change(adapter_of(layer))
        torch.testing.assert_close(layer(x), exact_output(layer, x))
        assert counter.take() == (1, 0)  # W is as it was


@pytest.mark.parametrize("change", CHANGES_OF_THE_WEIGHT.values(), ids=CHANGES_OF_THE_WEIGHT)
def test_a_changed_weight_is_seen(change, monkeypatch):
    layer, x = stirred(make_linear()), randn(5, 24)
    with torch.no_grad():
        layer(x)
        counter = Counter(monkeypatch)
        change(layer)
        torch.testing.assert_close(layer(x), exact_output(layer, x))
        assert counter.take() == (1, 1)


def test_a_training_step_works_out_the_norms_once(monkeypatch):
    layer, x, counter = stirred(make_linear()), randn(5, 24), Counter(monkeypatch)
    optimizer = torch.optim.AdamW(fastpeft.adapter_parameters(layer), lr=0.01)
    for step in range(3):
        for _ in range(2):  # gradients accumulated
            y = layer(x)
            torch.testing.assert_close(y, exact_output(layer, x))
            y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert counter.take() == (1, int(step == 0))


def test_norms_over_a_transposed_weight_are_kept(monkeypatch):
    layer = Conv1D(16, 24)
    stirred(layer)
    x, counter = randn(5, 24), Counter(monkeypatch)
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first) and counter.take() == (1, 1)
        layer.weight.mul_(1.5)
        exact = reference.dora.dora_linear(x, layer.weight.T, layer.bias, *numbers_of(layer))
        torch.testing.assert_close(layer(x), exact)
        assert counter.take() == (1, 1)


def test_elsewhere_norms_are_kept_by_counted_changes(monkeypatch):
    """On a device whose numbers the host would have to wait for: meta stands in for one."""
    layer, x = stirred(make_linear()).to("meta"), torch.empty(5, 24, device="meta")
    counter = Counter(monkeypatch)
    layer(x), layer(x)
    assert counter.take() == (2, 1)  # trained: worked out on every call
    with torch.no_grad():
        layer(x), layer(x)
        assert counter.take() == (1, 0)
        adapter_of(layer).lora_B.add_(1)
        layer(x), layer(x)
        assert counter.take() == (1, 0)
        layer.weight.add_(1)
        layer(x), layer(x)
        assert counter.take() == (1, 1)


def test_merging_and_unmerging_is_seen():
    layer, x = stirred(make_linear()), randn(5, 24)
    with torch.no_grad():
        expected = layer(x)
        for _ in range(2):
            layer.merge()
            layer.unmerge()
            assert torch.equal(layer(x), expected)
        fastpeft.merge(layer)
        torch.testing.assert_close(layer(x), expected)


def test_copies_keep_nothing():
    layer, x = stirred(make_linear()), randn(5, 24)
    with torch.no_grad():
        expected = layer(x)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved(layer)):
            assert adapter_of(copied).norms._norms is None and adapter_of(copied).norms._squares is None
            assert torch.equal(copied(x), expected)


def saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_a_model_that_moved_lets_go_of_its_old_weight():
    layer, x = stirred(make_linear()), randn(5, 24)
    layer(x)
    old = StorageWeakRef(layer.weight.untyped_storage())
    layer.double()
    assert old.expired()
    torch.testing.assert_close(layer(x.double()), exact_output(layer, x.double()))


def test_a_layer_made_in_inference_mode():
    """Changes of its tensors are not counted, so nothing is kept of W."""
    with torch.inference_mode():
        layer, x = stirred(make_linear()), randn(5, 24)
        layer(x)
        layer.weight.mul_(1.5)
        torch.testing.assert_close(layer(x), exact_output(layer, x))


# ---------------------------------------------------------------------- promises


def test_state_dict_keys():
    layer = stirred(make_linear())
    assert set(layer.state_dict()) == {
        "weight",
        "bias",
        *(f"adapters.default.{name}" for name in ("lora_A", "lora_B", "lora_magnitude_vector")),
    }


def test_a_layer_of_its_own():
    layer = fastpeft.nn.LoRALinear.from_linear(make_linear(), dora_config())
    assert isinstance(adapter_of(layer), fastpeft.nn.DoRAAdapter)
    x = randn(2, 24)
    assert torch.equal(layer(x), make_linear()(x))


@pytest.mark.parametrize("backend", ["reference", "torch", "native"])
def test_backends_agree(backend):
    layer, x = stirred(make_linear()), randn(5, 24)
    expected = run(widened(layer), x.double())
    with fastpeft.use_backend(backend):
        found = run(layer, x)
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor.double(), expected.tensors()[name], rtol=1e-4, atol=1e-5)


def test_reference_backend_with_dropout():
    layer, x = stirred(make_linear(), lora_dropout=0.4), randn(5, 24)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    with fastpeft.use_backend("reference"):
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("names", [["default"], ["default", "second"]], ids=str)
def test_autocast(names, p):
    """Norms are taken of W as it is, not of what autocast makes of it."""
    layer, x = stirred(make_linear(), lora_dropout=p), randn(5, 24)
    stirred_second = fastpeft.adapt(layer, dora_config(r=2), "second")
    fastpeft.set_adapter(stirred_second, names)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() <= 8 * torch.finfo(torch.bfloat16).eps * expected.norm()
    y.float().sum().backward()


def test_compiled_as_one_graph():
    layer, x = stirred(make_linear()), randn(5, 24)
    expected = run(layer, x)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found = run(layer, x, lambda _, x: compiled(x))
    for name, tensor in found.tensors().items():
        torch.testing.assert_close(tensor, expected.tensors()[name])
    with torch.no_grad():
        adapter_of(layer).lora_A.mul_(1.5)
        torch.testing.assert_close(compiled(x), exact_output(layer, x))


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"magnitude": torch.ones(15)}, ValueError, r"magnitude must have shape \(16\), got \(15,\)"),
        ({"magnitude": torch.ones(16, 1)}, ValueError, r"magnitude must have shape \(16\), got \(16, 1\)"),
        ({"magnitude": torch.ones(16, dtype=torch.int64)}, TypeError, "magnitude must be a floating-point tensor"),
        ({"magnitude": torch.ones(16, device="meta")}, ValueError, "magnitude must be on the device of x"),
        ({"weight": None}, ValueError, "weight must be a tensor, got None"),
        ({"lora_B": torch.ones(16, 3)}, ValueError, r"lora_B must have shape \(out, 4\)"),
        ({"lora_B": torch.ones(16, 4).double()}, TypeError, "lora_B must have the dtype of lora_A"),
        ({"x": torch.ones(2, 23)}, ValueError, r"x must have shape \(..., 24\), got \(2, 23\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, error, message):
    arguments = {
        "x": randn(2, 24),
        "weight": randn(16, 24),
        "bias": None,
        "lora_A": randn(4, 24),
        "lora_B": randn(16, 4),
        "magnitude": torch.ones(16),
        "scaling": 1.0,
    }
    functional.dora_linear(**arguments)
    with pytest.raises(error, match=message):
        functional.dora_linear(**{**arguments, **changed})
