"""Where engines differ in the log-probabilities of the same tokens: in numbers, a line, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Scored = list[list[float]]
"""Log-probability in nats of every token but the first, by prompt."""


def differences(a: Scored, b: Scored) -> Scored:
    """a - b, token by token."""
    return [[x - y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]


def summary(found: Scored, ids: Sequence[Sequence[int]], scored: dict[str, Scored], name: str) -> dict[str, Any]:
    """Mean and largest |Δ| of a pair "a - b" of `scored`, and where the largest is. What is no number is infinite."""
    sizes = [math.inf if math.isnan(d) else abs(d) for prompt in found for d in prompt]
    where = [(i, s) for i, prompt in enumerate(found) for s in range(len(prompt))]
    prompt, position = where[sizes.index(max(sizes))]
    first, second = name.split(" - ")
    return {
        "mean": sum(sizes) / len(sizes),
        "max": max(sizes),
        "worst": {
            "prompt": prompt,
            "position": position + 1,
            "token": ids[prompt][position + 1],
            first: scored[first][prompt][position],
            second: scored[second][prompt][position],
        },
    }


def line(name: str, found: dict[str, Any]) -> str:
    """A line about a summary, for people."""
    worst = found["worst"]
    where = f"prompt {worst['prompt']}, position {worst['position']}, token {worst['token']} {worst['text']!r}"
    return f"{name}: mean |Δ| {found['mean']:.3g}, max |Δ| {found['max']:.3g} at {where}"


def plot(pairs: dict[str, Scored], path: Path) -> None:
    """Draw the pairs' |Δ| by position, and how they are distributed, to a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_position, by_size) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name, found in pairs.items():
        points = [(s + 1, max(abs(d), 1e-9)) for prompt in found for s, d in enumerate(prompt)]
        positions, sizes = zip(*points, strict=True)
        by_position.plot(positions, sizes, ".", markersize=3, alpha=0.6, label=name)
        by_size.plot(sorted(sizes), [(i + 1) / len(sizes) for i in range(len(sizes))], label=name)
    by_position.set(yscale="log", xlabel="position", ylabel="|Δ log-probability|", title="every token")
    by_size.set(xscale="log", xlabel="|Δ log-probability|", ylabel="fraction of tokens below", title="distribution")
    by_position.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
