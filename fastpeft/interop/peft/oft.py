"""OFT in PEFT's ``oft.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor
from torch.nn import functional as F

from fastpeft.interop.adapter import PeftAdapter, tensor_refusal
from fastpeft.nn.cached import Cached
from fastpeft.ops.oft import oft_blocks, project, rotate


class PeftOft(PeftAdapter):
    layer_classes = ("peft.tuners.oft.layer.Linear",)
    container = "oft_R"
    # oft_dropout is there and PEFT's forward does not look at it, so neither do we.
    known = frozenset(("oft_R", "oft_embedding_R", "r", "oft_block_size", "oft_dropout"))
    rotates = True
    first_acts_first = True

    def __init__(self, layer: Any, name: str) -> None:
        module = layer.oft_R[name]
        self.modules = (module,)
        self.parameters = module._parameters
        self.block_size = module.block_size
        self.neumann_terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
        self.eps = module.eps if module.coft else None
        self.cached = Cached()

    @staticmethod
    def facts(attributes: dict[str, Any], name: str) -> Any:
        return attributes["_modules"]["oft_R"]._modules.get(name)

    @classmethod
    def adapter_refusal(cls, layer: Any, name: str) -> str | None:
        module = layer.oft_R[name]
        if type(module) is not OFTRotationModule:
            return f"oft_R is a {type(module).__name__}"
        if module.use_cayley_neumann and not SERIES_IS_KNOWN:
            return "use_cayley_neumann means another series in this version of PEFT"
        b, rows = module.block_size, 1 if module.block_share else module.r
        if b * (layer.in_features // b) != layer.in_features or rows not in (1, layer.in_features // b):
            return f"{rows} blocks of size {b} do not fit {layer.in_features} features"
        return tensor_refusal({"oft_R": (module.weight, (rows, b * (b - 1) // 2))})

    def blocks(self) -> Tensor:
        oft_R = self.parameters["weight"]
        if self.eps is not None:  # PEFT writes it back, whether it trains or not
            with torch.no_grad():
                oft_R.copy_(project(oft_R, self.eps))
        trained = torch.is_grad_enabled() and oft_R.requires_grad
        if trained or not oft_R.is_cpu or torch.compiler.is_compiling():
            return self._blocks_of(oft_R)
        return self.cached.get(oft_R, self._blocks_of)

    def _blocks_of(self, oft_R: Tensor) -> Tensor:
        return oft_blocks(oft_R, self.block_size, self.neumann_terms)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rotate(x, self.blocks()), weight, bias)

    def pre(self, x: Tensor) -> Tensor:
        return rotate(x, self.blocks())

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return y


def _series_is_known() -> bool:
    """Whether PEFT's series is ours: before PEFT 0.18 the same options meant another one. Asked of one small block."""
    with torch.device("cpu"):
        oft_R = torch.tensor([[0.3, -0.2, 0.1]])
        module = OFTRotationModule(1, 3, 3, 3)
    return all(
        torch.allclose(module._cayley_batch(oft_R, 3, True, terms), oft_blocks(oft_R, 3, terms), atol=1e-5)
        for terms in (2, 5)
    )


SERIES_IS_KNOWN = _series_is_known()
