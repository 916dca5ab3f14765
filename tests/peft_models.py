"""Small PEFT models, accelerated and not, and what it means that the two agree.

Tolerances: the exact value is PEFT's model in float64 with the same numbers in it, and an accelerated model may err at
most twice as much as PEFT's own in the same dtype (``helpers.Errors``).
"""

from __future__ import annotations

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from helpers import Errors
from peft_oracle import peft, wide_delta_weight
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import fastpeft

# What every test here wants: see conftest.py.
MARKS = [
    pytest.mark.usefixtures("one_thread", "no_cuda_helper"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


class Block(nn.Module):
    def __init__(self, width, hidden, transposed):
        super().__init__()
        self.inner = nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width, bias=False)})
        self.mix = Conv1D(width, width) if transposed else nn.Linear(width, width)

    def forward(self, x):
        return x + self.mix(self.inner["down"](torch.tanh(self.inner["up"](x))))


class Tower(nn.Module):
    """Layers in nested modules: with a bias and without, rectangular, and one that keeps its weight transposed."""

    def __init__(self, width=16, hidden=24, transposed=True, n_blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden, transposed) for _ in range(n_blocks))
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
            if found := VALUES.search(name):
                values = torch.randn(parameter.shape, generator=generator)
                if found[1] in ("lora_A", "lora_B"):
                    parameter.copy_(values * parameter.shape[1] ** -0.5)
                elif found[1] in ("boft_s", "lora_magnitude_vector"):
                    parameter.mul_(1 + values / 4)
                else:
                    parameter.copy_(values * (0.1 if found[1] == "oft_R" else 0.4))
    return model


def make_tower(case, n_blocks=2):
    torch.manual_seed(0)
    return Tower(transposed="oft" not in case, n_blocks=n_blocks)  # which OFT and BOFT do not take


def peft_model(case, *, second=False, n_blocks=2, **options):
    options = {"target_modules": TARGETS, **options}
    model = peft.get_peft_model(make_tower(case, n_blocks), CASES[case](**options))
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
    """PEFT's FourierFT in the dtype of its spectrum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft.tuners.fourierft.layer.FourierFTLayer, "get_delta_weight", wide_delta_weight)
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
