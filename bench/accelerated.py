"""What fastpeft.accelerate makes of PEFT's layers: PEFT's own, the same accelerated, and ours, over the frozen layer.

    python bench/accelerated.py            # below three minutes; an idle machine
    python bench/accelerated.py --methods boft-b8m4 --sizes 4096x4096 --tokens 1 --dtypes float32 --json figures.json

Layers are timed as in tax.py: two calls take turns, and a figure is the ratio of two medians of one pair; what PEFT's
layer costs over the accelerated one is the ratio of their taxes. All three have the same numbers, read from the file
that PEFT writes, and their outputs are held against the formula in float64 beforehand. So are the logits of a small
Llama, one token of which is then computed behind a prompt whose keys and values are cached. Compiled by torch.compile
are stacks of our layers. Last, `accelerate` takes over a PEFT model of seven billion parameters that has shapes alone.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import tables
import torch
from layers import METHODS, build_both, build_fastpeft, error_limit, exact_of, output_error
from tax import find_peft, forward, in_turn, parse_count, parse_methods, parse_size, training_step
from torch import Tensor, nn

import fastpeft

KINDS = ("PEFT", "accelerated", "fastpeft")
RATIOS = ("PEFT / accelerated", "accelerated / fastpeft")
LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8,
         "vocab_size": 2000}  # fmt: skip
SEVEN_BILLION = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "vocab_size": 32000}  # fmt: skip
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT, COMPILED_TOKENS, STACKED = 32, 16, 6
COMPILED_HEADING = ("compiled / eager", "T", "forward", "training", "frozen: forward", "training")
TAKE_OVERS = 5

# ---------------------------------------------------------------------- layers


@dataclass
class Row:
    """One method at one size and T. Taxes and errors are by kind of layer."""

    method: str
    dtype: str
    in_features: int
    out_features: int
    tokens: int
    errors: dict[str, float]  # see layers.output_error
    limit: float
    forward: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    forward_over_ours: float | None = None  # of the accelerated layer, in a pair of their own
    training_over_ours: float | None = None

    @property
    def right(self) -> bool:
        return all(error <= self.limit for error in self.errors.values())  # not so for a NaN


def measure(
    name: str, size: tuple[int, int], tokens: Sequence[int], dtype: torch.dtype, peft: ModuleType
) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    base = nn.Linear(*size, dtype=dtype).requires_grad_(False)
    theirs, ours = build_both(name, base, peft)
    formula = exact_of(ours)
    shared = {id(tensor): tensor for tensor in base.parameters()}
    accelerated = copy.deepcopy(theirs, shared)
    fastpeft.accelerate(accelerated, strict=True)
    built = dict(zip(KINDS, (theirs, accelerated, ours), strict=True))
    x, grad = (torch.randn(max(tokens), d, generator=generator).to(dtype) for d in size)
    title = METHODS[name].title
    if name.startswith("boft"):  # all that PEFT has on a CPU
        title = f"{title.rpartition(' ')[0]} m1"
    for t in tokens:
        rows = sorted({0, t // 3, 2 * t // 3, t - 1})
        exact = formula(x[rows], grad[rows])
        errors = {kind: output_error(layer, x[:t], grad[:t], rows, exact) for kind, layer in built.items()}
        row = Row(title, str(dtype).removeprefix("torch."), *size, t, errors, error_limit(dtype, max(size)))
        if row.right:
            measure_layers(row, built, base, x[:t], grad[:t])
        yield row
    del theirs, accelerated, built  # PEFT's BOFT holds several matrices of W's size and more
    gc.collect()


def measure_layers(row: Row, built: dict[str, nn.Module], base: nn.Linear, x: Tensor, grad: Tensor) -> None:
    """Fills in what the layers cost."""
    for phase in tables.PHASES:

        def timed(layer: nn.Module, phase: str = phase) -> Callable[[], float]:
            return forward(layer, x) if phase == "forward" else training_step(layer, x, grad)

        with torch.set_grad_enabled(phase == "training"):
            for kind, layer in built.items():
                frozen, adapted, _ = in_turn(timed(base), timed(layer))
                getattr(row, phase)[kind] = adapted / frozen
            ours, accelerated, _ = in_turn(timed(built["fastpeft"]), timed(built["accelerated"]))
        setattr(row, f"{phase}_over_ours", accelerated / ours)


def header() -> list[str]:
    columns = [f"{phase}: PEFT" if kind == "PEFT" else kind for phase in tables.PHASES for kind in (*KINDS, *RATIOS)]
    return tables.heading("layer", "T", "method", *columns)


def body(row: Row) -> str:
    cells = [f"{row.in_features}→{row.out_features}", str(row.tokens), row.method]
    for phase in tables.PHASES:
        taxes = getattr(row, phase)
        if not row.right:
            cells += ["right" if row.errors[kind] <= row.limit else "wrong" for kind in KINDS] + ["–", "–"]
            continue
        gain = taxes["PEFT"] / taxes["accelerated"]
        cells += [*(f"{taxes[kind]:.2f}" for kind in KINDS), f"{gain:.1f}", f"{getattr(row, f'{phase}_over_ours'):.2f}"]
    return tables.line(cells)


# ---------------------------------------------------------------------- a generated token


@dataclass
class Token:
    """Seconds are medians, each of a pair with the frozen model's."""

    errors: dict[str, float]  # of the logits, root mean square over PEFT's own
    taxes: dict[str, float]
    over_ours: float | None = None  # of the accelerated model, in a pair of their own
    peft_over_accelerated: float | None = None

    @property
    def right(self) -> bool:
        return all(error <= 2 for error in self.errors.values())


def llama_models(peft: ModuleType, sizes: dict[str, int]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A frozen Llama of random weights, and one of each kind with a LoRA of rank 16 on all of its layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    frozen: Any = LlamaForCausalLM(LlamaConfig(**sizes)).eval().requires_grad_(False)
    shared = {id(tensor): tensor for tensor in [*frozen.parameters(), *frozen.buffers()]}
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(frozen, dict(shared)), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    accelerated = copy.deepcopy(theirs, dict(shared))
    fastpeft.accelerate(accelerated, strict=True)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = fastpeft.load_adapter(copy.deepcopy(frozen, dict(shared)), folder).eval()
    return frozen, dict(zip(KINDS, (theirs, accelerated, ours), strict=True))


@torch.no_grad()
def next_token(model: Any, prompt: Tensor, token: Tensor) -> tuple[Tensor, Callable[[], float]]:
    """The logits of the token behind a prompt, and the seconds of computing it, again and again."""
    cache = model(input_ids=prompt, use_cache=True).past_key_values

    def logits() -> Tensor:
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    def call() -> float:
        cache.crop(-1)
        start = time.perf_counter()
        logits()
        return time.perf_counter() - start

    return logits(), call


def measure_token(peft: ModuleType, sizes: dict[str, int]) -> Token:
    frozen, models = llama_models(peft, sizes)
    generator = torch.Generator().manual_seed(1)
    prompt, token = (torch.randint(sizes["vocab_size"], (1, n), generator=generator) for n in (PROMPT, 1))
    found = {kind: next_token(model, prompt, token) for kind, model in models.items()}
    exact, _ = next_token(copy.deepcopy(models["PEFT"]).double(), prompt, token)
    distances = {kind: (logits.double() - exact).square().mean().sqrt() for kind, (logits, _) in found.items()}
    result = Token({kind: float(distance / distances["PEFT"]) for kind, distance in distances.items()}, {})
    if result.right:
        with torch.no_grad():
            _, step = next_token(frozen, prompt, token)
            for kind, (_, call) in found.items():
                base, adapted, _ = in_turn(step, call)
                result.taxes[kind] = adapted / base
            ours, accelerated, _ = in_turn(found["fastpeft"][1], found["accelerated"][1])
            result.over_ours = accelerated / ours
            accelerated, theirs, _ = in_turn(found["accelerated"][1], found["PEFT"][1])
            result.peft_over_accelerated = theirs / accelerated
    return result


def token_lines(token: Token) -> list[str]:
    lines = tables.heading("a token of Llama", *KINDS, *RATIOS)
    if not token.right:
        return [*lines, tables.line(["LoRA r16", *(f"errs {token.errors[kind]:.1f}" for kind in KINDS), "–", "–"])]
    ratios = (tables.shown(token.peft_over_accelerated, ".2f"), tables.shown(token.over_ours, ".2f"))
    return [*lines, tables.line(["LoRA r16", *(f"{token.taxes[kind]:.2f}" for kind in KINDS), *ratios])]


# ---------------------------------------------------------------------- compiled


@dataclass
class Compiled:
    """The time of six compiled layers of ours in a row, or of one where they do not fit together, over the time of the
    same layers as they are; and the same of frozen ones, which is what PyTorch asks for compiling them."""

    method: str
    tokens: int
    error: float
    limit: float
    forward: float | None = None
    training: float | None = None
    frozen_forward: float | None = None
    frozen_training: float | None = None

    @property
    def right(self) -> bool:
        return self.error <= self.limit


def measure_compiled(name: str, size: tuple[int, int], tokens: int) -> Compiled:
    torch.manual_seed(0)
    base = nn.Linear(*size).requires_grad_(False)
    ours, formula = build_fastpeft(name, base)
    torch._dynamo.reset()
    compiled: Any = torch.compile(ours, fullgraph=True)
    x, grad = (torch.randn(tokens, d) for d in size)
    error = output_error(compiled, x, grad, range(tokens), formula(x, grad))
    result = Compiled(METHODS[name].title, tokens, error, error_limit(torch.float32, max(size)))
    if result.right:
        depth = STACKED if size[0] == size[1] else 1
        bases = [nn.Linear(*size).requires_grad_(False) for _ in range(depth)]
        stack = nn.Sequential(*(build_fastpeft(name, base)[0] for base in bases))
        result.forward, result.training = compiled_over_eager(stack, x, grad)
        result.frozen_forward, result.frozen_training = compiled_over_eager(nn.Sequential(*bases), x, grad)
    return result


def compiled_over_eager(model: nn.Module, x: Tensor, grad: Tensor) -> tuple[float, float]:
    """Forward without gradients, and a training step."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        eager, fast, _ = in_turn(forward(model, x), forward(compiled, x))
    eager_step, fast_step, _ = in_turn(training_step(model, x, grad), training_step(compiled, x, grad))
    return fast / eager, fast_step / eager_step


def compiled_line(row: Compiled) -> str:
    values = (row.forward, row.training, row.frozen_forward, row.frozen_training)
    figures = [tables.shown(value, ".2f") if row.right else "wrong" for value in values]
    return tables.line([row.method, str(row.tokens), *figures])


# ---------------------------------------------------------------------- a large model


def take_over(peft: ModuleType, sizes: dict[str, int]) -> tuple[int, float]:
    """How many layers of a Llama on the meta device `accelerate` takes over, and the median of the seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = peft.get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), peft.LoraConfig(target_modules=LINEAR))
    seconds = []
    for _ in range(TAKE_OVERS):
        start = time.perf_counter()
        report = fastpeft.accelerate(model, strict=True)
        seconds.append(time.perf_counter() - start)
        fastpeft.decelerate(model)
    return len(report.accelerated), statistics.median(seconds)


# ---------------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", type=parse_methods, help=", ".join(METHODS))
    parser.add_argument("--sizes", nargs="+", type=parse_size, metavar="INxOUT", default=[(768, 768)])
    parser.add_argument("--tokens", nargs="+", type=parse_count, metavar="T", default=[1, 16, 512], help="rows of x")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"],
                        help="of base, inputs and outputs; adapters are float32")  # fmt: skip
    parser.add_argument("--threads", type=parse_count, default=2)
    parser.add_argument("--json", metavar="FILE", help="write all figures and the settings")
    arguments = parser.parse_args(argv)
    given = [name for family in arguments.methods or [["lora-r16", "boft-b8m4", "fourierft"]] for name in family]
    if "mos" in given:
        parser.error("PEFT has no MoS")
    arguments.methods = list(dict.fromkeys(given))
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    peft = find_peft()
    if peft is None:
        return 2
    record: dict[str, Any] = {
        "settings": {key: getattr(arguments, key) for key in ("methods", "sizes", "tokens", "dtypes", "threads")}
    }
    rows: list[Row] = []
    for dtype in arguments.dtypes:
        print(dtype, "", *header(), sep="\n", flush=True)
        for size in arguments.sizes:
            for name in arguments.methods:
                for row in measure(name, size, arguments.tokens, getattr(torch, dtype), peft):
                    rows.append(row)
                    print(body(row), flush=True)
        print()
    token = measure_token(peft, LLAMA)
    print(*token_lines(token), "", *tables.heading(*COMPILED_HEADING), sep="\n", flush=True)
    compiled = []
    for name in arguments.methods:
        compiled.append(measure_compiled(name, arguments.sizes[0], COMPILED_TOKENS))
        print(compiled_line(compiled[-1]), flush=True)
    layers, seconds = take_over(peft, SEVEN_BILLION)
    print(f"\naccelerate takes over {layers} layers of a Llama of seven billion parameters in {seconds:.2f} s.\n")
    print(tables.setting(peft))
    if arguments.json:
        record["rows"] = [asdict(row) for row in rows]
        record["token"] = asdict(token)
        record["compiled"] = [asdict(row) for row in compiled]
        record["accelerate"] = {"layers": layers, "seconds": seconds}
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if all(figure.right for figure in (*rows, token, *compiled)) else 1


if __name__ == "__main__":
    sys.exit(main())
