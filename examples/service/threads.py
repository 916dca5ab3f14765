"""Where a service computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_a_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """work(...), in a thread that ends with it.

    A thread that has computed keeps others to compute with (OpenMP's pool). Once a process has more of those than
    processors, none of them waits awake for what comes next, and every product of the model has to wake them: a tenth
    of the tokens per second on two cores. So only the engine's thread computes and stays.
    """
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work, *args, **kwargs).result()
