"""How each method computes PEFT's layers. Imported where there is a PEFT model, since it needs PEFT."""

from fastpeft.interop.adapter import PeftAdapter
from fastpeft.interop.peft.boft import PeftBoft
from fastpeft.interop.peft.fourierft import PeftFourier
from fastpeft.interop.peft.lora import PeftLora
from fastpeft.interop.peft.oft import PeftOft

# By PEFT's layer class. A new method is one line here.
METHODS: dict[type, type[PeftAdapter]] = {
    method.layer_class: method for method in (PeftLora, PeftBoft, PeftFourier, PeftOft)
}

__all__ = ["METHODS", "PeftAdapter"]
