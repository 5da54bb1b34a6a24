"""Numbers that are worth a place in the one line that people read; whoever computes a metric declares it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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
        if "*" not in self.metric:
            return [self._text(self.label, row[self.metric])] if self.metric in row else []
        begin, _, end = self.metric.partition("*")
        fitting = [name for name in row if name.startswith(begin) and name.endswith(end)]
        labels = [self.label.replace("*", name.removeprefix(begin).removesuffix(end)) for name in fitting]
        return [self._text(label, row[name]) for label, name in zip(labels, fitting, strict=True)]

    def _text(self, label: str, value: float) -> str:
        return f"{label} {self.form.format(value)}"


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
