"""The adapter tax on a CUDA GPU: the frozen layer beside fastpeft, PEFT and ``torch.compile`` of the formula.

    python bench/gpu.py --seconds 180 --markdown gpu.md

Forward passes and training steps are captured in CUDA graphs and replayed, frozen and adapted in turn; a tax is the
ratio of the two medians. What cannot be captured is timed by events around its calls, and marked with a star. Outputs
are held against the formula in float64 on a few rows before anything is timed. Cells come in order of interest, and
those that the time does not reach are named.

fastpeft is timed as it chooses by itself, and in each of its lanes: CUDA C++ where the method has it, Triton, and as it
is composed of PyTorch operations. Below the table stands which lane it chose where another one is faster. That choice
is `order` of the operators in fastpeft/ops/, and `_triton_pays` in boft.py and fourierft.py there.
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import floors
import tables
import torch
from layers import METHODS, build_fastpeft, build_peft, error_limit, output_error
from tax import find_peft, parse_count
from torch import Tensor, nn

import fastpeft
from fastpeft.backend import Operator

ROUNDS, ROUND_SECONDS = 15, 2e-3  # a round repeats short calls for so long: an event takes microseconds
TOKENS = (1, 16, 256, 2048)
SIZES = ((4096, 4096), (4096, 11008), (384, 384))
COMPILED_SIZES = SIZES[:1]  # where the formula is compiled: that takes longer than all other contenders together
LANES = {"native": "CUDA C++", "triton": "Triton", "torch": "composed"}
MARGIN = 1.03  # taxes that differ by less are the same
CHOSEN = ("lora-r16", "mos", "boft-b8m4", "fourierft")


@dataclass
class Tax:
    """Of one contender's forward passes or training steps."""

    ratio: float
    captured: bool
    lanes: str  # that ran

    def __str__(self) -> str:
        return f"{self.ratio:.2f}{'' if self.captured else '*'}"


@dataclass
class Row:
    method: str  # a key of METHODS
    contender: str
    backend: str | None  # that was forced
    in_features: int
    out_features: int
    tokens: int
    error: float
    limit: float
    taxes: dict[str, Tax] = field(default_factory=dict)  # of tables.PHASES
    reason: str = "–"  # why there are none

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # not so for a NaN

    @property
    def cell(self) -> tuple:
        return self.method, self.in_features, self.out_features, self.tokens


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


@contextmanager
def lanes_of() -> Iterator[set[str]]:
    """Lanes of the operators that are called inside; composed where there are none."""
    seen: set[str] = set()
    call = Operator.call

    def noted(operator: Operator, backend: str, *args: object) -> object:
        seen.add(backend)
        return call(operator, backend, *args)

    with mock.patch.object(Operator, "call", noted):
        yield seen


def tax_of(base: Timed, call: Callable[[], object], device: torch.device) -> Tax:
    with lanes_of() as lanes:
        call()
    adapted = capture(call, device)
    pair = [base.call, adapted.call]
    repeats = [max(1, int(ROUND_SECONDS / seconds(call, 1, device))) for call in pair]
    rounds = [[seconds(call, n, device) for call, n in zip(pair, repeats, strict=True)] for _ in range(ROUNDS)]
    frozen, own = (statistics.median(times) for times in zip(*rounds, strict=True))
    names = " and ".join(LANES[lane] for lane in LANES if lane in (lanes or {"torch"}))
    return Tax(own / frozen, base.captured and adapted.captured, names)


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


def contenders(
    name: str, base: nn.Linear, peft: Any, compiled: bool
) -> Iterator[tuple[str, nn.Module, Any, str | None]]:
    """Name, layer, formula, and the backend that is forced."""
    layer, formula = build_fastpeft(name, base)
    yield "fastpeft", layer, formula, None
    for backend, lane in LANES.items():
        yield f"fastpeft, {lane}", layer, formula, backend
    if peft is not None and hasattr(peft, METHODS[name].config_class):
        theirs, their_formula = build_peft(name, base, peft)
        yield "PEFT", theirs, their_formula, None
    if compiled:
        by_torch: Any = torch.compile(layer)
        yield "formula, compiled", by_torch, formula, "reference"


def measure(
    name: str, size: tuple[int, int], tokens: Sequence[int], dtype: torch.dtype, device: torch.device, peft: Any
) -> Iterator[Row]:
    torch.manual_seed(0)
    base = nn.Linear(*size, dtype=dtype, device=device).requires_grad_(False)
    x, grad = (torch.randn(max(tokens), d).to(device, dtype) for d in size)
    for title, layer, formula, backend in contenders(name, base, peft, size in COMPILED_SIZES or device.type == "cpu"):
        for t in tokens:
            rows = sorted({0, t // 2, t - 1})
            row = Row(name, title, backend, *size, t, float("nan"), error_limit(dtype, max(size)))
            try:
                with fastpeft.use_backend(backend):
                    exact = formula(x[rows], grad[rows])
                    row.error = output_error(layer, x[:t], grad[:t], rows, exact)
                    if row.right:
                        with torch.no_grad():
                            frozen = capture(forward(base, x[:t]), device)
                            row.taxes["forward"] = tax_of(frozen, forward(layer, x[:t]), device)
                        frozen = capture(training_step(base, x[:t], grad[:t]), device)
                        row.taxes["training"] = tax_of(frozen, training_step(layer, x[:t], grad[:t]), device)
                    else:
                        row.reason = "wrong"
            except RuntimeError as error:
                if "was asked for, but" in str(error):
                    break  # a lane that the method does not have
                row.reason = str(error).splitlines()[0][:60]
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
FLOORS = {"native": floors.cuda_floor_of, "triton": floors.floor_of}  # lanes whose kernels are counted


def line_of(row: Row) -> str:
    size = row.in_features, row.out_features
    cells = [f"{size[0]}→{size[1]}", str(row.tokens), METHODS[row.method].title, row.contender]
    for phase in tables.PHASES:
        training = phase == "training"
        floor = FLOORS[row.backend](row.method, size, row.tokens, training) if row.backend in FLOORS else None
        cells += [str(row.taxes.get(phase, row.reason)), tables.shown(floor, ".2f")]
        cells.append(floors.target_of(row.method, row.tokens, training))
    return tables.line(cells)


def choices(rows: Sequence[Row]) -> list[str]:
    """A line for each cell and phase: the lane that was chosen, what each costs, and the one to choose instead."""
    lines = tables.heading("layer", "T", "method", "phase", "chosen", *LANES.values(), "faster")
    wanting = 0
    for chosen in (row for row in rows if row.contender == "fastpeft" and row.taxes):
        forced = {row.backend: row for row in rows if row.cell == chosen.cell and row.backend in LANES}
        for phase in tables.PHASES:
            taxes = {lane: row.taxes[phase] for lane, row in forced.items() if phase in row.taxes}
            best = min(taxes, key=lambda lane: taxes[lane].ratio, default=None)
            own = chosen.taxes[phase]
            faster = "–"
            if best is not None and own.ratio > MARGIN * taxes[best].ratio and own.lanes != LANES[best]:
                faster, wanting = f"**{LANES[best]}** × {own.ratio / taxes[best].ratio:.2f}", wanting + 1
            cells = [f"{chosen.in_features}→{chosen.out_features}", str(chosen.tokens), METHODS[chosen.method].title]
            cells += [phase, own.lanes, *(str(taxes.get(lane, "–")) for lane in LANES), faster]
            lines.append(tables.line(cells))
    verdict = f"{wanting} to change in fastpeft/ops/" if wanting else "the fastest everywhere"
    return [f"## Which lane was chosen: {verdict}", "", *lines]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=parse_count, default=180, help="no new cell is begun after so long")
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
    notes = ["", *choices(rows), "", setting(device)]
    notes.append("- floor: of a lane's own kernels in bfloat16 on an H200, by bench/floors.py")
    notes += [f"- not reached: {', '.join(left_out)}"] * bool(left_out)
    print(*notes, sep="\n")
    if arguments.markdown:
        Path(arguments.markdown).write_text("\n".join([*lines, *notes]) + "\n", encoding="utf-8")
    return 0 if all(row.taxes for row in rows if row.contender.startswith("fastpeft")) else 1


if __name__ == "__main__":
    sys.exit(main())
