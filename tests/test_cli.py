"""What the installation says about itself, and how a backend or an instruction set is forced."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import Method, adapted, check, every_method, randn

import fastpeft
from fastpeft import backend, functional
from fastpeft.backend import BACKENDS, OPERATORS


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Python in a process of its own, without what the tests' own process was told."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("FASTPEFT_", "TRITON_"))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=False)


def run_doctor(**environment: str) -> str:
    result = run_python("-m", "fastpeft", "doctor", **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# doctor and backends()


def test_doctor():
    said = run_doctor()
    lines = said.splitlines()
    assert f"fastpeft {fastpeft.__version__}" in lines[0]
    assert f"torch {torch.__version__}" in lines[0]
    assert f"extension fastpeft._C: {backend.extension_status}" in said
    if backend.extension is not None:
        assert f"instruction sets compiled: {', '.join(backend.extension.compiled_isas)}" in said
        assert f"instruction set in use: {backend.extension.isa}" in said
        assert "CUDA C++ kernels: " in said
    assert "GPUs: " in said
    for name in OPERATORS:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name} (cpu): "))
        assert lines[at].endswith(" is chosen")
        assert [line.split(":")[0].strip() for line in lines[at + 1 : at + 1 + len(BACKENDS)]] == list(BACKENDS)


def test_an_unknown_command():
    result = run_python("-m", "fastpeft", "nurse")
    assert result.returncode != 0
    assert "'nurse'" in result.stderr
    assert "doctor" in result.stderr


def test_backends():
    table = fastpeft.backends()
    assert {name.split(" (")[0] for name in table} == set(OPERATORS)
    for name, row in table.items():
        assert row.keys() == {*BACKENDS, "chosen"}
        assert row["reference"] == row["torch"] == "yes"
        assert row["chosen"] in BACKENDS
        assert row[row["chosen"]] == "yes"
        order = OPERATORS[name.split(" (")[0]].order
        for lane in ("native", "triton"):
            assert row[lane]  # yes, or why not
            assert (row[lane] == "not written for this operator") == (lane not in order)
    assert table["lora_dropout_fwd (cpu)"]["native"] == "not written for this operator"
    if backend.triton_available() and backend.interpreting():
        assert table["lora_fwd (cpu)"]["triton"] == "yes"
    assert table["lora_fwd (cpu)"]["chosen"] != "triton"  # the interpreter is for tests alone


def test_backends_with_the_extension():
    row = fastpeft.backends()["butterfly_fwd (cpu)"]
    assert row["native"] == "yes"
    assert row["chosen"] == "native"


# use_backend and FASTPEFT_BACKEND


@pytest.mark.parametrize("name", ["cuda", "Native", "", "torch ", 5, True])
def test_a_backend_that_does_not_exist(name):
    with pytest.raises(ValueError) as caught, fastpeft.use_backend(name):
        pytest.fail("the name was taken")
    assert all(word in str(caught.value) for word in ("backend", *BACKENDS, repr(name)))
    assert functional.cayley(torch.zeros(2, 2)).shape == (2, 2)  # nothing stays forced


@every_method
@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_forced_backend_runs_or_is_refused(method: Method, name: str):
    """No falling back: a benchmark or a test that asks for a kernel has to get it."""
    layer, x = adapted(method), randn(5, 24)
    expected = layer(x)
    with fastpeft.use_backend(name):
        for training in (True, False):
            try:
                with torch.set_grad_enabled(training):
                    found = layer(x)
            except RuntimeError as error:
                assert repr(name) in str(error)
                assert any(operator in str(error) for operator in OPERATORS)
            else:
                assert any(name in operator.order for operator in OPERATORS.values())
                torch.testing.assert_close(found, expected)
    assert torch.equal(layer(x), expected)


def test_a_dtype_that_a_backend_cannot_take():
    x, blocks = randn(5, 16, dtype=torch.float64), torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    with fastpeft.use_backend("native"), pytest.raises(RuntimeError) as caught:
        functional.butterfly(x, blocks)
    assert all(word in str(caught.value) for word in ("'native'", "butterfly_fwd", "float32", "not torch.float64"))
    assert functional.butterfly(x, blocks).dtype == torch.float64


@every_method
def test_a_float64_adapter_that_a_backend_cannot_take(method: Method):
    layer, x = adapted(method), randn(5, 24)
    layer.adapters.double()
    with fastpeft.use_backend("native"), pytest.raises(RuntimeError, match="'native' was asked for"):
        layer(x)
    assert layer(x).dtype == x.dtype


@every_method
@pytest.mark.parametrize("name", ["reference", "torch", None])
def test_the_backends_that_are_always_there(method: Method, name: str | None):
    layer = adapted(method)
    with fastpeft.use_backend(name):
        check(layer, randn(19, 24))


def test_forcing_nests_and_ends_with_an_error():
    def chosen() -> str:
        return OPERATORS["butterfly_fwd"].choose(torch.empty(0), torch.empty(0))

    before = chosen()
    with fastpeft.use_backend("reference"):
        assert chosen() == "reference"
        with fastpeft.use_backend("torch"):
            assert chosen() == "torch"
            with fastpeft.use_backend(None):
                assert chosen() == before
        assert chosen() == "reference"
        with pytest.raises(ZeroDivisionError), fastpeft.use_backend("torch"):
            raise ZeroDivisionError
        assert chosen() == "reference"
    assert chosen() == before


CHOSEN = """
import torch, fastpeft
from fastpeft.backend import OPERATORS
x = torch.empty(0)
print(OPERATORS["butterfly_fwd"].choose(x, x), fastpeft.backends()["lora_fwd (cpu)"]["triton"])
"""


def test_backend_by_environment():
    assert run_python("-c", CHOSEN, FASTPEFT_BACKEND="reference").stdout.startswith("reference ")


def test_an_empty_environment_forces_nothing():
    chosen, _, triton = run_python("-c", CHOSEN, FASTPEFT_BACKEND="").stdout.partition(" ")
    assert chosen == OPERATORS["butterfly_fwd"].choose(torch.empty(0), torch.empty(0))
    assert triton.strip() == "triton is not installed" or "TRITON_INTERPRET=1" in triton  # what it would need


def test_a_wrong_backend_by_environment():
    result = run_python("-c", "import fastpeft", FASTPEFT_BACKEND="fastest")
    assert result.returncode != 0
    assert "FASTPEFT_BACKEND must be one of reference, torch, native, triton, got 'fastest'" in result.stderr


def test_doctor_with_a_backend_that_operators_lack():
    """The doctor is there for the case that something is wrong."""
    said = run_doctor(FASTPEFT_BACKEND="native")
    assert all(f"{name} (cpu): " in said for name in OPERATORS)


# FASTPEFT_ISA


def test_an_instruction_set_by_environment():
    """That each of them computes the right thing is the operators' tests' business."""
    assert "baseline" in backend.extension.supported_isas
    assert "instruction set in use: baseline " in run_doctor(FASTPEFT_ISA="baseline")


def test_a_wrong_instruction_set():
    """Forced, so it fails loudly: no warning and slower code, no kernels that are said to be there and then fail."""
    script = "import torch, fastpeft; fastpeft.functional.butterfly(torch.randn(5, 16), torch.randn(2, 4, 4, 4))"
    result = run_python("-c", script, FASTPEFT_ISA="avx1024")
    assert result.returncode != 0
    assert all(word in result.stderr for word in ("FASTPEFT_ISA=avx1024", *backend.extension.compiled_isas))
    assert "FASTPEFT_ISA=avx1024" in result.stderr.splitlines()[-1]  # the error itself, not a warning before another
