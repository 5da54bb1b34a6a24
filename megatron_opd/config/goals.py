"""Conditions on metrics that end a run, and which values of a metric are the better ones."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

_SMALLER = ("kl/", "nll/", "after/kl/", "loss", "sft/nll", "mismatch/kl", "logprob/gap", "perplexity/")
_LARGER = (
    "accuracy/",
    "reward/",
    "agreement/",
    "forced_agreement/",
    "avg@",
    "pass@",
    "logprob/student",
    "logprob/teacher",
)
_FORM = re.compile(r"\s*(?P<metric>\S+)\s+(?P<how><|>|stalls)\s+(?P<limit>\S+)\s*")


def is_smaller_better(metric: str) -> bool:
    """Raises ValueError for a metric of which that is not known."""
    name = metric.removeprefix("eval/")
    if name.startswith(_SMALLER):
        return True
    if name.startswith(_LARGER):
        return False
    known = ", ".join(f"{begin}…" if begin.endswith(("/", "@")) else begin for begin in (*_SMALLER, *_LARGER))
    raise ValueError(
        f"it is not known whether a smaller or a larger '{metric}' is better; known: {known} (also of eval/)"
    )


def is_better(value: float, other: float, *, smaller: bool) -> bool:
    """Whether `value` is better than `other`; a value that is not finite never is."""
    return math.isfinite(value) and (value < other if smaller else value > other)


@dataclass(frozen=True, slots=True)
class Condition:
    """An entry of train.stop_when."""

    metric: str
    how: str
    """`<`, `>`, or `stalls`."""
    limit: float
    """The number compared with, or the measurements in a row without a new best."""

    def holds(self, values: Sequence[float]) -> bool:
        """Whether it is so after these values, the newest of which is the last."""
        if not values:
            return False
        if self.how == "stalls":
            return self._since_best(values) >= self.limit
        return values[-1] < self.limit if self.how == "<" else values[-1] > self.limit

    def _since_best(self, values: Sequence[float]) -> int:
        """Values behind the best one."""
        smaller = is_smaller_better(self.metric)
        best = 0
        for i, value in enumerate(values):
            if is_better(value, values[best], smaller=smaller) or not math.isfinite(values[best]):
                best = i
        return len(values) - 1 - best

    def __str__(self) -> str:
        return f"{self.metric} {self.how} {self.limit:g}"


def condition(text: str) -> Condition:
    """Reads an entry of train.stop_when. Raises ValueError that says how one is written."""
    found = _FORM.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        limit = float(found["limit"])
    except ValueError:
        raise ValueError(
            f"{text!r} is no condition; write 'eval/kl/ensemble < 0.05', 'reward/mean > 0.9', or"
            " 'eval/nll/all stalls 3'"
        ) from None
    if math.isnan(limit):
        raise ValueError(f"{text!r}: nothing is above or below nan")
    if found["how"] == "stalls":
        if limit < 1 or not limit.is_integer():
            raise ValueError(f"{text!r}: a metric stalls for a whole number of measurements, at least 1")
        is_smaller_better(found["metric"])
    return Condition(found["metric"], found["how"], limit)
