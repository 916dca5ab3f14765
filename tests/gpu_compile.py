"""Compiles what Triton launchers launch, for chips that are not here, and keeps the figures.

A test module of kernels says what to compile:

    KERNELS = {"boft": ["butterfly_fwd_kernel"]}     # module of fastpeft.kernels: names of its kernels
    CASES = [(90, 512, 4096), …]                     # the capability of a chip first, then what launch wants
    def launch(*case): …                             # calls launchers with `meta` tensors; without the capability

and `compiled_cases(__file__, …)` gives, for every case, one record for each launch in it. Triton either interprets or
compiles in one process, so this file runs as a program of its own:

    python tests/gpu_compile.py test_kernels_boft < cases.json      # prints [case, [record, …]] line by line
    python tests/gpu_compile.py --write [test_kernels_boft …]       # renews tests/kernel_figures.json, or parts of it

kernel_figures.json holds a line for every case, its kernels with the registers of a thread and the bytes of shared
memory as they were committed; a change has to be looked at, and either mended or written down. They belong to one
release of Triton, and are compared under that alone.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB}  # that one program may use
PROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}
FIGURES = Path(__file__).with_name("kernel_figures.json")
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
TENSOR_CORES = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")


def meta(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without storage: launchers look at its shape, strides and dtype alone."""
    return torch.empty(size, dtype=dtype, device="meta")


class Notebook:
    """Stands for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any, notes: list) -> None:
        self.kernel, self.notes = kernel, notes

    def __getitem__(self, grid: Any) -> Callable:
        return lambda *args, **config: self.notes.append((self.kernel, args, config))


@contextmanager
def noted_launches(kernels: dict[str, list[str]], capability: int):
    """Inside, launchers launch nothing and believe in a chip of that capability."""
    notes: list[tuple[Any, tuple, dict]] = []
    device = importlib.import_module("fastpeft.kernels.device")
    replaced = [
        (device, "shared_memory_of", lambda _: SHARED_MEMORY[capability]),
        (device, "processors_of", lambda _: PROCESSORS[capability]),
    ]
    for name, members in kernels.items():
        module = importlib.import_module(f"fastpeft.kernels.{name}")
        replaced += [(module, member, Notebook(getattr(module, member), notes)) for member in members]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield notes
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def compile_launch(kernel: Any, args: tuple, config: dict[str, Any], capability: int) -> dict[str, Any]:
    """Facts about the machine code of one launch, specialised as Triton would at that launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: config.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in config}
    arguments = dict(zip(kernel.arg_names, args, strict=False)) | config
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        fixed = not parameter.do_not_specialize
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or (fixed and not isinstance(value, (float, bool)) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        elif isinstance(value, float):
            signature[name] = "fp32"
            continue
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
        if signature[name][0] == "*" or (fixed and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    return {
        "kernel": kernel.__name__,
        "config": config | options,
        "shared_memory": compiled.metadata.shared,
        "registers": registers,
        "stack": stack,  # bytes: what is spilled lies there
        "tensor_cores": [name for name in TENSOR_CORES if name in compiled.asm["ptx"]],
        "addresses": sorted(set(re.findall(r"tt\.addptr .*xi(32|64)>", compiled.asm["ttir"]))),
    }


def compile_case(module: Any, case: Sequence[Any]) -> list[dict[str, Any]]:
    with noted_launches(module.KERNELS, case[0]) as notes:
        module.launch(*case[1:])
    return [compile_launch(*note, case[0]) for note in notes]


def main(name: str) -> None:
    module = importlib.import_module(name)
    for case in json.load(sys.stdin):
        try:
            result: Any = compile_case(module, case)
        except Exception as error:  # reported by the test of that case
            result = {"error": repr(error)}
        print(json.dumps([case, result]), flush=True)


def compiled_cases(file: str, cases: Sequence[tuple], cache: Path) -> dict[tuple, Any]:
    """case: its records, or {"error": …}. Two processes share the list."""

    def run(part: Sequence[tuple]) -> subprocess.CompletedProcess:
        environment = {
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(cache),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]),
        }
        return subprocess.run(
            [sys.executable, __file__, Path(file).stem],
            input=json.dumps(part), env=os.environ | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(run, (cases[::2], cases[1::2])))
    lines = [line for process in processes for line in process.stdout.splitlines()]
    facts = {tuple(case): result for case, result in map(json.loads, lines)}
    missing = {"error": "".join(process.stderr for process in processes)}
    return {case: facts.get(case, missing) for case in cases}


# ---------------------------------------------------------------------- what holds for every kernel


def key_of(case: Sequence[Any]) -> str:
    return "-".join(map(str, case))


def check_records(file: str, case: Sequence[Any], records: Any) -> None:
    """No spills, no offset that can overflow, shared memory within the chip's, and the figures that are on record."""
    import triton

    assert "error" not in records, records["error"]
    assert records
    for record in records:
        assert record["stack"] == 0, f"{record['kernel']} spills registers"
        assert record["registers"] <= 255
        assert record["shared_memory"] <= SHARED_MEMORY[case[0]], record["kernel"]
        assert record["addresses"] in (["64"], []), f"{record['kernel']}: an offset can overflow"
    known = json.loads(FIGURES.read_text())
    if known["triton"] == triton.__version__:
        assert figures(records) == known[Path(file).stem][key_of(case)], "see kernel_figures.json"


def figures(records: Sequence[dict[str, Any]]) -> str:
    return ", ".join(
        f"{record['kernel'].removesuffix('_kernel')} {record['registers']} {record['shared_memory']}"
        for record in records
    )


def write(names: Sequence[str]) -> None:
    import triton

    table = json.loads(FIGURES.read_text()) | {"triton": triton.__version__}
    sys.path.insert(0, str(Path(__file__).parent))
    for name in names or sorted(path.stem for path in Path(__file__).parent.glob("test_kernels_*.py")):
        module = importlib.import_module(name)
        with tempfile.TemporaryDirectory() as cache:
            cases = compiled_cases(name, module.CASES, Path(cache))
        for case, records in cases.items():
            assert "error" not in records, (case, records["error"])
        table[name] = {key_of(case): figures(records) for case, records in cases.items()}
        FIGURES.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        os.environ["TRITON_INTERPRET"] = "1"
        write(sys.argv[2:])
    else:
        main(sys.argv[1])
