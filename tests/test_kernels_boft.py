"""The Triton BOFT kernels, checked where there is no GPU.

Values come from Triton's interpreter, against float64. What the kernels become on a GPU is compiled, for chips that
need not be here, in processes of their own.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from fastpeft.kernels import boft as kernel
from fastpeft.kernels import boft_cayley, boft_scale, device
from gpu_compile import check_records, compiled_cases, meta
from helpers import in_turn

import fastpeft
from fastpeft import reference
from fastpeft.ops import boft as ops

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------

# T, d, b, m
SHAPES = [
    (1, 8, 4, 2),  # decode, one window, most of the tile hangs over the edge
    (17, 24, 4, 2),  # three windows; one token into a second tile
    (5, 66, 2, 1),  # the smallest blocks, and features that no tile divides
    (33, 192, 8, 4),  # windows as wide as a tile
    (7, 48, 2, 4),
    (20, 96, 32, 1),
    (3, 128, 64, 1),  # the largest blocks in one program
    # Sizes that are no powers of two: tiles that are not full.
    (5, 66, 6, 1),
    (9, 60, 10, 2),
    (5, 21, 7, 1),  # odd, without halves
    (6, 96, 12, 3),
    # Windows that no program holds: several passes.
    (4, 256, 8, 5),
    (5, 384, 32, 3),
    (9, 512, 2, 9),  # five factors and four
    # Blocks that no program holds.
    (3, 200, 100, 1),
    (5, 264, 66, 2),
    (6, 256, 128, 2),
    # Rows enough to multiply a window out.
    (384, 96, 24, 3),
    (530, 128, 16, 4),
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """An element that no kernel writes stays NaN, and no comparison holds."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", nan_filled)


def draw(shape, dtype, seed=0):
    """x, grad and orthogonal blocks; the kernels do not ask that they be orthogonal."""
    tokens, features, block, factors = shape
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(tokens, features, generator=generator).to(dtype) for _ in range(2))
    boft_R = torch.randn(factors, features // block, block, block, generator=generator)
    return x, grad, reference.boft.boft_blocks(boft_R.double()).float()


def exact(x, grad, blocks):
    """y, dx and dblocks in float64, from the dense R."""
    x, blocks = x.double().requires_grad_(), blocks.double().requires_grad_()
    y = reference.boft.butterfly(x, blocks)
    return y.detach(), *torch.autograd.grad(y, (x, blocks), grad.double())


def computed(module, x, grad, blocks):
    return module.butterfly_fwd(x, blocks), *module.butterfly_bwd(grad, x, blocks, True, True)


def errors(results, expected):
    """Relative to each, in root mean squares: a largest entry is a matter of luck."""
    pairs = zip(results, expected, strict=True)
    return [((got.double() - want).norm() / want.norm()).item() for got, want in pairs]


def check(inputs, others=()):
    """At most twice the error of PyTorch's composition, for y, dx and dblocks; the composition's is the largest over
    the inputs and over `others`, more of the same shape and dtypes.
    """
    results = computed(kernel, *inputs)
    x, _, blocks = inputs
    assert [(r.shape, r.dtype) for r in results] == [(t.shape, t.dtype) for t in (x, x, blocks)]
    bounds = zip(*(errors(computed(ops, *i), exact(*i)) for i in (inputs, *others)), strict=True)
    for error, bound in zip(errors(results, exact(*inputs)), bounds, strict=True):
        assert error <= 2 * max(bound)


@pytest.mark.parametrize("shape, dtype", in_turn(SHAPES, DTYPES))
def test_values(dtype, shape):
    draws = [draw(shape, DTYPES[dtype], seed) for seed in range(5)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_for_one_program(dtype, monkeypatch):
    # On a chip of one processor: groups of two tiles of tokens and of one, and fewer groups of both backward.
    monkeypatch.setattr(device, "processors_of", lambda _: 1)
    inputs = draw((300, 64, 8, 2), DTYPES[dtype])
    check(inputs)
    assert all(map(torch.equal, computed(kernel, *inputs), computed(kernel, *inputs)))


def within_nan(tensor):
    """The same values inside a larger tensor of NaN: odd strides, and a poisoned neighbourhood."""
    larger = torch.full([size + 3 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = larger[tuple(slice(1, size + 1) for size in tensor.shape)]
    return view.copy_(tensor)


LAYOUTS = {
    "slice": within_nan,
    "rows": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda t: t.mT.contiguous().mT,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["x", "grad", "blocks"])
def test_strides(argument, layout):
    inputs = dict(zip(("x", "grad", "blocks"), draw((17, 24, 4, 2), BF16), strict=True))
    expected = computed(kernel, *inputs.values())
    inputs[argument] = LAYOUTS[layout](inputs[argument])
    assert all(map(torch.equal, computed(kernel, *inputs.values()), expected))


def test_broadcast_gradient():
    x, _, blocks = draw((17, 24, 4, 2), FP32)
    check((x, torch.ones(()).expand(17, 24), blocks))


def test_blocks_of_any_size():
    # Not orthogonal, and beyond the range of float16 though the products are not.
    x, grad, blocks = draw((17, 24, 4, 2), FP16)
    blocks = torch.stack([blocks[0] * 1e6, blocks[1] * 1e-6])
    check((x, grad, blocks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_identity_changes_nothing(dtype):
    x, grad, blocks = draw((17, 24, 4, 2), DTYPES[dtype])
    identity = boft_cayley.cayley_fwd(torch.zeros_like(blocks))
    assert torch.equal(identity, torch.eye(4).expand_as(identity))
    y, dx, _ = computed(kernel, x, grad, identity)
    assert torch.equal(y, x) and torch.equal(dx, grad)


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_blocks", [False, True])
def test_gradients_that_are_not_needed_have_no_rows(need_x, need_blocks):
    x, grad, blocks = draw((17, 24, 4, 2), FP32)
    dx, dblocks = kernel.butterfly_bwd(grad, x, blocks, True, True)
    unread = x if need_blocks else torch.full_like(x, float("nan"))
    some_dx, some_dblocks = kernel.butterfly_bwd(grad, unread, blocks, need_x, need_blocks)
    assert torch.equal(some_dx, dx if need_x else dx[:0])
    assert torch.equal(some_dblocks, dblocks if need_blocks else dblocks[:0])


def test_no_tokens():
    x, grad, blocks = draw((0, 24, 4, 2), BF16)
    y, dx, dblocks = computed(kernel, x, grad, blocks)
    assert y.shape == dx.shape == (0, 24) and y.dtype == dx.dtype == BF16
    assert torch.equal(dblocks, torch.zeros_like(blocks))


# ------------------------------------------------------------------------------------------------
# What they do not take
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["x", "grad", "blocks"])
def test_float64_names_the_argument(argument):
    inputs = dict(zip(("x", "grad", "blocks"), draw((3, 24, 4, 2), FP32), strict=True))
    inputs[argument] = inputs[argument].double()
    with pytest.raises(TypeError, match=rf"^{argument} must be float32.* got torch.float64"):
        kernel.butterfly_bwd(inputs["grad"], inputs["x"], inputs["blocks"], True, True)


@pytest.mark.parametrize("shape", [(1, 8, 3, 3), (1, 5, 4, 4), (2, 4, 3, 3), (2, 3, 4, 4)], ids=str)
def test_blocks_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"^blocks must be \(m, d / b, b, b\).* for 12 features$"):
        kernel.butterfly_fwd(torch.zeros(3, 12), torch.zeros(*shape))


def test_passes():
    assert kernel.passes_of(8, 4) == [(0, 4)]
    assert kernel.passes_of(8, 5) == [(0, 2), (2, 3)]
    assert kernel.passes_of(2, 12) == [(0, 6), (6, 6)]
    assert kernel.passes_of(64, 3) == kernel.passes_of(100, 3) == [(0, 1), (1, 1), (2, 1)]
    assert kernel.passes_of(12, 4) == [(0, 2), (2, 2)]


@pytest.mark.parametrize("block", [2, 3, 6, 10, 14, 22, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_tiles_hold_whole_spans(dtype, block):
    for factors in range(1, 7):
        span = block << (factors - 1)
        if span <= kernel.WIDEST:
            sizes = kernel.tile_sizes(span, dtype)
            assert sizes["PART"] % span == 0 and sizes["SPAN"] % sizes["PART"] == 0
            assert sizes["PART"] <= sizes["WINDOW"] and sizes["SPAN"] <= sizes["WIDTH"]


# ------------------------------------------------------------------------------------------------
# The scale
# ------------------------------------------------------------------------------------------------


def scaled_exactly(y0, bias, scale):
    y0, bias, scale = (None if t is None else t.double() for t in (y0, bias, scale))
    bias = torch.zeros(()) if bias is None else bias
    return (y0 - bias) * scale.squeeze(1) + bias


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape, dtype", in_turn([(1, 5), (70, 130), (3, 257), (4200, 70)], DTYPES))
def test_scale(dtype, shape, with_bias):
    generator = torch.Generator().manual_seed(0)
    y0, grad = (torch.randn(*shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    bias = torch.randn(2 * shape[1], generator=generator).to(DTYPES[dtype])[::2] if with_bias else None
    scale = 1 + torch.randn(shape[1], 3, generator=generator)[:, 1:2]
    y = torch.empty_like(y0)
    boft_scale.scale_fwd(y0, bias, scale, y)
    found = (y, *boft_scale.scale_bwd(grad.T.contiguous().T, y0, bias, scale))
    wide = scale.double().requires_grad_()
    leaf = y0.double().requires_grad_()
    expected_y = scaled_exactly(leaf, bias, wide)
    expected = (expected_y.detach(), *torch.autograd.grad(expected_y, (leaf, wide), grad.double()))
    composed = ops.scale_rows(y0, scale, bias)
    bounds = errors((composed, (grad * scale.squeeze(1)).to(grad.dtype)), expected[:2])
    plain = grad.float() * (y0.float() - (0.0 if bias is None else bias.float()))
    bounds += errors((plain.sum(0).unsqueeze(1),), expected[2:])
    for error, bound in zip(errors(found, expected), bounds, strict=True):
        assert error <= 2 * max(bound, 2**-24)
    assert boft_scale.scale_bwd(grad, None, bias, scale)[1].shape == (0, 1)
    assert torch.equal(boft_scale.scale_bwd(grad, None, bias, scale)[0], found[1])


def test_a_scale_of_one_changes_nothing():
    y0, bias = torch.randn(19, 40).bfloat16(), torch.randn(40).bfloat16()
    y = y0.clone()
    boft_scale.scale_fwd(y, bias, torch.ones(40, 1), y)
    assert torch.equal(y, y0)


# ------------------------------------------------------------------------------------------------
# As a backend
# ------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Names of the launchers that ran."""
    names = []

    def note(module, name):
        launcher = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: names.append(name) or launcher(*args))

    for name in ("butterfly_fwd", "butterfly_bwd", "scale_fwd", "scale_bwd"):
        note(kernel, name)
    for name in ("cayley_fwd", "cayley_bwd"):
        note(boft_cayley, name)
    return names


def layer(dtype):
    """x (2, 3, 24), weight, bias, boft_R, boft_s."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    boft_R, boft_s = normal(2, 6, 4, 4), 1 + 0.1 * normal(10, 1)
    return normal(2, 3, 24).to(dtype), normal(10, 24).to(dtype), normal(10).to(dtype), boft_R, boft_s


def gradients(backend, tensors):
    x, weight, bias, boft_R, boft_s = tensors
    leaves = [t.clone().requires_grad_() for t in (x, boft_R, boft_s)]
    with fastpeft.use_backend(backend):
        y = fastpeft.functional.boft_linear(leaves[0], weight, bias, *leaves[1:])
    return y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_layer(dtype, launched):
    tensors = layer(DTYPES[dtype])
    found = gradients("triton", tensors)
    assert launched == ["cayley_fwd", "butterfly_fwd", "scale_fwd", "scale_bwd", "butterfly_bwd", "cayley_bwd"]
    expected = gradients("reference", [t.double() for t in tensors])
    bounds = errors(gradients("torch", tensors), expected)
    for got, error, bound, leaf in zip(found, errors(found, expected), bounds, tensors, strict=False):
        assert got.dtype in (leaf.dtype, FP32) and error <= 2 * max(bound, 2**-24)


def test_blocks_at_hand_without_gradients(launched):
    x, weight, bias, boft_R, boft_s = layer(BF16)
    with fastpeft.use_backend("triton"):
        blocks = ops.boft_blocks(boft_R)
        y = ops.rotated_linear(x, weight, bias, blocks, boft_s)
        assert torch.equal(y, ops.apply_boft(x, weight, bias, boft_R, boft_s))
        assert fastpeft.functional.butterfly(x[:, :0], blocks).shape == (2, 0, 24)
    whole = ["cayley_fwd", "butterfly_fwd", "scale_fwd"]
    assert launched == [*whole, *whole, "butterfly_fwd"]


def test_gradient_of_x_alone(launched):
    x, _, blocks = draw((17, 24, 4, 2), FP32)
    x.requires_grad_()
    with fastpeft.use_backend("triton"):
        (dx,) = torch.autograd.grad(fastpeft.functional.butterfly(x, blocks).sum(), x)
    torch.testing.assert_close(dx, exact(x.detach(), torch.ones(17, 24), blocks)[1].float())
    assert launched == ["butterfly_fwd", "butterfly_bwd"]


def test_float64_is_refused():
    x, weight, bias, boft_R, boft_s = layer(torch.float64)
    with fastpeft.use_backend("triton"), pytest.raises(RuntimeError, match=r"cannot run butterfly_fwd: takes"):
        fastpeft.functional.boft_linear(x, weight, bias, boft_R, boft_s)


def test_opcheck():
    x, grad, blocks = draw((17, 24, 4, 2), FP32)
    library = torch.ops.fastpeft_triton
    torch.library.opcheck(library.butterfly_fwd, (x, blocks))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(library.butterfly_bwd, (grad, x, blocks, *needs))
    weight, bias, scale = torch.randn(10, 24), torch.randn(10), torch.randn(10, 1)
    for keep in (True, False):
        torch.library.opcheck(library.boft_fwd, (x, weight, bias, blocks, scale, keep))
    for y0, *needs in ((None, True, True), (torch.randn(17, 10), True, False), (torch.randn(17, 10), False, False)):
        grad = torch.randn(17, 10)
        torch.library.opcheck(library.boft_bwd, (grad, x, weight, bias, blocks, scale, y0, *needs))


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, T, d, b, m, dtype: MiniLM's layers (384, 1536), Llama-2-7B's (4096, 11008), Llama-3-8B's (14336) and
# Qwen2.5-7B's (3584, 18944).
CASES = [
    # Hopper, the chip aimed at.
    (90, 1, 4096, 4, 2, "bf16"),  # decode: 16 rows
    (90, 16, 18944, 8, 4, "bf16"),
    (90, 512, 384, 4, 2, "bf16"),  # few tiles of features: 16 rows again, for the sake of more programs
    (90, 512, 11008, 8, 2, "bf16"),
    (90, 4096, 4096, 4, 2, "bf16"),
    (90, 4096, 4096, 8, 4, "bf16"),  # 64 features in a window: R from four 64-wide factors
    (90, 4096, 14336, 32, 1, "bf16"),
    (90, 4096, 4096, 64, 1, "bf16"),  # the largest blocks
    (90, 4096, 4096, 8, 4, "fp16"),  # x in two parts
    (90, 16, 3584, 8, 4, "fp32"),  # true float32: operands in registers
    (90, 4096, 1536, 8, 2, "fp32"),
    (90, 4096, 4096, 8, 4, "fp32"),
    (90, 4096, 4096, 32, 1, "fp32"),
    (90, 65, 104, 4, 2, "bf16"),  # features that no tile divides
    (90, 512, 4096, 2, 6, "bf16"),  # the most factors of one pass
    (90, 4096, 3840, 12, 2, "bf16"),  # 48 features of 64, that do not begin at whole words
    (90, 16, 4096, 8, 5, "bf16"),  # two passes
    (90, 4096, 4096, 8, 5, "bf16"),  # a window of 128 multiplied out
    (90, 4096, 4096, 2, 8, "fp32"),  # features that lie far apart
    (90, 512, 4096, 128, 1, "fp32"),
    # Ampere: mma.sync, operands in registers.
    (80, 1, 4096, 8, 4, "bf16"),
    (80, 4096, 4096, 8, 4, "bf16"),
    (80, 4096, 11008, 32, 1, "fp16"),
    (80, 4096, 4096, 8, 4, "fp16"),
    (80, 4096, 4096, 64, 1, "bf16"),
    (80, 4096, 4096, 8, 4, "fp32"),
    (80, 4096, 3840, 6, 1, "fp16"),
    (80, 16, 3960, 33, 1, "bf16"),
    (80, 4096, 4096, 32, 3, "bf16"),
    (80, 4096, 4096, 2, 8, "bf16"),
    # Ada: the same with 99 KiB.
    (89, 4096, 4096, 8, 4, "fp16"),
    (89, 4096, 4096, 8, 4, "fp32"),
    # Blackwell: tcgen05, sums in tensor memory.
    (100, 16, 4096, 8, 2, "bf16"),
    (100, 4096, 4096, 8, 4, "bf16"),
    (100, 512, 18944, 8, 4, "fp16"),
    (100, 4096, 4096, 8, 4, "fp32"),
    (100, 4096, 4096, 16, 4, "bf16"),
]

KERNELS = {
    "boft": [
        "butterfly_fwd_kernel",
        "butterfly_bwd_kernel",
        "blocks_bwd_kernel",
    ],
    "boft_scale": ["scale_fwd_kernel", "scale_bwd_kernel"],
    "boft_wide": ["wide_fwd_kernel", "wide_bwd_kernel"],
}


def launch(tokens, features, block, factors, dtype):
    x = meta(tokens, features, dtype=DTYPES[dtype])
    blocks = meta(factors, features // block, block, block)
    kernel.butterfly_fwd(x, blocks)
    kernel.butterfly_bwd(x, x, blocks, True, True)
    y, bias, scale = meta(tokens, features, dtype=DTYPES[dtype]), meta(features, dtype=DTYPES[dtype]), meta(features, 1)
    boft_scale.scale_fwd(y, bias, scale, y)
    boft_scale.scale_bwd(y, y, bias, scale)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    capability, *_, dtype = case
    check_records(__file__, case, compiled[case])
    newest = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for record in compiled[case]:
        config = record["config"]
        rotates = record["kernel"].startswith(("butterfly", "wide"))
        if not rotates or config.get("EXACT", dtype == "fp32"):
            assert record["tensor_cores"] == []  # float32, without rounding to tf32
        elif config["BLOCK_T"] >= 64:  # as many rows as the newest take
            assert record["tensor_cores"] == [newest]
        else:
            assert "mma.sync" in record["tensor_cores"]
