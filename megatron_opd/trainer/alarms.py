"""Warnings about a run that cannot get where it is to go: a table of conditions on metrics, each said once.

A warning says what was seen, what it means, and which setting to change. docs/metrics.md lists them with their
thresholds.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_opd.config import RLConfig, RolloutConfig
from megatron_opd.tracking.headline import fitting

ABOVE, BELOW = operator.gt, operator.lt
START = "start"
"""The metric's own value at the first step where this process saw a finite one."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A comparison of a metric with a number."""

    metric: str
    """A name; with a * the alarm is about each metric that it fits, one by one."""
    is_past: Callable[[float, float], bool]
    """ABOVE or BELOW."""
    limit: float
    times: str = ""
    """The number that `limit` is a factor of: START, or another metric of the step. Empty: 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """Something that goes wrong when all bounds are past, `steps` steps in a row."""

    bounds: tuple[Bound, ...]
    steps: int = 3
    text: str
    """The warning. {value} and {metric} are of the first bound; {name} is what its * stands for."""


COMMON = (
    Alarm(
        bounds=(Bound("topk/*/mass_outside", ABOVE, 0.05),),
        steps=1,
        text="{value:.0%} of the probability of teacher '{name}' is not in its list of top-k tokens ({metric}): the"
        " student does not learn it, and kl/{name} is a lower bound. Raise teachers.N.top_k, or use carrier: hidden",
    ),
    Alarm(
        bounds=(Bound("rollout/truncated_frac", ABOVE, 0.5),),
        text="{value:.0%} of the answers are cut at rollout.max_new_tokens ({metric}): the student is not shown how to"
        " end, and a reward grades half an answer. Raise rollout.max_new_tokens, unless beginnings are what you want",
    ),
    Alarm(
        bounds=(Bound("episode/broken_frac", ABOVE, 0.5),),
        text="{value:.0%} of the episodes end because their environment fails or takes too long ({metric};"
        " episode/ended/failed and /timeout tell them apart): what is learnt there are torn conversations. Repair the"
        " environment, or raise environment.turn_timeout_s",
    ),
    Alarm(
        bounds=(Bound("episode/ended/context", ABOVE, 0.5),),
        text="{value:.0%} of the episodes end because no token more fits ({metric}). Raise environment.max_tokens, or"
        " lower environment.output_tokens or environment.max_turns",
    ),
    Alarm(
        bounds=(Bound("rollout/length", BELOW, 1.5),),
        text="answers are empty ({metric} {value:.3g}, the end alone): there is nothing to learn from. Look whether"
        " prompts need data.chat_template; if it began in training, lower optim.lr and go on from an older checkpoint",
    ),
    Alarm(
        bounds=(Bound("rollout/most_common_frac", ABOVE, 0.9),),
        text="{value:.0%} of the answers of a step are the same one ({metric}), whatever the prompt. Unless your data"
        " want it, the student has collapsed: lower optim.lr or raise rollout.temperature, from an older checkpoint on",
    ),
    Alarm(
        bounds=(Bound("logprob/gap", ABOVE, 2.0), Bound("perplexity/student", BELOW, 1.05)),
        text="the student is sure of answers that its teachers find unlikely ({metric} {value:.3g} nats a token,"
        " perplexity/student near 1): it has collapsed. Lower optim.lr, or raise rollout.temperature",
    ),
    Alarm(
        bounds=(Bound("rollout/length", BELOW, 0.2, START), Bound("kl/ensemble", ABOVE, 1.0, START)),
        text="answers have become five times shorter ({metric} {value:.3g}), and the student is further from its"
        " teachers than it was: it has collapsed. Lower optim.lr, and go on from an older checkpoint",
    ),
)
"""Alarms of every run."""
WAITED_FOR = (
    Alarm(
        bounds=(Bound("time/grade", ABOVE, 0.5, "time/step"),),
        text="grading takes {value:.3g} s a step ({metric}), more than half of what the update takes. Raise"
        " rewards.code_workers; where nothing learns from rewards, rewards.watch: false turns them off",
    ),
)
"""Alarms about stages that a step waits for."""
REWARDED = (
    Alarm(
        bounds=(Bound("reward/mixed_groups", BELOW, 0.02),),
        text="no prompt has answers of different rewards ({metric} {value:.3g}): all advantages are 0, so rewards teach"
        " nothing. Raise rollout.samples_per_prompt or rollout.temperature, or take easier or harder prompts",
    ),
    Alarm(
        bounds=(Bound("rollout/length", BELOW, 0.2, START), Bound("reward/mean", BELOW, 1.0, START)),
        text="answers have become five times shorter ({metric} {value:.3g}) and worse: the student has collapsed. Lower"
        " optim.lr or rl.weight, or keep it near a teacher by loss.weight",
    ),
    Alarm(
        bounds=(Bound("entropy", BELOW, 0.05, START), Bound("reward/mean", BELOW, 0.9)),
        text="the student has all but stopped to vary its answers ({metric} {value:.3g}) before it solves the task: it"
        " has collapsed. Raise rollout.temperature or policy.clip_high, or lower optim.lr",
    ),
)
"""Alarms about rewards that are learnt from."""


def alarms_of(rl: RLConfig, rollout: RolloutConfig) -> tuple[Alarm, ...]:
    """The alarms of a run. Sampled ahead, answers are graded beside the update, and nothing waits for that."""
    return (*COMMON, *(() if rollout.max_staleness else WAITED_FOR), *(REWARDED if rl.weight > 0 else ()))


class Watchman:
    """Looks at the metrics of every step."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        self.alarms = alarms
        self._start: dict[str, float] = {}
        self._row: dict[tuple[int, str], int] = {}
        """Steps in a row, by alarm and metric."""
        self._said: set[tuple[int, str]] = set()

    def look(self, row: Mapping[str, float]) -> list[str]:
        """The warnings of a step, which are not said again."""
        for name, value in row.items():
            if math.isfinite(value):
                self._start.setdefault(name, value)
        return [text for i, alarm in enumerate(self.alarms) for text in self._of(i, alarm, row)]

    def _of(self, i: int, alarm: Alarm, row: Mapping[str, float]) -> Iterator[str]:
        first, *others = alarm.bounds
        for metric, name in fitting(first.metric, row).items():
            at = i, metric
            is_past = self._is_past(first, metric, row) and all(self._is_past(b, b.metric, row) for b in others)
            self._row[at] = self._row.get(at, 0) + 1 if is_past else 0
            if self._row[at] >= alarm.steps and at not in self._said:
                self._said.add(at)
                yield "warning: " + alarm.text.format(value=row[metric], metric=metric, name=name)

    def _is_past(self, bound: Bound, metric: str, row: Mapping[str, float]) -> bool:
        if metric not in row:
            return False
        of = {"": 1.0, START: self._start.get(metric)}.get(bound.times)
        if of is None and (of := row.get(bound.times)) is None:
            return False
        return bound.is_past(row[metric], bound.limit * of)
