"""The bank: thousands of adapters of any method over one base model, mixed freely in every batch.

How it works, in one page:

- **Memory** (memory.py). One buffer of ``max_resident_bytes``. An arena is that buffer seen as rows of one width and
  dtype; an adapter's rows lie anywhere in it.
- **Tables** (tables.py). Adapters that one operator call can mix are a family (nn/served.py). A family has small
  tables over layers and slots, which say where each adapter's rows lie. A resident adapter has one slot everywhere.
- **Versions** (version.py, source.py). What a name means from one load to the next. It is registered by its header;
  its tensors are read, checked and written into rows that nobody reads when it is brought in.
- **Residency** (residency.py). Leases, eviction, waiting. Two small locks; none is held while a batch computes.
- **Plans** (plan.py). The rows of a batch in the order of slots, once for all layers.
- **Layers** (layer.py). y = post(W · pre(x) + b) + delta(x), each part for the rows that have it, in the families that
  the batch has. A row without an adapter is the base's, bit for bit. On CPUs two calls do it (calls.py).
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.config import MOST_RANK, AdapterConfig, require_int
from fastpeft.model import adapted_layers, check_model, find_targets
from fastpeft.nn.linear import site_of
from fastpeft.serving.layer import Served, attach, detach
from fastpeft.serving.memory import Buffer
from fastpeft.serving.plan import Plan, Route
from fastpeft.serving.residency import Residency, UnknownAdapterError
from fastpeft.serving.source import check_name, to_source
from fastpeft.serving.version import Version

State = tuple[Any, Mapping[str, Tensor]]


class AdapterBank:
    """Holds adapters over a base model and serves batches that mix them. Safe to use from many threads.

    The model is changed in place, and is the base model where nothing is routed. Forward only.

    Args:
        model: the base model, on one device.
        target_modules: the layers that adapters may be on, as in a configuration.
        exclude_modules: those of them to leave out.
        max_resident: how many adapters the fast memory holds, versions that are still in use included.
        max_resident_bytes: how much memory their numbers take. On a CPU none of it is taken before it is needed.
        max_rank: the largest rank of a LoRA or MoS adapter. Every slot has so many numbers of four bytes for each row
            of A and of B.
        dtype: of LoRA's and MoS's numbers; float32, or float64 where the model is, if left out. BOFT's and FourierFT's
            are at least float32.
        timeout: seconds for which a batch waits for room that other batches take up, where no other time is given.

    Raises:
        TypeError, ValueError: an argument is not what it must be, nothing matches ``target_modules``, or the model
            holds adapters or is served already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        max_resident: int = 64,
        max_resident_bytes: int = 1 << 30,
        max_rank: int = 64,
        dtype: torch.dtype | None = None,
        timeout: float = 5.0,
    ) -> None:
        check_model(model)
        require_int("max_resident", max_resident, 1, 1 << 24)
        require_int("max_resident_bytes", max_resident_bytes, 1)
        require_int("max_rank", max_rank, 1, MOST_RANK)
        if adapted_layers(model):
            raise ValueError("model holds adapters: a bank serves a base model, load them into the bank instead")
        if any(isinstance(module, Served) for module in model.modules()):
            raise ValueError("model is served by a bank already: close that one first")
        config = AdapterConfig(target_modules=target_modules, exclude_modules=exclude_modules)
        layers = find_targets(model, config)
        sites = {path: site_of(module, path) for path, module in layers.items()}
        self.sites = list(sites.values())
        self.device = self.sites[0].device
        for site in self.sites:
            if site.device != self.device:
                raise site.error(
                    f"is on {site.device}, and {self.sites[0].path!r} on {self.device}: one bank, one device"
                )
        widest = torch.float64 if any(site.dtype == torch.float64 for site in self.sites) else torch.float32
        self.dtype = widest if dtype is None else dtype
        if not isinstance(self.dtype, torch.dtype) or not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise TypeError(f"dtype must be a floating-point dtype of at least 16 bits, got {dtype!r}")
        self.timeout = timeout
        self.max_resident, self.max_resident_bytes, self.max_rank = max_resident, max_resident_bytes, max_rank
        with torch.inference_mode(False):
            self._buffer = Buffer(max_resident_bytes, self.device)
        self._residency = Residency(sites, max_resident, max_rank, self.dtype, self._buffer)
        self._local = threading.local()
        self._bound: Plan | None = None
        self._prefetcher: concurrent.futures.ThreadPoolExecutor | None = None  # while there is something to do
        self._prefetching = 0
        self._prefetcher_lock = threading.Lock()
        self._model = model
        self._layers = list(layers.values())
        self._hooks = []
        for number, module in enumerate(self._layers):
            attach(module, self, number)
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # only its fused kernel takes nested tensors
            if isinstance(module, nn.TransformerEncoderLayer):  # and that one passes by layers without a hook in them
                self._hooks.append(module.register_forward_pre_hook(_does_nothing))

    # Adapters

    def load(self, name: str, source: str | os.PathLike | State, *, timeout: float | None = None) -> None:
        """Registers an adapter and brings it in, all of it checked. A name that is there gets a new version: batches
        that run finish with the one that they began with.

        Args:
            source: a folder that ``fastpeft.save_adapter`` or PEFT wrote, or (configuration, tensors) as such a folder
                has them. Of a folder only the path is kept; it must stay until the adapter is unloaded.
            timeout: seconds to wait for room that batches take up.

        Raises:
            FileNotFoundError: the folder lacks a file.
            ValueError: the name is none; the adapter is damaged, not for this model, over ``max_rank``, of a method or
                with an option that is not served, or not finite. The bank is as it was.
            BankFullError: there is no room beside what is pinned and in use. The bank is as it was.
        """
        check_name(name)
        version, header = self._residency.make(name, to_source(source))
        try:
            staged = self._residency.stage(version, header)
            self._residency.bring_in_as_name(version, staged, self._timeout(timeout))
        except BaseException:
            self._residency.drop(version)
            raise

    def register(self, name: str, source: str | os.PathLike | State) -> None:
        """As ``load``, but nothing more than its header is read: the adapter comes in when a batch needs it.

        Raises:
            FileNotFoundError, ValueError: as ``load``, but for numbers, which are looked at when it comes in.
        """
        check_name(name)
        version, _ = self._residency.make(name, to_source(source))
        self._residency.register(version)

    def unload(self, name: str, *, wait: bool = True, timeout: float | None = None) -> None:
        """Takes an adapter away. Its name is gone at once; its memory is free when no batch uses it any more. In a
        thread whose own batch uses it that would be never.

        Args:
            wait: True: return when that is so. False: raise where a batch uses it.
            timeout: seconds to wait; None is for ever.

        Raises:
            UnknownAdapterError: there is none of that name.
            AdapterInUseError: wait is False and a batch uses it. Nothing has changed.
            TimeoutError: it is still used after that time. Its memory is freed later.
        """
        self._residency.remove(name, wait, timeout)

    def pin(self, name: str) -> None:
        """Brings an adapter in and keeps it there, its later versions included.

        Raises:
            As ``route``.
        """
        versions = self._acquire([name], self.timeout)
        try:
            self._residency.pin(name, True)
        finally:
            self._residency.release(versions.values())

    def unpin(self, name: str) -> None:
        """Lets a pinned adapter go again when its turn comes.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        self._residency.pin(name, False)

    def prefetch(self, name: str) -> concurrent.futures.Future[None]:
        """Brings an adapter in, beside serving, in a thread of the bank's own.

        Returns:
            A future of None, or of what ``route`` would have raised. It is done where the adapter is there already.
        """
        done: concurrent.futures.Future[None] = concurrent.futures.Future()
        try:
            if self._residency.use(name):
                done.set_result(None)
                return done
        except UnknownAdapterError as error:
            done.set_exception(error)
            return done
        with self._prefetcher_lock:
            if self._prefetcher is None:
                self._prefetcher = concurrent.futures.ThreadPoolExecutor(1, "fastpeft-prefetch")
            self._prefetching += 1
            future = self._prefetcher.submit(self._fetch, name)
        future.add_done_callback(self._prefetched)
        return future

    def _prefetched(self, _: object) -> None:
        """The thread ends with its work. One that has computed keeps others to compute with, and once there are more of
        those than processors, none of them waits awake for the model's next product.
        """
        with self._prefetcher_lock:
            self._prefetching -= 1
            if not self._prefetching and self._prefetcher is not None:
                self._prefetcher.shutdown(wait=False)
                self._prefetcher = None

    def _fetch(self, name: str) -> None:
        self._residency.release(self._acquire([name], self.timeout).values())

    def names(self) -> list[str]:
        """The registered adapters, in the order in which they came."""
        return self._residency.names()

    def stats(self) -> dict[str, Any]:
        """Numbers about the bank.

        ``bytes`` and ``capacity_bytes`` are those of the fast memory, ``table_bytes`` those of the tables beside it (on
        a CPU the ones in use are what takes memory). Under ``methods``, for each method: how many adapters are
        registered and resident, what the resident ones take (rows that several share are counted with each of them),
        and what they would take where every layer had matrices of its own, which is more for MoS.
        """
        methods: dict[str, dict[str, int]] = {}
        resident = pinned = in_use = 0
        versions = self._residency.registered()
        for version, is_resident, is_pinned in versions:
            resident, pinned = resident + is_resident, pinned + is_pinned
            in_use += version.leases > 0
            of = methods.setdefault(version.method, {"registered": 0, "resident": 0, "bytes": 0, "expanded_bytes": 0})
            of["registered"] += 1
            if is_resident:
                of["resident"] += 1
                of["bytes"] += version.nbytes
                of["expanded_bytes"] += version.expanded_bytes
        return {
            "registered": len(versions),
            "resident": resident,
            "pinned": pinned,
            "in_use": in_use,
            **self._residency.counts,
            "bytes": self._residency.used_bytes(),
            "capacity_bytes": self.max_resident_bytes,
            "max_resident": self.max_resident,
            "table_bytes": sum(tables.nbytes() for tables in self._residency.families()),
            "methods": methods,
        }

    # Batches

    def route(self, rows: Sequence[str | None], *, timeout: float | None = None) -> Route:
        """``with bank.route(["alice", None, "bob"]):`` gives every forward inside, in this thread, these adapters.

        One entry for each sequence of the batch, or for each row of a flat one: layers see (B, ..., in), (B · tokens,
        in) or (T, in). None is the base model.

        Args:
            timeout: seconds to wait for room that other batches take up.

        Raises, on entering:
            UnknownAdapterError: a name is nobody's.
            BankFullError: there is no room for all of them together, or not beside other batches. Nothing has changed.
            FileNotFoundError, ValueError: one that was not resident cannot be read or is not what it said.
        """
        rows = _checked(rows)
        return Route(lambda: Plan(self, rows, self._timeout(timeout)))

    def plan(
        self, rows: Sequence[str | None], *, tokens: int | Iterable[int] = (), timeout: float | None = None
    ) -> Plan:
        """The same as a thing of its own, whose tensors stay and are refilled: ``with plan:`` or ``bind(plan)``.

        Args:
            rows: as ``route``; later batches have as many entries.
            tokens: rows for each entry that inputs will have, for which tensors are made now; others are made when they
                are met, which a graph that is being captured does not allow.

        Raises:
            As ``route``.
        """
        sizes = [tokens] if isinstance(tokens, int) else list(tokens)
        for size in sizes:
            require_int("tokens", size, 1)
        plan = Plan(self, _checked(rows), self._timeout(timeout), all_families=True)
        for size in sizes:
            plan.tensors(size)
        return plan

    def bind(self, plan: Plan | None) -> None:
        """Gives a plan to every forward, in every thread, that no ``with`` routes; None takes it away.

        For engines with one loop: nothing here is a thread's own.

        Raises:
            ValueError: it is another bank's plan.
        """
        if plan is not None and plan._bank is not self:
            raise ValueError("plan must be one of this bank")
        self._bound = plan

    def close(self) -> None:
        """Gives the model back as it was. Routed batches must have ended.

        Raises:
            ValueError: adapters were added to the model meanwhile.
        """
        if adapted_layers(self._model):
            raise ValueError("model holds adapters, which were added after the bank and stand on it")
        if (prefetcher := self._prefetcher) is not None:
            prefetcher.shutdown(cancel_futures=True)
        for module in self._layers:
            detach(module)
        for hook in self._hooks:
            hook.remove()
        self._layers, self._hooks, self._bound = [], [], None

    def _timeout(self, given: float | None) -> float:
        return self.timeout if given is None else given

    def _acquire(
        self, rows: Iterable[str | None], timeout: float, held: Collection[Version] = ()
    ) -> dict[str, Version]:
        return self._residency.acquire(dict.fromkeys(name for name in rows if name is not None), timeout, held)

    def _current(self) -> Plan | None:
        plan = getattr(self._local, "plan", None)
        return self._bound if plan is None else plan

    def _push(self, plan: Plan) -> None:
        stack = self._local.__dict__.setdefault("stack", [])
        stack.append(self._local.__dict__.get("plan"))
        self._local.plan = plan

    def _pop(self) -> None:
        self._local.plan = self._local.stack.pop()

    def __repr__(self) -> str:
        return (
            f"AdapterBank({len(self.names())} adapters on {len(self.sites)} layers, max_resident={self.max_resident})"
        )


def _checked(rows: Any) -> list[str | None]:
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows must be a list of names and None, got {type(rows).__name__}")
    for entry, name in enumerate(rows):
        if name is not None and not isinstance(name, str):
            raise TypeError(f"rows must be a list of names and None, got {type(name).__name__} at entry {entry}")
    return list(rows)


def _does_nothing(module: nn.Module, args: Any) -> None:
    """That it is there is all that matters."""
