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
        _enter(plan, number, x)
        found = plan.calls[key]
    return found if found is not None and _unwatched(x) else None


# Looked up once: asked of every layer, attributes of modules cost as much as what they hold.
_autocast, _functorch = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active
_modes, _tracing = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_is_compiling, _is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


def _unwatched(x: Tensor) -> bool:
    """Whether nobody would miss the operators, and x is as the calls take it."""
    return (
        x.is_cpu
        and x.is_contiguous()
        and not (x.requires_grad and _is_grad_enabled())
        and not _autocast()
        and not _functorch()
        and not _modes()
        and _tracing() is None
        and backend._forced in (None, "native")
    )


def _enter(plan: Plan, number: int, x: Tensor) -> None:
    """The calls of a layer for x, and of all others that take its like: between two products each would take longer."""
    sites, shape, dtype = plan._bank.sites, x.shape, x.dtype
    extension = backend.extension
    if extension is None or not x.is_cpu or dtype not in DTYPES or x.numel() == 0:
        plan.calls[number, shape, dtype] = None
        return
    base.check_input(x, sites[number].in_features, None)
    batch, kept = plan.batch(x), plan._bank._residency.layer_calls
    tokens = x.numel() // shape[-1]
    rows, spare = extension.BatchRows(batch.packed.numpy()), plan.spares.setdefault((shape, dtype), {})
    groups = [(group.family, group.tables, group.touched) for group in (*batch.rotations, *batch.deltas)]
    for other, site in enumerate(sites):
        if site.in_features != shape[-1]:
            continue
        families = tuple(
            (family, tables)
            for family, tables, touched in groups
            if touched >> other & 1 and tables.layers[other] is not None
        )
        key = other, dtype, families
        layer = kept.get(key, _UNKNOWN)
        if layer is _UNKNOWN:
            layer = kept[key] = _layer_calls(site, other, dtype, families)
        numbers = tokens * site.out_features
        plan.calls[other, shape, dtype] = (
            None if layer is None else Calls(layer if families else None, rows, layer.rotates, numbers, spare)
        )


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
