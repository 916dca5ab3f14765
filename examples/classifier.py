"""The model that every method trains: a sentence encoder with a linear head, its batches, a step, the floor."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import InputError, Row, Split
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

MAX_TOKENS = 128


@dataclass(frozen=True)
class Settings:
    methods: list[str]
    steps: int
    batch_size: int
    model: Path
    data: Path | None
    seed: int
    out: Path


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


# -------------------------------------------------------------------------------- scores and a step


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


def training_step(model: Classifier, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, Tensor]:
    optimizer.zero_grad()
    scores = model(batch.inputs)
    loss = F.binary_cross_entropy_with_logits(scores, batch.labels)
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item(), scores.detach()


# ---------------------------------------------------------------------------------------- the floor


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
