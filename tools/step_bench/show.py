"""Results for people and for other programs: tables, a plot, a file that results are added to, a comparison."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import tool
from rich.console import Console
from rich.table import Table
from step_bench.cases import Case

Found = dict[str, Any]
_STAGES = ("generate", "score", "step", "settle", "sync")


def planned(cases: Sequence[Case]) -> None:
    """What is about to run."""
    table = _table("cases (tensor x pipeline x data, teachers)", "case", "ranks", "prompts a step", "steps")
    for case in cases:
        prompts = case.config().rollout.prompts_per_step
        table.add_row(case.name, str(case.ranks), str(prompts), str(case.total_steps))
    _console().print(table)


def results(found: Sequence[Found]) -> None:
    """Medians, with the spread of the repeats in tokens a second."""
    first = found[0]
    columns = ["tokens/s", "spread", "scaling", *(f"{s}, ms" for s in _STAGES), "hidden", "sent", "peak", "MFU"]
    table = _table("a step: medians of the repeats", "case", *columns)
    for one in found:
        rates = one["tokens_per_s"]
        linear = median(first["tokens_per_s"]) * one["ranks"] / first["ranks"]
        stages = [median(stage.get(name, 0.0) for stage in one["stages"]) for name in _STAGES]
        hidden = [h for h in one["hidden"] if h is not None]
        table.add_row(
            one["name"],
            f"{median(rates):,.1f}",
            f"{spread(rates):.0%}",
            f"{median(rates) / linear:.2f}",
            *(f"{1000 * seconds:,.1f}" if seconds else "-" for seconds in stages),
            f"{median(hidden):.0%}" if hidden else "-",
            tool.gigabytes(sum(one["bytes"].values())),
            tool.gigabytes(one["peak_bytes"]),
            f"{median(one['mfu']):.1%}" if one["mfu"] else "-",
        )
    _console().print(table)
    print("spread: (largest - smallest) / median. scaling: tokens a second and rank, of the first case's.")
    print("hidden: sampling that nobody waited for. sent: payload that all ranks give to collectives in a step.")


def spread(values: Sequence[float]) -> float:
    """How far repeats lie apart."""
    return (max(values) - min(values)) / median(values)


def read(path: str) -> list[Found]:
    """The cases in a --json file. Raises ValueError for another file."""
    try:
        cases = json.loads(Path(path).read_text())["cases"]
        return [dict(case) for case in cases if case["tokens_per_s"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this tool: {error!r}") from None


def add(path: str, found: Sequence[Found]) -> list[Found]:
    """Write the results to a file, in place of older ones of the same cases; returns all that are there."""
    old = read(path) if Path(path).exists() else []
    names = {one["name"] for one in found}
    everything = [*(one for one in old if one["name"] not in names), *found]
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps({"cases": everything}, indent=2) + "\n")
    temporary.replace(path)
    return everything


def compare(before: Sequence[Found], after: Sequence[Found]) -> None:
    """Tokens a second of the cases that both have. A difference counts where no repeat of one reaches the other's."""
    old = {one["name"]: one for one in before}
    both = [(old[one["name"]], one) for one in after if one["name"] in old]
    if not both:
        raise ValueError("the two files have no case in common")
    commits = [case["about"]["commit"] for case in both[0]]
    table = _table(f"tokens a second, {commits[0]} -> {commits[1]}", "case", "before", "after", "ratio", "so it is")
    for one, other in both:
        a, b = one["tokens_per_s"], other["tokens_per_s"]
        table.add_row(one["name"], _ranged(a), _ranged(b), f"{median(b) / median(a):.3f}", verdict(a, b))
    _console().print(table)
    missing = sorted({one["name"] for one in [*before, *after]} - {one["name"] for one, _ in both})
    if missing:
        print(f"in one file only: {'; '.join(missing)}")


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    """What two sets of repeats say."""
    if min(after) > max(before):
        return "faster"
    return "slower" if max(after) < min(before) else "within the noise"


def plot(found: Sequence[Found], path: str) -> None:
    """Tokens a second over ranks, with the range of the repeats, and the time of a step by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rates, times) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    kinds = dict.fromkeys(re.sub(r"^\S+, ", "", one["name"]) for one in found)
    for kind in kinds:
        mine = sorted((one for one in found if one["name"].endswith(f", {kind}")), key=lambda one: one["ranks"])
        middle = [median(one["tokens_per_s"]) for one in mine]
        low = [m - min(one["tokens_per_s"]) for m, one in zip(middle, mine, strict=True)]
        high = [max(one["tokens_per_s"]) - m for m, one in zip(middle, mine, strict=True)]
        rates.errorbar([one["ranks"] for one in mine], middle, yerr=[low, high], fmt="o-", capsize=3, label=kind)
    rates.set(xlabel="ranks", ylabel="response tokens a second", ylim=(0, None))
    rates.legend(fontsize="small")
    names, left = [one["name"] for one in found], [0.0] * len(found)
    for stage in _STAGES:
        seconds = [median(s.get(stage, 0.0) for s in one["stages"]) for one in found]
        times.barh(names, seconds, left=left, label=stage)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    times.set(xlabel="seconds a step")
    times.invert_yaxis()
    times.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ranged(values: Sequence[float]) -> str:
    return f"{median(values):,.1f} [{min(values):,.1f}, {max(values):,.1f}]"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _console() -> Console:
    wide = Console()
    return wide if wide.is_terminal else Console(width=180)
