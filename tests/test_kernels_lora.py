"""The Triton LoRA kernel, checked where there is no GPU.

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
    """y from PyTorch's own operators in the same dtypes; h from float32, which is its dtype."""
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


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("pair", PAIRS)
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
    config |= {"GROUP_T": 8, "EVEN_I": False, "num_warps": warps, "num_stages": stages}
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


def test_a_rank_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^lora_A: rank 2048 does not fit in 101376 bytes"):
        kernel.lora_fwd_config(17, 4096, 4096, 2048, BF16, BF16)


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, T, in, out, r, base dtype, adapter dtype: each another configuration, or another path
# through the compiler. The layers are MiniLM's (384) and Llama-2-7B's (4096, 11008).
CASES = [
    # Hopper, the chip aimed at: every bfloat16 tile that these layers select at T 1, 16, 512, 4096.
    (90, 1, 384, 384, 16, "bf16", "bf16"),  # 16 × 16, mma.sync: few outputs
    (90, 16, 4096, 4096, 16, "bf16", "bf16"),  # 16 × 32
    (90, 1, 4096, 11008, 16, "bf16", "bf16"),  # 16 × 64
    (90, 512, 384, 384, 16, "bf16", "bf16"),  # 32 × 32, still mma.sync: wgmma takes 64 rows
    (90, 512, 384, 1536, 16, "bf16", "bf16"),  # 64 × 64, wgmma
    (90, 4096, 384, 384, 16, "bf16", "bf16"),  # 64 × 128
    (90, 512, 4096, 4096, 16, "bf16", "bf16"),  # 128 × 128
    (90, 4096, 4096, 4096, 16, "bf16", "bf16"),  # 128 × 256, the most shared memory
    (90, 4096, 4096, 4096, 64, "bf16", "bf16"),  # a wider A, and so a narrower tile
    # float32 adapters: three parts of A in the loop. float16 x has parts too.
    (90, 16, 4096, 4096, 16, "bf16", "fp32"),
    (90, 4096, 4096, 4096, 16, "bf16", "fp32"),
    (90, 4096, 4096, 4096, 16, "fp16", "fp32"),
    # IEEE float32: no tensor cores, the operands in registers.
    (90, 1, 4096, 4096, 16, "fp32", "fp32"),
    (90, 512, 384, 384, 16, "fp32", "fp32"),
    (90, 4096, 4096, 11008, 16, "fp32", "fp32"),
    # Sizes that no vector load and no tile divides: masks along in_features, no alignment.
    (90, 65, 37, 97, 3, "bf16", "bf16"),
    # Ampere: mma.sync, operands in registers, 163 KiB. Smallest, largest, split, float32.
    (80, 16, 4096, 4096, 16, "bf16", "bf16"),
    (80, 4096, 4096, 11008, 16, "bf16", "bf16"),
    (80, 4096, 4096, 4096, 16, "bf16", "fp32"),
    (80, 1, 4096, 4096, 16, "fp32", "fp32"),
    (80, 4096, 4096, 4096, 16, "fp32", "fp32"),
    # Ada: the same with 99 KiB, which is also the default.
    (89, 4096, 4096, 4096, 16, "bf16", "fp32"),
    # Blackwell: tcgen05, accumulators in tensor memory; its split takes the most shared memory.
    (100, 16, 4096, 4096, 16, "bf16", "bf16"),
    (100, 4096, 4096, 4096, 16, "bf16", "bf16"),
    (100, 4096, 4096, 4096, 16, "bf16", "fp32"),
    (100, 4096, 4096, 4096, 16, "fp32", "fp32"),
]


KERNELS = {"lora": ["lora_fwd_kernel"]}


def launch(tokens, in_features, out_features, rank, dtype, adapter_dtype):
    base, adapter = DTYPES[dtype], DTYPES[adapter_dtype]
    kernel.lora_fwd(
        meta(tokens, in_features, dtype=base),
        meta(out_features, in_features, dtype=base),
        meta(out_features, dtype=base),
        meta(rank, in_features, dtype=adapter),
        meta(out_features, rank, dtype=adapter),
        0.75,
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    capability, *_, dtype, _ = case
    check_records(__file__, case, compiled[case])
    (record,) = compiled[case]
    if dtype == "fp32":
        assert record["tensor_cores"] == []  # they would round to tf32
    elif record["config"]["BLOCK_T"] < 64 or capability < 90:
        assert record["tensor_cores"] == ["mma.sync"]
    else:
        newest = "wgmma.mma_async" if capability == 90 else "tcgen05.mma"
        assert newest in record["tensor_cores"]
