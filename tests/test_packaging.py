"""What is shipped: an sdist that builds, a wheel that holds everything, loops that cannot crash an older processor."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.builds


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory) -> Path:
    """Built from the sdist, as an installer without a wheel for its platform does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = folder.glob("*.whl")
    return archive


def test_sdist_holds_every_source(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder, pattern in (("csrc", "*/*.*"), ("csrc", "*.cpp"), ("kernels", "*.py"), ("fastpeft", "**/*.py")):
        for source in (ROOT / folder).glob(pattern):
            assert str(source.relative_to(ROOT)) in names


def test_wheel_holds_every_module_and_the_extension(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert f"fastpeft/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    for kernel in (ROOT / "kernels").glob("*.py"):
        assert f"fastpeft/kernels/{kernel.name}" in names
    for module in (ROOT / "fastpeft").rglob("*.py"):
        assert str(module.relative_to(ROOT)) in names
    assert not any(name.startswith(("kernels/", "tests/", "bench/", "examples/")) for name in names)


def test_wheel_runs_without_the_source_tree(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = """
import torch, fastpeft, fastpeft.kernels.lora
from fastpeft import backend
assert backend.extension is not None, backend.extension_status
x, blocks = torch.randn(3, 16), torch.randn(2, 4, 4, 4)
with fastpeft.use_backend("native"):
    y = fastpeft.functional.butterfly(x, blocks)
torch.testing.assert_close(y, fastpeft.reference.boft.butterfly(x, blocks))
print(fastpeft.__file__, fastpeft.kernels.lora.__file__)
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=env, cwd=tmp_path).stdout.split()
    assert all(path.startswith(str(tmp_path / "site")) for path in found)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512_bf16"])
def test_loops_share_no_code_with_the_rest(isa: str):
    """The linker keeps one copy of a shared inline function. If it kept one from here, it would be in every caller."""
    objects = list((ROOT / "build").rglob(f"*_loops.cpp.{isa}.o"))
    if not objects:
        pytest.skip("fastpeft was not built in this source tree, or not for x86")
    for path in objects:
        symbols = subprocess.run(
            ["nm", "-C", "--defined-only", path], check=True, capture_output=True, text=True
        ).stdout
        shared = [line for line in symbols.splitlines() if line.split()[-2:-1] and line.split()[1] in "WVuw"]
        assert not shared, f"{path.name} defines {shared}"
