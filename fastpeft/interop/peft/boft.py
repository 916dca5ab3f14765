"""BOFT in PEFT's ``boft.Linear``."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.boft.layer import MultiplicativeDropoutLayer
from torch import Tensor, nn

from fastpeft.interop.adapter import PeftAdapter, tensor_refusal
from fastpeft.nn.cached import Cached
from fastpeft.ops.boft import apply_boft, apply_butterfly, boft_blocks, butterfly_misfit, rotated_linear, scale_rows


class PeftBoft(PeftAdapter):
    layer_classes = ("peft.tuners.boft.layer.Linear",)
    container = "boft_R"
    known = frozenset(("boft_R", "boft_s", "boft_block_size", "boft_block_num", "boft_dropout"))
    rotates = True

    def __init__(self, layer: Any, name: str) -> None:
        self.boft_R, self.boft_s = layer.boft_R[name], layer.boft_s[name]
        self.dropout = layer.boft_dropout[name]
        self.drops = self.dropout.training and type(self.dropout) is MultiplicativeDropoutLayer
        self.cached = Cached()

    @staticmethod
    def facts(attributes: dict[str, Any], name: str) -> Any:
        modules = attributes["_modules"]
        dropout = modules["boft_dropout"]._modules.get(name)
        matrices = modules["boft_R"]._parameters
        return (
            id(matrices.get(name)),
            id(modules["boft_s"]._parameters.get(name)),
            dropout,
            dropout is not None and dropout.training,
            len(matrices),
        )

    @classmethod
    def adapter_refusal(cls, layer: Any, name: str) -> str | None:
        R, dropout = layer.boft_R[name], layer.boft_dropout[name]
        if type(dropout) not in (nn.Identity, MultiplicativeDropoutLayer):
            return f"boft_dropout is a {type(dropout).__name__}"
        if R.dim() != 4:
            return f"boft_R has shape {tuple(R.shape)}, not (m, in / b, b, b)"
        factors, _, block_size, _ = R.shape
        if reason := butterfly_misfit(layer.in_features, block_size, factors):
            return f"boft_R has shape {tuple(R.shape)}: {reason}"
        if factors > 1 and len({tuple(other.shape) for other in layer.boft_R.values()}) > 1:
            return "PEFT keeps one permutation for a layer, and its adapters have blocks of different sizes or numbers"
        shape = (factors, layer.in_features // block_size, block_size, block_size)
        return tensor_refusal({"boft_R": (R, shape), "boft_s": (layer.boft_s[name], (layer.out_features, 1))})

    def blocks(self) -> Tensor:
        """The orthogonal blocks, (m, in / b, b, b), with PEFT's dropout while training."""
        R = self.boft_R
        if self.drops:
            return self.dropout(boft_blocks(R))
        if self.is_trained() or not R.is_cpu or torch.compiler.is_compiling():
            return boft_blocks(R)
        return self.cached.get(R, boft_blocks)

    def is_trained(self) -> bool:
        return torch.is_grad_enabled() and self.boft_R.requires_grad

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_trained() and not self.drops:
            return apply_boft(x, weight, bias, self.boft_R, self.boft_s)
        return rotated_linear(x, weight, bias, self.blocks(), self.boft_s)

    def pre(self, x: Tensor) -> Tensor:
        return apply_butterfly(x, self.blocks())

    def post(self, y: Tensor, bias: Tensor | None) -> Tensor:
        return scale_rows(y, self.boft_s, bias)
