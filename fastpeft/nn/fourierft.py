"""FourierFT (Gao et al., ICML 2024, arXiv 2405.03003), with PEFT's places and scaling."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.config import AdapterConfig, require_bool, require_finite, require_int, require_pattern
from fastpeft.nn.adapter import Adapter, Site, parameter_of
from fastpeft.nn.linear import AdaptedLinear
from fastpeft.nn.served import Column, Expected, Family, Part, Rows, Serving, Tensors, stack_rows
from fastpeft.ops.fourierft import Tables, apply_fourier, fourier_weight, make_tables, merge_fourier
from fastpeft.ops.fourierft_many import fourier_many_


@dataclass(kw_only=True)
class FourierFTConfig(AdapterConfig):
    """``ΔW = α · Re ifft2(S)`` with n trained entries in S.

    Args:
        n_frequency: n; at most in_features · out_features.
        scaling: α.
        random_loc_seed: of the places of the n entries, which all layers of one shape share.
        init_weights: True: a zero spectrum, so that a fresh adapter changes nothing. False: standard normal (PEFT's own
            default).
        transposed: the convention of the authors' own code, y = W x + x ΔW with places drawn for an (in, out) spectrum,
            instead of PEFT's, y = W x + ΔW x with an (out, in) one.
        n_frequency_pattern: module path or regular expression -> another n.
    """

    peft_type: ClassVar[str] = "FOURIERFT"

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    init_weights: bool = True
    transposed: bool = False
    n_frequency_pattern: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        require_int("n_frequency", self.n_frequency, 1)
        require_finite("scaling", self.scaling)
        require_int("random_loc_seed", self.random_loc_seed, 0)
        require_bool("init_weights", self.init_weights)
        require_bool("transposed", self.transposed)
        require_pattern("n_frequency_pattern", self.n_frequency_pattern, lambda name, n: require_int(name, n, 1))

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        if not self.transposed:  # an option that PEFT does not know, and would warn of
            del values["transposed"]
        return values


def frequency_for(path: str, config: FourierFTConfig) -> int:
    """n for a module. PEFT's rule here is not that of its rank patterns: ends of the path first, whole paths after."""
    pattern = config.n_frequency_pattern
    key = next((key for key in pattern if re.match(rf".*\.{key}$", path)), path)
    return pattern.get(key, config.n_frequency)


def draw_places(shape: tuple[int, int], n: int, seed: int, transposed: bool) -> tuple[Tensor, Tensor]:
    """Rows and columns, (n,) each, int64, on the CPU, of the entries of a (out, in) spectrum.

    The first n of a seeded permutation of all places, in PEFT as in the authors' code.
    """
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(shape[0] * shape[1], generator=generator, device="cpu")[:n]
    width = shape[0] if transposed else shape[1]
    rows, cols = places // width, places % width
    return (cols, rows) if transposed else (rows, cols)


def checked_frequency(config: FourierFTConfig, site: Site) -> int:
    n, entries = frequency_for(site.path, config), site.in_features * site.out_features
    if n > entries:
        raise site.error(f"n_frequency must be at most in_features * out_features = {entries}, got {n}")
    return n


class FourierPlaces:
    """The places of one shape and seed, and the operator's tables for them on every device where they are used.

    Layers and models share one object, made by :func:`places_for`. Nothing here is saved: the seed says it all.
    """

    def __init__(self, shape: tuple[int, int], n: int, seed: int, transposed: bool) -> None:
        self.shape, self.n, self.seed, self.transposed = shape, n, seed, transposed
        self.rows, self.cols = draw_places(shape, n, seed, transposed)
        self._tables = {torch.device("cpu"): make_tables(self.rows, self.cols, shape)}

    def tables(self, device: torch.device) -> Tables:
        """The operator's tables on a device."""
        if device not in self._tables:
            self._tables[device] = make_tables(self.rows.to(device), self.cols.to(device), self.shape)
        return self._tables[device]

    def __deepcopy__(self, memo: dict) -> FourierPlaces:
        return self

    def __reduce__(self):
        return places_for, (self.shape, self.n, self.seed, self.transposed)


# Shared for as long as one layer lives that uses them.
_PLACES: weakref.WeakValueDictionary[tuple, FourierPlaces] = weakref.WeakValueDictionary()


def places_for(shape: tuple[int, int], n: int, seed: int, transposed: bool = False) -> FourierPlaces:
    """The shared places for a (out, in) spectrum."""
    key = (shape, n, seed, transposed)
    places = _PLACES.get(key)
    if places is None:
        places = _PLACES[key] = FourierPlaces(*key)
    return places


@dataclass(frozen=True)
class FourierFamily(Family):
    """Spectra of n entries. The places are rows as well, one for each shape and seed."""

    n: int

    def columns(self, max_rank: int) -> dict[str, Column]:
        row = Column(empty=-1, numbers_rows=True)
        return {"row_spectrum": row, "place": row, "scaling": Column(dtype=torch.float32)}

    def arenas(self, site: Site, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {
            "arena_spectrum": ((self.n,), torch.promote_types(dtype, torch.float32)),
            "places": ((2, self.n), torch.int32),
        }

    def enlist(self, calls: Any, number: int, tables: dict[str, Any]) -> None:
        calls.fourier(number, **tables)

    def add_(self, y: Tensor, x: Tensor, tables: dict[str, Tensor], rows: Tensor, slots: Tensor) -> None:
        fourier_many_(y, x, **tables, rows=rows, slots=slots)


class FourierFTAdapter(Adapter):
    config_class = FourierFTConfig
    file_keys: ClassVar = {"spectrum": "fourierft_spectrum"}

    def __init__(self, config: FourierFTConfig, site: Site) -> None:
        super().__init__(config, site)
        self.n = checked_frequency(config, site)
        self.scaling = config.scaling
        shape = (site.out_features, site.in_features)
        self.places = places_for(shape, self.n, config.random_loc_seed, config.transposed)
        start = torch.zeros if config.init_weights else torch.randn
        self.spectrum = nn.Parameter(start(self.n, device=site.device, dtype=site.dtype))

    @classmethod
    def pack(cls, adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """Under other keys if transposed: PEFT has no such convention and is not to take the numbers for its own."""
        transposed = any(isinstance(each, FourierFTAdapter) and each.places.transposed for each in adapters.values())
        return {f"{key}_transposed" if transposed else key: value for key, value in super().pack(adapters).items()}

    @classmethod
    def serve(cls, config: FourierFTConfig, sites: Sequence[Site], dtype: torch.dtype) -> Serving:
        by_n: dict[int, list[Site]] = {}
        for site in sites:
            by_n.setdefault(checked_frequency(config, site), []).append(site)
        end = cls.file_keys["spectrum"] + ("_transposed" if config.transposed else "")
        keys = {site.path: f"base_model.model.{site.path}.{end}" for site in sites}
        tensors = {keys[site.path]: Expected((n,)) for n, members in by_n.items() for site in members}
        parts = [cls._serve_part(config, n, members, keys, dtype) for n, members in by_n.items()]
        return Serving(tensors, parts)

    @classmethod
    def _serve_part(
        cls, config: FourierFTConfig, n: int, sites: list[Site], keys: Mapping[str, str], dtype: torch.dtype
    ) -> Part:
        wide = torch.promote_types(dtype, torch.float32)
        rows, row_spectrum = stack_rows([(keys[site.path], False, 1, n) for site in sites], wide)
        shapes = [(site.out_features, site.in_features) for site in sites]
        place_of: dict[tuple[int, int], int] = {}
        for shape in dict.fromkeys(shapes):
            drawn = shape, n, config.random_loc_seed, config.transposed

            def make(_: Tensors, drawn: tuple = drawn) -> Tensor:
                return torch.stack(draw_places(*drawn)).int()

            place_of[shape] = len(sites) + len(place_of)
            rows.append(Rows(1, 2 * n, torch.int32, make, key=("places", *drawn)))

        def entries(*_: object) -> dict[str, Tensor]:
            return {
                "row_spectrum": row_spectrum,
                "place": torch.tensor([place_of[shape] for shape in shapes], device="cpu"),
                "scaling": torch.full((len(sites),), config.scaling, dtype=torch.float64, device="cpu"),
            }

        return Part(FourierFamily(n), sites, rows, entries, expanded_numbers=n * len(sites))

    def linear(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        tables = self.places.tables(x.device)
        return apply_fourier(x, weight, bias, parameter_of(self, "spectrum"), tables, self.places.shape, self.scaling)

    def delta(self, x: Tensor) -> Tensor:
        return self.linear(x, None, None)

    def delta_weight(self) -> Tensor:
        rows, cols = (places.to(self.spectrum.device) for places in (self.places.rows, self.places.cols))
        return fourier_weight(self.spectrum, rows, cols, self.places.shape, self.scaling)

    def add_to_weight(self, weight: Tensor, base: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, self.spectrum.dtype))
        return merge_fourier(wide, self.spectrum, self.places.tables(wide.device), self.scaling)

    def extra_repr(self) -> str:
        return f"n_frequency={self.n}, scaling={self.scaling:g}"


class FourierFTLinear(AdaptedLinear):
    """An ``nn.Linear`` with a FourierFT adapter: ``FourierFTLinear.from_linear(linear, FourierFTConfig())``."""

    adapter_class = FourierFTAdapter
