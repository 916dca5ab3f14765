"""Adapted models on 2 and 4 processes: the losses and the weights of a single one. The cases: distributed_worker.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from distributed_worker import cases
from helpers import LORA, Errors, Method, adapted, every_method, fill, make_linear, randn, widened
from torch import Tensor

TESTS = Path(__file__).parent
EXAMPLE = TESTS.parent / "examples" / "distributed.py"
WORLDS = (2, 4)


def torchrun(world: int, *command: str) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *command], env=environment, cwd=TESTS, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """By case, what went wrong on the processes of a world, all cases of which run in one launch."""

    @cache
    def run(world: int) -> tuple[dict[str, str], str]:
        folder = tmp_path_factory.mktemp(f"world{world}")
        output = torchrun(world, "distributed_worker.py", str(folder)).stderr
        found: dict[str, str] = {}
        for rank in range(world):
            for name, problem in json.loads((folder / f"{rank}.json").read_text()).items():
                found[name] = found.get(name, "") + problem
        return found, output

    return run


@pytest.mark.parametrize("world, name", [(world, name) for world in WORLDS for name in cases(world)])
def test_processes_agree_with_one(results, world: int, name: str):
    found, output = results(world)
    assert name in found, f"was not run:\n{output[-4000:]}"
    assert not found[name], found[name]


def losses_of_the_example(world: int, way: str, out: Path) -> list[float]:
    result = torchrun(world, str(EXAMPLE), "--way", way, "--out", str(out))
    assert result.returncode == 0, result.stderr[-4000:]
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    return [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory):
    losses = losses_of_the_example(1, "ddp", tmp_path_factory.mktemp("one"))
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("way", ["ddp", "fsdp", "tp"])
def test_the_documented_example(way: str, tmp_path: Path, losses_of_one_process):
    found = losses_of_the_example(2, way, tmp_path)
    assert found == pytest.approx(losses_of_one_process, abs=2e-4)  # they are printed with four digits


def test_the_page_shows_the_example():
    page = (TESTS.parent / "docs" / "several-gpus.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        assert block in EXAMPLE.read_text("utf-8")


# One process: what a method declares about parts of a layer


@every_method
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_parts_of_a_layer_add_up(method: Method, bias: bool, parts: int):
    check_parts(adapted(method, make_linear(24, 24, bias)), parts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_method
def test_parts_of_a_layer_in_other_dtypes(method: Method, dtype: torch.dtype):
    check_parts(adapted(method, make_linear(24, 24, dtype=dtype)), 2)


def test_rows_of_a_dora_layer():
    layer = adapted(LORA, make_linear(24, 24), use_dora=True)
    check_parts(layer, 3, by="rows")
    assert "norm of a row" in layer.adapter("default").split_refusal(by_rows=False)


def check_parts(layer, parts: int, by: str = "both") -> None:
    """Outputs side by side, and summands of inputs, with gradients, against the float64 layer."""

    def by_rows(layer, x: Tensor) -> Tensor:
        adapter = layer.adapter("default")
        slices = [slice(i * 24 // parts, (i + 1) * 24 // parts) for i in range(parts)]
        biases = [None if layer.bias is None else layer.bias[rows] for rows in slices]
        outputs = [
            adapter.linear_rows(x, layer.weight[rows], part, rows) for rows, part in zip(slices, biases, strict=True)
        ]
        return torch.cat(outputs, -1)

    def by_columns(layer, x: Tensor) -> Tensor:
        adapter = layer.adapter("default")
        size = 24 // parts
        y = 0
        for start in range(0, 24, size):
            columns = slice(start, start + size)
            part = x if adapter.mixes_columns(size) else x[..., columns]
            y = y + adapter.linear_columns(part, layer.weight[:, columns], columns)
        return y if layer.bias is None else y + layer.bias

    def gradients(layer, forward, x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        parameters = dict(layer.adapter("default").named_parameters())
        y = forward(layer, x)
        found = torch.autograd.grad(y, [x, *parameters.values()], randn(*y.shape, seed=2).to(y.dtype))
        return {"y": y.detach(), **dict(zip(["dx", *parameters], found, strict=True))}

    def whole(layer, x: Tensor) -> Tensor:
        return layer(x)

    forwards = {"rows": (by_rows,), "both": (by_rows, by_columns)}[by]
    for forward in forwards:
        errors = Errors()
        for draw in range(4):
            fill(layer, draw)
            x = randn(2, 5, 24, seed=draw).to(layer.weight.dtype)
            found, composed = gradients(layer, forward, x), gradients(layer, whole, x)
            exact = gradients(widened(layer), whole, x.double())
            for name, tensor in found.items():
                errors.add(name, tensor, exact[name], (composed[name], exact[name]))
        errors.check()
