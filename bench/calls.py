"""The least tax that an adapter of two matrices can have in eager PyTorch: one that computes nothing.

    python bench/calls.py --sizes 384x384 --tokens 1 16 128

Beside the frozen product it has what any adapter with a derivative of its own needs, a node of autograd written in
Python and two parameters that get gradients, which here are never filled. No kernel can bring a layer's training below
this; its forward pass, which has no such node, costs what the base costs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tables
import torch
from layers import twin
from tax import forward, in_turn, parse_count, parse_size, training_step
from torch import Tensor, nn
from torch.nn import functional as F

RANK = 8


class NothingFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B):
        ctx.save_for_backward(weight, A, B)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, A, B = ctx.saved_tensors
        return grad @ weight, None, None, torch.empty_like(A), torch.empty_like(B)


class NothingLinear(nn.Linear):
    """A frozen layer with a pair of matrices that change nothing."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight, self.bias = twin(linear).weight, twin(linear).bias
        self.A = nn.Parameter(torch.randn(RANK, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return NothingFunction.apply(x, self.weight, self.bias, self.A, self.B)
        return F.linear(x, self.weight, self.bias)


def line_of(base: nn.Linear, tokens: int) -> str:
    x, grad = torch.randn(tokens, base.in_features), torch.randn(tokens, base.out_features)
    layer = NothingLinear(base)
    with torch.no_grad():
        before, after, _ = in_turn(forward(base, x), forward(layer, x))
    frozen, trained, _ = in_turn(training_step(base, x, grad), training_step(layer, x, grad))
    taxes = (after / before, trained / frozen)
    return tables.line([f"{base.in_features}→{base.out_features}", str(tokens), *(f"{tax:.2f}" for tax in taxes)])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [(384, 384), (768, 768), (1024, 1024)]
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=sizes, metavar="INxOUT")
    parser.add_argument("--tokens", nargs="+", type=parse_count, default=[1, 16, 128])
    parser.add_argument("--threads", type=parse_count, default=2)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    print(*tables.heading("layer", "T", "forward", "training"), sep="\n")
    for size in arguments.sizes:
        base = nn.Linear(*size).requires_grad_(False)
        for tokens in arguments.tokens:
            print(line_of(base, tokens), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
