"""One version of an adapter: what a name meant from one load to the next. Batches use versions, not names."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft.nn.served import Part, check_finite
from fastpeft.serving.memory import Buffer, Pieces
from fastpeft.serving.source import Header, Source
from fastpeft.serving.tables import FamilyTables


@dataclass(frozen=True)
class Demand:
    """Rows that a version needs."""

    count: int
    width: int
    dtype: torch.dtype
    key: Hashable  # not None: shared with all versions that need rows of that key

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


class Placement(NamedTuple):
    """Where a resident version lies."""

    slot: int
    pieces: list[Pieces]  # for each of its demands


class Staged(NamedTuple):
    """A version's numbers, checked, on the CPU: all that can fail has been done."""

    parts: list[tuple[Part, FamilyTables, dict[str, Tensor]]]
    rows: list[Tensor | None]  # for each demand; None for shared ones, which are made where they are missing
    tensors: Mapping[str, Tensor]


class Version:
    """What is known of a version, resident or not. From ``leases`` on, fields change under the bank's lock."""

    def __init__(
        self, name: str, source: Source, header: Header, families: Mapping[FamilyTables, Sequence[int]]
    ) -> None:
        self.name, self.source = name, source
        self.method = header.method.config_class.peft_type
        self._mark = header.mark
        self.demands = [
            Demand(rows.count, rows.width, rows.dtype, rows.key) for part in header.serving.parts for rows in part.rows
        ]
        self.nbytes = sum(demand.count * demand.row_bytes for demand in self.demands)
        self.expanded_bytes = sum(
            part.expanded_numbers * part.rows[0].dtype.itemsize for part in header.serving.parts if part.rows
        )
        # For each family the layers that it touches, as bits.
        self.families = {tables: sum(1 << layer for layer in layers) for tables, layers in families.items()}
        self.leases = 0  # batches that use it
        self.retired = False  # its name is gone, or means another version
        self.placement: Placement | None = None

    @property
    def slot(self) -> int:
        """Of a version that is leased."""
        assert self.placement is not None
        return self.placement.slot

    def stage(self, header: Header, max_rank: int) -> Staged:
        """Reads the tensors and checks their numbers.

        Raises:
            ValueError: the files were changed since the version was made, or a number is not what it must be.
        """
        if header.mark != self._mark:
            raise ValueError(f"{header.said}: its files were changed since it was registered: load it again")
        tables = {each.family: each for each in self.families}
        with torch.inference_mode(False), torch.no_grad():
            tensors = header.tensors()
            parts, rows = [], []
            for part in header.serving.parts:
                try:
                    entries = tables[part.family].check(part.entries(tensors, max_rank), header.said)
                except ValueError as error:
                    raise _naming(error, header.said) from error
                parts.append((part, tables[part.family], entries))
                for each in part.rows:
                    rows.append(None if each.key is not None else _made(each, tensors, header.said))
            return Staged(parts, rows, tensors)

    def write(self, staged: Staged, placement: Placement, layers: Mapping[str, int], buffer: Buffer, made: set) -> None:
        """Puts the numbers where the placement says; nobody reads there.

        Args:
            layers: the number of each layer by its path.
            made: the keys of shared rows that are written; those that this writes are added.
        """
        with torch.inference_mode(False), torch.no_grad():
            at = 0
            for part, tables, entries in staged.parts:
                place = []
                for rows in part.rows:
                    pieces, numbers = placement.pieces[at], staged.rows[at]
                    at += 1
                    place += [
                        torch.arange(first, first + count, dtype=torch.int32, device="cpu") for first, count in pieces
                    ]
                    if rows.key is not None:
                        if rows.key in made:
                            continue
                        numbers = _made(rows, staged.tensors, self.name)
                        made.add(rows.key)
                    assert numbers is not None
                    arena, done = buffer.arena((rows.width,), rows.dtype), 0
                    for first, count in pieces:
                        arena[first : first + count].copy_(numbers[done : done + count])
                        done += count
                sites = torch.tensor([layers[site.path] for site in part.sites], device="cpu")
                tables.enter(placement.slot, part, sites, entries, torch.cat(place))


def _made(rows: Any, tensors: Mapping[str, Tensor], said: str) -> Tensor:
    try:
        made = rows.make(tensors).view(rows.count, rows.width)
        if made.dtype.is_floating_point:
            check_finite("one of its tensors", made)
    except ValueError as error:
        bad = [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor.to(rows.dtype)).all())]
        if bad:
            raise ValueError(f"{said}: {bad[0]} holds values that are not finite in {rows.dtype}") from error
        raise _naming(error, said) from error
    return made


def _naming(error: ValueError, said: str) -> ValueError:
    return error if said in str(error) else ValueError(f"{said}: {error}")
