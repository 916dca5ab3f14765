"""What a method declares about itself, so that layers, models and files need to know no method."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.backend import extension
from fastpeft.config import AdapterConfig

if TYPE_CHECKING:
    from fastpeft.nn.served import Serving


@dataclass(frozen=True)
class Site:
    """A place for an adapter: a layer's path in the model, its sizes, and where its parameters are to live."""

    path: str
    in_features: int
    out_features: int
    device: torch.device
    dtype: torch.dtype  # of the adapter's parameters
    weight: Tensor | None = None  # the base's matrix, (out, in), where it has a dense one

    def parameter(self, *shape: int, fill: float = 0.0) -> nn.Parameter:
        return nn.Parameter(torch.full(shape, fill, device=self.device, dtype=self.dtype))

    def error(self, message: str) -> ValueError:
        return ValueError(f"layer {self.path!r} ({self.in_features} -> {self.out_features}): {message}")


class Adapter(nn.Module):
    """The parameters of one adapter on one layer, and its part of ``y = post(W · pre(x) + b) + delta(x)``.

    A method either adds a delta (``delta``, ``delta_weight``) or rotates (``pre``, ``post``, ``rotate_weight``, and
    ``rotates`` set). ``linear`` is the whole equation for a single adapter over a frozen matrix, in one operator.
    """

    config_class: ClassVar[type[AdapterConfig]]
    rotates: ClassVar[bool] = False
    shares_parameters: ClassVar[bool] = False  # whether the adapters of several layers hold the same Parameters
    dropout_p: float = 0.0  # the share that is dropped while training
    # Parameter name -> the end of its key in PEFT's files.
    file_keys: ClassVar[Mapping[str, str]]

    def __init__(self, config: AdapterConfig, site: Site) -> None:
        super().__init__()
        self.config = config
        self.in_features, self.out_features = site.in_features, site.out_features

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def delta(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in), in the dtype of the parameters or wider."""
        raise NotImplementedError

    def add_to(self, y: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        """y + delta(x), for y (..., out) as the base and the adapters before this one made it of x."""
        return y + self.delta(x)

    def add_to_weight(self, weight: Tensor, base: Tensor) -> Tensor:
        """weight + ΔW, (out, in), in the wider of their dtypes; weight is base and the adapters before this one."""
        return weight + self.delta_weight()

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and B (out, r) with ΔW = B A, where that is what the method is."""
        return None

    # Tensor parallelism, see fastpeft.interop.distributed: a process has some rows or some columns of the weight, and
    # all of the adapter's parameters. Nothing is dropped here.

    def split_refusal(self, by_rows: bool) -> str | None:
        """Why the layer's weight cannot be cut in this direction, or None where it can."""
        return None

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        """Some outputs of ``linear``, from these rows of weight and bias and all of x.

        This is right for deltas, and for rotations whose ``post`` treats all outputs alike.
        """
        if self.rotates:
            return self.post(F.linear(self.pre(x), weight, bias), bias)
        return F.linear(x, weight, bias) + self.delta(x)[..., rows]

    def linear_columns(self, x: Tensor, weight: Tensor, columns: slice) -> Tensor:
        """What some inputs add to ``linear`` without its bias: x and weight are these columns of them alone.

        x is whole where ``mixes_columns`` says that it has to be.
        """
        if self.rotates:
            return self.post(F.linear(self.pre(x)[..., columns], weight), None)
        return F.linear(x, weight) + self.delta(F.pad(x, (columns.start, self.in_features - columns.stop)))

    def mixes_columns(self, columns: int) -> bool:
        """Whether inputs cut into pieces of so many features act on each other before they meet the weight."""
        return self.rotates

    def pre(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y (..., out) as the base gave it, with its bias in it."""
        raise NotImplementedError

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """The weight that does what ``pre`` and ``post`` do around W, (out, in)."""
        raise NotImplementedError

    # For several layers at once: building, writing and reading. Most methods treat every layer alone.

    @classmethod
    def build(cls, config: Any, sites: Sequence[Site]) -> list[Adapter]:
        """One adapter for each site.

        Raises:
            ValueError: the configuration does not fit a site; the message names it.
        """
        return [cls(config, site) for site in sites]

    @classmethod
    def pack(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """The tensors of a file for adapters by the path of their layer: PEFT's keys."""
        return {
            f"base_model.model.{path}.{key}": getattr(adapter, name)
            for path, adapter in adapters.items()
            for name, key in adapter.file_keys.items()
        }

    @classmethod
    def plain_keys(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """PEFT's keys for tensors from a state dict of its models, where the adapter's name stands in them, as in
        ``….lora_A.default.weight``. Others stay as they are.

        Raises:
            ValueError: several adapters are among them.
        """
        keys = {key for each in (cls, *cls.__subclasses__()) for key in getattr(each, "file_keys", {}).values()}
        heads = "|".join(sorted({re.escape(key.partition(".")[0]) for key in keys}))
        named = re.compile(rf"(.*\.(?:{heads}))\.([^.]+)(\.weight)?")
        found: dict[str, Tensor] = {}
        names: set[str] = set()
        for key, tensor in tensors.items():
            match = named.fullmatch(key) if heads else None
            if match is None or (match[2] == "weight" and match[3] is None):
                found[key] = tensor
                continue
            names.add(match[2])
            head = match[1].rpartition(".")[2]
            found[match[1] + next(key for key in keys if key.partition(".")[0] == head)[len(head) :]] = tensor
        if len(names) > 1:
            raise ValueError(f"{source}: holds the adapters {', '.join(sorted(names))}, one was expected")
        return found

    @classmethod
    def reconcile(cls, config: Any, tensors: Mapping[str, Tensor]) -> Any:
        """The configuration that a file's tensors were really made with, where that can differ from what it says."""
        return config

    @classmethod
    def check_file(cls, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], source: str) -> None:
        """Raises ValueError for values in a file's tensors (of the right keys and shapes) that would do harm."""

    @classmethod
    def serve(cls, config: Any, sites: Sequence[Site], dtype: torch.dtype) -> Serving:
        """What an adapter on these layers puts into a bank of this dtype, see fastpeft.nn.served.

        Raises:
            ValueError: the configuration does not fit a site, or banks do not serve it; the message says why.
        """
        raise ValueError(f"{config.peft_type} adapters are not served by a bank: there is no grouped operator for them")


def parameter_of(module: nn.Module, name: str) -> Any:
    """module.name for a parameter, past the attributes that nn.Module looks through first.

    Where it is not in the dictionary of parameters it is an attribute: of a replica, as nn.DataParallel makes them, or
    of a parametrised module.
    """
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def make_dropout(p: float) -> nn.Module:
    return nn.Dropout(p) if p > 0 else nn.Identity()


def dropout_p(dropout: nn.Module) -> float:
    """The share that is dropped now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors on the CPU are the same bit for bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if extension is None or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return extension.same_bytes(a.data_ptr(), b.data_ptr(), a.nbytes)
