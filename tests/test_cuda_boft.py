"""The CUDA C++ kernels of the butterfly product, checked without a GPU.

csrc/cuda/boft.cuh and boft_bwd.cuh are compiled for the CPU against the stand-ins for CUDA's headers in
tests/cuda_host, with AddressSanitizer and UndefinedBehaviorSanitizer, and run over awkward shapes. Where there is an
nvcc, csrc/cuda/boft.cu is compiled for three GPUs, and what ptxas says about registers and spills is checked. That
mistakes are seen is the matter of test_cuda_emulator.py.
"""

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuda_build import (
    ARCHS,
    DTYPES,
    SM_80_SHARED,
    SM_90_SHARED,
    check_figures,
    fixtures,
    has_gpu_kernel,
    needs_cxx,
    needs_nvcc,
    rare,
    read_raw,
    replayed,
    write_raw,
)

build, compiled, on_the_cpu = fixtures()


def butterfly(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """x (T, d) times R = B_{m-1} ... B_0 for blocks (m, d/b, b, b), in the dtype of both."""
    factors, _, b, _ = blocks.shape
    tokens, d = x.shape
    for f in reversed(range(factors)):
        if f == 0:
            z = x.reshape(tokens, d // b, b)
            x = torch.einsum("tka,kac->tkc", z, blocks[0]).reshape(tokens, d)
        else:
            # (window, half, s, entry): block k = window * 2^f + s takes the half-blocks s of both halves.
            half_blocks, r = 2**f, b // 2
            windows = d // (2 * half_blocks * r)
            z = x.reshape(tokens, windows, 2, half_blocks, r).transpose(2, 3).reshape(tokens, d // b, b)
            z = torch.einsum("tka,kac->tkc", z, blocks[f])
            x = z.reshape(tokens, windows, half_blocks, 2, r).transpose(2, 3).reshape(tokens, d)
    return x


@dataclass(frozen=True)
class Case:
    tokens: int
    features: int
    b: int
    factors: int
    padding: int = 0  # elements between the end of a row of x and the next one
    x_offset: int = 0  # elements from a 16-byte boundary
    blocks_offset: int = 0
    max_shared: int = SM_90_SHARED

    def __str__(self) -> str:
        shape = f"T{self.tokens}", f"d{self.features}", f"b{self.b}", f"m{self.factors}"
        return "-".join([*shape, *rare(self, 4)])


CASES = [
    Case(0, 24, 2, 3),  # no rows
    Case(1, 8, 2, 1),  # one row, the smallest block
    Case(3, 24, 2, 3),  # three factors, rows of a tile that no thread has
    Case(3, 5, 1, 1),  # blocks of a single entry
    Case(17, 48, 8, 2),  # a tile of 32 rows, half of them missing
    Case(17, 96, 16, 2),  # two threads share a block
    Case(17, 64, 32, 2),  # four threads share a block; the window is the row
    Case(5, 35, 5, 1),  # odd b
    Case(17, 24, 6, 3),  # even b without a kernel of its own
    Case(17, 72, 12, 2),  # the same, with a last piece of fewer columns
    Case(17, 64, 4, 5),  # five factors, one window over the row
    Case(3, 384, 8, 2),  # two tiles side by side, the second one narrower
    Case(70, 528, 16, 1),  # three tiles of rows, three side by side
    Case(2, 1024, 8, 8),  # a window wider than a tile usually is
    Case(17, 512, 8, 7, max_shared=9 << 10),  # fewer rows than usual, because shared memory is short
    Case(3, 512, 32, 5, max_shared=2 << 10),  # one row at a time
    Case(17, 48, 8, 2, padding=8),  # rows apart, still aligned
    Case(17, 48, 8, 2, padding=3),  # rows apart, each with another alignment
    Case(17, 64, 32, 2, x_offset=1),  # no row aligned
    Case(5, 252, 6, 1),  # rows that are no multiple of 16 bytes
    Case(17, 96, 16, 2, blocks_offset=1),  # Q not aligned: the generic kernel takes over
]


def sample(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x of the dtype, and blocks of float32, orthogonal as the method has them so that nothing grows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.tokens, case.features, generator=generator).to(dtype)
    shape = (case.factors, case.features // case.b, case.b, case.b)
    blocks, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    return x, blocks.float()


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_matches_float64(build, tmp_path, case, dtype):
    x, blocks = sample(case, DTYPES[dtype])
    row_stride = case.features + case.padding
    padded = torch.full((case.tokens, row_stride), float("nan"), dtype=x.dtype)  # what lies between rows is not read
    padded[:, : case.features] = x
    write_raw(tmp_path / "x", padded)
    write_raw(tmp_path / "blocks", blocks)

    # The seeds: threads in ascending order, in descending order, and twice in a random one. The program fails if two
    # of them differ in a bit.
    numbers = [case.tokens, case.features, case.b, case.factors, case.max_shared]
    numbers += [row_stride, case.x_offset, case.blocks_offset, 4]
    files = [tmp_path / "x", tmp_path / "blocks", tmp_path / "y"]
    command = [str(part) for part in (build("run_butterfly"), "run", dtype, *numbers, *files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    y = read_raw(tmp_path / "y", x.shape, x.dtype).double()

    exact = butterfly(x.double(), blocks.double())
    composed = butterfly(x.float(), blocks).to(x.dtype).double()
    error, allowed = (y - exact).norm(), 2 * (composed - exact).norm()
    assert error <= allowed, f"error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"


@dataclass(frozen=True)
class BwdCase(Case):
    processors: int = 132
    need: str = "xb"  # gradients of x, of the blocks


BWD_CASES = [
    BwdCase(1, 8, 2, 1),
    BwdCase(3, 24, 2, 3),
    BwdCase(70, 48, 2, 4),  # three tiles of rows
    BwdCase(33, 104, 4, 1),  # a last tile of one row
    BwdCase(70, 96, 4, 3, processors=1),  # two thread blocks: sums over the tiles of a group
    BwdCase(33, 24, 8, 1),
    BwdCase(70, 96, 8, 2, processors=1),
    BwdCase(70, 128, 8, 4),  # a group for each tile, and parts to add
    BwdCase(33, 96, 16, 2),
    BwdCase(70, 128, 16, 4, processors=1),
    BwdCase(3, 96, 32, 1),
    BwdCase(70, 128, 32, 3, processors=1),
    BwdCase(70, 256, 32, 4, processors=1),  # more sums than two thread blocks can keep
    BwdCase(3, 4096, 8, 2),  # many tiles side by side
    BwdCase(1, 4096, 32, 1),
    BwdCase(3, 384, 8, 2),  # a narrower last tile
    BwdCase(33, 96, 6, 1),  # no kernel of its own
    BwdCase(70, 96, 6, 4, processors=1),
    BwdCase(33, 72, 12, 2),
    BwdCase(5, 35, 5, 1),  # odd b
    BwdCase(70, 15, 3, 1),  # parts that are no multiple of 16 bytes
    BwdCase(9, 128, 8, 5, max_shared=10 << 10, processors=1),  # four rows, and sums in global memory
    BwdCase(3, 128, 32, 3, max_shared=2 << 10),  # one row
    BwdCase(33, 96, 8, 2, padding=8),
    BwdCase(33, 48, 8, 2, padding=3),
    BwdCase(70, 64, 32, 2, x_offset=1, processors=1),  # dx is aligned and x is not: threads store what others load
    BwdCase(33, 96, 16, 2, blocks_offset=1, processors=1),
    BwdCase(70, 96, 8, 2, need="x"),
    BwdCase(70, 96, 8, 2, need="b"),
    BwdCase(33, 96, 6, 2, need="x"),
    BwdCase(33, 96, 6, 2, need="b"),
]


def gradients(x: torch.Tensor, blocks: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, blocks = x.clone().requires_grad_(), blocks.clone().requires_grad_()
    return torch.autograd.grad(butterfly(x, blocks), (x, blocks), grad)


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BWD_CASES, ids=str)
def test_gradients_match_float64(build, tmp_path, case, dtype):
    x, blocks = sample(case, DTYPES[dtype])
    blocks += 0.1 * blocks.flip(1)  # any blocks will do, not orthogonal ones only
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    row_stride = case.features + case.padding
    for name, rows in (("x", x), ("grad", grad)):
        padded = torch.full((case.tokens, row_stride), float("nan"), dtype=x.dtype)
        padded[:, : case.features] = rows
        write_raw(tmp_path / name, padded)
    if "b" not in case.need:
        write_raw(tmp_path / "x", torch.full((case.tokens, row_stride), float("nan"), dtype=x.dtype))  # not read
    write_raw(tmp_path / "blocks", blocks)
    numbers = [case.tokens, case.features, case.b, case.factors, case.max_shared]
    numbers += [row_stride, case.x_offset, case.blocks_offset, 4]
    outputs = [tmp_path / name if need in case.need else "-" for name, need in (("dx", "x"), ("dblocks", "b"))]
    files = [tmp_path / "x", tmp_path / "blocks", case.processors, tmp_path / "grad", *outputs]
    command = [str(part) for part in (build("run_butterfly"), "bwd", dtype, *numbers, *files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    exact = gradients(x.double(), blocks.double(), grad.double())
    composed = gradients(x.float(), blocks, grad.float())
    for path, exactly, by_torch, out_dtype in zip(outputs, exact, composed, (x.dtype, torch.float32), strict=True):
        if path == "-":
            continue
        value = read_raw(path, exactly.shape, out_dtype).double()
        error, allowed = (value - exactly).norm(), 2 * (by_torch.to(out_dtype).double() - exactly).norm()
        assert error <= allowed, f"{path.name}: error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"


def plan(program: Path, dtype: str, tokens: int, features: int, b: int, factors: int, max_shared: int, *bwd) -> dict:
    mode = "plan_bwd" if bwd else "plan"
    command = [str(part) for part in (program, mode, dtype, tokens, features, b, factors, max_shared, *bwd)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    return json.loads(result.stdout)


@needs_cxx
@pytest.mark.parametrize("b", [2, 4, 8, 16, 32, 48])
@pytest.mark.parametrize("factors", [1, 5])
@pytest.mark.parametrize("tokens", [1, 6, 100])
def test_plan_covers_x_and_fits(build, tokens, b, factors):
    window = b << (factors - 1)
    for features, max_shared in ((window, SM_90_SHARED), (7 * window, 48 << 10)):
        shape = plan(build("run_butterfly"), "bfloat16", tokens, features, b, factors, max_shared)
        threads = shape["block"][0] * shape["block"][1]
        assert threads % 32 == 0 and threads <= 256
        assert shape["shared_bytes"] <= max_shared
        assert shape["features"] % window == 0
        assert shape["features"] * shape["across"] >= features > shape["features"] * (shape["across"] - 1)
        rows_of_tiles = shape["grid"] // shape["across"]
        assert shape["rows"] * rows_of_tiles >= tokens > shape["rows"] * (rows_of_tiles - 1)


@needs_cxx
@pytest.mark.parametrize("b", [2, 4, 8, 16, 32, 48])
@pytest.mark.parametrize("factors", [1, 4])
def test_plan_of_gradients_covers_x_and_fits(build, b, factors):
    window = b << (factors - 1)
    for tokens, features, processors, need in ((1, window, 132, 1), (100, 9 * window, 4, 1), (100, 9 * window, 4, 0)):
        arguments = tokens, features, b, factors, SM_80_SHARED, processors, need
        shape = plan(build("run_butterfly"), "float16", *arguments)
        threads = shape["block"][0] * shape["block"][1]
        assert threads % 32 == 0 and threads <= 256
        assert 2 * (shape["shared_bytes"] + 1024) <= SM_80_SHARED + 1024  # two thread blocks to a multiprocessor
        assert shape["features"] % window == 0
        assert shape["features"] * shape["across"] >= features > shape["features"] * (shape["across"] - 1)
        assert shape["chunk"] % shape["rows"] == 0 and shape["grid"] == shape["across"] * shape["groups"]
        assert shape["chunk"] * shape["groups"] >= tokens > shape["chunk"] * (shape["groups"] - 1)
        if need:
            assert shape["groups"] <= max(1, 2 * processors // shape["across"])


@needs_cxx
def test_plan_keeps_sums_in_shared_memory_while_two_thread_blocks_fit(build):
    program = build("run_butterfly")
    kept = {
        (b, factors): bool(plan(program, "bfloat16", 4096, 4096, b, factors, SM_90_SHARED, 132, 1)["sums_in_shared"])
        for b in (2, 4, 8, 16, 32)
        for factors in (1, 2, 4)
    }
    assert [shape for shape, in_shared in kept.items() if not in_shared] == [(32, 4)]


def bank_degrees(build, mode: str, dtype: str, tokens: int, features: int, b: int, factors: int, offset: int) -> dict:
    arguments = mode, dtype, tokens, features, b, factors, offset
    command = [build("run_banks", watched=True), *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# Whole tiles, one row, four groups of threads whose last rows are missing; all factors of a window of 256 features, and
# an odd number of blocks.
@needs_cxx
@pytest.mark.parametrize(("mode", "dtype"), [("fwd", "float32"), ("fwd", "bfloat16"), ("bwd", "bfloat16")])
@pytest.mark.parametrize(("b", "factors"), [(2, 8), (4, 7), (8, 6), (16, 5), (32, 4)])
def test_no_bank_conflicts(build, b, factors, mode, dtype):
    vector = f"{min(4 * b // 2, 16)}"  # a half-block, at most 16 bytes
    kinds = {f"{access}{size}" for access in ("read", "write") for size in ("16", vector)}
    for tokens, features, m in ((32, 256, factors), (1, 256, factors), (13, 256, factors), (32, max(24, 3 * b), 1)):
        assert bank_degrees(build, mode, dtype, tokens, features, b, m, 0) == dict.fromkeys(kinds, 1)
    unaligned = bank_degrees(build, mode, dtype, 32, 256, b, factors, 1)
    assert unaligned == dict.fromkeys({"read4", "write4", f"read{vector}", f"write{vector}"}, 1)


@needs_cxx
@pytest.mark.parametrize(("b", "degree"), [(6, 2), (12, 4)])
def test_bank_conflicts_are_seen(build, b, degree):
    # Blocks without a kernel of their own: rows are apart, and blocks may meet.
    assert max(bank_degrees(build, "fwd", "float32", 32, 16 * b, b, 2, 0).values()) == degree


@needs_cxx
def test_plan_takes_one_row_where_no_more_fit(build):
    shape = plan(build("run_butterfly"), "float32", 100, 32768, 8, 13, SM_80_SHARED)
    assert (shape["rows"], shape["shared_bytes"]) == (1, 128 << 10)


@needs_cxx
def test_plan_refuses_a_window_that_does_not_fit(build):
    with pytest.raises(ValueError, match="one row of one window does not fit the shared memory"):
        plan(build("run_butterfly"), "float32", 100, 32768, 8, 13, 99 << 10)
    with pytest.raises(ValueError, match="one row of one window, and of its gradient, does not fit the shared memory"):
        plan(build("run_butterfly"), "float32", 100, 32768, 8, 13, SM_90_SHARED, 132, 1)


GPU_CASES = [case for case in BWD_CASES if case.max_shared == SM_90_SHARED and case.need == "xb"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*GPU_CASES, BwdCase(4097, 4096, 8, 2), BwdCase(2000, 4096, 32, 4)], ids=str)
def test_operators_on_a_gpu(case, dtype):
    if not has_gpu_kernel("butterfly_bwd"):
        pytest.skip("no GPU, or an extension without kernels for it")
    x, blocks = sample(case, DTYPES[dtype])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    exact = butterfly(x.double(), blocks.double()), *gradients(x.double(), blocks.double(), grad.double())
    composed = butterfly(x.float(), blocks), *gradients(x.float(), blocks, grad.float())
    ops = torch.ops.fastpeft
    on_gpu = [torch.nn.functional.pad(rows, (case.x_offset, case.padding)).cuda() for rows in (x, grad)]
    x, grad = (rows[:, case.x_offset :][:, : case.features] for rows in on_gpu)
    blocks = blocks.cuda()

    def call():
        return [ops.butterfly_fwd(x, blocks), *ops.butterfly_bwd(grad, x, blocks, True, True)]

    found = call()
    for value, exactly, by_torch in zip(found, exact, composed, strict=True):
        error = (value.cpu().double() - exactly).norm()
        assert error <= 2 * (by_torch.to(value.dtype).double() - exactly).norm()
    for again in (call(), replayed(call)):
        assert all(torch.equal(value, other) for value, other in zip(found, again, strict=True))
    dx, dblocks = ops.butterfly_bwd(grad[None], x[None], blocks, True, False)
    assert torch.equal(dx[0], found[1]) and dblocks.shape == (0, *blocks.shape[1:])
    dx, dblocks = ops.butterfly_bwd(grad[None], x[None], blocks, False, True)
    assert torch.equal(dblocks, found[2]) and dx.shape == (0, case.features)


@pytest.mark.builds
@needs_nvcc
def test_nvcc_compiles_without_spills(compiled):
    kernels = compiled("boft")
    block_sizes = ["0", "2", "4", "8", "16", "32"]
    forward = [kernel for kernel in kernels if "butterfly_fwd_kernel" in kernel.name]
    backward = [kernel for kernel in kernels if "butterfly_bwd_kernel" in kernel.name]
    assert len(forward) == len(ARCHS) * len(DTYPES) * len(block_sizes)
    assert len(backward) == len(ARCHS) * len(block_sizes)
    scale = [kernel for kernel in kernels if "boft_scale_" in kernel.name]
    assert len(scale) == 2 * len(ARCHS) * len(DTYPES)
    assert len(kernels) == len(forward) + len(backward) + len(scale) + len(ARCHS)  # and the sum of parts
    check_figures("boft", kernels)
    for kernel in kernels:
        assert kernel.shared == 0, f"{kernel.name} has static shared memory, which the plan does not count"
        assert kernel.registers <= 128  # two blocks of 256 threads
    for kernel in forward:
        narrow = re.search(r"Li(\d+)E", kernel.name)[1] in ("2", "4")
        assert kernel.registers <= (80 if narrow else 128)  # three or two blocks of 256 threads
