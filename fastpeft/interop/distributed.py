"""Adapted models over several processes, on PyTorch's own engine; ``docs/several-gpus.md`` shows how.

``DistributedDataParallel`` takes an adapted model as it is. ``fully_shard`` takes it with the parameters that
:func:`keep_whole` names left out. ``parallelize_module`` takes it with :class:`ColumnParallel` and
:class:`RowParallel`, which cut the base's weights as PyTorch's styles do and leave the adapter's parameters whole on
every process: they are small, so all processes hold the same numbers and add up their gradients.

Nothing here knows a method: what differs between them is declared in ``fastpeft.nn``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from fastpeft.model import adapted_layers, check_model
from fastpeft.nn import Adapted, Adapter
from fastpeft.nn.linear import merge_target
from fastpeft.ops.base import check_input

# Fully sharded data parallelism


def keep_whole(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """The adapter parameters that ``fully_shard`` has to leave alone, since layers share them: MoS's pools.

    ``fully_shard`` gives every parameter to one group of layers, and a pool belongs to many. The pools stay whole on
    every process instead: they are set to the values of the mesh's first process, and from now on their gradients are
    averaged over the mesh, as ``fully_shard`` does with its own. Call it before the model is sharded, and let every
    process run every layer in every step. ::

        whole = keep_whole(model, mesh)
        for block in model.blocks:
            fully_shard(block, mesh=mesh, ignored_params=whole)
        fully_shard(model, mesh=mesh, ignored_params=whole)

    Args:
        model: an adapted model.
        mesh: the mesh that is given to ``fully_shard``; of one dimension, or two for hybrid sharding.

    Returns:
        The parameters, for ``ignored_params``. Empty for all methods but MoS.
    """
    check_model(model)
    adapters = [adapter for layer in adapted_layers(model).values() for adapter in layer.adapters.values()]
    sharing = [parameter for adapter in adapters if adapter.shares_parameters for parameter in adapter.parameters()]
    # A dictionary keeps its order; a set's differs from process to process, and all have to communicate in the same.
    whole = dict.fromkeys(sharing)
    for parameter in whole:
        if parameter.device.type != mesh.device_type:  # as fully_shard does with what it takes
            parameter.data = parameter.data.to(mesh.device_type)
        for dim in range(mesh.ndim):
            dist.broadcast(parameter.data, group=mesh.get_group(dim), group_src=0)
        trained = parameter.requires_grad
        parameter.requires_grad_()  # what is frozen takes no hook, and may be trained later
        parameter.register_hook(lambda gradient: _mean(gradient, mesh))
        parameter.requires_grad_(trained)
    return set(whole)


def _mean(gradient: Tensor, mesh: DeviceMesh) -> Tensor:
    gradient = gradient / mesh.size()
    for dim in range(mesh.ndim):
        dist.all_reduce(gradient, group=mesh.get_group(dim))
    return gradient


# Checkpoints


def once(state: Mapping[str, Any]) -> dict[str, Any]:
    """A model's state dict with every tensor under the first of its names alone.

    PyTorch's distributed checkpoints would write a pool of MoS once for every layer. Load what was saved of this with
    ``StateDictOptions(strict=False)``, which lets names be missing.
    """
    seen: set[tuple] = set()
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if type(value) in (Tensor, nn.Parameter) and value.numel():
            place = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            if place in seen:
                continue
            seen.add(place)
        kept[name] = value
    return kept


# Tensor parallelism


class _Style:
    """What the two styles have in common; comes before PyTorch's style, which knows about layers with no adapter."""

    by_rows: ClassVar[bool]
    input_layouts: Any
    output_layouts: Any
    use_local_output: Any
    src_data_rank: Any

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, Adapted):
            return super()._apply(module, device_mesh)  # type: ignore[misc]
        self._check(module, device_mesh.size())
        placement = Shard(0) if self.by_rows else Shard(1)
        _distribute(module, "weight", device_mesh, placement, self.src_data_rank)
        _distribute(module, "bias", device_mesh, placement if self.by_rows else Replicate(), self.src_data_rank)
        if self.src_data_rank is not None:
            for parameter in module.adapters.parameters():
                dist.broadcast(parameter.data, group=device_mesh.get_group(), group_src=self.src_data_rank)
        module.__class__ = split_class(type(module))  # type: ignore[assignment, arg-type]
        module._style = self  # type: ignore[assignment]
        return module

    def _check(self, module: Any, size: int) -> None:
        """Raises ValueError for a layer that cannot be cut."""
        style = type(self).__name__
        if isinstance(module, SplitLinear):
            raise ValueError(f"{style}: the layer is cut already")
        if module._base_weight is not None:
            raise ValueError(f"{style}: the layer has {', '.join(module.merged)} merged: unmerge first")
        if not module._base_is_linear:
            raise ValueError(f"{style} takes adapted nn.Linear layers, got a {type(module).__name__}")
        merge_target(module)  # has the words for weights that are not dense
        name = "out_features" if self.by_rows else "in_features"
        if getattr(module, name) % size:
            raise ValueError(f"{style}: {name}={getattr(module, name)} is no multiple of the mesh's {size} processes")
        for adapter_name, adapter in module.adapters.items():
            if reason := adapter.split_refusal(self.by_rows):
                raise ValueError(f"{style}: adapter {adapter_name!r} cannot be cut: {reason}")

    def run(self, layer: Any, x: Tensor, base: Any) -> Tensor:
        """The layer's output; base computes without adapters, on distributed tensors."""
        mesh = layer.weight.device_mesh
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, self.input_layouts, run_check=False)
        x = x.redistribute(placements=[Replicate() if self.by_rows else Shard(-1)])
        if layer.merged or not layer.active:
            y = base(x).redistribute(placements=self.output_layouts)
        else:
            y = self.adapted(layer, layer_adapter(layer, mesh), x, mesh)
        return y.to_local() if self.use_local_output else y

    def adapted(self, layer: Any, adapter: Adapter, x: DTensor, mesh: DeviceMesh) -> DTensor:
        raise NotImplementedError


class ColumnParallel(_Style, ColwiseParallel):
    """``ColwiseParallel`` for layers that may be adapted: every process computes some of the outputs.

    LoRA and MoS multiply only their own rows of B; BOFT rotates all of x and scales its own outputs; FourierFT
    transforms all of x and keeps its own outputs. x is whole on every process, so nothing is communicated; on the way
    back, beside the gradient of x, one all-reduce of the adapter's gradients.

    Args and behaviour are those of ``torch.distributed.tensor.parallel.ColwiseParallel``, also for what has no adapter.

    Raises:
        ValueError: when it is applied: out_features is no multiple of the mesh's size, the base has no plain weight,
            it is merged, or a method cannot be cut (OFT with coft). The layer is unchanged then. When the layer is
            called: several adapters are active, or dropout is.
    """

    by_rows = True

    def adapted(self, layer: Any, adapter: Adapter, x: DTensor, mesh: DeviceMesh) -> DTensor:
        local = x.to_local(grad_placements=[Partial()])
        check_input(local, layer.in_features, None)
        bias = None if layer.bias is None else layer.bias.to_local()
        y = adapter.linear_rows(local, layer.weight.to_local(), bias, part(layer.out_features, mesh))
        return DTensor.from_local(y, mesh, [Shard(-1)], run_check=False).redistribute(placements=self.output_layouts)


class RowParallel(_Style, RowwiseParallel):
    """``RowwiseParallel`` for layers that may be adapted: every process computes what some of the inputs add to all
    outputs, and the all-reduce that adds that up adds up the adapter's part with it.

    LoRA and MoS multiply their own columns of A; FourierFT transforms its own inputs with zeros for the others; BOFT
    applies its own blocks where windows of b · 2^(m−1) features lie within a process, and where they do not x is
    gathered first. On the way back there is one all-reduce of the adapter's gradients.

    Args and behaviour are those of ``torch.distributed.tensor.parallel.RowwiseParallel``, also for what has no adapter.

    Raises:
        ValueError: as :class:`ColumnParallel`, for in_features; DoRA cannot be cut in this direction.
    """

    by_rows = False

    def adapted(self, layer: Any, adapter: Adapter, x: DTensor, mesh: DeviceMesh) -> DTensor:
        columns = part(layer.in_features, mesh)
        if adapter.mixes_columns(columns.stop - columns.start):
            local = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
            check_input(local, layer.in_features, None)
        else:
            local = x.to_local()
            check_input(local, columns.stop - columns.start, None)
        y = adapter.linear_columns(local, layer.weight.to_local(), columns)
        whole = DTensor.from_local(y, mesh, [Partial()], run_check=False).redistribute(placements=self.output_layouts)
        return whole if layer.bias is None else whole + layer.bias


class SplitLinear(Adapted):
    """An adapted layer of whose weight every process holds a part; comes before the class that it had."""

    _style: _Style

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return self._style.run(self, input, super().forward)

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        if self._modules["adapters"]._modules.get(name) is not adapter:  # type: ignore[union-attr]
            raise ValueError(f"adapter {name!r} comes too late: add adapters first, then cut the layers")


@cache
def split_class(base: type[nn.Module]) -> type[nn.Module]:
    """The class of cut layers for a class of adapted ones."""
    return type(f"Split{base.__name__}", (SplitLinear, base), {"__module__": __name__})


def _distribute(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, source: int | None) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        spread = distribute_tensor(parameter, mesh, [placement], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


def part(features: int, mesh: DeviceMesh) -> slice:
    """This process's share of some features."""
    size = features // mesh.size()
    return slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)


def layer_adapter(layer: Any, mesh: DeviceMesh) -> Adapter:
    """The active adapter, with parameters whose gradients are sums over the mesh."""
    if len(layer.active) > 1:
        raise ValueError(f"a layer that is cut takes one active adapter, got {list(layer.active)}")
    adapter = layer.adapter(layer.active[0])
    if adapter.training and adapter.dropout_p > 0:
        raise ValueError(
            f"dropout of {adapter.dropout_p} would be drawn by every process for itself: a layer that is cut takes none"
        )
    if not torch.is_grad_enabled():
        return adapter
    view = object.__new__(type(adapter))
    view.__dict__.update(adapter.__dict__)
    view.__dict__["_parameters"] = summed(adapter, mesh)
    return view


class SumFunction(torch.autograd.Function):
    """Parameters as they are, and the sums of their gradients over the mesh, in one all-reduce."""

    @staticmethod
    def forward(ctx, mesh, *parameters):
        ctx.mesh = mesh
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    def backward(ctx, *gradients):
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total = DTensor.from_local(flat, ctx.mesh, [Partial()], run_check=False).full_tensor()
        pieces = total.split([gradient.numel() for gradient in gradients])
        return None, *(piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True))


# What layers share is to be summed once for each graph, not once for each layer. Views live as long as their graphs.
_SUMMED: WeakValueDictionary[tuple, Tensor] = WeakValueDictionary()


def summed(adapter: Adapter, mesh: DeviceMesh) -> dict[str, Any]:
    """An adapter's parameters by name, with gradients that are the sums over all processes of a mesh."""
    parameters: dict[str, Any] = dict(adapter._parameters)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    # Not for others: a node made in an earlier forward runs late, when fully_shard has looked for the gradient already.
    keep = adapter.shares_parameters and not torch.compiler.is_compiling()
    keys = [(id(parameter), parameter.data_ptr(), parameter.dtype, id(mesh)) for parameter in trained.values() if keep]
    views = [view for key in keys if (view := _SUMMED.get(key)) is not None]
    if len(views) < len(trained):
        views = SumFunction.apply(mesh, *trained.values())
        _SUMMED.update(zip(keys, views, strict=False))
    return {**parameters, **dict(zip(trained, views, strict=True))}
