"""Single compiled operators beside the bare matrix product of the same size; `make bench` runs them.

    pytest bench/test_operators.py -k "boft and 4096"

lora_*, mos_*, boft_* and fourier_* hold the frozen product themselves, the others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from fastpeft.ops import fourierft

ops = torch.ops.fastpeft
RANK = 16
POOL_RANK, SHARDS, MOS_LAYERS = 2, 4, 32
BLOCK_SIZE, FACTORS = 8, 4
ENTRIES = 1000


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@cache
def calls(d: int, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name, on random d x d layers."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    x, grad, y = (draw(tokens, d) for _ in range(3))
    weight, bias, scale = draw(d, d) / d**0.5, draw(d), draw(d, 1)
    A, B, h = draw(RANK, d), draw(d, RANK), draw(tokens, RANK)
    pool_A, pool_B = (draw(POOL_RANK * MOS_LAYERS * SHARDS, d // SHARDS) for _ in range(2))
    index_A, index_B = (torch.randperm(len(pool_A), generator=g)[: RANK * SHARDS].reshape(RANK, -1) for _ in range(2))
    pools, dpools = (pool_A, index_A, pool_B, index_B), (torch.zeros_like(pool_A), torch.zeros_like(pool_B))
    R = draw(FACTORS, d // BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
    blocks = ops.cayley_fwd(R)
    dblocks = torch.randn_like(blocks)
    spectrum, places = draw(ENTRIES), torch.randperm(d * d, generator=g)[:ENTRIES]
    tables = fourierft.make_tables(places // d, places % d, (d, d))
    where = (tables.rows, tables.cols, *tables.backward)
    return {
        "product": lambda: F.linear(x, weight, bias),
        "product_bwd": lambda: grad @ weight,
        "lora_fwd": lambda: ops.lora_fwd(x, weight, bias, A, B, 0.5),
        "lora_bwd": lambda: ops.lora_bwd(grad, x, weight, A, B, h, 0.5, True),
        "mos_fwd": lambda: ops.mos_fwd(x, weight, bias, *pools, 0.5),
        "mos_bwd_": lambda: ops.mos_bwd_(*dpools, grad, x, weight, *pools, h, 0.5, True),
        "butterfly_fwd": lambda: ops.butterfly_fwd(x, blocks),
        "butterfly_bwd": lambda: ops.butterfly_bwd(grad, x, blocks, True, True),
        "boft_fwd": lambda: ops.boft_fwd(x, weight, bias, blocks, scale, True),
        "boft_bwd": lambda: ops.boft_bwd(grad, x, weight, bias, blocks, scale, y, True, True),
        "cayley_fwd": lambda: ops.cayley_fwd(R),
        "cayley_bwd": lambda: ops.cayley_bwd(dblocks, blocks),
        "fourier_fwd": lambda: ops.fourier_fwd(x, weight, bias, spectrum, *tables.forward, 1e-6),
        "fourier_bwd": lambda: ops.fourier_bwd(grad, x, weight, spectrum, *where, 1e-6, True),
    }


NAMES = [
    *("product", "product_bwd", "lora_fwd", "lora_bwd", "mos_fwd", "mos_bwd_", "butterfly_fwd", "butterfly_bwd"),
    *("boft_fwd", "boft_bwd", "cayley_fwd", "cayley_bwd", "fourier_fwd", "fourier_bwd"),
]
# The Cayley transform knows no tokens.
CASES = [
    pytest.param(d, tokens, name, id=f"{d}-T{tokens}-{name}")
    for d in (1024, 4096)
    for tokens in (1, 512)
    for name in NAMES
    if tokens == 1 or not name.startswith("cayley")
]


@pytest.mark.parametrize("d, tokens, name", CASES)
@pytest.mark.benchmark(warmup=True, warmup_iterations=2, min_rounds=15, max_time=0.3)
def test_operator(benchmark, d: int, tokens: int, name: str) -> None:
    benchmark.group = f"{d}x{d}, T = {tokens}"
    benchmark(calls(d, tokens)[name])
