"""How episodes in environments go: turns, calls of tools, why they end, tokens and rewards, over all replicas.

Sums of replicas are added up by what they are divided by, so a reason that only one of them has seen is a share of all.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from megatron_opd.core.episodes import episodes
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import Rollout
from megatron_opd.tracking.headline import Headline
from megatron_opd.tracking.tracker import Tracker
from megatron_opd.trainer.evaluate import ALL

EpisodeSums: TypeAlias = Counter[tuple[str, str]]
"""Sums by (number that they are divided by, name); those numbers themselves by (COUNT, which)."""
COUNT, EPISODES, CALLS = "count", "episodes", "calls"
BROKEN = ("failed", "timeout")
"""Ends that are the environment's fault."""
_TURNS = 8
"""Turns whose rewards have a metric."""
_TOLD = 3
"""Failures of environments that are said."""


def count(rollouts: Sequence[Rollout], *, has_rewards: bool = False) -> EpisodeSums:
    """The student's episodes in environments; `has_rewards`: also what each turn was rewarded with."""
    found: EpisodeSums = Counter()
    for its in episodes(rollouts):
        episode = [rollouts[i] for i in its]
        if episode[0].origin == "student" and episode[-1].log.ended:
            _add(found, episode, has_rewards=has_rewards)
    return found


def _add(found: EpisodeSums, episode: Sequence[Rollout], *, has_rewards: bool) -> None:
    log = episode[-1].log
    found[COUNT, EPISODES] += 1
    found[COUNT, CALLS] += log.calls
    learnt, behind = sum(r.num_learnt for r in episode), sum(len(r.token_ids) for r in episode)
    numbers = {"turns": log.turns, "calls": log.calls, "trajectories": len(episode), "policy_tokens": learnt}
    numbers |= {"environment_tokens": behind - learnt, "broken_frac": float(log.ended in BROKEN)}
    for name, value in {**numbers, f"ended/{log.ended}": 1}.items():
        found[EPISODES, f"episode/{name}"] += value
    found[CALLS, "episode/calls_failed_frac"] += sum(log.failures.values())
    for reason, times in log.failures.items():
        found[CALLS, f"episode/failed/{reason}"] += times
    own = {f"environment/{name}": value for name, value in log.info.items()}
    if has_rewards:
        own |= {f"episode/reward/turn_{n}": reward for n, reward in enumerate(log.rewards[:_TURNS], start=1)}
    for name, value in own.items():  # of the episodes that have it
        found[name, name] += value
        found[COUNT, name] += 1


def means(parts: Iterable[EpisodeSums]) -> dict[str, float]:
    """The metrics of all replicas' episodes together; without episodes none, and without calls none about them."""
    totals: EpisodeSums = Counter()
    for part in parts:
        for key, value in part.items():  # `update` would do; `+` would leave out what is not above 0
            totals[key] += value
    shares = [(name, value, totals[COUNT, of]) for (of, name), value in sorted(totals.items()) if of != COUNT]
    return {name: value / number for name, value, number in shares if number}


class Warnings:
    """Says what went wrong in environments, a few times in a process and nothing twice."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._said: set[str] = set()

    def say(self, replicas: Iterable[Sequence[str]]) -> None:
        """The new ones of all replicas' `troubles`."""
        for why in (why for replica in replicas for why in replica):
            if why not in self._said and len(self._said) < _TOLD:
                self._said.add(why)
                self._tracker.message(warning(why))


class EpisodeWatch:
    """Looks at the episodes of every step, where training prompts have environments."""

    def __init__(self, parallel: Parallel, tracker: Tracker, *, is_on: bool, has_rewards: bool) -> None:
        """`has_rewards` as of `count`."""
        self.parallel, self.tracker, self.is_on, self.has_rewards = parallel, tracker, is_on, has_rewards
        self._warnings = Warnings(tracker)

    def headlines(self) -> list[Headline]:
        """The figures of episodes that people see at every step."""
        shown = [Headline("episode/turns", "turns", "{:.2f}"), Headline("episode/calls", "calls", "{:.2f}")]
        return shown if self.is_on else []

    def look(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The metrics of a step's episodes. Says what went wrong in environments, a few times in a process and nothing
        twice. Collective where it is on."""
        if not self.is_on:
            return {}
        mine = count(rollouts, has_rewards=self.has_rewards), troubles(rollouts)
        parts, told = zip(*self.parallel.gather_leaders(mine), strict=True)
        self._warnings.say(told)
        return means(parts)


def troubles(rollouts: Sequence[Rollout]) -> list[str]:
    """The first few different failures of environments."""
    return list(dict.fromkeys(rollout.log.why for rollout in rollouts if rollout.log.why))[:_TOLD]


def warning(why: str) -> str:
    """The line for people about one of the `troubles`."""
    return f"warning: an environment failed, and its episode ended there: {why}"


def by_source(rollouts: Sequence[Rollout]) -> dict[str, EpisodeSums]:
    """As `count`, of the episodes of each source that has some, and of all."""
    its: dict[str, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        its[rollout.prompt.source].append(rollout)
    found = {source: count(of_source) for source, of_source in its.items()} | {ALL: count(rollouts)}
    return {source: totals for source, totals in found.items() if totals}


def of_held_out(parts: Sequence[Mapping[str, EpisodeSums]]) -> dict[str, float]:
    """`eval/<metric>/<source>`, also for the source `all`, of what `by_source` counted on each replica."""
    sources = dict.fromkeys(source for part in parts for source in part)
    by_name = {source: means(part[source] for part in parts if source in part) for source in sources}
    return {f"eval/{name}/{source}": value for source, found in by_name.items() for name, value in found.items()}
