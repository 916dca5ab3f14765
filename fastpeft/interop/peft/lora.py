"""LoRA, rsLoRA and DoRA in PEFT's ``lora.Linear``, LoRA and rsLoRA in its kin over quantised bases."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from fastpeft.interop.adapter import PeftAdapter, tensor_refusal
from fastpeft.nn.adapter import dropout_p
from fastpeft.nn.dora import RowNorms
from fastpeft.nn.linear import dense_weight
from fastpeft.ops.dora import add_dora, apply_dora
from fastpeft.ops.lora import apply_lora


class PeftLora(PeftAdapter):
    # Those over quantised bases differ from the first in how they merge, which stays theirs.
    layer_classes = (
        "peft.tuners.lora.layer.Linear",
        "peft.tuners.lora.bnb.Linear4bit",
        "peft.tuners.lora.bnb.Linear8bitLt",
        "peft.tuners.lora.torchao.TorchaoLoraLinear",
    )
    container = "lora_A"
    known = frozenset(
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "r", "lora_alpha",
         "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "lora_variant")
    )  # fmt: skip
    casts_back = False

    def __init__(self, layer: Any, name: str) -> None:
        A, B, dropout = self.modules = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        self.A, self.B = A._parameters, B._parameters
        self.scaling = layer.scaling[name]
        self.dropout_p = dropout_p(dropout)

    @classmethod
    def bind(cls, layer: Any, name: str) -> PeftAdapter:
        return (PeftDora if name in layer.lora_variant else PeftLora)(layer, name)

    @staticmethod
    def facts(attributes: dict[str, Any], name: str) -> Any:
        modules = attributes["_modules"]
        dropout = modules["lora_dropout"]._modules.get(name)
        variant = attributes["lora_variant"]
        return (
            modules["lora_A"]._modules.get(name),
            modules["lora_B"]._modules.get(name),
            dropout,
            dropout is not None and (dropout.training, dropout.__dict__.get("p")),
            attributes["scaling"].get(name),
            variant and (variant.get(name), modules["lora_magnitude_vector"]._modules.get(name)),
        )

    @classmethod
    def adapter_refusal(cls, layer: Any, name: str) -> str | None:
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        for key, module in (("lora_A", A), ("lora_B", B)):
            if type(module) is not nn.Linear:
                return f"{key} is a {type(module).__name__}"
            if module._parameters.get("bias") is not None:
                return f"{key} has a bias (lora_bias)"
        if type(dropout) not in (nn.Identity, nn.Dropout):
            return f"lora_dropout is a {type(dropout).__name__}"
        tensors: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "lora_A": (A.weight, (A.out_features, layer.in_features)),
            "lora_B": (B.weight, (layer.out_features, A.out_features)),
        }
        variant = layer.lora_variant.get(name)
        if variant is not None:
            if type(variant) is not DoraLinearVariant:
                return f"it is a variant of LoRA, {type(variant).__name__}"
            magnitude = layer.lora_magnitude_vector[name]
            if type(magnitude) is not DoraLinearLayer:
                return f"lora_magnitude_vector is a {type(magnitude).__name__}"
            if layer.ephemeral_gpu_offload:
                return "ephemeral_gpu_offload is set"
            if dense_weight(layer.base_layer) is None:
                return f"use_dora needs a dense weight, and its base is a {type(layer.base_layer).__name__}"
            tensors["lora_magnitude_vector"] = (magnitude.weight, (layer.out_features,))
        return tensor_refusal(tensors)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply_lora(x, weight, bias, self.A["weight"], self.B["weight"], self.scaling, self.dropout_p)

    def add_to(self, y: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        return y + apply_lora(x, None, None, self.A["weight"], self.B["weight"], self.scaling, self.dropout_p)


class PeftDora(PeftLora):
    def __init__(self, layer: Any, name: str) -> None:
        super().__init__(layer, name)
        magnitude = layer.lora_magnitude_vector[name]
        self.modules = (*self.modules, magnitude)
        self.magnitude = magnitude._parameters
        self.norms = RowNorms()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return apply_dora(x, weight, bias, *self._of(weight))

    def add_to(self, y: Tensor, x: Tensor, base: Any) -> Tensor:
        weight = dense_weight(base)
        assert weight is not None
        return add_dora(y, x, weight, base.bias, *self._of(weight))

    def _of(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, float, float, Tensor]:
        """What the operators take of the adapter."""
        A, B = self.A["weight"], self.B["weight"]
        norms = self.norms(weight, A, B, self.scaling)
        return A, B, self.magnitude["weight"], self.scaling, self.dropout_p, norms
