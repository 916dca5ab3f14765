"""Adapters in a folder that several processes share, without the processes: two catalogs with a bank each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_models import Asked, oracle, prompt_of, running, save_all
from service import shared
from service.asgi import Head, answer, portable
from service.catalog import CatalogFullError
from service.engine import Engine
from service.metrics import Metrics, together
from service.shared import SharedCatalog, link

from fastpeft.files import CONFIG, TENSORS
from fastpeft.serving import UnknownAdapterError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_all(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def two(folders: dict[str, Path], tmp_path: Path) -> Iterator[list[tuple[Engine, SharedCatalog]]]:
    link(tmp_path, "preset", folders["lora"])
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(running({}, max_rows=2)) for _ in range(2)]
        yield [(engine, SharedCatalog(engine.bank, "base", tmp_path, max_adapters=4)) for engine in engines]


def upload(catalog: SharedCatalog, name: str, folder: Path) -> None:
    with open(folder / CONFIG, "rb") as config, open(folder / TENSORS, "rb") as tensors:
        catalog.upload(name, config, tensors)


def names(catalog: SharedCatalog) -> list[str]:
    catalog.follow()
    return sorted(entry.name for entry in catalog.entries())


def test_what_one_is_brought_the_other_has(two, folders):
    (_, first), (engine, second) = two
    alone, prompt = oracle(folders), prompt_of(5)

    def tokens(name: str) -> list[int]:
        second.follow(name)
        with second.using(name) as entry:
            asked = Asked(prompt, 6, entry.inner)
            engine.submit(asked.request)
            return asked.tokens()[0]

    assert tokens("preset") == alone(prompt, 6, "lora")
    upload(first, "team/alice", folders["boft"])
    assert tokens("team/alice") == alone(prompt, 6, "boft")
    upload(first, "team/alice", folders["mos"])
    assert tokens("team/alice") == alone(prompt, 6, "mos")
    assert names(second) == ["base", "preset", "team/alice"]
    second.remove("team/alice")
    first.follow("team/alice")
    with pytest.raises(UnknownAdapterError):
        first.find("team/alice")
    assert names(first) == names(second) == ["base", "preset"]
    second.remove("preset")  # one of the folder's own; its files are somebody else's
    assert names(first) == ["base"] and (folders["lora"] / TENSORS).exists()
    with pytest.raises(ValueError, match="even_in_use"):
        second.remove("preset", even_in_use=False)


def test_a_request_keeps_the_adapter_it_began_with(two, folders):
    (_, first), (_, second) = two
    upload(first, "x", folders["boft"])
    second.follow("x")
    with second.using("x") as entry:
        upload(first, "x", folders["mos"])
        second.follow("x")
        assert second.find("x").inner != entry.inner and entry.inner in second.bank.names()
    assert entry.inner not in second.bank.names()


def test_files_without_a_name_go_after_a_while(two, folders, tmp_path: Path):
    (_, first), (_, second) = two
    upload(first, "x", folders["boft"])
    long_ago = time.time() - 2 * shared.KEPT
    for folder in (tmp_path / ".uploads").iterdir():
        os.utime(folder, (long_ago, long_ago))
    upload(second, "y", folders["mos"])
    assert len(os.listdir(tmp_path / ".uploads")) == 2  # old, but named
    second.follow()
    second.remove("x")
    assert len(os.listdir(tmp_path / ".uploads")) == 2  # it had its name until now
    for folder in (tmp_path / ".uploads").iterdir():
        os.utime(folder, (long_ago, long_ago))
    upload(first, "y", folders["mos"])
    assert len(os.listdir(tmp_path / ".uploads")) == 2  # y's before and now; the first had lost its name just now
    assert names(first) == names(second) == ["base", "preset", "y"]


def test_what_does_not_fit_is_left_out(two, folders, tmp_path: Path, caplog):
    (_, first), _ = two
    caplog.set_level(logging.WARNING, "ray.serve")
    link(tmp_path, "broken", tmp_path / "nowhere")
    link(tmp_path, "base", folders["mos"])
    (tmp_path / "a file").touch()
    assert names(first) == names(first) == ["base", "preset"]
    assert sorted(record.args[0] for record in caplog.records) == ["base", "broken"]  # told once
    for name in ("..", ".uploads", "a file", "a=b", "nul\0", "x" * 300, "é" * 200):
        first.follow(name)
        with pytest.raises(UnknownAdapterError):
            first.find(name)
    upload(first, "broken", folders["mos"])  # takes the place of what was there
    link(tmp_path, "preset", tmp_path / "nowhere")
    assert names(first) == ["base", "broken"]


def test_a_refused_upload_leaves_no_name(two, folders, tmp_path: Path):
    (_, first), (_, second) = two
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="name must be"):
        upload(first, "../x", folders["mos"])
    for i in range(3):
        upload(first, f"n{i}", folders["mos"])
    with pytest.raises(CatalogFullError):
        upload(first, "n3", folders["mos"])
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "n0", "n1", "n2"])
    second.follow()
    with pytest.raises(CatalogFullError):
        upload(second, "n3", folders["mos"])
    assert len(first.bank.names()) == len(second.bank.names()) == 4


def test_an_application_from_afar():
    seen: list[Any] = []

    async def app(scope, receive, send):
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        for piece in (b"one", b"", b"two"):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if scope["path"] == "/breaks":
            raise RuntimeError("half way")
        await send({"type": "http.response.body"})
        if scope["path"] == "/waits":
            seen.append("waits")
            try:
                await receive()
            finally:
                seen.append("told")
        raise RuntimeError("afterwards")

    async def pieces(path: str, most: int = 9) -> list[Head | bytes]:
        found: list[Head | bytes] = []
        scope = portable({"type": "http", "path": path, "app": object()})
        assert set(scope) == {"type", "path"}
        async with contextlib.aclosing(answer(app, scope, b"body")) as all_of_it:
            async for piece in all_of_it:
                found.append(piece)
                if len(found) == most:
                    break
        return found

    whole = [Head(201, [(b"a", b"b")]), b"one", b"two"]
    assert asyncio.run(pieces("/")) == whole
    assert seen == [{"type": "http.request", "body": b"body", "more_body": False}]
    with pytest.raises(RuntimeError, match="half way"):
        asyncio.run(pieces("/breaks"))
    asyncio.run(pieces("/waits", 3))
    assert "told" in seen or "waits" not in seen


def test_one_page_of_several():
    metrics = Metrics()
    metrics.responded("/health", 200)
    lines = together({"r1": metrics.page({"n": 1}, {"g": 2}), "r2": metrics.page({"n": 3}, {"g": 4})}).splitlines()
    assert 'fastpeft_n_total{replica="r1"} 1' in lines and 'fastpeft_n_total{replica="r2"} 3' in lines
    assert 'fastpeft_http_responses_total{replica="r2",endpoint="/health",status="200"} 1' in lines
    assert lines.index('fastpeft_g{replica="r1"} 2') + 1 == lines.index('fastpeft_g{replica="r2"} 4')
    kinds = [line for line in lines if line.startswith("#")]
    assert len(kinds) == len(set(kinds))
