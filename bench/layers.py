"""The layers that bench/tax.py times, ours and PEFT's, over one frozen ``nn.Linear``, and what they must return."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastpeft
from fastpeft import reference

MOS_LAYERS = 32  # share their pools; one of them is timed


@dataclass(frozen=True)
class Method:
    title: str
    config_class: str  # of fastpeft, and of PEFT where it has the method
    options: Mapping[str, Any]

    def config(self, library: ModuleType) -> Any:
        return getattr(library, self.config_class)(**self.options, target_modules=["layer"])


METHODS = {
    "lora-r8": Method("LoRA r8", "LoraConfig", {"r": 8, "lora_alpha": 16}),
    "lora-r16": Method("LoRA r16", "LoraConfig", {"r": 16, "lora_alpha": 16}),
    "mos": Method("MoS r8 e2 l4 p1", "MosConfig", {"r": 8, "pool_rank": 2, "shards_per_vector": 4, "private_rank": 1}),
    "boft-b4m2": Method("BOFT b4 m2", "BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "boft-b8m4": Method("BOFT b8 m4", "BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 4}),
    "fourierft": Method("FourierFT n1000", "FourierFTConfig", {"n_frequency": 1000}),
    "oft-b32": Method("OFT b32", "OFTConfig", {"oft_block_size": 32}),
    "oft-exact": Method("OFT b32 exact", "OFTConfig", {"oft_block_size": 32, "use_cayley_neumann": False}),
}

# y and the gradient of x, in float64, for rows of x and of the gradient of y.
Exact = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Holder(nn.Module):
    """A model of one layer; for MoS of many, of which the first is used."""

    layer: Any  # an nn.Linear, until a library makes its own of it

    def __init__(self, linear: nn.Linear, copies: int = 0) -> None:
        super().__init__()
        self.layer = twin(linear)
        self.others = nn.ModuleList(nn.ModuleDict({"layer": hollow(linear)}) for _ in range(copies))


def twin(linear: nn.Linear) -> nn.Linear:
    """Another layer with the very same weight and bias, so that none is timed on luckier memory."""
    layer = nn.Linear(linear.in_features, linear.out_features, device="meta")
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer


def hollow(linear: nn.Linear) -> nn.Linear:
    """A layer of the same sizes whose weight is one number in memory."""
    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(linear.weight.new_zeros(()).expand_as(linear.weight), requires_grad=False)
    return layer


def build_fastpeft(name: str, linear: nn.Linear) -> tuple[nn.Module, Exact]:
    """The layer to be timed, and its reference."""
    model = Holder(linear, MOS_LAYERS - 1 if name == "mos" else 0)
    fastpeft.adapt(model, METHODS[name].config(fastpeft))
    stir(model.layer)
    return model.layer, exact_of(model.layer)


def build_peft(name: str, linear: nn.Linear, peft: ModuleType) -> tuple[nn.Module, Exact]:
    """PEFT's layer and our reference with its numbers."""
    layer, ours = build_both(name, linear, peft)
    return layer, exact_of(ours)


def build_both(name: str, linear: nn.Linear, peft: ModuleType) -> tuple[nn.Module, nn.Module]:
    """PEFT's layer and ours with its numbers, read from the files that it writes."""
    model = Holder(linear)
    # PEFT tries to compile a CUDA helper for BOFT, with much noise. On the CPU it could not run: this skips the
    # attempt, not its outcome, which is one butterfly factor.
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None),
        tempfile.TemporaryDirectory() as folder,
    ):
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, METHODS[name].config(peft))
        layer: Any = adapted.base_model.model.layer
        stir(layer)
        adapted.save_pretrained(folder)
        ours = fastpeft.load_adapter(Holder(linear), folder)
    return layer, ours.layer


@torch.no_grad()
def stir(layer: Any) -> None:
    """Takes an adapter off its start, where it changes nothing, to where it changes as much as the base gives."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            spread = (layer.in_features * layer.out_features) ** 0.5 / 100 if "spectrum" in name else 0.1
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator).to(parameter))


def exact_of(layer: nn.Module) -> Exact:
    """The formula in float64 with the numbers of one of our layers as they are now."""
    wide: Any = copy.deepcopy(layer).double().requires_grad_(False)
    adapter = wide.adapters["default"]

    def apply(x: Tensor) -> Tensor:
        if not adapter.rotates:
            with fastpeft.use_backend("reference"):
                return wide(x)
        if isinstance(adapter, fastpeft.nn.OFTAdapter):
            blocks = reference.oft.oft_blocks(adapter.oft_R, adapter.block_size, adapter.neumann_terms)
            return F.linear(rotate(x, blocks[None]), wide.weight, wide.bias)
        y = F.linear(rotate(x, reference.boft.boft_blocks(adapter.boft_R)), wide.weight)
        return y * adapter.boft_s.squeeze(-1) + wide.bias

    def exact(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        x = x.double().requires_grad_()
        y = apply(x)
        return y.detach(), torch.autograd.grad(y, x, grad.double())[0]

    return exact


def rotate(
    x: Tensor,  # (T, d)
    blocks: Tensor,  # (m, d / b, b, b)
) -> Tensor:  # (T, d)
    """x B̃_{m−1} … B̃_0, B̃_i = P_i diag(Q_i) P_iᵀ, in the formula's own permutations but one block at a time: the
    matrices of the reference take minutes at 11008 features.
    """
    factors, _, block_size, _ = blocks.shape
    for factor in reversed(range(factors)):
        permutation = reference.boft.butterfly_permutation(x.shape[1], block_size, factor)
        inverse = torch.argsort(permutation)
        cut = x[:, inverse].unflatten(1, (-1, block_size))
        x = torch.einsum("tki,kij->tkj", cut, blocks[factor]).flatten(1)[:, permutation]
    return x


def output_error(layer: nn.Module, x: Tensor, grad: Tensor, rows: Sequence[int], exact: tuple[Tensor, Tensor]) -> float:
    """The largest error of y, in eval and in training, and of x's gradient, on these rows and over the largest entry.

    Infinite where shape or dtype are wrong, NaN where an output is.
    """
    exact_y, exact_dx = exact
    with torch.no_grad():
        y = layer.eval()(x)
    leaf = x.detach().requires_grad_()
    trained = layer.train()(leaf)
    trained.backward(grad)
    errors = []
    assert leaf.grad is not None
    for found, wanted in ((y, exact_y), (trained.detach(), exact_y), (leaf.grad, exact_dx)):
        if found.dtype != x.dtype or found.shape != (len(x), wanted.shape[1]):
            return float("inf")
        errors.append((found[list(rows)].double() - wanted).abs().max() / wanted.abs().max())
    return float(torch.stack(errors).max())  # unlike Python's max, keeps a NaN


def error_limit(dtype: torch.dtype, features: int) -> float:
    """A few roundings to the outputs' dtype, and those of sums of so many terms in float32, which grow by the root."""
    return 4 * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * features**0.5
