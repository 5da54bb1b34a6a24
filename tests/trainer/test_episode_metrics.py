"""How episodes in environments went, in numbers: over replicas, by reason, by source; and what counts once for each."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny

from megatron_opd import config as c
from megatron_opd.core.episodes import once_an_episode
from megatron_opd.core.types import PLAIN, EpisodeLog
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.grading import Grader, Watcher
from megatron_opd.tracking.phase import Phase
from megatron_opd.trainer import episode_metrics
from megatron_opd.trainer.finished import Finished

LOG = EpisodeLog(
    turns=3, calls=2, failures={"not_json": 1}, ended="answered", rewards=(0.0, 0.5, 0.25), info={"moves": 4.0}
)
FAILED = EpisodeLog(turns=1, calls=2, failures={"timeout": 2}, ended="timeout", rewards=(-1.0,))
DONE = EpisodeLog(turns=2, calls=0, ended="done", rewards=(0.0, 1.0), info={"moves": 2.0, "lost": 1.0})


def episode(log, *, source="a", index=0, origin="student"):
    """Of two trajectories: 2 learnt tokens and 3 others, then 1 and 1."""
    place = {"source": source, "index": index}
    parts = [
        tiny.rollout((1, 2), (3, 4, 5, 6, 7), learnt=(1, 0, 0, 1, 0), **place),
        tiny.rollout((1, 9), (3, 4), learnt=(1, 0), part=1, **place),
    ]
    return [replace(part, log=log, origin=origin) for part in parts]


def of(*replicas, **how):
    """The metrics of replicas' rollouts, as each of them has them."""
    return episode_metrics.means([episode_metrics.count(rollouts, **how) for rollouts in replicas])


def test_numbers_of_all_replicas():
    found = of([*episode(LOG), *episode(FAILED, index=1)], [*episode(DONE), tiny.rollout((1,), (2,))])
    assert found == pytest.approx(
        {
            "episode/turns": 2.0,
            "episode/calls": 4 / 3,
            "episode/trajectories": 2.0,
            "episode/policy_tokens": 3.0,
            "episode/environment_tokens": 4.0,
            "episode/calls_failed_frac": 3 / 4,
            "episode/failed/not_json": 1 / 4,
            "episode/failed/timeout": 2 / 4,
            "episode/ended/answered": 1 / 3,
            "episode/ended/timeout": 1 / 3,
            "episode/ended/done": 1 / 3,
            "episode/broken_frac": 1 / 3,
            "environment/moves": 3.0,  # of the episodes that have it
            "environment/lost": 1.0,
        }
    )


def test_rewards_by_turn():
    found = of([*episode(LOG), *episode(FAILED)], episode(DONE), has_rewards=True)
    turns = {name.rpartition("_")[2]: value for name, value in found.items() if "/reward/" in name}
    assert turns == pytest.approx({"1": -1 / 3, "2": 0.75, "3": 0.25})
    long = EpisodeLog(turns=30, ended="max_turns", rewards=(1.0,) * 30)
    assert sum("/reward/" in name for name in of(episode(long), has_rewards=True)) == 8


def test_plain_answers_and_those_of_others_have_no_episodes():
    assert of([tiny.rollout((1,), (2,))], episode(LOG, origin="teacher")) == {}


def test_calls_that_nobody_made_have_no_shares():
    found = of(episode(DONE))
    assert found["episode/calls"] == 0
    assert "episode/calls_failed_frac" not in found


def test_held_out_ones_by_source():
    parts = [episode_metrics.by_source(r) for r in ([*episode(LOG), *episode(DONE, source="b")], episode(FAILED))]
    found = episode_metrics.of_held_out([*parts, episode_metrics.by_source([tiny.rollout((1,), (2,))])])
    assert (found["eval/episode/turns/a"], found["eval/episode/turns/b"]) == (2.0, 2.0)
    assert found["eval/episode/turns/all"] == 2.0
    assert found["eval/episode/ended/timeout/a"] == 0.5
    assert found["eval/environment/moves/all"] == 3.0
    assert episode_metrics.of_held_out([{}]) == {}


def test_what_went_wrong_first():
    answers = [one for why in ("a", "", "b", "a", "c", "d") for one in episode(replace(FAILED, why=why))]
    assert episode_metrics.troubles(answers) == ["a", "b", "c"]


def test_failures_of_environments_are_said_a_few_times():
    alone = SimpleNamespace(gather_leaders=lambda mine: [mine, mine])
    said = []
    tracker = SimpleNamespace(message=said.append)
    watch = episode_metrics.EpisodeWatch(alone, tracker, is_on=True, has_rewards=False)
    metrics = watch.look([*episode(replace(FAILED, why="no 1")), *episode(DONE)])
    assert metrics["episode/broken_frac"] == 0.5
    assert said == ["warning: an environment failed, and its episode ended there: no 1"]
    watch.look(episode(replace(FAILED, why="no 1")))
    assert len(said) == 1
    for whys in (range(9), range(20, 29)):
        watch.look([r for i in whys for r in episode(replace(FAILED, why=f"no {i}"))])
        assert len(said) == len(set(said)) == 3
    assert [headline.metric for headline in watch.headlines()] == ["episode/turns", "episode/calls"]


def test_without_environments_nothing_is_gathered():
    watch = episode_metrics.EpisodeWatch(None, None, is_on=False, has_rewards=False)
    assert watch.look(episode(DONE)) == {}
    assert watch.headlines() == []


def test_an_episode_is_counted_once():
    finished, phase, told = Finished(), Phase("sampling", 2, show=lambda _: None), []
    for one in (lambda: finished.add(3), lambda: told.append(1)):
        receive = once_an_episode(one)
        for rollout in [*episode(LOG), *episode(DONE)]:
            receive(rollout)
    with finished.told_to(phase, 3):
        assert (phase.done, len(told)) == (2, 2)


def test_the_reward_of_an_environment():
    sources = [c.SourceConfig(name="a", path="", reward="environment")]
    grade = Grader(sources, c.RewardsConfig(), NO_TEXT).grade
    assert grade([*episode(LOG), *episode(FAILED, index=1), *episode(DONE, index=2)]) == [0.75] * 2 + [0] * 2 + [1] * 2
    much = replace(DONE, rewards=(3.0, -0.5))
    assert grade(episode(much)) == [1, 1]
    assert grade(episode(replace(DONE, rewards=(float("nan"),)))) == [0, 0]
    assert grade(episode(replace(DONE, rewards=()))) == [0, 0]


def test_a_plain_answer_has_no_reward_of_an_environment():
    sources = [c.SourceConfig(name="a", path="", reward="environment")]
    with pytest.raises(ValueError, match="this answer was given in none"):
        Grader(sources, c.RewardsConfig(), NO_TEXT).grade(episode(PLAIN))
    watcher = Watcher(sources, c.RewardsConfig(), NO_TEXT)
    assert watcher.grade(episode(PLAIN)) == [None, None]
    assert "given in none" in watcher.news()[0]
    with pytest.raises(ValueError, match="a text alone"):
        build_reward("environment").grade([(episode(LOG)[0].prompt, "text")])


NO_TEXT = SimpleNamespace(hf=SimpleNamespace(get_vocab=dict, chat_template=None))
"""A tokenizer that nobody asks for texts."""
