"""The Triton MoS kernels, LoRA's with an index of shards: values in the interpreter, against float64, and compilation
for chips that are not here. What does not depend on the index is tested in test_kernels_lora.py.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from fastpeft.kernels import lora, mos
from gpu_compile import check_records, compiled_cases, meta
from helpers import in_turn

from fastpeft.ops import lora as ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
SCALING = 0.75
NAMES = ("y", "h", "dx", "dpool_A", "dpool_B")

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------

# base dtype, pool dtype
PAIRS = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16+fp32": (BF16, FP32),
    "fp16+fp32": (FP16, FP32),
}

# T, in, out, r, shards of a vector, shards of a pool
SHAPES = [
    (1, 64, 128, 8, 4, 40),  # shards of 16 and 32: each tile in one
    (17, 12, 9, 2, 3, 4),  # of 4 and 3: tiles cross many; some shards are read twice
    (5, 36, 60, 3, 4, 5),  # of 9 and 15
    (3, 48, 96, 2, 2, 3),  # of 24, which no tile divides, and 48
    (17, 192, 96, 4, 2, 3),  # of 96 and 48
    (3, 21, 35, 17, 1, 2),  # whole rows, each of them in many places
]
# Where the work of a tile is split over programs.
SPLIT_SHAPES = [
    (530, 16, 12, 2, 2, 3),  # over tokens
    (1, 2048, 16, 2, 4, 5),  # over in, and shards begin where a split does
    (1, 2100, 12, 2, 3, 4),  # over in, within a shard and within a tile of one
    (1, 18, 2064, 2, 3, 4),  # over out
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """An element that no kernel writes stays NaN, and no comparison holds."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))


def draw(shape, dtype, pool_dtype, seed=0):
    """x, weight, bias, pool_A, index_A, pool_B, index_B, and grad."""
    tokens, in_features, out_features, rank, shards, count = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

    def index():
        return torch.randint(count, (rank, shards), generator=generator)

    return (
        normal(tokens, in_features).to(dtype),
        normal(out_features, in_features, scale=in_features**-0.5).to(dtype),
        normal(out_features).to(dtype),
        normal(count, in_features // shards, scale=in_features**-0.5).to(pool_dtype),
        index(),
        normal(count, out_features // shards, scale=rank**-0.5).to(pool_dtype),
        index(),
        normal(tokens, out_features).to(dtype),
    )


def wide(inputs):
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def composed(inputs, h):
    """y, h, dx, dpool_A and dpool_B from PyTorch's own operators in the dtypes of the inputs."""
    x, weight, bias, pool_A, index_A, pool_B, index_B, grad = inputs
    A, B = pool_A[index_A].flatten(1), pool_B[index_B].flatten(1).T
    y, own_h = ops.lora_fwd(x, weight, bias, A, B, SCALING)
    dx, dA, dB = ops.lora_bwd(grad, x, weight, A, B, own_h if h is None else h, SCALING, (True, True, True))
    return y, own_h, dx, to_pool(pool_A, index_A, dA), to_pool(pool_B, index_B, dB.T)


def to_pool(pool, index, gradient):
    return torch.zeros_like(pool).index_add_(0, index.flatten(), gradient.reshape(-1, pool.shape[1]))


def run(inputs, h=None, need_x=True, dpools=None):
    """What `composed` gives; h of the backward is the forward's, or given."""
    x, weight, bias, *pools, grad = inputs
    y, own_h = mos.mos_fwd(x, weight, bias, *pools, SCALING)
    dpool_A, dpool_B = dpools or (torch.zeros_like(pools[0]), torch.zeros_like(pools[2]))
    dx = mos.mos_bwd_(
        dpool_A, dpool_B, grad, x, weight, *pools, own_h if h is None else h, SCALING, need_x
    )  # fmt: skip
    return y, own_h, dx, dpool_A, dpool_B


def errors(results, inputs, h):
    """Of each result relative to it, in root mean squares: a largest entry is a matter of luck."""
    pairs = zip(results, composed(wide(inputs), h.double()), strict=True)
    return [((got.double() - want).norm() / want.norm()).item() for got, want in pairs]


def check(inputs, others=()):
    """At most twice the error of PyTorch's composition, the largest over the inputs and over `others`, more of the same
    shape and dtypes: where there are few numbers, its error on one draw is a matter of luck.
    """
    results = run(inputs)
    x, weight, _, pool_A, index_A, pool_B, *_ = inputs
    assert [(r.shape, r.dtype) for r in results] == [
        ((x.shape[0], weight.shape[0]), x.dtype), ((x.shape[0], index_A.shape[0]), FP32), (x.shape, x.dtype),
        (pool_A.shape, pool_A.dtype), (pool_B.shape, pool_B.dtype),
    ]  # fmt: skip
    bounds = []
    for one in (inputs, *others):
        h = composed(wide(one), None)[1].float()
        bounds.append(errors(composed(one, h), one, h))
        # h is float32 here, whatever the pools are: as accurate as float32 adds up.
        x, pool_A, index_A = one[0].float(), one[3].float(), one[4]
        exact_h = composed(wide(one), None)[1]
        bounds[-1][1] = ((x @ pool_A[index_A].flatten(1).T - exact_h).norm() / exact_h.norm()).item()
    found = errors(results, inputs, results[1])
    for name, error, *bound in zip(NAMES, found, *bounds, strict=True):
        assert error <= 2 * max(bound), name
    return results


def check_draws(shape, pair):
    draws = [draw(shape, *PAIRS[pair], seed=seed) for seed in range(9)]
    return draws[0], check(draws[0], draws[1:])


@pytest.mark.parametrize("shape, pair", in_turn(SHAPES, PAIRS))
def test_values(pair, shape):
    check_draws(shape, pair)


@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_split_work_repeats_bit_for_bit(shape):
    inputs, results = check_draws(shape, "bf16+fp32")
    assert all(map(torch.equal, run(inputs), results))


def test_as_lora_over_assembled_matrices():
    # Tiles that stay in one shard are those of LoRA: bit for bit the same sums.
    x, weight, bias, pool_A, index_A, pool_B, index_B, grad = inputs = draw((5, 64, 64, 2, 2, 5), BF16, FP32)
    A, B = pool_A[index_A].flatten(1), pool_B[index_B].flatten(1).T
    y, h, dx, *_ = run(inputs)
    torch.testing.assert_close((y, h), lora.lora_fwd(x, weight, bias, A, B, SCALING))
    torch.testing.assert_close(dx, lora.lora_bwd(grad, x, weight, A, B, h, SCALING, True)[0])


def within_nan(tensor):
    """The same values inside a larger tensor of NaN: odd strides, and a poisoned neighbourhood."""
    larger = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 6), float("nan"), dtype=tensor.dtype)
    return larger[1:-1, 3:-3].copy_(tensor)


LAYOUTS = {
    "slice": lambda t: within_nan(t) if t.is_floating_point() else t.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[2], (5, 32, 64, 2, 2, 3)], ids=str)
def test_strides(shape, layout):
    inputs = draw(shape, BF16, FP32)
    views = [t if t.dim() == 1 else LAYOUTS[layout](t) for t in inputs]
    dpools = [LAYOUTS[layout](torch.zeros_like(views[place])) for place in (3, 5)]
    expected, found = run(inputs), run(views, dpools=dpools)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        if name == "dx":  # a part is the library's, which may add up in another order
            torch.testing.assert_close(one, other)
        else:
            assert torch.equal(one, other), name


def test_adds_to_what_is_there():
    inputs = draw(SHAPES[3], BF16, FP32)
    zeroed = run(inputs)[3:]
    before = [torch.randn(t.shape, generator=torch.Generator().manual_seed(5)) for t in zeroed]
    after = run(inputs, dpools=[t.clone() for t in before])[3:]
    for one, gradient, start, index in zip(after, zeroed, before, (inputs[4], inputs[6]), strict=True):
        assert torch.equal(one, start + gradient)
        unread = [shard for shard in range(len(start)) if shard not in index]
        assert torch.equal(one[unread], start[unread])


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_what_is_needed(needs):
    x, weight, _, *pools, grad = inputs = draw((2, 6, 8, 2, 2, 3), FP32, FP32)
    _, h, *full = run(inputs)
    need_x, need_A, need_B = needs
    dpool_A = torch.zeros_like(pools[0]) if need_A else None
    dpool_B = torch.zeros_like(pools[2]) if need_B else None
    source, hidden = x if need_A else None, h if need_B else None
    dx = mos.mos_bwd_(dpool_A, dpool_B, grad, source, weight, *pools, hidden, SCALING, bool(need_x))
    for need, one, all_of_it in zip(needs[1:], (dpool_A, dpool_B), full[1:], strict=True):
        assert not need or torch.equal(one, all_of_it)
    assert torch.equal(dx, full[0]) if need_x else dx.shape == (0, 6)


@pytest.mark.parametrize("pair", PAIRS)
def test_no_tokens(pair):
    inputs = draw((0, 24, 32, 2, 2, 3), *PAIRS[pair])
    ones = torch.ones_like(inputs[3]), torch.ones_like(inputs[5])
    y, h, dx, dpool_A, dpool_B = run(inputs, dpools=ones)
    assert y.shape == (0, 32) and h.shape == (0, 2) and dx.shape == (0, 24)
    assert (dpool_A == 1).all() and (dpool_B == 1).all()


@pytest.mark.parametrize("argument", ["x", "pool_A", "pool_B"])
def test_unsupported_dtype_names_the_argument(argument):
    names = ("x", "weight", "bias", "pool_A", "index_A", "pool_B", "index_B")
    inputs = dict(zip(names, draw(SHAPES[1], FP32, FP32), strict=False))
    inputs[argument] = inputs[argument].double()
    with pytest.raises(TypeError, match=f"^{argument} must be .* got torch.float64"):
        mos.mos_fwd(*inputs.values(), SCALING)


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, T, in, out, r, shards of a vector, base dtype: forward and backward over the layers of Llama-2-7B (4096,
# 11008), Llama-3-8B (14336, 1024), Qwen2.5-7B (3584, 18944, 512) and MiniLM (384, 1536).
CASES = [
    (90, 1, 4096, 4096, 8, 4, "bf16"),
    (90, 16, 4096, 11008, 8, 4, "bf16"),  # shards of 2752, which divide by 64
    (90, 1, 3584, 512, 8, 4, "bf16"),  # the walk split
    (90, 512, 384, 1536, 8, 4, "bf16"),  # shards of 96
    (90, 4096, 11008, 4096, 16, 4, "bf16"),
    (90, 4096, 4096, 14336, 8, 4, "bf16"),
    (90, 4096, 4096, 4096, 8, 16, "bf16"),  # many shards
    (90, 4096, 4096, 4096, 8, 4, "fp16"),
    (90, 4096, 4096, 4096, 8, 4, "fp32"),
    (90, 65, 36, 60, 3, 4, "bf16"),  # shards that no tile divides
    (90, 1, 11008, 4096, 8, 4, "bf16"),  # where the compiler would spill for the sake of more programs
    (90, 1, 4096, 1024, 16, 4, "bf16"),
    (90, 1, 4096, 4096, 8, 4, "fp16"),  # an index beside five products of a step
    (100, 1, 4096, 4096, 8, 4, "fp16"),
    (90, 64, 4096, 1024, 8, 4, "fp32"),  # where the compiler would spill if it were given a limit
    (100, 1, 4096, 1024, 8, 4, "fp32"),
    (80, 64, 3584, 3584, 8, 4, "fp32"),
    (80, 4096, 4096, 14336, 16, 4, "bf16", "bf16"),
    (80, 1, 3584, 512, 8, 4, "bf16"),
    (80, 16, 4096, 11008, 8, 4, "bf16"),
    (80, 4096, 3584, 18944, 8, 4, "bf16"),
    (80, 4096, 4096, 1024, 8, 4, "fp16"),
    (80, 512, 384, 1536, 8, 4, "fp32"),
    (80, 512, 384, 384, 8, 4, "fp32"),
    (100, 1, 4096, 4096, 8, 4, "bf16"),
    (100, 512, 384, 1536, 8, 4, "bf16"),
    (100, 4096, 4096, 11008, 8, 4, "bf16"),
    (100, 4096, 14336, 4096, 8, 4, "bf16"),
]
KERNELS = {
    "lora": ["lora_fwd_kernel", "lora_fwd_sum_kernel"],
    "low_rank": [
        "low_rank_down_kernel",
        "low_rank_up_kernel",
        "low_rank_outer_kernel",
        "low_rank_sum_kernel",
    ],
    "mos": ["mos_bwd_pool_kernel"],
}


def launch(tokens, in_features, out_features, rank, shards, dtype, pool_dtype="fp32"):
    """Pools of 32 layers."""
    base, pools, count = DTYPES[dtype], DTYPES[pool_dtype], 2 * 32 * shards
    x, grad = meta(tokens, in_features, dtype=base), meta(tokens, out_features, dtype=base)
    weight, bias = meta(out_features, in_features, dtype=base), meta(out_features, dtype=base)
    pool_A, pool_B = (meta(count, size // shards, dtype=pools) for size in (in_features, out_features))
    index = meta(rank, shards, dtype=torch.int64)
    mos.mos_fwd(x, weight, bias, pool_A, index, pool_B, index, SCALING)
    dpools = torch.empty_like(pool_A), torch.empty_like(pool_B)
    mos.mos_bwd_(*dpools, grad, x, weight, pool_A, index, pool_B, index, meta(tokens, rank), SCALING, True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    check_records(__file__, case, compiled[case])
    capability, dtype = case[0], case[6]
    newest = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    for record in compiled[case]:
        config = record["config"]
        # A warp group multiplies 64 rows at least; where tokens are summed over, these are features.
        rows = config.get("BLOCK_D" if record["kernel"] == "low_rank_outer_kernel" else "BLOCK_T")
        if dtype == "fp32" or rows is None:
            assert record["tensor_cores"] == []  # they would round to tf32
        elif rows < 64 or capability < 90:
            assert record["tensor_cores"] == ["mma.sync"]
        else:
            assert newest in record["tensor_cores"]
