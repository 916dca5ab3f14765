"""An adapter as it comes: a folder on disk or a state in memory, checked by its header against the layers of a bank.

Nothing of a tensor is read here; see ``version.py`` for that. Of a folder nothing but its path is kept either: what is
registered by the thousand must be small, and a header is read again in a millisecond when the tensors are. A file is
somebody else's: names are looked up and never become paths, nothing is unpickled, and sizes are those of the header
before they are asked of memory.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpeft import files
from fastpeft.config import AdapterConfig, in_wanted_layer, matches
from fastpeft.model import own_config
from fastpeft.nn import METHODS, Adapter, Site
from fastpeft.nn.served import Expected, Serving


class State(NamedTuple):
    """An adapter in memory: a configuration, and tensors of the bank's own."""

    config: Any
    tensors: dict[str, Tensor]


Source = str | State

_NAME = re.compile(r"\w[\w.:@+ -]*(/\w[\w.:@+ -]*)*")


class Header(NamedTuple):
    """What is known of an adapter before its tensors are read."""

    said: str  # what messages call it
    method: type[Adapter]
    serving: Serving
    origin: files.Folder | State

    @property
    def mark(self) -> Any:
        """Another one says that the source is not what it was."""
        return self.origin.mark if isinstance(self.origin, files.Folder) else None

    def tensors(self) -> dict[str, Tensor]:
        found = self.origin.tensors() if isinstance(self.origin, files.Folder) else self.origin.tensors
        return self.method.plain_keys(found, self.said)


def check_name(name: Any) -> None:
    if not isinstance(name, str) or len(name) > 256 or not _NAME.fullmatch(name):
        raise ValueError(
            "name must be one or several words with / between them, each of letters, digits and _.:@+- and starting "
            f"with a letter, a digit or _, and at most 256 characters in all, got {name!r:.300}"
        )


def to_source(given: Any) -> Source:
    """A folder's path, or a state copied: what the caller goes on to do with theirs is no version of the adapter.

    Raises:
        TypeError: neither a folder nor a pair (config, tensors).
    """
    if isinstance(given, (str, os.PathLike)):
        return os.path.abspath(os.fspath(given))
    if not (isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Mapping)):
        raise TypeError(f"source must be a folder or a pair (config, tensors), got {type(given).__name__}")
    config, tensors = given
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"tensors must map names to tensors, got {key!r}: {type(tensor).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        return State(copy.deepcopy(config), {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()})


def read_header(name: str, source: Source, sites: Mapping[str, Site], dtype: torch.dtype) -> Header:
    """Reads what a source says of itself and checks that it fits the layers.

    Raises:
        FileNotFoundError: a folder lacks a file.
        ValueError: a file is not what its name says, the method or an option is not known or not served, or the
            adapter is not one for these layers.
        TypeError: the configuration is none.
    """
    said = f"adapter {name!r}"
    origin: files.Folder | State
    if isinstance(source, State):
        origin, found = source, source.tensors
    else:
        said += f" in {source!r}"
        origin = files.open_folder(source)
        found = origin.entries  # type: ignore[assignment]
    method, config = _config(origin.config, said)
    plain = method.plain_keys(found, said)
    if len(plain) != len(found):
        raise ValueError(f"{said}: several of its tensors have one name")
    config = method.reconcile(config, plain)
    chosen = _wanted(config, sites, said)
    try:
        serving = method.serve(config, chosen, dtype)
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    _check_shapes(plain, serving.tensors, said)
    if isinstance(origin, files.Folder) and not origin.together:
        raise ValueError(
            f"{said}: {files.CONFIG} is not the one that {files.TENSORS} was saved with; saving was interrupted, or it "
            "was edited"
        )
    return Header(said, method, serving, origin)


def _config(config: Any, said: str) -> tuple[type[Adapter], AdapterConfig]:
    if isinstance(config, Mapping):
        method = METHODS.get(str(config.get("peft_type")).upper())
        if method is None:
            known = ", ".join(METHODS)
            raise ValueError(f"{said}: peft_type must be one of {known}, got {config.get('peft_type')!r:.100}")
        try:
            own = method.config_class.from_dict(config, said)
        except (TypeError, ValueError) as error:
            raise ValueError(str(error) if said in str(error) else f"{said}: {error}") from error
    else:
        own = own_config(config)
        method = METHODS[own.peft_type]
    for name, value in vars(own).items():
        patterns = [value] if isinstance(value, str) else value
        if isinstance(value, Mapping) or name == "layers_pattern" or isinstance(value, str):
            for pattern in patterns or ():
                _check_pattern(f"{said}: {name}", pattern)
    return method, own


def _check_pattern(name: str, pattern: str) -> None:
    """Refuses regular expressions that could take for ever: those that repeat groups, or repeat very often."""
    if len(pattern) > 4096 or re.search(r"\)(?:[*+]|\{)", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        raise ValueError(
            f"{name}: a regular expression from a file must have at most 4096 characters and 6 repetitions, and repeat "
            f"no group, got {pattern!r:.300}"
        )


def _wanted(config: AdapterConfig, sites: Mapping[str, Site], said: str) -> list[Site]:
    wanted, excluded = config.target_modules, config.exclude_modules
    if wanted is None:
        raise ValueError(f"{said}: target_modules must be given")
    named = wanted if isinstance(wanted, str) else frozenset(wanted)
    chosen = [
        site
        for path, site in sites.items()
        if (wanted == "all-linear" or _matches(path, named))
        and in_wanted_layer(path, config)
        and not (excluded is not None and matches(path, excluded))
    ]
    if not chosen:
        raise ValueError(
            f"{said}: target_modules={config.target_modules!r:.300} matches no layer of the bank; they end in "
            f"{sorted({path.rpartition('.')[2] for path in sites})[:20]}"
        )
    return chosen


def _matches(path: str, wanted: str | frozenset[str]) -> bool:
    """config.matches, for a set: files name every path, and a loop over them for every path would take its time."""
    if isinstance(wanted, str):
        return matches(path, wanted)
    while path not in wanted:
        _, dot, path = path.partition(".")
        if not dot:
            return False
    return True


def _check_shapes(found: Mapping[str, Any], expected: Mapping[str, Expected], said: str) -> None:
    """found has dtypes and shapes: tensors, or a header's entries."""
    problems = [f"{key} is missing" for key in sorted(expected.keys() - found.keys())]
    problems += [f"{key} is not expected" for key in sorted(found.keys() - expected.keys())]
    for key, want in expected.items():
        if (tensor := found.get(key)) is None:
            continue
        if tuple(tensor.shape) != want.shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {want.shape}")
        elif tensor.dtype not in ((torch.int64, torch.int32) if want.integers else files.FLOATS):
            problems.append(f"{key} has dtype {tensor.dtype}, expected {'integers' if want.integers else 'floats'}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{said} does not fit the bank's layers: {shown:.2000}")
