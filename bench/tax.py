"""The adapter tax: the time of an adapted layer over the time of its frozen ``nn.Linear``, beside PEFT's.

    python bench/tax.py                                  # LoRA, MoS, BOFT and FourierFT on a small grid
    python bench/tax.py --sizes 4096x4096 --tokens 1 16  # in x out, rows of x
    python bench/tax.py --json tax.json --markdown tax.md

All layers of a row run in one process and in turn, base, ours, PEFT's, base, …, so whatever else the machine does falls
on all of them alike; a figure is a ratio of medians. Forward runs under no_grad in eval mode. Training is forward and
backward with the adapter's gradients and x's; the base does forward and x's gradient. Every layer is first held
against the reference in float64, and a wrong one gets no figures.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft

try:
    import peft
except ImportError:
    peft = None

ROUNDS = 15
PATIENCE = 4.0  # seconds that one layer may take in one cell, once it has run three times

# MoS as one of 32 layers that share their pools; its pool is drawn for that many, and one of them is timed.
MOS_LAYERS = 32


@dataclass(frozen=True)
class Method:
    title: str
    config: Callable[[Any], Any]  # of fastpeft or peft
    in_peft: bool = True


METHODS = {
    "lora": Method("LoRA r16", lambda lib: lib.LoraConfig(r=16, lora_alpha=16, target_modules=["layer"])),
    "mos": Method(
        "MoS r8 e2 l4 p1",
        lambda lib: lib.MosConfig(r=8, pool_rank=2, shards_per_vector=4, private_rank=1, target_modules=["layer"]),
        in_peft=False,
    ),
    "boft": Method(
        "BOFT b8 m2",  # PEFT sets m to 1 where its CUDA helper does not build, as on every CPU
        lambda lib: lib.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=["layer"]),
    ),
    "fourierft": Method("FourierFT n1000", lambda lib: lib.FourierFTConfig(n_frequency=1000, target_modules=["layer"])),
}


@dataclass
class Row:
    method: str
    library: str
    in_features: int
    out_features: int
    tokens: int
    forward_tax: float | None
    training_tax: float | None
    rounds: int
    error: float  # of the output, relative to its largest entry


def hollow(linear: nn.Linear) -> nn.Linear:
    """A layer of the same sizes whose weight is one number in memory."""
    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(()).expand_as(linear.weight), requires_grad=False)
    return layer


class Holder(nn.Module):
    """A model of one layer; for MoS of many, of which the first is used."""

    def __init__(self, linear: nn.Linear, copies: int = 0) -> None:
        super().__init__()
        self.layer = linear
        self.others = nn.ModuleList(nn.ModuleDict({"layer": hollow(linear)}) for _ in range(copies))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def build_fastpeft(method: str, linear: nn.Linear) -> nn.Module:
    model = Holder(linear, MOS_LAYERS - 1 if method == "mos" else 0)
    return fastpeft.adapt(model, METHODS[method].config(fastpeft))


def build_peft(method: str, linear: nn.Linear) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return peft.get_peft_model(Holder(linear), METHODS[method].config(peft))


@torch.no_grad()
def stir(model: nn.Module, seed: int) -> None:
    """Takes adapters off their start, where B, R and the spectrum are zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def output_error(model: nn.Module, x: Tensor) -> float:
    """Against the reference in float64, for our layers; PEFT is its own authority."""
    exact_model = copy.deepcopy(model).double().eval()
    with torch.no_grad(), fastpeft.use_backend("reference"):
        exact = exact_model(x.double())
    with torch.no_grad():
        return float((model.eval()(x).double() - exact).abs().max() / exact.abs().max())


def forward(model: nn.Module, x: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        start = time.perf_counter()
        model(x)
        return time.perf_counter() - start


def training_step(model: nn.Module, x: Tensor, grad: Tensor) -> float:
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    leaf = x.clone().requires_grad_()
    start = time.perf_counter()
    model(leaf).backward(grad)
    return time.perf_counter() - start


def measure(models: dict[str, nn.Module], x: Tensor, grad: Tensor) -> dict[str, tuple[float, float, int]]:
    """Median seconds of a forward and of a training step of each model, and how many were timed."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    spent = dict.fromkeys(models, 0.0)
    for _ in range(ROUNDS + 2):
        for name, model in models.items():
            if spent[name] > PATIENCE and len(times[name]) >= 3:
                continue
            took = forward(model, x), training_step(model, x, grad)
            times[name].append(took)
            spent[name] += sum(took)
    result = {}
    for name, taken in times.items():
        timed = taken[2:] if len(taken) > 3 else taken[1:]  # the first ones warm up
        result[name] = (*(statistics.median(column) for column in zip(*timed, strict=True)), len(timed))
    return result


def run_cell(methods: list[str], d_in: int, d_out: int, tokens: int, dtype: torch.dtype) -> list[Row]:
    generator = torch.Generator().manual_seed(tokens)
    linear = nn.Linear(d_in, d_out).to(dtype).requires_grad_(False)
    x, grad = (torch.randn(tokens, d, generator=generator).to(dtype) for d in (d_in, d_out))
    models: dict[str, nn.Module] = {"base": Holder(linear)}
    errors = {}
    for method in methods:
        models[f"fastpeft {method}"] = ours = build_fastpeft(method, copy.deepcopy(linear))
        stir(ours, seed=1)
        errors[f"fastpeft {method}"] = output_error(ours, x)
        if peft is not None and METHODS[method].in_peft:
            models[f"peft {method}"] = theirs = build_peft(method, copy.deepcopy(linear))
            stir(theirs, seed=1)
            errors[f"peft {method}"] = 0.0
    # Products of d terms in random order err by about sqrt(d) roundings at worst.
    limit = 4 * torch.finfo(dtype).eps * max(d_in, d_out) ** 0.5
    base_forward, base_training, _ = (measured := measure(models, x, grad))["base"]
    rows = []
    for name, error in errors.items():
        library, method = name.split()
        forward_time, training_time, rounds = measured[name]
        right = error <= limit
        rows.append(
            Row(
                METHODS[method].title,
                library,
                d_in,
                d_out,
                tokens,
                forward_time / base_forward if right else None,
                training_time / base_training if right else None,
                rounds,
                error,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each cell and method, ours beside PEFT's."""
    lines = [
        "| layer | T | method | fastpeft forward | training | PEFT forward | training | PEFT / ours | training |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    theirs = {(r.method, r.in_features, r.out_features, r.tokens): r for r in rows if r.library == "peft"}
    for row in rows:
        if row.library != "fastpeft":
            continue
        other = theirs.get((row.method, row.in_features, row.out_features, row.tokens))
        ours = (row.forward_tax, row.training_tax)
        peft_tax = (other.forward_tax, other.training_tax) if other else (None, None)
        gain = [b / a if a and b else None for a, b in zip(ours, peft_tax, strict=True)]
        cells = [*(show(v, ".2f") for v in ours), *(show(v, ".2f") for v in peft_tax), *(show(v, ".1f") for v in gain)]
        size = f"{row.in_features}→{row.out_features}"
        lines.append(f"| {size} | {row.tokens} | {row.method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def show(value: float | None, style: str) -> str:
    return "–" if value is None else format(value, style)


def parse_size(text: str) -> tuple[int, int]:
    try:
        d_in, d_out = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected IN x OUT such as 768x768, got {text!r}") from None
    if min(d_in, d_out) < 1:
        raise argparse.ArgumentTypeError(f"sizes must be positive, got {text!r}")
    return d_in, d_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(768, 768), (1024, 1024), (4096, 4096)])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--markdown", help="write the table to this file")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    rows = []
    for d_in, d_out in arguments.sizes:
        for tokens in arguments.tokens:
            cell = run_cell(arguments.methods, d_in, d_out, tokens, dtype)
            print(table(cell).partition("\n")[2].partition("\n")[2] if rows else table(cell), flush=True)
            rows += cell
    versions = f"torch {torch.__version__}, PEFT {peft.__version__ if peft else 'not installed'}"
    print(f"{arguments.dtype}, {arguments.threads} threads, {versions}, {platform.machine()}")
    if arguments.markdown:
        with open(arguments.markdown, "w", encoding="utf-8") as file:
            file.write(table(rows) + "\n")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump([asdict(row) for row in rows], file, indent=1)


if __name__ == "__main__":
    main()
