"""LoRA (Hu et al., ICLR 2022, arXiv 2106.09685) and rsLoRA (Kalajdzievski 2023, arXiv 2312.03732).

DoRA, which ``use_dora`` asks for, has its adapter in ``dora.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft import reference
from fastpeft.config import (
    MOST_RANK,
    AdapterConfig,
    require_bool,
    require_finite,
    require_int,
    require_pattern,
    require_probability,
    value_for,
)
from fastpeft.nn.adapter import Adapter, Site, dropout_p, make_dropout, parameter_of
from fastpeft.nn.linear import AdaptedLinear
from fastpeft.nn.served import Column, Expected, Family, Part, Serving, Tensors, stack_rows
from fastpeft.ops.lora import apply_lora
from fastpeft.ops.low_rank_many import low_rank_many_


@dataclass(kw_only=True)
class LoraConfig(AdapterConfig):
    """``W + s · B A`` with s = lora_alpha / r, or lora_alpha / √r for rsLoRA.

    Args:
        r: the rank.
        lora_alpha: the numerator of the scaling.
        lora_dropout: probability of dropping an entry of the adapter's input while training.
        use_rslora: scale by √r instead of r.
        use_dora: DoRA (Liu et al., ICML 2024, arXiv 2402.09353): m ⊙ (W + s · B A) / ‖W + s · B A‖ with the norm of
            every row and one more trained vector m. Only over bases with a dense weight.
        init_lora_weights: True: A uniform, B zero. "gaussian": A normal with standard deviation 1 / r, B zero. False:
            both uniform, so that the adapter changes the model from the start.
        rank_pattern: module path or regular expression -> another rank.
        alpha_pattern: module path or regular expression -> another lora_alpha.
    """

    peft_type: ClassVar[str] = "LORA"

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        require_int("r", self.r, 1, MOST_RANK)
        require_finite("lora_alpha", self.lora_alpha)
        require_probability("lora_dropout", self.lora_dropout)
        require_bool("use_dora", self.use_dora)
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}")
        require_pattern("rank_pattern", self.rank_pattern, lambda name, rank: require_int(name, rank, 1, MOST_RANK))
        require_pattern("alpha_pattern", self.alpha_pattern, require_finite)


@dataclass(frozen=True)
class LowRankFamily(Family):
    """s · B A with rows of A and Bᵀ that are shards side by side: LoRA has one shard in a row, MoS several."""

    shards: int

    def columns(self, max_rank: int) -> dict[str, Column]:
        index = Column((max_rank, self.shards), numbers_rows=True)
        return {"index_A": index, "index_B": index, "rank": Column(), "scaling": Column(dtype=torch.float32)}

    def arenas(self, site: Site, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        if site.in_features % self.shards or site.out_features % self.shards:
            return None
        widths = {"arena_A": site.in_features // self.shards, "arena_B": site.out_features // self.shards}
        return {name: ((width,), dtype) for name, width in widths.items()}

    def enlist(self, calls: Any, number: int, tables: dict[str, Any]) -> None:
        calls.low_rank(number, **tables)

    def add_(self, y: Tensor, x: Tensor, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> None:
        low_rank_many_(y, x, **tables, rows=rows, slots=slots)


class LoRAAdapter(Adapter):
    config_class = LoraConfig
    file_keys: ClassVar = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    def __init__(self, config: LoraConfig, site: Site) -> None:
        super().__init__(config, site)
        self.r = value_for(site.path, config.rank_pattern, config.r)
        alpha = value_for(site.path, config.alpha_pattern, config.lora_alpha)
        self.scaling = reference.lora.lora_scaling(self.r, alpha, config.use_rslora)
        self.dropout_p = config.lora_dropout
        self.dropout = make_dropout(config.lora_dropout)
        self.lora_A = site.parameter(self.r, site.in_features)
        self.lora_B = site.parameter(site.out_features, self.r)
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))

    @classmethod
    def build(cls, config: LoraConfig, sites: Sequence[Site]) -> list[Adapter]:
        from fastpeft.nn.dora import DoRAAdapter  # which builds on this file

        return [(DoRAAdapter if config.use_dora else LoRAAdapter)(config, site) for site in sites]

    @classmethod
    def serve(cls, config: LoraConfig, sites: Sequence[Site], dtype: torch.dtype) -> Serving:
        if config.use_dora:
            raise ValueError(
                "use_dora=True is not served by a bank: DoRA divides by the norms of W + s · B A, which are the "
                "layer's and not the adapter's"
            )
        ranks = [value_for(site.path, config.rank_pattern, config.r) for site in sites]
        scaling = [
            reference.lora.lora_scaling(
                rank, value_for(site.path, config.alpha_pattern, config.lora_alpha), config.use_rslora
            )
            for site, rank in zip(sites, ranks, strict=True)
        ]
        tensors: dict[str, Expected] = {}
        matrices: list[tuple[str, bool, int, int]] = []
        for site, rank in zip(sites, ranks, strict=True):
            key_A, key_B = (
                f"base_model.model.{site.path}.{LoRAAdapter.file_keys[name]}" for name in ("lora_A", "lora_B")
            )
            tensors[key_A] = Expected((rank, site.in_features))
            tensors[key_B] = Expected((site.out_features, rank))
            matrices += [(key_A, False, rank, site.in_features), (key_B, True, rank, site.out_features)]
        rows, starts = stack_rows(matrices, dtype)

        def entries(_: Tensors, max_rank: int) -> dict[str, Tensor]:
            rank = torch.tensor(ranks, device="cpu")
            # What lies past the rank does not count, and is a row of the adapter's own all the same.
            row = torch.minimum(torch.arange(max_rank, device="cpu"), rank[:, None] - 1)
            index = starts.view(-1, 2, 1) + row[:, None]
            return {
                "index_A": index[:, 0, :, None],
                "index_B": index[:, 1, :, None],
                "rank": rank,
                "scaling": torch.tensor(scaling, dtype=torch.float64, device="cpu"),
            }

        numbers = sum(rank * (site.in_features + site.out_features) for site, rank in zip(sites, ranks, strict=True))
        return Serving(tensors, [Part(LowRankFamily(1), sites, rows, entries, max(ranks, default=0), numbers)])

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        p = dropout_p(self.dropout) if self.dropout_p > 0 else 0.0
        return apply_lora(x, weight, bias, *self.matrices(), self.scaling, p)

    def delta(self, x: Tensor) -> Tensor:
        return apply_lora(x, None, None, *self.matrices(), self.scaling, dropout_p(self.dropout))

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        lora_A, lora_B = self.matrices()
        return apply_lora(x, weight, bias, lora_A, lora_B[rows], self.scaling)

    def linear_columns(self, x: Tensor, weight: Tensor, columns: slice) -> Tensor:
        lora_A, lora_B = self.matrices()
        return apply_lora(x, weight, None, lora_A[:, columns], lora_B, self.scaling)

    def matrices(self) -> tuple[Tensor, Tensor]:
        return parameter_of(self, "lora_A"), parameter_of(self, "lora_B")

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        return self.lora_A, self.lora_B * self.scaling

    def delta_weight(self) -> Tensor:
        return reference.lora.lora_weight(self.lora_A, self.lora_B, self.scaling)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class LoRALinear(AdaptedLinear):
    """An ``nn.Linear`` with a LoRA adapter: ``LoRALinear.from_linear(linear, LoraConfig(r=16))``."""

    adapter_class = LoRAAdapter
