"""LoRA and MoS for a batch whose rows have different adapters, or none.

With a the adapter of row t, y[t] = W x[t] + b + s_a · B_a (A_a x[t]); a row that has none keeps the base product alone,
bit for bit. Vectors lie in arenas, and small tables of indices say which of them make up an adapter: so ranks differ,
nothing but indices is padded, MoS adapters keep their pools, and one launch serves the layer, whichever adapters a
batch asks for (csrc/cpu/low_rank_many.cpp, csrc/cuda/low_rank_many.cuh). The idea of such a batch is Punica's (Chen et
al., MLSys 2024, arXiv 2310.18547), that of ranks without padding S-LoRA's (Sheng et al., MLSys 2024, arXiv 2311.03285).

What a plan is, and what numbers in tables may be: ops/many.py. Forward only: this serves trained adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft import reference
from fastpeft.backend import Operator
from fastpeft.ops import base, many
from fastpeft.ops.mos import check_index

LOW_RANK_MANY = Operator(
    "low_rank_many_(Tensor(a!) y, Tensor x, Tensor arena_A, Tensor index_A, Tensor arena_B, Tensor index_B,"
    " Tensor rank, Tensor scaling, Tensor rows, Tensor slots) -> ()",
    fake=lambda *_: None,
    order=("native", "torch"),
)


def low_rank_many_(
    y: Tensor,  # (T, out)
    x: Tensor,  # (T, in)
    arena_A: Tensor,  # (·, in / l)
    index_A: Tensor,  # (S, r_max, l) int32
    arena_B: Tensor,  # (·, out / l)
    index_B: Tensor,  # (S, r_max, l) int32
    rank: Tensor,  # (S,) int32
    scaling: Tensor,  # (S,) float32
    rows: Tensor,  # (T,) int32
    slots: Tensor,  # (T,) int32
) -> None:
    """y[t] += s · B (A x[t]) in place with the adapter of the slot of row t: LoRA, arXiv 2106.09685, and MoS, arXiv
    2410.00938.

    Row j of a slot's A is the l rows index_A[slot, j] of arena_A side by side; row j of Bᵀ likewise; LoRA has l = 1.
    Computed in the widest of float32 and the dtypes of x and the arenas, rounded once.

    Args:
        y: (T, out) in the dtype of x.
        x: (T, in), any floating-point dtype.
        arena_A: rows of in / l features.
        index_A: (S, r_max, l), int32: rows of arena_A.
        arena_B: rows of out / l features, in the dtype of arena_A.
        index_B: (S, r_max, l), int32: rows of arena_B.
        rank: (S,), int32, at most r_max: how many rows of a slot's indices count; 0 where it adds nothing.
        scaling: (S,), float32.
        rows: (T,), int32, see ops/many.py.
        slots: (T,), int32, likewise.

    Raises:
        ValueError: a shape or a device does not fit, on a CPU a number that is needed is out of range, or an argument
            requires a gradient while gradients are recorded.
        TypeError: a dtype does not fit.
    """
    x = many.beside(x)
    backend = many.choose(LOW_RANK_MANY, x, arena_A, narrow_on_gpu=True, y=y, arena_A=arena_A, arena_B=arena_B)
    tables = index_A, arena_B, index_B, rank, scaling
    if backend == "native":
        LOW_RANK_MANY.call("native", y, x, arena_A, *tables, rows, slots)
        return
    many.check_rows(x, rows, slots, y)
    _check_layout(x, ManyAdapters(arena_A, *tables), y.shape[1])
    if 0 in (y.numel(), x.numel(), arena_A.numel(), arena_B.numel(), index_A.numel()):
        return
    add = _add_reference if backend == "reference" else _add
    add(y, x, ManyAdapters(arena_A, *tables), rows, slots)


class ManyAdapters(NamedTuple):
    """The adapters of one layer, one in each slot; :func:`pack_lora` and :func:`pack_mos` make them. The fields are the
    arguments of :func:`low_rank_many_` of these names.
    """

    arena_A: Tensor  # (n_A, in / l), floating point
    index_A: Tensor  # (S, r_max, l), int32
    arena_B: Tensor  # (n_B, out / l), the dtype of arena_A
    index_B: Tensor  # (S, r_max, l), int32
    rank: Tensor  # (S,), int32
    scaling: Tensor  # (S,), float32

    @property
    def in_features(self) -> int:
        return self.arena_A.shape[1] * self.index_A.shape[2]

    @property
    def out_features(self) -> int:
        return self.arena_B.shape[1] * self.index_B.shape[2]

    def vectors(self, slot: int) -> tuple[Tensor, Tensor]:
        """A, (r, in), and Bᵀ, (r, out), of a slot."""
        r = int(self.rank[slot])
        A, B_transposed = self.arena_A[self.index_A[slot, :r].long()], self.arena_B[self.index_B[slot, :r].long()]
        return A.reshape(r, self.in_features), B_transposed.reshape(r, self.out_features)


def _add(y: Tensor, x: Tensor, tables: ManyAdapters, rows: Tensor, slots: Tensor) -> None:
    """Row by row with its own matrices, all at once, in sums that no library orders."""
    arena_A, index_A, arena_B, index_B, rank, scaling = tables
    wide = torch.promote_types(arena_A.dtype, torch.promote_types(x.dtype, torch.float32))
    slot = many.slot_of_rows(rows, slots, rank.shape[0])
    r_max = index_A.shape[1]
    r = torch.where(slot >= 0, rank[slot.clamp(min=0)], 0)
    r = many.inside("rank", r, slot >= 0, r_max + 1)
    for part in many.chunks(x.shape[0], r_max * (tables.in_features + tables.out_features)):
        counts = torch.arange(r_max, device=x.device) < r[part, None]  # (T, r_max)
        used, named = counts[..., None].expand(-1, -1, index_A.shape[2]), slot[part].clamp(min=0)
        A = arena_A[many.inside("index_A", index_A[named], used, arena_A.shape[0])].to(wide).flatten(2)
        h = (A * x[part, None].to(wide)).sum(-1) * scaling[named, None]
        B = arena_B[many.inside("index_B", index_B[named], used, arena_B.shape[0])].to(wide).flatten(2)
        delta = torch.where(counts[..., None], h[..., None] * B, 0).sum(1)
        y[part] = torch.where(r[part, None] > 0, (y[part].to(wide) + delta).to(y.dtype), y[part])


def _add_reference(y: Tensor, x: Tensor, tables: ManyAdapters, rows: Tensor, slots: Tensor) -> None:
    for slot, members in many.groups(rows, slots, len(tables.rank)).items():
        A, B_transposed = tables.vectors(slot)
        delta = reference.lora.lora_weight(A, B_transposed.T, float(tables.scaling[slot]))
        y[members] += base.dense_linear(x[members], None, None, delta)


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
        arena_A = torch.cat([lora_A for lora_A, _, _ in adapters])
        arena_B = torch.cat([lora_B.T for _, lora_B, _ in adapters])
    numbers = torch.arange(len(arena_A)).split([len(lora_A) for lora_A, _, _ in adapters])
    index, rank = _pad([part[:, None] for part in numbers], model.device)
    scaling = torch.tensor([s for _, _, s in adapters], dtype=torch.float32, device=model.device)
    packed = ManyAdapters(arena_A, index, arena_B.contiguous(), index.clone(), rank, scaling)
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
    arena_A, indices_A = _join([pool for pool, *_ in adapters], [index for _, index, *_ in adapters])
    arena_B, indices_B = _join([adapter[2] for adapter in adapters], [adapter[3] for adapter in adapters])
    index_A, rank = _pad(indices_A, model.device)
    index_B, _ = _pad(indices_B, model.device)
    scaling = torch.tensor([adapter[4] for adapter in adapters], dtype=torch.float32, device=model.device)
    packed = ManyAdapters(arena_A, index_A, arena_B, index_B, rank, scaling)
    check_tables(packed)
    return packed


def _check_like(model: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        base.check_floating(name, tensor)
        if tensor.dtype != model.dtype:
            raise TypeError(f"{name} must have the dtype of the first adapter, {model.dtype}, got {tensor.dtype}")
        if tensor.device != model.device:
            raise ValueError(f"{name} must be on the device of the first adapter, {model.device}, got {tensor.device}")


def _pad(indices: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices (r, l) as one table (S, r_max, l), and their ranks."""
    rank = [len(index) for index in indices]
    table = torch.zeros(len(indices), max(rank), indices[0].shape[1], dtype=torch.int32, device=device)
    for slot, index in enumerate(indices):
        table[slot, : len(index)] = index
    return table, torch.tensor(rank, dtype=torch.int32, device=device)


def _join(pools: Sequence[Tensor], indices: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
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
        return torch.cat(different), [i + starts[id(pool)] for pool, i in zip(pools, indices, strict=True)]


def check_tables(adapters: ManyAdapters) -> None:
    """Raises unless tables fit each other and point only to what is there.

    The functions that pack them call this; the operators look at numbers on a CPU alone, because to look at them on a
    GPU is to wait for it.

    Raises:
        ValueError: a shape, a device or a number does not fit.
        TypeError: a dtype does not fit.
    """
    _check_layout(adapters.arena_A, adapters, None)
    arena_A, index_A, arena_B, index_B, rank, _ = adapters
    r_max = index_A.shape[1]
    if rank.numel() and not (0 <= int(rank.min()) and int(rank.max()) <= r_max):
        raise ValueError(f"rank must lie in [0, {r_max}], got [{int(rank.min())}, {int(rank.max())}]")
    used = torch.arange(r_max, device=rank.device) < rank[:, None]
    check_index("index_A", index_A[used], arena_A.shape[0])
    check_index("index_B", index_B[used], arena_B.shape[0])


def _check_layout(x: Tensor, tables: ManyAdapters, out_features: int | None) -> None:
    """x names a device, and the features where out_features is given."""
    arena_A, index_A, arena_B, index_B, rank, scaling = tables
    many.check_table("index_A", index_A, ("S", "r_max", "l"), torch.int32, x)
    many.check_table("index_B", index_B, tuple(index_A.shape), torch.int32, x)
    many.check_table("rank", rank, (index_A.shape[0],), torch.int32, x)
    many.check_table("scaling", scaling, (index_A.shape[0],), torch.float32, x)
    many.check_arena("arena_A", arena_A, arena_A.shape[-1], x)
    many.check_arena("arena_B", arena_B, arena_B.shape[-1], x)
    if arena_B.dtype != arena_A.dtype:
        raise TypeError(f"arena_B must have the dtype of arena_A, {arena_A.dtype}, got {arena_B.dtype}")
    for name, tensor in zip(tables._fields, tables, strict=True):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if out_features is not None:
        for name, found, wanted in (("A", tables.in_features, x.shape[1]), ("B", tables.out_features, out_features)):
            if found != wanted:
                raise ValueError(f"arena_{name} must have rows of {wanted} / l features, got {found} / l")


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
    base.check_base(x, weight, bias, adapters.in_features, adapters.out_features)
    base.check_shape("adapter", adapter, tuple(x.shape[:-1]))
    if adapter.dtype != torch.int32:
        raise TypeError(f"adapter must be int32, got {adapter.dtype}")
    base.check_same_device(x, arena_A=adapters.arena_A, adapter=adapter)
    for name, tensor in {"x": x, "weight": weight, "bias": bias, **adapters._asdict()}.items():
        if base.needs_autograd(tensor):
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True: there is no backward")
    return base.through_autocast(_apply, x, weight, bias, adapters, adapter)


def _apply(x: Tensor, weight: Tensor | None, bias: Tensor | None, adapters: ManyAdapters, adapter: Tensor) -> Tensor:
    flat = base.as_rows(x)
    y = flat.new_zeros(flat.shape[0], adapters.out_features) if weight is None else F.linear(flat, weight, bias)
    rows, slots = many.plan_rows(adapter.flatten(), adapters.rank.shape[0])
    low_rank_many_(y, flat, *adapters, rows, slots)
    return base.like_rows(y, x)
