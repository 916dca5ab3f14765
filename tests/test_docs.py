"""The scripts in docs/ and README.md run as they stand, each page in one process and an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS = {
    "peft-model": ["peft", "transformers"],
    "plain-model": ["transformers"],
    "quantised-model": ["torchao"],
    "serving": [],
}


@pytest.mark.parametrize("page", NEEDS)
def test_a_page(page: str, tmp_path: Path):
    for module in NEEDS[page]:
        pytest.importorskip(module)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.M | re.S)
    assert blocks
    script = tmp_path / "script.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["several-gpus", "ray-serve"])
def test_what_a_page_quotes(page: str):
    """Parts of an example, as they stand there."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "examples").rglob("*.py")))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text("utf-8"), re.M | re.S)
    assert blocks and all(block in text for block in blocks)


def test_every_page_is_linked():
    readme = (ROOT / "README.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme
