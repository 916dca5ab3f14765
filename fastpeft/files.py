"""Adapter folders on disk: ``adapter_model.safetensors`` and ``adapter_config.json``, written whole or not at all.

Nothing is ever unpickled. This file knows folders and bytes; what the tensors mean is ``model.py``'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastpeft.sharded import is_spread

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MADE_WITH = "fastpeft_config"  # in the metadata of the tensors


def write_folder(folder: str | os.PathLike, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files. Each is written beside its final place and moved there in one step, so an interruption leaves
    the previous file intact.

    Raises:
        ValueError: the folder is a file, or a tensor is spread over processes.
    """
    path = Path(folder)
    if spread := [key for key, tensor in tensors.items() if is_spread(tensor)]:
        raise ValueError(f"{spread[0]} is spread over processes: save the adapter and load it on one of them")
    if path.exists() and not path.is_dir():
        raise ValueError(f"folder must name a folder, got the file {str(path)!r}")
    path.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    config_bytes = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    metadata = {"format": "pt", MADE_WITH: _fingerprint(config)}
    _replace({path / TENSORS: save(plain, metadata=metadata), path / CONFIG: config_bytes})


def _replace(contents: Mapping[Path, bytes]) -> None:
    """All files or none, as far as a file system allows: two files cannot be moved in one step. What is between the
    steps is undone on an exception, and recognised by the fingerprint after a crash."""
    temporaries = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    before = {path: path.read_bytes() if path.exists() else None for path in contents}
    moved: list[Path] = []
    try:
        for path, content in contents.items():
            _write(temporaries[path], content)
        for path, temporary in temporaries.items():
            moved.append(path)
            os.replace(temporary, path)
    except BaseException:
        for path in moved:
            old = before[path]
            if old is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(old)
        raise
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _fingerprint(config: Mapping[str, Any]) -> str:
    """Of what the tensors mean; a base model's new name changes nothing."""
    meaning = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def read_folder(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor], bool]:
    """The configuration's values, the tensors, on the CPU, and whether they were saved together as far as they say.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: one of them is truncated or not what its name says.
    """
    path = Path(folder)
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            hint = " (pickled .bin files are not read)" if (path / "adapter_model.bin").exists() else ""
            raise FileNotFoundError(f"folder {str(path)!r} has no {name}{hint}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path / CONFIG} must hold a JSON object, got {type(config).__name__}")
    try:
        tensors = load_file(path / TENSORS)
        with safe_open(path / TENSORS, framework="pt") as file:
            made_with = (file.metadata() or {}).get(MADE_WITH)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / TENSORS} is truncated or not a safetensors file: {error}") from error
    return config, tensors, made_with in (None, _fingerprint(config))


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Checks a file's tensors against the parameters they are meant for.

    Raises:
        ValueError: some are missing, too many, of another shape, of the wrong kind or not finite; all are named.
    """
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is not expected" for key in sorted(found.keys() - expected.keys())]
    for key in sorted(expected.keys() & found.keys()):
        tensor, wanted = found[key], expected[key]
        if tensor.shape != wanted.shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        elif (tensor.dtype in FLOATS) != (wanted.dtype in FLOATS):
            problems.append(f"{key} has dtype {tensor.dtype}, expected {wanted.dtype}")
        elif tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.to(wanted.dtype)).all()):
            problems.append(f"{key} holds values that are not finite in {wanted.dtype}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: {shown}")
