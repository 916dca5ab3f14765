"""OFT: orthogonal finetuning (Qiu et al., NeurIPS 2023, arXiv 2306.07280), in PEFT's form, which rotates the input."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpeft.config import AdapterConfig, require_bool, require_finite, require_int, require_probability
from fastpeft.nn.adapter import Adapter, Site, parameter_of
from fastpeft.nn.cached import Cached
from fastpeft.nn.linear import AdaptedLinear
from fastpeft.ops.boft import butterfly_transposed
from fastpeft.ops.oft import oft_blocks, project, rotate

# Which PEFT's folders ours are. Before it use_cayley_neumann meant a series with another last term.
PEFT_VERSION = "0.18.0"


@dataclass(kw_only=True)
class OFTConfig(AdapterConfig):
    """``y = (x R) Wᵀ + b`` with R block-diagonal and orthogonal.

    Where a size does not divide in_features, the nearest one that does is taken, with a warning, as PEFT does.

    Args:
        r: the number of blocks, in_features / b. Give this or oft_block_size; the other is 0.
        oft_block_size: b, the size of the blocks.
        module_dropout: multiplicative dropout: while training, this share of the blocks is the identity. Not for a
            shared block. (PEFT 0.21 has the option and does not act on it.)
        init_weights: True: R is the identity. False: random, so that the adapter changes the model.
        coft: constrained OFT: the skew-symmetric S of every block stays in ‖S‖ ≤ eps / √blocks. A training step's
            forward brings the parameters themselves back into it.
        eps: see coft.
        block_share: one block for all places.
        use_cayley_neumann: a truncated series in place of the exact Cayley transform; R is then orthogonal only nearly,
            and near the transpose of the exact one.
        num_cayley_neumann_terms: its terms, as PEFT counts them.
    """

    peft_type: ClassVar[str] = "OFT"

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def check(self) -> None:
        require_int("r", self.r, 0)
        require_int("oft_block_size", self.oft_block_size, 0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                f"one of r and oft_block_size must be positive and the other 0, got {self.r} and {self.oft_block_size}"
            )
        require_probability("module_dropout", self.module_dropout)
        for name in ("init_weights", "coft", "block_share", "use_cayley_neumann"):
            require_bool(name, getattr(self, name))
        require_finite("eps", self.eps)
        if self.eps < 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        require_int("num_cayley_neumann_terms", self.num_cayley_neumann_terms, 1, 1000)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "peft_version": PEFT_VERSION}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> OFTConfig:
        config = super().from_dict(values, source)
        version = values.get("peft_version")
        if config.use_cayley_neumann and _numbers(version) < _numbers(PEFT_VERSION):
            raise ValueError(
                f"{source}: use_cayley_neumann=True of peft_version={version!r}: before PEFT {PEFT_VERSION} that was "
                "another series, in which these numbers mean another rotation; train it again"
            )
        return config


def _numbers(version: Any) -> tuple[int, ...]:
    """(0, 18) of "0.18.1.dev0@main"; a folder without a version is older than any that has one."""
    found = re.match(r"(\d+)\.(\d+)", str(version))
    return tuple(int(part) for part in found.groups()) if found else (0, 0)


def _nearest_divisor(features: int, wanted: int) -> int:
    """The smaller of two that are equally near, as in PEFT."""
    return min((d for d in range(1, features + 1) if features % d == 0), key=lambda d: (abs(d - wanted), d))


def _split(config: OFTConfig, site: Site) -> tuple[int, int]:
    """(number of blocks, block size)."""
    features = site.in_features
    name = "r" if config.r else "oft_block_size"
    wanted = getattr(config, name)
    size = wanted
    if features % wanted:
        size = _nearest_divisor(features, wanted)
        warnings.warn(
            str(site.error(f"{name}={wanted} does not divide its in_features; {size} is taken")), stacklevel=3
        )
    return (size, features // size) if config.r else (features // size, size)


class OFTAdapter(Adapter):
    config_class = OFTConfig
    rotates = True
    file_keys: ClassVar = {"oft_R": "oft_R.weight"}

    def __init__(self, config: OFTConfig, site: Site) -> None:
        super().__init__(config, site)
        self.n_blocks, self.block_size = _split(config, site)
        self.neumann_terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        self.eps = config.eps if config.coft else None
        self.dropout_p = config.module_dropout
        rows = 1 if config.block_share else self.n_blocks
        self.oft_R = site.parameter(rows, self.block_size * (self.block_size - 1) // 2)
        if not config.init_weights:
            nn.init.normal_(self.oft_R, std=0.1)
        self._cached = Cached()

    def blocks(self) -> Tensor:
        """The blocks of R, (r, b, b), or (1, b, b) where they share one; with dropout while training."""
        oft_R = parameter_of(self, "oft_R")
        if torch.is_grad_enabled() and oft_R.requires_grad:
            if self.eps is not None and oft_R.is_leaf:  # not in a replica
                with torch.no_grad():
                    oft_R.copy_(project(oft_R, self.eps))
        elif oft_R.is_cpu and not torch.compiler.is_compiling():  # on a GPU comparing would make the host wait
            return self._drop(self._cached.get(oft_R, self._blocks_of))
        return self._drop(self._blocks_of(oft_R))

    def _blocks_of(self, oft_R: Tensor) -> Tensor:
        return oft_blocks(oft_R, self.block_size, self.neumann_terms, self.eps)

    def _drop(self, blocks: Tensor) -> Tensor:
        """int(p · blocks) of them become the identity. Draws what PEFT's dropout layer draws."""
        if not self.training or self.dropout_p == 0 or len(blocks) == 1:
            return blocks
        dropped = torch.randperm(len(blocks)) < int(self.dropout_p * len(blocks))
        identity = torch.eye(self.block_size, dtype=blocks.dtype, device=blocks.device)
        return torch.where(dropped.to(blocks.device)[:, None, None], identity, blocks)

    def split_refusal(self, by_rows: bool) -> str | None:
        return None if self.eps is None else "coft=True would have to bring the parameters back on every process"

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(self.pre(x), weight, bias)

    def pre(self, x: Tensor) -> Tensor:
        return rotate(x, self.blocks())

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y

    def rotate_weight(self, weight: Tensor) -> Tensor:
        # x R Wᵀ = x (W Rᵀ)ᵀ: the rows of W go through the transposed product.
        blocks = self._blocks_of(self.oft_R).expand(self.n_blocks, -1, -1)
        return butterfly_transposed(weight, blocks[None])

    def extra_repr(self) -> str:
        return f"block_size={self.block_size}, blocks={self.n_blocks}, shared={len(self.oft_R) < self.n_blocks}"


class OFTLinear(AdaptedLinear):
    """An ``nn.Linear`` with an OFT adapter: ``OFTLinear.from_linear(linear, OFTConfig(oft_block_size=32))``."""

    adapter_class = OFTAdapter
