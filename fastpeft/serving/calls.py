"""A layer's part of a batch in two C++ calls, on CPUs and while nothing looks on: csrc/cpu/layer_calls.cpp says why.

They do what the families' operators do, to the last bit, and take their tables from the same memory. Where somebody
follows the operators (torch.compile, a tracer, a mode), where a backend was asked for, or where what comes in is not
ordinary, the operators are called.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import backend
from fastpeft.ops import base

if TYPE_CHECKING:
    from fastpeft.nn.adapter import Site
    from fastpeft.serving.plan import Plan
    from fastpeft.serving.tables import FamilyTables

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


_UNKNOWN: Any = object()


class Calls(NamedTuple):
    """A layer's calls for inputs of one shape and dtype."""

    layer: Any  # _C.LayerCalls; None where no adapter touches the layer
    rows: Any  # _C.BatchRows
    rotates: bool
    numbers: int  # of the layer's output
    spare: dict[int, Tensor]  # by thread: where a rotated input may lie


def calls_of(plan: Plan, number: int, x: Any) -> Calls | None:
    """The calls of a layer for x; None where its operators are to be called.

    Asked of every layer, so in few steps: what depends on the shape and the dtype alone is kept.
    """
    if _is_compiling() or type(x) is not Tensor:
        return None
    key = number, x.shape, x.dtype
    found = plan.calls.get(key, _UNKNOWN)
    if found is _UNKNOWN:
        found = plan.calls[key] = _make(plan, number, x)
    return found if found is not None and _unwatched(x) else None


# Looked up once: asked of every layer, attributes of modules cost as much as what they hold.
_autocast, _functorch = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def _unwatched(x: Tensor) -> bool:
    """Whether nobody would miss the operators, and x is as the calls take it."""
    return (
        x.is_contiguous()
        and not (x.requires_grad and _is_grad_enabled())
        and not _autocast()
        and not _functorch()
        and not _modes()
        and _tracing() is None
        and backend._forced in (None, "native")
    )


def _make(plan: Plan, number: int, x: Tensor) -> Calls | None:
    site = plan._bank.sites[number]
    if backend.extension is None or not x.is_cpu or x.dtype not in DTYPES or x.numel() == 0:
        return None
    base.check_input(x, site.in_features, None)
    batch = plan.batch(x)
    families = tuple(
        (family, tables)
        for family, tables, touched, _, _ in (*batch.rotations, *batch.deltas)
        if touched >> number & 1 and tables.layers[number] is not None
    )
    kept, key = plan._bank._residency.layer_calls, (number, x.dtype, families)
    layer = kept.get(key, _UNKNOWN)
    if layer is _UNKNOWN:
        layer = kept[key] = _layer_calls(site, number, x.dtype, families)
    if layer is None:
        return None
    tokens = x.numel() // site.in_features
    if tokens not in plan.batch_rows:
        plan.batch_rows[tokens] = backend.extension.BatchRows(batch.packed.numpy())
    spare = plan.spares.setdefault((x.shape, x.dtype), {})
    return Calls(layer if families else None, plan.batch_rows[tokens], layer.rotates, tokens * site.out_features, spare)


def room_for(calls: Calls, x: Tensor) -> Tensor:
    """Memory of this thread's like x, which every layer of the plan that rotates such an x may write to.

    It is in the caches where fresh memory would not be.
    """
    thread = get_ident()
    room = calls.spare.get(thread)
    if room is None:
        with torch.inference_mode(False):
            room = calls.spare[thread] = torch.empty_like(x)
    return room


def _layer_calls(site: Site, number: int, dtype: torch.dtype, families: Iterable[tuple[int, FamilyTables]]) -> Any:
    """A layer's _C.LayerCalls for families of a plan; None where C++ does not take their tables."""
    assert backend.extension is not None
    layer = backend.extension.LayerCalls(DTYPES[dtype], site.in_features, site.out_features)
    for family, tables in families:
        arrays = tables.arrays(number)
        if arrays is None:
            return None
        tables.family.enlist(layer, family, arrays)
    return layer
