"""A catalog that several processes share, on one machine or on many: a folder that all of them see.

``FOLDER/<name>`` is a symbolic link to an adapter's folder, where the name has = for each of its /. What clients bring
lies in ``FOLDER/.uploads``. A link is made, replaced and removed in one step, and a process looks at it before each
request. So nobody has to be told of anything, and a process that starts anew has all adapters.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from fastpeft.serving import AdapterBank, UnknownAdapterError

from .catalog import Catalog, CatalogFullError, Entry

UPLOADS = ".uploads"
KEPT = 3600.0  # seconds for which files without a name stay: a request elsewhere may still read them

log = logging.getLogger("ray.serve")


def link(shared: Path, name: str, folder: Path) -> str:
    """Gives a name to the adapter in a folder, for all processes. Returns what the link says."""
    new, target = shared / f".{uuid.uuid4().hex}", os.fspath(folder)
    new.symlink_to(target)
    os.replace(new, shared / _spelled(name))
    return target


def _spelled(name: str) -> str:
    return name.replace("/", "=")  # which no name has


def _target(shared: Path, name: str) -> str | None:
    """What the link of a name says, if there is one."""
    if "=" in name or "\0" in name:
        return None
    try:
        return os.readlink(shared / _spelled(name))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENAMETOOLONG):  # EINVAL: not a link
            return None
        raise


class SharedCatalog(Catalog):
    """A catalog that follows a folder.

    Args:
        folder: shared by all processes, which see it under the same path. It is made where it is not there.
    """

    def __init__(self, bank: AdapterBank, base: str, folder: Path, **options: Any) -> None:
        super().__init__(bank, base, folder / UPLOADS, **options)
        self._uploads.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._seen: dict[str, str] = {}  # what links said when they were last looked at
        self._following = threading.RLock()  # guards it, and keeps the entries to what it says
        self.follow()

    def follow(self, name: str | None = None) -> None:
        """Takes over what the folder says of one name, or of all."""
        with self._following:
            if name is None:
                found = {each.replace("=", "/") for each in os.listdir(self._folder) if not each.startswith(".")}
                names = found | set(self._seen)
            else:
                names = {name}
            for each in names:
                target = _target(self._folder, each)
                if target != self._seen.get(each):
                    self._take(each, target)

    def _take(self, name: str, target: str | None) -> None:
        self._seen.pop(name, None)
        if target is not None:
            self._seen[name] = target
            try:
                return self.add(name, self._folder / target)
            except (ValueError, TypeError, OSError, CatalogFullError) as error:
                log.warning("adapter %r is left out: %s", name, error)
        with contextlib.suppress(UnknownAdapterError, ValueError):  # it had not come in, or is the base model
            super().remove(name)

    def remove(self, name: str, *, even_in_use: bool = True) -> None:
        """As ``Catalog.remove``, for all processes. Each knows its own requests only, so even_in_use must be true."""
        if not even_in_use:
            raise ValueError("even_in_use=false is not for several replicas: each knows only its own requests")
        with self._following:
            super().remove(name)
            self._seen.pop(name, None)
            self._mark(name)
            (self._folder / _spelled(name)).unlink(missing_ok=True)
        self._sweep()

    def _put(self, entry: Entry) -> None:
        with self._following:
            try:
                if entry.folder is not None:  # it is a client's, not one that the folder has told of
                    self._check_count(entry.name)
                    self._mark(entry.name)
                    self._seen[entry.name] = link(self._folder, entry.name, entry.folder.relative_to(self._folder))
            except BaseException:
                self._discard(entry)
                raise
            super()._put(entry)
        if entry.folder is not None:
            self._sweep()

    # Files

    def _place(self) -> Path:
        return self._uploads / uuid.uuid4().hex

    def _delete(self, folder: Path) -> None:
        """Not yet: another process may be about to read it. See _sweep."""

    def _mark(self, name: str) -> None:
        """Its files lose their name now."""
        target = _target(self._folder, name)
        if target is not None and (self._folder / target).parent == self._uploads:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder / target)

    def _sweep(self) -> None:
        """Deletes uploads that have had no name for long."""
        named = {_target(self._folder, each.replace("=", "/")) for each in os.listdir(self._folder)}
        for folder in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                old = time.time() - folder.stat().st_mtime > KEPT
                if old and os.fspath(folder.relative_to(self._folder)) not in named:
                    shutil.rmtree(folder)
