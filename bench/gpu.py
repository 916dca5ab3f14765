"""The adapter tax on a CUDA GPU: the frozen layer beside fastpeft, PEFT and ``torch.compile`` of the formula.

    python bench/gpu.py --seconds 240 --markdown gpu.md

Forward passes and training steps are captured in CUDA graphs and replayed, frozen and adapted in turn; a tax is the
ratio of the two medians. What cannot be captured is timed by events around its calls, and marked with a star. fastpeft
is timed as it chooses by itself, which is CUDA C++ where that is compiled, with its Triton kernels forced, and as it is
composed of PyTorch operations. Outputs are held against the formula in float64 on a few rows before anything is timed.
Cells come in order of interest, and those that the time does not reach are named.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floors
import tables
import torch
from layers import METHODS, build_fastpeft, build_peft, error_limit, output_error
from tax import find_peft, parse_count
from torch import Tensor, nn

import fastpeft

ROUNDS, ROUND_SECONDS = 15, 2e-3  # a round repeats short calls for so long: an event takes microseconds
TOKENS = (1, 16, 2048)
SIZES = ((4096, 4096), (4096, 11008), (384, 384))
TRITON = "fastpeft, Triton"
CHOSEN = ("lora-r16", "mos", "boft-b8m4", "fourierft")


@dataclass
class Row:
    method: str
    contender: str
    in_features: int
    out_features: int
    tokens: int
    error: float
    limit: float
    forward: str = "–"
    training: str = "–"


@dataclass
class Timed:
    call: Callable[[], object]
    captured: bool


def capture(call: Callable[[], object], device: torch.device) -> Timed:
    """The call as a CUDA graph, or as it is where it cannot be captured or runs on a CPU."""
    for _ in range(3):
        call()
    if device.type == "cpu":
        return Timed(call, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return Timed(call, False)
    return Timed(graph.replay, True)


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def tax_of(base: Timed, adapted: Timed, device: torch.device) -> str:
    pair = [base.call, adapted.call]
    repeats = [max(1, int(ROUND_SECONDS / seconds(call, 1, device))) for call in pair]
    rounds = [[seconds(call, n, device) for call, n in zip(pair, repeats, strict=True)] for _ in range(ROUNDS)]
    frozen, own = (statistics.median(times) for times in zip(*rounds, strict=True))
    star = "" if base.captured and adapted.captured else "*"
    return f"{own / frozen:.2f}{star}"


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    layer.eval()
    return call


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    layer.train()
    leaf = x.detach().requires_grad_()
    wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(leaf), wanted, grad)


def contenders(name: str, base: nn.Linear, peft: Any) -> Iterator[tuple[str, nn.Module, Any, str | None]]:
    """Name, layer, formula, and the backend that is forced."""
    layer, formula = build_fastpeft(name, base)
    yield "fastpeft", layer, formula, None
    yield TRITON, layer, formula, "triton"
    yield "fastpeft, composed", layer, formula, "torch"
    if peft is not None and hasattr(peft, METHODS[name].config_class):
        theirs, their_formula = build_peft(name, base, peft)
        yield "PEFT", theirs, their_formula, None
    compiled: Any = torch.compile(layer)
    yield "formula, compiled", compiled, formula, "reference"


def measure(
    name: str, size: tuple[int, int], tokens: Sequence[int], dtype: torch.dtype, device: torch.device, peft: Any
) -> Iterator[Row]:
    torch.manual_seed(0)
    base = nn.Linear(*size, dtype=dtype, device=device).requires_grad_(False)
    x, grad = (torch.randn(max(tokens), d).to(device, dtype) for d in size)
    for title, layer, formula, backend in contenders(name, base, peft):
        for t in tokens:
            rows = sorted({0, t // 2, t - 1})
            row = Row(METHODS[name].title, title, *size, t, float("nan"), error_limit(dtype, max(size)))
            try:
                with fastpeft.use_backend(backend):
                    exact = formula(x[rows], grad[rows])
                    row.error = output_error(layer, x[:t], grad[:t], rows, exact)
                    if row.error <= row.limit:
                        with torch.no_grad():
                            own = capture(forward(layer, x[:t]), device)
                            row.forward = tax_of(capture(forward(base, x[:t]), device), own, device)
                        own = capture(training_step(layer, x[:t], grad[:t]), device)
                        row.training = tax_of(capture(training_step(base, x[:t], grad[:t]), device), own, device)
            except RuntimeError as error:  # a backend that lacks the operator says so; the row keeps its reason
                row.forward = row.training = str(error).splitlines()[0][:60]
                row.error = 0.0
            yield row
        gc.collect()


def setting(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, {datetime.date.today()}"
    if device.type == "cpu":
        return f"- cpu, {versions}"
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        clocks = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        clocks = "clocks unknown"
    return f"- {torch.cuda.get_device_name(device)}, {clocks}, {versions}"


COLUMNS = ("layer", "T", "method", "contender", "forward", "floor", "target", "training", "floor", "target")


def line_of(row: Row) -> str:
    size = row.in_features, row.out_features
    name = next(name for name, method in METHODS.items() if method.title == row.method)
    cells = [f"{size[0]}→{size[1]}", str(row.tokens), row.method, row.contender]
    for training, tax in ((False, row.forward), (True, row.training)):
        cells.append(tax if row.error <= row.limit else "wrong")
        own = row.contender == TRITON  # whose kernels are counted
        cells.append(f"{floors.floor_of(name, size, row.tokens, training):.2f}" if own else "–")
        cells.append(floors.target_of(name, row.tokens, training))
    return tables.line(cells)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=parse_count, default=240, help="no new cell is begun after so long")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(CHOSEN))
    parser.add_argument("--tokens", nargs="+", type=parse_count, default=list(TOKENS))
    parser.add_argument("--widths", nargs="+", type=parse_count, help="square layers of these sizes instead")
    parser.add_argument("--device", default="cuda", help="cpu runs everything but the graphs")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--markdown", metavar="FILE")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU that torch can use", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    peft = None if arguments.no_peft else find_peft()
    sizes = [(d, d) for d in arguments.widths] if arguments.widths else list(SIZES)
    start, rows, left_out = time.perf_counter(), [], []
    lines = tables.heading(*COLUMNS)
    print(*lines, sep="\n", flush=True)
    for size in sizes:
        for name in arguments.methods:
            if time.perf_counter() - start > arguments.seconds:
                left_out.append(f"{name} at {size[0]}→{size[1]}")
                continue
            for row in measure(name, size, arguments.tokens, dtype, device, peft):
                rows.append(row)
                lines.append(line_of(row))
                print(lines[-1], flush=True)
    notes = ["", setting(device), "- floor: of the Triton kernels in bfloat16 on an H200, by bench/floors.py"]
    notes += [f"- not reached: {', '.join(left_out)}"] * bool(left_out)
    print(*notes, sep="\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text("\n".join([*lines, *notes]) + "\n", encoding="utf-8")
    return 0 if all(row.error <= row.limit for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
