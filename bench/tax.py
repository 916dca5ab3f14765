"""The adapter tax: the time of an adapted layer over the time of the same frozen ``nn.Linear``, and PEFT's beside it.

    python bench/tax.py                    # four methods on a small grid
    python bench/tax.py --quick            # one size, a minute
    python bench/tax.py --full             # every method and size; hours, nearly all of them PEFT's BOFT
    python bench/tax.py --methods lora boft-b8m4 --sizes 4096x4096 --tokens 1 16 --dtypes float32 bfloat16
    python bench/tax.py --memory --json tax.json --markdown tax.md --chart tax.png

A layer and its base are called in turn, base, adapted, base, …, first forward under no_grad in eval mode, then training
steps: forward and backward, with the adapter's gradients and x's; the base's has x's alone. A tax is the ratio of the
two medians. Both use the same weight. Beforehand y and the gradient of x are held against the formula in float64, on
a few rows; a layer that is wrong gets no figures, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import tables
import torch
from layers import METHODS, build_fastpeft, build_peft, error_limit, output_error
from tables import Row
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROUNDS = 15  # at least
MOST_ROUNDS, PAIR_SECONDS = 300, 0.15  # short calls repeat up to so often, to fill so much time
WARM_UP = 2
PATIENCE = 4.0  # seconds after which a pair stops once it has had three rounds

ONE_EACH = ("lora-r16", "mos", "boft-b8m4", "fourierft")
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "quick": {"methods": ONE_EACH, "sizes": [(768, 768)], "tokens": [1, 16, 512]},
    "default": {"methods": ONE_EACH, "sizes": [(768, 768), (1024, 1024), (4096, 4096)], "tokens": [1, 16, 512]},
    "full": {
        "methods": tuple(METHODS),
        "sizes": [*((d, d) for d in (384, 768, 1024, 2048, 4096)), (4096, 11008), (11008, 4096)],
        "tokens": [1, 16, 128, 512],
    },
}

# ---------------------------------------------------------------------- one pair


def take_turns(calls: Sequence[Callable[[], float]], patience: float = PATIENCE) -> tuple[list[float], int]:
    """Median seconds of calls that take turns, and of how many rounds. Each returns the seconds it took."""
    times: list[list[float]] = []
    rounds, start = ROUNDS, time.perf_counter()
    while len(times) < WARM_UP + rounds:
        times.append([call() for call in calls])
        if len(times) == WARM_UP:
            enough = PAIR_SECONDS * len(calls) / 2
            rounds = min(max(ROUNDS, int(enough / sum(times[-1]))), MOST_ROUNDS)
        if len(times) >= 3 and time.perf_counter() - start > patience:
            break
    timed = times[min(WARM_UP, len(times) - 3) :]  # the slowest have run once before, when they were checked
    return [statistics.median(of_one) for of_one in zip(*timed, strict=True)], len(timed)


def in_turn(
    base: Callable[[], float], adapted: Callable[[], float], patience: float = PATIENCE
) -> tuple[float, float, int]:
    """The same for a pair."""
    (base_seconds, adapted_seconds), rounds = take_turns([base, adapted], patience)
    return base_seconds, adapted_seconds, rounds


def forward(layer: nn.Module, x: Tensor) -> Callable[[], float]:
    layer.eval()

    def call() -> float:
        start = time.perf_counter()
        layer(x)
        return time.perf_counter() - start

    return call


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], float]:
    layer.train()

    def call() -> float:
        layer.zero_grad()  # to None
        leaf = x.detach().requires_grad_()
        start = time.perf_counter()
        layer(leaf).backward(grad)
        return time.perf_counter() - start

    return call


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors hold at one time during `work`, beyond what was there before.

    Memory that kernels take past PyTorch's allocator is not in it.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# ---------------------------------------------------------------------- the grid


def measure_layer(row: Row, layer: nn.Module, base: nn.Linear, x: Tensor, grad: Tensor, memory: bool) -> None:
    """Fills in what a layer costs."""
    with torch.no_grad():
        row.base_forward, row.forward, row.forward_rounds = in_turn(forward(base, x), forward(layer, x))
    steps = training_step(base, x, grad), training_step(layer, x, grad)
    row.base_training, row.training, row.training_rounds = in_turn(*steps)
    if memory:
        layer.zero_grad()
        row.base_bytes, row.bytes = (peak_bytes(step) for step in steps)


def measure(
    name: str,
    size: tuple[int, int],
    tokens: Sequence[int],
    dtype: torch.dtype,
    peft: ModuleType | None,
    memory: bool,
) -> Iterator[Row]:
    """The rows of one method at one size: all of ours, then all of PEFT's where it has the method."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = nn.Linear(*size, dtype=dtype).requires_grad_(False)
    x, grad = (torch.randn(max(tokens), d, generator=generator).to(dtype) for d in size)
    # At most four rows of each T are checked, and the formula is evaluated once for all of them.
    checked = {t: sorted({0, t // 3, 2 * t // 3, t - 1}) for t in tokens}
    union = sorted(set().union(*checked.values()))
    for library in ("fastpeft", "peft"):
        if library == "fastpeft":
            layer, formula = build_fastpeft(name, base)
        elif peft is not None and hasattr(peft, METHODS[name].config_class):
            layer, formula = build_peft(name, base, peft)
        else:
            continue
        exact_y, exact_dx = formula(x[union], grad[union])
        del formula  # holds W in float64
        for t in tokens:
            places = [union.index(i) for i in checked[t]]
            error = output_error(layer, x[:t], grad[:t], checked[t], (exact_y[places], exact_dx[places]))
            limit = error_limit(dtype, max(size))
            row = Row(METHODS[name].title, library, str(dtype).removeprefix("torch."), *size, t, error, limit)
            if row.right:
                measure_layer(row, layer, base, x[:t], grad[:t], memory)
            yield row
        del layer  # PEFT's BOFT holds several matrices of W's size and more
        gc.collect()


# ---------------------------------------------------------------------- the command


def parse_size(text: str) -> tuple[int, int]:
    try:
        d_in, d_out = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected INxOUT such as 768x768, got {text!r}") from None
    if min(d_in, d_out) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive, got {text!r}")
    return d_in, d_out


def parse_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def parse_methods(text: str) -> list[str]:
    """A method, or all of a family: boft is boft-b4m2 and boft-b8m4."""
    found = [name for name in METHODS if name == text or name.startswith(f"{text}-")]
    if not found:
        raise argparse.ArgumentTypeError(f"expected lora, boft or one of {', '.join(METHODS)}, got {text!r}")
    return found


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", dest="grid", action="store_const", const="quick", help="768x768 alone")
    grid.add_argument("--full", dest="grid", action="store_const", const="full", help="every method, size and T")
    parser.add_argument("--methods", nargs="+", type=parse_methods, help=", ".join(METHODS))
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="INxOUT")
    parser.add_argument("--tokens", nargs="+", type=parse_count, metavar="T", help="rows of x")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"],
                        help="of base, inputs and outputs; adapters are float32")  # fmt: skip
    parser.add_argument("--threads", type=parse_count, default=2)
    parser.add_argument("--no-peft", action="store_true", help="fastpeft alone")
    parser.add_argument("--memory", action="store_true", help="a training step's peak bytes beyond the frozen layer's")
    parser.add_argument("--json", metavar="FILE", help="write rows, summary and settings")
    parser.add_argument("--markdown", metavar="FILE", help="write what is printed")
    parser.add_argument("--chart", metavar="FILE.png", help="draw tax against T, or against d with --chart-axis size")
    parser.add_argument("--chart-axis", choices=["tokens", "size"], default="tokens")
    arguments = parser.parse_args(argv)
    for name, values in GRIDS[arguments.grid or "default"].items():
        given = getattr(arguments, name)
        if name == "methods" and given:
            given = [method for family in given for method in family]
        setattr(arguments, name, list(dict.fromkeys(given or values)))
    if arguments.chart:
        try:
            importlib.import_module("matplotlib")
        except ImportError:
            parser.error("--chart needs matplotlib: pip install matplotlib")
        if arguments.chart_axis == "size" and not any(d_in == d_out for d_in, d_out in arguments.sizes):
            parser.error("--chart-axis size needs a square layer among --sizes")
    return arguments


def find_peft() -> ModuleType | None:
    try:
        return importlib.import_module("peft")
    except ImportError:
        print("PEFT is not installed, so its columns are empty: pip install peft", file=sys.stderr)
        return None


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    peft = None if arguments.no_peft else find_peft()

    rows: list[Row] = []
    table: list[str] = []

    def tell(*lines: str) -> None:
        table.extend(lines)
        print(*lines, sep="\n", flush=True)

    for dtype in arguments.dtypes:
        tell(*([""] if table else []), dtype, "", *tables.header(arguments.memory))
        for size in arguments.sizes:
            for name in arguments.methods:
                measured = list(measure(name, size, arguments.tokens, getattr(torch, dtype), peft, arguments.memory))
                rows += measured
                tell(*tables.body(measured, arguments.memory))
                report = tables.report(rows, peft, arguments.memory)
                write(arguments, rows, [*table, *report])  # what an interrupted run leaves
    print(*report, sep="\n")
    if arguments.chart:
        tables.chart(rows, arguments.chart, arguments.chart_axis)
    return 0 if all(row.right for row in rows) else 1


def write(arguments: argparse.Namespace, rows: Sequence[Row], lines: Sequence[str]) -> None:
    if arguments.markdown:
        Path(arguments.markdown).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if arguments.json:
        record = {
            "settings": {key: getattr(arguments, key) for key in ("methods", "sizes", "tokens", "dtypes", "threads")},
            "rows": [{**asdict(row), "forward_tax": row.forward_tax, "training_tax": row.training_tax} for row in rows],
            "summary": tables.summarise(rows),
        }
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
