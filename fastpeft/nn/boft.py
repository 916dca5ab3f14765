"""BOFT: orthogonal butterfly factors (Liu et al., ICLR 2024, arXiv 2311.06243). With one factor it is OFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.config import AdapterConfig, require_bool, require_int, require_probability
from fastpeft.nn.adapter import Adapter, Site, parameter_of
from fastpeft.nn.cached import Cached
from fastpeft.nn.linear import AdaptedLinear
from fastpeft.nn.served import Column, Expected, Family, Part, Rows, Serving, Tensors, check_finite, stack_rows
from fastpeft.ops.boft import (
    apply_boft,
    apply_butterfly,
    boft_blocks,
    butterfly_misfit,
    butterfly_transposed,
    rotated_linear,
    scale_rows,
)
from fastpeft.ops.boft_many import boft_reflectors, boft_rotate_many, boft_scale_many_, reflectors_width


@dataclass(kw_only=True)
class BOFTConfig(AdapterConfig):
    """``y = ((x R) Wᵀ) ⊙ s + b`` with R a product of butterfly factors.

    Args:
        boft_block_size: b, the size of the orthogonal blocks; must divide in_features. Give this or boft_block_num.
        boft_block_num: the number of blocks in a factor, in_features / b.
        boft_n_butterfly_factor: m, the number of factors; in_features must be a multiple of b · 2^(m−1).
        boft_dropout: multiplicative dropout: while training, this share of the blocks of one random factor is the
            identity.
        init_weights: True: R is the identity and s is one. False: random, so that the adapter changes the model.
    """

    peft_type: ClassVar[str] = "BOFT"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    init_weights: bool = True

    def check(self) -> None:
        require_int("boft_block_size", self.boft_block_size, 0)
        require_int("boft_block_num", self.boft_block_num, 0)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ValueError(
                "one of boft_block_size and boft_block_num must be positive and the other 0, got "
                f"{self.boft_block_size} and {self.boft_block_num}"
            )
        require_int("boft_n_butterfly_factor", self.boft_n_butterfly_factor, 1)
        require_probability("boft_dropout", self.boft_dropout)
        require_bool("init_weights", self.init_weights)


@dataclass(frozen=True)
class BOFTFamily(Family):
    """Rotations by m factors of blocks of size b, which lie in the arena as reflections: ops/boft_many.py."""

    rotates = True
    block_size: int
    factors: int

    def columns(self, max_rank: int) -> dict[str, Column]:
        row = Column(empty=-1, numbers_rows=True)
        return {"row_reflectors": row, "row_scale": row}

    def arenas(self, site: Site, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        if butterfly_misfit(site.in_features, self.block_size, self.factors):
            return None
        wide = torch.promote_types(dtype, torch.float32)
        width = reflectors_width(site.in_features, self.block_size, self.factors)
        return {"arena_reflectors": ((width,), wide), "arena_scale": ((site.out_features,), wide)}

    def enlist(self, calls: Any, number: int, tables: dict[str, Any]) -> None:
        calls.boft(number, **tables, factors=self.factors, block_size=self.block_size)

    def rotate(self, x: Tensor, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> Tensor:
        reflectors = tables["arena_reflectors"], tables["row_reflectors"]
        return boft_rotate_many(x, *reflectors, self.factors, self.block_size, rows, slots)

    def scale_(self, y: Tensor, bias: Tensor | None, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> None:
        boft_scale_many_(y, bias, tables["arena_scale"], tables["row_scale"], rows, slots)


def block_size_for(config: BOFTConfig, site: Site) -> int:
    """b for a layer.

    Raises:
        ValueError: the layer cannot be rotated so.
    """
    features, factors = site.in_features, config.boft_n_butterfly_factor
    if config.boft_block_num and features % config.boft_block_num:
        raise site.error(f"boft_block_num={config.boft_block_num} does not divide its in_features, {features}")
    block_size = features // config.boft_block_num if config.boft_block_num else config.boft_block_size
    if reason := butterfly_misfit(features, block_size, factors):
        raise site.error(f"boft_block_size={block_size}, boft_n_butterfly_factor={factors}: {reason}")
    return block_size


class BOFTAdapter(Adapter):
    config_class = BOFTConfig
    rotates = True
    file_keys: ClassVar = {"boft_R": "boft_R", "boft_s": "boft_s"}

    def __init__(self, config: BOFTConfig, site: Site) -> None:
        super().__init__(config, site)
        features, factors = site.in_features, config.boft_n_butterfly_factor
        block_size = block_size_for(config, site)
        self.dropout_p = config.boft_dropout
        self.boft_R = site.parameter(factors, features // block_size, block_size, block_size)
        self.boft_s = site.parameter(site.out_features, 1, fill=1.0)
        if not config.init_weights:
            nn.init.normal_(self.boft_R, std=0.1)
            nn.init.normal_(self.boft_s, mean=1.0, std=0.1)
        self._cached = Cached()  # on a GPU a look at the numbers would make the host wait

    @classmethod
    def reconcile(cls, config: BOFTConfig, tensors: Mapping[str, Tensor]) -> BOFTConfig:
        """PEFT falls back to one factor where its CUDA helper does not build, and its file goes on naming more."""
        factors = {t.shape[0] for key, t in tensors.items() if key.endswith(".boft_R") and len(t.shape) == 4}
        if factors == {1} and config.boft_n_butterfly_factor > 1:
            warnings.warn(
                f"the file says boft_n_butterfly_factor={config.boft_n_butterfly_factor}, but its tensors have one "
                "factor, as PEFT trains where its CUDA helper does not build: loaded with one factor",
                stacklevel=4,
            )
            return BOFTConfig(**{**vars(config), "boft_n_butterfly_factor": 1})
        return config

    @classmethod
    def serve(cls, config: BOFTConfig, sites: Sequence[Site], dtype: torch.dtype) -> Serving:
        by_size: dict[int, list[Site]] = {}
        for site in sites:
            by_size.setdefault(block_size_for(config, site), []).append(site)
        tensors: dict[str, Expected] = {}
        parts = [cls._serve_part(config, size, members, dtype, tensors) for size, members in by_size.items()]
        return Serving(tensors, parts)

    @classmethod
    def _serve_part(
        cls, config: BOFTConfig, size: int, sites: list[Site], dtype: torch.dtype, tensors: dict[str, Expected]
    ) -> Part:
        factors, wide = config.boft_n_butterfly_factor, torch.promote_types(dtype, torch.float32)
        keys = {site.path: f"base_model.model.{site.path}." for site in sites}
        for site in sites:
            tensors[keys[site.path] + "boft_R"] = Expected((factors, site.in_features // size, size, size))
            tensors[keys[site.path] + "boft_s"] = Expected((site.out_features, 1))
        rows, row_scale = stack_rows([(keys[site.path] + "boft_s", True, 1, site.out_features) for site in sites], wide)
        row_reflectors = torch.empty(len(sites), dtype=torch.int64, device="cpu")
        for features in dict.fromkeys(site.in_features for site in sites):
            members = [i for i, site in enumerate(sites) if site.in_features == features]
            row_reflectors[members] = torch.arange(len(members), device="cpu") + sum(each.count for each in rows)
            make = cls._make_reflectors([keys[sites[i].path] + "boft_R" for i in members], factors, wide)
            rows.append(Rows(len(members), reflectors_width(features, size, factors), wide, make))

        def entries(*_: object) -> dict[str, Tensor]:
            return {"row_reflectors": row_reflectors, "row_scale": row_scale}

        numbers = sum(reflectors_width(site.in_features, size, factors) + site.out_features for site in sites)
        return Part(BOFTFamily(size, factors), sites, rows, entries, expanded_numbers=numbers)

    @staticmethod
    def _make_reflectors(keys: list[str], factors: int, wide: torch.dtype) -> Callable[[Tensors], Tensor]:
        """All layers in one call."""

        def make(tensors: Tensors) -> Tensor:
            trained = torch.cat([tensors[key] for key in keys]).to(wide)
            check_finite("boft_R", trained)  # an infinite block may have a finite transform
            with torch.no_grad():
                return boft_reflectors(trained, factors)

        return make

    def blocks(self) -> Tensor:
        """The orthogonal blocks, (m, in / b, b, b), with dropout while training."""
        if self._drops():
            return self._drop(boft_blocks(self.boft_R))
        if self._is_trained() or self.boft_R.device.type != "cpu" or torch.compiler.is_compiling():
            return boft_blocks(self.boft_R)
        return self._cached.get(self.boft_R, boft_blocks)

    def _is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.boft_R.requires_grad

    def _drops(self) -> bool:
        return self.training and self.dropout_p > 0

    def _drop(self, blocks: Tensor) -> Tensor:
        """int(p · blocks) blocks of one factor become the identity. Draws what PEFT draws, in the same order."""
        factors, n_blocks, block_size, _ = blocks.shape
        factor = torch.randint(0, factors, (1,))
        dropped = torch.randperm(n_blocks) < int(self.dropout_p * n_blocks)
        mask = (torch.arange(factors) == factor)[:, None] & dropped
        identity = torch.eye(block_size, dtype=blocks.dtype, device=blocks.device)
        return torch.where(mask.to(blocks.device)[:, :, None, None], identity, blocks)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        boft_s = parameter_of(self, "boft_s")
        if self._is_trained() and not self._drops():
            return apply_boft(x, weight, bias, parameter_of(self, "boft_R"), boft_s)
        return rotated_linear(x, weight, bias, self.blocks(), boft_s)

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: slice) -> Tensor:
        return rotated_linear(x, weight, bias, self.blocks(), parameter_of(self, "boft_s")[rows])

    def linear_columns(self, x: Tensor, weight: Tensor, columns: slice) -> Tensor:
        if x.shape[-1] > weight.shape[1]:
            return super().linear_columns(x, weight, columns)
        boft_R, boft_s = parameter_of(self, "boft_R"), parameter_of(self, "boft_s")
        size = boft_R.shape[-1]
        part = slice(columns.start // size, columns.stop // size)
        if self._is_trained():
            return apply_boft(x, weight, None, boft_R[:, part], boft_s)
        return rotated_linear(x, weight, None, self.blocks()[:, part], boft_s)

    def mixes_columns(self, columns: int) -> bool:
        factors, _, size, _ = self.boft_R.shape
        return columns % (size << (factors - 1)) != 0  # a window of the last factor holds those of all others

    def pre(self, x: Tensor) -> Tensor:
        return apply_butterfly(x, self.blocks())

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return scale_rows(y, self.boft_s, bias)

    def rotate_weight(self, weight: Tensor) -> Tensor:
        # x R Wᵀ = x (W Rᵀ)ᵀ: the rows of W go through the transposed product.
        return butterfly_transposed(weight, boft_blocks(self.boft_R)) * self.boft_s

    def extra_repr(self) -> str:
        factors, n_blocks, block_size, _ = self.boft_R.shape
        return f"block_size={block_size}, blocks={n_blocks}, factors={factors}"


class BOFTLinear(AdaptedLinear):
    """An ``nn.Linear`` with a BOFT adapter: ``BOFTLinear.from_linear(linear, BOFTConfig(boft_block_size=8))``."""

    adapter_class = BOFTAdapter
