"""The report of the example: the table on the terminal, in Markdown and JSON, and a chart."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import cost
import torch
from classifier import Job

COLUMNS = (
    "method", "library", "accuracy", "parameters", "on disk", "s/step", "sentence", "peak",
    "reload", "merge",
)  # fmt: skip


@dataclass
class Result:
    """One row of the table; what was not measured stays None."""

    method: str
    library: str
    accuracy: float | None = None
    parameters: int | None = None
    disk_bytes: int | None = None
    step_seconds: float | None = None
    latency_ms: float | None = None
    peak_mb: float | None = None
    checks: dict[str, Any] = field(default_factory=dict)


def cells(result: Result, floor: float) -> list[str]:
    """One row of the table as text."""
    gain = f" ({100 * (result.accuracy - floor):+.1f})" if result.accuracy and result.checks else ""
    reload = merge = "–"
    if result.checks:
        reload = "equal" if result.checks["reload_equal"] else "DIFFERS"
        close = result.checks["merge_equal"] and result.checks["unmerge_equal"]
        merge = f"{result.checks['merge_difference']:.0e}" if close else "DIFFERS"
    return [
        result.method,
        result.library,
        shown(result.accuracy, "{:.1%}" + gain),
        shown(result.parameters, "{:,}"),
        shown(result.disk_bytes, "{:,}"),
        shown(result.step_seconds, "{:.3f}"),
        shown(result.latency_ms, "{:.2f} ms"),
        shown(result.peak_mb, "{:.0f} MB"),
        reload,
        merge,
    ]


def shown(value: float | None, pattern: str) -> str:
    return "–" if value is None else pattern.format(value)


def aligned(rows: Sequence[Sequence[str]], edge: str = "", gap: str = "  ") -> list[str]:
    """Rows as lines of equally wide columns: the first two to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        edge + gap.join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(row)) + edge
        for row in rows
    ]


def notes(results: Sequence[Result], job: Job) -> list[str]:
    held_out = len(job.split.held_out)
    spread = 100 * math.sqrt(0.8 * 0.2 / held_out)
    lines = [
        f"accuracy: on {held_out} held-out rows (standard error about {spread:.1f} points); "
        "in brackets the points above the frozen encoder with a linear head",
        "parameters, on disk (bytes): the adapter alone; the linear head is the same for all",
        f"s/step: median of up to {cost.TIMED_STEPS} steps of {job.settings.batch_size} "
        "rows; sentence: median time of one held-out sentence; libraries take turns in both",
        "peak: bytes that tensors hold at the peak of a training step beyond those held before it",
        "reload: logits after saving and loading into a fresh model, compared bit for bit; "
        "merge: largest difference of logits after merging, within float32 rounding",
    ]
    beside = {result.method for result in results if result.library == "PEFT"}
    if cost.peft is None:
        lines.append("PEFT is not installed, so its rows are empty: pip install peft")
    elif beside:
        lines.append("PEFT's models are timed on the same batches, but not trained: no accuracy")
    if cost.peft is not None and "BOFT" in beside:
        lines.append(
            "PEFT's BOFT was asked for 2 butterfly factors as fastpeft's, but computes 1: it sets "
            "boft_n_butterfly_factor to 1 where its CUDA helper does not build, as on a CPU"
        )
    return lines


def write_report(results: list[Result], job: Job) -> None:
    """The table on the terminal; table.md, table.json and costs.png in the output folder."""
    settings, floor = job.settings, results[0].accuracy or 0.0
    table = [list(COLUMNS), *(cells(result, floor) for result in results)]
    remarks = notes(results, job)
    print("\n" + "\n".join([*aligned(table), "", *remarks]))

    rule = ["---" if i < 2 else "---:" for i in range(len(COLUMNS))]
    markdown = aligned([table[0], rule, *table[1:]], edge="|", gap="|")
    text = "\n".join([*markdown, "", *(f"- {remark}" for remark in remarks)]) + "\n"
    (settings.out / "table.md").write_text(text, encoding="utf-8")
    record = {
        "settings": {key: jsonable(value) for key, value in asdict(settings).items()},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "data": {
            "training": len(job.split.train),
            "held_out": len(job.split.held_out),
            "groups": job.split.groups,
        },
        "rows": [asdict(result) for result in results],
        "notes": remarks,
    }
    (settings.out / "table.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    chart(results, settings.out / "costs.png")
    print(f"\nIn {settings.out}: table.md, table.json, costs.png, each method's adapter and head")


def jsonable(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fastpeft", "torch", "transformers", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def chart(results: Sequence[Result], path: Path) -> None:
    """Seconds per training step and milliseconds per sentence, fastpeft beside PEFT."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = list(dict.fromkeys(result.method for result in results[1:]))
    figure, panels = plt.subplots(1, 2, figsize=(11, 1.6 + 0.9 * len(titles)), layout="constrained")
    for panel, column, label in (
        (panels[0], "step_seconds", "seconds per training step"),
        (panels[1], "latency_ms", "milliseconds for one sentence"),
    ):
        for library, color, offset in (("fastpeft", "#0b6e4f", -0.19), ("PEFT", "#c8553d", 0.19)):
            points = {
                titles.index(result.method) + offset: getattr(result, column)
                for result in results
                if result.library == library and getattr(result, column) is not None
            }
            bars = panel.barh(list(points), list(points.values()), 0.36, color=color, label=library)
            panel.bar_label(bars, fmt=lambda value: f"{value:.3g}", padding=4)
        if column == "latency_ms":
            frozen = results[0].latency_ms
            panel.axvline(frozen, color="0.35", linestyle="--", label="frozen encoder")
        panel.set(xscale="log", xlabel=f"{label} (log scale)")
        for set_formatter in (panel.xaxis.set_major_formatter, panel.xaxis.set_minor_formatter):
            set_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "125" else "")  # 0.5, not 5 × 10⁻¹
        panel.set_yticks(range(len(titles)), titles)
        panel.margins(x=0.2)
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
