"""The Triton LoRA kernels, checked where there is no GPU.

Its values come from Triton's interpreter, against float64. What it becomes on a GPU is compiled,
for chips that need not be here, in processes of their own: one process either interprets or
compiles.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from fastpeft.kernels import lora as kernel
from gpu_compile import check_records, compiled_cases, meta
from helpers import in_turn

from fastpeft.ops import lora as ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------

# base dtype, adapter dtype
PAIRS = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "bf16+fp32": (BF16, FP32),  # PEFT's default over a 16-bit base: A is split in three
    "fp16+fp32": (FP16, FP32),  # x is split too
    "fp32+bf16": (FP32, BF16),  # adapters coarser than the base: cast up
}

# T, in, out, r
SHAPES = [
    (1, 64, 48, 8),  # decode; no mask along in, rank padded to 16
    (1, 1, 5, 1),  # one input feature, rank 1: sizes that Triton makes constants of
    (3, 37, 5, 3),  # primes: every mask at once, in one program
    (16, 130, 48, 16),  # the last decode tile, full; rank that needs no padding
    (17, 130, 97, 20),  # one token into a second tile; rank padded to 32
    (65, 64, 97, 16),  # ragged tiles of tokens and of outputs
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """An element that the kernel does not write stays NaN, and no comparison holds."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", nan_filled)


def draw(shape, dtype, adapter_dtype, bias=True, seed=0):
    """x, weight, bias, lora_A, lora_B: the base output and the adapter's are of one magnitude."""
    tokens, in_features, out_features, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, dtype=torch.float64) * scale

    return (
        normal(tokens, in_features).to(dtype),
        normal(out_features, in_features, scale=in_features**-0.5).to(dtype),
        normal(out_features).to(dtype) if bias else None,
        normal(rank, in_features, scale=in_features**-0.5).to(adapter_dtype),
        normal(out_features, rank, scale=rank**-0.5).to(adapter_dtype),
    )


def exact(x, weight, bias, lora_A, lora_B, scaling):
    """y and h in float64, term by term from the formula."""
    x, weight, lora_A, lora_B = (t.double() for t in (x, weight, lora_A, lora_B))
    h = torch.einsum("ti,ri->tr", x, lora_A)
    y = torch.einsum("ti,oi->to", x, weight) + scaling * torch.einsum("tr,or->to", h, lora_B)
    return (y if bias is None else y + bias.double()), h


def composed(x, weight, bias, lora_A, lora_B, scaling):
    """y from PyTorch's own operators in the same dtypes; h from float32, which is its dtype.

    Of copies: on CPUs with matrix tiles PyTorch's 16-bit product multiplies what lies beside a slice by zeros, and that
    is NaN here.
    """
    x, weight, lora_A, lora_B = (t.contiguous() for t in (x, weight, lora_A, lora_B))
    delta = scaling * ((x.to(lora_A.dtype) @ lora_A.T) @ lora_B.T)
    return (F.linear(x, weight, bias) + delta).to(x.dtype), x.float() @ lora_A.float().T


def errors(results, inputs, scaling):
    """The error of y and of h relative to each, in root mean squares: a largest entry is a matter of luck."""
    pairs = zip(results, exact(*inputs, scaling), strict=True)
    return [((got.double() - want).norm() / want.norm()).item() for got, want in pairs]


def check(inputs, others=(), scaling=0.75):
    """At most twice the error of PyTorch's composition, for y and for h.

    The composition's error is the largest over the inputs and over `others`, more of the same shape
    and dtypes: where there are few outputs, its error on one draw is a matter of luck.
    """
    y, h = kernel.lora_fwd(*inputs, scaling)
    assert y.dtype == inputs[0].dtype and h.dtype == torch.float32
    assert y.shape == (inputs[0].shape[0], inputs[1].shape[0])
    assert h.shape == (inputs[0].shape[0], inputs[3].shape[0])
    compositions = [errors(composed(*i, scaling), i, scaling) for i in (inputs, *others)]
    y_error, h_error = errors((y, h), inputs, scaling)
    assert y_error <= 2 * max(y_c for y_c, _ in compositions)
    assert h_error <= 2 * max(h_c for _, h_c in compositions)


@pytest.mark.parametrize("shape, pair", in_turn(SHAPES, PAIRS))
def test_forward(pair, shape):
    draws = [draw(shape, *PAIRS[pair], seed=seed) for seed in range(9)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("pair", PAIRS)
def test_no_bias(pair):
    draws = [draw((3, 37, 5, 3), *PAIRS[pair], bias=False, seed=seed) for seed in range(9)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_rounds_to_nearest_even(dtype):
    # One product of two 16-bit numbers is exact in float32: y is its rounding, bit for bit.
    x, weight, _, lora_A, lora_B = draw((65, 1, 97, 1), dtype, dtype)
    y, _ = kernel.lora_fwd(x, weight, None, lora_A, torch.zeros_like(lora_B), 0.75)
    assert torch.equal(y, (x.float() @ weight.float().T).to(dtype))


def test_program_order():
    # 19 tiles of tokens by 7 of outputs: two whole groups and a ragged one, each tile just once.
    check(draw((300, 37, 97, 3), FP32, FP32))


def within_nan(tensor, rows, columns):
    """The same values inside a larger tensor of NaN: odd strides, and a poisoned neighbourhood."""
    larger = torch.full(
        (tensor.shape[0] + 2 * rows, tensor.shape[1] + 2 * columns),
        float("nan"),
        dtype=tensor.dtype,
    )
    view = larger[rows : rows + tensor.shape[0], columns : columns + tensor.shape[1]]
    return view.copy_(tensor)


LAYOUTS = {
    # a slice of a larger tensor: row stride beyond the width, unaligned start
    "slice": lambda t: within_nan(t, 1, 3),
    # every other row of a larger tensor
    "rows": lambda t: t.repeat_interleave(2, dim=0)[::2],
    # column-major, as Conv1D's weight is: the walk over in_features is the strided one
    "transposed": lambda t: t.t().contiguous().t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "weight", "lora_A", "lora_B", "all"])
def test_strides(argument, layout):
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    inputs = draw((17, 37, 48, 3), BF16, FP32)
    views = [
        LAYOUTS[layout](tensor) if name != "bias" and argument in (name, "all") else tensor
        for name, tensor in zip(names, inputs, strict=True)
    ]
    expected = kernel.lora_fwd(*inputs, 0.75)
    assert all(map(torch.equal, kernel.lora_fwd(*views, 0.75), expected))
    check(views)


def test_broadcast_x_and_strided_bias():
    x, weight, bias, lora_A, lora_B = draw((1, 37, 48, 3), FP32, FP32)
    check((x.expand(17, 37), weight, bias.repeat_interleave(3)[::3], lora_A, lora_B))


@pytest.mark.parametrize("pair", ["fp32", "bf16", "fp16+fp32"])
@pytest.mark.parametrize("tile", [(128, 256, 64, 8, 4), (64, 128, 16, 8, 3)], ids=str)
def test_large_tiles(tile, pair, monkeypatch):
    # What large problems run, on a small one: the values must not depend on the tile.
    block_t, block_o, block_i, warps, stages = tile
    config = {"BLOCK_T": block_t, "BLOCK_O": block_o, "BLOCK_I": block_i, "BLOCK_R": 16}
    config |= {"SPLITS": 1, "GROUP_T": 8, "EVEN_I": False, "num_warps": warps, "num_stages": stages}
    monkeypatch.setattr(kernel, "lora_fwd_config", lambda *_: config)
    check(draw((130, 70, 260, 5), *PAIRS[pair]))


@pytest.mark.parametrize("pair", ["bf16+fp32", "fp16+fp32"])
@pytest.mark.parametrize("magnitude", [1e6, 1e-6])
def test_float32_adapters_keep_their_range(pair, magnitude):
    # Beyond float16 (65504, 6e-8), as a float32 adapter may be; the product is not.
    x, weight, bias, lora_A, lora_B = draw((17, 130, 48, 8), *PAIRS[pair])
    check((x, weight, bias, lora_A * magnitude, lora_B / magnitude))


@pytest.mark.parametrize("pair", PAIRS)
def test_fresh_adapter_gives_the_base(pair):
    x, weight, bias, lora_A, lora_B = draw((17, 130, 48, 8), *PAIRS[pair])
    y, _ = kernel.lora_fwd(x, weight, bias, lora_A, torch.zeros_like(lora_B), 0.75)
    base = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    assert torch.equal(y, kernel.lora_fwd(x, weight, bias, *base, 0.75)[0])


@pytest.mark.parametrize("pair", PAIRS)
def test_no_tokens_no_launch(pair, monkeypatch):
    monkeypatch.setattr(kernel, "lora_fwd_kernel", None)
    y, h = kernel.lora_fwd(*draw((0, 37, 48, 8), *PAIRS[pair]), 0.75)
    assert y.shape == (0, 48) and y.dtype == PAIRS[pair][0]
    assert h.shape == (0, 8) and h.dtype == torch.float32


@pytest.mark.parametrize("argument", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_unsupported_dtype_names_the_argument(argument):
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    inputs = dict(zip(names, draw((3, 37, 5, 3), FP32, FP32), strict=True))
    inputs[argument] = inputs[argument].double()
    with pytest.raises(TypeError, match=f"^{argument} must be .* got torch.float64"):
        kernel.lora_fwd(*inputs.values(), 0.75)


def test_weight_of_another_dtype_than_x():
    x, weight, bias, lora_A, lora_B = draw((3, 37, 5, 3), FP32, FP32)
    with pytest.raises(TypeError, match=r"^weight must have x's dtype, torch.float32, got"):
        kernel.lora_fwd(x, weight.to(BF16), bias, lora_A, lora_B, 0.75)


def test_the_library_does_large_products_and_wide_ranks():
    assert kernel.fused_pays(64, 18944, 3584, 16, BF16) and kernel.fused_pays(512, 384, 1536, 16, BF16)
    assert not kernel.fused_pays(300, 18944, 3584, 16, BF16) and not kernel.fused_pays(512, 1536, 1536, 16, FP32)
    assert not kernel.fused_pays(1, 64, 64, 300, BF16)


@pytest.mark.parametrize("shape, pair", in_turn([*SHAPES, (7, 40, 24, 300)], PAIRS))
def test_around_the_library(pair, shape, monkeypatch):
    monkeypatch.setattr(kernel, "fused_pays", lambda *_: False)
    draws = [draw(shape, *PAIRS[pair], seed=seed) for seed in range(9)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("pair", PAIRS)
def test_the_delta_alone(pair):
    x, _, _, lora_A, lora_B = draw((19, 37, 48, 3), *PAIRS[pair])
    y, h = kernel.lora_fwd(x, None, None, lora_A, lora_B, 0.75)
    zeros = torch.zeros(48, 37, dtype=x.dtype)
    want = exact(x, zeros, None, lora_A, lora_B, 0.75)
    composition = ops.lora_fwd(x, None, None, lora_A, lora_B, 0.75)
    for got, plain, wanted in zip((y, h), composition, want, strict=True):
        assert (got.double() - wanted).norm() <= 2 * (plain.double() - wanted).norm().clamp(min=2e-7 * wanted.norm())


# ---------------------------------------------------------------------- dropout


def mask_of(seed, p, tokens, features):
    """What the generator leaves of (tokens, features), seen through a product with one."""
    ones = torch.ones(tokens, 1)
    return kernel.up(ones, kernel.Factor(torch.ones(1, features)), 1 - p, None, FP32, kernel.Dropout(seed, p))


def test_what_dropout_leaves():
    seed, p = torch.tensor([1234567890123456789]), 0.3
    mask = mask_of(seed, p, 130, 300)
    assert set(mask.round(decimals=5).unique().tolist()) == {0.0, 1.0}
    mask = mask.round()
    n = mask.numel()
    assert abs(mask.mean() - 0.7) < 5 * (0.3 * 0.7 / n) ** 0.5
    assert torch.equal(mask, mask_of(seed, p, 130, 300).round())
    assert torch.equal(mask[:50, :200], mask_of(seed, p, 50, 200).round())  # of the place alone
    assert (mask != mask_of(seed + 1, p, 130, 300).round()).float().mean() > 0.3
    for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, 4:], mask[:, :-4])):
        assert (
            abs(((a - 0.7) * (b - 0.7)).mean()) < 5 * 0.21 / a.numel() ** 0.5
        )  # neighbours know nothing of each other


@pytest.mark.parametrize("shape, pair", in_turn([(3, 37, 5, 3), (33, 70, 97, 20), (530, 33, 20, 16)], PAIRS))
def test_dropout_forward_and_backward(pair, shape):
    """Beside the composition on the same mask."""
    p, seed = 0.4, torch.tensor([99])
    left = mask_of(seed, p, shape[0], shape[1]).round()

    def both(seeds):
        for n in seeds:
            grad, x, weight, lora_A, lora_B, _ = draw_bwd(shape, *PAIRS[pair], seed=n)
            dropped = (x.double() * left / (1 - p)).to(x.dtype if x.dtype == FP32 else torch.float64)
            yield grad, x, weight, lora_A, lora_B, dropped

    def wanted(grad, x, weight, lora_A, lora_B, dropped):
        x, weight, lora_A, lora_B, grad = (t.double() for t in (x, weight, lora_A, lora_B, grad))
        h = (x * left / (1 - p)) @ lora_A.T
        gB = 0.75 * grad @ lora_B
        dx = grad @ weight + (gB @ lora_A) * left / (1 - p)
        return x @ weight.T + 0.75 * h @ lora_B.T, h, dx, gB.T @ (x * left / (1 - p)), 0.75 * grad.T @ h

    def composed(grad, x, weight, lora_A, lora_B, dropped):
        rounded = dropped.to(x.dtype)
        y, h = ops.lora_fwd(x, weight, None, lora_A, lora_B, 0.75, rounded)
        dh, dA, dB = ops.lora_bwd(grad, rounded, None, lora_A, lora_B, h, 0.75, (True, True, True))
        return y, h, grad @ weight + (dh * left / (1 - p)).to(grad.dtype), dA, dB

    def relative(found, exact):
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]

    cases = list(both(range(5)))
    bounds = [relative(composed(*case), wanted(*case)) for case in cases]
    grad, x, weight, lora_A, lora_B, _ = cases[0]
    y, h = kernel.lora_fwd(x, weight, None, lora_A, lora_B, 0.75, seed, p)
    found = y, h, *kernel.lora_bwd(grad, x, weight, lora_A, lora_B, h, 0.75, True, seed, p)
    for error, bound in zip(relative(found, wanted(*cases[0])), zip(*bounds, strict=True), strict=True):
        assert error <= 2 * max(bound)


# ---------------------------------------------------------------------- a walk that several programs share


@pytest.mark.parametrize("splits", [2, 7])
@pytest.mark.parametrize("pair", PAIRS)
def test_split_walk(pair, splits, monkeypatch):
    # A chunk that ends inside a step, and with 7 splits of 5 steps two that have nothing to do.
    config = {"BLOCK_T": 16, "BLOCK_O": 32, "BLOCK_I": 16, "BLOCK_R": 32, "SPLITS": splits}
    config |= {"GROUP_T": 8, "EVEN_I": False, "num_warps": 4, "num_stages": 4}
    monkeypatch.setattr(kernel, "lora_fwd_config", lambda *_: config)
    draws = [draw((17, 70, 97, 20), *PAIRS[pair], seed=seed) for seed in range(5)]
    check(draws[0], draws[1:])


def test_split_walk_as_configured():
    inputs = draw((1, 2100, 40, 5), BF16, BF16)
    assert kernel.lora_fwd_config(1, 40, 2100, 5, BF16, BF16)["SPLITS"] > 1
    check(inputs, [draw((1, 2100, 40, 5), BF16, BF16, seed=seed) for seed in range(1, 9)])
    assert all(map(torch.equal, kernel.lora_fwd(*inputs, 0.75), kernel.lora_fwd(*inputs, 0.75)))


def test_walks_are_split_where_processors_would_have_nothing_to_do():
    def splits(*sizes):
        return kernel.lora_fwd_config(*sizes, 16, BF16, BF16, processors=132)["SPLITS"]

    assert splits(1, 512, 3584) == 3  # keys and values of grouped queries: 32 tiles, 28 steps
    assert splits(1, 4096, 4096) == 1  # the tiles are enough
    assert splits(1, 384, 384) == 1  # too short a walk
    assert splits(512, 384, 11008) == 1  # enough to do for a program


# ------------------------------------------------------------------------------------------------
# Backward
# ------------------------------------------------------------------------------------------------

# T, in, out, r
SHAPES_BWD = [
    (1, 64, 48, 8),
    (1, 1, 5, 1),
    (3, 37, 5, 3),
    (33, 64, 97, 20),  # ragged tiles
    (530, 33, 20, 16),  # two splits of tokens, the second of them ragged
    (3, 24, 2100, 5),  # the outputs split as well
    (7, 24, 16, 80),  # a rank of two tiles, the second of them ragged
]


def draw_bwd(shape, dtype, adapter_dtype, seed=0):
    """grad, x, weight, lora_A, lora_B, h."""
    x, weight, _, lora_A, lora_B = draw(shape, dtype, adapter_dtype, seed=seed)
    generator = torch.Generator().manual_seed(100 + seed)
    grad = torch.randn(shape[0], shape[2], generator=generator, dtype=torch.float64).to(dtype)
    return grad, x, weight, lora_A, lora_B, (x.double() @ lora_A.double().T).float()


def exact_bwd(grad, x, weight, lora_A, lora_B, h, scaling=0.75):
    grad, x, weight, lora_A, lora_B, h = (
        None if t is None else t.double() for t in (grad, x, weight, lora_A, lora_B, h)
    )
    gB = scaling * torch.einsum("to,or->tr", grad, lora_B)
    dx = torch.einsum("tr,ri->ti", gB, lora_A)
    if weight is not None:
        dx = dx + torch.einsum("to,oi->ti", grad, weight)
    return dx, torch.einsum("tr,ti->ri", gB, x), scaling * torch.einsum("to,tr->or", grad, h)


def errors_bwd(results, inputs):
    pairs = zip(results, exact_bwd(*inputs), strict=True)
    return [((got.double() - want).norm() / want.norm()).item() for got, want in pairs]


def check_bwd(inputs, others=()):
    """At most twice the error of fastpeft's composition of PyTorch operators, for dx, dA and dB."""
    results = kernel.lora_bwd(*inputs, 0.75, True)
    grad, x, _, lora_A, lora_B, _ = inputs
    assert [(r.shape, r.dtype) for r in results] == [
        (x.shape, grad.dtype), (lora_A.shape, lora_A.dtype), (lora_B.shape, lora_B.dtype)
    ]  # fmt: skip
    compositions = [errors_bwd(ops.lora_bwd(*i, 0.75, (True, True, True)), i) for i in (inputs, *others)]
    for error, bound in zip(errors_bwd(results, inputs), zip(*compositions, strict=True), strict=True):
        assert error <= 2 * max(bound)
    return results


@pytest.mark.parametrize("shape, pair", in_turn(SHAPES_BWD, PAIRS))
def test_backward(pair, shape):
    draws = [draw_bwd(shape, *PAIRS[pair], seed=seed) for seed in range(9)]
    check_bwd(draws[0], draws[1:])


@pytest.mark.parametrize("pair", PAIRS)
def test_backward_of_the_delta_alone(pair):
    draws = [draw_bwd((19, 37, 48, 3), *PAIRS[pair], seed=seed) for seed in range(9)]
    alone = [(grad, x, None, *rest) for grad, x, _, *rest in draws]
    check_bwd(alone[0], alone[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["grad", "x", "all"])
def test_backward_strides(argument, layout):
    names = ("grad", "x", "weight", "lora_A", "lora_B", "h")
    inputs = draw_bwd((17, 37, 48, 3), BF16, FP32)
    views = [LAYOUTS[layout](t) if argument in (name, "all") else t for name, t in zip(names, inputs, strict=True)]
    expected = kernel.lora_bwd(*inputs, 0.75, True)
    found = kernel.lora_bwd(*views, 0.75, True)
    assert all(map(torch.equal, found[1:], expected[1:]))
    check_bwd(views)  # of dx a part is the library's, which may add up in another order


def test_backward_broadcast_gradient():
    _, *rest = draw_bwd((17, 37, 48, 3), FP32, FP32)
    check_bwd((torch.ones(()).expand(17, 48), *rest))


def test_backward_repeats_bit_for_bit():
    inputs = draw_bwd((530, 33, 20, 5), BF16, FP32)
    first, second = (kernel.lora_bwd(*inputs, 0.75, True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)], ids=str)
def test_backward_of_what_is_needed(needs):
    grad, x, weight, lora_A, lora_B, h = draw_bwd((19, 37, 48, 3), FP32, FP32)
    need_x, need_A, need_B = needs
    full = kernel.lora_bwd(grad, x, weight, lora_A, lora_B, h, 0.75, True)
    found = kernel.lora_bwd(
        grad, x if need_A else None, weight, lora_A, lora_B, h if need_B else None, 0.75, bool(need_x)
    )
    for needed, one, all_of_it in zip(needs, found, full, strict=True):
        assert torch.equal(one, all_of_it) if needed else one.shape == (0, all_of_it.shape[1])


@pytest.mark.parametrize("pair", PAIRS)
def test_backward_without_tokens(pair):
    dx, dA, dB = kernel.lora_bwd(*draw_bwd((0, 37, 48, 3), *PAIRS[pair]), 0.75, True)
    assert dx.shape == (0, 37) and dA.shape == (3, 37) and dB.shape == (48, 3)
    assert not dA.any() and not dB.any()


@pytest.mark.parametrize("magnitude", [1e6, 1e-6])
def test_backward_keeps_the_range_of_float32_adapters(magnitude):
    grad, x, weight, lora_A, lora_B, h = draw_bwd((17, 37, 48, 3), FP16, FP32)
    check_bwd((grad, x, weight, lora_A / magnitude, lora_B * magnitude, h / magnitude))


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, pass, T, in, out, r, base dtype, adapter dtype: each another configuration, or another path
# through the compiler. The layers are MiniLM's (384) and Llama-2-7B's (4096, 11008).
CASES = [
    # Hopper, the chip aimed at: every bfloat16 tile that these layers select at T 1, 16, 512, 4096.
    (90, "fwd", 1, 384, 384, 16, "bf16", "bf16"),  # 16 × 16, mma.sync: few outputs
    (90, "fwd", 16, 4096, 4096, 16, "bf16", "bf16"),  # 16 × 32
    (90, "fwd", 1, 4096, 11008, 16, "bf16", "bf16"),  # 16 × 64
    (90, "fwd", 512, 384, 384, 16, "bf16", "bf16"),  # 32 × 32, still mma.sync: wgmma takes 64 rows
    (90, "fwd", 512, 384, 1536, 16, "bf16", "bf16"),  # 64 × 64, wgmma
    (90, "fwd", 4096, 384, 384, 16, "bf16", "bf16"),  # 64 × 128
    (90, "fwd", 512, 4096, 4096, 16, "bf16", "bf16"),  # 128 × 128
    (90, "fwd", 4096, 4096, 4096, 16, "bf16", "bf16"),  # 128 × 256, the most shared memory
    (90, "fwd", 4096, 4096, 4096, 64, "bf16", "bf16"),  # a wider A, and so a narrower tile
    # float32 adapters: three parts of A in the loop. float16 x has parts too.
    (90, "fwd", 16, 4096, 4096, 16, "bf16", "fp32"),
    (90, "fwd", 4096, 4096, 4096, 16, "bf16", "fp32"),
    (90, "fwd", 4096, 4096, 4096, 16, "fp16", "fp32"),
    # IEEE float32: no tensor cores, the operands in registers.
    (90, "fwd", 1, 4096, 4096, 16, "fp32", "fp32"),
    (90, "fwd", 512, 384, 384, 16, "fp32", "fp32"),
    (90, "fwd", 4096, 4096, 11008, 16, "fp32", "fp32"),
    # Sizes that no vector load and no tile divides: masks along in_features, no alignment.
    (90, "fwd", 65, 37, 97, 3, "bf16", "bf16"),
    # Ampere: mma.sync, operands in registers, 163 KiB. Smallest, largest, split, float32.
    (80, "fwd", 16, 4096, 4096, 16, "bf16", "bf16"),
    (80, "fwd", 4096, 4096, 11008, 16, "bf16", "bf16"),
    (80, "fwd", 4096, 4096, 4096, 16, "bf16", "fp32"),
    (80, "fwd", 1, 4096, 4096, 16, "fp32", "fp32"),
    (80, "fwd", 4096, 4096, 4096, 16, "fp32", "fp32"),
    # Ada: the same with 99 KiB, which is also the default.
    (89, "fwd", 4096, 4096, 4096, 16, "bf16", "fp32"),
    # Blackwell: tcgen05, accumulators in tensor memory; its split takes the most shared memory.
    (100, "fwd", 16, 4096, 4096, 16, "bf16", "bf16"),
    (100, "fwd", 4096, 4096, 4096, 16, "bf16", "bf16"),
    (100, "fwd", 4096, 4096, 4096, 16, "bf16", "fp32"),
    (100, "fwd", 4096, 4096, 4096, 16, "fp32", "fp32"),
    # Decode of few outputs: Qwen2.5-7B's keys and values, the walk split; and its largest matrix, not split.
    (90, "fwd", 1, 3584, 512, 16, "bf16", "bf16"),
    (90, "fwd", 16, 3584, 512, 16, "bf16", "fp32"),
    (90, "fwd", 64, 14336, 1024, 16, "bf16", "bf16"),
    (80, "fwd", 1, 3584, 512, 16, "fp32", "fp32"),
    (100, "fwd", 1, 18944, 3584, 16, "bf16", "bf16"),
    # Where the compiler would spill: wide rows of W beside a split A, and few registers for the sake of more programs.
    (80, "fwd", 16, 4096, 11008, 8, "bf16", "fp32"),
    (90, "fwd", 1, 4096, 1024, 8, "bf16", "bf16"),
    (80, "bwd", 512, 4096, 11008, 8, "fp16", "fp32"),
    (80, "dropout", 16, 4096, 4096, 8, "bf16", "bf16"),
    (90, "bwd", 1, 4096, 4096, 8, "fp16", "fp32"),  # five products of a step, and a strided B
    # Backward. One token: gB split over the outputs.
    (90, "bwd", 1, 4096, 11008, 16, "bf16", "bf16"),
    (90, "bwd", 16, 3584, 18944, 16, "bf16", "fp32"),
    (90, "bwd", 512, 384, 1536, 16, "bf16", "bf16"),
    (90, "bwd", 512, 4096, 14336, 16, "bf16", "fp32"),
    (90, "bwd", 4096, 4096, 4096, 16, "bf16", "bf16"),
    (90, "bwd", 4096, 4096, 11008, 64, "bf16", "fp32"),
    (90, "bwd", 4096, 4096, 4096, 16, "fp16", "fp32"),
    (90, "bwd", 4096, 384, 1536, 16, "fp32", "fp32"),
    (90, "bwd", 65, 37, 97, 3, "bf16", "bf16"),
    (80, "bwd", 4096, 4096, 11008, 16, "bf16", "fp32"),
    (80, "bwd", 512, 3584, 18944, 128, "fp32", "fp32"),
    (100, "bwd", 4096, 4096, 14336, 16, "bf16", "bf16"),
    (100, "bwd", 512, 384, 384, 16, "bf16", "fp32"),
    # Dropout, forward and backward.
    (90, "dropout", 4096, 4096, 4096, 16, "bf16", "fp32"),
    (90, "dropout", 16, 384, 1536, 8, "bf16", "bf16"),
    (90, "dropout", 512, 384, 384, 16, "fp32", "fp32"),
    (80, "dropout", 4096, 3584, 18944, 16, "bf16", "fp32"),
    (100, "dropout", 4096, 4096, 14336, 16, "bf16", "fp32"),
]


KERNELS = {
    "lora": ["lora_fwd_kernel", "lora_fwd_sum_kernel"],
    "low_rank": [
        "low_rank_down_kernel",
        "low_rank_up_kernel",
        "low_rank_outer_kernel",
        "low_rank_sum_kernel",
    ],
}


def launch(direction, tokens, in_features, out_features, rank, dtype, adapter_dtype):
    base, adapter = DTYPES[dtype], DTYPES[adapter_dtype]
    x, weight = meta(tokens, in_features, dtype=base), meta(out_features, in_features, dtype=base)
    lora_A, lora_B = meta(rank, in_features, dtype=adapter), meta(out_features, rank, dtype=adapter)
    seed, p = (meta(1, dtype=torch.int64), 0.1) if direction == "dropout" else (None, 0.0)
    if direction != "bwd":
        kernel.lora_fwd(x, weight, meta(out_features, dtype=base), lora_A, lora_B, 0.75, seed, p)
    if direction != "fwd":
        grad, h = meta(tokens, out_features, dtype=base), meta(tokens, rank)
        kernel.lora_bwd(grad, x, weight, lora_A, lora_B, h, 0.75, True, seed, p)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    capability, *_, dtype, _ = case
    check_records(__file__, case, compiled[case])
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
