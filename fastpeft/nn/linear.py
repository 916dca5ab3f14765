"""Adapted layers: a base layer that holds adapters and stays the layer it was.

A module becomes adapted by changing its class, not by being wrapped: ``nn.Linear`` becomes ``AdaptedLinear``, and any
other class ``Base`` becomes ``Adapted[Base]``, a subclass made for it. So the module keeps its identity, its Parameter
objects, its hooks and its state-dict keys, ``isinstance`` goes on being true, and a layer used twice is adapted twice.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.nn.adapter import Adapter, Site, parameter_of
from fastpeft.ops.base import check_input

if TYPE_CHECKING:
    from fastpeft.config import AdapterConfig


class Adapted(nn.Module):
    """The part of an adapted layer that does not depend on its base; comes before the base class."""

    adapters: nn.ModuleDict
    active: tuple[str, ...]
    weight: Any
    bias: Any
    in_features: int
    _base_weight: Tensor | None
    _merged: tuple[str, ...]
    _base_class: ClassVar[type[nn.Module]]  # what the layer would be without its adapters
    _base_is_linear: ClassVar[bool]  # whether that computes F.linear(x, weight, bias)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        cls._base_class = order[order.index(Adapted) + 1]
        cls._base_is_linear = cls._base_class.forward is nn.Linear.forward

    @property
    def merged(self) -> tuple[str, ...]:
        """The adapters that the weight holds at the moment."""
        return self._merged

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # named as nn.Linear names it
        if self._merged or not self.active:
            return super().forward(input, *args, **kwargs)
        weight = parameter_of(self, "weight") if self._base_is_linear else None
        if type(weight) not in (nn.Parameter, Tensor):  # of a subclass, such as a quantised one
            weight = None
        adapter = self.adapter(self.active[0])
        if weight is None or len(self.active) > 1:
            check_input(input, adapter.in_features, weight)
            return self._compose(input, *args, **kwargs)
        try:
            if input.is_cpu != weight.is_cpu:  # operators would run as if both were on the meta device, if one is
                raise ValueError(f"x must be on the device of weight, {weight.device}, got {input.device}")
            return adapter.linear(input, weight, parameter_of(self, "bias"), *args, **kwargs)
        except Exception:  # operators refuse what does not fit: only then is it worth saying it in the layer's words
            check_input(input, adapter.in_features, weight)
            raise

    def _compose(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The equation step by step: for several adapters, or a base that is no plain matrix."""
        adapters = [self.adapter(name) for name in self.active]
        # y = post(W · pre(x) + b) + Σ delta(x). Rotations compose as PEFT's do: the last is the first to act on x.
        rotations = [adapter for adapter in adapters if adapter.rotates]
        z = input
        for adapter in reversed(rotations):
            z = adapter.pre(z)
        y = super().forward(z, *args, **kwargs)
        for adapter in rotations:
            y = adapter.post(y, getattr(self, "bias", None))
        for adapter in adapters:
            if not adapter.rotates:
                y = adapter.add_to(y, input, self)
        return y

    def adapter(self, name: str) -> Adapter:
        return self._modules["adapters"]._modules[name]  # type: ignore[return-value, union-attr]

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        self.adapters[name] = adapter

    def adapted_weight(self, names: Sequence[str]) -> Tensor:
        """The weight that computes what base and adapters compute together, rounded once to the base's dtype.

        Raises:
            ValueError: the base has no plain matrix to merge into, or the result is not finite.
        """
        weight = merge_target(self)
        adapters = [self.adapter(name) for name in names]
        with torch.no_grad():
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for adapter in adapters:
                if adapter.rotates:
                    wide = adapter.rotate_weight(wide)
            for adapter in adapters:
                if not adapter.rotates:
                    wide = adapter.add_to_weight(wide, weight)
            merged = wide.to(weight.dtype)
            if not bool(torch.isfinite(merged).all()):
                raise ValueError(f"merging {', '.join(names)} gives a weight that is not finite")
        return merged.T if stores_transposed(self) else merged

    def merge(self, names: Sequence[str] | None = None, keep_base: bool = True) -> None:
        """Puts adapters (the active ones by default) into the weight. keep_base=False saves a copy and forbids unmerge.

        Raises:
            ValueError: merged already, or not possible for this base; see adapted_weight.
        """
        if self._merged:
            raise ValueError(f"{', '.join(self._merged)} merged already: unmerge first")
        names = tuple(self.active if names is None else names)
        if not names:
            return
        merged = self.adapted_weight(names)
        with torch.no_grad():
            self._base_weight = self.weight.clone() if keep_base else None
            self.weight.copy_(merged)
        self._merged = names

    def unmerge(self) -> None:
        """Gives the base weight back bit for bit.

        Raises:
            ValueError: it was merged with keep_base=False.
        """
        if not self._merged:
            return
        if self._base_weight is None:
            raise ValueError("merged with keep_base=False: the base weight is gone, load the base model again")
        with torch.no_grad():
            self.weight.copy_(self._base_weight)
        self._base_weight, self._merged = None, ()

    def extra_repr(self) -> str:
        state = f", merged={list(self._merged)}" if self._merged else ""
        return f"{super().extra_repr()}, active={list(self.active)}{state}"


class AdaptedLinear(Adapted, nn.Linear):  # type: ignore[misc]
    """An ``nn.Linear`` that holds adapters. Made by ``fastpeft.adapt``, or from a layer by a method's own subclass."""

    adapter_class: ClassVar[type[Adapter] | None] = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        config: AdapterConfig,
        adapter_name: str = "default",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self._give_adapter(config, adapter_name)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: AdapterConfig, adapter_name: str = "default") -> AdaptedLinear:
        """A new layer with the same weight and bias Parameters, frozen, and one active adapter.

        Raises:
            TypeError: not an ``nn.Linear``, or the configuration of another method.
            ValueError: the configuration does not fit the layer.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}")
        if type(linear).forward is not nn.Linear.forward or "forward" in linear.__dict__:
            kind = type(linear).__name__
            raise TypeError(f"linear must compute as nn.Linear does, got a {kind} with a forward of its own: use adapt")
        layer = cls.__new__(cls)
        layer.__dict__.update(linear.__dict__)
        for name, value in linear.__dict__.items():
            if isinstance(value, dict):  # parameters, buffers, hooks: own containers, the same contents
                layer.__dict__[name] = value.copy()
        layer._give_adapter(config, adapter_name)
        for parameter in linear.parameters():
            parameter.requires_grad_(False)
        return layer

    def _give_adapter(self, config: AdapterConfig, name: str) -> None:
        assert self.adapter_class is not None, "use a method's own class, such as LoRALinear"
        if not isinstance(config, self.adapter_class.config_class):
            wanted = self.adapter_class.config_class.__name__
            raise TypeError(f"config must be a {wanted}, got {type(config).__name__}")
        check_adapter_name(name)
        prepare(self)
        (adapter,) = self.adapter_class.build(copy.deepcopy(config), [site_of(self, "")])
        self.add_adapter(name, adapter)
        self.active = (name,)


def prepare(module: nn.Module) -> None:
    """Gives a module the attributes of an adapted layer with no adapter."""
    module.adapters = nn.ModuleDict()
    # nn.TransformerEncoderLayer hands its weights to one fused kernel, past our layers, unless a hook is in it.
    module.adapters.register_forward_pre_hook(_never_called)
    module.active = ()  # type: ignore[assignment]
    module._merged = ()  # type: ignore[assignment]
    module._base_weight = None  # type: ignore[assignment]


def _never_called(module: nn.Module, args: Any) -> None:
    """That it is there is all that matters."""


def make_adapted(module: nn.Module) -> None:
    """Turns a layer into an adapted one, in place. Does nothing to one that is adapted already."""
    if not isinstance(module, Adapted):
        prepare(module)
        module.__class__ = adapted_class(type(module))  # type: ignore[arg-type]


@cache
def adapted_class(base: type[nn.Module]) -> type[nn.Module]:
    """The adapted subclass of a layer class. One class for each base, so that types stay comparable."""
    if base is nn.Linear:
        return AdaptedLinear
    members = {"__reduce_ex__": _reduce_ex, "__module__": __name__}
    return type(f"Adapted[{base.__name__}]", (Adapted, base), members)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    # Pickle finds classes by name, and these have none of their own.
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has no default one
    return _restore, (self._base_class,), state


def _restore(base: type[nn.Module]) -> Any:
    cls = adapted_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a layer that maps x to W x, or None for any other module."""
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second: transformers' Conv1D
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return sizes  # type: ignore[return-value]
    return None


def stores_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out), as in transformers' Conv1D."""
    return not hasattr(module, "in_features")


def site_of(module: nn.Module, path: str) -> Site:
    """Where a layer's adapter lives: on the weight's device, in float32 or the wider dtype of the weight."""
    features = features_of(module)
    assert features is not None
    tensors = [module._parameters.get("weight"), *module.parameters(), *module.buffers()]
    first = next((tensor for tensor in tensors if tensor is not None), torch.empty(0))
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return Site(path, *features, first.device, dtype, dense_weight(module))


def dense_weight(module: nn.Module) -> Tensor | None:
    """The matrix that a base multiplies by, (out, in), or None where it keeps it in some other form."""
    weight: Any = getattr(module, "weight", None)
    features = features_of(module)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.dtype.is_floating_point or features is None:
        return None
    if weight.dtype.itemsize == 1:  # 8-bit floats have their scale somewhere else
        return None
    matrix = weight.T if stores_transposed(module) else weight
    return matrix if tuple(matrix.shape) == features[::-1] else None


def merge_target(module: nn.Module) -> Tensor:
    """The dense matrix of a base, (out, in).

    Raises:
        ValueError: it has none, for example because it is quantised.
    """
    weight = module._parameters.get("weight")
    features = features_of(module)
    if type(weight) is not nn.Parameter or not weight.dtype.is_floating_point or features is None:
        raise ValueError(
            f"a {type(module).__name__} has no dense floating-point weight to merge into: keep the adapter beside it, "
            "or load the base model unquantised"
        )
    matrix = weight.T if stores_transposed(module) else weight
    if tuple(matrix.shape) != features[::-1]:
        raise ValueError(
            f"the weight of a {type(module).__name__} has shape {tuple(weight.shape)}, not {features[::-1]}"
        )
    return matrix


def check_adapter_name(name: Any) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter_name must be a non-empty string without dots that is no attribute of nn.ModuleDict, got {name!r}"
        )
