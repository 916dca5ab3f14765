"""FourierFT in PEFT's ``FourierFTLinear``."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.interop.adapter import PeftAdapter, tensor_refusal
from fastpeft.ops.fourierft import Tables, apply_fourier, check_places, make_tables


class Places:
    """Places in a (out, in) spectrum with the operator's tables; layers with equal places share one."""

    def __init__(self, indices: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.cols = indices.cpu()
        self.shape = shape
        check_places(self.rows, self.cols, shape)
        self._tables = {torch.device("cpu"): make_tables(self.rows, self.cols, shape)}

    def tables(self, device: torch.device) -> Tables:
        if device not in self._tables:
            self._tables[device] = make_tables(self.rows.to(device), self.cols.to(device), self.shape)
        return self._tables[device]

    def __deepcopy__(self, memo: dict) -> Places:
        return self

    def __reduce__(self) -> Any:
        return places_for, (torch.stack([self.rows, self.cols]), self.shape)


# By what they hold, since PEFT keeps a tensor of its own in every layer. For as long as one layer uses them.
_PLACES: weakref.WeakValueDictionary[tuple, Places] = weakref.WeakValueDictionary()


def places_for(indices: Tensor, shape: tuple[int, int]) -> Places:
    """The shared places for PEFT's indices, (2, n).

    Raises:
        ValueError: one lies outside the spectrum.
    """
    key = (shape, indices.cpu().numpy().tobytes())
    places = _PLACES.get(key)
    if places is None:
        places = _PLACES[key] = Places(indices, shape)
    return places


class PeftFourier(PeftAdapter):
    layer_classes = ("peft.tuners.fourierft.layer.FourierFTLinear",)
    container = "fourierft_spectrum"
    known = frozenset(
        ("fourierft_spectrum", "fourierft_n_frequency", "fourierft_scaling", "fourierft_random_loc_seed", "indices")
    )

    def __init__(self, layer: Any, name: str) -> None:
        self.spectrum = layer.fourierft_spectrum[name]
        self.scaling = layer.fourierft_scaling[name]
        self.shape = (layer.out_features, layer.in_features)
        self.indices = layer.indices[name]
        self.places = layer._prepared[name]

    @classmethod
    def prepare(cls, layer: Any, name: str) -> Places:
        return places_for(layer.indices[name], (layer.out_features, layer.in_features))

    @staticmethod
    def facts(attributes: dict[str, Any], name: str) -> Any:
        return (
            id(attributes["_modules"]["fourierft_spectrum"]._parameters.get(name)),
            attributes["fourierft_scaling"].get(name),
            id(attributes["indices"].get(name)),
        )

    @classmethod
    def adapter_refusal(cls, layer: Any, name: str) -> str | None:
        indices = layer.indices[name]
        if indices.dim() != 2 or len(indices) != 2 or indices.dtype != torch.int64:
            return f"indices have shape {tuple(indices.shape)} and dtype {indices.dtype}, not (2, n) and torch.int64"
        if indices.is_meta:
            return "indices are on the meta device"
        return tensor_refusal({"fourierft_spectrum": (layer.fourierft_spectrum[name], (indices.shape[1],))})

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        tables = self.places.tables(x.device)
        return apply_fourier(x, weight, bias, self.spectrum, tables, self.shape, self.scaling)

    def add_to(self, y: Tensor, x: Tensor, base: nn.Module) -> Tensor:
        return y + self.linear(x, None, None)
