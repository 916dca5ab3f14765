"""What the tests of the example's service share: a small random Llama, adapters of every method, a running engine."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("python_multipart")
pytest.importorskip("httpx")
pytest.importorskip("openai")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
import uvicorn
from helpers import BOFT, FOURIERFT, LORA, MOS, fill
from service.api import Service, create_app
from service.engine import Engine, Event, Request
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import fastpeft
from fastpeft.serving import AdapterBank

LENGTH = 64
CONFIGS = {
    "lora": LORA.config(target_modules="all-linear"),
    "mos": MOS.config(target_modules="all-linear"),
    "boft": BOFT.config(target_modules="all-linear"),
    "fourierft": FOURIERFT.config(target_modules="all-linear"),
}


def llama() -> LlamaForCausalLM:
    """In float64, so that no tie between tokens is decided by rounding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=None, eos_token_id=258,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval().requires_grad_(False)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<|im_start|>", "pad_token": "<pad>", "eos_token": "<|im_end|>"})
    fast.chat_template = "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}\n{% endfor %}a:"
    return fast


@contextlib.contextmanager
def running(folders: dict[str, Path], resident: int = 16, **options: Any) -> Iterator[Engine]:
    model = llama()
    bank = AdapterBank(model, max_resident=resident, max_resident_bytes=1 << 22, max_rank=8, timeout=0)
    for name, folder in folders.items():
        bank.register(name, folder)
    engine = Engine(model, bank, **{"max_rows": 4, "max_length": LENGTH, **options})
    try:
        yield engine
    finally:
        engine.stop()
        assert bank.stats()["in_use"] == 0  # nothing is held when all have ended
        bank.close()


class Asked:
    """A request and what came of it."""

    def __init__(self, prompt: list[int], count: int, adapter: str | None = None, **options: Any) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.request = Request(prompt, count, self.events.put, adapter, **options)

    def tokens(self) -> tuple[list[int], str | None]:
        found = []
        while True:
            event = self.events.get(timeout=20)
            if event.error is not None:
                raise event.error
            if event.token is not None:
                found.append(event.token)
            if event.finish is not None:
                return found, event.finish


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@contextlib.contextmanager
def listening(service: Service) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def save_all(root: Path) -> dict[str, Path]:
    """An adapter of every method, each in a folder."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        fastpeft.save_adapter(fill(fastpeft.adapt(llama(), config), seed), root / name)
    return {name: root / name for name in CONFIGS}


def oracle(folders: dict[str, Path]) -> Callable[..., list[int]]:
    """Greedy tokens of a model that holds the adapter, without a cache or other requests."""
    held = {name: fastpeft.load_adapter(llama(), folder) for name, folder in folders.items()}
    held[None] = llama()

    @torch.no_grad()
    def generate(prompt: list[int], count: int, adapter: str | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = held[adapter](input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

    return generate
