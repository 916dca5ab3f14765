"""Adapter layers: parameters, their start, merging and unmerging; one file per method."""

from fastpeft.nn.adapter import Adapter, Site
from fastpeft.nn.boft import BOFTAdapter, BOFTConfig, BOFTLinear
from fastpeft.nn.dora import DoRAAdapter
from fastpeft.nn.fourierft import FourierFTAdapter, FourierFTConfig, FourierFTLinear
from fastpeft.nn.linear import Adapted, AdaptedLinear
from fastpeft.nn.lora import LoRAAdapter, LoraConfig, LoRALinear
from fastpeft.nn.mos import MoSAdapter, MosConfig, MoSLinear
from fastpeft.nn.oft import OFTAdapter, OFTConfig, OFTLinear

# Every method there is, by the name that configurations and files carry. A new method is one line here.
METHODS: dict[str, type[Adapter]] = {
    method.config_class.peft_type: method
    for method in (LoRAAdapter, MoSAdapter, BOFTAdapter, FourierFTAdapter, OFTAdapter)
}

__all__ = [
    "METHODS",
    "Adapted",
    "AdaptedLinear",
    "Adapter",
    "BOFTAdapter",
    "BOFTConfig",
    "BOFTLinear",
    "DoRAAdapter",
    "FourierFTAdapter",
    "FourierFTConfig",
    "FourierFTLinear",
    "LoRAAdapter",
    "LoRALinear",
    "LoraConfig",
    "MoSAdapter",
    "MoSLinear",
    "MosConfig",
    "OFTAdapter",
    "OFTConfig",
    "OFTLinear",
    "Site",
]
