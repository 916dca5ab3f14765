"""BOFT's blocks as reflections: what they are made from comes back, in every size and however large, and is served."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import IN, randn
from serving_models import make_bank, save
from small_models import ALL_LINEAR, Model
from torch import Tensor

import fastpeft
from fastpeft import reference
from fastpeft.ops.boft import boft_blocks, butterfly
from fastpeft.ops.boft_many import _by_block, boft_reflectors, boft_rotate_many, reflectors_width, strip_features
from fastpeft.ops.many import plan_rows

SIZES = [1, 2, 3, 4, 7, 8, 16, 33]
# (in, b, m): odd blocks, few and many strips, a window over the row, sizes with and without loops of their own.
SHAPES = [
    *((5, 1, 1), (21, 7, 1), (8, 2, 1), (272, 8, 1)),
    *((576, 8, 4), (640, 4, 2), (128, 32, 2), (72, 12, 2), (64, 2, 5)),
]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm())


def trained(layers: int, shape: tuple[int, int, int], scale: float, dtype: torch.dtype = torch.float64) -> Tensor:
    features, b, factors = shape
    generator = torch.Generator().manual_seed(features + b)
    R = scale * torch.randn(layers * factors, features // b, b, b, generator=generator, dtype=torch.float64)
    return R.to(dtype)


def blocks_of(rows: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(layers · m, in / b, b, b), in float64."""
    return reference.boft.reflected_blocks(_by_block(rows.double(), *shape), shape[1]).flatten(0, 1)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("b", SIZES)
def test_blocks_come_back(b: int, scale: float):
    q = reference.boft.boft_blocks(trained(2, (6 * b, b, 1), scale))
    reflectors = reference.boft.reflectors(q)
    assert reflectors.shape == (*q.shape[:2], b * (b + 1) // 2 - 1)
    torch.testing.assert_close(reference.boft.reflected_blocks(reflectors, b), q, rtol=0, atol=1e-12)
    if scale == 0.0:  # what is the identity stays exactly that
        assert torch.equal(reference.boft.reflected_blocks(reflectors, b), q)


@pytest.mark.parametrize("b", [2, 4, 8])
def test_half_turns(b: int):
    """No Cayley transform is one, but what is rounded may be."""
    q = -torch.eye(b, dtype=torch.float64)[None]
    torch.testing.assert_close(reference.boft.reflected_blocks(reference.boft.reflectors(q), b), q, rtol=0, atol=1e-12)
    turned = blocks_of(boft_reflectors(torch.full((1, 1, b, b), 1e7).triu(1), 1), (b, b, 1))
    assert turned.isfinite().all()
    torch.testing.assert_close(turned @ turned.mT, torch.eye(b, dtype=torch.float64)[None, None], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_of_the_arena(shape: tuple[int, int, int], scale: float):
    """Compiled and composed, for several layers at once."""
    R = trained(3, shape, scale, torch.float32)
    exact = boft_blocks(R.double())
    torch.testing.assert_close(blocks_of(boft_reflectors(R.double(), shape[2]), shape), exact, rtol=0, atol=1e-13)
    with fastpeft.use_backend("torch"):
        composed = boft_reflectors(R, shape[2])
    with fastpeft.use_backend("native"):
        found = boft_reflectors(R, shape[2])
    assert found.shape == composed.shape == (3, reflectors_width(*shape)) and found.dtype == torch.float32
    allowed = 2 * max(error(blocks_of(composed, shape), exact), error(boft_blocks(R), exact))
    assert error(blocks_of(found, shape), exact) <= allowed
    assert torch.equal(boft_reflectors(R.mT.contiguous().mT, shape[2]), found)


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_rotation_is_the_butterfly_product(shape: tuple[int, int, int], scale: float):
    """From trained numbers to rotated rows: at most twice the error of PyTorch's operations on blocks."""
    features, b, factors = shape
    R = trained(1, shape, scale, torch.float32)
    x = torch.randn(50, features, generator=torch.Generator().manual_seed(0))
    exact = butterfly(x.double(), boft_blocks(R.double()))
    with fastpeft.use_backend("torch"):
        allowed = 2 * error(butterfly(x, boft_blocks(R)), exact)
    rows, slots = plan_rows(torch.zeros(len(x), dtype=torch.int32), 1)
    table = torch.zeros(1, dtype=torch.int32)
    found = boft_rotate_many(x, boft_reflectors(R, factors), table, factors, b, rows, slots)
    assert error(found, exact) <= allowed


def test_strips():
    assert strip_features(1024, 8, 4) == 64  # a window
    assert strip_features(1024, 4, 2) == 16  # two
    assert strip_features(24, 8, 1) == 8 and strip_features(21, 7, 1) == 7  # 16 features do not fit
    assert strip_features(30, 5, 1) == 10


@pytest.mark.parametrize(
    ("R", "factors", "kind", "words"),
    [
        (torch.zeros(2, 3, 4), 1, ValueError, ["boft_R", "(2, 3, 4)"]),
        (torch.zeros(2, 3, 4, 5), 1, ValueError, ["boft_R", "(2, 3, 4, 5)"]),
        (torch.zeros(2, 3, 4, 4), 0, ValueError, ["factors", "2", "0"]),
        (torch.zeros(3, 4, 4, 4), 2, ValueError, ["factors", "3", "2"]),
        (torch.zeros(2, 3, 4, 4), 2, ValueError, ["boft_R", "(2, 3, 4, 4)", "factors=2", "multiple of 8"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), 1, TypeError, ["boft_R", "int64"]),
        (torch.zeros(1, 3, 4, 4, requires_grad=True), 1, ValueError, ["boft_R", "gradient"]),
    ],
)
def test_wrong_arguments(R: Tensor, factors: int, kind: type[Exception], words: list[str]):
    with pytest.raises(kind) as caught:
        boft_reflectors(R, factors)
    assert all(word in str(caught.value) for word in words), caught.value


def test_blocks_of_one_number(tmp_path: Path):
    """They rotate nothing, and take no memory."""
    config = fastpeft.BOFTConfig(boft_block_size=1, init_weights=False, target_modules=ALL_LINEAR)
    model = Model().requires_grad_(False)
    bank = make_bank(model, {"one": save(tmp_path / "one", config)})
    x = randn(3, IN)
    expected = fastpeft.load_adapter(Model(), tmp_path / "one")(x).detach()
    with torch.no_grad(), bank.route(["one"] * 3):
        torch.testing.assert_close(model(x), expected)
    bank.unload("one")
    assert bank.stats()["bytes"] == 0
