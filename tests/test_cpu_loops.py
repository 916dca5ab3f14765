"""The CPU loops under sanitizers, without PyTorch.

tests/cpu_host calls every function of csrc/cpu/*_loops.cpp and csrc/cpu/fft_plan.cpp with awkward sizes, in buffers of
exactly the documented sizes, and compares with plain loops in float64. It runs with AddressSanitizer and
UndefinedBehaviorSanitizer for each instruction set that this processor has, and on several threads with
ThreadSanitizer.
"""

import ast
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fastpeft.backend import extension

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc" / "cpu"
CPU_HOST = ROOT / "tests" / "cpu_host"
CXX = shutil.which(os.environ.get("CXX", "g++"))
ISAS = list(extension.supported_isas) if extension else ["baseline"]

JOBS = min(2, int(os.environ.get("MAX_JOBS", "2")))

FLAGS = ["-std=c++20", "-g1", "-Wall", "-Wno-psabi", "-Wno-unused-function", f"-I{ROOT / 'csrc'}"]
# Elements that a std::vector has room for, but does not hold, are out of bounds too: that is how plans keep tables.
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-D_GLIBCXX_SANITIZE_VECTOR=1"]
THREAD = ["-fsanitize=thread"]

pytestmark = [pytest.mark.builds, pytest.mark.skipif(CXX is None, reason="no C++ compiler")]


def isa_flags() -> dict[str, list[str]]:
    """ISA_FLAGS as setup.py has it; importing that would build the extension."""
    names: dict[str, dict[str, list[str]]] = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("ISA_FLAGS"):
            exec(ast.unparse(node), names)
    return names["ISA_FLAGS"]


def call(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@dataclass(frozen=True)
class Unit:
    """One call of the compiler."""

    source: Path
    sanitizer: str  # "address" or "thread"
    isa: str = ""  # for the loops and for what names them

    def object(self, folder: Path) -> Path:
        return folder / f"{self.source.stem}.{self.sanitizer}{'.' * bool(self.isa)}{self.isa}.o"

    def compile(self, folder: Path) -> None:
        flags = [*FLAGS, *(ADDRESS if self.sanitizer == "address" else THREAD)]
        if self.isa:
            flags.append(f"-DFASTPEFT_ISA={self.isa}")
        if self.isa and self.source.parent == CPU:
            flags += isa_flags()[self.isa]
        # -Og halves the time that loops take to compile. ThreadSanitizer misses structs there, such as 16-bit floats.
        quick = self.source.stem.endswith("_loops") and self.sanitizer == "address"
        flags.append("-Og" if quick else "-O1")
        result = call(CXX, *flags, "-c", self.source, "-o", self.object(folder))
        assert result.returncode == 0, result.stderr


def units_of(program: str, sanitizer: str, isa: str) -> list[Unit]:
    checks = sorted(CPU_HOST.glob("check_*.cpp")) if program == "run_loops" else []
    shared = [CPU_HOST / f"{program}.cpp", CPU_HOST / "check.cpp", *checks, CPU / "fft_plan.cpp"]
    of_isa = [*sorted(CPU.glob("*_loops.cpp")), CPU_HOST / "loops.cpp"]
    return [Unit(path, sanitizer) for path in shared] + [Unit(path, sanitizer, isa) for path in of_isa]


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> dict[str, Path]:
    """run_loops of every instruction set, by its name, and run_threads."""
    folder = tmp_path_factory.mktemp("cpu_host")
    units = {isa: units_of("run_loops", "address", isa) for isa in ISAS}
    units["threads"] = units_of("run_threads", "thread", "baseline")
    once = dict.fromkeys(unit for program in units.values() for unit in program)
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda unit: unit.compile(folder), once))
    for name, parts in units.items():
        sanitizers = THREAD if name == "threads" else ADDRESS
        result = call(CXX, *sanitizers, *(unit.object(folder) for unit in parts), "-pthread", "-o", folder / name)
        assert result.returncode == 0, result.stderr
    return {name: folder / name for name in units}


@cache
def check_everything(program: Path) -> subprocess.CompletedProcess:
    return call(program)


@pytest.mark.parametrize("isa", ISAS)
def test_loops_match_float64_inside_their_buffers(programs, isa):
    result = check_everything(programs[isa])
    assert result.returncode == 0, result.stderr
    for table in ("butterfly", "butterfly_many", "scale", "cayley", "fourier", "fourier_many", "lora"):
        assert f"{isa} {table}" in result.stdout


def test_a_planted_fault_is_seen(programs):
    """Every buffer of every function one element short, and every input wrong in one element."""
    program = programs[ISAS[-1]]
    faults = [line.split()[1:] for line in check_everything(program).stdout.splitlines() if line.startswith("fault ")]
    assert len(faults) > 50

    def is_seen(named: list[str]) -> bool:
        result = call("env", "ASAN_OPTIONS=symbolize=0", program, *named)
        # The program itself does not touch the element that is missing.
        message = "ERROR: AddressSanitizer" if named[0] == "shorter" else "mistake: "
        return result.returncode != 0 and message in result.stderr

    with ThreadPoolExecutor(JOBS) as pool:
        seen = list(pool.map(is_seen, faults))
    assert [named for named, is_it in zip(faults, seen, strict=True) if not is_it] == []


def call_threads(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """ThreadSanitizer needs addresses where it expects them, which some kernels give on request only."""
    result = call(program, *arguments)
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        return call("setarch", "-R", program, *arguments)
    return result


def test_threads_do_not_meet(programs):
    result = call_threads(programs["threads"])
    assert result.returncode == 0, result.stderr


def test_tiles_that_overlap_are_seen(programs):
    result = call_threads(programs["threads"], "overlap")
    assert result.returncode != 0 and "ThreadSanitizer: data race" in result.stderr
