"""The Triton FourierFT kernels, checked where there is no GPU.

Values come from Triton's interpreter, against the formula in float64. What the kernels become on a GPU is compiled,
for chips that need not be here, in processes of their own: one process either interprets or compiles.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
import torch.nn.functional as F
from fastpeft.kernels import device
from fastpeft.kernels import fourierft as kernel
from gpu_compile import check_records, compiled_cases, meta
from helpers import in_turn

import fastpeft
from fastpeft import reference
from fastpeft.ops.fourierft import make_tables

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------

# T, in, out, n
SHAPES = [
    (1, 64, 48, 40),  # decode
    (1, 1, 5, 5),  # one input feature, every place: sizes that Triton makes constants of
    (3, 37, 5, 60),  # primes: no bin in the middle, every mask at once
    (17, 130, 97, 30),  # one token into a second tile; most bins without a sample
    (5, 12, 8, 96),  # every place, and with them the bins that are their own mirror images on both sides
    (4, 30, 2, 60),  # each output bin its own mirror image, and 30 samples in each
    (2, 2, 300, 150),  # the same on the side of x
    (3, 262, 520, 7),  # target bins of three programs, two of them without any sample
]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    """An element that the kernel does not write stays NaN, and no comparison holds."""
    empty = torch.empty

    def nan_filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_complex():
            return tensor.fill_(complex("nan+nanj"))
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", nan_filled)


@pytest.fixture(autouse=True)
def two_processors(monkeypatch):
    """Tiles are as large as on a GPU with many times the tokens: fewer programs to interpret."""
    monkeypatch.setattr(device, "processors_of", lambda _: 2)


def draw(shape, dtype, seed=0, places=None, bias=True):
    """x, weight, bias, spectrum, rows, cols, scaling, grad: the base output and the delta are of one magnitude."""
    tokens, in_features, out_features, n = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64) * scale

    if places is None:
        places = torch.randperm(in_features * out_features, generator=g)[:n]
    return (
        normal(tokens, in_features).to(dtype),
        normal(out_features, in_features, scale=in_features**-0.5).to(dtype),
        normal(out_features).to(dtype) if bias else None,
        normal(n).float(),
        places // in_features,
        places % in_features,
        out_features * max(n, 1) ** -0.5,
        normal(tokens, out_features).to(dtype),
    )


def formula(x, weight, bias, spectrum, rows, cols, scaling, grad, wide):
    """y, dx and dspectrum by PyTorch's own operators, the delta's part in the dtype `wide` and rounded at the end."""
    spectrum = spectrum.detach().to(wide).requires_grad_()
    delta = reference.fourierft.fourier_weight(spectrum, rows, cols, tuple(weight.shape), scaling)
    y = (F.linear(x, weight, bias) + F.linear(x.to(wide), delta.detach())).to(x.dtype)
    dx = (grad @ weight + grad.to(wide) @ delta.detach()).to(x.dtype)
    F.linear(x.to(wide), delta).backward(grad.to(wide))
    return y, dx, spectrum.grad


def exact(x, weight, bias, spectrum, rows, cols, scaling, grad):
    double = [None if t is None else t.double() for t in (x, weight, bias, spectrum)]
    return formula(*double, rows, cols, scaling, grad.double(), torch.float64)


def composed(*inputs):
    return formula(*inputs, FP32)


def launched(x, weight, bias, spectrum, rows, cols, scaling, grad):
    """The same three from the kernels."""
    tables = make_tables(rows, cols, tuple(weight.shape))
    scale = scaling / weight.numel()
    y = kernel.fourier_fwd(x, weight, bias, spectrum, *tables.forward, scale)
    places = (tables.rows, tables.cols, *tables.backward)
    return y, *kernel.fourier_bwd(grad, x, weight, spectrum, *places, scale, True)


def errors(results, inputs):
    """Errors relative to each of the three, in root mean squares: a largest entry is a matter of luck."""
    pairs = zip(results, exact(*inputs), strict=True)
    return [((got.double() - want).norm() / want.norm()).item() if want.numel() else 0.0 for got, want in pairs]


def check(inputs, others=()):
    """At most twice the error of PyTorch's composition, for y, dx and dspectrum.

    The composition's error is the largest over the inputs and over `others`, more of the same shape and dtypes: where
    there are few outputs, its error on one draw is a matter of luck.
    """
    x, weight, spectrum = inputs[0], inputs[1], inputs[3]
    results = launched(*inputs)
    assert [t.dtype for t in results] == [x.dtype, x.dtype, FP32]
    assert [t.shape for t in results] == [(x.shape[0], weight.shape[0]), x.shape, spectrum.shape]
    compositions = [errors(composed(*i), i) for i in (inputs, *others)]
    for name, error, *bounds in zip(("y", "dx", "dspectrum"), errors(results, inputs), *compositions, strict=True):
        # A composition can be exact by luck; float32's own rounding is always allowed.
        assert error <= 2 * max(*bounds, torch.finfo(FP32).eps), name


@pytest.mark.parametrize("shape, dtype", in_turn(SHAPES, DTYPES.values()))
def test_forward_and_backward(dtype, shape):
    draws = [draw(shape, dtype, seed) for seed in range(5)]
    check(draws[0], draws[1:])


@pytest.mark.parametrize("row", [0, 3, 4], ids=["zero", "odd", "middle"])
def test_many_samples_in_one_bin(row):
    # All in one row of 8: in bin 0 and in bin 4 both samples of a place meet, in bin 3 they part.
    check(draw((5, 90, 8, 90), FP32, places=torch.arange(90) + 90 * row))


@pytest.mark.parametrize("col", [0, 3, 4], ids=["zero", "odd", "middle"])
def test_many_samples_from_one_bin(col):
    check(draw((5, 8, 90, 90), FP32, places=8 * torch.arange(90) + col))


def test_a_hundred_thousand_entries(monkeypatch):
    # Larger tiles than a GPU's: fewer programs to interpret.
    fwd_tile = {"BLOCK_T": 1, "BLOCK_K": 256, "BLOCK_S": 32}
    bwd_tile = {"group_tokens": 1, "BLOCK_T": 1, "BLOCK_N": 8192}
    monkeypatch.setattr(kernel, "mix_fwd_config", lambda *_: fwd_tile)
    monkeypatch.setattr(kernel, "mix_bwd_config", lambda *_: bwd_tile)
    check(draw((1, 390, 400, 100_000), FP32))


def test_no_bias():
    check(draw((3, 37, 5, 60), BF16, bias=False))


def test_without_a_base():
    x, weight, _, spectrum, rows, cols, scaling, grad = draw((5, 37, 20, 60), BF16)
    tables, scale = make_tables(rows, cols, (20, 37)), scaling / weight.numel()
    places = (tables.rows, tables.cols, *tables.backward)
    y = kernel.fourier_fwd(x, None, None, spectrum, *tables.forward, scale)
    dx, _ = kernel.fourier_bwd(grad, None, None, spectrum, *places, scale, True)
    with_base = launched(x, torch.zeros_like(weight), None, spectrum, rows, cols, scaling, grad)
    assert torch.equal(y, with_base[0]) and torch.equal(dx, with_base[1])


def test_gradients_that_are_not_wanted():
    x, weight, _, spectrum, rows, cols, scaling, grad = draw((5, 37, 20, 60), FP32)
    tables, scale = make_tables(rows, cols, (20, 37)), scaling / weight.numel()
    places = (tables.rows, tables.cols, *tables.backward)
    dx, dspectrum = kernel.fourier_bwd(grad, x, weight, spectrum, *places, scale, True)
    only_x = kernel.fourier_bwd(grad, None, weight, spectrum, *places, scale, True)
    only_spectrum = kernel.fourier_bwd(grad, x, None, spectrum, *places, scale, False)
    assert torch.equal(only_x[0], dx) and only_x[1].shape == (0,)
    assert only_spectrum[0].shape == (0, 37) and torch.equal(only_spectrum[1], dspectrum)


def within_nan(tensor):
    """The same values inside a larger tensor of NaN: odd strides, and a poisoned neighbourhood."""
    larger = torch.full([size + 4 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    return larger[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)


LAYOUTS = {
    "slice": within_nan,
    "rows": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "transposed": lambda t: t.t().contiguous().t(),
    "columns": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    inputs = draw((9, 37, 20, 60), BF16)
    moved = [LAYOUTS[layout](i) if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in inputs]
    check(moved)
    # Strides of the kernel's own argument change no bit; those of x, grad and weight are the library's.
    assert all(map(torch.equal, launched(*inputs[:3], moved[3], *inputs[4:]), launched(*inputs)))


def test_broadcast_x_and_grad():
    x, *rest, grad = draw((1, 37, 48, 60), FP32)
    check((x.expand(17, 37), *rest, grad.expand(17, 48)))


@pytest.mark.parametrize("processors", [1, 40])
def test_tiles_change_no_forward_bit(processors, monkeypatch):
    inputs = draw((11, 30, 18, 50), FP32)
    y, dx, _ = launched(*inputs)
    monkeypatch.setattr(device, "processors_of", lambda _: processors)
    found = launched(*inputs)
    assert torch.equal(found[0], y) and torch.equal(found[1], dx)
    check(inputs)


def test_one_token_does_not_reach_another():
    x, *rest, grad = draw((17, 37, 48, 60), FP32)
    expected = launched(x, *rest, grad)
    x[5], grad[5] = float("nan"), float("inf")
    found = launched(x, *rest, grad)
    others = torch.arange(17) != 5
    assert torch.equal(found[0][others], expected[0][others]) and torch.equal(found[1][others], expected[1][others])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_fresh_adapter_gives_the_base(dtype):
    x, weight, bias, spectrum, *rest, grad = draw((17, 37, 48, 60), dtype)
    y, dx, _ = launched(x, weight, bias, torch.zeros_like(spectrum), *rest, grad)
    assert torch.equal(y, F.linear(x, weight, bias)) and torch.equal(dx, grad @ weight)


@pytest.mark.parametrize("shape", [(0, 37, 48, 60), (3, 37, 48, 0), (0, 37, 48, 0)], ids=str)
def test_nothing_to_do_no_launch(shape, monkeypatch):
    monkeypatch.setattr(kernel, "mix_fwd_kernel", None)
    monkeypatch.setattr(kernel, "mix_bwd_kernel", None)
    x, weight, bias, *rest, grad = draw(shape, BF16)
    y, dx, dspectrum = launched(x, weight, bias, *rest, grad)
    assert torch.equal(y, F.linear(x, weight, bias)) and torch.equal(dx, grad @ weight)
    assert torch.equal(dspectrum, torch.zeros(shape[3]))


@pytest.mark.parametrize("argument", ["x", "weight", "bias", "spectrum"])
def test_unsupported_dtype_names_the_argument(argument):
    names = ("x", "weight", "bias", "spectrum")
    *tensors, rows, cols, scaling, grad = draw((3, 37, 5, 3), FP32)
    inputs = dict(zip(names, tensors, strict=True))
    inputs[argument] = inputs[argument].double()
    with pytest.raises(TypeError, match=f"^{argument} must be .* got torch.float64"):
        launched(*inputs.values(), rows, cols, scaling, grad)


# ------------------------------------------------------------------------------------------------
# The operators and the layer
# ------------------------------------------------------------------------------------------------


def test_opcheck():
    x, weight, bias, spectrum, rows, cols, scaling, grad = draw((3, 12, 7, 20), FP32)
    tables, scale = make_tables(rows, cols, (7, 12)), scaling / weight.numel()
    places = (tables.rows, tables.cols, *tables.backward)
    operators = torch.ops.fastpeft_triton
    torch.library.opcheck(operators.fourier_fwd, (x, weight, bias, spectrum, *tables.forward, scale))
    torch.library.opcheck(operators.fourier_bwd, (grad, x, weight, spectrum, *places, scale, True))
    torch.library.opcheck(operators.fourier_bwd, (grad, x, None, spectrum, *places, scale, False))


def make_layer(dtype):
    linear = torch.nn.Linear(24, 17).to(dtype)
    config = fastpeft.FourierFTConfig(n_frequency=50, scaling=20.0, init_weights=False, target_modules="all-linear")
    return fastpeft.nn.FourierFTLinear.from_linear(linear, config)


@pytest.mark.parametrize("tokens", [(), (0,), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_layer(dtype, tokens):
    torch.manual_seed(0)
    layer = make_layer(dtype)
    x, grad = torch.randn(*tokens, 24, dtype=dtype), torch.randn(*tokens, 17, dtype=dtype)
    results = []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with fastpeft.use_backend(backend):
            y = layer(leaf)
            with torch.no_grad():
                assert torch.equal(layer(x), y)
            results.append((y, *torch.autograd.grad(y, [leaf, *fastpeft.adapter_parameters(layer)], grad)))
    for found, same in zip(*results, strict=True):
        torch.testing.assert_close(found, same)


def test_layer_in_float64_is_refused():
    with fastpeft.use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' was asked for.*float64"):
        make_layer(torch.float64)(torch.randn(3, 24, dtype=torch.float64))


# ------------------------------------------------------------------------------------------------
# Configurations
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 384, 4096, 18944])
@pytest.mark.parametrize("n", [1, 1000, 100_000])
@pytest.mark.parametrize("tokens", [1, 16, 4096, 1 << 20])
def test_configurations_are_bounded(tokens, n, length):
    config = kernel.mix_fwd_config(tokens, n, length, 132)
    assert config["BLOCK_K"] * config["BLOCK_S"] == 128 and config["BLOCK_T"] in (1, 2, 4, 8)
    config = kernel.mix_bwd_config(tokens, n, 132)
    groups = -(-tokens // config["group_tokens"])
    assert groups * config["group_tokens"] >= tokens  # every token is in a group
    assert groups * n * 4 <= 300 * 1024 + 4 * n  # what the partial sums take


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, T, in, out, n, dtype. The layers are MiniLM's (384), Llama-2-7B's (11008), Llama-3-8B's (14336) and
# Qwen2.5-7B's (18944). The kernels see complex64 whatever the dtype of x is.
CASES = [
    (90, 1, 384, 1536, 1000, "bf16"),  # decode: one token in a tile
    (90, 16, 384, 1536, 1000, "bf16"),
    (90, 512, 1536, 384, 1000, "bf16"),  # five samples in a bin: four at a time
    (90, 4096, 384, 1536, 1000, "fp32"),
    (90, 1, 4096, 11008, 1000, "bf16"),
    (90, 16, 4096, 11008, 1000, "bf16"),
    (90, 512, 11008, 4096, 1000, "fp16"),
    (90, 4096, 4096, 11008, 1000, "bf16"),  # eight tokens in a tile
    (90, 4096, 3584, 18944, 1000, "bf16"),
    (90, 512, 4096, 4096, 100_000, "bf16"),  # 32 samples at a time, the most registers
    (90, 65, 37, 97, 300, "fp32"),  # sizes that no tile divides
    (80, 1, 4096, 14336, 1000, "bf16"),
    (80, 4096, 4096, 14336, 1000, "bf16"),
    (80, 512, 1536, 384, 1000, "bf16"),
    (100, 16, 3584, 18944, 1000, "bf16"),
    (100, 4096, 3584, 18944, 1000, "bf16"),
]


KERNELS = {"fourierft": ["mix_fwd_kernel", "mix_bwd_kernel"]}


def launch(tokens, in_features, out_features, n, dtype):
    """The forward, and the backward with both gradients, between the library's transforms."""
    kernel.dft_pays = lambda *_, **__: False  # in a process of its own
    x, grad = (meta(tokens, size, dtype=DTYPES[dtype]) for size in (in_features, out_features))
    weight, spectrum = meta(out_features, in_features, dtype=DTYPES[dtype]), meta(n)
    rows, samples = meta(n, dtype=torch.int32), meta(2 * n, dtype=torch.int32)
    forward, backward = (meta(size + 1, dtype=torch.int32) for size in (out_features, in_features))
    kernel.fourier_fwd(x, weight, None, spectrum, forward, samples, samples, 1e-5)
    kernel.fourier_bwd(grad, x, weight, spectrum, rows, rows, backward, samples, samples, 1e-5, True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    check_records(__file__, case, compiled[case])
    assert [record["kernel"] for record in compiled[case]] == ["mix_fwd_kernel", "mix_fwd_kernel", "mix_bwd_kernel"]
