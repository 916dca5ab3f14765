"""Adapters by the names that clients know.

A name may be given to another adapter, or to none, while requests run with the one that it meant. So each adapter has
a name of its own in the bank, and leaves the bank with the last request that uses it.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastpeft.files import CONFIG, TENSORS
from fastpeft.serving import AdapterBank, AdapterInUseError, UnknownAdapterError
from service.threads import in_a_thread


class CatalogFullError(RuntimeError):
    """There are as many adapters as may be."""


@dataclass(eq=False)
class Entry:
    """What a name means, from when it is given to when it is taken away."""

    name: str
    inner: str | None  # the bank's name; None is the base model
    folder: Path | None = None  # an upload's own, which goes with it
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    gone: bool = False


class Catalog:
    """The base model and adapters, by name. Safe to use from many threads.

    Args:
        base: what clients call the base model.
        uploads: an empty folder for what they bring.
        max_adapters: how many adapters there may be.
    """

    def __init__(self, bank: AdapterBank, base: str, uploads: Path, *, max_adapters: int = 10_000) -> None:
        self.bank, self.base, self.max_adapters = bank, base, max_adapters
        self._uploads = uploads
        self._lock = threading.Lock()
        self._entries = {base: Entry(base, None)}
        self._numbers = itertools.count(1)

    def entries(self) -> list[Entry]:
        with self._lock:
            return list(self._entries.values())

    def find(self, name: str) -> Entry:
        """Raises UnknownAdapterError."""
        with self._lock:
            return self._find(name)

    def _find(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownAdapterError(f"no model is named {name!r:.300}")
        return self._entries[name]

    # Requests

    @contextlib.contextmanager
    def using(self, name: str):
        """The entry of a name, which stays what it is inside.

        Raises:
            UnknownAdapterError: nobody has the name.
        """
        with self._lock:
            entry = self._find(name)
            entry.users += 1
        try:
            yield entry
        finally:
            with self._lock:
                entry.users -= 1
                unused = entry.gone and entry.users == 0
            if unused:
                self._discard(entry)

    # Adapters

    def add(self, name: str, folder: Path) -> None:
        """Gives a name to an adapter in a folder that stays; it comes in when it is asked for.

        Raises:
            As ``AdapterBank.register``; ValueError where the name is the base model's.
            CatalogFullError: there are too many.
        """
        entry = self._new(name, None)
        self.bank.register(self._inner(entry), folder)
        self._put(entry)

    def upload(self, name: str, config: BinaryIO, tensors: BinaryIO) -> None:
        """Gives a name to an adapter that a client has sent, all of it checked. Nothing has changed where this raises.

        Raises:
            As ``AdapterBank.load``, and as ``add``. Messages speak of the client's name and files, not of the bank's.
        """
        entry = self._new(name, self._place())
        folder, inner = entry.folder, self._inner(entry)
        assert folder is not None
        folder.mkdir(parents=True)
        try:
            for file, content in ((CONFIG, config), (TENSORS, tensors)):
                with open(folder / file, "wb") as out:
                    shutil.copyfileobj(content, out)
            in_a_thread(self.bank.load, inner, folder, timeout=5.0)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, (ValueError, TypeError, FileNotFoundError)):
                said = str(error).replace(f" in {str(folder)!r}", "").replace(f"{folder}/", "")
                raise ValueError(said.replace(repr(inner), repr(name))) from error
            raise
        self._put(entry)

    def remove(self, name: str, *, even_in_use: bool = True) -> None:
        """Takes a name away. Requests that run or wait with its adapter finish with it.

        Raises:
            UnknownAdapterError: nobody has the name.
            AdapterInUseError: requests use it, and even_in_use is false.
            ValueError: it is the base model's.
        """
        with self._lock:
            entry = self._find(name)
            if entry.inner is None:
                raise ValueError(f"{name!r} is the base model and stays")
            if entry.users and not even_in_use:
                raise AdapterInUseError(f"adapter {name!r} is used by {entry.users} request(s)")
            del self._entries[name]
            unused = self._retire(entry)
        if unused:
            self._discard(entry)

    def _new(self, name: str, folder: Path | None) -> Entry:
        if name == self.base:
            raise ValueError(f"name {name!r} is the base model's: choose another one")
        if len(name) > 200:
            raise ValueError(f"name must have at most 200 characters, got {len(name)}")
        self._check_count(name)
        return Entry(name, f"{name}@{next(self._numbers)}", folder)

    def _place(self) -> Path:
        """For an upload, and for no other one."""
        return self._uploads / str(next(self._numbers))

    def _check_count(self, name: str) -> None:
        if name not in self._entries and len(self._entries) > self.max_adapters:
            raise CatalogFullError(f"there are {self.max_adapters} adapters already: remove one first")

    @staticmethod
    def _inner(entry: Entry) -> str:
        assert entry.inner is not None
        return entry.inner

    def _put(self, entry: Entry) -> None:
        try:
            with self._lock:
                self._check_count(entry.name)  # others may have come meanwhile
                before = self._entries.get(entry.name)
                self._entries[entry.name] = entry
                unused = before is not None and self._retire(before)
        except CatalogFullError:
            self._discard(entry)
            raise
        if before is not None and unused:
            self._discard(before)

    def _retire(self, entry: Entry) -> bool:
        entry.gone = True
        return entry.users == 0

    def _discard(self, entry: Entry) -> None:
        with contextlib.suppress(TimeoutError):  # a batch that ends just now: its memory is free when it has
            self.bank.unload(self._inner(entry), timeout=0)
        if entry.folder is not None:
            self._delete(entry.folder)

    def _delete(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
