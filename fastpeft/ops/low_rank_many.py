"""Decoding with many adapters in one batch: every row of x names its adapter, LoRA or MoS, or none.

With a = adapter[t], y[t] = W x[t] + b + s_a · B_a (A_a x[t]); a row that names none has the base product alone, bit for
bit. The vectors of all adapters of a layer lie one after the other, so ranks differ and nothing is padded, and one
launch serves the layer, whichever adapters a batch asks for (csrc/cuda/low_rank_many.cuh). The idea of such a batch is
Punica's (Chen et al., MLSys 2024, arXiv 2310.18547), that of ranks without padding S-LoRA's (Sheng et al., MLSys 2024,
arXiv 2311.03285).

Forward only: this serves trained adapters. Where there is no compiled kernel, the rows of one adapter are computed
together, adapter by adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.backend import Operator
from fastpeft.ops import base
from fastpeft.ops.mos import check_index

# y[t] += s[a] · B_a (A_a x[t]) in place, a = adapter[t]; y and x as rows, tables as ManyAdapters has them.
LOW_RANK_MANY = Operator(
    "low_rank_many_(Tensor(a!) y, Tensor x, Tensor shards_A, Tensor? index_A, Tensor shards_B, Tensor? index_B,"
    " Tensor first, Tensor scaling, Tensor adapter) -> ()",
    fake=lambda *_: None,
    order=("native", "torch"),
)


class ManyAdapters(NamedTuple):
    """The adapters of one layer, packed; see :func:`pack_lora` and :func:`pack_mos`, which make them.

    Row j of the packed A is the l shards index_A[j] of shards_A side by side; row j of the packed Bᵀ likewise. Without
    an index row j is shard j, and l is 1. Adapter a owns the packed rows first[a] … first[a + 1] − 1: its rank is their
    number, which may be 0.
    """

    shards_A: Tensor  # (n_A, in / l), floating point
    index_A: Tensor | None  # (R, l), int32
    shards_B: Tensor  # (n_B, out / l), the dtype of shards_A
    index_B: Tensor | None  # (R, l), int32
    first: Tensor  # (N + 1,), int32
    scaling: Tensor  # (N,), float32

    @property
    def in_features(self) -> int:
        return self.shards_A.shape[1] * (1 if self.index_A is None else self.index_A.shape[1])

    @property
    def out_features(self) -> int:
        return self.shards_B.shape[1] * (1 if self.index_B is None else self.index_B.shape[1])

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The packed rows start … stop − 1 of A, (r, in), and of Bᵀ, (r, out)."""
        if self.index_A is None or self.index_B is None:
            return self.shards_A[start:stop], self.shards_B[start:stop]
        A = self.shards_A[self.index_A[start:stop].long()].flatten(1)
        return A, self.shards_B[self.index_B[start:stop].long()].flatten(1)


def pack_lora(adapters: Sequence[tuple[Tensor, Tensor, float]]) -> ManyAdapters:
    """Packs LoRA adapters of one layer: (lora_A, lora_B, scaling) of shapes (r, in), (out, r), r differing.

    The tensors are copied, one dtype and one device for all.

    Raises:
        ValueError: there is no adapter, or a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    in_features, out_features = adapters[0][0].shape[-1], adapters[0][1].shape[0]
    model = adapters[0][0]
    for i, (lora_A, lora_B, _) in enumerate(adapters):
        base.check_shape(f"lora_A of adapter {i}", lora_A, ("r", in_features))
        base.check_shape(f"lora_B of adapter {i}", lora_B, (out_features, lora_A.shape[0]))
        _check_like(model, **{f"lora_A of adapter {i}": lora_A, f"lora_B of adapter {i}": lora_B})
    with torch.no_grad():
        shards_A = torch.cat([lora_A for lora_A, _, _ in adapters])
        shards_B = torch.cat([lora_B.T for _, lora_B, _ in adapters])
    first, scaling = _first_and_scaling(model, [(lora_A.shape[0], s) for lora_A, _, s in adapters])
    packed = ManyAdapters(shards_A, None, shards_B.contiguous(), None, first, scaling)
    check_tables(packed)
    return packed


def pack_mos(adapters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, float]]) -> ManyAdapters:
    """Packs MoS adapters of one layer: (pool_A, index_A, pool_B, index_B, scaling), shapes as :func:`mos_linear` has
    them, with one l for all; ranks differ.

    Pools are copied, one dtype and one device for all, and a pool that several adapters share is copied once.

    Raises:
        ValueError: there is no adapter, a shape or a device does not fit, or an index is out of range.
        TypeError: a dtype does not fit.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    model, shards, width_B = adapters[0][0], adapters[0][1].shape[-1], adapters[0][2].shape[-1]
    for i, (pool_A, index_A, pool_B, index_B, _) in enumerate(adapters):
        base.check_shape(f"pool_A of adapter {i}", pool_A, ("n_shards", model.shape[-1]))
        base.check_shape(f"index_A of adapter {i}", index_A, ("r", shards))
        base.check_shape(f"pool_B of adapter {i}", pool_B, ("n_shards", width_B))
        base.check_shape(f"index_B of adapter {i}", index_B, tuple(index_A.shape))
        _check_like(model, **{f"pool_A of adapter {i}": pool_A, f"pool_B of adapter {i}": pool_B})
        for name, index, pool in (("index_A", index_A, pool_A), ("index_B", index_B, pool_B)):
            check_index(f"{name} of adapter {i}", index, pool.shape[0])
    shards_A, index_A = _join([pool for pool, *_ in adapters], [index for _, index, *_ in adapters])
    shards_B, index_B = _join([adapter[2] for adapter in adapters], [adapter[3] for adapter in adapters])
    first, scaling = _first_and_scaling(model, [(adapter[1].shape[0], adapter[4]) for adapter in adapters])
    packed = ManyAdapters(shards_A, index_A, shards_B, index_B, first, scaling)
    check_tables(packed)
    return packed


def _check_like(model: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        base.check_floating(name, tensor)
        if tensor.dtype != model.dtype:
            raise TypeError(f"{name} must have the dtype of the first adapter, {model.dtype}, got {tensor.dtype}")
        if tensor.device != model.device:
            raise ValueError(f"{name} must be on the device of the first adapter, {model.device}, got {tensor.device}")


def _first_and_scaling(model: Tensor, adapters: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    first = [0]
    for rank, _ in adapters:
        first.append(first[-1] + rank)
    scaling = torch.tensor([s for _, s in adapters], dtype=torch.float32, device=model.device)
    return torch.tensor(first, dtype=torch.int32, device=model.device), scaling


def _join(pools: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Each different pool once, one after the other, and all indices into that."""
    starts: dict[int, int] = {}
    different: list[Tensor] = []
    total = 0
    for pool in pools:
        if id(pool) not in starts:
            starts[id(pool)] = total
            different.append(pool)
            total += pool.shape[0]
    with torch.no_grad():
        shifted = [index + starts[id(pool)] for pool, index in zip(pools, indices, strict=True)]
        return torch.cat(different), torch.cat(shifted).to(torch.int32)


def check_tables(adapters: ManyAdapters) -> None:
    """Raises unless packed tables fit each other and point only to what is there.

    The functions that pack them call this; :func:`low_rank_many` itself looks at shapes alone, because to look at
    numbers it would wait for the device.

    Raises:
        ValueError: a shape, a device or a number does not fit.
        TypeError: a dtype does not fit.
    """
    _check_layout(adapters)
    shards_A, index_A, shards_B, index_B, first, _ = adapters
    rows = shards_A.shape[0]
    if index_A is not None and index_B is not None:
        check_index("index_A", index_A, shards_A.shape[0])
        check_index("index_B", index_B, shards_B.shape[0])
        rows = index_A.shape[0]
    bounds = first.tolist()
    if bounds[0] != 0 or bounds[-1] != rows or any(stop < start for start, stop in pairwise(bounds)):
        raise ValueError(f"first must rise from 0 to the number of packed rows, {rows}, got {bounds}")


def _check_layout(adapters: ManyAdapters) -> None:
    shards_A, index_A, shards_B, index_B, first, scaling = adapters
    base.check_shape("shards_A", shards_A, ("n_A", "in/l"))
    base.check_shape("shards_B", shards_B, ("n_B", "out/l"))
    base.check_floating("shards_A", shards_A)
    if shards_B.dtype != shards_A.dtype:
        raise TypeError(f"shards_B must have the dtype of shards_A, {shards_A.dtype}, got {shards_B.dtype}")
    if (index_A is None) != (index_B is None):
        given, missing = ("index_B", "index_A") if index_A is None else ("index_A", "index_B")
        raise ValueError(f"{missing} must be given where {given} is, got None")
    if index_A is None:
        base.check_shape("shards_B", shards_B, (shards_A.shape[0], "out"))
    else:
        base.check_shape("index_A", index_A, ("R", "l"))
        base.check_shape("index_B", index_B, tuple(index_A.shape))  # type: ignore[arg-type]
    base.check_shape("scaling", scaling, ("N",))
    base.check_shape("first", first, (scaling.shape[0] + 1,))
    if scaling.dtype != torch.float32:
        raise TypeError(f"scaling must be float32, got {scaling.dtype}")
    for name, tensor in zip(adapters._fields, adapters, strict=True):
        if tensor is None:
            continue
        if name in ("index_A", "index_B", "first") and tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.device != shards_A.device:
            raise ValueError(f"{name} must be on the device of shards_A, {shards_A.device}, got {tensor.device}")


def low_rank_many(
    x: Tensor,  # (..., in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    adapters: ManyAdapters,
    adapter: Tensor,  # (...)
) -> Tensor:  # (..., out)
    """y[t] = W x[t] + b + s_a · B_a (A_a x[t]) with a = adapter[t]: a batch whose rows name their adapters.

    LoRA: Hu et al., ICLR 2022, arXiv 2106.09685, equation 3. MoS: ICLR 2025, arXiv 2410.00938, whose pools and indices
    are read as they are. Batches of this kind: Punica, arXiv 2310.18547; ranks that differ in one launch: S-LoRA, arXiv
    2311.03285. Forward only. The adapters' products are summed up in float32 (float64 for such adapters) and rounded
    once.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x, or None for the deltas alone.
        bias: (out,) in the dtype of x, or None.
        adapters: N adapters of this layer, made by :func:`pack_lora` or :func:`pack_mos`.
        adapter: (...), int32: for each row of x a number in [0, N), or −1 for none. Any other number is none, too.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit, or an argument requires a gradient while gradients are recorded.
        TypeError: a dtype does not fit.
    """
    _check_layout(adapters)
    base.check_base(x, weight, bias, adapters.in_features, adapters.out_features)
    base.check_shape("adapter", adapter, tuple(x.shape[:-1]))
    if adapter.dtype != torch.int32:
        raise TypeError(f"adapter must be int32, got {adapter.dtype}")
    base.check_same_device(x, shards_A=adapters.shards_A, adapter=adapter)
    wanting = {"x": x, "weight": weight, "bias": bias, **adapters._asdict()}
    for name, tensor in wanting.items():
        if base.needs_autograd(tensor):
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True: there is no backward")
    backend = LOW_RANK_MANY.choose(x, adapters.shards_A)
    return base.through_autocast(_apply, x, weight, bias, adapters, adapter, backend)


def _apply(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: ManyAdapters, adapter: Tensor, backend: str
) -> Tensor:
    rows = base.as_rows(x)
    y = rows.new_zeros(rows.shape[0], adapters.out_features) if weight is None else F.linear(rows, weight, bias)
    add = {"native": _add_native, "reference": _add_reference}.get(backend, low_rank_many_)
    add(y, rows, adapters, adapter.flatten())
    return base.like_rows(y, x)


def _add_native(y: Tensor, x: Tensor, adapters: ManyAdapters, adapter: Tensor) -> None:
    # The kernel takes rows at any distance, with their features side by side.
    x = x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
    LOW_RANK_MANY.call("native", y, x, *adapters, adapter.contiguous())


def _add_reference(y: Tensor, x: Tensor, adapters: ManyAdapters, adapter: Tensor) -> None:
    for number, (start, stop) in enumerate(pairwise(adapters.first.tolist())):
        A, B_transposed = adapters.rows(start, stop)
        delta = reference.lora.lora_weight(A, B_transposed.T, float(adapters.scaling[number]))
        y[adapter == number] += base.dense_linear(x[adapter == number], None, None, delta)


def low_rank_many_(
    y: Tensor,  # (T, out)
    x: Tensor,  # (T, in)
    adapters: ManyAdapters,
    adapter: Tensor,  # (T,)
) -> None:
    """The composition: for each adapter that occurs its rows of x are gathered, and their deltas added into y."""
    bounds = adapters.first.tolist()
    wide = torch.promote_types(adapters.shards_A.dtype, torch.float32)
    for number in adapter.unique().tolist():
        if not 0 <= number < len(bounds) - 1 or bounds[number] >= bounds[number + 1]:
            continue
        (rows,) = (adapter == number).nonzero(as_tuple=True)
        A, B_transposed = adapters.rows(bounds[number], bounds[number + 1])
        h = (x[rows].to(wide) @ A.to(wide).T) * adapters.scaling[number]
        y[rows] = (y[rows] + h @ B_transposed.to(wide)).to(y.dtype)
