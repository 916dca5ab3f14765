"""What bench/serving.py measures of one layer: batches whose rows have adapters of their own, behind an AdapterBank."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from layers import METHODS, MOS_LAYERS, Exact, Holder, error_limit, exact_of, stir
from safetensors.torch import load_file, save_file
from tables import ratio
from tax import ONE_EACH, forward, in_turn, take_turns
from torch import Tensor, nn

import fastpeft
from fastpeft.files import CONFIG, TENSORS
from fastpeft.ops.boft_many import reflectors_width
from fastpeft.serving import AdapterBank

# Rows of all four methods in one batch: of the largest adapters, or of smaller ones.
MIXES = {"mix": ONE_EACH, "mix-small": ("lora-r8", "mos", "boft-b4m2", "fourierft")}
KINDS = ("lora-r8", *ONE_EACH[:2], "boft-b4m2", *ONE_EACH[2:])
PATIENCE = 20.0  # see tax.take_turns
PEFT_PATIENCE = 2.0
SWITCHED = 32 << 20  # in · out · adapters beyond which PEFT's dense matrices take tens of seconds for a batch
BANK_BYTES = 2 << 30  # of which little is touched
REGISTERED_ROWS, REGISTERED_ADAPTERS = 32, 10

Adapter = tuple[str, int]  # a key of METHODS, and which one of that kind


def title_of(method: str) -> str:
    return {"mix": "all four", "mix-small": "all four, smaller"}.get(method) or METHODS[method].title


def drawn(method: str, count: int) -> list[Adapter]:
    """So many different adapters."""
    kinds = MIXES.get(method, (method,))
    return [(kinds[i % len(kinds)], i // len(kinds)) for i in range(count)]


def name_of(adapter: Adapter) -> str:
    return f"{adapter[0]}-{adapter[1]}"


def bytes_of(method: str, size: tuple[int, int]) -> int:
    """What one layer reads of an adapter, in float32. FourierFT's places are the same for all and are left out."""
    options = METHODS[method].options
    if "r" in options:
        return 4 * options["r"] * sum(size)
    if "n_frequency" in options:
        return 4 * options["n_frequency"]
    factors, block = options["boft_n_butterfly_factor"], options["boft_block_size"]
    return 4 * (reflectors_width(size[0], block, factors) + size[1])


class Adapters:
    """Folders with adapters for one frozen layer, each written when it is asked for.

    The first of a kind is drawn at random; the others have its numbers in another order.
    """

    def __init__(self, base: nn.Linear, root: Path) -> None:
        self.base, self.size = base, (base.in_features, base.out_features)
        self.root = root
        self._firsts: dict[str, tuple[bytes, dict[str, Tensor]]] = {}
        self.exact = lru_cache(maxsize=8)(self._exact)  # each holds W in float64

    def holder(self) -> Holder:
        """A model that a bank can serve with all of them: MoS's are for many layers, the others for the first."""
        return Holder(self.base, MOS_LAYERS - 1)

    def folder(self, adapter: Adapter) -> Path:
        folder = self.root / f"{self.size[0]}x{self.size[1]}" / name_of(adapter)
        if not folder.exists():
            config, tensors = self._first(adapter[0])
            folder.mkdir(parents=True)
            (folder / CONFIG).write_bytes(config)
            save_file({key: shuffled(tensor, adapter[1]) for key, tensor in tensors.items()}, folder / TENSORS)
        return folder

    def _first(self, kind: str) -> tuple[bytes, dict[str, Tensor]]:
        if kind not in self._firsts:
            everywhere = METHODS[kind].config(fastpeft)
            model = self.holder() if kind == "mos" else Holder(self.base)
            config = everywhere if kind == "mos" else replace(everywhere, target_modules="layer")
            stir(fastpeft.adapt(model, config).layer)  # type: ignore[arg-type]
            folder = self.root / kind / "x".join(map(str, self.size))
            fastpeft.save_adapter(model, folder)
            self._firsts[kind] = (folder / CONFIG).read_bytes(), load_file(folder / TENSORS)
        return self._firsts[kind]

    def _exact(self, adapter: Adapter) -> Exact:
        return exact_in(self.folder(adapter), self.holder() if adapter[0] == "mos" else Holder(self.base))


def shuffled(tensor: Tensor, seed: int) -> Tensor:
    if seed == 0 or not tensor.is_floating_point():
        return tensor
    order = torch.randperm(tensor.numel(), generator=torch.Generator().manual_seed(seed))
    return tensor.flatten()[order].view_as(tensor)


def exact_in(folder: Path, holder: Holder) -> Exact:
    return exact_of(fastpeft.load_adapter(holder, folder).layer)  # type: ignore[arg-type]


def error_of(y: Tensor, x: Tensor, exact: Mapping[int, Exact]) -> float:
    """The largest error of some rows of y (rows, …, out), each over its largest entry."""
    errors = []
    for row, formula in exact.items():
        tokens = x[row].reshape(-1, x.shape[-1])
        with torch.enable_grad():
            wanted, _ = formula(tokens, torch.zeros(len(tokens), y.shape[-1]))
        errors.append((y[row].reshape(wanted.shape).double() - wanted).abs().max() / wanted.abs().max())
    return float(torch.stack(errors).max())  # unlike Python's max, keeps a NaN


def routed(bank: AdapterBank, rows: Sequence[str], call: Callable[[], float]) -> Callable[[], float]:
    """A call with the plan of its batch."""

    def with_route() -> float:
        start = time.perf_counter()
        with bank.route(rows):
            call()
        return time.perf_counter() - start

    return with_route


# ---------------------------------------------------------------------- the tax of a batch


@dataclass
class Cell:
    """One batch. Seconds are medians: base, layer and route of one run in turn, PEFT's and its base's of another."""

    method: str
    in_features: int
    out_features: int
    tokens: int  # for each row
    rows: int
    adapters: int
    bytes: float  # of the adapters over those of W
    error: float
    limit: float
    base: float | None = None
    layer: float | None = None
    route: float | None = None  # and the layer
    rounds: int = 0
    peft_error: float | None = None
    peft_base: float | None = None
    peft: float | None = None
    peft_rounds: int = 0

    @property
    def right(self) -> bool:
        return self.error <= self.limit  # not so for a NaN

    @property
    def peft_right(self) -> bool:
        return self.peft_error is None or self.peft_error <= self.limit

    @property
    def tax(self) -> float | None:
        return ratio(self.layer, self.base)

    @property
    def route_tax(self) -> float | None:
        return ratio(self.route, self.base)

    @property
    def peft_tax(self) -> float | None:
        return ratio(self.peft, self.peft_base)

    @property
    def extra(self) -> float | None:
        """Seconds beyond the frozen layer's."""
        return self.layer - self.base if self.layer and self.base else None


def measure(
    sources: Adapters,
    methods: Sequence[str],
    shapes: Sequence[tuple[int, int, int]],  # tokens, rows, adapters
    peft: ModuleType | None,
) -> Iterator[Cell]:
    """The cells of one size, method by method."""
    most = max(adapters for _, _, adapters in shapes)
    needed = dict.fromkeys(adapter for method in methods for adapter in drawn(method, most))
    model = sources.holder()
    bank = AdapterBank(model, max_resident=len(needed), max_resident_bytes=BANK_BYTES)
    for adapter in needed:
        bank.load(name_of(adapter), sources.folder(adapter))
    for method in methods:
        theirs = None
        for shape in shapes:
            tokens, rows, adapters = shape
            if adapters < len(MIXES.get(method, ())):
                continue
            few = drawn(method, adapters)
            batch = [few[i % adapters] for i in range(rows)]
            x = torch.randn((rows, tokens, sources.size[0]) if tokens > 1 else (rows, sources.size[0]))
            with torch.no_grad():
                cell = time_batch(sources, method, shape, batch, x, model.layer, bank)
                if peft is not None and has(peft, method, sources.size, adapters, shape[:2] == shapes[0][:2]):
                    theirs = theirs or Theirs(sources, method, most, peft)
                    time_peft(cell, sources.base, theirs, x)
            yield cell
    bank.close()


def time_batch(
    sources: Adapters, method: str, shape: tuple[int, int, int], batch: Sequence[Adapter], x: Tensor,
    layer: nn.Module, bank: AdapterBank,
) -> Cell:  # fmt: skip
    """A cell without PEFT's figures."""
    names = [name_of(adapter) for adapter in batch]
    checked = {*range(len(MIXES.get(method, (method,)))), len(batch) // 2, len(batch) - 1}
    read = sum(bytes_of(kind, sources.size) for kind, _ in set(batch)) / (4 * math.prod(sources.size))
    with bank.route(names):
        error = error_of(layer(x), x, {row: sources.exact(batch[row]) for row in checked})
        limit = error_limit(torch.float32, max(sources.size))
        cell = Cell(title_of(method), *sources.size, *shape, read, error, limit)
        if cell.right:
            served = forward(layer, x)
            calls = [forward(sources.base, x), served, routed(bank, names, served)]
            (cell.base, cell.layer, cell.route), cell.rounds = take_turns(calls, PATIENCE)
    return cell


# ---------------------------------------------------------------------- PEFT's


def has(peft: ModuleType, method: str, size: tuple[int, int], adapters: int, first: bool) -> bool:
    """Whether PEFT computes such a batch, in a time that one waits for: it switches for the first T and rows only."""
    if method in MIXES or not hasattr(peft, METHODS[method].config_class):
        return False
    return method.startswith("lora") or (first and math.prod(size) * adapters <= SWITCHED)


class Theirs:
    """PEFT's layer with adapters of one method: one call with adapter_names where it has that, else group by group."""

    def __init__(self, sources: Adapters, method: str, count: int, peft: ModuleType) -> None:
        if not method.startswith("lora"):
            count = min(count, max(1, SWITCHED // math.prod(sources.size)))
        self.mixes = method.startswith("lora")
        self.names = [f"a{i}" for i in range(count)]
        self._base = sources.base
        self._root = sources.root / "peft" / "x".join(map(str, sources.size)) / method
        config = METHODS[method].config(peft)
        # As in layers.py: PEFT tries to compile a CUDA helper for BOFT, in vain on a CPU.
        with warnings.catch_warnings(), mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None):
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(Holder(sources.base), config, adapter_name=self.names[0])
            for name in self.names[1:]:
                model.add_adapter(name, METHODS[method].config(peft))
        self.model, self.layer = model, model.base_model.model.layer
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_("base_layer" not in name)
        stir(self.layer)
        self.layer.eval().requires_grad_(False)

    def exact(self, name: str) -> Exact:
        if not (self._root / name).exists():
            self.model.save_pretrained(self._root, selected_adapters=[name])
        return exact_in(self._root / name, Holder(self._base))

    def call(self, batch: Sequence[str], x: Tensor) -> Callable[[], Tensor]:
        if self.mixes:
            return lambda: self.layer(x, adapter_names=list(batch))
        groups = {name: torch.tensor([i for i, each in enumerate(batch) if each == name]) for name in set(batch)}

        def switched() -> Tensor:
            y = torch.empty(*x.shape[:-1], self.layer.out_features)
            for name, rows in groups.items():
                self.layer.set_adapter(name)
                y[rows] = self.layer(x[rows])
            return y

        return switched


def time_peft(cell: Cell, base: nn.Linear, theirs: Theirs, x: Tensor) -> None:
    batch = [theirs.names[i % cell.adapters] for i in range(cell.rows)]
    call = theirs.call(batch, x)
    cell.peft_error = error_of(call(), x, {row: theirs.exact(batch[row]) for row in {0, cell.rows - 1}})
    if cell.peft_right:

        def timed() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        cell.peft_base, cell.peft, cell.peft_rounds = in_turn(forward(base, x), timed, PEFT_PATIENCE)


# ---------------------------------------------------------------------- thousands registered


@dataclass
class Registered:
    """The same batch in a bank of so many adapters. Seconds are medians, all of one run in turn."""

    in_features: int
    out_features: int
    registered: int
    resident: int
    error: float
    limit: float
    same: bool  # bit for bit what the smallest bank gives
    register: float  # mean seconds for each
    base: float | None = None
    layer: float | None = None
    route: float | None = None
    rounds: int = 0

    @property
    def right(self) -> bool:
        return self.same and self.error <= self.limit

    @property
    def tax(self) -> float | None:
        return ratio(self.layer, self.base)

    @property
    def route_tax(self) -> float | None:
        return ratio(self.route, self.base)


class Crowd(NamedTuple):
    """A bank of its own over the same weight, in which the batch's adapters lie far apart."""

    model: Holder
    bank: AdapterBank
    names: list[str]  # of the batch
    register: float


def measure_registered(sources: Adapters, counts: Sequence[int], most_resident: int) -> list[Registered]:
    """32 rows of ten adapters of all methods, with so many registered, from ten on."""
    few = drawn("mix", REGISTERED_ADAPTERS)
    x = torch.randn(REGISTERED_ROWS, sources.size[0])
    crowds = [crowd_of(sources, few, count, min(count, most_resident)) for count in counts]
    with torch.no_grad():
        outputs = []
        for crowd in crowds:
            with crowd.bank.route(crowd.names):
                outputs.append(crowd.model.layer(x))
        limit = error_limit(torch.float32, max(sources.size))
        rows = []
        for count, crowd, y in zip(counts, crowds, outputs, strict=True):
            error = error_of(y, x, {row: sources.exact(few[row]) for row in range(len(ONE_EACH))})
            resident = crowd.bank.stats()["resident"]
            same = torch.equal(y, outputs[0])
            rows.append(Registered(*sources.size, count, resident, error, limit, same, crowd.register))
        if all(row.right for row in rows):
            time_crowds(rows, crowds, sources.base, x)
    return rows


def crowd_of(sources: Adapters, few: Sequence[Adapter], count: int, resident: int) -> Crowd:
    """Adapter number j of the bank is one of those few again, which it does not know."""
    model = sources.holder()
    bank = AdapterBank(model, max_resident=resident, max_resident_bytes=BANK_BYTES)
    folders = [sources.folder(adapter) for adapter in few]
    start = time.perf_counter()
    for j in range(count):
        bank.register(f"a{j}", folders[j % len(few)])
    seconds = (time.perf_counter() - start) / count
    for j in range(resident):
        bank.prefetch(f"a{j}").result()
    blocks = resident // len(few)  # of all the few, of which each gives one
    places = [i + len(few) * (i * blocks // len(few)) for i in range(len(few))]
    return Crowd(model, bank, [f"a{places[row % len(few)]}" for row in range(REGISTERED_ROWS)], seconds)


def time_crowds(rows: Sequence[Registered], crowds: Sequence[Crowd], base: nn.Linear, x: Tensor) -> None:
    calls = []
    for crowd in crowds:  # each behind a base of its own: what runs after another bank's batch finds warmer caches
        served = forward(crowd.model.layer, x)
        calls += [forward(base, x), served, routed(crowd.bank, crowd.names, served)]
    with ExitStack() as plans:
        for crowd in crowds:
            plans.enter_context(crowd.bank.route(crowd.names))
        seconds, rounds = take_turns(calls, PATIENCE)
    for i, row in enumerate(rows):
        row.base, row.layer, row.route = seconds[3 * i : 3 * i + 3]
        row.rounds = rounds
