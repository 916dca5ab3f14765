"""What the CUDA C++ kernels must move and compute, counted from their code: the other half of bench/floors.py.

Beside memory and tensor cores, which the library's products need, these kernels are bound by arithmetic outside tensor
cores, by shared memory, or by instructions: a step takes as long as the slowest of them. The counts stand beside each
kernel in csrc/cuda/ as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PEAK_BYTES, PEAK_TENSOR = 4.3e12, 790e12  # per second, of an H200 in bfloat16
PROCESSORS, CLOCK = 132, 1.75e9
PEAK_ARITHMETIC = 67e12  # float32, outside tensor cores
PEAK_SHARED = PROCESSORS * CLOCK * 128  # bytes
PEAK_INSTRUCTIONS = PROCESSORS * CLOCK * 128  # of a thread
ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Step:
    """One kernel, or one product of the library."""

    bytes: float
    arithmetic: float = 0.0
    shared: float = 0.0
    instructions: float = 0.0
    tensor: float = 0.0

    @property
    def seconds(self) -> float:
        return max(
            self.bytes / PEAK_BYTES,
            self.arithmetic / PEAK_ARITHMETIC,
            self.shared / PEAK_SHARED,
            self.instructions / PEAK_INSTRUCTIONS,
            self.tensor / PEAK_TENSOR,
        )


def product(tokens: int, d_in: int, d_out: int) -> Step:
    """x Wᵀ, or g W."""
    moved = d_in * d_out + tokens * (d_in + d_out)
    return Step(ELEMENT * moved, tensor=2 * tokens * d_in * d_out)


def boft(options: Any, size: tuple[int, int], tokens: int, training: bool) -> Iterator[Step]:
    """csrc/cuda/boft_*.cuh. A product with a block reads and writes 4 bytes of shared memory for a feature, and its b
    numbers of Q for every fourth row; a sum of block gradients reads 8."""
    (d_in, d_out), b, m = size, options["boft_block_size"], options["boft_n_butterfly_factor"]
    x, y, blocks = tokens * d_in, tokens * d_out, m * d_in * b
    if training:  # otherwise the blocks are remembered
        yield Step(8 * blocks, arithmetic=20 / 3 * b * blocks)
    yield Step(2 * ELEMENT * x + 4 * blocks, 2 * b * m * x, (8 + b) * m * x)
    yield product(tokens, *size)
    yield Step(2 * ELEMENT * y, 3 * y)
    if training:
        again = m * (m - 1) // 2  # products that compute the factors' inputs again
        yield Step(3 * ELEMENT * y, 4 * y)
        yield product(tokens, d_out, d_in)
        yield Step(3 * ELEMENT * x + 8 * blocks, 2 * b * (2 * m + again) * x, ((8 + b) * (m + again) + 8 * m) * x)
        yield Step(12 * blocks, 4 * b * blocks)


def fourierft(options: Any, size: tuple[int, int], tokens: int, training: bool) -> Iterator[Step]:
    """csrc/cuda/fourierft*.cuh: tokens by two; 16 numbers of a pass take 400 instructions, a bin of the mix 25."""
    (d_in, d_out), pairs = size, math.ceil(tokens / 2)

    def passes(length: int) -> float:
        return length / 16 * math.ceil(math.log(length, 16)) * 400

    yield product(tokens, *size)
    instructions = passes(d_in) + passes(d_out) + 25 * d_out
    yield Step(ELEMENT * pairs * (2 * d_in + 4 * d_out), instructions=pairs * instructions)
    if training:
        yield product(tokens, d_out, d_in)
        instructions = passes(d_out) + 2 * passes(d_in) + 25 * d_in + 25 * options["n_frequency"]
        yield Step(ELEMENT * pairs * (2 * d_out + 6 * d_in), instructions=pairs * instructions)


CALLS = {"boft": boft, "fourierft": fourierft}


def seconds_of(method: str, options: Any, size: tuple[int, int], tokens: int, training: bool) -> float | None:
    """The least time of a layer's call, or None for a method without CUDA C++ kernels."""
    steps = CALLS.get(method)
    return None if steps is None else sum(step.seconds for step in steps(options, size, tokens, training))
