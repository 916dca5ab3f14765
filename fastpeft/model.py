"""Adapters on whole models: adapt, switch, merge, save, load.

Nothing here knows a method: what differs between them is declared in ``fastpeft.nn``.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastpeft import files, sharded
from fastpeft.config import AdapterConfig, in_wanted_layer, matches
from fastpeft.nn import METHODS, Adapted, Adapter
from fastpeft.nn.linear import check_adapter_name, features_of, make_adapted, merge_target, site_of


def adapt(model: nn.Module, config: Any, adapter_name: str = "default") -> nn.Module:
    """Adds an adapter to a model, in place, freezes everything that is not one, and makes this one the active one.

    A freshly adapted model computes exactly what it computed before. Parts that are to be trained beside the adapter,
    such as a new classification head, are set free again afterwards with ``requires_grad_()``.

    Args:
        model: any module.
        config: LoraConfig, MosConfig, BOFTConfig, OFTConfig or FourierFTConfig, or PEFT's object of the same name.
        adapter_name: under which the adapter is kept; several can be held, switched and active together.

    Returns:
        The model itself.

    Raises:
        ValueError: nothing matches ``target_modules``, a matched module cannot be adapted, the configuration does not
            fit one of the layers, the name is taken, or adapters are merged. The model is unchanged then.
        TypeError: not a module or not a configuration.
    """
    check_model(model)
    own = copy.deepcopy(own_config(config))  # the caller may go on changing theirs
    check_adapter_name(adapter_name)
    check_not_merged(model)
    if adapter_name in adapter_names(model):
        raise ValueError(f"adapter_name {adapter_name!r} is taken: the model holds {', '.join(adapter_names(model))}")
    layers = find_targets(model, own)
    _attach(model, layers, _build(own, layers), adapter_name)
    return model


def adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable parameters of the active adapters, each once, for an optimizer."""
    check_model(model)
    active = (layer.adapters[name] for layer in adapted_layers(model).values() for name in layer.active)
    unique = {id(parameter): parameter for adapter in active for parameter in adapter.parameters()}
    return (parameter for parameter in unique.values() if parameter.requires_grad)


def set_adapter(model: nn.Module, adapter: str | Sequence[str] | None) -> None:
    """Makes one adapter, or several together, the active ones; None is the base alone.

    Several deltas add up; several rotations are applied one after the other.

    Raises:
        ValueError: the model holds no adapter of that name, or adapters are merged.
    """
    check_model(model)
    names = (adapter,) if isinstance(adapter, str) else adapter or ()
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter must be a name, a list of names or None, got {adapter!r}")
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"adapter must be one of {', '.join(known) or '(none)'}, got {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"adapter must name each adapter once, got {list(names)}")
    check_not_merged(model)
    for layer in adapted_layers(model).values():
        layer.active = tuple(name for name in names if name in layer.adapters)


def merge(model: nn.Module, keep_base: bool = True) -> None:
    """Puts the active adapters into the base weights, so that the model costs what the base costs.

    Args:
        keep_base: keep a copy of every changed weight for :func:`unmerge`. False needs no memory but cannot be undone.

    Raises:
        ValueError: merged already, nothing is active, a base weight cannot take it (quantised, or shared with another
            module), or an adapter is not finite. The model is unchanged then.
    """
    check_model(model)
    check_not_merged(model)
    layers = {path: layer for path, layer in adapted_layers(model).items() if layer.active}
    if not layers:
        raise ValueError("model has no active adapter to merge")
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(_memory(parameter), []).append(path)
    for path, layer in layers.items():
        with _naming(path):
            if sharded.is_sharded(layer):
                raise ValueError("its weight is spread over processes: save the adapter and merge it on one process")
            merge_target(layer)
        if len(sharing := owners[_memory(layer.weight)]) > 1:
            others = ", ".join(repr(other) for other in sharing if other != path)
            raise ValueError(f"layer {path!r} shares its weight with {others}, and merging would change both")
    if not keep_base:  # what cannot be taken back is tried first
        for path, layer in layers.items():
            with _naming(path):
                layer.adapted_weight(layer.active)
    done: list[Any] = []
    try:
        for path, layer in layers.items():
            with _naming(path):
                layer.merge(keep_base=keep_base)
            done.append(layer)
    except BaseException:
        for layer in done if keep_base else []:
            layer.unmerge()
        raise


def _memory(tensor: Tensor) -> int:
    """Equal for tensors that start at one place, even if they are two Parameters or two views."""
    return tensor.data_ptr() or id(tensor)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Puts the layer's path before a ValueError's message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {path!r}: {error}") from error


def unmerge(model: nn.Module) -> None:
    """Gives the base weights back bit for bit and the adapters their work. Does nothing where nothing is merged.

    Raises:
        ValueError: it was merged with ``keep_base=False``.
    """
    check_model(model)
    layers = adapted_layers(model)
    for path, layer in layers.items():
        if layer.merged and layer._base_weight is None:
            raise ValueError(f"layer {path!r} was merged with keep_base=False: load the base model again")
    for layer in layers.values():
        layer.unmerge()


def save_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str | None = None) -> None:
    """Writes an adapter to a folder: ``adapter_model.safetensors`` and ``adapter_config.json``.

    LoRA, BOFT, OFT and FourierFT are written in PEFT's format. MoS has a format of its own: each pool once as
    ``pools.<kind>.pool_A`` and ``.pool_B``, and each layer's shard numbers as ``layers.<path>.index_A`` and
    ``.index_B``. An interruption leaves the files that were there.

    Where a model's weights are spread over processes, all of them have to call this, and the first one writes.

    Args:
        adapter_name: which one; may be left out where exactly one is active.

    Raises:
        ValueError: there is no such adapter, or several are active and none is named.
    """
    check_model(model)
    adapter_name, layers = layers_with(model, adapter_name)
    adapters = {path: layer.adapters[adapter_name] for path, layer in layers.items()}
    first = next(iter(adapters.values()))
    method = type(first)
    values = first.config.to_dict()
    if values["target_modules"] in ("all-linear", None):  # what that means is the model's affair: write what it meant
        values["target_modules"] = sorted(adapters)
    values["base_model_name_or_path"] = name_of(model)
    sharded.reshard(model)
    tensors = sharded.gather(model, method.pack(adapters))
    if tensors is not None:
        files.write_folder(folder, values, tensors)


def load_adapter(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> nn.Module:
    """Reads an adapter that :func:`save_adapter` or PEFT wrote and makes it the active one.

    Where the model holds an adapter of that name with the same configuration already, its values are replaced and its
    Parameter objects kept. Of a model over several processes only such an adapter can be read, by every process.

    Returns:
        The model itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is truncated; tensors are missing, too many, of the wrong shape or not finite; the method or
            an option is not known; or the adapter does not fit the model. The model is unchanged then.
    """
    check_model(model)
    check_adapter_name(adapter_name)
    check_not_merged(model)
    values, tensors, together = files.read_folder(folder)
    method = METHODS.get(str(values.get("peft_type")).upper())
    source = f"adapter in {os.fspath(folder)!r}"
    if method is None:
        raise ValueError(f"{source}: peft_type must be one of {', '.join(METHODS)}, got {values.get('peft_type')!r}")
    tensors = method.plain_keys(tensors, source)
    config = method.reconcile(method.config_class.from_dict(values, source), tensors)
    held = {path: layer for path, layer in adapted_layers(model).items() if adapter_name in layer.adapters}
    layers: dict[str, nn.Module] = held or find_targets(model, config)
    if held:
        adapters = [layer.adapters[adapter_name] for layer in held.values()]
        made_with = adapters[0].config.computation()
        if made_with != config.computation():
            raise ValueError(
                f"{source}: the model's adapter {adapter_name!r} was made with {made_with}, "
                f"the file with {config.computation()}"
            )
    else:
        # On the meta device first: a file must not ask for memory before its tensors have been seen to fit.
        adapters = _build(config, layers, torch.device("meta"))
    expected = method.pack(dict(zip(layers, adapters, strict=True)))
    files.check_tensors(tensors, expected, source)
    if not held:
        adapters = _build(config, layers)
    by_path = dict(zip(layers, adapters, strict=True))
    method.check_file(by_path, tensors, source)
    if not together:  # said last: everything else is said more exactly
        raise ValueError(
            f"{source}: {files.CONFIG} is not the one that {files.TENSORS} was saved with; saving was interrupted, or "
            "it was edited"
        )
    sharded.reshard(model)
    for key, tensor in method.pack(by_path).items():
        sharded.assign(tensor, tensors[key])
    _attach(model, layers, adapters, adapter_name)
    return model


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers of a model by path; one that is used twice stands under its first path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Adapted)}


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters that a model holds, in the order in which they came."""
    return list(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.adapters))


def layers_with(model: nn.Module, adapter_name: str | None) -> tuple[str, dict[str, Any]]:
    """The name of an adapter, which may be left out where exactly one is active, and the layers that hold it, by path.

    Raises:
        ValueError: there is no such adapter, or several are active and none is named.
    """
    layers = adapted_layers(model)
    if adapter_name is None:
        active = sorted({name for layer in layers.values() for name in layer.active})
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given where not exactly one adapter is active, got {active}")
        adapter_name = active[0]
    found = {path: layer for path, layer in layers.items() if adapter_name in layer.adapters}
    if not found:
        known = ", ".join(adapter_names(model)) or "(none)"
        raise ValueError(f"adapter_name must be one of {known}, got {adapter_name!r}")
    return adapter_name, found


def name_of(model: nn.Module) -> str | None:
    """What a transformers model was loaded from."""
    return getattr(getattr(model, "config", None), "_name_or_path", None)


def own_config(config: Any) -> AdapterConfig:
    """The configuration itself, or ours for PEFT's object."""
    if isinstance(config, AdapterConfig):
        return config
    peft_type = None if isinstance(config, type) else getattr(config, "peft_type", None)
    method = METHODS.get(str(getattr(peft_type, "value", peft_type)))
    if method is None:
        known = ", ".join(m.config_class.__name__ for m in METHODS.values())
        raise TypeError(f"config must be one of {known}, or PEFT's of the same method, got {type(config).__name__}")
    return method.config_class.from_peft(config)


def find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
    """The layers that a configuration means, by path.

    Raises:
        ValueError: there are none, or one of them cannot be adapted.
    """
    wanted = config.target_modules
    if wanted is None:
        raise ValueError("target_modules must be given: 'all-linear', a regular expression or a list of names")
    everything = wanted == "all-linear"
    find_outputs: Any = getattr(model, "get_output_embeddings", lambda: None)
    outputs = find_outputs() if everything else None
    found: dict[str, nn.Module] = {}
    seen = {id(module) for layer in adapted_layers(model).values() for module in layer.adapters.modules()}
    for path, module in model.named_modules(remove_duplicate=False):  # a layer used twice goes by any of its paths
        if id(module) in seen:
            continue
        if everything:
            chosen = is_linear(module) and module is not outputs and not is_bypassed(model, path)
        else:
            chosen = matches(path, wanted)
        if not chosen or not in_wanted_layer(path, config):
            continue
        if config.exclude_modules is not None and matches(path, config.exclude_modules):
            continue
        reason = None
        if not is_linear(module):
            reason = f"a {type(module).__name__} is not a linear layer"
        elif is_bypassed(model, path):
            reason = "nn.MultiheadAttention reads its weight without calling it"
        elif "forward" in module.__dict__:
            reason = "its forward was replaced on the instance, as offloading hooks do, and would pass the adapter by"
        elif sharded.is_sharded(module):
            reason = "its weight is spread over processes: add adapters first, then spread the model"
        if reason is not None:
            raise ValueError(f"target_modules={wanted!r} matches layer {path!r}, which cannot be adapted: {reason}")
        seen.add(id(module))
        found[path] = module
    if not found:
        ends = sorted({path.rpartition(".")[2] for path, module in model.named_modules() if is_linear(module)})
        raise ValueError(f"target_modules={wanted!r} matches no layer; the model's linear layers end in {ends[:20]}")
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether a module maps x to W x: nn.Linear and its kin, quantised linears, transformers' Conv1D."""
    if features_of(module) is None or any(is_lazy(parameter) for parameter in module.parameters()):
        return False
    return all(name == "adapters" for name, _ in module.named_children())


def is_bypassed(model: nn.Module, path: str) -> bool:
    """Whether a layer's parent computes with its weight and never calls it."""
    return isinstance(_parent(model, path), nn.MultiheadAttention)


def _parent(model: nn.Module, path: str) -> nn.Module | None:
    return model.get_submodule(path.rpartition(".")[0]) if path else None


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")


def check_not_merged(model: nn.Module) -> None:
    for path, layer in adapted_layers(model).items():
        if layer.merged:
            raise ValueError(f"layer {path!r} has {', '.join(layer.merged)} merged: unmerge first")


def _build(config: AdapterConfig, layers: dict[str, nn.Module], device: torch.device | None = None) -> list[Adapter]:
    sites = [site_of(module, path) for path, module in layers.items()]
    if device is not None:
        sites = [dataclasses.replace(site, device=device) for site in sites]
    return METHODS[config.peft_type].build(config, sites)


def _attach(model: nn.Module, layers: dict[str, nn.Module], adapters: Sequence[Adapter], name: str) -> None:
    """The only place that changes a model, after everything that can fail."""
    for module, adapter in zip(layers.values(), adapters, strict=True):
        make_adapted(module)
        module.add_adapter(name, adapter)  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and adapted_layers(module):
            module.use_nested_tensor = False  # only its fused kernel takes nested tensors, see nn.linear.prepare
    adapted = adapted_layers(model).values()
    ours = {id(parameter) for layer in adapted for parameter in layer.adapters.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)
    for layer in adapted:
        layer.active = (name,) if name in layer.adapters else ()
