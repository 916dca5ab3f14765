"""Builds csrc/cuda for the tests: for a CPU with the stand-ins in tests/cuda_host, and for GPUs that are not here.

cuda_figures.json holds registers and static shared memory of every kernel as they were committed; a change has to be
looked at, and either mended or written down. They belong to one release of nvcc, and are compared under that alone.

    python tests/cuda_build.py --write boft boft_cayley     # compiles these csrc/cuda/*.cu and renews their figures
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parent.parent
CUDA_HOST = ROOT / "tests" / "cuda_host"
FIGURES = ROOT / "tests" / "cuda_figures.json"
CXX = shutil.which(os.environ.get("CXX", "g++"))
NVCC = shutil.which("nvcc")
ARCHS = ("80", "90a", "100")

SM_90_SHARED = 227 << 10  # bytes of shared memory a thread block can have
SM_80_SHARED = 163 << 10
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def has_gpu_kernel(name: str) -> bool:
    """Whether there is a GPU, and an extension with kernels for it."""
    import fastpeft  # noqa: F401

    return torch.cuda.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastpeft::{name}", "CUDA")


def replayed(call: Callable[[], Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """What the call gives when it is captured in a CUDA graph and the graph is run.

    Nothing can be captured where every tensor has an allocation to itself, which is for compute-sanitizer's sake.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return list(call())
    call()  # whatever is set up once is set up now
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    return [result.clone() for result in results]


def inputs_of(source: Path) -> list[Path]:
    """A source and all that it includes of the project's, each once."""
    found = [source]
    for file in found:
        for name in re.findall(r'^#include [<"](\S+)[>"]', file.read_text(), re.MULTILINE):
            paths = [path for path in (CUDA_HOST / name, ROOT / "csrc" / name) if path.exists()]
            found += [path for path in paths if path not in found]
    return found


def made_once(folder: Path, name: str, source: Path, command: Sequence[object], make: Callable[[Path], None]) -> Path:
    """The file that make(path) writes, which stays until the source, the compiler or the command has changed.

    Processes that test the same files at the same time wait for each other.
    """
    version = subprocess.run([str(command[0]), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + " ".join(map(str, command)).encode())
    for path in inputs_of(source):
        digest.update(path.read_bytes())
    made = folder / f"{name}-{digest.hexdigest()[:16]}"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for path in folder.glob(f"{name}-*"):
                if path.stat().st_mtime < time.time() - 24 * 3600:  # until then another process may be using it
                    path.unlink()
            unfinished = folder / f"{name}.new"
            make(unfinished)
            unfinished.rename(made)
    return made


def run_command(command: Sequence[object]) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def host_builder(folder: Path) -> Callable[..., Path]:
    """build(name) compiles tests/cuda_host/<name>.cpp where that is needed and returns the program.

    build(name, watched=True) is for programs that watch their own memory accesses, see tests/cuda_host/banks.h.
    """
    # Shared memory is thread_local, and nothing is to be called before it is used.
    flags = "-std=c++20 -Og -g1 -Wall -Werror -Wno-unknown-pragmas -fno-extern-tls-init".split()
    flags += [f"-I{CUDA_HOST}", f"-I{ROOT / 'csrc'}"]

    @cache
    def build(name: str, watched: bool = False) -> Path:
        sanitizers = "-fsanitize=address,undefined -fno-sanitize-recover=all".split()
        source, compiling = CUDA_HOST / f"{name}.cpp", ["-fsanitize=thread"] if watched else sanitizers
        command = [CXX, *flags, *compiling, "-c", source]

        def make(path: Path) -> None:
            with tempfile.TemporaryDirectory() as objects:
                run_command([*command, "-o", Path(objects, "object.o")])
                run_command([CXX, *([] if watched else sanitizers), Path(objects, "object.o"), "-o", path])

        return made_once(folder, name, source, command, make)

    return build


def folder_of(config: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what is built stays from one run to the next, unless pytest is to keep nothing."""
    kept = getattr(config, "cache", None)
    return tmp_path_factory.mktemp("cuda") if kept is None else kept.mkdir("cuda")


def fixtures() -> tuple[Callable, Callable, Callable]:
    """What every file of these tests has: build, see host_builder; compile_device; and tensors on the CPU whatever
    FASTPEFT_TEST_DEVICE says, because files are written from there.
    """

    @pytest.fixture(scope="module")
    def build(request, tmp_path_factory):
        return host_builder(folder_of(request.config, tmp_path_factory))

    @pytest.fixture(scope="module")
    def compiled(request, tmp_path_factory):
        return partial(compile_device, folder=folder_of(request.config, tmp_path_factory))

    @pytest.fixture(autouse=True)
    def on_the_cpu():
        with torch.device("cpu"):
            yield

    return build, compiled, on_the_cpu


def rare(case: object, first: int) -> list[str]:
    """For the name of a test: the fields of a dataclass, from the first one on, that are not as usual."""
    values = [(field, getattr(case, field.name)) for field in dataclasses.fields(case)[first:]]
    return [f"{field.name}{value}" for field, value in values if value != field.default]


def write_raw(path: Path, tensor: torch.Tensor) -> None:
    path.write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")


def read_raw(path: Path, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    numel = torch.Size(shape).numel()
    return torch.frombuffer(bytearray(path.read_bytes() or b"\0\0\0\0"), dtype=dtype)[:numel].reshape(*shape)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel on one GPU."""

    name: str  # mangled
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int  # static, in bytes


def compile_device(stem: str, folder: Path) -> list[Kernel]:
    """Compiles csrc/cuda/<stem>.cu for all of ARCHS where that is needed."""
    source = ROOT / "csrc" / "cuda" / f"{stem}.cu"
    flags = "-std=c++20 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020a000000000000 -Xptxas -v --threads 0 -c".split()
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags += [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in include_paths("cpu"))]
    command = [NVCC, *flags, source]

    def make(path: Path) -> None:
        with tempfile.TemporaryDirectory() as objects:
            path.write_text(run_command([*command, "-o", Path(objects, "object.o")]))

    said = made_once(folder, stem, source, [*command, torch.__version__], make).read_text()
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?",
        said,
        re.DOTALL,
    )
    return [Kernel(name, arch, *(int(number or 0) for number in numbers)) for name, arch, *numbers in kernels]


def nvcc_release() -> str:
    return re.search(r"\bV(\d\S*)", subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout)[1]


def figures_of(kernels: Sequence[Kernel]) -> dict[str, str]:
    return {
        f"{kernel.name} sm_{kernel.arch}": f"{kernel.registers} registers, {kernel.shared} bytes"
        for kernel in sorted(kernels, key=lambda kernel: (kernel.name, ARCHS.index(kernel.arch)))
    }


def check_spills(kernels: Sequence[Kernel]) -> None:
    for kernel in kernels:
        spills = (kernel.stack, kernel.spill_stores, kernel.spill_loads)
        assert spills == (0, 0, 0), f"{kernel.name} spills on sm_{kernel.arch}"


def check_figures(stem: str, kernels: Sequence[Kernel]) -> None:
    """No kernel spills, and all are as they were committed, where nvcc is the same."""
    check_spills(kernels)
    known = json.loads(FIGURES.read_text())
    if known["nvcc"] == nvcc_release():
        assert figures_of(kernels) == known[stem], "see cuda_figures.json"


def write_figures(stems: Sequence[str]) -> None:
    figures = {}
    for stem in stems:
        with tempfile.TemporaryDirectory() as folder:
            kernels = compile_device(stem, Path(folder))
        check_spills(kernels)
        figures[stem] = figures_of(kernels)
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}  # now: compiling took its time
    if known.get("nvcc") != nvcc_release():
        known = {"nvcc": nvcc_release()}
    FIGURES.write_text(json.dumps(known | figures, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        sys.exit(__doc__)
    write_figures(sys.argv[2:])
