"""What PyTorch does to models, done to accelerated ones: hooks, compiling, checkpointing, what is allocated."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import Allocations
from peft_models import CASES, MARKS, agree, every_case, every_method, fill, inputs, pair, peft
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastpeft
from fastpeft.backend import OPERATORS

pytestmark = MARKS


@every_method
def test_hooks_on_a_layer_are_called(case, calls):
    ours, _ = pair(case)
    seen = []
    layer = ours.base_model.model.blocks[0].inner["up"]
    layer.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    layer.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    ours(inputs()).sum().backward()
    assert seen == [(2, 5, 24), "backward"] and calls["peft"] == 0


INNER = {"lora": "lora_A.default", "dora": "lora_magnitude_vector.default", "oft": "oft_R.default"}


@every_method
@pytest.mark.parametrize("where", ["inside", "base_layer"])
def test_hooks_inside_a_layer_are_called(case, where, calls):
    if where == "inside" and case not in INNER:
        where = "base_layer"
    ours, theirs = pair(case)
    ours(inputs())
    seen = []
    handles = []
    for model in (ours, theirs):
        layer = model.base_model.model.blocks[0].inner["up"]
        module = layer.get_submodule(INNER[case] if where == "inside" else "base_layer")
        handles.append(module.register_forward_hook(lambda module, args, y, model=model: seen.append(model)))
        model(inputs())
    assert [model is ours for model in seen] == [True, False]
    agree(ours, theirs)
    calls.clear()
    for handle in handles:
        handle.remove()
    ours(inputs())
    assert calls["peft"] == 0


def test_hooks_on_all_modules_are_called():
    ours, _ = pair("lora")
    ours(inputs())
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        ours(inputs())
    finally:
        handle.remove()
    assert ours.base_model.model.blocks[0].inner["up"].lora_A["default"] in seen


@every_method
def test_a_replaced_forward_of_the_base_is_called(case):
    ours, theirs = pair(case)
    ours(inputs())
    for model in (ours, theirs):
        base = model.base_model.model.blocks[0].inner["up"].base_layer
        base.forward = lambda x, base=base: 2 * nn.Linear.forward(base, x)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


@every_method
def test_wrong_inputs_raise_as_they_did(case):
    ours, theirs = pair(case)
    layers = [model.base_model.model.blocks[0].inner["up"] for model in (ours, theirs)]
    raised = 0
    for wrong in (
        inputs(2, 15),
        inputs(2, 16).double(),
        torch.ones(2, 16, dtype=torch.int64),
        inputs(2, 16).to("meta"),
    ):
        mine, their = [], []
        for layer, errors in zip(layers, (mine, their), strict=True):
            try:
                layer(wrong)
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                errors.append(error)
        assert len(mine) == len(their), (wrong.dtype, mine, their)
        raised += len(mine)
    assert raised >= 3


# ---------------------------------------------------------------------- PyTorch


@every_case
def test_compiled_as_one_graph_for_every_length(case):
    ours, _ = pair(case, n_blocks=1, target_modules=["up", "mix"])
    for training in (False, True):
        if training and case == "boft-options":  # PEFT's dropout asks the random numbers back
            continue
        ours.train(training)
        torch._dynamo.reset()
        for operator in OPERATORS.values():
            operator._chosen.clear()  # what is remembered of earlier calls must not be part of a graph
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(ours, fullgraph=True, backend=counter)
        with torch.set_grad_enabled(training):
            for length in (5, 9, 33):
                x = inputs(2, length, 16)
                found, wanted = traced(compiled, x), traced(ours, x)
                assert found.keys() == wanted.keys() and (len(wanted) > 2) == training
                for name, tensor in wanted.items():
                    torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5 * tensor.abs().max().item())
        assert counter.frame_count == 1


def traced(model, x):
    """The output of a model, compiled or not, for inputs of any length, and its gradients where they are asked for."""
    x = x.clone().requires_grad_(torch.is_grad_enabled())
    torch._dynamo.mark_dynamic(x, 1)
    model.zero_grad()
    torch.manual_seed(5)
    found = {"y": model(x)}
    if x.requires_grad:
        found["y"].square().sum().backward()
        found["dx"] = x.grad
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name.removeprefix("_orig_mod.")] = parameter.grad
    return {name: tensor.detach() for name, tensor in found.items()}


@every_method
def test_compiled_models_follow_their_adapters(case):
    ours, theirs = pair(case, second=True, n_blocks=1, target_modules=["up"])
    ours.eval(), theirs.eval()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    compiled(inputs())
    for model in (ours, theirs):
        model.set_adapter("other")
    torch.testing.assert_close(compiled(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(compiled(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


@every_case
def test_gradient_checkpointing(case):
    ours, _ = pair(case)
    blocks = ours.base_model.model.blocks

    def checkpointed(x):
        for block in blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return ours.base_model.model.head(x)

    def plain(x):
        return ours.base_model.model(x)

    found = []
    for forward in (checkpointed, plain):
        ours.zero_grad()
        torch.manual_seed(4)
        forward(inputs()).square().sum().backward()
        found.append([p.grad for p in ours.parameters() if p.grad is not None])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@every_method
def test_functional_call_takes_other_parameters(case):
    ours, theirs = pair(case)
    ours.eval()(inputs())
    theirs.eval()
    values = {name: 1.1 * p.detach() for name, p in theirs.named_parameters()}
    found = torch.func.functional_call(ours, values, (inputs(),))
    torch.testing.assert_close(found, torch.func.functional_call(theirs, values, (inputs(),)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


@every_method
def test_nothing_of_weight_size_is_built(case):
    """PEFT's own forward builds a rotated weight or ΔW for some methods."""
    torch.manual_seed(0)
    model = fill(peft.get_peft_model(nn.Sequential(nn.Linear(48, 48)), CASES[case](target_modules=["0"])))
    fastpeft.accelerate(model, strict=True)
    x = inputs(3, 48).requires_grad_()
    for training in (True, False):
        model.train(training)
        model(x)
        with Allocations() as allocated:
            model(x).sum().backward()
        assert allocated.count(torch.Size((48, 48))) == 0


def test_no_warning_is_new():
    ours, _ = pair("lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(inputs()).sum().backward()
