"""Which runs there are, in which order, and which learning rate each method is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from statistics import fmean

from method_comparison.methods import Method
from method_comparison.runs import Case, Point, Setting, curve
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TUNING_SEED = 0


@dataclass(frozen=True, slots=True)
class Found:
    """What came out for one method."""

    method: Method
    setting: Setting
    lr: float
    tried: Mapping[float, list[Point]]
    """By learning rate, on the seed for tuning."""
    curves: Mapping[int, list[Point]]
    """By seed, at `lr`."""

    def reached(self) -> list[Point]:
        """Where each seed was when it reached the target; seeds that did not are left out."""
        points = (reach(points, self.setting.target) for points in self.curves.values())
        return [point for point in points if point is not None]


def reach(points: Sequence[Point], target: float) -> Point | None:
    """The first evaluation at or above the target."""
    return next((point for point in points if point.accuracy >= target), None)


def best(tried: Mapping[float, Sequence[Point]], target: float) -> float:
    """The learning rate that reaches the target first; of equal ones, the one that is better on the way."""

    def key(lr: float) -> tuple[float, float]:
        point = reach(tried[lr], target)
        return (point.step if point else math.inf, -fmean(point.accuracy for point in tried[lr]))

    return min(tried, key=key)


def compare(
    setting: Setting, methods: Sequence[Method], lrs: Sequence[float], seeds: Sequence[int], *, jobs: int
) -> list[Found]:
    """Run everything that has not been run yet. Raises ValueError when a run fails."""
    tuning = [Case(method, lr, TUNING_SEED) for method in methods for lr in lrs]
    with _progress() as progress:
        curves = _all(tuning, setting, jobs, progress, "learning rates")
        tried = {method.name: {lr: curves[Case(method, lr, TUNING_SEED)] for lr in lrs} for method in methods}
        chosen = {method.name: best(tried[method.name], setting.target) for method in methods}
        cases = [Case(method, chosen[method.name], seed) for method in methods for seed in seeds]
        curves = _all(cases, setting, jobs, progress, "seeds")
    return [
        Found(
            method=method,
            setting=setting,
            lr=chosen[method.name],
            tried=tried[method.name],
            curves={seed: curves[Case(method, chosen[method.name], seed)] for seed in seeds},
        )
        for method in methods
    ]


def _all(cases: Sequence[Case], setting: Setting, jobs: int, progress: Progress, what: str) -> dict[Case, list[Point]]:
    task = progress.add_task(what, total=len(cases))
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(curve, case, setting): case for case in cases}
        try:
            for done in as_completed(running):
                done.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {case: future.result() for future, case in running.items()}


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
