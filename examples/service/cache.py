"""Keys and values of the requests that run: a row for each, in tensors that are made once."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


class RowCache(Cache):
    """Rows 0 … n − 1 belong to the n requests that run, each with a length of its own.

    A forward either begins rows (``begin``), with all of a prompt, or adds one token to every row (``extend``).
    What is not a row's own is zero, always: a masked place has no weight, but NaN · 0 would be NaN.
    """

    def __init__(self, layers: int, rows: int, length: int) -> None:
        self.most_rows, self.most_length = rows, length
        self.lengths: list[int] = []
        self._row_layers = [_RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._row_layers))
        self._new: list[int] | None = None
        self._at = self._places = torch.empty(0)
        self._longest = 0

    def begin(self, lengths: list[int]) -> None:
        """The next forward has the prompts of new rows, (len(lengths), longest), padded on the right."""
        assert len(self.lengths) + len(lengths) <= self.most_rows and max(lengths) <= self.most_length
        self._new = lengths
        self.lengths += lengths

    def extend(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The next forward has one token for each row.

        Returns:
            Its positions (n, 1), and the mask (n, 1, 1, longest) to add to scores: it hides what is not a row's own.
        """
        self._new = None
        self._places = torch.tensor(self.lengths, device=device)
        self._at = torch.arange(len(self.lengths), device=device)
        self._longest = max(self.lengths) + 1
        seen = torch.arange(self._longest, device=device) <= self._places[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        return self._places[:, None], mask[:, None, None]

    def extended(self) -> None:
        """It has been."""
        self.lengths = [length + 1 for length in self.lengths]

    def drop(self, row: int) -> None:
        """Empties a row; the last one takes its place."""
        last, length = len(self.lengths) - 1, self.lengths[row]
        for layer in self._row_layers:
            for tensor in (layer.keys, layer.values) if layer.is_initialized else ():
                tensor[row, :, : length + 1].zero_()  # a forward that failed may have written one more
                if row != last:
                    moved = self.lengths[last] + 1
                    tensor[row, :, :moved] = tensor[last, :, :moved]
                    tensor[last, :, :moved].zero_()
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()


class _RowLayer(CacheLayerMixin):
    is_sliding = False
    keys: Tensor  # (rows, heads, length, width)
    values: Tensor

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, like in (("keys", key_states), ("values", value_states)):
            _, heads, _, width = like.shape
            setattr(self, name, like.new_zeros(self._cache.most_rows, heads, self._cache.most_length, width))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        """(rows, heads, tokens, width) in, and all that these rows may look at out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self._cache
        if cache._new is not None:  # prompts see nothing but themselves
            first = len(cache.lengths) - len(cache._new)
            for i, length in enumerate(cache._new):
                self.keys[first + i, :, :length] = key_states[i, :, :length]
                self.values[first + i, :, :length] = value_states[i, :, :length]
            return key_states, value_states
        self.keys[cache._at, :, cache._places] = key_states[:, :, 0]
        self.values[cache._at, :, cache._places] = value_states[:, :, 0]
        n, longest = len(cache.lengths), cache._longest
        return self.keys[:n, :, :longest], self.values[:n, :, :longest]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self._cache._new is not None else self._cache._longest), 0

    def get_seq_length(self) -> int:
        return 0  # of what begins; rows that go on bring positions and a mask of their own

    def get_max_length(self) -> int:
        return self._cache.most_length
