"""Counters of the server as Prometheus reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # seconds
_HELP = {
    "unmask_requests_total": ("counter", "Requests that ended, by route and status; 499 = the client left."),
    "unmask_prompt_tokens_total": ("counter", "Tokens of prompts of finished answers."),
    "unmask_completion_tokens_total": ("counter", "Tokens of finished answers."),
    "unmask_forward_passes_total": ("counter", "Forward passes, each of many rows."),
    "unmask_queue_requests": ("gauge", "Requests that wait."),
    "unmask_running_rows": ("gauge", "Answers that are being generated."),
    "unmask_running_tokens": ("gauge", "Tokens of prompts and canvases of these answers."),
    "unmask_request_seconds": ("histogram", "Seconds of a request, by route."),
    "unmask_first_content_seconds": ("histogram", "Seconds until the first text of a stream."),
}


class Metrics:
    """Counts and times; all calls are from one thread."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()  # (name, labels)
        self.sums: Counter[tuple[str, str]] = Counter()  # of histograms

    def add(self, name: str, amount: float = 1, /, **labels: str | int) -> None:
        """Add to a counter."""
        self.counts[name, _written(labels)] += amount  # pyright: ignore[reportArgumentType]

    def observe(self, name: str, seconds: float, /, **labels: str | int) -> None:
        """Put a time into a histogram."""
        for bucket in (*BUCKETS, float("inf")):
            limit = "+Inf" if bucket == float("inf") else f"{bucket:g}"
            self.add(f"{name}_bucket", int(seconds <= bucket), **labels, le=limit)
        self.add(f"{name}_count", 1, **labels)
        self.sums[f"{name}_sum", _written(labels)] += seconds  # pyright: ignore[reportArgumentType]

    def text(self, now: Mapping[str, float]) -> str:
        """Everything in Prometheus' text format, with what is known only `now`."""
        values = {**self.counts, **self.sums, **{(name, ""): value for name, value in now.items()}}
        lines = []
        for name, (kind, meaning) in _HELP.items():
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            names = (name, f"{name}_bucket", f"{name}_sum", f"{name}_count")
            of_this = [(key, value) for key, value in values.items() if key[0] in names]
            lines += [f"{full}{labels} {value:.15g}" for (full, labels), value in of_this]
        return "\n".join(lines) + "\n"


def _written(labels: Mapping[str, str | int]) -> str:
    return "{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "}" if labels else ""
