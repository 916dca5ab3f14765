"""What mixed batches cost: a layer behind an AdapterBank, thousands of adapters in it, and the service over HTTP.

    python bench/serving.py                               # all four parts; minutes
    python bench/serving.py layers --sizes 1024x1024 --methods lora-r16 mix --no-peft
    python bench/serving.py service --clients 1 16 --answer 32 --model FOLDER
    python bench/serving.py --quick                       # one size, few cells, a small random model

Parts: `layers`, the tax of a batch whose rows have adapters of their own, beside PEFT's; `registered`, one batch in
banks of ever more adapters; `loads`, adapters of a whole model that come into a bank; `service`, clients that ask
examples/serve.py at once, with an adapter each and without. What is compared takes turns in one run, and figures are
ratios of its medians. Outputs are held against the formula in float64, the service's answers against the model's; what
is wrong gets no figures, and the exit status is 1. Table, JSON and chart go to the folder --out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import tables
import torch
from layers import METHODS
from serving_layers import KINDS, MIXES, REGISTERED_ADAPTERS, Adapters, Cell, Registered, measure, measure_registered
from tax import find_peft, parse_count, parse_methods, parse_size
from torch import nn

PARTS = ("layers", "registered", "loads", "service")
MOST_ROWS = 512  # of x in one batch, unless --full: larger ones take seconds
GRIDS: dict[str, dict[str, Any]] = {
    "quick": {
        "sizes": [(1024, 1024)], "tokens": [1], "rows": [32], "adapters": [1, 32], "registered": [10, 1000],
        "clients": [1, 16], "model": "random",
    },
    "default": {
        "sizes": [(1024, 1024), (2048, 2048)], "tokens": [1, 16], "rows": [32, 128], "adapters": [1, 8, 32, 128],
        "registered": [10, 100, 1000, 10_000], "clients": [1, 4, 16], "model": "smollm2",
    },
}  # fmt: skip
GRIDS["full"] = {**GRIDS["default"], "clients": [1, 2, 4, 8, 16, 32]}

# ---------------------------------------------------------------------- tables

LAYERS = ("layer", "T", "rows", "adapters", "method", "bytes / W", "tax", "with route", "PEFT", "PEFT / ours")
GROWTH = ("time beyond the frozen layer", "layer", "T", "more adapters", "in rows", "grows by", "more rows",
          "of adapters", "grows by")  # fmt: skip
REGISTERED = ("layer", "registered", "resident", "tax", "with route", "over the first", "with route", "ms to register")
LOADS = ("adapter of the model", "MB on disk", "MB in the bank", "MB expanded", "ms to load", "least",
         "first of its kind", "ms to register")  # fmt: skip
SERVICE = ("clients", "tokens/s", "with adapters", "ratio", "ms to the first token", "with adapters")


def layer_line(cell: Cell) -> str:
    place = [f"{cell.in_features}→{cell.out_features}", *map(str, (cell.tokens, cell.rows, cell.adapters)), cell.method]
    ours = [tables.shown(value, ".2f") if cell.right else "wrong" for value in (cell.tax, cell.route_tax)]
    theirs = tables.shown(cell.peft_tax, ".2f") if cell.peft_right else "wrong"
    gain = tables.shown(tables.ratio(cell.peft_tax, cell.tax), ".1f")
    return tables.line([*place, f"{cell.bytes:.3f}", *ours, theirs, gain])


def growth(cells: Sequence[Cell]) -> Iterator[str]:
    """How the time beyond the frozen layer's grows with adapters, in the same rows, and with rows, of the same ones."""
    groups = dict.fromkeys((cell.method, cell.in_features, cell.out_features, cell.tokens) for cell in cells)
    for method, d_in, d_out, tokens in groups:
        extra = {
            (cell.rows, cell.adapters): cell.extra
            for cell in cells
            if (cell.method, cell.in_features, cell.out_features, cell.tokens) == (method, d_in, d_out, tokens)
        }
        figures = []
        for axis in (1, 0):
            shared = [place[1 - axis] for place in extra]
            pairs = [
                (min(alike), max(alike))
                for each in set(shared)
                if len(alike := [place for place in extra if place[1 - axis] == each]) > 1
            ]
            if not pairs:
                figures += ["–"] * 3
                continue
            first, last = max(pairs, key=lambda pair: (pair[1][axis] / pair[0][axis], pair[0][1 - axis]))
            before, after = extra[first], extra[last]
            grown = after / before if before and after and before > 0 and after > 0 else None
            figures += [f"{first[axis]} to {last[axis]}", str(first[1 - axis]), f"× {tables.shown(grown, '.2f')}"]
        yield tables.line([method, f"{d_in}→{d_out}", str(tokens), *figures])


def registered_lines(rows: Sequence[Registered]) -> Iterator[str]:
    first = rows[0]
    for row in rows:
        ratios = row.tax, row.route_tax, tables.ratio(row.layer, first.layer), tables.ratio(row.route, first.route)
        figures = [tables.shown(ratio, ".3f") if row.right else "wrong" for ratio in ratios]
        place = [f"{row.in_features}→{row.out_features}", str(row.registered), str(row.resident)]
        yield tables.line([*place, *figures, f"{row.register * 1e3:.2f}"])


def load_line(row: Any) -> str:
    sizes = [f"{size / 1e6:.2f}" for size in (row.file_bytes, row.bytes, row.expanded_bytes)]
    seconds = row.load, row.least, row.first, row.register
    return tables.line([row.method, *sizes, *(f"{value * 1e3:.1f}" for value in seconds)])


def service_line(row: Any) -> str:
    if not row.right:
        return tables.line([str(row.clients), *["wrong"] * 5])
    speeds = [f"{row.base_tokens_per_second:.1f}", f"{row.tokens_per_second:.1f}", f"{row.ratio:.2f}"]
    return tables.line([str(row.clients), *speeds, f"{row.base_first * 1e3:.0f}", f"{row.first * 1e3:.0f}"])


def notes(peft: ModuleType | None, record: dict[str, list[Any]]) -> Iterator[str]:
    yield tables.setting(peft)
    if cells := record.get("layers"):
        yield (
            "- tax: a batch whose plan was made before it, over the frozen layer; with route: the plan made as well, "
            "which a whole model shares; bytes / W: those of the adapters that one batch reads over the weight's"
        )
        yield (
            "- PEFT: LoRA with adapter_names=, the rest by switching adapters group by group; its BOFT computes m = 1 "
            "whatever it is asked for, as on every CPU"
        )
        closest = max(cells, key=lambda cell: cell.error / cell.limit)
        yield (
            f"- outputs against the formula in float64: worst error {closest.error:.1e} of the largest entry, allowed "
            f"{closest.limit:.1e} ({closest.method}, {closest.in_features}→{closest.out_features})"
        )
        fewest = min(cell.rounds for cell in cells)
        theirs = min((cell.peft_rounds for cell in cells if cell.peft_rounds), default=None)
        yield f"- rounds: at least {fewest}" + ("" if theirs is None else f"; of PEFT's, {theirs}")
    for cell in record.get("layers", ()):
        for who, right, error in (("", cell.right, cell.error), ("PEFT ", cell.peft_right, cell.peft_error)):
            if not right:
                yield f"- WRONG: {who}{cell.method}, {cell.rows} rows, {cell.adapters} adapters: error {error:.1e}"
    for row in record.get("registered", ()):
        if not row.right:
            yield f"- WRONG: {row.registered} registered: error {row.error:.1e}, same bits: {row.same}"
    for row in record.get("service", ()):
        for what in row.wrong[:3]:
            yield f"- WRONG: {row.clients} clients: {what}"


# ---------------------------------------------------------------------- chart


def chart(record: dict[str, list[Any]], path: Path) -> None:
    """A panel for each size, tax against adapters; then what the other parts have, against adapters or clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: list[tuple[str, str, str, dict[str, tuple[list[float], list[float]]]]] = []
    cells = record.get("layers", [])
    for size in dict.fromkeys((cell.in_features, cell.out_features) for cell in cells):
        lines: dict[str, tuple[list[float], list[float]]] = {}
        few = min(cell.tokens for cell in cells)
        for cell in cells:
            # The fewest rows that so many adapters have.
            if (cell.in_features, cell.out_features, cell.tokens) != (*size, few) or not cell.tax:
                continue
            for name, value in ((cell.method, cell.tax), (f"PEFT {cell.method}", cell.peft_tax)):
                places, values = lines.setdefault(name, ([], []))
                if value and cell.adapters not in places:
                    places.append(cell.adapters)
                    values.append(value)
        panels.append((f"{size[0]}→{size[1]}, T {few}", "adapters in a batch", "tax", lines))
    for size in dict.fromkeys((row.in_features, row.out_features) for row in record.get("registered", ())):
        rows = [row for row in record["registered"] if (row.in_features, row.out_features) == size and row.base]
        counts = [row.registered for row in rows]
        lines = {"layer": (counts, [row.tax for row in rows])}
        lines["with route"] = counts, [row.route_tax for row in rows]
        panels.append((f"{size[0]}→{size[1]}, ten adapters", "registered", "tax", lines))
    if rows := [row for row in record.get("service", ()) if row.rounds]:
        counts = [row.clients for row in rows]
        speeds = {"base": "base_tokens_per_second", "an adapter each": "tokens_per_second"}
        waits = {"base": "base_first", "an adapter each": "first"}
        for label, names in (("tokens per second", speeds), ("seconds to the first token", waits)):
            lines = {title: (counts, [getattr(row, name) for row in rows]) for title, name in names.items()}
            panels.append(("service", "clients", label, lines))
    if not panels:
        return
    columns = min(len(panels), 3)
    depth = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(
        depth, columns, figsize=(4.6 * columns, 3.6 * depth), squeeze=False, layout="constrained"
    )
    for axes, (title, across, up, lines) in zip(grid.flat, panels, strict=False):
        colors: dict[str, str] = {}
        for name, (places, values) in lines.items():
            color = colors.setdefault(name.removeprefix("PEFT "), f"C{len(colors)}")
            axes.plot(places, values, "x--" if name.startswith("PEFT") else "o-", color=color, markersize=4, label=name)
        axes.set(title=title, xlabel=across, ylabel=up, xscale="log", yscale="log" if up == "tax" else "linear")
        ticks = sorted({place for places, _ in lines.values() for place in places})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.xaxis.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        if up == "tax":
            axes.axhline(1, color="0.6", linewidth=0.8)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=7)
    for axes in list(grid.flat)[len(panels) :]:
        axes.remove()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all of them)")
    grid = parser.add_mutually_exclusive_group()
    grid.add_argument("--quick", dest="grid", action="store_const", const="quick", help="one size, few cells")
    grid.add_argument("--full", dest="grid", action="store_const", const="full",
                      help=f"batches of more than {MOST_ROWS} rows of x and all clients as well")  # fmt: skip
    parser.add_argument("--methods", nargs="+", type=parse_kinds, help=", ".join([*MIXES, *METHODS]))
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="INxOUT")
    parser.add_argument("--tokens", nargs="+", type=parse_count, metavar="T", help="rows of x for each row")
    parser.add_argument("--rows", nargs="+", type=parse_count, help="sequences of a batch")
    parser.add_argument("--adapters", nargs="+", type=parse_count, help="different ones in a batch; at most its rows")
    parser.add_argument("--registered", nargs="+", type=parse_count, help=f"from {REGISTERED_ADAPTERS} on")
    parser.add_argument("--resident", type=parse_count, default=500, help="at most (%(default)s)")
    parser.add_argument("--clients", nargs="+", type=parse_count)
    parser.add_argument("--answer", type=parse_count, default=32, help="tokens of an answer (%(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="or smollm2, or random: a small one")
    parser.add_argument("--threads", type=parse_count, default=2, help="but the service, which has all (%(default)s)")
    parser.add_argument("--no-peft", action="store_true", help="fastpeft alone")
    parser.add_argument("--out", type=Path, default=Path("out/serving"), help="folder of what is written (%(default)s)")
    arguments = parser.parse_args(argv)
    arguments.parts = list(dict.fromkeys(arguments.parts)) or list(PARTS)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    given = [name for family in arguments.methods or [[*KINDS, *MIXES]] for name in family]
    arguments.methods = list(dict.fromkeys(given))
    for name, values in GRIDS[arguments.grid or "default"].items():
        if not getattr(arguments, name):
            setattr(arguments, name, values)
    most = math.inf if arguments.grid == "full" else MOST_ROWS
    arguments.shapes = [
        (tokens, rows, adapters)
        for tokens in sorted(arguments.tokens)
        for rows in sorted(arguments.rows)
        for adapters in sorted(arguments.adapters)
        if adapters <= rows and tokens * rows <= max(most, min(arguments.tokens) * min(arguments.rows))
    ]
    if not arguments.shapes:
        parser.error("--adapters must have a number that is at most one of --rows")
    if min(arguments.registered) < REGISTERED_ADAPTERS or arguments.resident < REGISTERED_ADAPTERS:
        parser.error(f"--registered and --resident are at least {REGISTERED_ADAPTERS}")
    arguments.registered.sort()
    return arguments


def parse_kinds(text: str) -> list[str]:
    if text in MIXES:
        return [text]
    found = [name for name in parse_methods(text) if not name.startswith("oft")]
    if not found:
        raise argparse.ArgumentTypeError(f"a bank serves no OFT, got {text!r}")
    return found


def with_ratios(row: Any) -> dict[str, Any]:
    names = [name for name in ("tax", "route_tax", "peft_tax", "ratio") if hasattr(row, name)]
    return {**asdict(row), **{name: getattr(row, name) for name in names}}


class Report:
    """Lines as they come, and rows; what an interrupted run leaves is on disk."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.rows: dict[str, list[Any]] = {}
        self._arguments = arguments
        self._lines: list[str] = []
        arguments.out.mkdir(parents=True, exist_ok=True)

    def heading(self, *columns: str) -> None:
        self.say(*([""] if self._lines else []), *tables.heading(*columns))

    def add(self, part: str, row: Any, line: str) -> None:
        self.rows.setdefault(part, []).append(row)
        self.say(line)

    def say(self, *lines: str) -> None:
        self._lines += lines
        print(*lines, sep="\n", flush=True)
        out, settings = self._arguments.out, {**vars(self._arguments)}
        del settings["out"]
        (out / "serving.md").write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        record = {"settings": settings, **{part: list(map(with_ratios, rows)) for part, rows in self.rows.items()}}
        (out / "serving.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @property
    def right(self) -> bool:
        return all(
            getattr(row, name, True) for rows in self.rows.values() for row in rows for name in ("right", "peft_right")
        )


def layer_parts(arguments: argparse.Namespace, report: Report, peft: ModuleType | None, root: Path) -> None:
    torch.manual_seed(0)
    bases = {size: nn.Linear(*size).requires_grad_(False) for size in arguments.sizes}
    sources = [Adapters(base, root) for base in bases.values()]
    if "layers" in arguments.parts:
        report.heading(*LAYERS)
        for each in sources:
            for cell in measure(each, arguments.methods, arguments.shapes, peft):
                report.add("layers", cell, layer_line(cell))
        report.heading(*GROWTH)
        report.say(*growth(report.rows["layers"]))
    if "registered" in arguments.parts:
        report.heading(*REGISTERED)
        for each in sources:
            rows = measure_registered(each, arguments.registered, arguments.resident)
            for row, line in zip(rows, registered_lines(rows), strict=True):
                report.add("registered", row, line)


def model_parts(arguments: argparse.Namespace, report: Report, root: Path) -> None:
    http = importlib.import_module("serving_http")  # needs transformers and more
    model, tokenizer, name, options = http.load_model(arguments.model, root)
    kinds = KINDS if "loads" in arguments.parts else http.SERVED
    folders = {kind: root / "adapters" / kind for kind in kinds}
    for kind, where in folders.items():
        http.write_adapter(model, kind, where)
    if "loads" in arguments.parts:
        report.heading(*LOADS)
        for row in http.measure_loads(model, folders):
            report.add("loads", row, load_line(row))
    if "service" in arguments.parts:
        report.heading(*SERVICE)
        given = model, tokenizer, name, options, folders, arguments.clients, arguments.answer
        for row in http.measure_traffic(*given):
            report.add("service", row, service_line(row))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    peft = None if arguments.no_peft or "layers" not in arguments.parts else find_peft()
    report = Report(arguments)
    with tempfile.TemporaryDirectory(prefix="fastpeft-serving-") as root:
        if {"layers", "registered"} & set(arguments.parts):
            layer_parts(arguments, report, peft, Path(root))
        if {"loads", "service"} & set(arguments.parts):
            model_parts(arguments, report, Path(root))
    report.say("", *notes(peft, report.rows))
    try:
        chart(report.rows, arguments.out / "serving.png")
    except ImportError:
        print("matplotlib is not installed, so there is no chart: pip install matplotlib", file=sys.stderr)
    return 0 if report.right else 1


if __name__ == "__main__":
    sys.exit(main())
