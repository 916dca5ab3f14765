"""A layer's part of a batch in two C++ calls, on CPUs and while nothing looks on: csrc/cpu/layer_calls.cpp says why.

They do what the families' operators do, to the last bit, and take their tables from the same memory. Where somebody
follows the operators (torch.compile, a tracer, a mode), where a backend was asked for, or where what comes in is not
ordinary, the operators are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import backend
from fastpeft.ops import base

if TYPE_CHECKING:
    from fastpeft.serving.plan import Plan

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


_UNKNOWN: Any = object()


class Calls(NamedTuple):
    """A layer's calls for inputs of one shape and dtype."""

    layer: Any  # _C.LayerCalls; None where no adapter touches the layer
    rotates: bool
    numbers: int  # of the layer's output


def calls_of(plan: Plan, number: int, x: Any) -> Calls | None:
    """The calls of a layer for x; None where its operators are to be called.

    Asked of every layer, so in few steps: what depends on the shape and the dtype alone is kept.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    key = number, x.shape, x.dtype
    found = plan.calls.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        found = plan.calls[key] = _make(plan, number, x)
    return found if found is not None and _unwatched(x) else None


def _unwatched(x: Tensor) -> bool:
    """Whether nobody would miss the operators, and x is as the calls take it."""
    return (
        x.is_contiguous()
        and backend._forced in (None, "native")
        and not base.needs_autograd(x)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
    )


def _make(plan: Plan, number: int, x: Tensor) -> Calls | None:
    site = plan._bank.sites[number]
    if backend.extension is None or not x.is_cpu or x.dtype not in DTYPES or x.numel() == 0:
        return None
    base.check_input(x, site.in_features, None)
    batch = plan.batch(x)
    tokens = x.numel() // site.in_features
    layer = backend.extension.LayerCalls(DTYPES[x.dtype], tokens, site.in_features, site.out_features)
    touches = False
    for tables, touched, rows, slots in (*batch.rotations, *batch.deltas):
        if touched >> number & 1 and tables.layers[number] is not None:
            arrays = tables.arrays(number)  # kept: a new plan asks for all of them at once
            if arrays is None:
                return None
            tables.family.enlist(layer, arrays, rows.numpy(), slots.numpy())
            touches = True
    return Calls(layer if touches else None, layer.rotates, tokens * site.out_features)
