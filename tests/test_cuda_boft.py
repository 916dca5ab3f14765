"""The CUDA C++ kernel of the butterfly product, checked without a GPU.

csrc/cuda/boft.cuh is compiled for the CPU against the stand-ins for CUDA's headers in tests/cuda_host, with
AddressSanitizer and UndefinedBehaviorSanitizer, and run over awkward shapes. Where there is an nvcc, csrc/cuda/boft.cu
is compiled for three GPUs, and what ptxas says about registers and spills is checked.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CUDA_HOST = ROOT / "tests" / "cuda_host"
CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")

SM_90_SHARED = 227 << 10  # bytes of shared memory a thread block can have
SM_80_SHARED = 163 << 10
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(name) compiles tests/cuda_host/<name>.cpp once and returns the program."""
    folder = tmp_path_factory.mktemp("cuda_host")

    def compile_once(name: str) -> Path:
        program = folder / name
        if not program.exists():
            flags = "-std=c++20 -Og -g1 -Wall -Werror -Wno-unknown-pragmas"
            sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all"
            includes = [f"-I{CUDA_HOST}", f"-I{ROOT / 'csrc'}"]
            command = [CXX, *flags.split(), *sanitizers.split(), *includes, CUDA_HOST / f"{name}.cpp", "-o", program]
            subprocess.run(command, check=True)
        return program

    return compile_once


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
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        rare = [
            f"{field.name}{values[field.name]}" for field in fields(self)[4:] if values[field.name] != field.default
        ]
        return "-".join([f"T{self.tokens}", f"d{self.features}", f"b{self.b}", f"m{self.factors}", *rare])


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


def write_raw(path: Path, tensor: torch.Tensor) -> None:
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


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
    y = torch.frombuffer(bytearray((tmp_path / "y").read_bytes() or b"\0\0\0\0"), dtype=x.dtype)
    y = y[: x.numel()].reshape(x.shape).double()

    exact = butterfly(x.double(), blocks.double())
    composed = butterfly(x.float(), blocks).to(x.dtype).double()
    error, allowed = (y - exact).norm(), 2 * (composed - exact).norm()
    assert error <= allowed, f"error {error:.3g}, the same-dtype composition is at {allowed / 2:.3g}"


def plan(program: Path, dtype: str, tokens: int, features: int, b: int, factors: int, max_shared: int) -> dict:
    command = [str(part) for part in (program, "plan", dtype, tokens, features, b, factors, max_shared)]
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
        assert shape["row_stride"] >= shape["features"] and shape["row_stride"] % 4 == 0
        assert shape["features"] * shape["across"] >= features > shape["features"] * (shape["across"] - 1)
        rows_of_tiles = shape["grid"] // shape["across"]
        assert shape["rows"] * rows_of_tiles >= tokens > shape["rows"] * (rows_of_tiles - 1)


@needs_cxx
@pytest.mark.parametrize("b", [8, 16, 32])
def test_row_stride_keeps_a_quarter_warp_in_different_banks(build, b):
    shape = plan(build("run_butterfly"), "float32", 1000, 4096, b, 2, SM_90_SHARED)
    shared_by = b // 8
    # A float4 is four banks; thread t has row t // shared_by and column t % shared_by.
    banks = {(t // shared_by * shape["row_stride"] // 4 + t % shared_by) % 8 for t in range(8)}
    assert len(banks) == 8


@needs_cxx
def test_plan_takes_one_row_where_no_more_fit(build):
    shape = plan(build("run_butterfly"), "float32", 100, 32768, 8, 13, SM_80_SHARED)
    assert (shape["rows"], shape["shared_bytes"]) == (1, 128 << 10)


@needs_cxx
def test_plan_refuses_a_window_that_does_not_fit(build):
    with pytest.raises(ValueError, match="one row of one window does not fit the shared memory"):
        plan(build("run_butterfly"), "float32", 100, 32768, 8, 13, 99 << 10)


def run_fault(build, name: str, seed: int) -> subprocess.CompletedProcess:
    return subprocess.run([build("faults"), name, str(seed)], capture_output=True, text=True)


@needs_cxx
@pytest.mark.parametrize("seed", range(4))
def test_emulator_runs_a_correct_kernel(build, seed):
    assert run_fault(build, "none", seed).stdout.split() == [str(i) for i in reversed(range(64))]
    # Threads that have ended need not come to a barrier.
    assert run_fault(build, "early_exit", seed).stdout.split() == [str(i) for i in range(32)] + ["-1"] * 32


@needs_cxx
def test_emulator_shows_a_missing_barrier(build):
    ascending, descending = (run_fault(build, "missing_barrier", seed).stdout for seed in (0, 1))
    assert "nan" in ascending and "nan" in descending and ascending != descending


@needs_cxx
@pytest.mark.parametrize("seed", range(4))
def test_emulator_shows_unwritten_shared_memory(build, seed):
    values = run_fault(build, "unwritten_shared", seed).stdout.split()
    assert ["nan" in value for value in values] == [i == 58 for i in range(64)]


@needs_cxx
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "AddressSanitizer: use-after-poison"),
        ("beyond_global", "AddressSanitizer: heap-buffer-overflow"),
        ("diverging_barriers", "cuda_host: deadlock in block (0, 0, 0)"),
        ("split_barrier", "cuda_host: threads meet at different barriers"),
    ],
)
def test_emulator_stops_at(build, name, message, seed):
    result = run_fault(build, name, seed)
    assert result.returncode != 0 and message in result.stderr


@needs_nvcc
def test_nvcc_compiles_without_spills(tmp_path):
    archs = ["80", "90a", "100"]
    flags = "-std=c++20 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -Xptxas -v --threads 0 -c".split()
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in include_paths("cpu"))]
    command = [NVCC, *flags, ROOT / "csrc" / "cuda" / "boft.cu", "-o", tmp_path / "boft.o"]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    report = result.stdout + result.stderr
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        report,
        re.DOTALL,
    )
    block_sizes = ["0", "2", "4", "8", "16", "32"]
    assert len(kernels) == len(archs) * len(DTYPES) * len(block_sizes), report
    for name, arch, stack, stores, loads, registers, rest in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{name} spills on sm_{arch}"
        assert "smem" not in rest, f"{name} has static shared memory, which the plan does not count"
        narrow = re.search(r"Li(\d+)E", name)[1] in ("2", "4")
        assert int(registers) <= (80 if narrow else 128)  # three or two blocks of 256 threads
