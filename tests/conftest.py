"""Before anything imports a kernel: where Triton kernels run, and on which device tests draw their tensors.

After that the fixtures that several files ask for.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

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


@pytest.fixture(scope="module")
def one_thread():
    """For tensors that are far too small to share: on a busy machine threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_cuda_helper(monkeypatch):
    """PEFT as it is where its CUDA helper does not build, without the attempt to build it: BOFT has one factor."""
    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def cuda_helper(monkeypatch, no_cuda_helper):
    """PEFT as it is where the helper builds, with the one function that it takes from there written in PyTorch."""
    import torch
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(
        layer.FastBlockDiag, "apply", lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )


@pytest.fixture
def calls(monkeypatch):
    """Counts by whom accelerated layers were computed, "ours" or "peft"."""
    from fastpeft.interop.layer import Accelerated, Plan

    counted: Counter[str] = Counter()
    forward, run = Accelerated.forward, Plan.run

    def count_run(self, x):
        y = run(self, x)
        counted["ours" if y is not None else "none"] += 1
        return y

    def count_forward(self, *args, **kwargs):
        before = counted["ours"]
        y = forward(self, *args, **kwargs)
        counted["peft"] += counted["ours"] == before
        return y

    monkeypatch.setattr(Plan, "run", count_run)
    monkeypatch.setattr(Accelerated, "forward", count_forward)
    return counted
