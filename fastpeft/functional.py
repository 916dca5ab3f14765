"""The functional API: adapted linear layers and their parts as plain differentiable functions."""

from fastpeft.ops.boft import boft_linear, butterfly, cayley
from fastpeft.ops.fourierft import fourier_linear, fourier_weight
from fastpeft.ops.lora import lora_linear
from fastpeft.ops.mos import mos_linear

__all__ = ["boft_linear", "butterfly", "cayley", "fourier_linear", "fourier_weight", "lora_linear", "mos_linear"]
