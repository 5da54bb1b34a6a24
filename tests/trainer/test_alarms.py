"""Warnings: on which side of a threshold, how many steps in a row, and once."""

import math
import re
from pathlib import Path

import pytest

from megatron_opd.config import RLConfig, RolloutConfig
from megatron_opd.trainer.alarms import ABOVE, COMMON, REWARDED, START, WAITED_FOR, Alarm, Bound, Watchman, alarms_of

EVERY = alarms_of(RLConfig(weight=1.0), RolloutConfig())
DOCS = Path(__file__).resolve().parents[2] / "docs"


def warnings(rows, alarms=EVERY):
    watchman = Watchman(alarms)
    return [(i, line) for i, row in enumerate(rows) for line in watchman.look(row)]


# First row; a later row that is just past all bounds; and, one by one, the same with one value on the other side.
CASES = {
    "mass": ({}, {"topk/math/mass_outside": 0.0501}, [{"topk/math/mass_outside": 0.05}]),
    "truncated": ({}, {"rollout/truncated_frac": 0.51}, [{"rollout/truncated_frac": 0.5}]),
    "broken": ({}, {"episode/broken_frac": 0.51}, [{"episode/broken_frac": 0.5}]),
    "no room": ({}, {"episode/ended/context": 0.51}, [{"episode/ended/context": 0.5}]),
    "empty": ({}, {"rollout/length": 1.49}, [{"rollout/length": 1.5}]),
    "same": ({}, {"rollout/most_common_frac": 0.91}, [{"rollout/most_common_frac": 0.9}]),
    "sure": (
        {},
        {"logprob/gap": 2.01, "perplexity/student": 1.049},
        [{"logprob/gap": 2.0}, {"perplexity/student": 1.05}],
    ),
    "shorter and further": (
        {"rollout/length": 100.0, "kl/ensemble": 0.5},
        {"rollout/length": 19.9, "kl/ensemble": 0.51},
        [{"rollout/length": 20.0}, {"kl/ensemble": 0.5}],
    ),
    "grading": ({}, {"time/grade": 5.1, "time/step": 10.0}, [{"time/grade": 5.0}, {"time/step": 10.2}]),
    "no contrast": ({}, {"reward/mixed_groups": 0.019}, [{"reward/mixed_groups": 0.02}]),
    "shorter and worse": (
        {"rollout/length": 100.0, "reward/mean": 0.5},
        {"rollout/length": 19.9, "reward/mean": 0.49},
        [{"rollout/length": 20.0}, {"reward/mean": 0.5}],
    ),
    "entropy": (
        {"entropy": 2.0, "reward/mean": 0.1},
        {"entropy": 0.099, "reward/mean": 0.89},
        [{"entropy": 0.1}, {"reward/mean": 0.9}],
    ),
}


def test_every_alarm_has_a_case():
    assert len(CASES) == len(EVERY) == len({alarm.text for alarm in EVERY})


@pytest.mark.parametrize(("case", "alarm"), zip(CASES.values(), EVERY, strict=True), ids=CASES)
def test_both_sides_of_each_threshold(case, alarm):
    first, past, others = case
    steps = [first] + [past] * alarm.steps
    ((step, said),) = warnings(steps)
    assert step == alarm.steps
    assert said.startswith("warning: ")
    for other in others:
        assert warnings([first] + [{**past, **other}] * alarm.steps) == []
    for name in past:  # nothing is said about what was not measured
        assert warnings([first] + [{k: v for k, v in past.items() if k != name}] * alarm.steps) == []
    assert warnings(steps[:-1]) == []


@pytest.mark.parametrize("alarm", EVERY, ids=CASES)
def test_a_warning_is_said_once(alarm):
    first, past, _ = list(CASES.values())[EVERY.index(alarm)]
    assert len(warnings([first, *[past] * 20, first, *[past] * 20])) == 1


def test_steps_must_follow_each_other():
    well, ill = {"rollout/truncated_frac": 0.1}, {"rollout/truncated_frac": 1.0}
    assert warnings([ill, ill, well, ill, ill]) == []
    assert [step for step, _ in warnings([ill, ill, well, ill, ill, ill])] == [5]


def test_each_teacher_is_warned_of_by_itself():
    said = warnings([{"topk/math/mass_outside": 0.14, "topk/code/mass_outside": 0.01},
                     {"topk/math/mass_outside": 0.14, "topk/code/mass_outside": 0.2}])  # fmt: skip
    assert [(step, re.findall(r"(\d+%).*teacher '(\w+)'", line)) for step, line in said] == [
        (0, [("14%", "math")]),
        (1, [("20%", "code")]),
    ]


def test_rewards_that_nobody_learns_from_raise_no_alarm():
    assert alarms_of(RLConfig(), RolloutConfig()) == (*COMMON, *WAITED_FOR)
    assert alarms_of(RLConfig(weight=1.0), RolloutConfig(max_staleness=1)) == (*COMMON, *REWARDED)
    assert warnings([{"reward/mixed_groups": 0.0}] * 9, alarms_of(RLConfig(), RolloutConfig())) == []


def test_the_start_is_the_first_step_that_was_seen():
    alarm = Alarm(bounds=(Bound("x", ABOVE, 2.0, START),), steps=1, text="{value:g}")
    assert warnings([{"x": 1.0}, {"x": 2.0}, {"x": 2.5}], [alarm]) == [(2, "warning: 2.5")]


@pytest.mark.parametrize("alarm", EVERY, ids=CASES)
def test_docs_have_the_metrics_and_their_limits(alarm):
    table = (DOCS / "metrics.md").read_text().partition("## Warnings")[2]
    for bound in alarm.bounds:
        metric, sign = bound.metric.replace("*", "<teacher>"), ">" if bound.is_past is ABOVE else "<"
        times = {START: " × its start", "": ""}.get(bound.times, f" × `{bound.times}`")
        assert f"`{metric}` {sign} {bound.limit:g}{times}" in table


@pytest.mark.parametrize("alarm", EVERY, ids=CASES)
def test_a_warning_names_settings_that_there_are(alarm):
    named = re.findall(r"\b(?:rollout|optim|data|rewards|environment|teachers\.N|rl|policy|loss)\.\w+", alarm.text)
    assert named
    reference = (DOCS / "config.md").read_text()
    for setting in named:
        assert f"| `{setting.rpartition('.')[2]}` |" in reference


def test_a_start_that_is_no_number_is_passed_over():
    rows = [{"rollout/length": math.nan, "kl/ensemble": 1.0}, {"rollout/length": 100.0, "kl/ensemble": 1.0}]
    later = [{"rollout/length": 5.0, "kl/ensemble": 2.0}] * 3
    assert [line for _, line in warnings([*rows, *later], COMMON) if "five times shorter" in line]
