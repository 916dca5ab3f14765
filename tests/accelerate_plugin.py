"""A pytest plugin for PEFT's own test suite: every PEFT model that it makes is accelerated; see ``make test-peft``.

Runs the cases that concern the methods that fastpeft has, and those that concern no method. ``--plain`` runs the same
cases on PEFT as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import pytest
from peft.tuners.boft import layer as peft_boft
from peft.tuners.tuners_utils import BaseTuner

import fastpeft
from fastpeft.interop.layer import Plan

CONFIGS = (peft.LoraConfig, peft.OFTConfig, peft.BOFTConfig, peft.FourierFTConfig)
SEEN: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="PEFT's models as they are")


def pytest_configure(config: pytest.Config) -> None:
    # It would try to compile its CUDA helper for every layer. What it does without one stays as it is.
    peft_boft.get_fbd_cuda = lambda: None
    if not config.getoption("--plain"):
        accelerate_everything()


def accelerate_everything() -> None:
    """All that makes PEFT layers comes through one method of PEFT's: new models, adapters added, adapters loaded."""
    inject_adapter, run = BaseTuner.inject_adapter, Plan.run

    def inject_and_accelerate(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        inject_adapter(self, model, *args, **kwargs)
        try:
            report = fastpeft.accelerate(model)
        except ValueError as error:  # methods that make no layers, such as those that train parameters of the base
            assert "must have PEFT layers" in str(error)
            return
        SEEN["layers accelerated"] += len(report.accelerated)
        SEEN.update(f"layer left alone: {reason}" for reason in report.left_alone.values())

    def run_and_count(self: Plan, x: Any) -> Any:
        y = run(self, x)
        SEEN[
            "calls computed by " + ("PEFT, of layers in a state that is not covered" if y is None else "fastpeft")
        ] += 1
        return y

    BaseTuner.inject_adapter = inject_and_accelerate
    Plan.run = run_and_count


def configs_in(value: Any) -> Iterator[type]:
    """The configuration classes among a case's parameters."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from configs_in(part)
    elif isinstance(value, type) and issubclass(value, peft.PeftConfig):
        yield value
    elif isinstance(value, peft.PeftConfig):
        yield type(value)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        classes = list(configs_in(list(parameters)))
        ours = not classes or any(found in CONFIGS for found in classes)
        (chosen if ours else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("fastpeft")
    for what, count in SEEN.most_common():
        terminalreporter.line(f"{count:7} {what}")
