"""What speaks to other libraries: PEFT's models computed by our operators, any adapter as a LoRA."""

from fastpeft.interop.accelerate import AccelerationReport, accelerate, decelerate
from fastpeft.interop.export import export_lora

__all__ = ["AccelerationReport", "accelerate", "decelerate", "export_lora"]
