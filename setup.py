"""Builds the extension fastpeft._C with ninja. Everything else about the package is in pyproject.toml.

Why not torch.utils.cpp_extension: the loops in csrc/cpu/*_loops.cpp are compiled once per instruction set, each time
with other flags, which it has no way to say. The ninja file written here is the whole build.

FASTPEFT_CUDA=0|1|auto decides on csrc/cuda: auto compiles it where nvcc and a CUDA build of torch are present, 1 fails
where they are not. A GPU is never asked for. FASTPEFT_CUDA_ARCHS is a list such as "80;90a;100".
"""

import os
import platform
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# Operators use PyTorch's stable ABI of this version, so one binary serves every torch from here on.
TORCH_TARGET_VERSION = "0x020a000000000000"
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    ISA_FLAGS["avx512_bf16"] = [*ISA_FLAGS["avx512"], "-mavx512bf16"]
DEFAULT_CUDA_ARCHS = "80;90a;100"


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where csrc/cuda is left out. See FASTPEFT_CUDA above."""
    wanted = os.environ.get("FASTPEFT_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"FASTPEFT_CUDA must be 0, 1 or auto, got {wanted!r}")
    nvcc = Path(CUDA_HOME, "bin", "nvcc") if CUDA_HOME else None  # torch looks on the PATH as well
    missing = [
        what
        for what, there in (("nvcc", nvcc and nvcc.exists()), ("a CUDA build of torch", torch.version.cuda))
        if not there
    ]
    if wanted == "1" and missing:
        raise RuntimeError(f"FASTPEFT_CUDA=1, but this machine lacks {' and '.join(missing)}")
    return None if wanted == "0" or missing else str(nvcc)


class NinjaBuild(build_ext):
    """Writes build.ninja for the extension and runs it."""

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self.ninja_file(build_dir, target))
        jobs = os.environ.get("MAX_JOBS")
        command = [Path(ninja.BIN_DIR) / "ninja", "-C", build_dir, *(["-j", jobs] if jobs else [])]
        subprocess.run([str(part) for part in command], check=True)

    def ninja_file(self, build_dir: Path, target: Path) -> str:
        nvcc = find_nvcc()
        includes = [
            CSRC,
            pybind11.get_include(),
            sysconfig.get_path("include"),
            *include_paths("cuda" if nvcc else "cpu"),
        ]
        cuda_archs = os.environ.get("FASTPEFT_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
        defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        if nvcc:
            defines += ["-DUSE_CUDA", f"'-DFASTPEFT_CUDA=\"{cuda_archs}\"'"]
        flags = " ".join(["-std=c++20", "-O3", *defines, *(f"-isystem {path}" for path in includes[1:]), f"-I{CSRC}"])
        gencode = (
            " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs.split(";"))
            + f" -gencode=arch=compute_{cuda_archs.split(';')[-1]},code=compute_{cuda_archs.split(';')[-1]}"
        )
        libraries = [*(f"-L{path}" for path in library_paths("cuda" if nvcc else "cpu")), "-ltorch", "-ltorch_cpu"]
        if nvcc:
            libraries += ["-ltorch_cuda", "-lcudart"]
        lines = [
            f"cxx = {os.environ.get('CXX', 'g++')}",
            f"nvcc = {nvcc}",
            "rule cxx",
            f"  command = $cxx {flags} -fPIC -fvisibility=hidden -Wall -Wno-psabi -Wno-unused-function $isa"
            " -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = $nvcc {flags} --threads 0 -Xcompiler -fPIC,-fvisibility=hidden {gencode} -MD -MF $out.d -c"
            " $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {' '.join(libraries)}",
        ]
        objects = []

        def compile_with(rule: str, source: Path, suffix: str = "", isa: str = "") -> None:
            output = build_dir / f"{source.relative_to(CSRC)}{suffix}.o"
            lines.extend([f"build {output}: {rule} {source}", f"  isa = {isa}"])
            objects.append(str(output))

        for source in [CSRC / "module.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]:
            if source.stem.endswith("_loops"):
                for isa, isa_flags in ISA_FLAGS.items():
                    compile_with("cxx", source, f".{isa}", " ".join([f"-DFASTPEFT_ISA={isa}", *isa_flags]))
            else:
                compile_with("cxx", source)
        for source in sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []:
            compile_with("nvcc", source)
        lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
        return "\n".join(lines)


if sys.platform == "win32":
    raise SystemExit("fastpeft builds on Linux and macOS; Windows is not supported")

setup(
    packages=[*find_packages(include=["fastpeft*"]), "fastpeft.kernels"],
    package_dir={"fastpeft.kernels": "kernels"},
    ext_modules=[Extension("fastpeft._C", sources=[])],
    cmdclass={"build_ext": NinjaBuild},
)
