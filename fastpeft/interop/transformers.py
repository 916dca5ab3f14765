"""transformers' ``Trainer`` with checkpoints that hold what is trained and nothing of the frozen model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from fastpeft.model import adapted_layers, load_adapter, save_adapter, set_adapter

BESIDE = "trained_beside.safetensors"  # what is trained and is no adapter, such as a new head
ARGUMENTS = "training_args.bin"  # transformers' own name


def save_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Writes the active adapters of a model, and parameters that are trained beside them.

    One adapter is written to the folder itself, several to folders in it that have their names.

    Raises:
        ValueError: no adapter is active.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    names = active_adapters(model)
    for name in names:
        save_adapter(model, path if len(names) == 1 else path / name, name)
    beside = trained_beside(model)
    if beside:
        save_file({name: p.detach().cpu().contiguous() for name, p in beside.items()}, path / BESIDE)


def load_trained(model: nn.Module, folder: str | os.PathLike) -> None:
    """Reads what :func:`save_trained` wrote into the parameters of the same model, which stay the same objects.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: no adapter is active, or a file does not fit the model.
    """
    path = Path(folder)
    names, beside = active_adapters(model), trained_beside(model)
    if beside:
        if not (path / BESIDE).is_file():
            raise FileNotFoundError(f"folder {str(path)!r} has no {BESIDE}, and {', '.join(beside)} are being trained")
        tensors = load_file(path / BESIDE)
        for name, parameter in beside.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise ValueError(f"{path / BESIDE}: {name} must have shape {tuple(parameter.shape)}, got {found}")
    for name in names:
        load_adapter(model, path if len(names) == 1 else path / name, name)
    set_adapter(model, names)
    with torch.no_grad():
        for name, parameter in beside.items():
            parameter.requires_grad_().copy_(tensors[name])  # loading an adapter has frozen it


def active_adapters(model: nn.Module) -> list[str]:
    names = list(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.active))
    if not names:
        raise ValueError("model has no active adapter: fastpeft.adapt comes first")
    return names


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    adapters = {id(p) for layer in adapted_layers(model).values() for p in layer.adapters.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapters}


class AdapterCheckpoints(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Makes a trainer save, resume from and come back to what is trained alone: ``class Mine(AdapterCheckpoints,
    SFTTrainer)``. Raises NotImplementedError under FSDP and DeepSpeed, which gather and save by themselves.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError(
                "AdapterCheckpoints does not save under FSDP or DeepSpeed: use transformers' Trainer and "
                "torch.distributed.checkpoint there"
            )
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        assert folder is not None
        save_trained(self._trained(), folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self._trained(model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        assert folder is not None
        load_trained(self._trained(), folder)

    def _trained(self, model: Any = None) -> nn.Module:
        """The model inside whatever was wrapped around it."""
        return self.accelerator.unwrap_model(self.model if model is None else model, keep_torch_compile=False)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """transformers' Trainer, whose checkpoints are adapter folders that :func:`fastpeft.load_adapter` reads."""
