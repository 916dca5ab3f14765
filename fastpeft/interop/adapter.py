"""What a method declares about PEFT's layers, so that the walk over models and the accelerated layer know no method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class PeftAdapter:
    """One adapter of one PEFT layer, computed by our operators from PEFT's own Parameters.

    As a ``fastpeft.nn.Adapter``, it either adds to the base's output (``add_to``) or rotates (``pre``, ``post``, and
    ``rotates`` set), and ``linear`` is the whole layer over a plain matrix. One is made anew whenever ``facts`` change.
    """

    # PEFT's, exactly, by module and name: some are imported only where the library that they are for is installed.
    layer_classes: ClassVar[tuple[str, ...]]
    container: ClassVar[str]  # the layer's attribute that holds adapters by name
    # What PEFT's layer lists as attributes of its adapters, and others that are read. A new one is an unknown option.
    known: ClassVar[frozenset[str]]
    rotates: ClassVar[bool] = False
    first_acts_first: ClassVar[bool] = False  # of several rotations
    casts_back: ClassVar[bool] = True  # whether PEFT returns the dtype of x, and not that of the base's output

    modules: tuple[nn.Module, ...] = ()  # PEFT's, whose forward is passed by

    def __init__(self, layer: Any, name: str) -> None:
        raise NotImplementedError

    @classmethod
    def refusal(cls, layer: Any) -> str | None:
        """Why a layer of the right class cannot be taken over, or None."""
        if new := sorted({*layer.adapter_layer_names, *layer.other_param_names} - cls.known):
            return f"its adapters have {', '.join(new)}, which this version of fastpeft does not know"
        if lacking := sorted(name for name in cls.known if not hasattr(layer, name)):
            return f"it has no {', '.join(lacking)}, so its version of PEFT is one that fastpeft does not know"
        for name in getattr(layer, cls.container):
            if reason := cls.adapter_refusal(layer, name):
                return f"adapter {name!r}: {reason}"
        return None

    @classmethod
    def adapter_refusal(cls, layer: Any, name: str) -> str | None:
        """Why one adapter cannot be computed here, or None."""
        raise NotImplementedError

    @classmethod
    def bind(cls, layer: Any, name: str) -> PeftAdapter:
        """An adapter that adapter_refusal has let pass."""
        return cls(layer, name)

    @classmethod
    def prepare(cls, layer: Any, name: str) -> Any:
        """What the layer is to keep as ``_prepared[name]``, for example since torch.compile could not make it.

        Raises:
            ValueError: the adapter's values do not allow it.
        """

    @staticmethod
    def facts(attributes: dict[str, Any], name: str) -> Any:
        """What an adapter is made from, to be compared by ==: modules, numbers, and the ids of parameters.

        Asked on every call, so attributes are the layer's ``__dict__``: past nn.Module's own, slow way.
        """
        raise NotImplementedError

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def add_to(self, y: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        raise NotImplementedError

    def pre(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError


def tensor_refusal(tensors: dict[str, tuple[Tensor, tuple[int, ...]]]) -> str | None:
    """Why parameters, by name and with the shape that they must have, cannot be handed to an operator, or None."""
    first = next(iter(tensors))
    dtype = tensors[first][0].dtype
    for name, (tensor, shape) in tensors.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            return f"{name} is a {type(tensor).__name__}"
        if tuple(tensor.shape) != shape:
            return f"{name} has shape {tuple(tensor.shape)}, not {shape}"
        if tensor.dtype not in FLOATS:
            return f"{name} is of {tensor.dtype}"
        if tensor.dtype != dtype:
            return f"{name} is of {tensor.dtype} and {first} of {dtype}"
    return None
