"""The fast forms against the reference: values, gradients, every dtype, awkward shapes and strides, every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastpeft
from fastpeft import backend, functional, reference
from fastpeft.backend import OPERATORS
from fastpeft.ops import boft, fourierft

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def poison_unwritten_memory():
    """torch.empty gives NaN, so an element that nobody writes shows. Compiled operators allocate through it too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass
class Case:
    """A method at one size: its fast function, its formula, and how to draw what goes in besides x, weight and bias."""

    name: str
    fast: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    sizes: tuple[int, int]  # in, out
    draw: Callable[[torch.Generator], tuple]  # float64 tensors to differentiate first, then the fixed arguments

    def __str__(self) -> str:
        return f"{self.name}-{self.sizes[0]}x{self.sizes[1]}"


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def lora_case(d_in: int, d_out: int, r: int) -> Case:
    def draw(g):
        return (randn(g, r, d_in) / d_in**0.5, randn(g, d_out, r)), (0.7,)

    return Case(f"lora-r{r}", functional.lora_linear, reference.lora.lora_linear, (d_in, d_out), draw)


def dora_case(d_in: int, d_out: int, r: int) -> Case:
    def draw(g):
        return (randn(g, r, d_in) / d_in**0.5, randn(g, d_out, r), 1 + 0.3 * randn(g, d_out)), (0.7,)

    return Case(f"dora-r{r}", functional.dora_linear, reference.dora.dora_linear, (d_in, d_out), draw)


def mos_case(d_in: int, d_out: int, r: int, shards: int, n_shards: int) -> Case:
    def draw(g):
        index_A, index_B = (torch.randint(n_shards, (r, shards), generator=g) for _ in range(2))
        return (
            randn(g, n_shards, d_in // shards) / d_in**0.5,
            randn(g, n_shards, d_out // shards),
        ), (index_A, index_B, 0.7)

    def reorder(function):
        return lambda x, w, b, pool_A, pool_B, index_A, index_B, s: function(
            x, w, b, pool_A, index_A, pool_B, index_B, s
        )

    fast, formula = reorder(functional.mos_linear), reorder(reference.mos.mos_linear)
    return Case(f"mos-r{r}l{shards}", fast, formula, (d_in, d_out), draw)


def boft_case(d_in: int, d_out: int, block: int, factors: int) -> Case:
    def draw(g):
        return (randn(g, factors, d_in // block, block, block), 1 + 0.3 * randn(g, d_out, 1)), ()

    return Case(f"boft-b{block}m{factors}", functional.boft_linear, reference.boft.boft_linear, (d_in, d_out), draw)


def oft_case(d_in: int, d_out: int, block: int, rows: int, **options: float) -> Case:
    def draw(g):
        spread = 0.5 / block**0.5  # S of about the same norm for all sizes
        return (spread * randn(g, rows, block * (block - 1) // 2),), ()

    fast, formula = (
        partial(function, block_size=block, **options) for function in (functional.oft_linear, reference.oft.oft_linear)
    )
    name = "-".join(["oft", f"b{block}", f"rows{rows}", *(f"{key}={value}" for key, value in options.items())])
    return Case(name, fast, formula, (d_in, d_out), draw)


def fourier_case(d_in: int, d_out: int, n: int) -> Case:
    def draw(g):
        places = torch.randperm(d_in * d_out, generator=g)[:n]
        return (randn(g, n),), (places // d_in, places % d_in, float(d_in * d_out) ** 0.5)

    name = f"fourierft-n{n}"
    return Case(name, functional.fourier_linear, reference.fourierft.fourier_linear, (d_in, d_out), draw)


CASES = [
    lora_case(16, 16, 4),
    lora_case(37, 11, 3),  # primes, wider than tall
    lora_case(1, 130, 1),  # one input feature
    dora_case(16, 16, 4),
    dora_case(37, 11, 3),  # primes
    dora_case(8, 130, 1),
    mos_case(16, 24, 3, 4, 20),
    mos_case(35, 21, 2, 7, 9),  # odd shards, shards drawn twice
    mos_case(6, 5, 4, 1, 4),  # one shard a vector: plain LoRA
    boft_case(24, 10, 2, 3),  # smallest block, three factors
    boft_case(48, 17, 8, 2),
    boft_case(64, 64, 16, 1),
    boft_case(64, 9, 32, 2),  # one window over the whole row
    boft_case(35, 8, 5, 1),  # odd block: no half-blocks, one factor
    boft_case(24, 5, 6, 3),  # even block without a specialisation
    boft_case(320, 16, 4, 5),  # window of 64 in a row that one cache range cannot hold
    oft_case(24, 10, 4, 6),  # exact
    oft_case(24, 10, 4, 6, neumann_terms=5),
    oft_case(24, 10, 4, 1, neumann_terms=5),  # all places share one block
    oft_case(64, 17, 32, 2, neumann_terms=3),  # the default size; the shortest series with a square
    oft_case(35, 8, 5, 7, neumann_terms=6),  # odd blocks, a last power of 5
    oft_case(35, 8, 5, 1, neumann_terms=2),
    oft_case(24, 9, 6, 4, neumann_terms=9),
    oft_case(140, 11, 70, 2),  # beyond the compiled Cayley transform
    oft_case(160, 5, 160, 1, neumann_terms=5),  # one dense rotation
    oft_case(13, 7, 13, 1, neumann_terms=8),
    fourier_case(16, 24, 40),
    fourier_case(17, 13, 60),  # primes
    fourier_case(12, 7, 84),  # every place taken, both own mirror images
    fourier_case(1, 9, 5),  # one column
    fourier_case(30, 2, 11),
    fourier_case(262, 148, 200),  # 2 · 131, a convolution, and 4 · 37, an odd radix
    fourier_case(45, 98, 100),  # 3 · 3 · 5 and 2 · 7 · 7
]


def inputs(case: Case, dtype: torch.dtype, tokens: tuple[int, ...] = (19,), seed: int = 0):
    """x, weight, bias and the adapter's tensors as float64 numbers that the dtype can hold, and the fixed arguments."""
    g = torch.Generator().manual_seed(seed)
    d_in, d_out = case.sizes
    trained, fixed = case.draw(g)
    base = (randn(g, *tokens, d_in), randn(g, d_out, d_in) / d_in**0.5, randn(g, d_out))
    hold = [tensor.to(dtype).double() for tensor in (*base, *trained)]
    return hold, fixed, randn(g, *tokens, d_out).to(dtype).double()


def run(function, tensors, fixed, grad):
    """Output and gradients of x and of the adapter's tensors."""
    x, weight, bias, *trained = tensors
    wanted = [x.detach().requires_grad_(), *(t.detach().requires_grad_() for t in trained)]
    y = function(wanted[0], weight, bias, *wanted[1:], *fixed)
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def size(tensor: Tensor) -> float:
    """Root mean square: steadier than the largest entry, of which a small tensor has few to choose from."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def error(found: Tensor, exact: Tensor) -> float:
    return size(found.double() - exact)


def pooled(function, case: Case, tokens: tuple[int, ...], cast, seeds: int = 4) -> list[Tensor]:
    """Output and gradients for several draws: a small result alone can be right to the last bit by luck."""
    results = []
    for seed in range(seeds):
        tensors, fixed, grad = inputs(case, cast.held_in, tokens, seed)
        *tensors, grad = cast(*tensors, grad)
        results.append(run(function, tensors, fixed, grad))
    return [torch.stack(same) for same in zip(*results, strict=True)]


class To:
    """Casts everything that goes into a run. held_in: the dtype whose numbers the inputs are."""

    def __init__(self, dtype: torch.dtype, held_in: torch.dtype, adapter_dtype: torch.dtype | None = None) -> None:
        self.dtype, self.held_in, self.adapter_dtype = dtype, held_in, adapter_dtype or dtype

    def __call__(self, x, weight, bias, *rest):
        *trained, grad = rest
        return (
            *(t.to(self.dtype) for t in (x, weight, bias)),
            *(t.to(self.adapter_dtype) for t in trained),
            grad.to(self.dtype),
        )


def inverse_by_matrices(spectrum: Tensor) -> Tensor:
    """torch.fft.ifft2 without a fast transform: a few units of rounding at any length."""
    left, right = (
        torch.exp(2j * torch.pi / n * (torch.arange(n) * torch.arange(n)[:, None] % n).to(torch.complex128))
        for n in spectrum.shape
    )
    return left @ spectrum.to(left.dtype) @ right / spectrum.numel()


def check_against_formula(
    case: Case, dtype: torch.dtype, tokens: tuple[int, ...] = (19,), adapter_dtype: torch.dtype | None = None
) -> None:
    # In 16 bits the formula cannot be composed (solve and FFT need 32). Composed in float32 from the same numbers and
    # rounded once, it errs less than any 16-bit composition, so this is the stricter bound.
    held_in = torch.float32 if dtype == torch.float64 else dtype
    with mock.patch.object(torch.fft, "ifft2", inverse_by_matrices):
        exact = pooled(case.formula, case, tokens, To(torch.float64, held_in))
    wide = pooled(case.formula, case, tokens, To(torch.float64, held_in))
    plain = pooled(case.formula, case, tokens, To(torch.float32, held_in))
    found = pooled(case.fast, case, tokens, To(dtype, held_in, adapter_dtype))
    wanted = [dtype, dtype, *([adapter_dtype or dtype] * len(found[2:]))]
    for name, f, p, w, e, want in zip(("y", "dx", "d1", "d2", "d3"), found, plain, wide, exact, wanted, strict=False):
        assert f.shape == e.shape and f.dtype == want, name
        rounded = p if dtype == torch.float64 else p.to(want)
        allowed = 2 * max(error(rounded, e), torch.finfo(rounded.dtype).eps * size(e))
        if dtype == torch.float64:
            # There is nothing more exact to hold float64 against: float32's bound, scaled by their rounding errors. But
            # for transforms: a library may take another way in float64, which loses more digits at some lengths.
            allowed *= torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            allowed = max(allowed, 2 * error(w, e))
        if want == torch.float32 and dtype != torch.float32:
            # What reaches a float32 gradient has passed through 16-bit activations once.
            allowed = max(allowed, 2 * torch.finfo(dtype).eps * size(e))
        assert error(f, e) <= allowed, f"{name}: error {error(f, e):.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_match_the_formula(case: Case, dtype: torch.dtype):
    check_against_formula(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_adapters_over_a_16_bit_base(case: Case, dtype: torch.dtype):
    check_against_formula(case, dtype, adapter_dtype=torch.float32)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_composition_where_a_kernel_runs_by_default(case: Case):
    with fastpeft.use_backend("torch"):
        check_against_formula(case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if not case.name.startswith("dora")],  # whose norms are constants: see test_dora.py
    ids=str,
)
def test_gradcheck(case: Case):
    tensors, fixed, _ = inputs(case, torch.float64, tokens=(3,))
    x, weight, bias, *trained = tensors
    wanted = [x.requires_grad_(), *(t.requires_grad_() for t in trained)]
    assert torch.autograd.gradcheck(lambda x, *a: case.fast(x, weight, bias, *a, *fixed), wanted, fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_base_gradients_where_they_are_wanted(case: Case):
    """weight and bias are frozen in use, but asking for their gradients must not be answered with silence."""
    tensors, fixed, grad = inputs(case, torch.float64, tokens=(4,))
    results = []
    for function in (case.fast, case.formula):
        leaves = [t.detach().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(function(*leaves, *fixed), leaves, grad))
    for found, exact in zip(*results, strict=True):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize(
    "tokens",
    [
        (),  # a vector
        (0,),  # no rows
        (1,),
        (2, 0, 3),  # no rows among leading sizes
        (2, 3, 5),
        (33,),  # two whole chunks of the butterfly's loops and one token
    ],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_leading_shapes(case: Case, tokens: tuple[int, ...]):
    check_against_formula(case, torch.float32, tokens)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows_in_the_composition(case: Case):
    check_against_formula(case, torch.float64, (0,))


def strided(tensor: Tensor, how: str) -> Tensor:
    """The same numbers in other places."""
    if how == "slice":  # columns of a wider tensor
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if how == "transposed":
        return tensor.mT.contiguous().mT
    if how == "every other row":
        return torch.stack([tensor, torch.full_like(tensor, float("nan"))], dim=1).flatten(0, 1)[::2]
    raise AssertionError(how)


@pytest.mark.parametrize("how", ["slice", "transposed", "every other row"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strides(case: Case, how: str):
    tensors, fixed, grad = inputs(case, torch.float32)
    tensors, grad = [t.float() for t in tensors], grad.float()
    expected = run(case.fast, tensors, fixed, grad)
    moved = [t if t.dim() != 2 else strided(t, how) for t in tensors]
    for found, same in zip(run(case.fast, moved, fixed, strided(grad, how)), expected, strict=True):
        torch.testing.assert_close(found, same)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_broadcast_input(case: Case):
    tensors, fixed, _ = inputs(case, torch.float32, tokens=(1,))
    x, *rest = [t.float() for t in tensors]
    y = case.fast(x.expand(5, -1), *rest, *fixed)
    torch.testing.assert_close(y, case.fast(x, *rest, *fixed).expand(5, -1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients_the_same_numbers(case: Case):
    tensors, fixed, _ = inputs(case, torch.float32)
    low = [t.float() for t in tensors]
    with torch.no_grad():
        plain = case.fast(*low, *fixed)
    leaves = [low[0].requires_grad_(), low[1], low[2], *(t.requires_grad_() for t in low[3:])]
    assert torch.equal(plain, case.fast(*leaves, *fixed))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_backend_is_the_formula(case: Case):
    tensors, fixed, grad = inputs(case, torch.float64)
    with fastpeft.use_backend("reference"):
        found = run(case.fast, tensors, fixed, grad)
    for f, e in zip(found, run(case.formula, tensors, fixed, grad), strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_derivatives_are_right_or_refused(case: Case):
    """Better than a silent wrong answer: our own derivatives hold once, the reference any number of times."""
    tensors, fixed, _ = inputs(case, torch.float64, tokens=(2,))
    x, weight, bias, *trained = tensors
    leaves = [t.requires_grad_() for t in trained]

    def second() -> Tensor:
        y = case.fast(x, weight, bias, *leaves, *fixed)
        (first,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        first.square().sum().backward()
        return leaves[0].grad

    with fastpeft.use_backend("reference"):
        exact = second()
    leaves[0].grad = None
    assert exact.abs().max() > 0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second()


@pytest.mark.parametrize("sizes", [(16, 24), (17, 13), (1, 9), (30, 2), (1, 1)], ids=str)
def test_fourier_weight(sizes: tuple[int, int]):
    g = torch.Generator().manual_seed(1)
    d_out, d_in = sizes
    for n in {1, d_out * d_in // 2 or 1, d_out * d_in}:
        places = torch.randperm(d_out * d_in, generator=g)[:n]
        arguments = (places // d_in, places % d_in, sizes, 3.0)
        spectrum = randn(g, n).requires_grad_()
        dense = functional.fourier_weight(spectrum, *arguments)
        torch.testing.assert_close(dense, reference.fourierft.fourier_weight(spectrum, *arguments))
        weight = partial(functional.fourier_weight, rows=arguments[0], cols=arguments[1], shape=sizes, scaling=3.0)
        assert torch.autograd.gradcheck(weight, spectrum, fast_mode=True)


def test_cayley_is_orthogonal_for_large_matrices_too():
    g = torch.Generator().manual_seed(0)
    skew = 100 * torch.randn(7, 8, 8, generator=g)
    skew = skew - skew.mT
    q = functional.cayley(skew)
    exact = reference.boft.cayley(skew.double())
    assert error(q, exact) <= 2 * max(error(reference.boft.cayley(skew), exact), 1.2e-7)
    torch.testing.assert_close(q @ q.mT, torch.eye(8).expand(7, 8, 8), atol=1e-5, rtol=0)


def test_lora_triton_opcheck_and_gradients():
    case = CASES[1]
    tensors, fixed, _ = inputs(case, torch.float32)
    torch.library.opcheck(torch.ops.fastpeft_triton.lora_fwd, (*(t.float() for t in tensors), *fixed))
    with fastpeft.use_backend("triton"):
        found = run(case.fast, *_float_run(case))
    for f, e in zip(found, run(case.fast, *_float_run(case)), strict=True):
        torch.testing.assert_close(f, e)


def _float_run(case: Case):
    tensors, fixed, grad = inputs(case, torch.float32)
    return [t.float() for t in tensors], fixed, grad.float()


def test_operators_are_declared_once_with_fakes():
    for name, operator in OPERATORS.items():
        assert operator.schema.startswith(name)
        for lane, library in (("native", "fastpeft"), ("triton", "fastpeft_triton")):
            assert hasattr(getattr(torch.ops, library), name) == (lane in operator.order)


# ---------------------------------------------------------------------- what CUDA kernels have room for


def test_a_shape_that_does_not_fit_goes_to_the_composition(monkeypatch):
    """On a GPU, and not where the kernel was asked for."""
    monkeypatch.setattr(fastpeft.backend, "_shared_memory", lambda device: 1000)
    x = mock.Mock(is_cuda=True)
    for needed, chosen in ((1000, "native"), (1001, "torch")):
        fits = needed.__le__
        assert fastpeft.backend.where_it_fits("native", x, fits) == chosen
        assert fastpeft.backend.where_it_fits("triton", x, fits) == "triton"
        assert fastpeft.backend.where_it_fits("native", torch.empty(1), fits) == "native"
        with fastpeft.use_backend("native"):
            assert fastpeft.backend.where_it_fits("native", x, fits) == "native"


class OnAGpu:
    is_cuda = True


def test_triton_only_where_it_pays(monkeypatch):
    pays, never = (lambda: True), (lambda: False)
    gpu, cpu = OnAGpu(), torch.empty(1)
    monkeypatch.setattr(backend, "triton_available", lambda: True)
    assert backend.where_it_pays("native", gpu, pays) == "triton"
    assert backend.where_it_pays("native", gpu, never) == "native"
    assert backend.where_it_pays("torch", gpu, pays) == "torch"
    assert backend.where_it_pays("native", cpu, pays) == "native"
    with fastpeft.use_backend("native"):
        assert backend.where_it_pays("native", gpu, pays) == "native"
    monkeypatch.setattr(backend, "triton_available", lambda: False)
    assert backend.where_it_pays("native", gpu, pays) == "native"


@pytest.mark.parametrize("block, factors, tokens, dtype, pays", [
    (8, 4, 4096, torch.bfloat16, True),
    (8, 4, 16, torch.bfloat16, False),  # decoding: nothing but launches counts
    (8, 4, 4096, torch.float32, False),  # no tensor cores
    (4, 2, 4096, torch.bfloat16, False),  # little to multiply
    (16, 4, 4096, torch.float16, False),  # a window of 128
])  # fmt: skip
def test_where_triton_pays_for_boft(block: int, factors: int, tokens: int, dtype: torch.dtype, pays: bool):
    x = torch.empty(tokens, 4096, dtype=dtype, device="meta")
    assert boft._triton_pays(x, torch.empty(factors, 4096 // block, block, block, device="meta")) is pays


@pytest.mark.parametrize("features, tokens, backward, pays", [
    (2048, 4096, False, True),
    (2048, 4096, True, True),
    (4096, 4096, False, True),
    (4096, 4096, True, False),
    (8192, 4096, False, False),
    (2048, 8, False, False),
])  # fmt: skip
def test_where_triton_pays_for_fourierft(features: int, tokens: int, backward: bool, pays: bool):
    pytest.importorskip("triton")
    x = torch.empty(tokens, features, dtype=torch.bfloat16, device="meta")
    assert fourierft._triton_pays(x, (features, features), 1000, backward) is pays
