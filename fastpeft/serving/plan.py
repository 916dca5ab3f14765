"""Which rows of a batch have which adapter, grouped once per batch and read by every layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpeft.serving.calls import Calls
from fastpeft.serving.tables import FamilyTables
from fastpeft.serving.version import Version

if TYPE_CHECKING:
    from fastpeft.serving.bank import AdapterBank


class Group(NamedTuple):
    """The rows of one family in a batch of T rows."""

    family: int  # its number among the plan's
    tables: FamilyTables
    touched: int  # the layers that its adapters touch, as bits
    rows: Tensor  # (T,) int32, rows of one slot side by side
    slots: Tensor  # (T,) int32, the slot of each; −1 for rows of other families or none, which come last


class Batch(NamedTuple):
    """A plan for inputs of one number of rows."""

    rotations: list[Group]
    deltas: list[Group]
    packed: Tensor  # (families, 2, T): of all groups


class Plan:
    """The adapters of a batch; made by ``AdapterBank.plan`` and ``AdapterBank.route``.

    ``with plan:`` routes every forward inside, in this thread. ``AdapterBank.bind`` does so without state of a thread.
    The plan keeps its adapters where they are until ``close``, or until ``refill`` gives it others.

    Every tensor of a plan is made once and refilled in place. So a CUDA graph that was captured, or a graph that was
    compiled, goes on with whatever the plan holds. Such a plan has its families from the start: all that the bank's
    registered adapters are of.
    """

    def __init__(
        self,
        bank: AdapterBank,
        rows: Sequence[str | None],
        timeout: float,
        all_families: bool = False,
    ) -> None:
        self._bank = bank
        self._count = len(rows)
        self._batches: dict[tuple[int, ...], Batch] = {}  # by leading shape
        self._tokens: dict[int, tuple[Tensor, Batch]] = {}  # by rows for each entry
        self.calls: dict[tuple[int, torch.Size, torch.dtype], Calls | None] = {}  # of layers: see calls.py
        self.spares: dict[tuple[torch.Size, torch.dtype], dict[int, Tensor]] = {}
        self._versions: dict[str, Version] = {}
        self._open = False
        versions = bank._acquire(rows, timeout)
        self._kept = bank._residency.keep_families() if all_families else []
        try:
            masks = dict.fromkeys(self._kept, -1)  # a graph of a layer runs for every adapter that may come
            if not all_families:
                for version in versions.values():
                    for tables, mask in version.families.items():
                        masks[tables] = masks.get(tables, 0) | mask
            self._families = list(masks.items())
            self._entries = self._grouped(rows, versions).to(bank.device)
        except BaseException:
            bank._residency.release(versions.values(), self._kept)
            raise
        self._versions, self._open = versions, True

    def __len__(self) -> int:
        """The number of entries."""
        return self._count

    def tensors(self, tokens: int = 1) -> list[tuple[Tensor, Tensor]]:
        """For each family the rows and slots, (len · tokens,) int32 each, of inputs with so many rows for each entry.

        The same tensors for the life of the plan.
        """
        return [(packed[0], packed[1]) for packed in self._expanded(tokens)[0].unbind()]

    def refill(self, rows: Sequence[str | None], timeout: float | None = None) -> None:
        """Gives the plan other adapters, in place, for the batches that begin after this. No batch may be running.

        Raises:
            ValueError: the number of entries differs, the plan is closed, or an adapter is of a family that the plan
                has not: make a plan with that one.
            As ``AdapterBank.route``. The plan is unchanged then; but where its own adapters had made room for those
            that then failed, it is closed, and has no adapter for any row.
        """
        if not self._open:
            raise ValueError("the plan is closed: make another one")
        if len(rows) != self._count:
            raise ValueError(f"rows must have {self._count} entries, as the plan was made, got {len(rows)}")
        try:
            held = set(self._versions.values())
            versions = self._bank._acquire(rows, self._bank.timeout if timeout is None else timeout, held)
            try:
                entries = self._grouped(rows, versions)
            except BaseException:
                self._bank._residency.release(versions.values())
                raise
        except BaseException:
            if any(version.placement is None for version in self._versions.values()):
                self.close()
            raise
        self._write(entries)
        before, self._versions = self._versions, versions
        self._bank._residency.release(before.values())

    def _write(self, entries: Tensor) -> None:
        self._entries.copy_(entries)
        for tokens, (packed, _) in self._tokens.items():
            packed.copy_(_expand(self._entries, tokens))

    def close(self) -> None:
        """Gives the adapters back. What goes on with the plan's tensors has the base model."""
        if self._open:
            self._open = False
            self._write(self._grouped([None] * self._count, {}))
            versions, self._versions = self._versions, {}
            self._bank._residency.release(versions.values(), self._kept)

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self._bank._residency.abandon(self._versions.values(), self._kept)

    def __enter__(self) -> Plan:
        self._bank._push(self)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bank._pop()

    def batch(self, x: Tensor) -> Batch:
        """The groups for an input (..., in).

        Raises:
            ValueError: its shape does not go with the entries.
        """
        shape = tuple(x.shape[:-1])
        batch = self._batches.get(shape)
        if batch is None:
            if not self._open:
                raise ValueError("the plan is closed: make another one")
            batch = self._batches[shape] = self._expanded(self._tokens_of(shape))[1]
        return batch

    def _tokens_of(self, shape: tuple[int, ...]) -> int:
        count, total = self._count, 1
        for size in shape:
            total *= size
        # Several dimensions say which one counts sequences; a flat batch has as many rows for each.
        if total == count or (shape and shape[0] == count) or (len(shape) == 1 and count and total % count == 0):
            return total // count if count else 1
        raise ValueError(
            f"the batch is routed with {count} entries, and a layer got an input of leading shape {shape}: there must "
            f"be one entry for each sequence, ({count}, ..., in) or ({count} · tokens, in), or one for each row"
        )

    def _expanded(self, tokens: int) -> tuple[Tensor, Batch]:
        if tokens not in self._tokens:
            with torch.inference_mode(False), torch.no_grad():
                packed = _expand(self._entries, tokens)
            groups = [
                Group(family, tables, mask, rows, slots)
                for family, ((tables, mask), (rows, slots)) in enumerate(zip(self._families, packed, strict=True))
            ]
            batch = Batch(
                [group for group in groups if group.tables.family.rotates],
                [group for group in groups if not group.tables.family.rotates],
                packed,
            )
            self._tokens[tokens] = packed, batch
        return self._tokens[tokens]

    def _grouped(self, rows: Sequence[str | None], versions: Mapping[str, Version]) -> Tensor:
        """(families, 2, entries) int32, on the CPU: entries in the order of slots, and their slots."""
        members: dict[str | None, list[int]] = {}
        for entry, name in enumerate(rows):
            members.setdefault(name, []).append(entry)
        placed = sorted((versions[name].slot, name) for name in members if name is not None)
        known = {tables for tables, _ in self._families}
        for _, name in placed:
            if missing := [tables.family for tables in versions[name].families if tables not in known]:
                raise ValueError(
                    f"adapter {name!r} is of {missing[0]}, which came after the plan was made: make a new plan"
                )
        packed = []
        for tables, _ in self._families:
            order: list[int] = []
            slots: list[int] = []
            rest = list(members.get(None, ()))
            for slot, name in placed:
                if tables in versions[name].families:
                    order += members[name]
                    slots += [slot] * len(members[name])
                else:
                    rest += members[name]
            packed.append([order + rest, slots + [-1] * len(rest)])
        with torch.inference_mode(False):
            return torch.tensor(packed, dtype=torch.int32, device="cpu").view(len(packed), 2, len(rows))


def _expand(entries: Tensor, tokens: int) -> Tensor:
    """(families, 2, entries) -> (families, 2, entries · tokens): entry e has the rows e · tokens … of an input."""
    if tokens == 1:
        return entries.clone()
    inside = torch.arange(tokens, dtype=torch.int32, device=entries.device)
    rows = entries[:, 0, :, None] * tokens + inside
    slots = entries[:, 1, :, None].expand_as(rows)
    return torch.stack([rows.flatten(1), slots.flatten(1)], 1)


class Route:
    """A plan for the time of a ``with``."""

    def __init__(self, make: Callable[[], Plan]) -> None:
        self._make = make
        self._plans: list[Plan] = []

    def __enter__(self) -> Plan:
        plan = self._make()
        self._plans.append(plan)
        return plan.__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        plan = self._plans.pop()
        plan.__exit__(kind, error, trace)
        plan.close()
