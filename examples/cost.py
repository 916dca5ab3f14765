"""What a method costs: seconds of steps and sentences, bytes at a step's peak; PEFT's models beside."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from classifier import Classifier, Job, training_step
from torch.profiler import ProfilerActivity, profile

try:
    import peft
except ImportError:
    peft = None

TIMED_STEPS, TIMED_SENTENCES = 7, 50  # at most: see take_turns


def peft_model(config: Any, job: Job) -> Classifier:
    """PEFT's adapter of that configuration on a fresh encoder."""
    model = job.fresh_model()
    # For more than one butterfly factor PEFT's BOFT needs a CUDA helper, which it tries to compile
    # once per layer. On the CPU it could not run: this skips the attempts, not their outcome.
    with (
        warnings.catch_warnings(),
        mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None),
    ):
        warnings.simplefilter("ignore")
        model.encoder = peft.get_peft_model(model.encoder, config)
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
