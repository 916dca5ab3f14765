"""How each method computes PEFT's layers. Imported where there is a PEFT model, since it needs PEFT."""

from torch import nn

from fastpeft.interop.adapter import PeftAdapter
from fastpeft.interop.peft.boft import PeftBoft
from fastpeft.interop.peft.fourierft import PeftFourier
from fastpeft.interop.peft.lora import PeftLora
from fastpeft.interop.peft.oft import PeftOft

# A new method is one name here.
METHODS: tuple[type[PeftAdapter], ...] = (PeftLora, PeftBoft, PeftFourier, PeftOft)
_BY_CLASS = {name: method for method in METHODS for name in method.layer_classes}


def method_of(peft_class: type[nn.Module]) -> type[PeftAdapter] | None:
    """What computes the layers of a PEFT class, and of no subclass of it, or None."""
    return _BY_CLASS.get(f"{peft_class.__module__}.{peft_class.__qualname__}")


__all__ = ["METHODS", "PeftAdapter", "method_of"]
