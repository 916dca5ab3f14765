"""Adapter folders on disk: ``adapter_model.safetensors`` and ``adapter_config.json``, written whole or not at all.

Nothing is ever unpickled. This file knows folders and bytes; what the tensors mean is ``model.py``'s business.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fastpeft.sharded import is_spread

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MADE_WITH = "fastpeft_config"  # in the metadata of the tensors
MOST_CONFIG, MOST_HEADER = 1 << 20, 1 << 24  # bytes; beyond any use, and read in no time
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


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
    config = _read_config(path)
    try:
        tensors = load_file(path / TENSORS)
        with safe_open(path / TENSORS, framework="pt") as file:
            made_with = (file.metadata() or {}).get(MADE_WITH)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / TENSORS} is truncated or not a safetensors file: {error}") from error
    return config, tensors, made_with in (None, _fingerprint(config))


def _read_config(path: Path) -> dict[str, Any]:
    for name in (CONFIG, TENSORS):
        if not (path / name).is_file():
            hint = " (pickled .bin files are not read)" if (path / "adapter_model.bin").exists() else ""
            raise FileNotFoundError(f"folder {str(path)!r} has no {name}{hint}")
    with open(path / CONFIG, "rb") as file:
        content = file.read(MOST_CONFIG + 1)
    if len(content) > MOST_CONFIG:
        raise ValueError(f"{path / CONFIG} must have at most {MOST_CONFIG} bytes")
    return _json_object(content, path / CONFIG)


def _json_object(content: bytes, source: object) -> dict[str, Any]:
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{source} must hold a JSON object, got {type(values).__name__}")
    return values


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class Folder(NamedTuple):
    """An adapter's folder whose header has been read, and none of its tensors."""

    path: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    together: bool  # whether both files were saved together, as far as they say
    mark: tuple[int, ...]  # another one says that the file of the tensors was replaced

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, on the CPU, mapped and not read: what is not looked at costs nothing.

        Raises:
            ValueError: the file is not the one that it was.
        """
        file = self.path / TENSORS
        if not file.is_file() or _mark(file) != self.mark:
            raise ValueError(f"{file} was changed since its header was read")
        content = torch.from_file(str(file), shared=False, size=self.mark[-1], dtype=torch.uint8, device="cpu")
        if _mark(file) != self.mark:
            raise ValueError(f"{file} was changed since its header was read")
        return {key: _view(content, entry) for key, entry in self.entries.items()}


def _view(content: Tensor, entry: Entry) -> Tensor:
    part = content[entry.start : entry.stop]
    if entry.start % entry.dtype.itemsize:  # no writer of today does that
        part = part.clone()
    return part.view(entry.dtype).view(entry.shape)


def _mark(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def open_folder(folder: str | os.PathLike) -> Folder:
    """Reads a folder's configuration and the header of its tensors.

    Raises:
        FileNotFoundError: one of the two files is not there.
        ValueError: one of them is truncated, too large or not what its name says.
    """
    path = Path(folder)
    config = _read_config(path)
    file = path / TENSORS
    mark = _mark(file)
    values, start = _read_header(file, mark[-1])
    metadata = values.pop("__metadata__", None)
    made_with = metadata.get(MADE_WITH) if isinstance(metadata, dict) else None
    entries = {key: _entry(file, key, value, start, mark[-1]) for key, value in values.items()}
    return Folder(path, config, entries, made_with in (None, _fingerprint(config)), mark)


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file: eight bytes for its length, and a JSON object."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is truncated or not a safetensors file: {size} bytes")
        if length > MOST_HEADER:
            raise ValueError(f"{path}: its header must have at most {MOST_HEADER} bytes, got {length}")
        return _json_object(file.read(length), f"the header of {path}"), 8 + length


def _entry(path: Path, key: str, value: Any, start: int, size: int) -> Entry:
    value = value if isinstance(value, dict) else {}
    shape, offsets, dtype = value.get("shape"), value.get("data_offsets"), _DTYPES.get(str(value.get("dtype")))
    if dtype is None:
        raise ValueError(f"{path}: {key} must have a dtype of {', '.join(_DTYPES)}, got {value.get('dtype')!r}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {key} has no shape and place in the header of a safetensors file")
    begin, end = start + offsets[0], start + offsets[1]
    if end > size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{path} is truncated or not a safetensors file: {key} does not lie where its header says")
    return Entry(dtype, tuple(shape), begin, end)


def _are_sizes(numbers: Any) -> bool:
    if not isinstance(numbers, list):
        return False
    for number in numbers:
        if type(number) is not int or number < 0:
            return False
    return True


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
