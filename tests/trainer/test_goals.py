"""Runs that end when it is enough, and the weights that were best."""

import json

import pytest

from megatron_opd.config import TrainConfig
from megatron_opd.config.goals import condition, is_smaller_better
from megatron_opd.trainer.goals import Goals

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("loss < 0.5", [], False),
        ("loss < 0.5", [0.4, 0.5], False),
        ("loss < 0.5", [0.6, 0.49], True),
        ("  reward/mean   >  1e-1 ", [0.11], True),
        ("reward/mean > 0.1", [NAN], False),
        ("loss < 0.5", [-INF], True),
        ("eval/nll/all stalls 1", [2.0], False),
        ("eval/nll/all stalls 2", [2.0, 1.0, 1.5], False),
        ("eval/nll/all stalls 2", [2.0, 1.0, 1.5, 1.0], True),
        ("eval/nll/all stalls 2", [2.0, 1.0, 1.5, 0.9], False),
        ("eval/accuracy/all stalls 2", [0.5, 0.4, 0.3], True),
        ("eval/accuracy/all stalls 2", [0.3, 0.4, 0.5], False),
        ("eval/nll/all stalls 2", [NAN, 3.0, 2.0], False),
        ("eval/nll/all stalls 2", [3.0, NAN, NAN], True),
        ("eval/pass@4/all stalls 1", [0.5, 0.5], True),
    ],
)
def test_a_condition(text, values, holds):
    assert condition(text).holds(values) is holds


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("loss", "is no condition; write 'eval/kl/ensemble < 0.05'"),
        ("loss <= 1", "is no condition"),
        ("loss < much", "is no condition"),
        ("loss < nan", "nothing is above or below nan"),
        ("loss stalls 0", "a whole number of measurements"),
        ("loss stalls 1.5", "a whole number of measurements"),
        ("loss stalls inf", "a whole number of measurements"),
        ("entropy stalls 3", "it is not known whether a smaller or a larger 'entropy' is better"),
    ],
)
def test_what_is_no_condition(text, wrong):
    with pytest.raises(ValueError, match=wrong):
        condition(text)


@pytest.mark.parametrize("metric", ["eval/kl/ensemble", "kl/a", "eval/nll/all", "loss", "loss/distill", "mismatch/kl"])
def test_smaller_is_better(metric):
    assert is_smaller_better(metric)


@pytest.mark.parametrize("metric", ["eval/accuracy/all", "reward/mean", "eval/avg@8/a", "eval/forced_agreement/t/all"])
def test_larger_is_better(metric):
    assert not is_smaller_better(metric)


def goals(**train):
    return Goals(TrainConfig(steps=9, **train))


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("eval/kl/ensemble", [2.0, 1.0, 1.0, 1.5, 0.5], [0, 1, 4]),
        ("eval/accuracy/all", [0.0, 0.0, 0.5, 0.25, 0.75], [0, 2, 4]),
        ("eval/nll/all", [NAN, 3.0, INF, 2.0], [1, 3]),
    ],
)
def test_the_best_is_better_than_all_before(metric, values, best):
    found = goals(save_best=metric)
    for step, value in enumerate(values):
        found.feed({metric: value}, step)
    assert [step for step in range(len(values)) if found.is_best(step)] == best
    again = goals(save_best=metric)  # as a run that goes on knows them
    again.read({"step": step, metric: value} for step, value in enumerate(values[:-1]))
    again.feed({metric: values[-1]}, len(values) - 1)
    assert again.is_best(len(values) - 1) == (len(values) - 1 in best)


def test_a_step_without_the_metric_is_not_the_best():
    found = goals(save_best="eval/nll/all")
    found.feed({"loss": 1.0}, 3)
    assert not found.is_best(3)
    assert not goals()


def test_what_was_reached_is_said_with_its_value(tmp_path):
    found = goals(stop_when=["loss < 0.5", "eval/nll/all stalls 1"], save_best="eval/nll/all")
    found.feed({"loss": 0.25, "eval/nll/all": 2.0}, 1)
    assert found.reached() == "loss < 0.5 (it is 0.25)"
    found.feed({"loss": 0.75, "eval/nll/all": 2.5}, 2)
    assert found.reached() == "eval/nll/all stalls 1 (it is 2.5)"
    found.record_best(tmp_path, 1)
    assert json.loads((tmp_path / "best.json").read_text()) == {"metric": "eval/nll/all", "value": 2.0, "step": 1}


def test_a_metric_that_a_run_does_not_have_is_said_once_for_each_kind_of_row():
    found = goals(stop_when=["reward/maen > 0.5", "eval/nll/all < 1"], save_best="eval/accuracy/al")
    of_evaluation = found.feed({"eval/accuracy/all": 0.5}, 0, is_first=True)
    assert of_evaluation == [
        "warning: train.save_best: this evaluation has no metric 'eval/accuracy/al'; did you mean 'eval/accuracy/all'?",
        "warning: train.stop_when: this evaluation has no metric 'eval/nll/all'",
    ]
    of_step = found.feed({"reward/mean": 0.5, "loss": 1.0}, 1, is_first=True)
    assert of_step == ["warning: train.stop_when: this step has no metric 'reward/maen'; did you mean 'reward/mean'?"]
    assert found.feed({"loss": 1.0}, 2) == []
