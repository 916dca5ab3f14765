"""Threads that load, unload, replace and route at the same time, and what their batches compute."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from helpers import IN, randn
from serving_models import OPTIONS, Switched, make_bank, save
from small_models import Model
from torch import Tensor

from fastpeft.serving import AdapterBank, AdapterInUseError, UnknownAdapterError

KINDS = ["lora", "mos", "boft", "fourierft"]
X = randn(6, 2, IN)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, list[Path]]:
    """Twelve adapters, three of each method, in two versions each."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        f"{kind}{i}": [save(folder / f"{kind}{i}-{version}", OPTIONS[kind], 10 * i + version) for version in range(2)]
        for kind in KINDS
        for i in range(3)
    }


@pytest.fixture(scope="module")
def outputs(folders) -> dict[str | None, list[Tensor]]:
    """For each name what its versions make of every row of X."""
    base = Model().requires_grad_(False)
    oracle = Switched(base, {f"{name}-{v}": path for name, paths in folders.items() for v, path in enumerate(paths)})
    found: dict[str | None, list[Tensor]] = {None: [base(X)]}
    for name in folders:
        found[name] = [oracle(X, [f"{name}-{v}"] * len(X), lambda model, x: model(x)) for v in range(2)]
    return found


def run_all(*workers: Callable[[], None]) -> None:
    """Each in a thread of its own; the first error of any of them."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def is_version(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_versions_differ(outputs):
    """Or the test below would see no mixture."""
    for name, (first, second) in ((n, both) for n, both in outputs.items() if n is not None):
        for b in range(len(X)):
            assert not is_version(first[b], second[b]), name
            assert not is_version(first[b], outputs[None][0][b]), name


@pytest.mark.parametrize("max_resident", [7, 12])
def test_everything_at_once(max_resident: int, folders, outputs):
    model = Model().requires_grad_(False)
    bank = make_bank(model, max_resident=max_resident, timeout=60)
    names = list(folders)
    for name in names:
        bank.register(name, folders[name][0])
    stop = threading.Event()
    batches = []

    def check(rows: list[str | None], found: Tensor) -> None:
        """A whole row is one version's, and all rows of a name are the same version's."""
        versions: dict[str | None, set[int]] = {}
        for b, name in enumerate(rows):
            fitting = {v for v, expected in enumerate(outputs[name]) if is_version(found[b], expected[b])}
            versions[name] = versions.get(name, fitting) & fitting
        assert all(versions.values()), versions

    def serve(seed: int) -> Callable[[], None]:
        def work() -> None:
            draw = random.Random(seed)
            try:
                made = 0
                while made < 40:
                    chosen: list[str | None] = [None, *draw.sample(names, 2)]
                    rows = [draw.choice(chosen) for _ in range(len(X))]
                    try:
                        if made % 3:
                            with torch.no_grad(), bank.route(rows):
                                check(rows, model(X))
                                check(rows, model(X))
                        else:
                            with torch.no_grad(), closing(bank.plan(rows, tokens=2)) as plan, plan:
                                check(rows, model(X))
                                rows = rows[::-1]
                                plan.refill(rows)
                                check(rows, model(X))
                    except UnknownAdapterError:
                        continue
                    except ValueError as error:  # the last adapter of a family had gone, and another one came
                        assert "came after the plan was made" in str(error)
                        continue
                    made += 1
                    batches.append(rows)
            finally:
                if seed == 0:
                    stop.set()

        return work

    def replace() -> None:
        draw = random.Random(100)
        while not stop.is_set():
            name = draw.choice(names[:8])
            bank.load(name, folders[name][draw.randrange(2)])

    def unload() -> None:
        draw = random.Random(101)
        while not stop.is_set():
            name = draw.choice(names[8:])
            try:
                bank.unload(name, wait=draw.random() < 0.5, timeout=60)
            except AdapterInUseError:
                continue
            bank.register(name, folders[name][draw.randrange(2)])

    def fetch() -> None:
        draw = random.Random(102)
        while not stop.is_set():
            name = draw.choice(names[:8])
            bank.prefetch(name).result()
            bank.pin(name)
            bank.unpin(name)

    def watch() -> None:
        while not stop.is_set():
            stats = bank.stats()
            assert stats["resident"] <= max_resident and set(bank.names()) <= set(names)
            time.sleep(0.001)

    run_all(serve(0), serve(1), serve(2), replace, unload, fetch, watch)
    assert len(batches) == 120
    for name in bank.names():
        bank.unload(name, timeout=10)
    stats = bank.stats()
    assert stats["bytes"] == stats["table_bytes"] == 0
    assert sorted(bank._residency._space.slots) == list(range(max_resident))
    bank.close()


def test_serving_goes_on_while_an_adapter_is_read(folders, monkeypatch):
    """Neither reading nor writing an adapter keeps a batch whose adapters are there."""
    from fastpeft.serving.version import Version

    model = Model().requires_grad_(False)
    bank = make_bank(model, {"lora0": folders["lora0"][0]})
    bank.register("slow", folders["boft0"][0])
    began, go_on = threading.Event(), threading.Event()
    stage = Version.stage

    def slowly(self, *args):
        if self.name == "slow":
            began.set()
            assert go_on.wait(30)
        return stage(self, *args)

    monkeypatch.setattr(Version, "stage", slowly)
    future = bank.prefetch("slow")
    assert began.wait(30)
    with torch.no_grad(), bank.route(["lora0"], timeout=0):
        model(X[:1])
    bank.register("other", folders["mos0"][0])
    bank.unload("other")
    assert bank.names() == ["lora0", "slow"] and not future.done()
    go_on.set()
    future.result(30)
    bank.close()


def test_a_batch_waits_for_room(folders):
    bank = make_bank(Model(), {"lora0": folders["lora0"][0]}, max_resident=1)
    bank.register("mos0", folders["mos0"][0])
    order = []
    holding = threading.Event()

    def hold() -> None:
        with bank.route(["lora0"]):
            holding.set()
            time.sleep(0.2)
            order.append("lora0")

    def want() -> None:
        assert holding.wait(30)
        with bank.route(["mos0"], timeout=30):
            order.append("mos0")

    run_all(hold, want)
    assert order == ["lora0", "mos0"]


def test_unloading_waits_for_batches(folders):
    bank = make_bank(Model(), {"lora0": folders["lora0"][0]})
    order = []
    holding = threading.Event()

    def hold() -> None:
        with bank.route(["lora0"]):
            holding.set()
            time.sleep(0.2)
            order.append("batch")

    def unload() -> None:
        assert holding.wait(30)
        bank.unload("lora0")
        order.append("unloaded")
        assert bank.stats()["bytes"] == 0

    run_all(hold, unload)
    assert order == ["batch", "unloaded"]


def test_routes_are_a_threads_own(folders, outputs):
    model = Model().requires_grad_(False)
    names = list(folders)[::3]
    bank: AdapterBank = make_bank(model, {name: folders[name][0] for name in names})
    together = threading.Barrier(len(names) + 1)

    def serve(name: str | None) -> Callable[[], None]:
        def work() -> None:
            with torch.no_grad(), bank.route([name] * len(X)):
                for _ in range(5):
                    together.wait(30)
                    torch.testing.assert_close(model(X), outputs[name][0], rtol=1e-4, atol=1e-4)

        return work

    run_all(*(serve(name) for name in [*names, None]))


def test_a_plan_that_is_forgotten(folders):
    """Its adapters can go: finalizers run anywhere, and say so when somebody asks."""
    bank = make_bank(Model(), {"lora0": folders["lora0"][0]}, max_resident=1)
    bank.register("mos0", folders["mos0"][0])
    plan = bank.plan(["lora0"])
    plan.itself = plan  # type: ignore[attr-defined]
    del plan
    gc.collect()
    with bank.route(["mos0"], timeout=0):
        pass
    bank.plan(["mos0"])
    gc.collect()
    bank.unload("mos0", timeout=5)
