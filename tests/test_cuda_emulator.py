"""The CUDA for the CPU that the other tests of CUDA C++ kernels rest on: what it must do, and what it must notice.

tests/cuda_host/faults.cpp has tiny kernels with one planted mistake each. Threads are resumed in ascending order, in
descending order, and twice in a random one.
"""

import subprocess

import pytest
from cuda_build import fixtures, needs_cxx

build, compiled, on_the_cpu = fixtures()
pytestmark = needs_cxx


def run(build, name: str, seed: int) -> list[list[str]]:
    """What the threads of both blocks return."""
    result = subprocess.run([build("faults"), name, str(seed)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    values = result.stdout.split()
    return [values[:64], values[64:]]


def texts(values) -> list[str]:
    return [str(value) for value in values]


@pytest.mark.parametrize("seed", range(4))
def test_correct_kernels(build, seed):
    assert run(build, "none", seed) == [texts(reversed(range(64)))] * 2
    # Threads that have ended need not come to a barrier.
    assert run(build, "early_exit", seed) == [texts(range(32)) + ["-1"] * 32] * 2


@pytest.mark.parametrize("seed", range(4))
def test_shuffles_votes_and_atomics(build, seed):
    across = [i ^ 3 for i in range(64)]
    down = [across[i + 1] if (i + 1) % 32 else across[i] for i in range(64)]
    assert run(build, "shuffle", seed) == [texts(down[i] + across[i // 32 * 32] for i in range(64))] * 2
    assert run(build, "vote", seed) == [texts([0b01010101 + 256] * 32 + [255 + 256 + 512] * 32)] * 2
    assert run(build, "block_vote", seed) == [texts([62] * 63 + [-1])] * 2
    assert run(build, "atomic", seed) == [texts(([2016, 2016, 64, 63, 63] * 13)[:64])] * 2


@pytest.mark.parametrize("seed", range(4))
def test_static_shared_memory_is_a_blocks_own(build, seed):
    written, unwritten = run(build, "static", seed)
    assert written == texts(reversed(range(64))) and all("nan" in value for value in unwritten)


def test_a_missing_barrier(build):
    ascending, descending = (run(build, "missing_barrier", seed) for seed in (0, 1))
    for block, other in zip(ascending, descending, strict=True):
        assert any("nan" in value for value in block) and any("nan" in value for value in other) and block != other


@pytest.mark.parametrize("seed", range(4))
def test_unwritten_shared_memory(build, seed):
    for block in run(build, "unwritten_shared", seed):
        assert ["nan" in value for value in block] == [i == 58 for i in range(64)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "AddressSanitizer: use-after-poison"),
        ("beyond_static", "index 64 out of bounds for type 'float [64]'"),
        ("beyond_global", "AddressSanitizer: heap-buffer-overflow"),
        ("diverging_barriers", "cuda_host: deadlock in block (0, 0, 0)"),
        ("split_barrier", "cuda_host: threads meet at different barriers"),
        ("absent_lane", "cuda_host: a shuffle or a vote asks a thread that is not there"),
        ("absent_voter", "cuda_host: a shuffle or a vote asks a thread that is not there"),
        ("partial_mask", "cuda_host: a shuffle or a vote of a part of a warp"),
    ],
)
def test_what_stops_a_kernel(build, name, message, seed):
    result = subprocess.run([build("faults"), name, str(seed)], capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr
