"""Which adapters are in the fast memory, and who is using them.

Two locks. ``_changed`` guards the books and is held for moments, never while numbers are read, written or multiplied.
``_loading`` lets one thread at a time bring adapters in; batches whose adapters are there pass it by. A batch takes a
**lease** on every version that it uses, all of them at once. What is leased, pinned or of one's own batch stays,
and a version that was unloaded or replaced leaves with its last lease.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from fastpeft.nn.adapter import Site
from fastpeft.nn.served import Family
from fastpeft.serving.memory import Buffer, Extents, Pieces
from fastpeft.serving.source import Header, Source, read_header
from fastpeft.serving.tables import FamilyTables
from fastpeft.serving.version import Demand, Placement, Staged, Version


class UnknownAdapterError(KeyError):
    """A bank holds no adapter of that name."""

    def __str__(self) -> str:  # KeyError's own would put the message in quotation marks
        return str(self.args[0])


class AdapterInUseError(RuntimeError):
    """An adapter was to go at once, and a batch uses it."""


class BankFullError(RuntimeError):
    """There is no room for an adapter beside those that are pinned or in use."""


class Space:
    """What is free: slots, bytes, and the rows that several versions share."""

    def __init__(self, slots: int, size: int) -> None:
        self.slots = list(range(slots - 1, -1, -1))
        self.extents = Extents(size)
        self.shared: dict[Hashable, tuple[Pieces, int]] = {}  # key -> where, and how many versions use it

    def copy(self) -> Space:
        twin = Space(0, 0)
        twin.slots, twin.extents, twin.shared = self.slots.copy(), self.extents.copy(), self.shared.copy()
        return twin

    def place(self, demands: Sequence[Demand]) -> Placement | None:
        """Takes a slot and rows; None, and nothing taken, where there are none."""
        if not self.slots:
            return None
        found: list[Pieces] = []
        for demand in demands:
            if demand.key in self.shared and demand.key is not None:
                pieces, users = self.shared[demand.key]
                self.shared[demand.key] = pieces, users + 1
            else:
                taken = self.extents.take(demand.count, demand.row_bytes)
                if taken is None:
                    self._give(demands[: len(found)], found)
                    return None
                pieces = taken
                if demand.key is not None:
                    self.shared[demand.key] = pieces, 1
            found.append(pieces)
        return Placement(self.slots.pop(), found)

    def give(self, demands: Sequence[Demand], placement: Placement) -> None:
        self.slots.append(placement.slot)
        self._give(demands, placement.pieces)

    def _give(self, demands: Sequence[Demand], found: Sequence[Pieces]) -> None:
        for demand, pieces in zip(demands, found, strict=True):
            if demand.key is not None:
                _, users = self.shared.pop(demand.key)
                if users > 1:
                    self.shared[demand.key] = pieces, users - 1
                    continue
            self.extents.give(pieces, demand.row_bytes)


class Residency:
    """The registered versions by name, and the resident ones."""

    def __init__(
        self, sites: Mapping[str, Site], slots: int, max_rank: int, dtype: torch.dtype, buffer: Buffer
    ) -> None:
        self._sites, self._max_rank, self._dtype, self._buffer = sites, max_rank, dtype, buffer
        self._numbers = {path: number for number, path in enumerate(sites)}
        self._slots = slots
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self._space = Space(slots, buffer.size)
        self._made: set[Hashable] = set()  # keys of shared rows that are written
        self._families: dict[Family, FamilyTables] = {}  # of the registered versions
        self._registered: dict[str, Version] = {}
        self._resident: OrderedDict[Version, None] = OrderedDict()  # least recently used first; retired ones too
        self._pinned: set[str] = set()
        self._ends = 0  # how often something that may make room has ended
        self._abandoned: deque[tuple[list[Version], list[FamilyTables]]] = deque()
        self._fences: dict[object, torch.cuda.Event] = {}
        # For families that are there, by layer, dtype and where in a plan each family comes: see calls.py.
        self.layer_calls: dict[tuple[int, torch.dtype, tuple[tuple[int, FamilyTables], ...]], Any] = {}
        self.counts = {"hits": 0, "misses": 0, "evictions": 0}

    # Names

    def names(self) -> list[str]:
        with self._changed:
            return list(self._registered)

    def registered(self) -> list[tuple[Version, bool, bool]]:
        """Each registered version, whether it is resident and whether it is pinned."""
        with self._changed:
            return [(each, each in self._resident, each.name in self._pinned) for each in self._registered.values()]

    def used_bytes(self) -> int:
        with self._changed:
            return self._buffer.size - self._space.extents.free_bytes

    def make(self, name: str, source: Source) -> tuple[Version, Header]:
        """A version that has no name yet; to be given one, or given up with ``drop``.

        Raises:
            FileNotFoundError, TypeError, ValueError: as read_header, or a rank is over the limit.
        """
        header = read_header(name, source, self._sites, self._dtype)
        parts = header.serving.parts
        if (rank := max((part.rank for part in parts), default=0)) > self._max_rank:
            raise ValueError(f"{header.said} has rank {rank}, and the bank's max_rank is {self._max_rank}")
        with self._changed:
            families = {
                self._tables_of(part.family): [self._numbers[site.path] for site in part.sites] for part in parts
            }
            for tables in families:
                tables.users += 1
        return Version(name, source, header, families), header

    def _tables_of(self, family: Family) -> FamilyTables:
        if family not in self._families:
            sites = list(self._sites.values())
            self._families[family] = FamilyTables(family, sites, self._slots, self._max_rank, self._dtype, self._buffer)
        return self._families[family]

    def families(self) -> list[FamilyTables]:
        with self._changed:
            return list(self._families.values())

    def stage(self, version: Version, header: Header | None = None) -> Staged:
        """The version's numbers, read and checked; its header is read again where it is not at hand."""
        if header is None:
            header = read_header(version.name, version.source, self._sites, self._dtype)
        return version.stage(header, self._max_rank)

    def keep_families(self) -> list[FamilyTables]:
        """All there are, kept as they are until ``drop_families``."""
        with self._changed:
            for tables in self._families.values():
                tables.users += 1
            return list(self._families.values())

    def drop_families(self, families: Iterable[FamilyTables]) -> None:
        with self._changed:
            for tables in families:
                tables.users -= 1
                if not tables.users:
                    del self._families[tables.family]
                    self.layer_calls.clear()

    def drop(self, version: Version) -> None:
        """Gives up what a version holds while it has a name or is to have one."""
        self.drop_families(version.families)

    def register(self, version: Version) -> None:
        """Gives a name to a version, in place of another one that had it."""
        with self._changed:
            self._name(version)

    def bring_in_as_name(self, version: Version, staged: Staged, timeout: float) -> None:
        """Brings a version in that has no name yet and gives it its name, or raises and changes neither.

        Raises:
            BankFullError: as acquire.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._loading:
                with self._changed:
                    self._refuse_what_never_fits([version])
                    ends, placed = self._ends, self._make_room([version])
                if placed:
                    self._write(placed, {version: staged})
                    with self._changed:
                        self._name(version)
                        version.leases -= 1  # of _make_room
                        self._ended()
                    return
            self._wait_for_an_end(ends, deadline, [version])

    def _name(self, version: Version) -> None:
        before = self._registered.get(version.name)
        self._registered[version.name] = version
        if before is not None:
            self._retire(before)

    def remove(self, name: str, wait: bool, timeout: float | None) -> Version:
        """See AdapterBank.unload."""
        with self._changed:
            self._drain()
            version = self._find(name)
            if version.leases and not wait:
                raise AdapterInUseError(f"adapter {name!r} is used by {version.leases} batch(es)")
            del self._registered[name]
            self._pinned.discard(name)
            self._retire(version)
            if not self._wait(lambda: version.leases == 0, None if timeout is None else time.monotonic() + timeout):
                raise TimeoutError(
                    f"adapter {name!r} is still used by {version.leases} batch(es) after {timeout} s; its name is "
                    "gone, and its memory is free when they end"
                )
            return version

    def pin(self, name: str, pinned: bool) -> None:
        with self._changed:
            self._find(name)
            (self._pinned.add if pinned else self._pinned.discard)(name)
            self._ended()

    def _find(self, name: str) -> Version:
        try:
            return self._registered[name]
        except (KeyError, TypeError):
            known = list(self._registered)
            shown = ", ".join(known[:8]) + (f", … ({len(known)} in all)" if len(known) > 8 else "")
            raise UnknownAdapterError(f"no adapter is named {name!r:.300}; there are: {shown or '(none)'}") from None

    # Leases

    def acquire(self, names: Iterable[str], timeout: float, held: Collection[Version] = ()) -> dict[str, Version]:
        """A lease on the version of each name, all of them resident.

        Args:
            held: versions that the caller has leases on and gives back next; they do not stand in its own way.

        Raises:
            UnknownAdapterError: a name is nobody's.
            BankFullError: they do not fit beside what is pinned, or not beside what other batches use, for that long.
            FileNotFoundError, ValueError: an adapter that was not resident cannot be read, or is not what it said.
        """
        wanted = list(names)
        staged: dict[Version, Staged] = {}
        first, deadline = True, 0.0
        while True:
            with self._changed:
                self._drain()
                versions = {name: self._find(name) for name in wanted}
                absent = [each for each in versions.values() if each not in self._resident]
                if first:
                    self.counts["hits"] += len(versions) - len(absent)
                if not absent:
                    self._lease(versions.values())
                    return versions
                self._refuse_what_never_fits(versions.values())
            if first:
                first, deadline = False, time.monotonic() + timeout
            with self._loading:
                for version in absent:
                    if version not in staged and version not in self._resident:
                        staged[version] = self.stage(version)
                with self._changed:
                    if any(each.retired for each in versions.values()):
                        continue
                    absent = [each for each in versions.values() if each not in self._resident]
                    if any(each not in staged for each in absent):
                        continue
                    ends, placed = self._ends, self._make_room(list(versions.values()), held)
                if placed is not None:
                    if held:
                        self._record()  # their rows may be written next
                    self._write(placed, staged, versions.values())
                    return versions
            self._wait_for_an_end(ends, deadline, versions.values())

    def use(self, name: str) -> bool:
        """Whether an adapter is resident, and then the most recently used one.

        Raises:
            UnknownAdapterError: the name is nobody's.
        """
        with self._changed:
            self._drain()
            version = self._find(name)
            if version not in self._resident:
                return False
            self.counts["hits"] += 1
            self._resident.move_to_end(version)
            return True

    def release(self, versions: Iterable[Version], families: Iterable[FamilyTables] = ()) -> None:
        self._record()
        with self._changed:
            self._unlease(versions)
            self.drop_families(families)

    def abandon(self, versions: Iterable[Version], families: Iterable[FamilyTables]) -> None:
        """As release, for finalizers, which may run anywhere, between two lines of this class as well."""
        self._abandoned.append((list(versions), list(families)))

    def _drain(self) -> None:
        while self._abandoned:
            versions, families = self._abandoned.popleft()
            self._unlease(versions)
            self.drop_families(families)

    def _lease(self, versions: Iterable[Version]) -> None:
        for version in versions:
            version.leases += 1
            if version in self._resident:
                self._resident.move_to_end(version)

    def _unlease(self, versions: Iterable[Version]) -> None:
        for version in versions:
            version.leases -= 1
            if version.leases == 0 and version.retired:
                self._put_out(version)
        self._ended()

    def _retire(self, version: Version) -> None:
        version.retired = True
        self.drop(version)
        if version.leases == 0:
            self._put_out(version)
        self._ended()

    def _put_out(self, version: Version) -> None:
        if version in self._resident:
            del self._resident[version]
            self._free(self._space, version)

    def _free(self, space: Space, version: Version) -> None:
        assert version.placement is not None
        space.give(version.demands, version.placement)
        version.placement = None
        self._made &= space.shared.keys()

    # Room

    def _refuse_what_never_fits(self, versions: Iterable[Version]) -> None:
        together = set(versions)
        names = {each.name for each in together}
        kept = [each for each in self._resident if self._is_pinned(each) and each.name not in names]
        slots = self._slots - len(kept)
        size = self._buffer.size - sum(each.nbytes for each in kept)
        if len(together) > slots:
            raise BankFullError(
                f"{len(together)} adapters were asked for together, and there is room for {slots}: max_resident is "
                f"{self._slots}, and {len(kept)} others are pinned"
            )
        if (needed := _total(together)) > size:
            raise BankFullError(
                f"{len(together)} adapter(s) of {needed} bytes were asked for together, and there is room for {size}: "
                f"max_resident_bytes is {self._buffer.size}, and {len(kept)} others are pinned"
            )

    def _is_pinned(self, version: Version) -> bool:
        return version.name in self._pinned and not version.retired

    def _make_room(self, versions: Sequence[Version], held: Collection[Version] = ()) -> list[Version] | None:
        """Leases all of them and gives those a place that have none, putting others out, least recently used first.

        Returns:
            Those that got a place, to be written; None, and nothing has changed, where there is no room.
        """
        keep = set(versions)
        names = {each.name for each in keep}
        absent = [each for each in versions if each not in self._resident]
        space = self._space.copy()
        free = [each for each in self._resident if each.leases == (each in held) and each not in keep]
        replaced = [each for each in free if each.name in names]  # by a new version: nobody will ask for it again
        candidates = iter(replaced + [each for each in free if each.name not in names and not self._is_pinned(each)])
        victims: list[Version] = []
        places: list[Placement] = []
        for version in absent:
            while (place := space.place(version.demands)) is None:
                victim = next(candidates, None)
                if victim is None:
                    return None
                victims.append(victim)
                assert victim.placement is not None
                space.give(victim.demands, victim.placement)
            places.append(place)
        for key, (pieces, _) in self._space.shared.items():
            if space.shared.get(key, ((), 0))[0] != pieces:  # gone, or to be written in another place
                self._made.discard(key)
        self._space = space
        for victim in victims:
            del self._resident[victim]
            victim.placement = None
        for version, place in zip(absent, places, strict=True):
            version.placement = place
        self._lease(versions)
        self.counts["evictions"] += len(victims)
        return absent

    def _write(
        self, placed: Sequence[Version], staged: Mapping[Version, Staged], leased: Iterable[Version] | None = None
    ) -> None:
        """Writes what has got a place and makes it resident; gives places and leases back where that fails."""
        whole = False
        try:
            self._wait_for_readers()
            for version in placed:
                assert version.placement is not None
                version.write(staged[version], version.placement, self._numbers, self._buffer, self._made)
            self._finish()
            whole = True
        finally:
            with self._changed:
                for version in placed:
                    if whole:
                        self._resident[version] = None
                    else:
                        self._free(self._space, version)
                if whole:
                    self.counts["misses"] += len(placed)
                else:
                    self._unlease(placed if leased is None else leased)
                self._ended()

    def _ended(self) -> None:
        self._ends += 1
        self._changed.notify_all()

    def _wait(self, predicate: Callable[[], bool], deadline: float | None) -> bool:
        """Waits, under the lock, until something is true, and says whether it is."""
        while True:
            self._drain()
            if predicate():
                return True
            left = math.inf if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(min(left, 0.1))  # plans that are forgotten do not tell

    def _wait_for_an_end(self, ends: int, deadline: float, versions: Iterable[Version]) -> None:
        """Of anything that stood in the way when ``ends`` was read."""
        with self._changed:
            if not self._wait(lambda: self._ends != ends, deadline):
                asked = set(versions)
                used = sum(1 for each in self._resident if each.leases and each not in asked)
                raise BankFullError(
                    f"no room for {len(asked)} adapter(s) of {_total(asked)} bytes: of max_resident={self._slots} and "
                    f"max_resident_bytes={self._buffer.size}, {used} other(s) are used by batches that go on, and "
                    f"{len(self._pinned)} are pinned"
                )

    # On a GPU batches end, for the host, before their kernels do, and rows must not be written before those have run.

    def _record(self) -> None:
        if self._buffer.device.type == "cuda":
            stream = torch.cuda.current_stream(self._buffer.device)
            event = torch.cuda.Event()
            event.record(stream)
            self._fences[stream] = event

    def _wait_for_readers(self) -> None:
        if self._buffer.device.type == "cuda":
            for event in list(self._fences.values()):
                torch.cuda.current_stream(self._buffer.device).wait_event(event)

    def _finish(self) -> None:
        if self._buffer.device.type == "cuda":
            torch.cuda.current_stream(self._buffer.device).synchronize()


def _total(versions: Iterable[Version]) -> int:
    """Bytes of several versions, rows that they share counted once."""
    own = 0
    shared: dict[Hashable, int] = {}
    for version in versions:
        for demand in version.demands:
            size = demand.count * demand.row_bytes
            if demand.key is None:
                own += size
            else:
                shared[demand.key] = size
    return own + sum(shared.values())
