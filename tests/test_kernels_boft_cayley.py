"""BOFT's Cayley transform in Triton, checked where there is no GPU: values under the interpreter against float64, and
what is compiled, as in test_kernels_boft.py.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from fastpeft.kernels import boft_cayley as kernel
from gpu_compile import check_records, compiled_cases, meta
from test_kernels_boft import errors, within_nan
from test_kernels_boft import unwritten_memory_is_nan as unwritten_memory_is_nan  # a fixture of every test here

from fastpeft import reference
from fastpeft.ops import boft as ops

# ------------------------------------------------------------------------------------------------
# Values, under the interpreter
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize("block", [2, 3, 4, 6, 8, 11, 16, 24, 32, 33, 50, 63, 64, 72])
def test_cayley(block, scale):
    # Far from zero its rows grow on the way. Seven blocks of up to 8 do not fill whole tiles.
    generator = torch.Generator().manual_seed(block)
    boft_R = torch.randn(1, 7, block, block, generator=generator) * scale
    grad = torch.randn(1, 7, block, block, generator=generator)
    wide = boft_R.double().requires_grad_()
    q = reference.boft.boft_blocks(wide)
    (dR,) = torch.autograd.grad(q, wide, grad.double())
    skew = (boft_R - boft_R.mT) / 2
    solved = [ops.cayley(skew), _composed_gradient(grad, q.detach().float())]
    found = [kernel.cayley_fwd(boft_R), kernel.cayley_bwd(grad, q.detach().float())]
    for error, bound in zip(errors(found, (q.detach(), dR)), errors(solved, (q.detach(), dR)), strict=True):
        assert error <= 2 * max(bound, 2**-25)


def _composed_gradient(grad, q):
    twice = (q + torch.eye(q.shape[-1])).mT
    dskew = twice @ grad @ twice * -0.5
    return (dskew - dskew.mT) / 2


def test_cayley_of_single_numbers():
    boft_R = torch.randn(2, 21, 1, 1)
    assert torch.equal(kernel.cayley_fwd(boft_R), torch.ones(2, 21, 1, 1))
    assert not kernel.cayley_bwd(boft_R, torch.ones(2, 21, 1, 1)).any()


def test_cayley_takes_any_strides():
    boft_R, grad = torch.randn(2, 2, 3, 8, 8)
    q = kernel.cayley_fwd(boft_R)
    assert torch.equal(kernel.cayley_fwd(boft_R.mT.contiguous().mT), q)
    assert torch.equal(kernel.cayley_bwd(within_nan(grad), within_nan(q)), kernel.cayley_bwd(grad, q))


@pytest.mark.parametrize("argument", ["grad", "blocks"])
def test_other_dtypes_name_the_argument(argument):
    inputs = {name: torch.zeros(1, 3, 8, 8) for name in ("grad", "blocks")}
    inputs[argument] = inputs[argument].bfloat16()
    with pytest.raises(TypeError, match=f"^{argument} must be float32, got torch.bfloat16"):
        kernel.cayley_bwd(**inputs)


def test_opcheck():
    library, blocks = torch.ops.fastpeft_triton, torch.randn(2, 6, 4, 4)
    torch.library.opcheck(library.cayley_fwd, (blocks,))
    torch.library.opcheck(library.cayley_bwd, (blocks, blocks))


# ------------------------------------------------------------------------------------------------
# Compilation, for chips that are not here
# ------------------------------------------------------------------------------------------------

# capability, b, number of blocks
CASES = [
    (90, 4, 2048),  # four blocks in a tile
    (90, 8, 2048),
    (90, 32, 448),
    (90, 63, 64),  # the most registers
    (90, 64, 64),
    (80, 4, 2048),
    (80, 8, 2048),
    (80, 33, 120),
    (80, 64, 64),
    (89, 8, 2048),
    (100, 4, 2048),
    (100, 8, 2048),
    (100, 16, 1024),
    (100, 63, 64),
]
KERNELS = {"boft_cayley": ["cayley_fwd_kernel", "cayley_bwd_kernel"]}


def launch(block, count):
    blocks = meta(1, count, block, block)
    kernel.cayley_fwd(blocks)
    kernel.cayley_bwd(blocks, blocks)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiled_cases(__file__, CASES, tmp_path_factory.mktemp("triton"))


@pytest.mark.builds
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_compiles(case, compiled):
    check_records(__file__, case, compiled[case])
    assert all(record["tensor_cores"] == [] for record in compiled[case])  # true float32
