"""What `make gpu` needs and this machine lacks: all of it, before anything runs. Prints where compute-sanitizer is."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def lacking_packages() -> list[str]:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:requires|dependencies) = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    lacking = {}
    for wanted in ("pip", "pytest>=8", *re.findall(r'"(.+?)"', " ".join(lists))):
        name, least = re.match(r"([\w-]+)(?:>=([\d.]+))?", wanted).groups()
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking[name] = wanted.partition(";")[0]
            continue
        if least and numbers(found) < numbers(least):
            lacking[name] = f"{name}>={least}, not {found}"
    return list(lacking.values())


def lacking_tools() -> list[str]:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    lacking = []
    if not torch.version.cuda:
        lacking.append(f"a CUDA build of torch, not {torch.__version__}")
    elif not torch.cuda.is_available():
        lacking.append("a CUDA GPU that torch can use")
    if not shutil.which("nvcc") and not (CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists()):
        lacking.append("nvcc, on the PATH or below CUDA_HOME")
    return lacking


def sanitizer() -> str:
    """Its path, or nothing: a machine without it can do all else."""
    from torch.utils.cpp_extension import CUDA_HOME

    name = "compute-sanitizer"
    places = [Path(CUDA_HOME, folder, name) for folder in ("bin", name)] if CUDA_HOME else []
    return shutil.which(name) or next((str(path) for path in places if path.exists()), "")


def main() -> int:
    lacking = lacking_packages()
    if not any(wanted.startswith("torch") for wanted in lacking):
        lacking += lacking_tools()
    if lacking:
        print("make gpu: this machine lacks", *lacking, sep="\n  ", file=sys.stderr)
        return 1
    print(sanitizer())
    return 0


if __name__ == "__main__":
    sys.exit(main())
