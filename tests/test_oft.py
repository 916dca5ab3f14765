"""OFT's own matters: the formula in closed form, PEFT's dropout and constraint, large blocks, sizes that do not fit.

What it shares with the other methods is tested with them.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import DTYPES, IN, OFT, adapted, check, fill, make_linear, randn, run, widened
from small_models import make_conv1d
from test_ops import check_against_formula, oft_case
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import functional, reference
from fastpeft.ops.oft import oft_blocks

# ---------------------------------------------------------------------- the formula


def test_a_block_of_two_is_a_plane_rotation():
    """S = [[0, a], [−a, 0]]: the exact form turns by −2 arctan a, in the convention x Q."""
    a = torch.tensor([[0.3], [-2.0]], dtype=torch.float64)
    blocks = reference.oft.oft_blocks(a, 2)
    angle = 2 * torch.arctan(a).squeeze(1)
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(2, 2, 2)
    torch.testing.assert_close(blocks, expected)


def test_the_numbers_lie_above_the_diagonal_row_by_row():
    skew = reference.oft.skew_blocks(torch.tensor([[1.0, 2, 3, 4, 5, 6]]), 4)
    expected = [[0, 1, 2, 3], [-1, 0, 4, 5], [-2, -4, 0, 6], [-3, -5, -6, 0]]
    assert torch.equal(skew, torch.tensor([expected], dtype=torch.float32))


# Terms -> the factors of S⁰, S¹, …
SERIES = {
    1: [1],
    2: [1, 2],
    3: [1, 2, 2, 1],
    4: [1, 2, 2, 1],
    5: [1, 2, 2, 2, 1],
    6: [1, 2, 2, 2, 2, 1],
    7: [1, 2, 2, 2, 2, 2, 1],
}


@pytest.mark.parametrize("terms", SERIES)
def test_the_series(terms: int):
    oft_R = randn(3, 10, dtype=torch.float64)
    skew = reference.oft.skew_blocks(oft_R, 5)
    expected = sum(factor * torch.linalg.matrix_power(skew, k) for k, factor in enumerate(SERIES[terms]))
    torch.testing.assert_close(reference.oft.oft_blocks(oft_R, 5, terms), expected)
    torch.testing.assert_close(oft_blocks(oft_R, 5, terms), expected)


def test_the_series_nears_the_transpose_of_the_exact_map():
    oft_R = randn(3, 10, dtype=torch.float64) / 20
    exact = reference.oft.oft_blocks(oft_R, 5)
    torch.testing.assert_close(exact @ exact.mT, torch.eye(5, dtype=torch.float64).expand(3, 5, 5))
    errors = [float((reference.oft.oft_blocks(oft_R, 5, terms) - exact.mT).norm()) for terms in (2, 3, 5, 6, 7, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-14 < errors[-2]


def test_a_shared_block_stands_for_as_many_equal_ones():
    x, weight, oft_R = randn(7, 24), randn(5, 24), randn(1, 6) / 3
    for terms in (None, 5):
        shared = functional.oft_linear(x, weight, None, oft_R, 4, terms)
        assert torch.equal(shared, functional.oft_linear(x, weight, None, oft_R.expand(6, 6), 4, terms))


# ---------------------------------------------------------------------- the constraint


@pytest.mark.parametrize("terms", [None, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_constraint_against_the_formula(dtype: torch.dtype, terms: int | None):
    """A radius that about half of the blocks exceed. Not part of the operators' cases: its derivative is not the
    function's, on purpose."""
    for rows in (4, 1):
        check_against_formula(oft_case(24, 9, 6, rows, neumann_terms=terms, eps=0.8 if rows == 4 else 0.3), dtype)


def test_the_constraint_holds_and_the_rest_is_left_alone():
    oft_R = randn(8, 6, dtype=torch.float64) * torch.linspace(0.1, 2, 8, dtype=torch.float64)[:, None]
    radius = 4 / 8**0.5
    before = reference.oft.skew_blocks(oft_R, 4).norm(dim=(1, 2))
    projected = reference.oft.project(oft_R, 4.0)
    after = reference.oft.skew_blocks(projected, 4).norm(dim=(1, 2))
    assert (before > radius).any() and (before < radius).any()
    torch.testing.assert_close(after, before.clamp(max=radius))
    assert torch.equal(projected[before < radius], oft_R[before < radius])


def constrained(**changes) -> nn.Module:
    """Outside of the ball from the start."""
    return adapted(OFT, coft=True, eps=0.5, **changes)


def test_a_training_step_brings_the_parameters_back():
    layer, x = constrained(), randn(9, IN)
    parameter = layer.adapters["default"].oft_R
    before = parameter.detach().clone()
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(parameter, before)  # inference changes nothing
    torch.testing.assert_close(run(layer, x).y, expected)
    assert not torch.equal(parameter, before)
    torch.testing.assert_close(parameter.detach(), reference.oft.project(before, 0.5))
    check(layer, x)


def test_a_constrained_layer_that_is_used_twice():
    """The second use writes to the parameter, between the first and its backward."""
    layer, x = adapted(OFT, make_linear(IN, IN), coft=True, eps=0.5), randn(9, IN)

    def twice(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(layer(x))

    check(layer, x, twice, lambda layer, x: plain(layer, plain(layer, x)))


def plain(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    adapter = layer.adapters["default"]
    formula = reference.oft.oft_linear
    return formula(x, layer.weight, layer.bias, adapter.oft_R, adapter.block_size, adapter.neumann_terms, adapter.eps)


def test_a_constrained_layer_under_checkpointing_and_compile():
    layer, x = constrained(), randn(9, IN)
    parameter = layer.adapters["default"].oft_R
    before = parameter.detach().clone()
    expected = run(layer, x)
    projected = parameter.detach().clone()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for forward in (lambda layer, x: checkpoint(layer, x, use_reentrant=False), lambda layer, x: compiled(x)):
        parameter.data.copy_(before)
        found = run(layer, x, forward)
        torch.testing.assert_close(parameter.detach(), projected)
        for name, tensor in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[name], tensor, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p, dropped", [(0.1, 0), (0.5, 3), (0.95, 5)])  # int(p · 6)
@pytest.mark.parametrize("exact", [True, False])
def test_dropout_turns_blocks_into_the_identity(p: float, dropped: int, exact: bool):
    layer, x = adapted(OFT, module_dropout=p, use_cayley_neumann=not exact).train(), randn(9, IN)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mask = torch.randperm(6) < dropped
        assert int(mask.sum()) == dropped
        seen |= {int(block) for block in mask.nonzero()}

        def seeded(layer: nn.Module, x: torch.Tensor, seed=seed) -> torch.Tensor:
            torch.manual_seed(seed)
            return layer(x)

        def formula(layer: nn.Module, x: torch.Tensor, mask=mask) -> torch.Tensor:
            adapter = layer.adapters["default"]
            wide = adapter.oft_R.to(torch.promote_types(adapter.oft_R.dtype, torch.float32))
            blocks = reference.oft.oft_blocks(wide, 4, adapter.neumann_terms)
            blocks = torch.where(mask[:, None, None], torch.eye(4, dtype=wide.dtype), blocks)
            return F.linear(x @ torch.block_diag(*blocks), layer.weight, layer.bias)

        if seed < 4:
            check(layer, x, seeded, formula)
    assert seen == (set(range(6)) if dropped else set())


def test_a_shared_block_is_never_dropped():
    layer, x = adapted(OFT, module_dropout=0.9, block_share=True), randn(9, IN)
    assert torch.equal(layer.train()(x), layer.eval()(x))


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("block_size, blocks", [(144, 2), (192, 3), (96, 1), (64, 2)])
def test_large_blocks(block_size: int, blocks: int):
    """From 160 on torch.linalg.solve fails for several matrices on several threads, which exact blocks must not."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        oft_R = randn(blocks, block_size * (block_size - 1) // 2) / (2 * block_size**0.5)
        narrow, wide = oft_R.requires_grad_(), oft_R.detach().double().requires_grad_()
        found = oft_blocks(narrow, block_size)
        exact, plain = (
            torch.cat([reference.oft.oft_blocks(row, block_size) for row in r.split(1)]) for r in (wide, oft_R)
        )
        grad = randn(*found.shape, seed=2)
        pairs = [(found, exact, plain)]
        derivatives = (
            torch.autograd.grad(y, r, grad.to(y)) for y, r in ((found, narrow), (exact, wide), (plain, oft_R))
        )
        pairs += zip(*derivatives, strict=True)
        for mine, right, composed in pairs:
            errors = [float((y.detach().double() - right.detach()).norm()) for y in (mine, composed)]
            assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * float(right.detach().norm())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("series", [True, False])
def test_one_rotation_of_all_features(series: bool):
    layer = adapted(OFT, make_linear(200, 10), oft_block_size=200, use_cayley_neumann=series)
    assert layer.adapters["default"].oft_R.shape == (1, 19900)
    fill(layer)
    with torch.no_grad():
        layer.adapters["default"].oft_R /= 5
        x = randn(5, 200)
        exact = plain(widened(layer), x.double())
        composed = plain(layer, x)
        allowed = 2 * (composed.double() - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
        assert (layer(x).double() - exact).norm() <= allowed


# ---------------------------------------------------------------------- what eval keeps


@pytest.mark.parametrize("shared", [True, False])
def test_kept_blocks_follow_the_parameter(shared: bool):
    layer, x = adapted(OFT, block_share=shared).eval(), randn(5, IN)
    parameter = layer.adapters["default"].oft_R
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        first = layer(x)
        changes = (
            lambda: parameter.mul_(0.5),
            lambda: parameter.data.mul_(2.5),
            lambda: layer.load_state_dict({key: value + 0.01 for key, value in state.items()}),
            lambda: layer.double().float().adapters["default"].oft_R.add_(0.1),
        )
        for change in changes:
            layer(x)
            change()
            fresh = copy.deepcopy(layer)
            assert fresh.adapters["default"]._cached._kept is None
            assert torch.equal(layer(x), fresh(x))
            assert not torch.equal(layer(x), first)
    with torch.inference_mode():
        layer(x)
    layer.adapters.requires_grad_(False)
    assert run(layer, x).dx is not None


# ---------------------------------------------------------------------- beside PEFT


def test_conv1d():
    """PEFT's OFT does not take a Conv1D."""
    layer, linear = make_conv1d(), make_linear()
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    x = randn(5, IN)
    torch.testing.assert_close(adapted(OFT, layer)(x), adapted(OFT, linear)(x))


class TestPEFT:
    """PEFT's layers with our numbers in them, or the other way round."""

    @pytest.fixture(autouse=True)
    def oracle(self):
        self.peft = pytest.importorskip("peft")
        self.layer = pytest.importorskip("peft.tuners.oft.layer")

    def models(self, d_in: int = 24, **options):
        config = self.peft.OFTConfig(target_modules=["0"], init_weights=False, **options)
        base = nn.Sequential(make_linear(d_in, 16, dtype=torch.float64))
        theirs, ours = self.peft.get_peft_model(copy.deepcopy(base), config), fastpeft.adapt(base, config)
        their = theirs.base_model.model[0].oft_R["default"].weight
        (our,) = fastpeft.adapter_parameters(ours)
        our.data.copy_(their.data)
        return theirs, ours, their, our

    @pytest.mark.parametrize("d_in", [24, 13, 30])
    @pytest.mark.parametrize("sizes", [{"oft_block_size": n} for n in (5, 7, 9, 32)] + [{"r": n} for n in (5, 7, 40)])
    def test_sizes_that_do_not_divide(self, d_in: int, sizes: dict):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            theirs, ours, their, our = self.models(d_in, **{"oft_block_size": 0, **sizes})
        (name, wanted), *_ = sizes.items()
        divides = d_in % wanted == 0
        remarks = [
            str(warning.message) for warning in caught if f"{name}={wanted} does not divide" in str(warning.message)
        ]
        assert len(remarks) == (not divides)
        assert all("layer '0'" in remark and str(d_in) in remark for remark in remarks)
        assert our.shape == their.shape
        x = randn(3, d_in, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))

    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize("shared", [True, False])
    def test_training_under_the_constraint(self, exact: bool, shared: bool):
        """Step by step the same outputs and the same parameters, as PEFT projects them in its forward."""
        options = {"oft_block_size": 4, "coft": True, "eps": 0.3, "block_share": shared}
        theirs, ours, their, our = self.models(use_cayley_neumann=not exact, **options)
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in (their, our)]
        for step in range(5):
            x = randn(7, 24, dtype=torch.float64, seed=step)
            outputs = []
            for model, optimizer in zip((theirs, ours), optimizers, strict=True):
                optimizer.zero_grad()
                y = model(x)
                y.square().mean().backward()
                outputs.append(y.detach())
            # PEFT rounds √blocks to float32
            torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(our.grad, their.grad, rtol=1e-6, atol=1e-6)
            for optimizer in optimizers:
                optimizer.step()

    @pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
    def test_dropout_draws_what_pefts_layer_draws(self, p: float):
        """PEFT 0.21 makes the dropout layer and never calls it; what it would do is what is done here."""
        adapter = adapted(OFT, module_dropout=p).train().adapters["default"]
        blocks = oft_blocks(adapter.oft_R, 4, 5)
        for seed in range(10):
            torch.manual_seed(seed)
            expected = self.layer.MultiplicativeDropoutLayer(p).train()(blocks)
            torch.manual_seed(seed)
            assert torch.equal(adapter.blocks(), expected)

    def test_two_adapters_together(self):
        """PEFT's OFT lets the first adapter act on x first, where its BOFT starts with the last. Merged, PEFT's own OFT
        has the other order as well: that is the one here."""
        configs = [self.peft.OFTConfig(target_modules=["0"], oft_block_size=b, init_weights=False) for b in (4, 6)]
        base = nn.Sequential(make_linear(dtype=torch.float64))
        theirs = self.peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="one")
        theirs.add_adapter("two", configs[1])
        ours = copy.deepcopy(base)
        for name, config in zip(("one", "two"), configs, strict=True):
            fastpeft.adapt(ours, config, name)
            values = theirs.base_model.model[0].oft_R[name].weight
            ours[0].adapters[name].oft_R.data.copy_(values.data)
        x = randn(5, IN, dtype=torch.float64)
        fastpeft.set_adapter(ours, ["two", "one"])
        theirs.base_model.set_adapter(["one", "two"])
        torch.testing.assert_close(ours(x), theirs(x))
        fastpeft.set_adapter(ours, ["one", "two"])
        theirs.base_model.merge_adapter(["one", "two"])
        torch.testing.assert_close(ours(x), theirs(x))
        fastpeft.merge(ours)
        torch.testing.assert_close(ours(x), theirs(x))

    def test_peft_takes_our_series_for_its_own(self, tmp_path):
        """Without a version PEFT would warn that the series had changed since."""
        model = nn.Sequential(make_linear())
        fastpeft.adapt(model, fastpeft.OFTConfig(oft_block_size=4, init_weights=False, target_modules=["0"]))
        fastpeft.save_adapter(model, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            theirs = self.peft.PeftModel.from_pretrained(nn.Sequential(make_linear()), tmp_path)
        x = randn(5, IN)
        torch.testing.assert_close(theirs(x), model(x))

    def test_a_folder_whose_size_was_adjusted(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs, _, their, _ = self.models()  # 32 for 24 features
            theirs.save_pretrained(tmp_path)
            ours = fastpeft.load_adapter(nn.Sequential(make_linear(dtype=torch.float64)), tmp_path)
        assert ours[0].adapters["default"].oft_R.shape == their.shape == (1, 276)
        x = randn(5, IN, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))
