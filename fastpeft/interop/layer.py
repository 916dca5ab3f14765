"""The accelerated layer: PEFT's layer with a forward that is ours where its state allows it, and PEFT's where not."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastpeft.interop.adapter import PeftAdapter

# Hooks on every module there is.
GLOBAL_HOOKS = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)


class Accelerated(nn.Module):
    """The part of an accelerated layer that does not depend on its PEFT class; comes before that class."""

    _peft_class: ClassVar[type[nn.Module]]
    _method: ClassVar[type[PeftAdapter]]
    _prepared: dict[str, Any]  # by adapter, what its method wants to be kept
    cast_input_dtype_enabled = True  # not every PEFT layer has it

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled:
            return super().forward(x, *args, **kwargs)
        plan = Plan(self, None) if torch.compiler.is_dynamo_compiling() else self._current_plan()
        y = None if any(plan.hooks) else plan.run(x)
        return super().forward(x) if y is None else y

    def _current_plan(self) -> Plan:
        attributes = self.__dict__  # past nn.Module's own way, which is as slow as a small layer for so many
        active = attributes["_active_adapter"]
        base = attributes["_modules"]["base_layer"]
        facts = self._method.facts
        if type(active) is str:
            seen = facts(attributes, active)
        elif len(active) == 1:
            seen = facts(attributes, active[0])
        else:
            seen = [facts(attributes, name) for name in active]
        plan = attributes.get("_plan")
        if (
            plan is None
            or plan.seen != seen
            or plan.base is not base
            or plan.base_forward is not base.__dict__.get("forward")
        ):
            attributes["_prepared"] = prepare(self, self._method)
            plan = attributes["_plan"] = Plan(self, seen)
        return plan

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        super().update_layer(*args, **kwargs)  # type: ignore[misc]
        # Some starts of an adapter are taken out of the base's weight, past what PyTorch counts.
        self.__dict__.pop("_plan", None)
        self._prepared = prepare(self, self._method)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and these have none of their own.
        return _restore, (self._peft_class,), {key: value for key, value in vars(self).items() if key != "_plan"}


class Plan:
    """How a layer computes for as long as it is seen to consist of the same parts.

    Finding that out takes longer than a small layer, so it is done once, and on every call only those parts are looked
    at that PEFT, PyTorch or a user could have exchanged. Values are always read from where PEFT keeps them.
    """

    def __init__(self, layer: Any, seen: Any) -> None:
        method = layer._method
        self.seen = seen
        self.base = base = layer.base_layer
        self.base_forward = base.__dict__.get("forward")
        self.base_parameters = base._parameters
        self.single: PeftAdapter | None = None  # the only adapter, over a plain matrix
        self.casts_back = method.casts_back
        held = getattr(layer, method.container)
        names = [name for name in layer.active_adapters if name in held]
        covered = all(method.adapter_refusal(layer, name) is None for name in names)
        self.adapters = [method.bind(layer, name) for name in names] if covered else []
        passed = [module for adapter in self.adapters for module in adapter.modules]  # whose forward is not called
        if any("forward" in module.__dict__ for module in passed):
            self.adapters = []
        elif len(self.adapters) == 1 and computes_linear(base):
            self.single = self.adapters[0]
            passed.append(base)
        self.hooks = tuple(hooks for module in passed for hooks in hooks_of(module)) + GLOBAL_HOOKS

    def run(self, x: Tensor) -> Tensor | None:
        """The layer's output, or None where PEFT's own forward is to compute it."""
        if self.single is not None:
            weight = self.base_parameters["weight"]
            if not fits(x, weight):
                return None
            y = self.single.linear(x, weight, self.base_parameters["bias"])
        elif self.adapters:
            y = self._compose(x)
        else:
            return None
        return y.to(x.dtype) if self.casts_back and y.dtype is not x.dtype else y

    def _compose(self, x: Tensor) -> Tensor:
        """The base called as it is, and the adapters one by one: for several, or a base that is no plain matrix."""
        rotations = [adapter for adapter in self.adapters if adapter.rotates]
        z = x
        for adapter in rotations if self.adapters[0].first_acts_first else reversed(rotations):
            z = adapter.pre(z)
        base_output = y = self.base(z)
        for adapter in rotations:
            y = adapter.post(y, self.base.bias)
        for adapter in self.adapters:
            if not adapter.rotates:
                y = adapter.add_to(y, x, self.base)
        return y.to(base_output.dtype)


def prepare(layer: Any, method: type[PeftAdapter]) -> dict[str, Any]:
    """What a method wants a layer to keep for each of the adapters that it covers."""
    held = getattr(layer, method.container)
    return {name: method.prepare(layer, name) for name in held if method.adapter_refusal(layer, name) is None}


def hooks_of(module: nn.Module) -> tuple[dict, ...]:
    """The dictionaries that hold a module's own hooks."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def computes_linear(base: nn.Module) -> bool:
    """Whether a base layer is F.linear of its own weight and bias and nothing more."""
    if type(base).forward is not nn.Linear.forward or "forward" in base.__dict__:
        return False
    return is_plain(base._parameters.get("weight"))


def is_plain(weight: Any) -> bool:
    """Whether it is of no subclass, as weights that torchao has quantised are."""
    return type(weight) is nn.Parameter or type(weight) is Tensor


def fits(x: Tensor, weight: Any) -> bool:
    """Whether operators take x and a base's weight as they are. PEFT's forward has the words for what is wrong."""
    if not is_plain(weight):
        return False
    if x.is_cpu != weight.is_cpu or x.is_meta != weight.is_meta:
        return False
    return x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type)


@cache
def accelerated_class(peft_class: Any) -> Any:
    """The accelerated subclass of a PEFT layer's class, with its name, which PEFT prints."""
    from fastpeft.interop.peft import method_of

    members = {"_peft_class": peft_class, "_method": method_of(peft_class), "__module__": __name__}
    return type(peft_class.__name__, (Accelerated, peft_class), members)


def _restore(peft_class: Any) -> Any:
    cls = accelerated_class(peft_class)
    return cls.__new__(cls)


def peft_class(layer: Any) -> Any:
    """The class that a layer has in PEFT."""
    return layer._peft_class if isinstance(layer, Accelerated) else type(layer)


def give_back(module: Any) -> None:
    """Makes a layer PEFT's own again; does nothing to any other module."""
    if isinstance(module, Accelerated):
        module.__class__ = module._peft_class  # type: ignore[assignment]
        for name in ("_plan", "_prepared"):
            vars(module).pop(name, None)
