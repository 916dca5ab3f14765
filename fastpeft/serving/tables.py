"""A family's tables for all layers and slots, and the arenas that each layer reads.

A table is one tensor for the whole model, (layers, slots, …), so that an adapter is entered by one copy; a layer's part
of it is a view. Nothing is ever moved or made anew while a family is there: a CUDA graph may hold on to all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastpeft.nn.adapter import Site
from fastpeft.nn.served import Family, Part
from fastpeft.serving.memory import Buffer


class FamilyTables:
    """The tables of one family.

    Attributes:
        layers: for each layer of the bank what the family's operator takes, by name; None where the family cannot be.
        users: how many registered adapters and plans need the tables.
    """

    def __init__(
        self, family: Family, sites: Sequence[Site], slots: int, max_rank: int, dtype: torch.dtype, buffer: Buffer
    ) -> None:
        self.family = family
        self.users = 0
        self._columns = family.columns(max_rank)
        self._tables: dict[str, Tensor] = {}
        for name, column in self._columns.items():
            shape = (len(sites), slots, *column.shape)
            # Zeros are not touched before they are written.
            table = torch.zeros(shape, dtype=column.dtype, device=sites[0].device)
            self._tables[name] = table if column.empty == 0 else table.fill_(column.empty)
        self._arrays: dict[int, dict[str, Any] | None] = {}
        self.layers: list[dict[str, Tensor] | None] = []
        for number, site in enumerate(sites):
            arenas = family.arenas(site, dtype)
            tables = {name: table[number] for name, table in self._tables.items()}
            views = None if arenas is None else {name: buffer.arena(*kind) for name, kind in arenas.items()}
            self.layers.append(None if views is None else {**tables, **views})

    def arrays(self, number: int) -> dict[str, Any] | None:
        """A layer's part as arrays over the same memory, on a CPU; None where a number is not one that C++ takes."""
        if number not in self._arrays:
            found = self.layers[number]
            assert found is not None
            taken = all(table.dtype in (torch.float32, torch.int32) for table in found.values())
            self._arrays[number] = {name: table.numpy() for name, table in found.items()} if taken else None
        return self._arrays[number]

    def nbytes(self) -> int:
        return sum(table.nbytes for table in self._tables.values())

    def check(self, entries: Mapping[str, Tensor], said: str) -> dict[str, Tensor]:
        """An adapter's entries in the columns' dtypes.

        Raises:
            ValueError: a number is not finite there.
        """
        converted = {name: entries[name].to(column.dtype) for name, column in self._columns.items()}
        for name, values in converted.items():
            if values.dtype.is_floating_point and not bool(torch.isfinite(values).all()):
                raise ValueError(f"{said}: its {name} is not finite in {values.dtype}")
        return converted

    def enter(self, slot: int, part: Part, layers: Tensor, entries: Mapping[str, Tensor], place: Tensor) -> None:
        """Enters an adapter under a slot that nobody reads.

        Args:
            layers: (layers of the part,) their numbers.
            entries: as ``check`` gave them.
            place: (rows of the part,) int32, the arena's number of each of the adapter's rows.
        """
        for name, column in self._columns.items():
            values = entries[name]
            if column.numbers_rows:
                values = torch.where(values < 0, values, place[values.clamp(min=0).long()])
            table = self._tables[name]
            whole = torch.full((table.shape[0], *column.shape), column.empty, dtype=column.dtype, device="cpu")
            whole[layers] = values
            table[:, slot].copy_(whole)
