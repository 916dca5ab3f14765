"""Tensors that are spread over several processes, as far as whole models and files meet them.

PyTorch's ``DTensor`` is known by its attributes, so that nothing of ``torch.distributed`` is imported where it is not
used. How models come to be spread is the affair of ``fastpeft.interop.distributed``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_spread(tensor: Any) -> bool:
    """Whether a process holds a part of a tensor, or one of several copies that know of each other."""
    return hasattr(tensor, "device_mesh")


def is_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has taken a module, or a tensor of it is spread."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return bool(getattr(module, "_is_fsdp_managed_module", False)) or any(map(is_spread, tensors))


def reshard(model: nn.Module) -> None:
    """Lets every process keep its own part alone: a forward without a backward leaves some parameters gathered."""
    for module in model.modules():
        if getattr(module, "_is_fsdp_managed_module", False) and hasattr(module, "reshard"):
            module.reshard()  # type: ignore[operator]


def gather(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A model's tensors, whole; all processes have to ask together. None on those that are not to write them: where
    any of the model is spread over a mesh, one process of it is enough."""
    whole = {key: spread_to_whole(tensor.detach()) for key, tensor in tensors.items()}
    spread: list[Any] = [parameter for parameter in model.parameters() if is_spread(parameter)]
    return None if any(any(tensor.device_mesh.get_coordinate() or ()) for tensor in spread) else whole


def spread_to_whole(tensor: Any) -> Tensor:
    return tensor.full_tensor().cpu() if is_spread(tensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """target ← value, whole on every process. Nothing is communicated."""
    if not is_spread(target):
        target.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    spread: Any = target
    value = value.to(device=target.device, dtype=target.dtype)
    target.copy_(distribute_tensor(value, spread.device_mesh, spread.placements, src_data_rank=None))
