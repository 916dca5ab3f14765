"""A layer that serves: the base layer, and before and after it what the adapters of the batch's rows add.

As in ``nn/linear.py`` a module changes its class and stays what it was: its Parameters, state-dict keys and hooks. A
copy and a pickle of it are the base layer again.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastpeft.ops import base
from fastpeft.serving.calls import Calls, calls_of, room_for

if TYPE_CHECKING:
    from fastpeft.serving.bank import AdapterBank
    from fastpeft.serving.plan import Batch, Plan

LINEAR = nn.Linear.forward


class Served(nn.Module):
    """The part of a serving layer that does not depend on its base; comes before the base class."""

    _bank: AdapterBank
    _number: int  # among the bank's layers
    _base_class: ClassVar[type[nn.Module]]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # named as nn.Linear names it
        plan = self._bank._current()
        if plan is None:
            return super().forward(input, *args, **kwargs)
        if (calls := calls_of(plan, self._number, input)) is not None:
            return self._call(calls, plan, input, *args, **kwargs)
        base.check_input(input, self._bank.sites[self._number].in_features, None)
        batch = plan.batch(input)
        if torch._C._is_any_autocast_enabled() and base.autocast_enabled(input):
            return self._serve_cast(batch, input, *args, **kwargs)
        y = super().forward(self._rotated(batch, input), *args, **kwargs)
        return self._adapted(batch, input, y)

    def _call(self, calls: Calls, plan: Plan, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """In two calls; what a base of another kind may return is left to the operators."""
        layer, rows, rotates, numbers, _ = calls
        if layer is None:
            return super().forward(x, *args, **kwargs)
        here, z, parameters = x.data_ptr(), x, self._parameters
        # nn.Linear itself, whose parameters are at hand: asking a module for each by its name takes microseconds.
        weight = parameters.get("weight") if self._base_class.forward is LINEAR and "bias" in parameters else None
        if rotates:
            # What a linear layer returns is none of its input.
            z = torch.empty_like(x) if weight is None else room_for(calls, x)
            layer.before(rows, here, z.data_ptr())
        if weight is None or args or kwargs:
            y = super().forward(z, *args, **kwargs)
            bias = getattr(self, "bias", None) if rotates else None
        else:
            bias = parameters["bias"]
            y = linear(z, weight, bias)
        usual = type(y) is Tensor and y.numel() == numbers and y.dtype == x.dtype and y.is_contiguous() and y.is_cpu
        if not usual or not (bias is None or (bias.dtype == y.dtype and bias.is_contiguous())):
            return self._adapted(plan.batch(x), x, y)
        if y.requires_grad:
            _check_forward_only(y)
        layer.after(rows, here, y.data_ptr(), 0 if bias is None else bias.data_ptr())
        return y

    def _serve_cast(self, batch: Batch, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Autocast is the base's alone: what is beside it chooses its dtypes by hand."""
        with base.without_autocast(input):
            z = self._rotated(batch, input)
        y = super().forward(z, *args, **kwargs)
        with base.without_autocast(input):
            return self._adapted(batch, input, y)

    def _rotated(self, batch: Batch, x: Tensor) -> Tensor:
        z = x
        for _, tables, touched, rows, slots in batch.rotations:
            found = tables.layers[self._number]
            if found is not None and touched >> self._number & 1:
                z = tables.family.rotate(base.as_rows(z), found, rows, slots).view(x.shape)
        return z if z is x else _laid_out_as(z, x)

    def _adapted(self, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        _check_forward_only(y)
        y = y.contiguous()
        flat = base.as_rows(y)
        inputs = None
        for _, tables, touched, rows, slots in batch.rotations:
            found = tables.layers[self._number]
            if found is not None and touched >> self._number & 1:
                bias = getattr(self, "bias", None)
                tables.family.scale_(flat, None if bias is None else bias.to(y.dtype), found, rows, slots)
        for _, tables, touched, rows, slots in batch.deltas:
            found = tables.layers[self._number]
            if found is not None and touched >> self._number & 1:
                if inputs is None:
                    inputs = base.as_rows(x if x.dtype == y.dtype else x.to(y.dtype))
                tables.family.add_(flat, inputs, found, rows, slots)
        return y


def _check_forward_only(y: Tensor) -> None:
    if y.requires_grad:
        raise RuntimeError(
            "a bank serves, it does not train: call the model under torch.no_grad() or torch.inference_mode()"
        )


def _laid_out_as(z: Tensor, x: Tensor) -> Tensor:
    """z with the strides of x. They decide which product the frozen layer takes and where it adds the bias, and with
    that its last bits. A dimension that x only repeats gets a stride of its own, one that folds into no other.
    """
    if x.is_contiguous():
        return z
    strides, span = list(x.stride()), 1
    for dim in sorted(range(x.dim()), key=lambda dim: (strides[dim] == 0, strides[dim])):
        if x.shape[dim] > 1:
            if strides[dim] == 0:
                strides[dim] = span + x.shape[-1]
            elif strides[dim] < span:
                return _with_gaps(z)
            span += (x.shape[dim] - 1) * strides[dim]
    if span > 4 * z.numel():
        return _with_gaps(z)
    return torch.empty_strided(x.shape, strides, dtype=z.dtype, device=z.device).copy_(z)


def _with_gaps(z: Tensor) -> Tensor:
    """For rows that overlap or lie far apart: not contiguous is what they have in common."""
    return z.new_empty(*z.shape[:-1], z.shape[-1] + 1)[..., :-1].copy_(z)


@cache
def served_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The serving subclass of a layer class, one for each."""
    members = {
        "__reduce_ex__": _reduce_ex,
        "__module__": __name__,
        "_base_class": cls,
        "_linear": cls.forward is nn.Linear.forward,
    }
    return type(f"Served[{cls.__name__}]", (Served, cls), members)


def attach(module: nn.Module, bank: AdapterBank, number: int) -> None:
    module.__dict__.update(_bank=bank, _number=number)
    module.__class__ = served_class(type(module))  # type: ignore[arg-type]


def detach(module: nn.Module) -> None:
    """Undoes attach."""
    for name in ("_bank", "_number"):
        del module.__dict__[name]
    module.__class__ = module._base_class  # type: ignore[assignment]


def _reduce_ex(self: Any, protocol: Any) -> Any:
    state = dict(self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__)
    for name in ("_bank", "_number"):
        state.pop(name, None)
    return _restore, (self._base_class,), state


def _restore(cls: type[nn.Module]) -> nn.Module:
    return cls.__new__(cls)
