"""What launchers ask of a device, and small arithmetic on the host."""

import functools

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What one program may use where nothing is known of the chip: the least of those supported (Ada).
SHARED_MEMORY = 99 * 1024


@functools.cache
def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors: A100 has 108, H200 132, B200 148."""
    if device.type != "cuda":
        return 120
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_tiles(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv takes a microsecond or two on the host


def check_dtypes(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_float32(**tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {tensor.dtype}")
