"""PEFT as the oracle: its models and ours with the same numbers in them, and what it means that the two agree.

Tolerances: the exact value is PEFT in float64 with the same (float32) numbers in it. Errors are relative, and a kind of
result (y, ∂L/∂x, all gradients of lora_A, …) has the root mean square of several draws' errors: a single small tensor's
is too much a matter of luck. In float32 ours may be at most twice PEFT's own, plus one rounding. In float64 it may be
that multiple of the finer rounding.
"""

import copy
import math
import re

import pytest
import torch
from torch import nn

import fastpeft

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.fourierft import layer as peft_fourierft  # noqa: E402 (after the skip)

# What every test here wants: see conftest.py.
MARKS = [
    pytest.mark.usefixtures("one_thread", "no_cuda_helper"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
]


def wide_delta_weight(self, adapter):
    """FourierFTLayer.get_delta_weight in the spectrum's dtype, where PEFT's own goes through float32 in any."""
    spectrum, (rows, cols) = self.fourierft_spectrum[adapter], self.indices[adapter]
    dense = torch.zeros(self.out_features, self.in_features, dtype=spectrum.dtype)
    dense[rows, cols] = spectrum
    return torch.fft.ifft2(dense).real * self.fourierft_scaling[adapter]


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Rectangular layers, with a bias and without, in a list as models have it, and a head that nobody adapts."""

    def __init__(self, width, hidden):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def make_tower(width, hidden, seed=0):
    torch.manual_seed(seed)
    return Tower(width, hidden)


def make_inputs(width, count=4):
    return [torch.randn(2, 9, width, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


EVERYWHERE = ["up", "down"]
NAMES = ("default", "other")


def peft_model(base, *configs, dtype=torch.float32, names=NAMES):
    """PEFT's model of a copy of the base, with random numbers in its adapters."""
    model = peft.get_peft_model(copy.deepcopy(base).to(dtype), copy.deepcopy(configs[0]), adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, copy.deepcopy(config))
    draw_values(model, seed=0)
    return model


def draw_values(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for (_, _, name), parameter in adapter_values(model).items():
        values = torch.randn(parameter.shape, generator=generator)  # in float32 whatever the parameter is
        spread = parameter.shape[1] ** -0.5 if name == "lora_A" else 0.3
        parameter.data.copy_(spread * values + (1.0 if name in ("boft_s", "lora_magnitude_vector") else 0.0))


PEFT_NAMES = re.compile(
    r"base_model\.model\.(?P<path>.*)\.(?P<key>lora_[AB]|lora_magnitude_vector|boft_[Rs]|fourierft_spectrum|oft_R)"
    r"\.(?P<adapter>\w+)"
)
OUR_NAMES = re.compile(
    r"(?P<path>.*)\.adapters\.(?P<adapter>\w+)\.(?P<key>lora_[AB]|lora_magnitude_vector|boft_[Rs]|spectrum|oft_R)"
)


def peft_key(name):
    """(adapter, path of the layer, parameter) for a PEFT parameter's name, or None for one of the base."""
    found = PEFT_NAMES.match(name)
    return found and (found["adapter"], found["path"], found["key"].removeprefix("fourierft_"))


def adapter_values(model):
    """The parameters of all adapters of a model, PEFT's or ours, by the same keys."""
    values = {}
    for name, parameter in model.named_parameters():
        if isinstance(model, peft.PeftModel):
            key = peft_key(name)
        else:
            found = OUR_NAMES.match(name)
            key = found and (found["adapter"], found["path"], found["key"])
        if key:
            values[key] = parameter
    return values


def our_model(base, theirs, *configs, dtype=torch.float32, names=NAMES):
    """Our model of a copy of the base, from the same configurations and with the same numbers as PEFT's."""
    model = copy.deepcopy(base).to(dtype)
    for name, config in zip(names, configs, strict=False):
        fastpeft.adapt(model, copy.deepcopy(config), adapter_name=name)
    copy_values(theirs, model)
    return model


def copy_values(source, target):
    found, wanted = adapter_values(source), adapter_values(target)
    assert found.keys() == wanted.keys()
    for key, parameter in wanted.items():
        assert parameter.shape == found[key].shape, key
        parameter.data.copy_(found[key].data)


def assert_same_values(first, second):
    first, second = adapter_values(first), adapter_values(second)
    assert first.keys() == second.keys()
    for key, parameter in first.items():
        assert torch.equal(parameter, second[key]), key


def run(model, x):
    """y, and the gradients of x and of the active adapters' parameters for a fixed gradient of y."""
    if x.dtype.is_floating_point:
        x = x.detach().to(next(model.parameters()).dtype).requires_grad_()
    y = model(x)
    y = getattr(y, "logits", y)
    wanted = {("", "", "x"): x, **adapter_values(model)}
    wanted = {key: tensor for key, tensor in wanted.items() if tensor.requires_grad}
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    gradients = torch.autograd.grad(y, list(wanted.values()), grad)
    return {("", "", "y"): y.detach(), **dict(zip(wanted, gradients, strict=True))}


class Errors:
    """The relative errors of tensors of each kind so far, of three models: PEFT's and ours in one dtype, and ours in
    float64. PEFT's in float64 is right."""

    def __init__(self):
        self.theirs, self.ours, self.wide = {}, {}, {}

    def add(self, exact, theirs, ours, wide=None):
        for errors, results in ((self.theirs, theirs), (self.ours, ours), (self.wide, wide)):
            if results is None:
                continue
            assert results.keys() == exact.keys()
            for key, value in exact.items():
                if not value.any():  # such as the gradient of a block of size one, which cannot turn
                    assert not results[key].any(), key
                    continue
                error = (results[key].double() - value).norm() / value.norm()
                errors.setdefault(key[2], []).append(float(error))

    def check(self, dtype=torch.float32):
        eps = torch.finfo(dtype).eps
        assert "y" in self.theirs and len(self.theirs) > 1
        # Root mean squares of entries, tensors and draws: the largest of a few is a matter of luck.
        for kind, errors in self.theirs.items():
            error = mean_square(errors)
            assert mean_square(self.ours[kind]) <= 2 * error + eps, kind
            if self.wide:  # the yardstick is in float64 itself here, and off by PEFT's share
                assert mean_square(self.wide[kind]) <= (3 * error / eps + 1) * torch.finfo(torch.float64).eps, kind


def mean_square(errors):
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def compare(monkeypatch, base, config, inputs):
    """Our model against PEFT's in float32 and float64, in several draws; PEFT's configuration object goes into both."""
    theirs, exact = peft_model(base, config), peft_model(base, config, dtype=torch.float64)
    ours, wide = our_model(base, theirs, config), our_model(base, theirs, config, dtype=torch.float64)
    compare_models(monkeypatch, exact, theirs, ours, wide, inputs)


def compare_models(monkeypatch, exact, theirs, ours, wide, inputs, dtype=torch.float32):
    errors = Errors()
    for seed, x in enumerate(inputs):
        draw_values(theirs, seed)
        results = []
        for model in (exact, theirs, ours, wide):
            if model is None:
                results.append(None)
                continue
            copy_values(theirs, model)
            torch.manual_seed(seed)  # for dropout
            with monkeypatch.context() as patch:
                if model is exact:
                    patch.setattr(peft_fourierft.FourierFTLayer, "get_delta_weight", wide_delta_weight)
                results.append(run(model, x))
        errors.add(*results)
    errors.check(dtype)


def make_gpt2():
    """A model of transformers' Conv1D, whose weight is (in, out)."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():  # GPT-2 starts with small weights and zero biases
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


TOKENS = [torch.randint(61, (2, 11), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
CONV1D = ["c_attn", "c_proj", "c_fc"]  # 24 -> 72, 24 -> 24 and 96 -> 24, 24 -> 96
