"""Sizes past 2³¹, and what is left after memory has run out."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import METHODS, Method, adapted, assert_same, make_linear, run

import fastpeft

STRIDE, ROWS = 1 << 20, (1 << 11) + 3  # elements from row to row, and rows: the last ones lie past 2³¹


def far_rows(features: int, values: torch.Tensor) -> torch.Tensor:
    """Rows of a matrix so wide that the last begin past 2³¹ elements. Pages that nobody writes take no memory."""
    try:
        wide = torch.zeros(ROWS, STRIDE, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    rows = wide[:, STRIDE - features :]
    rows[-len(values) :] = values
    return rows


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rows_past_two_to_the_31(method: Method):
    layer = adapted(method, make_linear(24, 16).bfloat16())
    values = torch.randn(5, 24).bfloat16()
    x = far_rows(24, values)
    assert x.stride(0) * (len(x) - 1) > 2**31
    grad = torch.randn(len(x), 16).bfloat16()
    near = torch.zeros(len(x), 24).bfloat16()
    near[-5:] = values
    assert_same(run(layer, x, gradient=grad), run(layer, near, gradient=grad))


def test_more_than_two_to_the_31_elements():
    tokens = (1 << 25) + 5
    try:
        x = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for it: {error}")
    assert x.numel() > 2**31
    x[-1] = 1
    A, B = torch.ones(1, 64), torch.full((1, 1), 0.5)
    with fastpeft.use_backend("native"):
        y = fastpeft.ops.lora.apply_lora(x, None, None, A, B, 1.0)
    assert y.shape == (tokens, 1) and y[-1] == 32 and not y[:-1].any()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize(
    "config", ["LoraConfig(r=64", "MosConfig(r=2", "BOFTConfig(", "FourierFTConfig(n_frequency=50"]
)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
def test_a_layer_survives_running_out_of_memory(config: str, training: bool):
    program = f"""
        import resource, torch, fastpeft
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({{"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64)}})
        fastpeft.adapt(model, fastpeft.{config}, init_weights=False, target_modules=["a", "b"]))
        layer = model["a"]
        small = torch.randn(40, 64)
        def step(x):
            with torch.set_grad_enabled({training}):
                x = x.detach().requires_grad_({training})
                y = layer(x)
                if {training}:
                    y.sum().backward()
                return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
        before = step(small)
        layer.zero_grad()
        failures = 0
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        big = torch.ones(1, 1).expand(1 << 18, 64)  # an output takes 64 MiB
        for spare in range(0, 600, 20):
            resource.setrlimit(resource.RLIMIT_AS, (used + (spare << 20), resource.RLIM_INFINITY))
            try:
                step(big)
            except (RuntimeError, MemoryError) as error:
                assert "memory" in str(error) or "bad_alloc" in str(error) or isinstance(error, MemoryError), error
                failures += 1
            else:
                break
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            layer.zero_grad()
            for then, now in zip(before, step(small), strict=True):
                assert (then is None) == (now is None) and (then is None or torch.equal(then, now))
            layer.zero_grad()
        assert failures, "there was memory enough"
        print("survived", failures)
    """
    program = textwrap.dedent(program).replace("LoraConfig(r=64, init_weights", "LoraConfig(r=64, init_lora_weights")
    program = program.replace("(, ", "(")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "survived" in done.stdout, done.stderr[-2000:]
