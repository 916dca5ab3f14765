"""PEFT's models computed by our operators: the oracle is the very same model before it was accelerated.

Tolerances: the exact value is PEFT's model in float64 with the same numbers in it, and an accelerated model may err at
most twice as much as PEFT's own in the same dtype (``helpers.Errors``).
"""

import copy
import json
import pickle
import re
import sys
import warnings
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from helpers import Allocations, Errors
from torch import nn
from torch.nn import functional as F

import fastpeft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners import ia3, lora  # noqa: E402 (after the skip)
from peft.tuners.boft import layer as peft_boft  # noqa: E402
from peft.tuners.fourierft import layer as peft_fourierft  # noqa: E402
from peft.tuners.oft import layer as peft_oft  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

from fastpeft.interop.layer import Accelerated, Plan  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors here are far too small to share, and on a busy machine threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_cuda_helper(monkeypatch):
    """PEFT as it is where its CUDA helper does not build, without the attempt to build it: BOFT has one factor."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)


@pytest.fixture
def cuda_helper(monkeypatch, no_cuda_helper):
    """PEFT as it is where the helper builds, with the one function that it takes from there written in PyTorch."""
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(
        peft_boft.FastBlockDiag, "apply", lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts by whom accelerated layers were computed, "ours" or "peft"."""
    counted = Counter()
    forward, run = Accelerated.forward, Plan.run

    def count_run(self, x):
        y = run(self, x)
        counted["ours" if y is not None else "none"] += 1
        return y

    def count_forward(self, *args, **kwargs):
        before = counted["ours"]
        y = forward(self, *args, **kwargs)
        counted["peft"] += counted["ours"] == before
        return y

    monkeypatch.setattr(Plan, "run", count_run)
    monkeypatch.setattr(Accelerated, "forward", count_forward)
    return counted


# ---------------------------------------------------------------------- models


class Block(nn.Module):
    def __init__(self, width, hidden, transposed):
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width, bias=False)})
        self.mix = Conv1D(width, width) if transposed else nn.Linear(width, width)

    def forward(self, x):
        return x + self.mix(self.inner["down"](torch.tanh(self.inner["up"](x))))


class Tower(nn.Module):
    """Layers in nested modules: with a bias and without, rectangular, and one that keeps its weight transposed."""

    def __init__(self, width=16, hidden=24, transposed=True):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden, transposed) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


TARGETS = ["up", "down", "mix"]
PATHS = [f"base_model.model.blocks.{i}.{name}" for i in range(2) for name in ("inner.up", "inner.down", "mix")]

CASES = {
    "lora": lambda **o: peft.LoraConfig(r=4, lora_alpha=6, **o),
    "lora-options": lambda **o: peft.LoraConfig(
        r=4, lora_alpha=2, lora_dropout=0.3, use_rslora=True, rank_pattern={"up": 3}, alpha_pattern={"down": 3},
        bias="all", modules_to_save=["head"], **o,
    ),
    "lora-only": lambda **o: peft.LoraConfig(r=2, lora_alpha=2, bias="lora_only", **o),
    "dora": lambda **o: peft.LoraConfig(r=4, use_dora=True, **o),
    "dora-options": lambda **o: peft.LoraConfig(r=4, use_dora=True, lora_dropout=0.3, bias="all", **o),
    "boft": lambda **o: peft.BOFTConfig(boft_block_size=4, **o),
    "boft-options": lambda **o: peft.BOFTConfig(
        boft_block_size=0, boft_block_num=2, boft_dropout=0.5, bias="boft_only", **o
    ),
    "fourierft": lambda **o: peft.FourierFTConfig(n_frequency=40, scaling=15.0, **o),
    "fourierft-options": lambda **o: peft.FourierFTConfig(
        n_frequency=40, n_frequency_pattern={"up": 9}, scaling=10.0, random_loc_seed=3, bias="all", **o
    ),
    "oft": lambda **o: peft.OFTConfig(oft_block_size=4, **o),
    "oft-options": lambda **o: peft.OFTConfig(
        r=2, oft_block_size=0, block_share=True, use_cayley_neumann=False, bias="oft_only", **o
    ),
    "coft": lambda **o: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.3, **o),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)
# One of each method.
METHODS = ["lora", "dora", "boft", "fourierft", "oft"]
every_method = pytest.mark.parametrize("case", METHODS)


VALUES = re.compile(r"\.(lora_[AB](?!.*bias)|lora_magnitude_vector|boft_[Rs]|fourierft_spectrum|oft_R)\.")


def fill(model, seed=0):
    """Random numbers in every adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if found := re.search(
                r"\.(lora_[AB](?!.*bias)|lora_magnitude_vector|boft_[Rs]|fourierft_spectrum|oft_R)\.", name
            ):
                values = torch.randn(parameter.shape, generator=generator)
                if found[1] in ("lora_A", "lora_B"):
                    parameter.copy_(values * parameter.shape[1] ** -0.5)
                elif found[1] in ("boft_s", "lora_magnitude_vector"):
                    parameter.mul_(1 + values / 4)
                else:
                    parameter.copy_(values * (0.1 if found[1] == "oft_R" else 0.4))
    return model


def make_tower(case):
    torch.manual_seed(0)
    return Tower(transposed="oft" not in case)  # which OFT and BOFT do not take


def peft_model(case, *, second=False, **options):
    options = {"target_modules": TARGETS, **options}
    model = peft.get_peft_model(make_tower(case), CASES[case](**options))
    if second:
        model.add_adapter("other", CASES[case](**options))
    return fill(model)


def pair(case, **options):
    """The same model twice: accelerated, and as PEFT made it."""
    theirs = peft_model(case, **options)
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours, strict=True)
    return ours, theirs


def inputs(*shape, seed=1):
    return torch.randn(*(shape or (2, 5, 16)), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- comparing


@contextmanager
def wide_fourier():
    """FourierFTLayer.get_delta_weight in the spectrum's dtype, where PEFT's own goes through float32 in any."""

    def get_delta_weight(self, adapter):
        spectrum, (rows, cols) = self.fourierft_spectrum[adapter], self.indices[adapter]
        dense = torch.zeros(self.out_features, self.in_features, dtype=spectrum.dtype)
        dense[rows, cols] = spectrum
        return torch.fft.ifft2(dense).real * self.fourierft_scaling[adapter]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_fourierft.FourierFTLayer, "get_delta_weight", get_delta_weight)
        yield


def results(model, x, seed=7, **kwargs):
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    y = model(x, **kwargs)
    found = {"y": y.detach()}
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
        found["dx"] = x.grad
        found |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(*draws):
    """Each draw is what was found, what PEFT gives, and what is exact, by name; tensors of one kind are averaged."""
    errors = Errors()
    for found, composed, exact in draws:
        assert found.keys() == composed.keys() == exact.keys()
        for name, right in exact.items():
            assert found[name].dtype == composed[name].dtype, name
            kind = ".".join(part for part in name.split(".")[-3:] if not part.isdigit())
            errors.add(kind, found[name], right, (composed[name], right))
    errors.check()


def agree(ours, theirs, *shape, dtype=torch.float32, **kwargs):
    """That an accelerated model computes what PEFT's does: outputs and gradients, training and not."""
    exact = copy.deepcopy(theirs).double()
    for training in (True, False):
        for model in (ours, theirs, exact):
            model.train(training)
        draws = []
        for seed in range(4):
            x = inputs(*shape, seed=seed).to(dtype)
            found, composed = results(ours, x, **kwargs), results(theirs, x, **kwargs)
            with wide_fourier(), same_dropout():
                draws.append((found, composed, results(exact, x.double(), **kwargs)))
            if not training:
                with torch.no_grad():
                    found = {"y": ours(x, **kwargs)}
                draws.append((found, {"y": composed["y"]}, {"y": draws[-1][2]["y"]}))
        assert_close(*draws)


@contextmanager
def same_dropout():
    """Dropout that draws the same mask in float64 as in float32."""
    dropout = F.dropout

    def draw(x, p=0.5, training=True, inplace=False):
        return x * dropout(torch.ones_like(x, dtype=torch.float32), p, training).to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "dropout", draw)
        yield


# ---------------------------------------------------------------------- what is computed


@every_case
def test_a_model_computes_what_it_computed(case, calls):
    ours, theirs = pair(case)
    agree(ours, theirs)
    assert calls["ours"] > 0 and calls["peft"] == 0


@every_method
@pytest.mark.parametrize("shape", [(1, 16), (0, 16), (3, 0, 16), (3, 2, 16)], ids=str)
def test_leading_shapes(case, shape):
    ours, theirs = pair(case)
    ours.eval(), theirs.eval()
    x = inputs(*shape)
    y = ours(x)
    assert y.shape == (*shape[:-1], 3)
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-5)


def test_butterfly_factors_of_peft_with_its_cuda_helper(cuda_helper, calls):
    ours, theirs = pair("boft", second=True)
    for factors in (2, 3):
        base = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
        torch.manual_seed(0)
        config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factors, target_modules=["0", "1"])
        theirs = fill(peft.get_peft_model(base, config))
        ours = copy.deepcopy(theirs)
        fastpeft.accelerate(ours, strict=True)
        assert ours.base_model.model[0].boft_R["default"].shape[0] == factors
        agree(ours, theirs)
    assert calls["peft"] == 0


@every_case
def test_training_gives_the_same_parameters(case):
    ours, theirs = pair(case)
    exact = copy.deepcopy(theirs).double()
    trained = []
    for model, x in ((ours, inputs()), (theirs, inputs()), (exact, inputs().double())):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        model.train()
        torch.manual_seed(3)
        with wide_fourier(), same_dropout():
            for _ in range(4):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        trained.append({"y": model.eval()(x).detach(), **{n: p.detach() for n, p in model.named_parameters()}})
    assert all(torch.isfinite(model["y"]).all() for model in trained)
    assert_close(tuple(trained))
    assert not torch.equal(trained[0]["y"], pair(case)[0].eval()(inputs()))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapters", ["float32", "same"])
def test_half_precision(case, dtype, adapters, calls):
    """PEFT keeps adapters in float32 unless it is told not to. What is exact is the model in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16, bias=False)).to(dtype)
    theirs = peft.get_peft_model(
        base, CASES[case](target_modules=["0", "1"]), autocast_adapter_dtype=adapters != "same"
    )
    fill(theirs)
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours, strict=True)
    agree(ours, theirs, 3, 16, dtype=dtype)
    assert calls["ours"] > 0


@every_method
def test_autocast(case):
    ours, theirs = pair(case)
    exact = copy.deepcopy(theirs).double()
    draws = []
    for seed in range(4):
        x = inputs(seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            found, composed = results(ours, x), results(theirs, x)
        with wide_fourier():
            right = results(exact, x.double())
        assert {k: v.dtype for k, v in found.items()} == {k: v.dtype for k, v in composed.items()}
        for side in (found, composed):  # rounded to bfloat16 on the way, whatever they end in
            side["y"] = side["y"].bfloat16()
        draws.append((found, composed, right))
    assert_close(*draws)


def test_tied_layers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    theirs = fill(peft.get_peft_model(Tied(), CASES["lora"](target_modules=["a"])))
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours)
    agree(ours, theirs)


# ---------------------------------------------------------------------- what PEFT does to its models


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
        if isinstance(module, lora.LoraLayer):
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


# ---------------------------------------------------------------------- hooks, and calls of other forms


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
def test_compiled_as_one_graph(case):
    ours, theirs = pair(case)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (False, True):
        ours.train(training)
        if training and case == "boft-options":  # PEFT's dropout asks the random numbers back
            continue
        torch.manual_seed(5)
        found = compiled(inputs())
        torch.manual_seed(5)
        torch.testing.assert_close(found, ours(inputs()), rtol=1e-4, atol=1e-5)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(compiled(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


@every_method
def test_compiled_models_follow_their_adapters(case):
    ours, theirs = pair(case, second=True)
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


def language_model(kind):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":  # all of its layers are Conv1D
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **sizes)
        return transformers.GPT2LMHeadModel(config), ["c_attn", "c_fc"]
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes
    )
    return transformers.LlamaForCausalLM(config), "all-linear"


@every_method
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generation_and_training_of_language_models(case, kind, calls):
    if kind == "gpt2" and "oft" in case:
        with pytest.raises(TypeError, match="Conv1D"):
            peft.get_peft_model(language_model(kind)[0], CASES[case](target_modules=["c_attn"]))
        return
    base, targets = language_model(kind)
    theirs = fill(peft.get_peft_model(base, CASES[case](target_modules=targets, task_type="CAUSAL_LM")))
    ours = copy.deepcopy(theirs)
    fastpeft.accelerate(ours, strict=True)
    tokens = torch.tensor([[5, 9, 33, 7], [11, 12, 13, 14]])
    mask = torch.ones_like(tokens)
    found, wanted = (
        model.eval().generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, output_scores=True,
            return_dict_in_generate=True,
        )
        for model in (ours, theirs)
    )  # fmt: skip
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(wanted.scores), rtol=1e-3, atol=1e-4)
    for model in (ours, theirs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(input_ids=tokens, attention_mask=mask, labels=tokens).loss.backward()
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (their.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert calls["ours"] > 0 and calls["peft"] == 0


# ---------------------------------------------------------------------- mixed and nested models


def test_mixed_models(calls):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(make_tower("oft"), CASES["lora"](target_modules=["up", "mix"]), "one", mixed=True)
    theirs.add_adapter("two", CASES["oft"](target_modules=["up", "down"]))
    theirs.add_adapter("three", peft.LoHaConfig(r=2, target_modules=["down", "mix"], init_weights=False))
    fill(theirs)
    theirs.set_adapter(["one", "two"])
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert {path.partition("blocks.")[2] for path in report.left_alone} >= {"0.mix", "1.mix"}
    assert all("LoHa" in reason or "loha" in reason for reason in report.left_alone.values())
    assert any(path.endswith("inner.up") for path in report.accelerated)
    agree(ours, theirs)
    assert calls["ours"] > 0
    for model in (ours, theirs):
        model.set_adapter(["three", "one", "two"])
    agree(ours, theirs)


def test_peft_models_inside_others():
    torch.manual_seed(0)
    inside = peft.get_peft_model(Tower(), CASES["lora"](target_modules=TARGETS))
    theirs = fill(nn.Sequential(nn.Linear(16, 16), inside, nn.Linear(3, 2)))
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert sorted(report.accelerated) == sorted(f"1.{path}" for path in PATHS)
    agree(ours, theirs)


def test_injected_adapters():
    torch.manual_seed(0)
    theirs = fill(peft.inject_adapter_in_model(CASES["boft"](target_modules=TARGETS), make_tower("boft")))
    ours = copy.deepcopy(theirs)
    assert len(fastpeft.accelerate(ours).accelerated) == 6
    agree(ours, theirs)


# ---------------------------------------------------------------------- accelerate, decelerate and what they refuse


@every_case
def test_decelerate_gives_peft_s_model_back(case):
    ours, theirs = pair(case)
    ours.eval()(inputs())
    assert fastpeft.decelerate(ours) is ours
    for (path, mine), their in zip(ours.named_modules(), theirs.modules(), strict=True):
        assert type(mine) is type(their), path
        assert vars(mine).keys() == vars(their).keys(), path
    if case == "coft":  # its forward has written to the parameters
        theirs.load_state_dict(ours.state_dict())
    for (name, mine), (_, their) in zip(
        results(ours, inputs()).items(), results(theirs.eval(), inputs()).items(), strict=True
    ):
        assert torch.equal(mine, their), name


def test_twice_is_harmless():
    ours, theirs = pair("lora")
    ours(inputs())
    report = fastpeft.accelerate(ours)
    assert sorted(report.accelerated) == sorted(PATHS)
    agree(ours, theirs)
    fastpeft.decelerate(ours)
    fastpeft.decelerate(ours)
    assert not any(isinstance(module, Accelerated) for module in ours.modules())


def test_twice_takes_what_came_later(calls):
    ours, theirs = pair("lora", target_modules=["up"])
    for model in (ours, theirs):
        model.add_adapter("other", CASES["lora"](target_modules=["down"]))
        model.set_adapter("other")
        fill(model)
    assert len(fastpeft.accelerate(ours, strict=True).accelerated) == 4
    agree(ours, theirs)
    assert calls["peft"] > 0  # layers without an active adapter are the base alone


def test_twice_while_merged_keeps_what_is_accelerated():
    ours, theirs = pair("lora")
    ours.merge_adapter()
    assert len(fastpeft.accelerate(ours, strict=True).accelerated) == 6
    ours.unmerge_adapter()
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs()), theirs(inputs()), rtol=1e-4, atol=1e-5)


def test_an_adapter_added_later_that_is_not_covered_is_computed_by_peft(calls):
    ours, theirs = pair("lora")
    ours(inputs())
    for model in (ours, theirs):
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, lora_bias=True, target_modules=["up"], init_lora_weights=False))
        model.set_adapter("other")
        fill(model)
    calls.clear()
    agree(ours, theirs)
    assert calls["ours"] == 0
    report = fastpeft.accelerate(ours)
    assert sorted(report.left_alone) == [path for path in PATHS if path.endswith("up")]
    assert "adapter 'other': lora_B has a bias (lora_bias)" in str(report)
    assert type(ours.base_model.model.blocks[0].inner["up"]) is lora.Linear


def merged(model):
    model.merge_adapter()


def mixed_dtypes(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_B.bfloat16()


def integers(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"].weight = nn.Parameter(torch.ones(4, 16).char(), requires_grad=False)


def other_shape(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"].weight = nn.Parameter(torch.ones(4, 17))


def other_module(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_A["default"] = nn.Sequential()


def other_dropout(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].lora_dropout["default"] = nn.AlphaDropout()


def replaced_forward(model):
    for block in model.base_model.model.blocks:
        block.inner["up"].forward = block.inner["up"].forward


def new_option(model):
    for block in model.base_model.model.blocks:
        layer = block.inner["up"]
        layer.other_param_names = (*layer.other_param_names, "lora_gate")
        layer.lora_gate = {}


def older_version(model):
    for block in model.base_model.model.blocks:
        del block.inner["up"].lora_variant


def subclass(model):
    class Custom(lora.Linear):
        pass

    for block in model.base_model.model.blocks:
        block.inner["up"].__class__ = Custom


REFUSED = {
    merged: "default merged already: unmerge first",
    mixed_dtypes: "lora_B is of torch.bfloat16 and lora_A of torch.float32",
    integers: "lora_A is of torch.int8",
    other_shape: "lora_A has shape (4, 17), not (4, 16)",
    other_module: "lora_A is a Sequential",
    other_dropout: "lora_dropout is a AlphaDropout",
    replaced_forward: "its forward was replaced on the instance",
    new_option: "its adapters have lora_gate, which this version of fastpeft does not know",
    older_version: "it has no lora_variant, so its version of PEFT is one that fastpeft does not know",
    subclass: "Custom",
}


def snapshot(model):
    return [(path, type(module), dict(vars(module))) for path, module in model.named_modules()]


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda f: f.__name__)
def test_layers_that_do_not_fit_are_listed_and_left_as_they_are(spoil):
    model = peft_model("lora", target_modules=["up"])
    spoil(model)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"layer 'base_model\.model\.blocks\.0\.inner\.up' cannot be accelerated"
    ) as error:
        fastpeft.accelerate(model, strict=True)
    assert REFUSED[spoil] in str(error.value) and ", and 1 more" in str(error.value)
    report = fastpeft.accelerate(model)
    assert report.accelerated == [] and sorted(report.left_alone) == [path for path in PATHS if path.endswith("up")]
    for reason in report.left_alone.values():
        assert REFUSED[spoil] in reason
    assert REFUSED[spoil] in str(report)
    assert snapshot(model) == before


VARIANTS = {
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "ALoraLinearVariant"),
    "kasa": ({"kasa_config": peft.KasaConfig()}, "lora_diag"),
}


@pytest.mark.parametrize("option", VARIANTS)
def test_variants_of_lora_are_left_alone(option):
    options, reason = VARIANTS[option]
    model = peft.get_peft_model(Tower(), peft.LoraConfig(r=2, target_modules=["up"], **options))
    report = fastpeft.accelerate(model)
    assert not report.accelerated and all(reason in why for why in report.left_alone.values())


def test_what_else_is_left_alone_and_the_rest_accelerated():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.embedding = nn.Linear(8, 8), nn.Embedding(5, 8)
            self.conv, self.attention = nn.Conv2d(3, 4, 1), nn.MultiheadAttention(8, 2)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            y, _ = self.attention(x, x, x)
            return self.head(
                self.linear(y) + self.embedding(torch.arange(5)) + self.conv(torch.ones(1, 3, 2, 4)).flatten(2)[0, :1]
            )

    torch.manual_seed(0)
    targets = ["linear", "embedding", "conv", "attention"]
    theirs = peft.get_peft_model(Zoo(), peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["head"]))
    fill(theirs)
    ours = copy.deepcopy(theirs)
    report = fastpeft.accelerate(ours)
    assert report.accelerated == ["base_model.model.linear"]
    reasons = {path.removeprefix("base_model.model."): why for path, why in report.left_alone.items()}
    assert reasons.keys() == {"embedding", "conv", "attention", "attention.base_layer.out_proj"}
    assert "nn.MultiheadAttention reads its weight without calling it" == reasons["attention.base_layer.out_proj"]
    assert "peft.tuners.lora.layer.Conv2d" in reasons["conv"]
    lines = str(report).splitlines()
    assert lines[0] == "1 PEFT layers accelerated, 4 left alone" and len(lines) == 5
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(inputs(5, 8)), theirs(inputs(5, 8)), rtol=1e-4, atol=1e-5)


def test_other_methods_are_left_alone():
    model = peft.get_peft_model(Tower(), peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    report = fastpeft.accelerate(model)
    assert not report.accelerated and all("peft.tuners.ia3.layer.Linear" in why for why in report.left_alone.values())
    assert isinstance(model.base_model.model.blocks[0].inner["up"], ia3.Linear)


def test_places_outside_the_spectrum_are_refused():
    model = peft_model("fourierft", target_modules=["up"])
    model.base_model.model.blocks[0].inner["up"].indices["default"][0, 3] = 10**6
    report = fastpeft.accelerate(model)
    assert list(report.left_alone.values()) == ["rows must lie in [0, 24), got [0, 1000000]"]


def test_boft_adapters_that_peft_gives_one_permutation_are_left_alone(cuda_helper):
    config = {"boft_n_butterfly_factor": 2, "target_modules": ["0"], "init_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), peft.BOFTConfig(boft_block_size=2, **config))
    model.add_adapter("other", peft.BOFTConfig(boft_block_size=4, **config))
    assert "one permutation" in fastpeft.accelerate(model).left_alone["base_model.model.0"]


def test_a_series_of_another_peft_is_left_alone(monkeypatch):
    import fastpeft.interop.peft.oft as ours

    assert ours.SERIES_IS_KNOWN
    monkeypatch.setattr(ours, "SERIES_IS_KNOWN", False)
    assert len(fastpeft.accelerate(peft_model("oft")).left_alone) == 6
    assert not fastpeft.accelerate(peft_model("oft-options")).left_alone


def test_models_without_peft_layers():
    for model in (Tower(), nn.Sequential(), fastpeft.adapt(Tower(), fastpeft.LoraConfig(target_modules=["up"]))):
        with pytest.raises(ValueError, match=r"model must have PEFT layers, as peft\.get_peft_model makes them, got"):
            fastpeft.accelerate(model)
        assert fastpeft.decelerate(model) is model
    for function in (fastpeft.accelerate, fastpeft.decelerate):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
            function("model")


def test_a_peft_that_lacks_what_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpeft.interop.peft", None)
    with pytest.raises(ValueError, match=rf"PEFT must be a version like 0\.21, got {re.escape(peft.__version__)}"):
        fastpeft.accelerate(peft_model("lora"))


# ---------------------------------------------------------------------- cost


@pytest.mark.parametrize("case", ["lora", "oft"])
def test_accelerating_a_skeleton_of_seven_billion_parameters_allocates_nothing(case):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            for name in "qkvo":
                setattr(self, name, nn.Linear(4096, 4096, bias=False))
            self.gate, self.up = nn.Linear(4096, 11008, bias=False), nn.Linear(4096, 11008, bias=False)
            self.down = nn.Linear(11008, 4096, bias=False)

    with torch.device("meta"):
        model = nn.Sequential(*(Layer() for _ in range(32)))
        config = CASES[case](target_modules=["q", "k", "v", "o", "gate", "up", "down"])
        model = peft.get_peft_model(model, config)
    with Allocations() as allocated:
        report = fastpeft.accelerate(model, strict=True)
    assert len(report.accelerated) == 7 * 32
    assert max((torch.Size(shape).numel() for _, shape in allocated.made), default=0) <= 4096


def test_places_are_shared_by_layers_of_one_shape():
    ours, _ = pair("fourierft")
    ups = [block.inner["up"] for block in ours.base_model.model.blocks]
    assert ups[0]._prepared["default"] is ups[1]._prepared["default"]
    assert copy.deepcopy(ups[0])._prepared["default"] is ups[0]._prepared["default"]


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


def test_all_four_methods_are_covered():
    from fastpeft.interop.peft import METHODS

    assert set(METHODS) == {lora.Linear, peft_boft.Linear, peft_fourierft.FourierFTLinear, peft_oft.Linear}


def test_no_warning_is_new():
    ours, _ = pair("lora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(inputs()).sum().backward()
