"""Small models with adapters of every method in folders, and the same adapters loaded into a copy, as the oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import BOFT, FOURIERFT, LORA, MOS, fill
from small_models import Model
from torch import Tensor, nn

import fastpeft
from fastpeft.serving import AdapterBank

METHODS = [LORA, MOS, BOFT, FOURIERFT]
OPTIONS: dict[str, Any] = {
    "lora": LORA.config(),
    "lora_other_ranks": LORA.config(use_rslora=True, rank_pattern={"up": 7, r"blocks\.0\..*q": 1}, lora_alpha=3),
    "lora_alphas": LORA.config(alpha_pattern={"down": 1}, target_modules=["up", "down"]),
    "mos": MOS.config(),
    "mos_other_shards": MOS.config(shards_per_vector=4, r=2, private_rank=0, target_modules=["q", "up"]),
    "boft": BOFT.config(),
    "boft_one_factor": BOFT.config(boft_n_butterfly_factor=1, boft_block_size=8),
    "boft_block_num": BOFT.config(boft_n_butterfly_factor=1, boft_block_size=0, boft_block_num=2),
    "fourierft": FOURIERFT.config(),
    "fourierft_other_seed": FOURIERFT.config(random_loc_seed=5, n_frequency_pattern={"up": 12}),
    "fourierft_transposed": FOURIERFT.config(transposed=True),
}


def save(folder: Path, config: Any, seed: int = 0, base: Callable[[], nn.Module] = Model) -> Path:
    """An adapter of that configuration, with values in it, in a folder."""
    fastpeft.save_adapter(fill(fastpeft.adapt(base(), config), seed), folder)
    return folder


def save_all(
    folder: Path, configs: Mapping[str, Any] = OPTIONS, base: Callable[[], nn.Module] = Model
) -> dict[str, Path]:
    return {name: save(folder / name, config, i, base) for i, (name, config) in enumerate(configs.items())}


def make_bank(base: nn.Module, folders: Mapping[str, Path] = {}, **options: Any) -> AdapterBank:
    """A bank on a model, small, with these adapters in it."""
    sizes = {"max_resident": 16, "max_resident_bytes": 1 << 21, "max_rank": 8}
    bank = AdapterBank(base, **{**sizes, **options})
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


class Switched:
    """The oracle: a model that holds the same adapters and is switched for each row."""

    def __init__(self, base: nn.Module, folders: Mapping[str, Path]) -> None:
        self.model = copy.deepcopy(base)
        for name, folder in folders.items():
            fastpeft.load_adapter(self.model, folder, name)

    def cast(self, dtype: torch.dtype) -> Switched:
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).to(dtype)
        return twin

    def __call__(self, x: Tensor, rows: Sequence[str | None], run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """x (B, …): row b with the adapter rows[b]."""
        with torch.no_grad():
            found = []
            for b, name in enumerate(rows):
                fastpeft.set_adapter(self.model, name)
                found.append(run(self.model, x[b : b + 1]))
            return torch.cat(found)
