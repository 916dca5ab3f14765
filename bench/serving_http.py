"""What bench/serving.py measures of a whole model: adapters that come in, and the service of examples/serve.py."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import importlib
import json
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from layers import METHODS
from serving_layers import MIXES, title_of
from torch import Tensor, nn

import fastpeft
from fastpeft.files import TENSORS
from fastpeft.serving import AdapterBank

EXAMPLES = Path(__file__).parents[1] / "examples"
RANDOM = {"vocab_size": 259, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
          "initializer_range": 0.2}  # fmt: skip
SERVED = MIXES["mix-small"]  # what clients' adapters are of, in turn
PROMPT = 16  # tokens
LOADS = 15
WARM_UP, ROUNDS = 2, 15
TIE = 1e-3  # of the logits' spread: two tokens so near are decided by rounding
START_SECONDS = 120

# ---------------------------------------------------------------------- a model and its adapters


def random_model(folder: Path) -> Path:
    """A small Llama of random weights, and a tokenizer with a token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**RANDOM, bos_token_id=None, eos_token_id=258)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"bos_token": "<begin>", "pad_token": "<pad>", "eos_token": "<end>"})
    fast.save_pretrained(folder)
    return folder


def load_model(chosen: str, root: Path) -> tuple[nn.Module, Any, str, list[str]]:
    """Model, tokenizer, its name, and what tells examples/serve.py of it. chosen: smollm2, random, or a folder."""
    sys.path.insert(0, str(EXAMPLES))
    import serve
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()
    if chosen == "random":
        chosen = str(random_model(root / "random"))
    folder = None if chosen == "smollm2" else Path(chosen)
    return *serve.load(folder), ["--out", str(root)] if folder is None else ["--model", chosen]


def twin(frozen: nn.Module) -> nn.Module:
    """A copy with the very same weights."""
    return copy.deepcopy(frozen, {id(tensor): tensor for tensor in [*frozen.parameters(), *frozen.buffers()]})


def write_adapter(frozen: nn.Module, kind: str, folder: Path) -> None:
    """An adapter for every layer, random, which changes what the model says."""
    config = replace(METHODS[kind].config(fastpeft), target_modules="all-linear")
    model = fastpeft.adapt(twin(frozen), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in fastpeft.adapter_parameters(model):
            spread = 1.0 if kind == "fourierft" else 0.02
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    fastpeft.save_adapter(model, folder)


# ---------------------------------------------------------------------- adapters come in


@dataclass
class Load:
    """An adapter of a whole model into a bank, its file in the page cache. Kinds take turns."""

    method: str
    file_bytes: int
    bytes: int  # in the bank
    expanded_bytes: int  # where every layer has matrices of its own
    load: float  # seconds, median, where the bank has another one of the kind
    least: float
    first: float  # where it has none
    register: float  # median


def measure_loads(model: nn.Module, folders: Mapping[str, Path]) -> list[Load]:
    """The bank is given back."""
    bank = AdapterBank(model)
    firsts, sizes = {}, {}
    for kind, folder in folders.items():
        firsts[kind] = loading(bank, kind, folder)
        (sizes[kind],) = bank.stats()["methods"].values()
        bank.unload(kind)
    for kind, folder in folders.items():
        bank.load(f"{kind}-stays", folder)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in folders}
    for _ in range(1 + LOADS):
        for kind, folder in folders.items():
            start = time.perf_counter()
            bank.register(kind, folder)
            seconds[kind].append((time.perf_counter() - start, loading(bank, kind, folder)))
            bank.unload(kind)
    bank.close()
    loads = []
    for kind, folder in folders.items():
        register, load = zip(*seconds[kind][1:], strict=True)
        loads.append(
            Load(
                title_of(kind), (folder / TENSORS).stat().st_size, sizes[kind]["bytes"], sizes[kind]["expanded_bytes"],
                statistics.median(load), min(load), firsts[kind], statistics.median(register),
            )
        )  # fmt: skip
    return loads


def loading(bank: AdapterBank, name: str, folder: Path) -> float:
    start = time.perf_counter()
    bank.load(name, folder)
    return time.perf_counter() - start


# ---------------------------------------------------------------------- the service


@dataclass
class Traffic:
    """Clients that ask at once, with an adapter each or without; both in turn. Medians over the rounds."""

    clients: int
    tokens_per_second: float = 0.0
    base_tokens_per_second: float = 0.0
    first: float = 0.0  # seconds to a request's first token
    base_first: float = 0.0
    rounds: int = 0
    wrong: list[str] = field(default_factory=list)  # what was answered otherwise than the model answers

    @property
    def right(self) -> bool:
        return not self.wrong

    @property
    def ratio(self) -> float | None:
        return self.tokens_per_second / self.base_tokens_per_second if self.rounds else None


class Reply(NamedTuple):
    first: float  # seconds
    tokens: int
    text: str


@contextlib.contextmanager
def service(options: Sequence[str], adapters: Mapping[str, Path], rows: int) -> Iterator[int]:
    """The port of examples/serve.py in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [part for name, folder in adapters.items() for part in ("--adapter", f"{name}={folder}")]
    sizes = ["--rows", str(rows), "--max-resident", str(max(64, 2 * rows)), "--shutdown", "1"]
    command = [sys.executable, str(EXAMPLES / "serve.py"), "--port", str(port), *options, *sizes, *given]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the service did not start: {' '.join(command)}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def listens(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


async def ask(port: int, model: str, prompt: Sequence[int], tokens: int) -> Reply:
    """One request by hand, whose answer is streamed: a client library would take more time than the service's HTTP."""
    body = json.dumps(
        {
            "model": model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()  # fmt: skip
    head = f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    first, made, text = None, 0, ""
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the service answered {status!r} {await reader.read()!r}")
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the service answered {event['error']}")
            if event["choices"]:
                first = first or time.perf_counter() - start
                text += event["choices"][0]["text"]
            else:
                made = event["usage"]["completion_tokens"]
    writer.close()
    return Reply(first or time.perf_counter() - start, made, text)


async def at_once(
    port: int, models: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
) -> tuple[float, list[Reply]]:
    """Seconds until all have their answers, and these."""
    start = time.perf_counter()
    asked = [ask(port, model, prompts[i % len(prompts)], tokens) for i, model in enumerate(models)]
    replies = await asyncio.gather(*asked)
    return time.perf_counter() - start, replies


def measure_traffic(
    frozen: nn.Module, tokenizer: Any, name: str, options: Sequence[str], folders: Mapping[str, Path],
    clients: Sequence[int], tokens: int,
) -> Iterator[Traffic]:  # fmt: skip
    """Client i asks with prompt i mod 4, and has an adapter of its own, of method i mod 4."""
    generator = torch.Generator().manual_seed(2)
    vocabulary: int = min(frozen.config.vocab_size, len(tokenizer)) - 3  # type: ignore[union-attr,operator,assignment]
    prompts = torch.randint(vocabulary, (len(SERVED), PROMPT), generator=generator).tolist()
    sure = []
    for prompt, kind in zip(prompts, SERVED, strict=True):
        models = frozen, fastpeft.load_adapter(twin(frozen), folders[kind]).eval()
        sure.append([certain(model, tokenizer, prompt, tokens) for model in models])
    most = max(clients)
    if options[0] == "--out":  # its styles are taken as they are, so that none is trained
        styles = Path(options[1], "styles")
        styles.mkdir()
        for style, kind in zip(importlib.import_module("service.styles").STYLES, SERVED, strict=True):
            (styles / style).symlink_to(folders[kind])
    adapters = {f"a{i}": folders[SERVED[i % len(SERVED)]] for i in range(most)}
    with service(options, adapters, most) as port:
        for count in clients:
            row = Traffic(count)
            asked = [name] * count, list(adapters)[:count]
            rounds: tuple[list[Any], list[Any]] = [], []
            while row.right and len(rounds[0]) < WARM_UP + ROUNDS:
                for which, models in enumerate(asked):
                    seconds, replies = asyncio.run(at_once(port, models, prompts, tokens))
                    rounds[which].append((seconds, replies))
                    for client, reply in enumerate(replies):
                        wanted = sure[client % len(sure)][which]
                        if not reply.text.startswith(wanted):
                            row.wrong.append(f"{models[client]}: {reply.text!r} and not {wanted!r}")
            if row.right:
                row.rounds = ROUNDS
                row.base_tokens_per_second, row.base_first = medians(rounds[0][WARM_UP:])
                row.tokens_per_second, row.first = medians(rounds[1][WARM_UP:])
            yield row


def medians(rounds: Sequence[tuple[float, list[Reply]]]) -> tuple[float, float]:
    """Tokens per second, and seconds to the first token."""
    speeds = [sum(reply.tokens for reply in replies) / seconds for seconds, replies in rounds]
    return statistics.median(speeds), statistics.median(reply.first for _, replies in rounds for reply in replies)


@torch.no_grad()
def certain(model: Any, tokenizer: Any, prompt: Sequence[int], count: int) -> str:
    """What a model must answer at temperature 0, up to where two tokens are so near that rounding decides."""
    tokens: list[int] = []
    given: Tensor = torch.tensor([prompt])
    cache = None
    for _ in range(count):
        found = model(input_ids=given, past_key_values=cache, use_cache=True)
        logits, cache = found.logits[0, -1], found.past_key_values
        (best, second), (token, _) = (each.tolist() for each in logits.topk(2))
        if best - second < TIE * float(logits.std()) or token == tokenizer.eos_token_id:
            break
        tokens.append(token)
        given = torch.tensor([[token]])
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")  # a character that is not whole
