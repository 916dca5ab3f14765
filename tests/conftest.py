"""Before anything imports a kernel: where Triton kernels run, and on which device tests draw their tensors."""

from __future__ import annotations

import os

# Without a GPU in Triton's interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "1")

if device := os.environ.get("FASTPEFT_TEST_DEVICE"):
    import torch
    from torch.overrides import TorchFunctionMode

    class DrawOnTheCpu(TorchFunctionMode):
        """Random numbers from a generator of the CPU are the same on every device."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type == "cpu" and "device" not in kwargs:
                return func(*args, **kwargs, device="cpu").to(device)
            return func(*args, **kwargs)

    torch.set_default_device(device)
    DrawOnTheCpu().__enter__()
