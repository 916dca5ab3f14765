"""The functional API: adapted linear layers and their parts as plain functions."""

from fastpeft.ops.boft import boft_linear, butterfly, cayley
from fastpeft.ops.dora import dora_linear
from fastpeft.ops.fourierft import fourier_linear, fourier_weight
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.low_rank_many import ManyAdapters, low_rank_many, pack_lora, pack_mos
from fastpeft.ops.mos import mos_linear
from fastpeft.ops.oft import oft_linear

__all__ = [
    "ManyAdapters",
    "boft_linear",
    "butterfly",
    "cayley",
    "dora_linear",
    "fourier_linear",
    "fourier_weight",
    "lora_linear",
    "low_rank_many",
    "mos_linear",
    "oft_linear",
    "pack_lora",
    "pack_mos",
]
