"""Any adapter as a LoRA, for programs that know nothing else."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft import files
from fastpeft.config import require_int
from fastpeft.model import check_model, check_not_merged, layers_with, name_of
from fastpeft.nn.linear import merge_target
from fastpeft.nn.lora import LoraConfig

MARGIN = 8  # directions beyond those that are wanted, so that a randomised decomposition finds these


def export_lora(
    model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None, rank: int | None = None
) -> dict[str, float]:
    """Writes an adapter of any method as a LoRA folder in PEFT's format.

    LoRA and MoS are written as they are. What other methods change of a weight, ΔW, is cut to the ``rank`` largest of
    its singular directions: no matrix of that rank is nearer to it. This builds ΔW, one layer at a time.

    Args:
        folder: where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
        adapter_name: which adapter; may be left out where exactly one is active.
        rank: the most that is wanted. None: as much as ΔW has in float32, at most its smaller side.

    Returns:
        For each layer ‖ΔW − B A‖ / ‖ΔW‖ in Frobenius norms; 0 where ΔW is 0.

    Raises:
        ValueError: there is no such adapter, adapters are merged, a base has no dense weight that ΔW could be told
            from, or rank is not positive. Nothing is written then.
    """
    check_model(model)
    check_not_merged(model)
    if rank is not None:
        require_int("rank", rank, 1)
    name, layers = layers_with(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for path, layer in layers.items():
        A, B, errors[path] = low_rank_of(layer, name, rank)
        ranks[path] = A.shape[0]
        tensors[f"base_model.model.{path}.lora_A.weight"] = A
        tensors[f"base_model.model.{path}.lora_B.weight"] = B
    most = max(ranks.values())
    # lora_alpha equal to the rank is a scaling of one.
    others = {path: r for path, r in ranks.items() if r != most}
    config = LoraConfig(
        r=most, lora_alpha=most, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks)
    )
    files.write_folder(folder, {**config.to_dict(), "base_model_name_or_path": name_of(model)}, tensors)
    return errors


@torch.no_grad()
def low_rank_of(layer: Any, name: str, rank: int | None) -> tuple[Tensor, Tensor, float]:
    """A (r, in) and B (out, r) with ΔW ≈ B A, and the relative error."""
    adapter = layer.adapter(name)
    exact = adapter.low_rank()
    if exact is not None and (rank is None or exact[0].shape[0] <= rank):
        return *exact, 0.0
    wide = copy.deepcopy(adapter).double()  # in float32, W would take digits of ΔW with it
    if exact is not None:
        delta = wide.delta_weight()
    else:
        base = merge_target(layer).double()
        delta = (wide.rotate_weight(base) if wide.rotates else wide.add_to_weight(base, base)) - base
    A, B = truncated(delta, rank)
    A, B = A.float(), B.float()
    size = torch.linalg.matrix_norm(delta)
    error = torch.linalg.matrix_norm(delta - B.double() @ A.double()) / size if size > 0 else size
    return A, B, float(error)


def truncated(
    matrix: Tensor,  # (out, in)
    rank: int | None,
) -> tuple[Tensor, Tensor]:  # (r, in), (out, r)
    """The factors of the nearest matrix of a rank, or of the least rank that float32 cannot tell from the matrix."""
    least = min(matrix.shape)
    if rank is not None and 4 * (rank + MARGIN) < least:
        # Some products instead of a decomposition of the whole, which takes minutes at 4096.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + MARGIN, niter=4)
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        rank = int((s > torch.finfo(torch.float32).eps * s[0]).sum())
    rank = max(min(rank, least), 1)
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root
