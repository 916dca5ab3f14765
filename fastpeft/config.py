"""Configurations: what is common to all methods, and PEFT's configurations and files read as ours.

Each method declares its own configuration in ``fastpeft/nn/<method>.py``. Fields carry PEFT's names and defaults. An
option of PEFT that a method here does not have is refused by name, unless it is switched off or says nothing about the
computation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

# Fields of PEFT's configurations that keep books or repeat what is known from the model itself.
_SAYS_NOTHING = frozenset(
    "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode megatron_core peft_type peft_version "
    "qalora_group_size revision runtime_config task_type".split()
)
_TASKS_WITH_A_HEAD = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
_OFF: tuple[Any, ...] = (None, False, "none", 0, 0.0, "", [], {}, ())

_Config = TypeVar("_Config", bound="AdapterConfig")


@dataclass(kw_only=True)
class AdapterConfig:
    """The fields that every method's configuration has.

    Args:
        target_modules: which modules to adapt: "all-linear" (every linear layer but the output embeddings), a regular
            expression that matches a module's whole path, or a list of paths or of their last parts.
        exclude_modules: which of these to leave out, in the same two ways.
        layers_to_transform: only these indices of the model's layer list.
        layers_pattern: the name of that list, where it cannot be told from the path.
    """

    peft_type: ClassVar[str]

    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple, frozenset)):
                value = sorted(value)
                setattr(self, name, value)
            if isinstance(value, str):
                require_regex(name, value)
            elif value is not None and not _all_of(str, value):
                raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
        if self.layers_to_transform is not None and not _all_of(int, self.layers_to_transform):
            raise TypeError(f"layers_to_transform must be an int or a list of ints, got {self.layers_to_transform!r}")
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        if not _all_of(str, patterns):
            raise TypeError(f"layers_pattern must be a string or a list of strings, got {self.layers_pattern!r}")
        for pattern in patterns:
            require_regex("layers_pattern", pattern)
        self.check()

    def check(self) -> None:
        """Raises ValueError for values that no layer could take."""

    def to_dict(self) -> dict[str, Any]:
        return {"peft_type": self.peft_type, **dataclasses.asdict(self)}

    def computation(self) -> dict[str, Any]:
        """What the configuration says about the computation: everything but where the adapter sits."""
        places = {field.name for field in dataclasses.fields(AdapterConfig)}
        return {name: value for name, value in self.to_dict().items() if name not in places}

    @classmethod
    def from_dict(cls: type[_Config], values: Mapping[str, Any], source: str) -> _Config:
        """Makes a configuration from PEFT's field names.

        Raises:
            ValueError: an option is switched on that this method does not have.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        task = values.get("task_type")
        if str(getattr(task, "value", task)) in _TASKS_WITH_A_HEAD:
            raise ValueError(
                f"{source}: option task_type={task!r} makes PEFT train and save the model's head, which is not "
                "supported: leave it out, set the head free with requires_grad_() and save it beside the adapter"
            )
        for name, value in values.items():
            if (
                name not in known
                and name not in _SAYS_NOTHING
                and not any(value is off or value == off for off in _OFF)
            ):
                raise ValueError(f"{source}: option {name}={value!r} is not supported for {cls.peft_type}")
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def from_peft(cls: type[_Config], config: Any) -> _Config:
        """Makes a configuration from PEFT's object of the same method."""
        # PEFT's own defaults are off by definition, whatever their value.
        values = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(config)
            if field.name in {own.name for own in dataclasses.fields(cls)}
            or getattr(config, field.name) != _default(field)
        }
        return cls.from_dict(values, f"peft.{type(config).__name__}")


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _all_of(kind: type, value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in values)


MOST_RANK = 1 << 20  # beyond any use, and small enough that a file cannot ask for all the memory there is


def require_int(name: str, value: Any, least: int, most: int = (1 << 63) - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} must be an integer of at least {least} and at most {most}, got {value!r}")


def require_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def require_regex(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from error


def require_pattern(name: str, value: Any, check: Callable[[str, Any], None]) -> None:
    """A mapping from regular expressions to values that pass a check."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict of module names and values, got {value!r}")
    for key, item in value.items():
        require_regex(f"{name} key", key)
        check(f"{name}[{key!r}]", item)


def require_probability(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a probability in [0, 1), got {value!r}")


def require_finite(name: str, value: Any) -> None:
    try:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        fine = False
    if not fine:
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def value_for(path: str, pattern: Mapping[str, Any], default: Any) -> Any:
    """The value that a ``rank_pattern`` or the like gives for a module, matched as PEFT does; else the default."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


def matches(path: str, wanted: str | Iterable[str]) -> bool:
    """Whether a module path is named by a regular expression, or by a list of paths or last parts."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in wanted)


def in_wanted_layer(path: str, config: AdapterConfig) -> bool:
    """Whether a module lies in one of ``layers_to_transform``."""
    if config.layers_to_transform is None:
        return True
    wanted = config.layers_to_transform
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", path)
        if found:
            return int(found.group(1)) in ([wanted] if isinstance(wanted, int) else wanted)
    return False
