"""MoS's operator: LoRA with the rows of A and the columns of B read from shard pools. Formula: reference/mos.py.

What is assembled is r · (in + out) numbers for a layer, no more than a LoRA holds. A model's layers share their pools,
so a backward pass that returned a gradient of the pool from every layer would write and add up L arrays of the pool's
size. Instead the layers that are called between two backward passes hang on one ``PoolTap``: each adds its rows into
one array per pool, and autograd receives them from the tap's own node, which runs after the last of them.
"""

from __future__ import annotations

import math
import weakref

import torch
from torch import Tensor

from fastpeft.backend import Operator, triton_available
from fastpeft.ops import base, lora


def _mos_fwd_fake(x, weight, bias, pool_A, index_A, pool_B, index_B, scaling, dropped=None):
    lead, (rank, shards) = x.shape[:-1], index_A.shape
    return x.new_empty(*lead, pool_B.shape[1] * shards), x.new_empty(math.prod(lead), rank, dtype=torch.float32)


# Returns y (..., out) and h = x Aᵀ (T, r). Triton takes x as rows, with a weight and without dropout, and comes before
# the library's composition by counting, not measured (bench/floors.py). Elsewhere MoS is LoRA over assembled matrices.
MOS_FWD = Operator(
    "mos_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor pool_A, Tensor index_A, Tensor pool_B, Tensor index_B,"
    " float scaling, Tensor? dropped=None) -> (Tensor, Tensor)",
    fake=_mos_fwd_fake,
    order=("native", "triton", "torch"),
)


def _mos_bwd_fake(dpool_A, dpool_B, grad, x, weight, pool_A, index_A, pool_B, index_B, h, scaling, need_x):
    return grad.new_empty(*(grad.shape[:-1] if need_x else (0,)), pool_A.shape[1] * index_A.shape[1])


# Adds the gradients of the pools into dpool_A (from x) and dpool_B (from h) where they are given. Returns that of x,
# without rows where it is not needed. No lane uses atomics: the result is the same bit for bit from run to run.
MOS_BWD = Operator(
    "mos_bwd_(Tensor(a!)? dpool_A, Tensor(b!)? dpool_B, Tensor grad, Tensor? x, Tensor? weight, Tensor pool_A,"
    " Tensor index_A, Tensor pool_B, Tensor index_B, Tensor? h, float scaling, bool need_x) -> Tensor",
    fake=_mos_bwd_fake,
    order=("native", "triton", "torch"),
)

if triton_available():

    def _mos_fwd_triton(*args):
        from fastpeft.kernels.mos import mos_fwd  # importing triton takes a second: only where it runs

        return mos_fwd(*args)

    def _mos_bwd_triton(dpool_A, dpool_B, grad, *rest):
        from fastpeft.kernels.mos import mos_bwd_

        with base.without_autocast(grad):
            return mos_bwd_(dpool_A, dpool_B, grad, *rest)

    MOS_FWD.implement_triton(_mos_fwd_triton)
    MOS_BWD.implement_triton(_mos_bwd_triton)


class PoolTapFunction(torch.autograd.Function):
    """Connects an empty token with two pools: its backward hands on what the layers have added up."""

    @staticmethod
    def forward(ctx, pool_A, pool_B, partial):
        ctx.set_materialize_grads(False)
        ctx.partial = partial
        return pool_A.new_empty(0)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, _):
        return *ctx.partial.pop(torch._C._current_graph_task_id(), (None, None)), None


class PoolTap:
    """The one place where the layers of a graph add up the gradients of their shared pools.

    Lives as long as the graphs that use it. What has been added is kept per backward pass: one that ends in an
    exception leaves nothing behind for the next.
    """

    def __init__(self, pools: tuple[Tensor, Tensor]) -> None:
        self.pools = pools
        self.partial: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self.token = PoolTapFunction.apply(*pools, self.partial)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Where the layers of this backward pass add up; None for a pool that is not trained.

        None for both if the pass does not go on to the pools: it can be after the gradient of x alone.
        """
        if not torch._C._will_engine_execute_node(self.token.grad_fn):
            return None, None
        task = torch._C._current_graph_task_id()
        if task not in self.partial:
            zeros = (pool.new_zeros(pool.shape) if pool.requires_grad else None for pool in self.pools)
            self.partial[task] = tuple(zeros)  # type: ignore[assignment]
        return self.partial[task]


_TAPS: weakref.WeakValueDictionary[tuple, PoolTap] = weakref.WeakValueDictionary()


def pool_tap(pools: tuple[Tensor, Tensor]) -> PoolTap:
    """The live tap of two pools as they are: an old graph can outlive a move of its pools, or their freezing."""
    # Numbers of objects are unique for as long as these live, and a tap keeps its pools alive.
    key = (*((id(pool), pool.dtype, pool.device, pool.requires_grad) for pool in pools),)
    tap = _TAPS.get(key)
    if tap is None:
        tap = _TAPS[key] = PoolTap(pools)
    return tap


class ShardsFunction(torch.autograd.Function):
    """One of the pools, (n_shards, d / l), and (r, l) -> (r, d). The pool's gradient leaves through the tap."""

    @staticmethod
    def forward(ctx, token, index, tap, which):
        ctx.save_for_backward(index)
        ctx.tap, ctx.which = tap, which
        return tap.pools[which][index].flatten(1)

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        if (total := ctx.tap.gradients()[ctx.which]) is not None:
            total.index_add_(0, index.flatten(), grad.reshape(-1, total.shape[1]))
        # The token's gradient is empty, but it is what tells a second derivative that it was refused.
        return grad.new_empty(0), None, None, None


def assemble(pool_A: Tensor, index_A: Tensor, pool_B: Tensor, index_B: Tensor) -> tuple[Tensor, Tensor]:
    """A (r, in) and B transposed (r, out): vectors from their shards."""
    by_autograd = torch.compiler.is_compiling() or lora.LORA_FWD.choose(pool_A, pool_A) == "reference"
    if by_autograd or not base.needs_autograd(pool_A, pool_B):
        return pool_A[index_A].flatten(1), pool_B[index_B].flatten(1)
    tap = pool_tap((pool_A, pool_B))
    return ShardsFunction.apply(tap.token, index_A, tap, 0), ShardsFunction.apply(tap.token, index_B, tap, 1)


def _run(
    backend: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool_A: Tensor,
    index_A: Tensor,
    pool_B: Tensor,
    index_B: Tensor,
    scaling: float,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pools = pool_A, index_A, pool_B, index_B
    if backend == "native":
        return MOS_FWD.call("native", x, weight, bias, *pools, scaling, dropped)
    y, h = MOS_FWD.call(backend, base.as_rows(x), weight, bias, *pools, scaling)
    return base.like_rows(y, x), h


def _gradients(ctx, dpool_A, dpool_B, grad, x, weight, pool_A, index_A, pool_B, index_B, h, need_x):
    """That of what A was applied to, or None; those of the pools are added in place."""
    rest = weight, pool_A, index_A, pool_B, index_B, h, ctx.scaling, need_x
    if ctx.backend == "native":
        dx = MOS_BWD.call("native", dpool_A, dpool_B, grad, x, *rest)
        return dx if need_x else None
    rows, grad_rows = x if x is None else base.as_rows(x), base.as_rows(grad)
    dx = MOS_BWD.call(ctx.backend, dpool_A, dpool_B, grad_rows, rows, *rest)
    return base.like_rows(dx, grad) if need_x else None


class MoSFunction(torch.autograd.Function):
    """The whole layer in one operator each way; shards are read, and gradients added, where the pools lie."""

    @staticmethod
    def forward(ctx, x, weight, bias, token, index_A, index_B, pools, tap, scaling, backend, dropped):
        pool_A, pool_B = pools
        y, h = _run(backend, x, weight, bias, pool_A, index_A, pool_B, index_B, scaling, dropped)
        source = x if dropped is None else dropped
        source = source if pool_A.requires_grad else None
        kept_weight, kept_h = weight if ctx.needs_input_grad[0] else None, h if pool_B.requires_grad else None
        ctx.save_for_backward(source, kept_weight, pool_A, index_A, pool_B, index_B, kept_h)
        ctx.tap, ctx.scaling, ctx.backend, ctx.drops = tap, scaling, backend, dropped is not None
        return y

    @staticmethod
    @base.once_differentiable
    def backward(ctx, grad):
        need_x, need_dropped = ctx.needs_input_grad[0], ctx.needs_input_grad[10]
        source, weight, pool_A, index_A, pool_B, index_B, h = ctx.saved_tensors
        dpool_A, dpool_B = (None, None) if ctx.tap is None else ctx.tap.gradients()
        source, h = None if dpool_A is None else source, None if dpool_B is None else h
        dx = None
        if ctx.drops:
            dx = base.base_gradient(grad, weight) if need_x and weight is not None else None
            weight = None
        need_source = need_dropped if ctx.drops else need_x
        dsource = _gradients(
            ctx, dpool_A, dpool_B, grad, source, weight, pool_A, index_A, pool_B, index_B, h, need_source
        )
        # As in ShardsFunction, the token's gradient is empty.
        empty = None if ctx.tap is None else grad.new_empty(0)
        dx, ddropped = (dx, dsource) if ctx.drops else (dsource, None)
        return dx, None, None, empty, None, None, None, None, None, None, ddropped


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
    dropout_p: float = 0.0,
) -> Tensor:
    """mos_linear for arguments that are known to fit; of what A is applied to a share of dropout_p is dropped."""
    backend = MOS_FWD.choose(x, pool_A)
    in_place = {
        "native": pool_A.dtype == torch.float32,
        "triton": weight is not None and dropout_p == 0,
    }.get(backend, False)
    if in_place and not torch.compiler.is_compiling() and base.is_frozen(weight, bias):
        return base.through_autocast(
            _apply, x, weight, bias, pool_A, index_A, pool_B, index_B, scaling, backend, dropout_p
        )
    A, B_transposed = assemble(pool_A, index_A, pool_B, index_B)
    return lora.apply_lora(x, weight, bias, A, B_transposed.T, scaling, dropout_p)


def _apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    pool_A: Tensor,
    index_A: Tensor,
    pool_B: Tensor,
    index_B: Tensor,
    scaling: float,
    backend: str,
    dropout_p: float,
) -> Tensor:
    dropped = lora.draw_dropout(x, dropout_p, backend).dropped
    if not base.needs_autograd(x, pool_A, pool_B):
        return _run(backend, x, weight, bias, pool_A, index_A, pool_B, index_B, scaling, dropped)[0]
    pools = pool_A, pool_B
    tap = pool_tap(pools) if pool_A.requires_grad or pool_B.requires_grad else None
    token = None if tap is None else tap.token
    return MoSFunction.apply(x, weight, bias, token, index_A, index_B, pools, tap, scaling, backend, dropped)


def check_index(name: str, index: Tensor, n_shards: int) -> None:
    """Raises ValueError unless every entry of a shard index lies in [0, n_shards)."""
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < n_shards):
        found = f"[{int(index.min())}, {int(index.max())}]"
        raise ValueError(f"{name} must hold shard numbers in [0, {n_shards}), got {found}")
