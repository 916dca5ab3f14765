"""The CUDA C++ kernels of BOFT's output scale, checked as in test_cuda_boft.py, and the whole layer on a GPU."""

import json
import subprocess
from dataclasses import dataclass

import pytest
import torch
from cuda_build import DTYPES, fixtures, has_gpu_kernel, needs_cxx, rare, read_raw, replayed, write_raw

from fastpeft.ops.boft import scale_rows

build, compiled, on_the_cpu = fixtures()


@dataclass(frozen=True)
class Case:
    tokens: int
    features: int
    bias: bool = True
    offset: int = 0  # elements of activations and bias from a 16-byte boundary
    scale_offset: int = 0
    processors: int = 132

    def __str__(self) -> str:
        return "-".join([f"T{self.tokens}", f"d{self.features}", *rare(self, 2)])


CASES = [
    Case(1, 1),
    Case(1, 8),
    Case(3, 37),  # no row but the first is aligned
    Case(33, 264),  # a second tile either way, most of it missing
    Case(70, 96, bias=False),
    Case(70, 96, offset=1),
    Case(70, 96, scale_offset=1),
    Case(200, 40, processors=0),  # one group over all rows
    Case(200, 1032, processors=1),  # more tiles side by side than fill the GPU
    Case(130, 35, processors=1),  # several groups, sums in no fours
]


def sample(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "y0": torch.randn(case.tokens, case.features, generator=generator).to(dtype),
        "grad": torch.randn(case.tokens, case.features, generator=generator).to(dtype),
        "scale": 1 + torch.randn(case.features, generator=generator) / 2,
    }
    if case.bias:
        tensors["bias"] = torch.randn(case.features, generator=generator).to(dtype)
    return tensors


def run(build, tmp_path, mode: str, dtype: str, case: Case, tensors: dict, outputs: dict, **options) -> None:
    """Runs the kernel in four orders of threads, which must agree in every bit, and reads what it wrote to outputs."""
    for name, tensor in tensors.items():
        write_raw(tmp_path / name, tensor)
    numbers = {name: getattr(case, name) for name in ("tokens", "features", "offset", "scale_offset", "processors")}
    files = {name: tmp_path / name for name in (*tensors, *outputs)}
    arguments = [f"{name}={value}" for name, value in {**numbers, "seeds": 4, **options, **files}.items()]
    result = subprocess.run([build("run_scale"), mode, dtype, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, like in outputs.items():
        outputs[name] = read_raw(tmp_path / name, like.shape, like.dtype)


def assert_accurate(value: torch.Tensor, exactly: torch.Tensor, by_torch: torch.Tensor) -> None:
    error, plain = ((other.double() - exactly).norm() for other in (value, by_torch))
    assert error <= 2 * plain, f"error {error:.3g}, the same-dtype composition is at {plain:.3g}"


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scale_matches_float64(build, tmp_path, case, dtype):
    tensors = sample(case, DTYPES[dtype])
    y0, scale, bias = tensors["y0"], tensors["scale"], tensors.get("bias")
    del tensors["grad"]
    exactly = scale_rows(y0.double(), scale.double()[:, None], None if bias is None else bias.double())
    results = []
    for in_place in (0, 1):
        outputs = {"y": y0}
        run(build, tmp_path, "fwd", dtype, case, tensors, outputs, in_place=in_place)
        results.append(outputs["y"])
    assert torch.equal(*results)
    assert_accurate(results[0], exactly, scale_rows(y0, scale[:, None], bias))

    outputs = {"y": y0}
    run(build, tmp_path, "fwd", dtype, case, tensors | {"scale": torch.ones_like(scale)}, outputs, in_place=1)
    assert torch.equal(outputs["y"], y0)


def gradients(grad, y0, scale, bias):
    """g s, and the gradient of the scale, in the dtype of the scale."""
    wide = grad.to(scale.dtype)
    return wide * scale, (wide * (y0.to(scale.dtype) - (0 if bias is None else bias.to(scale.dtype)))).sum(0)


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_match_float64(build, tmp_path, case, dtype):
    tensors = sample(case, DTYPES[dtype])
    grad, y0, scale, bias = (tensors.get(name) for name in ("grad", "y0", "scale", "bias"))
    exactly, dscale_exactly = gradients(grad, y0, scale.double(), bias)
    composed, dscale_composed = gradients(grad, y0, scale, bias)
    outputs = {"scaled": grad, "dscale": scale}
    run(build, tmp_path, "bwd", dtype, case, tensors, outputs)
    assert_accurate(outputs["scaled"], exactly, composed.to(grad.dtype))
    assert_accurate(outputs["dscale"], dscale_exactly, dscale_composed)

    for name in ("scaled", "dscale"):  # the same where the other is not needed
        given = {key: value for key, value in tensors.items() if key != "y0" or name == "dscale"}
        alone = {name: outputs[name]}
        run(build, tmp_path, "bwd", dtype, case, given, alone)
        assert torch.equal(alone[name], outputs[name])


@needs_cxx
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize(("tokens", "features"), [(1, 8), (4097, 4096), (100, 40000)])
def test_plan_covers_the_rows_with_few_parts(build, tokens, features, processors, packed):
    numbers = {"tokens": tokens, "features": features, "processors": processors, "packed": packed}
    arguments = [f"{name}={value}" for name, value in numbers.items()]
    output = subprocess.run([build("run_scale"), "plan", "bfloat16", *arguments], check=True, capture_output=True)
    plan = json.loads(output.stdout)
    width = 32 * (8 if packed else 1)
    assert width * plan["across"] >= features > width * (plan["across"] - 1)
    assert plan["chunk"] * plan["groups"] >= tokens > plan["chunk"] * (plan["groups"] - 1)
    assert plan["grid"] == plan["groups"] * plan["across"]
    assert plan["groups"] <= max(1, 3 * processors // plan["across"])
    assert 3 * plan["shared_bytes"] <= 48 << 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(0, 32, 24), (1, 4096, 4096), (70, 96, 37), (2050, 256, 264)]
)
def test_layer_on_a_gpu(tokens, inputs, outputs, biased, dtype):
    if not has_gpu_kernel("boft_bwd"):
        pytest.skip("no GPU, or an extension without kernels for it")
    ops, (b, factors) = torch.ops.fastpeft, (8, 2)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    x, weight, bias, grad = (
        tensor.to(DTYPES[dtype]).cuda()
        for tensor in (draw(tokens, inputs), draw(outputs, inputs) / inputs**0.5, draw(outputs), draw(tokens, outputs))
    )
    bias = bias if biased else None
    blocks = torch.linalg.qr(draw(factors, inputs // b, b, b).double())[0].float().cuda()
    scale = (1 + draw(outputs, 1) / 4).cuda()

    # The same layer, one step after the other.
    rotated = ops.butterfly_fwd(x, blocks)
    y0 = torch.nn.functional.linear(rotated, weight, bias)
    dscale = gradients(grad, y0, scale.squeeze(1).double(), bias)[1]
    scaled = (grad * scale.squeeze(1)).to(x.dtype)
    dx, dblocks = ops.butterfly_bwd(scaled @ weight, x, blocks, True, True)

    def call():
        y, kept = ops.boft_fwd(x, weight, bias, blocks, scale, True)
        return [y, kept, *ops.boft_bwd(grad, x, weight, bias, blocks, scale, kept, True, True)]

    found = call()
    torch.testing.assert_close(found[1], y0)
    y0 = found[1]
    exactly = scale_rows(y0.double(), scale.double(), None if bias is None else bias.double())
    assert_accurate(found[0], exactly, scale_rows(y0, scale, bias))
    torch.testing.assert_close(found[2], dx)
    torch.testing.assert_close(found[3], dblocks)
    assert_accurate(found[4].squeeze(1), dscale, gradients(grad, y0, scale.squeeze(1), bias)[1])
    for again in (call(), replayed(call)):
        assert all(torch.equal(value, other) for value, other in zip(found, again, strict=True))
    y, kept = ops.boft_fwd(x[None], weight, bias, blocks, scale, False)
    assert torch.equal(y[0], found[0]) and kept.shape == (0, outputs)
    nothing = ops.boft_bwd(grad, x, weight, bias, blocks, scale, None, False, False)
    assert [tensor.shape[0] for tensor in nothing] == [0, 0, 0]
