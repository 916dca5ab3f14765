"""The floor of the adapter tax on a GPU: what our kernels must move and compute, counted without one.

    python bench/floors.py --sizes 4096x4096 --tokens 1 16 4096

The launchers run on tensors without storage. Every kernel and every library call in them is noted, with the bytes of
its tensors, each once, and the operations of its products. A step takes as long as the slower of the two at an H200's
peaks, and a call as long as its steps: that, over the same for the frozen product, is the floor of the tax. What is
read again, waits and launches come on top of it. That is the Triton lane; what CUDA C++ kernels need is counted from
their code, in floors_cuda.py.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import floors_cuda
import tables
import torch
from layers import METHODS
from tax import parse_count, parse_size
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

PEAK_BYTES, PEAK_OPERATIONS = 4.3e12, 790e12  # per second, of an H200 in bfloat16
PROCESSORS, SHARED_MEMORY = 132, 227 * 1024
MODULES = ("low_rank", "lora", "mos", "boft", "boft_cayley", "boft_scale", "boft_wide", "fourierft", "dft")
# T <= 16, T >= 2048, training
TARGETS = {
    "lora-r16": (1.05, 1.04, 1.10),
    "mos": (1.05, 1.04, 1.10),
    "boft-b8m4": (1.10, 1.15, 1.30),
    "fourierft": (1.15, 1.25, 1.35),
}


class Ledger(TorchDispatchMode):
    """Adds up what library calls and kernels move and multiply, in seconds at the chip's peaks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.operations, self.seconds, self.launches = 0, 0, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not (func.is_view or func.__name__.startswith(("empty", "new_empty", "_unsafe_view", "detach"))):
            packet = func.overloadpacket
            count = flop_registry.get(torch.ops.aten.addmm if packet == torch.ops.aten.addmm_ else packet)
            self.note(tensors_in([args, kwargs, result]), count(*args, **kwargs, out_val=result) if count else 0)
        return result

    def note(self, tensors: Sequence[Tensor], operations: int) -> None:
        moved = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        self.bytes += moved
        self.operations += operations
        self.seconds += max(moved / PEAK_BYTES, operations / PEAK_OPERATIONS)
        self.launches += 1


def tensors_in(values: Any) -> list[Tensor]:
    """Those with elements. What is changed in place is in arguments and results, so it counts twice, as it should."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


class Noted:
    """Stands for a kernel, and notes what it is launched with instead."""

    def __init__(self, kernel: Any, ledger: Ledger) -> None:
        self.kernel, self.ledger = kernel, ledger

    def __getitem__(self, grid: Any) -> Callable:
        def launch(*args: Any, **config: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | config
            tensors = tensors_in(given)
            tensors += [given[name] for name in CHANGED.get(self.kernel.__name__, ()) if given[name] is not None]
            count = OPERATIONS.get(self.kernel.__name__)
            self.ledger.note(tensors, count(given) if count else 0)

        return launch


def parts(x: Tensor, other: Tensor) -> int:
    """Products on tensor cores that a product of a 16-bit x with another operand becomes (kernels/dots.py)."""
    if other.dtype == x.dtype:
        return 1
    return 3 if x.dtype == torch.bfloat16 else 5


def ranks(a: dict[str, Any]) -> int:
    """As many as are multiplied."""
    return math.ceil(a["rank"] / a["BLOCK_R"]) * a["BLOCK_R"]


def of_lora(a: dict[str, Any]) -> int:
    again = math.ceil(a["out_features"] / a["BLOCK_O"]) * a["BLOCK_R"] * parts(a["x_ptr"], a["factor_A_ptr"])
    products = a["in_features"] * (a["out_features"] + again) + a["out_features"] * a["BLOCK_R"] * 3
    return 2 * a["tokens"] * products


def of_dft(a: dict[str, Any], split: bool) -> int:
    """Four real products for a complex one, for each pair of tokens there and back; in two parts three for one."""
    shapes = ((a["IN_ROWS"], a["IN_COLS"]), (a["OUT_ROWS"], a["OUT_COLS"]))
    products = sum(rows * cols * (rows + cols) for rows, cols in shapes)
    return math.ceil(a["tokens"] / 2) * 2 * 4 * products * (3 if split else 1)


# Kernels whose products count, by what they are launched with. Gathers, scales and sums are bytes alone.
OPERATIONS: dict[str, Callable[[dict[str, Any]], int]] = {
    "lora_fwd_kernel": of_lora,
    "low_rank_down_kernel": lambda a: 2 * a["tokens"] * a["features"] * ranks(a) * parts(a["x_ptr"], a["factor_ptr"]),
    "low_rank_up_kernel": lambda a: 2 * a["tokens"] * a["features"] * ranks(a) * 3,
    "low_rank_outer_kernel": lambda a: (
        2 * a["tokens"] * a["features"] * ranks(a) * parts(a["right_ptr"], a["left_ptr"])
    ),
    "butterfly_fwd_kernel": lambda a: 2 * a["tokens"] * a["features"] * a["WIDTH"] * 2,
    "butterfly_bwd_kernel": lambda a: (
        2 * a["tokens"] * a["features"] * a["WIDTH"] * (2 * a["NEED_X"] + a["NEED_BLOCKS"])
    ),
    "wide_fwd_kernel": lambda a: 2 * a["tokens"] * a["features"] * a["BLOCK"] * 2,
    "wide_bwd_kernel": lambda a: 2 * a["tokens"] * a["features"] * a["BLOCK"],
    "dft_fwd_kernel": lambda a: of_dft(a, a["SPLIT"]),
    "dft_bwd_kernel": lambda a: of_dft(a, True),
}
# Arguments that a kernel reads and writes.
CHANGED: dict[str, tuple[str, ...]] = {"mos_bwd_pool_kernel": ("dpool_ptr",), "dft_fwd_kernel": ("y_ptr",)}


@contextmanager
def counting() -> Iterator[Ledger]:
    """Inside, launchers launch nothing, believe in an H200, and what they would do is counted."""
    ledger, device = Ledger(), importlib.import_module("fastpeft.kernels.device")
    replaced = [mock.patch.object(device, "processors_of", lambda _: PROCESSORS)]
    replaced += [mock.patch.object(device, "shared_memory_of", lambda _: SHARED_MEMORY)]
    for name in MODULES:
        module = importlib.import_module(f"fastpeft.kernels.{name}")
        for member, kernel in inspect.getmembers(module, lambda value: hasattr(value, "arg_names")):
            if member.endswith("_kernel"):
                replaced.append(mock.patch.object(module, member, Noted(kernel, ledger)))
    for patch in replaced:
        patch.start()
    try:
        with ledger:
            yield ledger
    finally:
        for patch in replaced:
            patch.stop()


def hollow(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def frozen(size: tuple[int, int], tokens: int, training: bool) -> Ledger:
    x, weight, bias, grad = base_of(size, tokens)
    with counting() as ledger:
        F.linear(x, weight, bias)
        if training:
            grad @ weight
    return ledger


def adapted(name: str, size: tuple[int, int], tokens: int, training: bool) -> Ledger:
    """One call of the layer: forward, or forward and backward."""
    method = METHODS[name].config_class.removesuffix("Config").lower()
    for _ in range(2):  # the first call makes tables that stay
        with counting() as ledger:
            CALLS[method](METHODS[name].options, size, tokens, training)
    return ledger


def base_of(size: tuple[int, int], tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of y."""
    d_in, d_out = size
    shapes = (tokens, d_in), (d_out, d_in), (d_out,), (tokens, d_out)
    x, weight, bias, grad = (hollow(*shape, dtype=torch.bfloat16) for shape in shapes)
    return x, weight, bias, grad


def call_lora(options: Any, size: tuple[int, int], tokens: int, training: bool) -> None:
    from fastpeft.kernels.lora import lora_bwd, lora_fwd

    x, weight, bias, grad = base_of(size, tokens)
    lora_A, lora_B = hollow(options["r"], size[0]), hollow(size[1], options["r"])
    _, h = lora_fwd(x, weight, bias, lora_A, lora_B, 1.0)
    if training:
        lora_bwd(grad, x, weight, lora_A, lora_B, h, 1.0, True)


def call_mos(options: Any, size: tuple[int, int], tokens: int, training: bool) -> None:
    """Over pools of the shards that one layer reads: the others lie still."""
    from fastpeft.kernels.mos import mos_bwd_, mos_fwd

    x, weight, bias, grad = base_of(size, tokens)
    rank, shards = options["r"], options["shards_per_vector"]
    index = hollow(rank, shards, dtype=torch.int64)
    pool_A, pool_B = (hollow(rank * shards, d // shards) for d in size)
    pools = pool_A, index, pool_B, index
    _, h = mos_fwd(x, weight, bias, *pools, 1.0)
    if training:
        mos_bwd_(torch.empty_like(pool_A), torch.empty_like(pool_B), grad, x, weight, *pools, h, 1.0, True)


def call_boft(options: Any, size: tuple[int, int], tokens: int, training: bool) -> None:
    from fastpeft.kernels.boft import boft_bwd, boft_fwd
    from fastpeft.kernels.boft_cayley import cayley_bwd, cayley_fwd

    x, weight, bias, grad = base_of(size, tokens)
    block, factors = options["boft_block_size"], options["boft_n_butterfly_factor"]
    blocks, scale = hollow(factors, size[0] // block, block, block), hollow(size[1], 1)
    if training:  # otherwise the blocks are remembered
        cayley_fwd(blocks)
    _, y0 = boft_fwd(x, weight, bias, blocks, scale, training)
    if training:
        boft_bwd(grad, x, weight, bias, blocks, scale, y0, True, True)
        cayley_bwd(blocks, blocks)


def call_fourierft(options: Any, size: tuple[int, int], tokens: int, training: bool) -> None:
    from fastpeft.kernels.fourierft import fourier_bwd, fourier_fwd

    x, weight, bias, grad = base_of(size, tokens)
    n, (d_in, d_out) = options["n_frequency"], size
    spectrum, places = hollow(n), hollow(n, dtype=torch.int32)
    samples = hollow(2 * n, dtype=torch.int32)
    fourier_fwd(x, weight, bias, spectrum, hollow(d_out + 1, dtype=torch.int32), samples, samples, 1.0)
    if training:
        offsets = hollow(d_in + 1, dtype=torch.int32)
        fourier_bwd(grad, x, weight, spectrum, places, places, offsets, samples, samples, 1.0, True)


CALLS = {"lora": call_lora, "mos": call_mos, "boft": call_boft, "fourierft": call_fourierft}


def floor_of(name: str, size: tuple[int, int], tokens: int, training: bool) -> float:
    """The least tax."""
    return adapted(name, size, tokens, training).seconds / frozen(size, tokens, training).seconds


def cuda_floor_of(name: str, size: tuple[int, int], tokens: int, training: bool) -> float | None:
    """The least tax of the CUDA C++ kernels, where the method has them."""
    method = METHODS[name].config_class.removesuffix("Config").lower()
    seconds = floors_cuda.seconds_of(method, METHODS[name].options, size, tokens, training)
    return None if seconds is None else seconds / frozen(size, tokens, training).seconds


def target_of(name: str, tokens: int, training: bool) -> str:
    if name not in TARGETS or (not training and 16 < tokens < 2048):
        return "–"
    decode, prefill, trained = TARGETS[name]
    return f"{trained if training else decode if tokens <= 16 else prefill:.2f}"


def line_of(name: str, size: tuple[int, int], tokens: int) -> str:
    cells = [f"{size[0]}→{size[1]}", str(tokens), METHODS[name].title]
    for training in (False, True):
        base, ours = frozen(size, tokens, training), adapted(name, size, tokens, training)
        cells += [
            f"{1e6 * base.seconds:.1f}",
            f"{1e6 * ours.seconds:.1f}",
            f"{(ours.bytes - base.bytes) / 1e6:.2f}",
            f"{(ours.operations - base.operations) / 1e9:.2f}",
            str(ours.launches - base.launches),
            f"{ours.seconds / base.seconds:.2f}",
            tables.shown(cuda_floor_of(name, size, tokens, training), ".2f"),
            target_of(name, tokens, training),
        ]
    return tables.line(cells)


def heading() -> list[str]:
    names = ("frozen µs", "adapted µs", "+ MB", "+ Gop", "+ launches", "floor of the tax", "in CUDA C++", "target")
    return tables.heading("layer", "T", "method", *(f"{name}" for name in names), *(f"training: {n}" for n in names))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counted = [name for name in METHODS if name.partition("-")[0] in CALLS]
    parser.add_argument("--methods", nargs="+", choices=counted, default=list(TARGETS))
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(4096, 4096)], metavar="INxOUT")
    parser.add_argument("--tokens", nargs="+", type=parse_count, default=[1, 16, 4096])
    arguments = parser.parse_args(argv)
    print(*heading(), sep="\n")
    for size in arguments.sizes:
        for name in arguments.methods:
            for tokens in arguments.tokens:
                print(line_of(name, size, tokens), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
