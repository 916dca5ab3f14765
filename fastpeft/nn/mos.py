"""MoS, Mixture of Shards (ICLR 2025, arXiv 2410.00938): LoRA matrices assembled from pools that layers share.

The layers of one kind (the same last part of the path, the same sizes) share a pool for A and one for B. With L
layers, l shards per vector and pool rank e, a pool has e · L · l shards. The last p · L · l are private: layer i owns
its p · l. The rest is public, and each layer draws the shards of its other r − p rows from it without replacement.
A and B draw independently. All draws come from ``seed`` and the kind's name, on the CPU, whatever the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastpeft import reference
from fastpeft.config import MOST_RANK, AdapterConfig, require_bool, require_finite, require_int, require_probability
from fastpeft.nn.adapter import Adapter, Site, dropout_p, make_dropout, parameter_of
from fastpeft.nn.linear import AdaptedLinear
from fastpeft.nn.lora import LowRankFamily
from fastpeft.nn.served import Expected, Part, Serving, Tensors, stack_rows
from fastpeft.ops.lora import apply_lora
from fastpeft.ops.mos import apply_mos, assemble, check_index


@dataclass(kw_only=True)
class MosConfig(AdapterConfig):
    """LoRA of rank r with the parameters of a LoRA of rank ``pool_rank`` in every layer.

    Args:
        r: the active rank of a layer.
        pool_rank: e, the rank that the pool's parameters would pay for.
        shards_per_vector: l, into how many shards a row of A and a column of B are cut.
        private_rank: p, how many of a layer's rows use shards that no other layer reads.
        seed: of the draw of shards.
        lora_alpha: the scaling is lora_alpha / r.
        lora_dropout: probability of dropping an entry of the adapter's input while training.
        init_weights: True: B starts at zero. False: uniform like A, so that the adapter changes the model at once.
    """

    peft_type: ClassVar[str] = "MOS"

    r: int = 8
    pool_rank: int = 2
    shards_per_vector: int = 4
    private_rank: int = 1
    seed: int = 0
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    init_weights: bool = True

    def check(self) -> None:
        require_int("r", self.r, 1, MOST_RANK)
        require_int("pool_rank", self.pool_rank, 1, MOST_RANK)
        require_int("shards_per_vector", self.shards_per_vector, 1, MOST_RANK)
        require_int("private_rank", self.private_rank, 0)
        require_int("seed", self.seed, 0)
        require_finite("lora_alpha", self.lora_alpha)
        require_probability("lora_dropout", self.lora_dropout)
        require_bool("init_weights", self.init_weights)
        if self.private_rank > min(self.r, self.pool_rank):
            least = min(self.r, self.pool_rank)
            raise ValueError(f"private_rank must be at most min(r, pool_rank) = {least}, got {self.private_rank}")


def draw_index(config: MosConfig, n_layers: int, kind: str, side: str) -> Tensor:
    """Which shards each layer of a kind reads, (L, r, l), int64. The last p rows are the private ones."""
    shards, r, private = config.shards_per_vector, config.r, config.private_rank
    public_shards = (config.pool_rank - private) * n_layers * shards
    # A stable hash: Python's own differs from process to process.
    digest = hashlib.sha256(f"{config.seed}/{kind}/{side}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    index = torch.empty(n_layers, r, shards, dtype=torch.int64)
    for layer in range(n_layers):
        drawn = torch.randperm(public_shards, generator=generator)[: (r - private) * shards]
        index[layer, : r - private] = drawn.reshape(r - private, shards)
        first = public_shards + layer * private * shards
        index[layer, r - private :] = torch.arange(first, first + private * shards).reshape(private, shards)
    return index


def kind_of(path: str, out_features: int, in_features: int) -> str:
    """Layers of one kind share pools."""
    return f"{path.rpartition('.')[2]}.{out_features}x{in_features}"


def sites_by_kind(sites: Sequence[Site]) -> dict[str, list[Site]]:
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(kind_of(site.path, site.out_features, site.in_features), []).append(site)
    return kinds


def check_kind(config: MosConfig, kind: str, sites: Sequence[Site]) -> None:
    """Raises ValueError where these layers, all there are of one kind, cannot have such an adapter."""
    first, n_layers, shards = sites[0], len(sites), config.shards_per_vector
    for name, size in (("in", first.in_features), ("out", first.out_features)):
        if size % shards:
            raise first.error(f"shards_per_vector={shards} does not divide its {name}_features, {size}")
    wanted, public = (
        (config.r - config.private_rank) * shards,
        (config.pool_rank - config.private_rank) * n_layers * shards,
    )
    if wanted > public:
        raise first.error(
            f"r={config.r} with private_rank={config.private_rank} draws {wanted} public shards, but the pool of "
            f"pool_rank={config.pool_rank} for {n_layers} layer(s) of kind {kind!r} has {public}: raise pool_rank "
            "or lower r"
        )


class MoSAdapter(Adapter):
    """A layer's view of its kind's pools. The pools are the same Parameter objects in all layers of the kind."""

    config_class = MosConfig
    shares_parameters = True
    index_A: Tensor
    index_B: Tensor

    def __init__(
        self,
        config: MosConfig,
        site: Site,
        pool_A: nn.Parameter,
        pool_B: nn.Parameter,
        index_A: Tensor,
        index_B: Tensor,
    ) -> None:
        super().__init__(config, site)
        self._fully_sharded = False
        self.scaling = reference.lora.lora_scaling(config.r, config.lora_alpha, False)
        self.dropout_p = config.lora_dropout
        self.dropout = make_dropout(config.lora_dropout)
        self.pool_A, self.pool_B = pool_A, pool_B
        for name, index, pool in (("index_A", index_A, pool_A), ("index_B", index_B, pool_B)):
            check_index(name, index, pool.shape[0])
            self.register_buffer(name, index.to(site.device))

    @classmethod
    def build(cls, config: MosConfig, sites: Sequence[Site]) -> list[Adapter]:
        made = {
            site.path: adapter
            for kind, members in sites_by_kind(sites).items()
            for site, adapter in zip(members, cls._build_kind(config, kind, members), strict=True)
        }
        return [made[site.path] for site in sites]

    @classmethod
    def _build_kind(cls, config: MosConfig, kind: str, sites: list[Site]) -> list[Adapter]:
        first, n_layers, shards = sites[0], len(sites), config.shards_per_vector
        check_kind(config, kind, sites)
        for site in sites:
            if (site.device, site.dtype) != (first.device, first.dtype):
                raise site.error(
                    f"is on {site.device} in {site.dtype}, but {first.path!r}, which would share its pool, is on "
                    f"{first.device} in {first.dtype}"
                )
        n_shards = config.pool_rank * n_layers * shards
        pool_A = first.parameter(n_shards, first.in_features // shards)
        pool_B = first.parameter(n_shards, first.out_features // shards)
        # kaiming_uniform(a=√5) of an assembled row: fan is the row's length, not the shard's.
        nn.init.uniform_(pool_A, -1 / math.sqrt(first.in_features), 1 / math.sqrt(first.in_features))
        if not config.init_weights:
            nn.init.uniform_(pool_B, -1 / math.sqrt(config.r), 1 / math.sqrt(config.r))
        index_A = draw_index(config, n_layers, kind, "A")
        index_B = draw_index(config, n_layers, kind, "B")
        return [cls(config, site, pool_A, pool_B, index_A[i], index_B[i]) for i, site in enumerate(sites)]

    @classmethod
    def pack(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """Each pool once, and each layer's shard numbers, so that a file does not rest on a random generator.

        A pool goes by its kind. Layers that were made one by one have pools of their own, which go by the path.
        """
        tensors: dict[str, Tensor] = {}
        for path, adapter in adapters.items():
            assert isinstance(adapter, MoSAdapter)
            kind = kind_of(path, adapter.out_features, adapter.in_features)
            if tensors.get(f"pools.{kind}.pool_A", adapter.pool_A) is not adapter.pool_A:
                kind = path
            for name in ("pool_A", "pool_B"):
                tensors[f"pools.{kind}.{name}"] = getattr(adapter, name)
            for name in ("index_A", "index_B"):
                tensors[f"layers.{path}.{name}"] = getattr(adapter, name)
        return tensors

    @classmethod
    def check_file(cls, adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor], source: str) -> None:
        for path, adapter in adapters.items():
            assert isinstance(adapter, MoSAdapter)
            for name in ("index_A", "index_B"):
                key = f"layers.{path}.{name}"
                if tensors[key].dtype not in (torch.int64, torch.int32):
                    raise ValueError(f"{source}: {key} must hold integers, got {tensors[key].dtype}")
                check_index(f"{source}: {key}", tensors[key], adapter.pool_A.shape[0])

    @classmethod
    def serve(cls, config: MosConfig, sites: Sequence[Site], dtype: torch.dtype) -> Serving:
        """Pools stay pools: a layer's rows are named shard by shard."""
        rank, shards = config.r, config.shards_per_vector
        tensors: dict[str, Expected] = {}
        pools: list[tuple[str, bool, int, int]] = []  # A and B of each kind
        pool_of: dict[str, int] = {}  # a layer's path -> its kind, as a number
        for number, (kind, members) in enumerate(sites_by_kind(sites).items()):
            check_kind(config, kind, members)
            first, n_shards = members[0], config.pool_rank * len(members) * shards
            for side, features in (("A", first.in_features), ("B", first.out_features)):
                key, width = f"pools.{kind}.pool_{side}", features // shards
                tensors[key] = Expected((n_shards, width))
                pools.append((key, False, n_shards, width))
            for site in members:
                pool_of[site.path] = number
                for name in ("index_A", "index_B"):
                    tensors[f"layers.{site.path}.{name}"] = Expected((rank, shards), integers=True)
        rows, starts = stack_rows(pools, dtype)
        kinds = torch.tensor([pool_of[site.path] for site in sites], dtype=torch.int64, device="cpu")
        sizes = torch.tensor([count for _, _, count, _ in pools[::2]], dtype=torch.int64, device="cpu")[kinds]

        scaling = reference.lora.lora_scaling(rank, config.lora_alpha, False)

        def entries(tensors: Tensors, max_rank: int) -> dict[str, Tensor]:
            found = {
                "rank": torch.full((len(sites),), rank, device="cpu"),
                "scaling": torch.full((len(sites),), scaling, dtype=torch.float64, device="cpu"),
            }
            for side, name in enumerate(("index_A", "index_B")):
                index = torch.stack([tensors[f"layers.{site.path}.{name}"] for site in sites]).long()  # (layers, r, l)
                outside = ((index < 0) | (index >= sizes[:, None, None])).flatten(1).any(1)
                if bool(outside.any()):
                    worst = int(outside.nonzero()[0])
                    check_index(f"layers.{sites[worst].path}.{name}", index[worst], int(sizes[worst]))
                row = torch.arange(max_rank, device="cpu").clamp(max=rank - 1)  # what lies past the rank does not count
                found[name] = index[:, row] + starts.view(-1, 2)[kinds, side][:, None, None]
            return found

        numbers = sum(rank * (site.in_features + site.out_features) for site in sites)
        return Serving(tensors, [Part(LowRankFamily(shards), sites, rows, entries, rank, numbers)])

    @property
    def _is_fsdp_managed_module(self) -> bool:
        return self._fully_sharded

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, value: bool) -> None:
        # fully_shard sets this on every module that it has taken. A pool that belongs to several layers would go on as
        # several pools, one in each group, and nothing would say so; and its gradient would come too late for a group,
        # from a tap that may be older than the group's forward.
        if type(self.pool_A) is not nn.Parameter:
            raise ValueError(
                "MoS's pools, which layers share, cannot be sharded with one of them: give fully_shard "
                "ignored_params=fastpeft.interop.distributed.keep_whole(model, mesh)"
            )
        self._fully_sharded = value

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p = dropout_p(self.dropout) if self.dropout_p > 0 else 0.0
        return apply_mos(x, weight, bias, *self.shards(), self.scaling, p)

    def delta(self, x: Tensor) -> Tensor:
        return apply_mos(x, None, None, *self.shards(), self.scaling, dropout_p(self.dropout))

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        A, B_transposed = assemble(*self.shards())
        return apply_lora(x, weight, bias, A, B_transposed[:, rows].T, self.scaling)

    def linear_columns(self, x: Tensor, weight: Tensor, columns: slice) -> Tensor:
        A, B_transposed = assemble(*self.shards())
        return apply_lora(x, weight, None, A[:, columns], B_transposed.T, self.scaling)

    def delta_weight(self) -> Tensor:
        return reference.mos.mos_weight(*self.shards(), self.scaling)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        pool_A, index_A, pool_B, index_B = self.shards()
        return pool_A[index_A].flatten(1), pool_B[index_B].flatten(1).T * self.scaling

    def shards(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        buffers = self._buffers
        return parameter_of(self, "pool_A"), buffers["index_A"], parameter_of(self, "pool_B"), buffers["index_B"]  # type: ignore[return-value]

    def extra_repr(self) -> str:
        r, shards = self.index_A.shape
        return f"r={r}, shards_per_vector={shards}, pool={self.pool_A.shape[0]} shards"


class MoSLinear(AdaptedLinear):
    """An ``nn.Linear`` with a MoS adapter of its own pools. In a model, ``fastpeft.adapt`` lets layers share them."""

    adapter_class = MoSAdapter
