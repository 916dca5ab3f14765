"""Adapters in files: saving, loading, and saves that break off."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    BOFT,
    FOURIERFT,
    IN,
    LORA,
    METHODS,
    MOS,
    OFT,
    Method,
    assert_unchanged,
    every_method,
    fill,
    randn,
    run,
    snapshot,
)
from safetensors.torch import load_file, save_file
from small_models import ALL_LINEAR, Model, adapted_model, adapted_paths
from torch import nn

import fastpeft
from fastpeft.nn import Adapted


def files_of(folder: Path) -> set[str]:
    return set(os.listdir(folder))


FILES = {"adapter_model.safetensors", "adapter_config.json"}


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded(method: Method, dtype: torch.dtype, tmp_path: Path):
    model, x = adapted_model(method, model=Model().to(dtype)), randn(5, IN, dtype=dtype)
    folder = tmp_path / "new" / "folder"
    fastpeft.save_adapter(model, str(folder))
    assert files_of(folder) == FILES
    other = Model().to(dtype)
    assert fastpeft.load_adapter(other, folder) is other
    assert torch.equal(other(x), model(x))
    assert run(other, x).gradients.keys() == run(model, x).gradients.keys()
    assert adapted_paths(other) == ALL_LINEAR
    assert snapshot(other)["types"] == snapshot(model)["types"]


@every_method
def test_what_the_configuration_file_says(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted_model(method), tmp_path / "all")
    values = json.loads((tmp_path / "all" / "adapter_config.json").read_text())
    assert values["peft_type"] == method.make_config.peft_type
    assert values["target_modules"] == sorted(ALL_LINEAR)  # what "all-linear" meant
    assert all(values[name] == value for name, value in method.options)
    fastpeft.save_adapter(adapted_model(method, target_modules=["q", "up"]), tmp_path / "some")
    assert json.loads((tmp_path / "some" / "adapter_config.json").read_text())["target_modules"] == ["q", "up"]


def test_mos_writes_each_pool_once(tmp_path: Path):
    model = adapted_model(MOS)
    fastpeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kinds = ["q.24x24", "v.24x24", "up.16x24", "down.24x16"]
    assert {key for key in tensors if key.startswith("pools.")} == {f"pools.{k}.pool_{s}" for k in kinds for s in "AB"}
    indices = {f"layers.{path}.index_{side}" for path in ALL_LINEAR for side in "AB"}
    assert {key for key in tensors if not key.startswith("pools.")} == indices
    numbers = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("pools."))
    assert numbers == sum(parameter.numel() for parameter in fastpeft.adapter_parameters(model))


def test_mos_files_do_not_rest_on_a_random_generator(tmp_path: Path):
    model = adapted_model(MOS)
    fastpeft.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in tensors:
        if "index" in key:
            tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, path)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Adapted):
                for name in ("index_A", "index_B"):
                    index = getattr(layer.adapters["default"], name)
                    index.copy_(index.flip(0))
    torch.testing.assert_close(fastpeft.load_adapter(Model(), tmp_path)(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_loading_into_the_same_adapter_keeps_its_parameters(method: Method, tmp_path: Path):
    saved = adapted_model(method, values=1)
    fastpeft.save_adapter(saved, tmp_path)
    model = adapted_model(method, values=2)
    optimizer = torch.optim.SGD(fastpeft.adapter_parameters(model), lr=0.1)
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    fastpeft.load_adapter(model, tmp_path)
    assert torch.equal(model(randn(5, IN)), saved(randn(5, IN)))
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    model(randn(5, IN)).sum().backward()
    optimizer.step()
    assert not torch.equal(model(randn(5, IN)), saved(randn(5, IN)))


@every_method
def test_loading_into_another_adapter_of_that_name_is_refused(method: Method, tmp_path: Path):
    fastpeft.save_adapter(adapted_model(method), tmp_path)
    other = next(candidate for candidate in METHODS if candidate is not method)
    changes = {
        LORA: {"lora_alpha": 7},
        MOS: {"seed": 3},
        BOFT: {"boft_dropout": 0.5},
        FOURIERFT: {"scaling": 7.0},
        OFT: {"use_cayley_neumann": False},
    }
    for model in (
        adapted_model(method, **changes[method]),
        adapted_model(other),
        adapted_model(method, target_modules=["q"]),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError) as caught:
            fastpeft.load_adapter(model, tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert_unchanged(model, before)


@every_method
def test_loading_beside_another_adapter(method: Method, tmp_path: Path):
    saved = adapted_model(method)
    fastpeft.save_adapter(saved, tmp_path)
    model = adapted_model(LORA, "first", values=5)
    expected = model(randn(5, IN))
    fastpeft.load_adapter(model, tmp_path, adapter_name="second")
    assert torch.equal(model(randn(5, IN)), saved(randn(5, IN)))
    fastpeft.set_adapter(model, "first")
    assert torch.equal(model(randn(5, IN)), expected)


@every_method
def test_loading_a_file_of_another_dtype(method: Method, tmp_path: Path):
    """Values come in the file's dtype and parameters in the layer's."""
    model = adapted_model(method)
    for parameter in fastpeft.adapter_parameters(model):  # numbers that bfloat16 holds
        parameter.data = parameter.data.bfloat16().float()
    fastpeft.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for dtype in (torch.bfloat16, torch.float64):
        save_file({k: t.to(dtype) if t.is_floating_point() else t for k, t in load_file(path).items()}, path)
        other = fastpeft.load_adapter(Model(), tmp_path)
        assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
        assert {parameter.dtype for parameter in fastpeft.adapter_parameters(other)} == {torch.float32}


def test_patterns_survive_a_file(tmp_path: Path):
    model = adapted_model(LORA, rank_pattern={"q": 2, r".*\.0\.up": 5}, alpha_pattern={"down": 3.0})
    fastpeft.save_adapter(model, tmp_path)
    other = fastpeft.load_adapter(Model(), tmp_path)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))
    assert other.blocks[0].up.adapters["default"].r == 5
    assert other.blocks[1].up.adapters["default"].r == 4


@every_method
def test_one_module_in_two_places_is_saved_once(method: Method, tmp_path: Path):
    def make() -> Model:
        model = Model(n_blocks=1)
        model.blocks.append(model.blocks[0])
        return model

    model = adapted_model(method, model=make())
    fastpeft.save_adapter(model, tmp_path)
    assert torch.equal(fastpeft.load_adapter(make(), tmp_path)(randn(5, IN)), model(randn(5, IN)))


@every_method
def test_layers_made_one_by_one_are_saved_right_or_not_at_all(method: Method, tmp_path: Path):
    """Such layers do not know where in a model they stand; writing them over one another would lose them silently."""

    def make(seed: int) -> nn.Sequential:
        model = Model().blocks[0].attention
        layers = [method.layer_class.from_linear(model[name], method.config()) for name in "qv"]
        return fill(nn.Sequential(*layers), seed)

    model, other = make(seed=1), make(seed=2)
    try:
        fastpeft.save_adapter(model, tmp_path)
    except ValueError:
        return
    fastpeft.load_adapter(other, tmp_path)
    assert torch.equal(other(randn(5, IN)), model(randn(5, IN)))


def test_which_adapter_is_saved(tmp_path: Path):
    model = adapted_model(LORA, "a", values=1)
    adapted_model(BOFT, "b", values=2, model=model)
    fastpeft.set_adapter(model, ["a", "b"])
    for name, words in ((None, ["adapter_name", "'a', 'b'"]), ("c", ["adapter_name", "a, b", "'c'"])):
        with pytest.raises(ValueError) as caught:
            fastpeft.save_adapter(model, tmp_path / "x", name)
        assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "x").exists()
    fastpeft.save_adapter(model, tmp_path, "b")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOFT"
    fastpeft.set_adapter(model, "a")
    fastpeft.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    fastpeft.set_adapter(model, None)
    with pytest.raises(ValueError, match="adapter_name must be given"):
        fastpeft.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"adapter_name must be .*\(none\)|adapter_name must be given"):
        fastpeft.save_adapter(Model(), tmp_path)


def test_saving_where_a_file_stands(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="folder must name a folder"):
        fastpeft.save_adapter(adapted_model(LORA), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


def test_other_files_in_the_folder_are_left_alone(tmp_path: Path):
    (tmp_path / "README.md").write_text("mine")
    fastpeft.save_adapter(adapted_model(LORA), tmp_path)
    assert files_of(tmp_path) == FILES | {"README.md"}


# Saving that breaks off


def fail_at(function: Callable, which: int, error: type[BaseException]) -> Callable:
    """The function, but its n-th call raises instead."""
    calls = iter(range(which + 1))

    def wrapped(*args, **kwargs):
        if next(calls, None) == which:
            raise error("stopped")
        return function(*args, **kwargs)

    return wrapped


def full_disk(size: int) -> Callable[[], Callable[[], None]]:
    """No file may grow beyond a size; the call that it returns undoes it."""

    def begin() -> Callable[[], None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return begin


def patched(name: str, which: int, error: type[BaseException]) -> Callable[[], Callable[[], None]]:
    def begin() -> Callable[[], None]:
        patch = pytest.MonkeyPatch()
        patch.setattr(os, name, fail_at(getattr(os, name), which, error))
        return patch.undo

    return begin


BREAKS = {
    "disk full at once": full_disk(0),
    "disk full after some bytes": full_disk(1000),
    **{
        f"{error.__name__} in {name} of file {which}": patched(name, which, error)
        for name in ("fsync", "replace")
        for which in (0, 1)
        for error in (OSError, KeyboardInterrupt)
    },
}
# What the second save, the one that breaks off, writes over the first.
SECOND_SAVES = {
    "the same adapter trained on": (LORA, {}),
    "another alpha, so the same shapes": (LORA, {"lora_alpha": 60}),
    "another rank": (LORA, {"r": 2}),
    "another method": (BOFT, {}),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("second", SECOND_SAVES)
def test_a_save_that_breaks_off_leaves_an_adapter(broken: str, second: str, tmp_path: Path):
    """What is in the folder is the old adapter or the new one, never a mixture that loads."""
    x, old = randn(5, IN), adapted_model(LORA, values=1)
    method, changes = SECOND_SAVES[second]
    new = adapted_model(method, values=2, **changes)
    fastpeft.save_adapter(old, tmp_path)
    undo = BREAKS[broken]()
    try:
        with pytest.raises((OSError, KeyboardInterrupt)):
            fastpeft.save_adapter(new, tmp_path)
    finally:
        undo()
    assert files_of(tmp_path) == FILES
    y = fastpeft.load_adapter(Model(), tmp_path)(x)
    assert torch.equal(y, old(x)) or torch.equal(y, new(x))
    fastpeft.save_adapter(new, tmp_path)  # and then it works again
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(x), new(x))


@pytest.mark.parametrize("broken", BREAKS)
def test_a_first_save_that_breaks_off_leaves_no_litter(broken: str, tmp_path: Path):
    undo = BREAKS[broken]()
    try:
        with pytest.raises((OSError, KeyboardInterrupt)):
            fastpeft.save_adapter(adapted_model(LORA), tmp_path)
    finally:
        undo()
    assert files_of(tmp_path) < FILES
    with pytest.raises(FileNotFoundError):
        fastpeft.load_adapter(Model(), tmp_path)


@pytest.mark.parametrize("moved", [0, 1])
def test_a_save_that_is_killed_leaves_no_mixture(moved: int, tmp_path: Path):
    """Killed after none or one of the two files was moved into its place: nothing can be put back then."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import fastpeft
from helpers import LORA
from small_models import adapted_model
replace, moved = os.replace, []
def replace_or_die(*args):
    if len(moved) == {moved}:
        os._exit(9)
    moved.append(replace(*args))
os.replace = replace_or_die
fastpeft.save_adapter(adapted_model(LORA, values=2, lora_alpha=60), sys.argv[1])
"""
    x, old, new = randn(5, IN), adapted_model(LORA, values=1), adapted_model(LORA, values=2, lora_alpha=60)
    fastpeft.save_adapter(old, tmp_path)
    assert subprocess.run([sys.executable, "-c", script, tmp_path], check=False).returncode == 9
    try:
        y = fastpeft.load_adapter(Model(), tmp_path)(x)
    except ValueError:
        assert moved  # two files cannot be moved in one step, but the mixture can be seen
    else:
        assert torch.equal(y, old(x)) or torch.equal(y, new(x))
    fastpeft.save_adapter(new, tmp_path)
    assert torch.equal(fastpeft.load_adapter(Model(), tmp_path)(x), new(x))
