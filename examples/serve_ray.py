"""Serve a model with many adapters from several replicas, by Ray Serve, on one machine or on many: docs/ray-serve.md.

    python examples/serve_ray.py --replicas 2    # on this machine; with the model and adapters of serve.py
    RAY_ADDRESS=auto python examples/serve_ray.py --adapters /shared/adapters --model FOLDER --adapter alice=FOLDER

Each replica is the service of serve.py: a model, an AdapterBank and a decode loop of its own. A request goes to a
replica that has its adapter already, where there is one. Ray does the rest: processes, routing, health, restarts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# On one machine Ray's processes talk over the loopback interface; it has this by itself on systems other than Linux.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", str(int("RAY_ADDRESS" in os.environ)))

import ray
import serve as single
import torch
from ray import serve
from service.api import Limits, create_app
from service.asgi import Head, answer
from service.ingress import ASKS, Ingress
from service.shared import SharedCatalog, link
from service.threads import in_a_thread

from fastpeft.serving import UnknownAdapterError

NAME = "fastpeft"  # of the application
ON_A_CLUSTER = "RAY_ADDRESS" in os.environ


class Replica:
    """A model, its bank and its decode loop, behind the application that serve.py puts on a port."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(options.threads)
        self._id = serve.get_replica_context().replica_id.unique_id
        base = in_a_thread(single.load, options.model)
        self._service = single.put_together(options, base, SharedCatalog, options.adapters)
        self._app = create_app(self._service)

        # From this Ray's routers know which adapters were used here last, as many as the bank has room for. To them it
        # is a hint: the bank itself decides what it holds, and brings in whatever a request needs.
        @serve.multiplexed(max_num_models_per_replica=options.max_resident)
        async def used(name: str) -> str:
            return name

        self._used = used

    async def respond(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Head | bytes]:
        """The head of an answer, then its body piece by piece."""
        catalog, name = self._service.catalog, serve.get_multiplexed_model_id()
        if name or scope["path"] not in ASKS:
            await asyncio.to_thread(catalog.follow, name or None)
        if name:
            with contextlib.suppress(UnknownAdapterError):  # the application says so
                await self._used(catalog.find(name).name)
        async for piece in answer(self._app, scope, body):
            if isinstance(piece, Head):
                piece.headers.append((b"x-replica", self._id.encode()))
            yield piece

    async def models(self) -> list[str]:
        return [entry.name for entry in self._service.catalog.entries()]

    async def metrics(self) -> tuple[str, str]:
        return self._id, self._service.metrics_page()

    def check_health(self) -> None:
        if not self._service.engine.alive:
            raise RuntimeError("the engine has stopped")

    def __del__(self) -> None:  # Ray calls it when the last request has ended
        if hasattr(self, "_service"):
            self._service.engine.stop()


def application(options: argparse.Namespace, base: str) -> serve.Application:
    limits = Limits()
    replicas = serve.deployment(Replica).options(
        num_replicas=options.replicas,
        max_ongoing_requests=options.rows,  # when so many run, another replica takes the adapter in as well
        max_queued_requests=options.waiting,
        graceful_shutdown_timeout_s=options.shutdown,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": options.threads},
    )
    ingress = serve.deployment(Ingress).options(
        max_ongoing_requests=2 * (options.rows * options.replicas + options.waiting),  # too many are told so by it
        graceful_shutdown_timeout_s=options.shutdown,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replicas.bind(options), base, limits.body_bytes, limits.upload_bytes)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = single.make_parser("Serve a model with many adapters from several replicas, by Ray Serve.")
    add = parser.add_argument
    add("--replicas", type=int, default=2, help="(%(default)s)")
    add("--threads", type=int, default=1, help="of each replica, and the CPUs that Ray counts for it (%(default)s)")
    add("--adapters", type=Path, metavar="FOLDER", help="where all adapters are, seen by every machine under this path "
        "(default: a folder of this machine, removed at the end)")  # fmt: skip
    options = single.parse(arguments, parser)
    if options.adapters is None and ON_A_CLUSTER:
        parser.error("--adapters is needed on a cluster: a folder that every machine sees")
    return options


def start(options: argparse.Namespace) -> str:
    """Ray, and the folder of adapters as it is asked for. Returns the base model's name."""
    if options.model is None:
        base = single.load(None)
        name, adapters = base[2], single.adapters(options, base)
    else:
        options.model = options.model.resolve()
        name, adapters = options.model.name, dict(options.adapter)
    options.adapters = options.adapters.resolve()
    options.adapters.mkdir(parents=True, exist_ok=True)
    for each, folder in adapters.items():
        link(options.adapters, each, folder.resolve())
    here: dict[str, Any] = {}
    if not ON_A_CLUSTER:
        here = {
            "address": "local", "num_cpus": options.replicas * options.threads, "include_dashboard": False,
            "object_store_memory": 256 << 20,
        }  # fmt: skip
    ray.init(runtime_env={"working_dir": str(Path(__file__).parent)}, **here)  # the code of examples/ for all workers
    serve.start(http_options={"host": options.host, "port": options.port})
    serve.run(application(options, name), name=NAME)
    models = serve.get_deployment_handle("Replica", NAME).models.remote().result()
    if missing := sorted(set(adapters) - set(models)):
        raise SystemExit(f"adapters that were left out, for reasons above: {', '.join(missing)}")
    print("models:", ", ".join(models), flush=True)
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with contextlib.ExitStack() as stack:
        if options.adapters is None:
            options.adapters = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fastpeft-adapters-")))
        ended = threading.Event()
        try:
            start(options)
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, lambda *_: ended.set())
            ended.wait()
        finally:
            if ray.is_initialized():
                serve.delete(NAME)  # requests that run finish first
                if not ON_A_CLUSTER:
                    serve.shutdown()
                ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
