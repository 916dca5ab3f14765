"""MoS's operator: LoRA with the rows of A and the columns of B read from shard pools. Formula: reference/mos.py.

What is assembled is r · (in + out) numbers for a layer, no more than a LoRA holds. A model's layers share their pools,
so a backward pass that returned a gradient of the pool from every layer would write and add up L arrays of the pool's
size. Instead the layers that are called between two backward passes hang on one ``PoolTap``: each adds its rows into
one array, and autograd receives that array from the tap's own node, which runs after the last of them.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastpeft.backend import Operator
from fastpeft.ops import base, lora


def _mos_fwd_fake(x, weight, bias, pool_A, index_A, pool_B, index_B, scaling):
    lead, (rank, shards) = x.shape[:-1], index_A.shape
    return x.new_empty(*lead, pool_B.shape[1] * shards), pool_A.new_empty(math.prod(lead), rank)


# Returns y (..., out) and h = x Aᵀ (T, r). In the other lanes MoS is LoRA over assembled matrices.
MOS_FWD = Operator(
    "mos_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor pool_A, Tensor index_A, Tensor pool_B, Tensor index_B,"
    " float scaling) -> (Tensor, Tensor)",
    fake=_mos_fwd_fake,
    order=("native", "torch", "triton"),
)


def _mos_bwd_fake(dpool_A, dpool_B, grad, x, weight, pool_A, index_A, pool_B, index_B, h, scaling, need_x):
    return grad.new_empty(*(grad.shape[:-1] if need_x else (0,)), pool_A.shape[1] * index_A.shape[1])


# Adds the gradients of the pools into dpool_A (from x) and dpool_B (from h) where they are given. Returns that of x,
# without rows where it is not needed.
MOS_BWD = Operator(
    "mos_bwd_(Tensor(a!)? dpool_A, Tensor(b!)? dpool_B, Tensor grad, Tensor? x, Tensor? weight, Tensor pool_A,"
    " Tensor index_A, Tensor pool_B, Tensor index_B, Tensor? h, float scaling, bool need_x) -> Tensor",
    fake=_mos_bwd_fake,
    order=("native", "torch"),
)


class PoolTapFunction(torch.autograd.Function):
    """Connects an empty token with a pool: its backward hands on what the layers have added up."""

    @staticmethod
    def forward(ctx, pool, partial):
        ctx.set_materialize_grads(False)
        ctx.partial = partial
        return pool.new_empty(0)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, _):
        return ctx.partial.pop(torch._C._current_graph_task_id(), None), None


class PoolTap:
    """The one place where the layers of a graph add up the gradient of their shared pool.

    Lives as long as the graphs that use it. What has been added is kept per backward pass: one that ends in an
    exception leaves nothing behind for the next.
    """

    def __init__(self, pool: Tensor) -> None:
        self.kind = (pool.dtype, pool.device)
        self.partial: dict[int, Tensor] = {}
        self.token = PoolTapFunction.apply(pool, self.partial)

    def is_wanted(self) -> bool:
        """Whether this backward pass goes on to the pool: it can be after the gradient of x alone."""
        return torch._C._will_engine_execute_node(self.token.grad_fn)

    def gradient(self, pool: Tensor) -> Tensor:
        """Where the layers of this backward pass add up."""
        task = torch._C._current_graph_task_id()
        if task not in self.partial:
            self.partial[task] = torch.zeros_like(pool)
        return self.partial[task]


_TAPS = WeakTensorKeyDictionary()  # pool -> weak reference to its tap


def pool_tap(pool: Tensor) -> PoolTap:
    """The live tap of a pool."""
    reference_to_tap = _TAPS.get(pool)
    tap = reference_to_tap() if reference_to_tap is not None else None
    if tap is None or tap.kind != (pool.dtype, pool.device):  # a pool can be moved while an old graph still lives
        tap = PoolTap(pool)
        _TAPS[pool] = weakref.ref(tap)
    return tap


class ShardsFunction(torch.autograd.Function):
    """(n_shards, d / l) and (r, l) -> (r, d). The pool is given detached: its gradient leaves through the tap."""

    @staticmethod
    def forward(ctx, pool, index, token, tap):
        ctx.save_for_backward(pool, index)
        ctx.tap = tap
        return pool[index].flatten(1)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        pool, index = ctx.saved_tensors
        if ctx.needs_input_grad[2]:
            ctx.tap.gradient(pool).index_add_(0, index.flatten(), grad.reshape(-1, pool.shape[1]))
        # The token's gradient is empty, but it is what tells a second derivative that it was refused.
        return None, None, grad.new_empty(0), None


def assemble(pool: Tensor, index: Tensor) -> Tensor:
    """Vectors from their shards, (r, d): rows of A, or columns of B."""
    by_autograd = torch.compiler.is_compiling() or lora.LORA_FWD.choose(pool, pool) == "reference"
    if by_autograd or not base.needs_autograd(pool):
        return pool[index].flatten(1)
    tap = pool_tap(pool)
    return ShardsFunction.apply(pool.detach(), index, tap.token, tap)


class MoSFunction(torch.autograd.Function):
    """The whole layer in one compiled operator each way; shards are read, and gradients added, where the pools lie."""

    @staticmethod
    def forward(ctx, x, weight, bias, pool_A, index_A, token_A, tap_A, pool_B, index_B, token_B, tap_B, scaling):
        y, h = MOS_FWD.call("native", x, weight, bias, pool_A, index_A, pool_B, index_B, scaling)
        need_x, need_A, need_B = (ctx.needs_input_grad[i] for i in (0, 5, 9))
        x, weight, h = x if need_A else None, weight if need_x else None, h if need_B else None
        ctx.save_for_backward(x, weight, pool_A, index_A, pool_B, index_B, h)
        ctx.taps, ctx.scaling = (tap_A, tap_B), scaling
        return y

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        need_x = ctx.needs_input_grad[0]
        x, weight, pool_A, index_A, pool_B, index_B, h = ctx.saved_tensors
        need_A, need_B = (tap is not None and tap.is_wanted() for tap in ctx.taps)
        dpool_A = ctx.taps[0].gradient(pool_A) if need_A else None
        dpool_B = ctx.taps[1].gradient(pool_B) if need_B else None
        x, h = x if need_A else None, h if need_B else None
        dx = MOS_BWD.call(
            "native", dpool_A, dpool_B, grad, x, weight, pool_A, index_A, pool_B, index_B, h, ctx.scaling, need_x
        )
        # As in ShardsFunction, the tokens' gradients are empty.
        empty_A, empty_B = (grad.new_empty(0) if need else None for need in (need_A, need_B))
        return dx if need_x else None, None, None, None, None, empty_A, None, None, None, empty_B, None, None


def mos_linear(
    x: Tensor,  # (..., in)
    weight: Tensor | None,  # (out, in)
    bias: Tensor | None,  # (out,)
    pool_A: Tensor,  # (n_shards, in / l)
    index_A: Tensor,  # (r, l)
    pool_B: Tensor,  # (n_shards, out / l)
    index_B: Tensor,  # (r, l)
    scaling: float,
) -> Tensor:  # (..., out)
    """y = W x + b + s · B (A x), A and B assembled from shards: MoS (ICLR 2025, arXiv 2410.00938).

    Row j of A is the shards pool_A[index_A[j]] side by side; column j of B is pool_B[index_B[j]]. Differentiable once
    in x and the pools, and in weight and bias where they ask for it. Indices must lie in [0, n_shards): layers check
    theirs when they are made, see :func:`check_index`.

    Args:
        x: (..., in), any floating-point dtype.
        weight: (out, in) in the dtype of x, or None for the delta alone.
        bias: (out,) in the dtype of x, or None.
        pool_A: (n_shards, in / l), l the shards of a vector.
        index_A: (r, l), int64.
        pool_B: (n_shards, out / l) in the dtype of pool_A.
        index_B: (r, l), int64.
        scaling: s, usually alpha / r.

    Returns:
        (..., out) in the dtype of x.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
        IndexError: an index is out of range (on the CPU).
    """
    base.check_shape("pool_A", pool_A, ("n_shards", "in/l"))
    base.check_shape("pool_B", pool_B, ("n_shards", "out/l"))
    base.check_shape("index_A", index_A, ("r", "l"))
    base.check_shape("index_B", index_B, tuple(index_A.shape))
    base.check_floating("pool_A", pool_A)
    if pool_A.dtype != pool_B.dtype:
        raise TypeError(f"pool_B must have the dtype of pool_A, {pool_A.dtype}, got {pool_B.dtype}")
    for name, index in (("index_A", index_A), ("index_B", index_B)):
        if index.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {index.dtype}")
    shards = index_A.shape[1]
    base.check_base(x, weight, bias, pool_A.shape[1] * shards, pool_B.shape[1] * shards)
    base.check_same_device(x, pool_A=pool_A, index_A=index_A, pool_B=pool_B, index_B=index_B)
    return apply_mos(x, weight, bias, pool_A, index_A, pool_B, index_B, scaling)


def apply_mos(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool_A: Tensor,
    index_A: Tensor,
    pool_B: Tensor,
    index_B: Tensor,
    scaling: float,
) -> Tensor:
    """mos_linear for arguments that are known to fit."""
    in_place = (
        MOS_FWD.choose(x, pool_A) == "native" and pool_A.dtype == torch.float32 and not torch.compiler.is_compiling()
    )
    if in_place and base.is_frozen(weight, bias):
        return base.through_autocast(_apply, x, weight, bias, pool_A, index_A, pool_B, index_B, scaling)
    return lora.apply_lora(x, weight, bias, assemble(pool_A, index_A), assemble(pool_B, index_B).T, scaling)


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool_A: Tensor,
    index_A: Tensor,
    pool_B: Tensor,
    index_B: Tensor,
    scaling: float,
) -> Tensor:
    if not base.needs_autograd(x, pool_A, pool_B):
        matrices = [tensor.contiguous() for tensor in (pool_A, index_A, pool_B, index_B)]
        return MOS_FWD.call("native", x, weight, bias, *matrices, scaling)[0]
    sides: list = []
    for pool, index in ((pool_A, index_A), (pool_B, index_B)):
        tap = pool_tap(pool) if pool.requires_grad else None
        sides += [pool.detach().contiguous(), index.contiguous(), None if tap is None else tap.token, tap]
    return MoSFunction.apply(x, weight, bias, *sides, scaling)


def check_index(name: str, index: Tensor, n_shards: int) -> None:
    """Raises ValueError unless every entry of a shard index lies in [0, n_shards)."""
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < n_shards):
        found = f"[{int(index.min())}, {int(index.max())}]"
        raise ValueError(f"{name} must hold shard numbers in [0, {n_shards}), got {found}")
