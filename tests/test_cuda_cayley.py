"""The CUDA C++ kernels of the Cayley transform, checked without a GPU, as in tests/test_cuda_boft.py."""

import json
import subprocess

import pytest
import torch
from cuda_build import (
    ARCHS,
    check_figures,
    fixtures,
    has_gpu_kernel,
    needs_cxx,
    needs_nvcc,
    read_raw,
    replayed,
    write_raw,
)

build, compiled, on_the_cpu = fixtures()


def cayley(r: torch.Tensor) -> torch.Tensor:
    skew = (r - r.mT) / 2
    identity = torch.eye(r.shape[-1], dtype=r.dtype)
    return torch.linalg.solve(identity + skew, identity - skew, left=False)


def derivative(grad: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    twice = (q + torch.eye(q.shape[-1], dtype=q.dtype)).mT
    skew = twice @ grad @ twice * -0.5
    return (skew - skew.mT) / 2


def assert_accurate(value: torch.Tensor, exactly: torch.Tensor, by_torch: torch.Tensor) -> None:
    """At most twice the error of PyTorch, or of the last digit where a few entries are luckily closer."""
    error, plain = float((value.double() - exactly).norm()), float((by_torch.double() - exactly).norm())
    allowed = 2 * max(plain, torch.finfo(torch.float32).eps * float(exactly.norm()))
    assert error <= allowed, f"error {error:.3g}, PyTorch is at {plain:.3g}"


def sample(count: int, b: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    r, grad = (torch.randn(count, b, b, generator=generator) for _ in range(2))
    return r * scale, grad


def run(build, tmp_path, mode: str, offset: int, *inputs: torch.Tensor) -> torch.Tensor:
    count, b, _ = inputs[0].shape
    paths = [tmp_path / f"in{i}" for i in range(len(inputs))]
    for path, tensor in zip(paths, inputs, strict=True):
        write_raw(path, tensor)
    # Seeds: threads in ascending order, in descending order, and twice in a random one.
    command = [str(part) for part in (build("run_cayley"), mode, count, b, offset, 4, *paths, tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return read_raw(tmp_path / "out", (count, b, b), torch.float32)


# Whole thread blocks, a part of a warp, a warp that is not there; b with a kernel of its own, even, odd, the largest.
CASES = [
    (1, 2), (70, 2), (16, 4), (33, 4), (8, 8), (13, 8), (4, 16), (7, 16), (1, 32), (5, 32),
    (3, 1), (3, 3), (2, 6), (2, 12), (2, 31), (2, 48), (2, 64),
]  # fmt: skip


@needs_cxx
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(("count", "b"), CASES)
def test_kernel_matches_float64(build, tmp_path, count, b, scale):
    r, _ = sample(count, b, scale)
    assert_accurate(run(build, tmp_path, "fwd", count % 2, r), cayley(r.double()), cayley(r))


@needs_cxx
@pytest.mark.parametrize(("count", "b"), CASES)
def test_derivative_matches_float64(build, tmp_path, count, b):
    r, grad = sample(count, b, 1.0)
    q = cayley(r)
    dr = run(build, tmp_path, "bwd", count % 2, grad, q)
    assert_accurate(dr, derivative(grad.double(), q.double()), derivative(grad, q))


@needs_cxx
@pytest.mark.parametrize("b", [2, 4, 8, 16, 32, 12])
def test_zero_is_the_identity(build, tmp_path, b):
    q = run(build, tmp_path, "fwd", 0, torch.zeros(3, b, b))
    assert torch.equal(q, torch.eye(b).expand(3, b, b))
    # And symmetric parts count for nothing.
    symmetric = torch.randn(3, b, b, generator=torch.Generator().manual_seed(2))
    assert torch.equal(run(build, tmp_path, "fwd", 0, symmetric + symmetric.mT), q)


@needs_cxx
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("b", [2, 8, 32, 12])
def test_derivative_is_that_of_the_transform(build, tmp_path, b, scale):
    r, grad = sample(3, b, scale)
    wide = r.double().requires_grad_()
    (exact,) = torch.autograd.grad(cayley(wide), wide, grad.double())
    dr = run(build, tmp_path, "bwd", 0, grad, run(build, tmp_path, "fwd", 0, r))
    assert_accurate(dr, exact, derivative(grad, cayley(r)))


def plan(build, count: int, b: int) -> dict:
    command = [str(part) for part in (build("run_cayley"), "plan", count, b)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


@needs_cxx
@pytest.mark.parametrize("b", [1, 2, 8, 12, 32, 64])
def test_plan(build, b):
    shape = plan(build, 1000, b)
    own = b in (2, 8, 32)
    assert shape["grid"] == (-(-1000 * b // 64) if own else 1000)
    assert shape["threads"] == (64 if own or b > 32 else 32) and shape["threads"] >= (1 if own else b)
    assert shape["shared_bytes"] <= 64 << 10


@needs_cxx
def test_plan_refuses_large_blocks(build):
    with pytest.raises(ValueError, match="the block size may be up to 64"):
        plan(build, 1, 65)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("count", "b"), [*CASES, (1024, 8)])
def test_operators_on_a_gpu(count, b, scale):
    if not has_gpu_kernel("cayley_fwd"):
        pytest.skip("no GPU, or an extension without kernels for it")
    r, grad = sample(count, b, scale)
    exact, composed = cayley(r.double()), cayley(r)
    exact_dr, composed_dr = derivative(grad.double(), exact), derivative(grad, composed)
    r, grad = r[None].cuda(), grad[None].cuda()

    def call():
        q = torch.ops.fastpeft.cayley_fwd(r)
        return [q, torch.ops.fastpeft.cayley_bwd(grad, q)]

    found = call()
    assert_accurate(found[0][0].cpu(), exact, composed)
    assert_accurate(found[1][0].cpu(), exact_dr, composed_dr)
    assert all(torch.equal(value, other) for value, other in zip(found, replayed(call), strict=True))


def test_a_gpu_refuses_large_blocks():
    if not has_gpu_kernel("cayley_fwd"):
        pytest.skip("no GPU, or an extension without kernels for it")
    with pytest.raises(RuntimeError, match=r"boft_R of shape \(1, 2, 66, 66\): the block size may be up to 64"):
        torch.ops.fastpeft.cayley_fwd(torch.zeros(1, 2, 66, 66, device="cuda"))


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("boft_cayley")
    assert len(kernels) == len(ARCHS) * 2 * 6
    check_figures("boft_cayley", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= 168  # six thread blocks of 64 threads
