"""What the methods share: checks of the base layer's arguments, the frozen product, autocast.

An adapted layer computes ``y = post(W · pre(x) + b) + delta(x)``. Operators that add a delta take the frozen product
into the same autograd node, so that the gradient of x is summed up in place instead of in one more pass over it. They
take ``weight=None`` for the delta alone: that is how several adapters, or one over a base layer that is not a plain
matrix, are put together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError where a tensor's shape is not the expected one; strings stand for any size."""
    if tensor.dim() != len(expected) or any(
        isinstance(want, int) and want != size for want, size in zip(expected, tensor.shape, strict=True)
    ):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on the device of x, {x.device}, got {tensor.device}")


def check_input(x: Tensor, in_features: int, weight: Tensor | None) -> None:
    """What a layer checks on every call; its own tensors fit each other by construction. weight may be unknown."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    if weight is None:
        return
    if x.dtype != weight.dtype and not (x.dtype.is_floating_point and autocast_dtype(x)):
        raise TypeError(f"x must have the dtype of weight, {weight.dtype}, got {x.dtype}")
    if x.device != weight.device:
        raise ValueError(f"x must be on the device of weight, {weight.device}, got {x.device}")


def check_base(x: Tensor, weight: Tensor | None, bias: Tensor | None, in_features: int, out_features: int) -> None:
    """Checks x (..., in), weight (out, in) and bias (out,) against each other and the adapter's sizes."""
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape (..., {in_features}), got {tuple(x.shape)}")
    if weight is None:
        if bias is not None:
            raise ValueError("bias must be None where weight is None, got a tensor")
        return
    check_shape("weight", weight, (out_features, in_features))
    if bias is not None:
        check_shape("bias", bias, (out_features,))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype and not autocast_dtype(x):
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    check_same_device(x, weight=weight, bias=bias)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants for matrix products on the device of x, or None."""
    if x.dtype == torch.float64 or not autocast_enabled(x):
        return None
    return torch.get_autocast_dtype(x.device.type)


def autocast_enabled(x: Tensor) -> bool:
    """Asked of the meta device, PyTorch raises."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def through_autocast(run: Callable, x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest):
    """run(x, weight, bias, *rest) on what autocast gives a linear layer, cast differentiably, and with autocast off:
    inside an operator dtypes are chosen by hand.
    """
    if not (torch._C._is_any_autocast_enabled() and autocast_enabled(x)):
        return run(x, weight, bias, *rest)
    if dtype := autocast_dtype(x):
        x = x.to(dtype)
        weight, bias = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    with torch.autocast(x.device.type, enabled=False):
        return run(x, weight, bias, *rest)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Inside an operator dtypes are chosen by hand."""
    if autocast_enabled(x):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def is_frozen(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the base needs no gradient, which the fused operators rely on."""
    return not ((weight is not None and weight.requires_grad) or (bias is not None and bias.requires_grad))


def as_rows(x: Tensor) -> Tensor:
    """(..., d) -> (T, d)."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def like_rows(y: Tensor, x: Tensor) -> Tensor:
    """(T, out) -> the leading shape of x and out. Not a view to autograd: what a Function returns can be changed."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]])


def once_differentiable(backward: Callable) -> Callable:
    """PyTorch's decorator, asked only where somebody wants a second derivative: it takes as long as a small kernel."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *grads):
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def needs_autograd(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def base_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad W, (..., in), outside autocast."""
    with without_autocast(grad):
        return grad @ weight


def dense_linear(x: Tensor, weight: Tensor | None, bias: Tensor | None, delta: Tensor) -> Tensor:
    """The reference backend's y = (W + ΔW) x + b, one dense matrix; W may be missing."""
    return F.linear(x, delta.to(x.dtype) if weight is None else weight + delta.to(weight.dtype), bias)


def add_rounded(y: Tensor | None, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """y + delta in place, added in the wider of the two dtypes and rounded once; y may be missing."""
    return delta.to(dtype) if y is None else y.add_(delta)
