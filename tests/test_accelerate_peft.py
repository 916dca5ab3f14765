"""What PEFT does to its models, done to accelerated ones."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft_models import (
    MARKS,
    PATHS,
    agree,
    every_case,
    every_method,
    fill,
    inputs,
    make_tower,
    pair,
    peft,
    peft_model,
    wide_fourier,
)

import fastpeft
from fastpeft.interop.layer import Accelerated

pytestmark = MARKS


def switch(model):
    model.set_adapter("other")


def activate_both(model):
    model.base_model.set_adapter(["default", "other"])


def merge_and_unmerge(model):
    model.merge_adapter()
    model(inputs())
    model.unmerge_adapter()


def disable_and_enable(model):
    with model.disable_adapter():
        model(inputs())


def delete(model):
    model.delete_adapter("default")


def rescale(model):
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 3)


def add_weighted(model):
    kind = "cat" if isinstance(model.peft_config["default"], peft.LoraConfig) else None
    model.add_weighted_adapter(["default", "other"], [0.7, -0.2], "both", combination_type=kind)
    model.set_adapter("both")


def add_later(model):
    config = copy.deepcopy(model.peft_config["other"])
    model.add_adapter("later", config)
    model.set_adapter("later")
    fill(model, seed=5)


def freeze(model):
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def thaw_base(model):
    model.base_model.model.blocks[0].inner["up"].base_layer.requires_grad_(True)


OPERATIONS = {
    f.__name__: f
    for f in (switch, activate_both, merge_and_unmerge, disable_and_enable, delete, add_later, freeze, thaw_base)
}


@every_method
@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_peft_does_to_a_model(case, operation, calls):
    ours, theirs = pair(case, second=True)
    ours.eval()(inputs())  # so that there is something to be out of date
    calls.clear()
    for model in (ours, theirs):
        OPERATIONS[operation](model)
    calls.clear()
    agree(ours, theirs)
    assert calls["ours"] > 0 and calls["peft"] == 0


@pytest.mark.parametrize("operation", [rescale, add_weighted])
def test_what_peft_does_to_lora(operation, calls):
    ours, theirs = pair("lora", second=True)
    ours.eval()(inputs())
    for model in (ours, theirs):
        operation(model)
    calls.clear()
    agree(ours, theirs)
    assert calls["ours"] > 0 and calls["peft"] == 0


@every_method
def test_merged_and_disabled_layers_are_peft_s(case, calls):
    ours, theirs = pair(case, second=True)
    for model in (ours, theirs):
        model.eval()
    x = inputs()
    ours(x)
    calls.clear()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(x), theirs(x))
    for model in (ours, theirs):
        model.merge_adapter()
    assert torch.equal(ours(x), theirs(x))
    assert calls["ours"] == 0 and calls["peft"] > 0
    assert torch.equal(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


@every_method
def test_merge_and_unload(case):
    ours, theirs = pair(case)
    ours.eval()(inputs())
    merged = ours.merge_and_unload()
    assert torch.equal(merged(inputs()), theirs.merge_and_unload()(inputs()))
    assert not any(isinstance(module, Accelerated) for module in merged.modules())


@every_case
def test_save_and_load(case, tmp_path):
    ours, theirs = pair(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*") if path.is_file()]
    for file in files:
        if file.name == "adapter_config.json":  # sets are written in any order
            mine, their = (json.loads((tmp_path / side / file).read_text()) for side in ("ours", "theirs"))
            assert sorted(mine.pop("target_modules")) == sorted(their.pop("target_modules")) and mine == their
            continue
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file
    loaded = peft.PeftModel.from_pretrained(make_tower(case), tmp_path / "ours", is_trainable=True)
    fastpeft.accelerate(loaded, strict=True)
    agree(loaded, theirs)
    if "options" not in case and case != "lora-only":  # PEFT has one adapter alone train biases
        loaded.load_adapter(tmp_path / "theirs", "again", is_trainable=True)
        loaded.set_adapter("again")
        loaded.eval(), theirs.eval()
        torch.testing.assert_close(loaded(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


@every_case
def test_the_model_keeps_all_that_it_had(case):
    model = peft_model(case)
    before = {
        "state": list(model.state_dict()),
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "buffers": [(name, id(b)) for name, b in model.named_buffers()],
        "modules": [(path, id(module)) for path, module in model.named_modules()],
        "repr": repr(model),
        "instances": {
            p: [c for c in type(m).__mro__ if c.__module__.startswith("peft")] for p, m in model.named_modules()
        },
        "trainable": model.get_nb_trainable_parameters(),
        "values": {key: value.clone() for key, value in model.state_dict().items()},
    }
    report = fastpeft.accelerate(model)
    assert sorted(report.accelerated) == sorted(PATHS) and not report.left_alone
    model(inputs()).sum().backward()
    assert list(model.state_dict()) == before["state"]
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before["parameters"]
    assert [(name, id(b)) for name, b in model.named_buffers()] == before["buffers"]
    assert [(path, id(module)) for path, module in model.named_modules()] == before["modules"]
    assert repr(model) == before["repr"]
    assert model.get_nb_trainable_parameters() == before["trainable"]
    for path, module in model.named_modules():
        assert all(isinstance(module, peft_class) for peft_class in before["instances"][path]), path
    if case != "coft":  # its forward writes to the parameters, PEFT's as well
        assert all(torch.equal(value, before["values"][key]) for key, value in model.state_dict().items())


def test_constrained_rotations_are_written_back_as_peft_does():
    ours, theirs = pair("coft")
    for training in (True, False):
        fill(ours, seed=4), fill(theirs, seed=4)
        before = [p.clone() for p in ours.parameters()]
        with torch.no_grad():
            ours.train(training)(inputs()), theirs.train(training)(inputs())
        assert any(not torch.equal(old, new) for old, new in zip(before, ours.parameters(), strict=True))
        for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@every_case
@pytest.mark.parametrize("how", COPIES)
def test_copies(case, how, calls):
    ours, theirs = pair(case)
    ours.eval()(inputs())
    made = COPIES[how](ours)
    assert not {id(p) for p in made.parameters()} & {id(p) for p in ours.parameters()}
    calls.clear()
    agree(made, theirs)
    assert calls["ours"] > 0 and calls["peft"] == 0
    with torch.no_grad():  # a copy that changes does not change the other
        y = ours(inputs())
        fill(made, seed=9)
        assert torch.equal(ours(inputs()), y) and not torch.equal(made(inputs()), y)


@every_case
def test_values_that_change_in_any_way_are_seen(case):
    ours, theirs = pair(case)
    ours.eval(), theirs.eval()
    x = inputs()
    with torch.no_grad():
        ours(x)
        for model in (ours, theirs):
            fill(model, seed=2)  # in place
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for model in (ours, theirs):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data * 1.1
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        state = {key: value * 0.9 for key, value in theirs.state_dict().items()}
        for model in (ours, theirs):
            model.load_state_dict(state, assign=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for model in (ours, theirs):
            model.double()
        with wide_fourier():
            torch.testing.assert_close(ours(x.double()), theirs(x.double()), rtol=1e-9, atol=1e-9)


def test_adapter_names(calls):
    ours, theirs = pair("lora", second=True)
    ours.eval(), theirs.eval()
    names = ["default", "other", "__base__"]
    assert torch.equal(ours(inputs(3, 16), adapter_names=names), theirs(inputs(3, 16), adapter_names=names))
    assert calls["ours"] == 0


def test_casting_of_inputs_switched_off():
    ours, theirs = pair("lora")
    for model in (ours, theirs):
        model.base_model.model.blocks[0].inner["up"].lora_A.half()
        model.base_model.model.blocks[0].inner["up"].lora_B.half()
    with peft.helpers.disable_input_dtype_casting(ours):
        with pytest.raises(RuntimeError):
            ours(inputs())
    agree(ours, theirs)
