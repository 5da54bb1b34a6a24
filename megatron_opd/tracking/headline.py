"""Numbers that are worth a place in the one line that people read; whoever computes a metric declares it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def fitting(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """The metrics of a pattern, a name or one with a `*` in it, each with what its `*` stands for."""
    begin, star, end = pattern.partition("*")
    if not star:
        return {name: "" for name in names if name == pattern}
    fit = [name for name in names if name.startswith(begin) and name.endswith(end) and len(name) >= len(pattern) - 1]
    return {name: name[len(begin) : len(name) - len(end)] for name in fit}


@dataclass(frozen=True, slots=True)
class Headline:
    """A metric in a line of the console and of train.log."""

    metric: str
    """Its name. With a `*`: all metrics that begin and end like this."""
    label: str
    """The word before the number; a `*` in it is what the name's stands for."""
    form: str = "{:.4g}"
    """Format of the number."""

    def texts(self, row: Mapping[str, float]) -> list[str]:
        """Label and number of each metric that the row has."""
        found = fitting(self.metric, row)
        return [f"{self.label.replace('*', its)} {self.form.format(row[name])}" for name, its in found.items()]


BEFORE = (Headline("loss", "loss"), Headline("grad_norm", "grad", "{:.3g}"))
"""At the beginning of a step's line."""
BEHIND = (Headline("tokens_per_s", "tok/s", "{:.0f}"),)
"""At its end."""
HELD_OUT = (
    Headline("eval/accuracy/*", "*", "{:.3f}"),
    Headline("eval/nll/all", "nll"),
    Headline("eval/kl/ensemble", "kl"),
    Headline("eval/agreement/ensemble", "agreement", "{:.3f}"),
    Headline("eval/forced_agreement/*/all", "forced *", "{:.3f}"),
)
"""In an evaluation's line; a declared one of the same metric takes its place."""
