"""Checks of train.save_best and train.stop_when."""

from __future__ import annotations

from collections.abc import Callable

from megatron_opd.config import DataConfig, TrainConfig, goals


def check_goals(train: TrainConfig, data: DataConfig) -> list[str]:
    """Conditions that cannot be read, and metrics that the run will not have."""
    problems, evaluated = [], bool(train.eval_every and data.eval)
    asked = [("train.save_best", train.save_best)] if train.save_best else []
    if train.save_best:
        problems += _problem("train.save_best", goals.is_smaller_better, train.save_best)
        if not train.save_best.startswith("eval/"):
            problems.append(f"train.save_best: '{train.save_best}' is no metric of an evaluation (eval/…)")
    for i, text in enumerate(train.stop_when):
        if wrong := _problem(f"train.stop_when.{i}", goals.condition, text):
            problems += wrong
        else:
            asked.append((f"train.stop_when.{i}", goals.condition(text).metric))
    if not evaluated:
        needed = "which this run does not make; set train.eval_every and data.eval"
        problems += [
            f"{s}: {name} is a metric of evaluations, {needed}" for s, name in asked if name.startswith("eval/")
        ]
    return problems


def _problem(setting: str, read: Callable[[str], object], text: str) -> list[str]:
    try:
        read(text)
    except ValueError as error:
        return [f"{setting}: {error}"]
    return []
