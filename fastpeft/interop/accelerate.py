"""PEFT's models computed by our operators, in place, with PEFT's own parameters.

A PEFT layer is taken over by changing its class, not by being replaced: ``lora.Linear`` becomes a subclass of itself
whose forward hands PEFT's Parameters to an operator. So parameters, buffers, state-dict keys, hooks and everything that
PEFT does to its layers stay as they are, and ``isinstance`` goes on being true.

Nothing here knows a method: what differs between them is in ``fastpeft.interop.peft``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastpeft.interop.adapter import PeftAdapter
from fastpeft.interop.layer import Accelerated, accelerated_class, give_back, peft_class, prepare
from fastpeft.model import check_model, is_bypassed


@dataclass
class AccelerationReport:
    """Which PEFT layers compute by our operators, and why the others do not.

    Attributes:
        accelerated: paths of layers in the model.
        left_alone: path of a layer -> the reason.
    """

    accelerated: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} PEFT layers accelerated, {len(self.left_alone)} left alone"]
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left_alone.items():
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
            lines.append(f"  {', '.join(paths[:3])}{more}: {reason}")
        return "\n".join(lines)


def accelerate(model: nn.Module, strict: bool = False) -> AccelerationReport:
    """Lets every PEFT layer of a method that is known here compute by our operators, in place.

    The layers keep PEFT's Parameter objects, and all of PEFT goes on working: saving, switching, adding and deleting
    adapters, disabling and merging them. A layer that is disabled, merged, called with ``adapter_names``, hooked
    inside, or given an adapter later that is not covered runs PEFT's own forward for as long as it is so. Layers that
    PEFT adds later are taken over by calling this again; calling it twice is harmless.

    DoRA's sums of squares of a base weight are kept until PyTorch counts a change of it, which it does not for one made
    through ``weight.data`` in place: accelerate again after that. Operators are differentiable once. A layer's class is
    one of ours meanwhile: decelerate before pickling for somebody who has PEFT alone.

    Args:
        model: a ``PeftModel``, a ``PeftMixedModel``, or any module with PEFT layers in it.
        strict: raise where a PEFT layer cannot be taken over, before anything is changed.

    Returns:
        The layers taken over, and the others with the reason.

    Raises:
        TypeError: not a module.
        ValueError: the model holds no PEFT layer; or, if strict, one cannot be taken over. It is unchanged then.
    """
    check_model(model)
    layers = dict(peft_layers(model))
    if not layers:
        raise ValueError(f"model must have PEFT layers, as peft.get_peft_model makes them, got {type(model).__name__}")
    method_of = known_methods()
    report = AccelerationReport()
    prepared: dict[str, Any] = {}
    for path, layer in layers.items():
        method = method_of(peft_class(layer))
        reason = refusal(layer, method)
        if reason is None and is_bypassed(model, path):
            reason = "nn.MultiheadAttention reads its weight without calling it"
        if method is not None and reason is None:
            try:
                prepared[path] = prepare(layer, method)
            except ValueError as error:
                reason = str(error)
        if reason is None:
            report.accelerated.append(path)
        else:
            report.left_alone[path] = reason
    if strict and report.left_alone:
        path, reason = next(iter(report.left_alone.items()))
        more = f", and {len(report.left_alone) - 1} more" if len(report.left_alone) > 1 else ""
        raise ValueError(f"layer {path!r} cannot be accelerated: {reason}{more}")
    for path, layer in layers.items():
        if path in report.left_alone:
            give_back(layer)
        else:
            layer.__class__ = accelerated_class(peft_class(layer))
            layer._prepared = prepared[path]
            vars(layer).pop("_plan", None)
    return report


def decelerate(model: nn.Module) -> nn.Module:
    """Gives every layer its PEFT class back. Does nothing where nothing was accelerated.

    Returns:
        The model itself.

    Raises:
        TypeError: not a module.
    """
    check_model(model)
    for module in model.modules():
        give_back(module)
    return model


def peft_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers with their paths; one that is used twice stands under its first path."""
    if "peft" not in sys.modules:  # nobody can have made any
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, module


def known_methods() -> Callable[[type[nn.Module]], type[PeftAdapter] | None]:
    """The function that says which method computes the layers of a PEFT class.

    Raises:
        ValueError: this version of PEFT lacks what they look for.
    """
    try:
        from fastpeft.interop.peft import method_of
    except ImportError as error:
        known = f"PEFT must be a version like 0.21, got {sys.modules['peft'].__version__}"
        raise ValueError(f"{known}: {error}") from error
    return method_of


def refusal(layer: Any, method: type[PeftAdapter] | None) -> str | None:
    """Why a PEFT layer cannot be taken over, or None where it can."""
    if method is None:
        layer_class = peft_class(layer)
        return f"no method here computes a {layer_class.__module__}.{layer_class.__qualname__}"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance, as offloading hooks do"
    if layer.merged_adapters and not isinstance(layer, Accelerated):
        return f"{', '.join(layer.merged_adapters)} merged already: unmerge first"
    return method.refusal(layer)
