"""Launch settings that were measured on the chip at hand, for those who ask for it.

Launchers take their settings from plain functions of shape, dtype and device, and never measure anything of themselves.
`tune` does, on purpose:

    from fastpeft.kernels.tuning import tune

    tune(lambda: layer(x))

What it finds is written to a file, from where launchers take it, in this process and in later ones.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

Settings = dict[str, int]


class Search:
    """What a call asked for, and what it is given instead."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[torch.device, Settings, tuple[str, ...]]] = {}
        self.given: dict[str, Settings] = {}


_search: Search | None = None


def tuned_file() -> Path:
    """Where measured settings are kept: FASTPEFT_TUNED, or fastpeft/tuned.json among the user's caches."""
    if named := os.environ.get("FASTPEFT_TUNED"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastpeft", "tuned.json")


def chip_of(device: torch.device) -> str:
    """Settings hold for one kind of chip and one release of the compiler."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, triton {triton.__version__}"


def read_file() -> dict[str, dict[str, Settings]]:
    try:
        text = tuned_file().read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        table = json.loads(text)
        pairs = [pair for chip in table.values() for settings in chip.values() for pair in settings.items()]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{tuned_file()} must hold settings as tune wrote them: mend or delete it") from error
    for name, value in pairs:
        if type(value) is not int or value < 1 or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"{tuned_file()} holds {name} = {value!r}, no setting of a launch: mend or delete it")
    return table


def step(name: str, value: int, up: bool) -> int:
    """Stages are counted; tiles and warps are powers of two."""
    if name == "num_stages":
        return value + 1 if up else value - 1
    return value * 2 if up else value // 2


@functools.cache
def measured(device: torch.device) -> dict[str, Settings]:
    return read_file().get(chip_of(device), {})


def settle(
    kernel: str, case: tuple, tokens: int, device: torch.device, settings: Settings, free: tuple[str, ...]
) -> Settings:
    """The settings of one launch: as computed, but for those of `free` that were measured for the same case.

    Numbers of tokens count as the same up to the next power of two.
    """
    known = measured(device)
    if not known and _search is None:
        return settings
    key = f"{kernel} {' '.join(map(str, case))} T{1 << (tokens - 1).bit_length()}"
    changes = known.get(key, {})
    if _search is not None:
        _search.asked.setdefault(key, (device, {name: settings[name] for name in free} | changes, free))
        changes = _search.given.get(key, changes)
    return settings | {name: changes[name] for name in free if name in changes}


def seconds(call: Callable[[], object], rounds: int = 20) -> float:
    """The median of some calls, after two to compile and to warm up."""
    times = []
    for _ in range(rounds + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def tune(call: Callable[[], object], least_gain: float = 0.02) -> dict[str, Settings]:
    """Finds faster settings for the kernels that `call` launches, adds them to `tuned_file` and returns them.

    One number after the other is made smaller and larger for as long as the whole call gets faster, by a share of
    `least_gain` at least. That takes dozens of compilations, minutes in all. The call is made many times: what it
    changes, it changes often.
    """
    global _search
    if _search is not None:
        raise RuntimeError("tune is running already: its call must not call it")
    _search = search = Search()
    try:
        best = seconds(call)
        # A list: a kernel that comes up only under other settings keeps those that were computed.
        for key, (_, settings, free) in list(search.asked.items()):
            search.given[key] = settings
            for name in free:
                for up in (False, True):
                    while True:
                        now = search.given[key]
                        value = step(name, now[name], up)
                        if value < 1:
                            break
                        search.given[key] = now | {name: value}
                        try:
                            found = seconds(call)
                        except Exception:  # not a setting that compiles or fits: each release has errors of its own
                            found = float("inf")
                        if found > (1 - least_gain) * best:
                            search.given[key] = now
                            break
                        best = found
        faster = {key: now for key, now in search.given.items() if now != search.asked[key][1]}
        save({key: search.asked[key][0] for key in faster}, faster)
        return faster
    finally:
        _search = None
        measured.cache_clear()


def save(devices: dict[str, torch.device], faster: dict[str, Settings]) -> None:
    table = read_file()
    for key, settings in faster.items():
        table.setdefault(chip_of(devices[key]), {})[key] = settings
    path = tuned_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step: another process may be reading it.
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)
