"""What several test files need: the methods at small sizes, adapted layers with values in them, plain formulas.

The formulas here are written from the papers' equations with dense matrices and differentiated by autograd. In float64
they are the truth, in another dtype the composition of PyTorch operations that a result is compared with.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastpeft
from fastpeft import reference

# Rectangular, and divisible by what shards, blocks and butterfly windows below need.
IN, OUT = 24, 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def in_turn(shapes: Sequence[Any], dtypes: Iterable[Any]) -> list[Any]:
    """(shape, dtype) for tests of kernels: on a GPU all pairs; elsewhere, where one can take a second, every shape in
    two of the dtypes, and every dtype with its share of the shapes."""
    each = list(dtypes)
    if os.environ.get("TRITON_INTERPRET") == "0":
        chosen = [(shape, dtype) for shape in shapes for dtype in each]
    else:
        chosen = [(shape, each[j % len(each)]) for i, shape in enumerate(shapes) for j in (2 * i, 2 * i + 1)]
    return [pytest.param(shape, dtype, id=f"{'x'.join(map(str, shape))}-{dtype}") for shape, dtype in chosen]


@dataclass(frozen=True)
class Method:
    """A method with a configuration that fits layers of 24 -> 16, 24 -> 24, 16 -> 24 and 16 -> 16."""

    name: str
    make_config: Callable[..., Any]
    layer_class: type[fastpeft.nn.AdaptedLinear]
    options: tuple[tuple[str, Any], ...]
    parameters: tuple[str, ...]
    dropout: str | None  # the option's name

    def __str__(self) -> str:
        return self.name

    def config(self, **changes: Any) -> Any:
        return self.make_config(**{"target_modules": "all-linear", **dict(self.options), **changes})


LORA = Method(
    "lora",
    fastpeft.LoraConfig,
    fastpeft.nn.LoRALinear,
    (("r", 4), ("lora_alpha", 6)),
    ("lora_A", "lora_B"),
    "lora_dropout",
)
MOS = Method(  # a pool rank of 4 lets a single layer draw a rank of 3
    "mos",
    fastpeft.MosConfig,
    fastpeft.nn.MoSLinear,
    (("r", 3), ("pool_rank", 4), ("shards_per_vector", 2), ("private_rank", 1), ("lora_alpha", 6)),
    ("pool_A", "pool_B"),
    "lora_dropout",
)
BOFT = Method(
    "boft",
    fastpeft.BOFTConfig,
    fastpeft.nn.BOFTLinear,
    (("boft_block_size", 4), ("boft_n_butterfly_factor", 2)),
    ("boft_R", "boft_s"),
    "boft_dropout",
)
FOURIERFT = Method(  # a scaling that makes the delta about as large as the base's output
    "fourierft",
    fastpeft.FourierFTConfig,
    fastpeft.nn.FourierFTLinear,
    (("n_frequency", 37), ("scaling", 20.0)),
    ("spectrum",),
    None,
)
OFT = Method(
    "oft",
    fastpeft.OFTConfig,
    fastpeft.nn.OFTLinear,
    (("oft_block_size", 4),),
    ("oft_R",),
    "module_dropout",
)
METHODS = [LORA, MOS, BOFT, FOURIERFT, OFT]
WITH_DROPOUT = [method for method in METHODS if method.dropout]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)

# More tokens than this and a fused node pays for its overhead: small and large inputs may go different ways.
MANY = 6000


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every adapter parameter values that change the output; a parameter shared by layers is drawn once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "adapters." not in name:
                continue
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith(("lora_A", "pool_A", "lora_B", "pool_B")):
                values = values / parameter.shape[-1] ** 0.5
            elif name.endswith(".boft_R"):
                values = values / 2
            elif name.endswith(".oft_R"):
                values = values / 5  # a series of few terms is for small rotations
            elif name.endswith("boft_s"):
                values = 1 + values / 4
            parameter.copy_(values)
    return module


def make_linear(d_in: int = IN, d_out: int = OUT, bias: bool = True, dtype: torch.dtype | None = None, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(d_in, d_out, bias, dtype=dtype)


def adapted(method: Method, layer: nn.Module | None = None, name: str = "default", **changes: Any) -> Any:
    """A layer (24 -> 16 by default) with an adapter that changes it."""
    layer = make_linear() if layer is None else layer
    return fill(fastpeft.adapt(layer, method.config(**changes), name))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def plain_delta(adapter: nn.Module) -> Tensor:
    """ΔW, (out, in), of an adapter that adds one."""
    if isinstance(adapter, fastpeft.nn.LoRAAdapter):
        return adapter.scaling * (adapter.lora_B @ adapter.lora_A)
    if isinstance(adapter, fastpeft.nn.MoSAdapter):
        rows_A = torch.stack([torch.cat([adapter.pool_A[int(i)] for i in row]) for row in adapter.index_A])
        rows_B = torch.stack([torch.cat([adapter.pool_B[int(i)] for i in row]) for row in adapter.index_B])
        return adapter.scaling * (rows_B.T @ rows_A)
    shape = (adapter.out_features, adapter.in_features)
    generator = torch.Generator().manual_seed(adapter.config.random_loc_seed)
    places = torch.randperm(shape[0] * shape[1], generator=generator)[: adapter.spectrum.shape[0]]
    spectrum = wide(adapter.spectrum)
    dense = spectrum.new_zeros(shape).flatten().index_put((places,), spectrum).reshape(shape)
    return adapter.scaling * torch.fft.ifft2(dense).real


def plain_rotation(adapter: nn.Module) -> Tensor:
    """R, (in, in), of an adapter that rotates."""
    if isinstance(adapter, fastpeft.nn.OFTAdapter):
        blocks = reference.oft.oft_blocks(wide(adapter.oft_R), adapter.block_size, adapter.neumann_terms, adapter.eps)
        return torch.block_diag(*blocks.expand(adapter.in_features // adapter.block_size, -1, -1))
    return reference.boft.butterfly_matrix(reference.boft.boft_blocks(wide(adapter.boft_R)))


def plain_forward(adapters: Iterable[nn.Module], x: Tensor, base: Callable[[Tensor], Tensor], bias=None) -> Tensor:
    """post(base(pre(x)) − b) + b + Σ ΔW x. The last rotation is the first to act on x, as in PEFT."""
    adapters = list(adapters)
    rotations = [adapter for adapter in adapters if adapter.rotates]
    z = x
    for adapter in reversed(rotations):
        R = plain_rotation(adapter)
        z = (z.to(torch.promote_types(z.dtype, R.dtype)) @ R).to(x.dtype)
    y = base(z)
    for adapter in rotations:
        if isinstance(adapter, fastpeft.nn.BOFTAdapter):
            y = (y * adapter.boft_s.squeeze(-1)).to(y.dtype)
    y = y if bias is None else (y + bias).to(y.dtype)
    for adapter in adapters:
        if not adapter.rotates:
            delta = plain_delta(adapter)
            y = y + F.linear(x.to(torch.promote_types(x.dtype, delta.dtype)), delta).to(y.dtype)
    return y


def plain_linear(layer: Any, x: Tensor) -> Tensor:
    """What an adapted nn.Linear is to compute with its active adapters."""
    adapters = [layer.adapters[name] for name in layer.active]
    if any(adapter.rotates for adapter in adapters):
        return plain_forward(adapters, x, lambda z: F.linear(z, layer.weight), layer.bias)
    return plain_forward(adapters, x, lambda z: F.linear(z, layer.weight, layer.bias))


@dataclass
class Run:
    """An output, the gradient of x and the gradients of the adapters' parameters."""

    y: Tensor
    dx: Tensor | None
    gradients: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        named = {"y": self.y, **self.gradients}
        return named if self.dx is None else {**named, "dx": self.dx}


Forward = Callable[[Any, Tensor], Tensor]


def call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def run(layer: nn.Module, x: Tensor, forward: Forward = call, gradient: Tensor | None = None) -> Run:
    """Forward and backward, with a fixed gradient of the output unless one is given; leaves no gradients behind."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    y = forward(layer, x)
    y.backward(randn(*y.shape, seed=2).to(y.dtype) if gradient is None else gradient.to(y.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad(set_to_none=True)
    return Run(y.detach(), x.grad, gradients)


def run_in_pieces(layer: nn.Module, x: Tensor, forward: Forward, gradient: Tensor | None = None) -> Run:
    """The same for few tokens at a time, added up: long sums are where digits are lost."""
    if x.dim() < 2 or x[..., 0].numel() <= 128:
        return run(layer, x, forward, gradient)
    with torch.no_grad():
        shape = forward(layer, x).shape
    gradient = randn(*shape, seed=2) if gradient is None else gradient
    pieces = [
        run(layer, tokens, forward, grad)
        for tokens, grad in zip(x.flatten(0, -2).split(64), gradient.flatten(0, -2).split(64), strict=True)
    ]
    return Run(
        torch.cat([piece.y for piece in pieces]).reshape(shape),
        torch.cat([piece.dx for piece in pieces if piece.dx is not None]).reshape(x.shape),
        {name: torch.stack([piece.gradients[name] for piece in pieces]).sum(0) for name in pieces[0].gradients},
    )


def widened(layer: nn.Module) -> Any:
    """The same numbers in float64."""
    return copy.deepcopy(layer).double()


def assert_same(first: Run, second: Run) -> None:
    """Bit for bit."""
    assert first.tensors().keys() == second.tensors().keys()
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


class Errors:
    """How much a result errs beside the PyTorch composition in the same dtype: at most twice as much.

    The quotient of two rounding errors is itself random, so it is averaged (as a geometric mean) over several draws of
    values. Two more things to the rule:

    - Rounding the exact result once costs up to half a unit in the last place, so an error below that is none, however
      lucky the composition was.
    - For float64 there is no truth to measure against, but something nearer to it: the formula on few tokens at a time.
      Where that is no nearer, the error of the float32 composition, scaled by the dtypes' units, stands in.
    """

    def __init__(self) -> None:
        self.logarithms: dict[str, list[float]] = {}

    def add(self, name: str, found: Tensor, exact: Tensor, *compositions: tuple[Tensor, Tensor]) -> None:
        """compositions: what one gives, and what is exact for it."""
        assert found.shape == exact.shape, f"{name} has shape {tuple(found.shape)}"
        assert found.dtype in (compositions[0][0].dtype, torch.float64), f"{name} has dtype {found.dtype}"
        unit = torch.finfo(found.dtype).eps
        rounding = unit / 2 * exact.norm().item()
        if rounding == 0:  # nothing in it, or zeros
            assert torch.equal(found.double(), exact), name
            return
        scaled = [
            (composed.double() - right).norm().item() * unit / torch.finfo(composed.dtype).eps
            for composed, right in compositions
        ]
        allowed = 2 * max(*scaled, rounding)
        error = max(
            (found.double() - exact).norm().item(), rounding / 8
        )  # a lucky draw must not make up for the others
        self.logarithms.setdefault(name, []).append(math.log(error / allowed))

    def check(self) -> None:
        for name, logarithms in self.logarithms.items():
            quotient = math.exp(sum(logarithms) / len(logarithms))
            assert quotient <= 1, f"{name} errs {quotient:.3g} times as much as is allowed"


def check(
    layer: Any,
    x: Tensor,
    forward: Forward = call,
    formula: Forward = plain_linear,
    composition: Forward | None = None,
    gradient: Tensor | None = None,
    draws: int = 4,
) -> None:
    """A forward against its formula: output and gradients, in the layer's own dtype, for several adapters' values.

    The composition is the formula unless something else is given, for example the formula under autocast.
    """
    composition = composition or formula
    errors = Errors()
    layer = copy.deepcopy(layer)
    for draw in range(draws):
        fill(layer, seed=100 + draw)
        found, exact = run(layer, x, forward, gradient), run_in_pieces(widened(layer), x.double(), formula, gradient)
        compositions = [(run(layer, x, composition, gradient), exact)]
        if x.dtype == torch.float64:
            narrow = copy.deepcopy(layer).float()
            narrow_exact = run_in_pieces(widened(narrow), x.float().double(), formula, gradient)
            compositions.append((run(narrow, x.float(), composition, gradient), narrow_exact))
        assert found.tensors().keys() == exact.tensors().keys()
        for name, tensor in found.tensors().items():
            pairs = [(composed.tensors()[name], right.tensors()[name]) for composed, right in compositions]
            errors.add(name, tensor, exact.tensors()[name], *pairs)
    errors.check()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a refused call must leave as it was."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "types": {path: type(module) for path, module in model.named_modules()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "hooks": {path: len(module._forward_pre_hooks) for path, module in model.named_modules()},
        "active": {path: getattr(module, "active", None) for path, module in model.named_modules()},
        "merged": {path: getattr(module, "merged", None) for path, module in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    assert after["state"].keys() == before["state"].keys()
    for key, value in before["state"].items():
        assert value.is_meta or torch.equal(after["state"][key].nan_to_num(7), value.nan_to_num(7)), key
    for part in before.keys() - {"state"}:
        assert after[part] == before[part], part


def through_a_file(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": through_a_file,
}


class Allocations(TorchDispatchMode):
    """Notes the shape of everything that an operator returns and that is not a view of what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.made.append((str(func), tuple(tensor.shape)))
        return result

    def count(self, shape: torch.Size) -> int:
        return sum(made == tuple(shape) for _, made in self.made)
