"""Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How often a value was at most each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(self._bounds, value)] += 1
            self._sum += value

    def lines(self, name: str) -> list[str]:
        with self._lock:
            counts, total = list(self._counts), self._sum
        lines, so_far = [], 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], counts, strict=True):
            so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*lines, f"{name}_sum {total}", f"{name}_count {so_far}"]


class Metrics:
    """What the service counts itself."""

    def __init__(self) -> None:
        self.first_token = Histogram([0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0])
        self.next_token = Histogram([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
        self._responses: Counter[tuple[str, int]] = Counter()  # by endpoint and status

    def responded(self, endpoint: str, status: int) -> None:
        self._responses[endpoint, status] += 1

    def page(self, counters: Mapping[str, float], gauges: Mapping[str, float]) -> str:
        """All of it, with numbers that others keep: names without the prefix, to what they are now."""
        lines: list[str] = []

        def add(kind: str, name: str, entries: Sequence[str]) -> None:
            lines.append(f"# TYPE fastpeft_{name} {kind}")
            lines.extend(entries)

        responses = [
            f'fastpeft_http_responses_total{{endpoint="{endpoint}",status="{status}"}} {count}'
            for (endpoint, status), count in sorted(self._responses.items())
        ]
        add("counter", "http_responses_total", responses)
        for kind, numbers in (("counter", counters), ("gauge", gauges)):
            for name, value in numbers.items():
                full = f"{name}_total" if kind == "counter" else name
                add(kind, full, [f"fastpeft_{full} {value}"])
        for name, histogram in (("first_token", self.first_token), ("next_token", self.next_token)):
            add("histogram", f"{name}_seconds", histogram.lines(f"fastpeft_{name}_seconds"))
        return "\n".join(lines) + "\n"


def together(pages: Mapping[str, str]) -> str:
    """One page of those of several replicas, whose names become a label."""
    kinds: dict[str, list[str]] = {}
    for replica, page in pages.items():
        for line in page.splitlines():
            if line.startswith("#"):
                samples = kinds.setdefault(line, [])
            else:
                sample, value = line.rsplit(" ", 1)
                name, _, labels = sample.rstrip("}").partition("{")
                label = f'replica="{replica}"'
                samples.append(f"{name}{{{f'{label},{labels}' if labels else label}}} {value}")
    return "".join(f"{line}\n" for kind, samples in kinds.items() for line in (kind, *samples))
