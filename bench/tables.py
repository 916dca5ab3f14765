"""What bench/tax.py says about its rows: the table, the summary, growth, notes and a chart."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import fastpeft

PHASES = ("forward", "training")
LIBRARIES = (("fastpeft", "fastpeft"), ("peft", "PEFT"))  # as rows have them, as readers do


@dataclass
class Row:
    """One layer at one T. Seconds and bytes of the frozen layer are those of the same pair."""

    method: str
    library: str
    dtype: str
    in_features: int
    out_features: int
    tokens: int
    error: float  # see layers.output_error
    limit: float
    forward: float | None = None
    base_forward: float | None = None
    forward_rounds: int = 0
    training: float | None = None
    base_training: float | None = None
    training_rounds: int = 0
    bytes: int | None = None
    base_bytes: int | None = None

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # not so for a NaN

    @property
    def forward_tax(self) -> float | None:
        return ratio(self.forward, self.base_forward)

    @property
    def training_tax(self) -> float | None:
        return ratio(self.training, self.base_training)

    def extra(self, phase: str) -> float | None:
        """Seconds beyond the frozen layer's."""
        spent, base = getattr(self, phase), getattr(self, f"base_{phase}")
        return None if spent is None or base is None else spent - base

    @property
    def cell(self) -> str:
        return f"{self.in_features}→{self.out_features}, T {self.tokens}"

    @property
    def key(self) -> tuple:
        return self.method, self.dtype, self.in_features, self.out_features, self.tokens


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def tax(row: Row | None, phase: str) -> float | None:
    return None if row is None else getattr(row, f"{phase}_tax")


def gain(ours: Row, theirs: Row | None, phase: str) -> float | None:
    """PEFT's time over ours, each in units of its own base's."""
    return ratio(tax(theirs, phase), tax(ours, phase))


def shown(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(*columns: str) -> list[str]:
    return [line(columns), line(["---"] * len(columns))]


def paired(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Ours, each with PEFT's of the same cell."""
    theirs = {row.key: row for row in rows if row.library == "peft"}
    return [(row, theirs.get(row.key)) for row in rows if row.library == "fastpeft"]


# ---------------------------------------------------------------------- table


def header(memory: bool) -> list[str]:
    taxes = ("fastpeft forward", "training", "PEFT forward", "training", "PEFT / ours", "training")
    return heading("layer", "T", "method", *taxes, *(("fastpeft MB", "PEFT MB") if memory else ()))


def body(rows: Sequence[Row], memory: bool) -> list[str]:
    """A line for each cell and method, ours beside PEFT's."""
    lines = []
    for ours, theirs in paired(rows):
        cells = [f"{ours.in_features}→{ours.out_features}", str(ours.tokens), ours.method]
        for row in (ours, theirs):
            for phase in PHASES:
                cells.append("wrong" if row and not row.right else shown(tax(row, phase), ".2f"))
        cells += [shown(gain(ours, theirs, phase), ".1f") for phase in PHASES]
        if memory:
            cells += [megabytes(ours), megabytes(theirs)]
        lines.append(line(cells))
    return lines


def megabytes(row: Row | None) -> str:
    if row is None or row.bytes is None or row.base_bytes is None:
        return "–"
    return f"{(row.bytes - row.base_bytes) / 1e6:.2f}"


# ---------------------------------------------------------------------- summary


def report(rows: Sequence[Row], peft: ModuleType | None, memory: bool) -> list[str]:
    """What follows the table."""
    return ["", *summary(rows), "", *growth(rows), "", *notes(rows, peft, memory)]


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each method and dtype: geometric mean and worst cell of our taxes and of PEFT's time over ours."""
    result = []
    for method, dtype in dict.fromkeys((row.method, row.dtype) for row in rows):
        pairs = paired([row for row in rows if (row.method, row.dtype) == (method, dtype)])
        entry: dict[str, Any] = {"method": method, "dtype": dtype}
        for phase in PHASES:
            entry[f"{phase}_tax"] = extent([(tax(ours, phase), ours.cell) for ours, _ in pairs], worst=max)
            gains = [(gain(ours, theirs, phase), ours.cell) for ours, theirs in pairs]
            entry[f"{phase}_peft_over_ours"] = extent(gains, worst=min)
        result.append(entry)
    return result


def extent(values: Sequence[tuple[float | None, str]], worst: Callable) -> dict[str, Any] | None:
    """Geometric mean, worst value and its cell of the values that are there."""
    known = [(value, cell) for value, cell in values if value is not None]
    if not known:
        return None
    extreme, cell = worst(known)
    return {"mean": statistics.geometric_mean(value for value, _ in known), "worst": extreme, "cell": cell}


def summary(rows: Sequence[Row]) -> list[str]:
    columns = ("forward tax", "worst", "training tax", "worst", "PEFT / ours forward", "least", "training", "least")
    lines = heading("method", "dtype", *columns)
    for entry in summarise(rows):
        cells = [entry["method"], entry["dtype"]]
        for figure, style in (("tax", ".2f"), ("peft_over_ours", ".1f")):
            for phase in PHASES:
                found = entry[f"{phase}_{figure}"]
                cells += [
                    shown(found and found["mean"], style),
                    f"{found['worst']:{style}} ({found['cell']})" if found else "–",
                ]
        lines.append(line(cells))
    return lines


def growth(rows: Sequence[Row]) -> list[str]:
    """By how much the time beyond the frozen layer's grows when T doubles, and when d does in square layers.

    From the smallest T to the largest, and the median of all sizes; d in the same way. Where the adapter's time is lost
    in the noise of the base's there is no figure. Few tokens and small layers cost calls rather than work.
    """
    names = [f"{axis}: {phase}" for axis in ("T doubles", "d doubles") for phase in PHASES]
    lines = heading("time beyond the frozen layer", "dtype", "library", *names)
    for method, dtype, library in dict.fromkeys((row.method, row.dtype, row.library) for row in rows):
        mine = [row for row in rows if (row.method, row.dtype, row.library) == (method, dtype, library)]
        square = [row for row in mine if row.in_features == row.out_features]
        cells = []
        for phase in PHASES:
            cells.append(per_doubling(mine, phase, lambda r: r.tokens, lambda r: (r.in_features, r.out_features)))
        for phase in PHASES:
            cells.append(per_doubling(square, phase, lambda r: r.in_features, lambda r: r.tokens))
        lines.append(line([method, dtype, library, *("–" if cell is None else f"× {cell:.1f}" for cell in cells)]))
    return lines


def per_doubling(rows: Sequence[Row], phase: str, along: Callable, group: Callable) -> float | None:
    factors = []
    for key in dict.fromkeys(map(group, rows)):
        members = sorted((row for row in rows if group(row) == key), key=along)
        first, last = members[0], members[-1]
        before, after = first.extra(phase), last.extra(phase)
        if along(first) < along(last) and before and after and before > 0 and after > 0:
            factors.append((after / before) ** (1 / math.log2(along(last) / along(first))))
    return statistics.median(factors) if factors else None


def setting(peft: ModuleType | None) -> str:
    extension = fastpeft.backend.extension
    machine = f"{platform.machine()}, extension {extension.isa if extension else 'missing'}"
    versions = f"torch {torch.__version__}, PEFT {peft.__version__ if peft else 'left out'}"
    return f"- {torch.get_num_threads()} threads, {machine}, {versions}"


def notes(rows: Sequence[Row], peft: ModuleType | None, memory: bool) -> list[str]:
    lines = [
        setting(peft),
        "- tax: time over that of the frozen layer, called in turn; PEFT / ours: the ratio of the two taxes",
        "- in bfloat16 base, inputs and outputs are bfloat16, adapters float32; "
        "MoS is one of 32 layers that share pools, and its training step writes the gradient of the whole pools",
    ]
    if memory:
        lines.append("- MB: peak of PyTorch's allocations in a training step, beyond the frozen layer's")
    if any(row.library == "peft" and row.method.startswith("BOFT") for row in rows):
        lines.append(
            "- PEFT's BOFT computes m = 1 whatever it is asked for: it sets boft_n_butterfly_factor to 1 where its "
            "CUDA helper does not build, as on every CPU; fastpeft computes the m of the title"
        )
    if rows:
        closest = max(rows, key=lambda row: row.error / row.limit)
        lines.append(
            f"- outputs and gradients of x against the formula in float64: worst error {closest.error:.1e} of the "
            f"largest entry, allowed {closest.limit:.1e} ({closest.method}, {closest.library}, {closest.cell})"
        )
    if found := unrest(rows):
        lines.append(f"- medians of the frozen layer differ by up to × {found[0]:.2f} from pair to pair ({found[1]})")
    for row in rows:
        if not row.right:
            lines.append(f"- WRONG: {row.library} {row.method}, {row.dtype}, {row.cell}: error {row.error:.1e}")
    return lines


def unrest(rows: Sequence[Row]) -> tuple[float, str] | None:
    """Where the base's medians in one cell lie furthest apart, largest over smallest: near 1 on an idle machine.

    Of pairs with our layers: PEFT's dense matrices push the base's weight out of the caches.
    """
    medians: dict[tuple, list[float]] = {}
    for row in rows:
        for phase in PHASES:
            if row.library == "fastpeft" and (base := getattr(row, f"base_{phase}")):
                medians.setdefault((row.dtype, phase, row.cell), []).append(base)
    spreads = [
        (max(values) / min(values), f"{dtype}, {phase}, {cell}")
        for (dtype, phase, cell), values in medians.items()
        if len(values) > 1
    ]
    return max(spreads, default=None)


# ---------------------------------------------------------------------- chart


def chart(rows: Sequence[Row], path: str, axis: str) -> None:
    """Tax against T with a panel for each size, or against d of the square layers with one for each T; logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    def place_of(row: Row) -> int:
        return row.tokens if axis == "tokens" else row.in_features

    def panel_of(row: Row) -> tuple:
        return (row.in_features, row.out_features) if axis == "tokens" else (row.tokens,)

    if axis == "size":
        rows = [row for row in rows if row.in_features == row.out_features]
    panels = sorted({panel_of(row) for row in rows})
    bands = [(dtype, phase) for dtype in dict.fromkeys(row.dtype for row in rows) for phase in PHASES]
    methods = list(dict.fromkeys(row.method for row in rows))
    size = (max((3.1 if len(panels) < 5 else 2.4) * len(panels) + 0.8, 4.5), 2.7 * len(bands) + 1.2)
    figure, grid = plt.subplots(
        len(bands), len(panels), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (dtype, phase), across in zip(bands, grid, strict=True):
        across[0].set_ylabel(f"{phase} tax, {dtype}")
        for panel, axes in zip(panels, across, strict=True):
            axes.axhline(1, color="0.6", linewidth=0.8)
            axes.set(xscale="log", yscale="log")
            axes.spines[["top", "right"]].set_visible(False)
            for (library, _), style in zip(LIBRARIES, ("o-", "x--"), strict=True):
                for index, method in enumerate(methods):
                    key = (library, method, dtype, panel)
                    points = sorted(
                        (place_of(row), tax(row, phase))
                        for row in rows
                        if (row.library, row.method, row.dtype, panel_of(row)) == key and tax(row, phase) is not None
                    )
                    if points:
                        axes.plot(*zip(*points, strict=True), style, color=f"C{index}", markersize=4)
        across[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        across[0].yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    for panel, top, bottom in zip(panels, grid[0], grid[-1], strict=True):
        top.set_title("→".join(map(str, panel)) if axis == "tokens" else f"T = {panel[0]}")
        bottom.set_xlabel("T" if axis == "tokens" else "d")
    ticks = sorted({place_of(row) for row in rows})
    grid[0][0].set_xticks(ticks, map(str, ticks))
    for axes in grid[-1]:
        axes.tick_params("x", rotation=0 if axis == "tokens" else 45)
    grid[0][0].xaxis.minorticks_off()
    marks = [Line2D([], [], color=f"C{index}", label=method) for index, method in enumerate(methods)]
    marks += [
        Line2D([], [], color="0.3", marker=marker, linestyle=dashes, label=title)
        for (library, title), marker, dashes in zip(LIBRARIES, "ox", ("-", "--"), strict=True)
        if any(row.library == library for row in rows)
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=int(size[0] / 2.2), frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
