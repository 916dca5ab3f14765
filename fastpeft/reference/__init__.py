"""The methods as their papers write them, in plain PyTorch: dense, slow, any dtype up to float64.

Read these first. Everything else in the package computes the same numbers faster and is tested against them.
"""

from fastpeft.reference import boft, dora, fourierft, lora, mos, oft

__all__ = ["boft", "dora", "fourierft", "lora", "mos", "oft"]
