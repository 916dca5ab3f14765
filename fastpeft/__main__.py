"""``python -m fastpeft doctor``: what is compiled, what is chosen, what is missing, and why."""

import argparse
import importlib.metadata
import sys

import torch

import fastpeft
from fastpeft import backend


def doctor() -> None:
    print(f"fastpeft {fastpeft.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}")
    extension = backend.extension
    print(f"extension fastpeft._C: {backend.extension_status}")
    if extension is not None:
        print(f"  compiler {extension.compiler}, stable ABI of torch {extension.torch_target_version}")
        print(f"  instruction sets compiled: {', '.join(extension.compiled_isas)}")
        print(f"  instruction set in use: {extension.isa} (this processor runs {', '.join(extension.supported_isas)})")
        missing_cuda = "not compiled: needs nvcc and a CUDA build of torch when fastpeft is built"
        print(f"  CUDA C++ kernels: {extension.cuda or missing_cuda}")
    print(f"triton: {importlib.metadata.version('triton') if backend.triton_available() else 'not installed'}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs: {', '.join(gpus) or 'none'}; CPU threads: {torch.get_num_threads()}")
    for name, row in fastpeft.backends().items():
        print(f"{name}: {row['chosen']} is chosen")
        for lane, status in row.items():
            if lane != "chosen":
                print(f"  {lane}: {status}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastpeft", description=__doc__)
    parser.add_argument("command", choices=["doctor"], help="print what this installation can run")
    parser.parse_args()
    doctor()


if __name__ == "__main__":
    main()
