"""fastpeft: adapters on a frozen linear layer at the cost of the frozen layer.

Models: :func:`adapt`, :func:`set_adapter`, :func:`merge`, :func:`save_adapter` and their kin, with one configuration
for each method. Layers: ``fastpeft.nn``. Functions: ``fastpeft.functional``. The formulas in plain PyTorch:
``fastpeft.reference``. What this installation can run: :func:`backends`, or ``python -m fastpeft doctor``.
"""

from importlib.metadata import PackageNotFoundError, version

from fastpeft import functional, nn
from fastpeft.backend import backends, use_backend
from fastpeft.interop import AccelerationReport, accelerate, decelerate, export_lora
from fastpeft.model import (
    adapt,
    adapter_parameters,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)
from fastpeft.nn import BOFTConfig, FourierFTConfig, LoraConfig, MosConfig, OFTConfig

try:
    __version__ = version("fastpeft")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AccelerationReport",
    "BOFTConfig",
    "FourierFTConfig",
    "LoraConfig",
    "MosConfig",
    "OFTConfig",
    "accelerate",
    "adapt",
    "adapter_parameters",
    "backends",
    "decelerate",
    "export_lora",
    "functional",
    "load_adapter",
    "merge",
    "nn",
    "save_adapter",
    "set_adapter",
    "unmerge",
    "use_backend",
]
