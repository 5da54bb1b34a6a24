"""What counts once for an episode of several trajectories: its reward, its share in metrics, its line in a table."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_completions import NO_TEACHER, completions

from megatron_opd import config as c
from megatron_opd.core.batching import pack
from megatron_opd.core.types import Prompt
from megatron_opd.rewards.grading import Grader
from megatron_opd.trainer import advantages, step_metrics
from megatron_opd.trainer.evaluate import Evaluator

ALONE = SimpleNamespace(gather_leaders=lambda value: [value])
WORDS = SimpleNamespace(
    decode=lambda ids: "".join(map(chr, ids)), hf=SimpleNamespace(get_vocab=dict, all_special_ids=[])
)


def trajectory(turns, *, part=0, index=0, sample=0, **changes):
    """From (text, whether it is learnt) pairs; the row's answer is "yes"."""
    ids = [ord(letter) for text, _ in turns for letter in text]
    learnt = [is_learnt for text, is_learnt in turns for _ in text]
    made = tiny.rollout((1,), ids, learnt=learnt, part=part, sample=sample, **changes)
    return replace(made, prompt=Prompt(source="a", index=index, text="?", token_ids=(1, part + 1), answer="yes"))


def two_episodes():
    """The first has two trajectories and is right in its last turn; the second is wrong and was cut."""
    first = [trajectory([("no", 1), ("?", 0)]), trajectory([("no?", 0), ("look", 1), ("seen", 0), ("yes", 1)], part=1)]
    return [*first, trajectory([("yes", 1), ("sure?", 0), ("no", 1)], index=1, finish="length")]


def test_the_reward_is_of_the_last_turn_and_shared():
    sources = [c.SourceConfig(name="a", path="", reward="exact")]
    assert Grader(sources, c.RewardsConfig(), WORDS).grade(two_episodes()) == [1, 1, 0]


def test_evaluation_counts_episodes():
    settings = tiny.config("unused", [], rollout={"max_new_tokens": 3, "temperature": 0.7})
    sources = [c.SourceConfig(name="a", path="", reward="exact")]
    data = c.DataConfig(train=[], eval=sources)
    drawn = [replace(r, sample=s) for s in (0, 1) for r in two_episodes()[:2]] + two_episodes()[2:] * 2
    engine = SimpleNamespace(
        generate=lambda prompts, how, told: drawn if how.samples_per_prompt == 2 else two_episodes()
    )
    rollouts, tally = Evaluator(data, settings.rewards, settings.rollout, settings.run, WORDS).answer(
        engine, [None, None], samples=2
    )
    assert len(rollouts) == 3  # teachers are asked about every trajectory
    assert tally["accuracy", "a"] == (1, 2)
    assert tally["avg@2", "a"] == (1, 2)
    assert tally["pass@2", "a"] == (1, 2)


def test_lengths_are_learnt_tokens_of_episodes():
    made = [*two_episodes(), trajectory([("abc", 0), ("abcd", 1)], index=2, origin="dataset")]
    found = step_metrics.of_rollouts(made, ALONE, version=3, is_mixed=True)
    assert found == {
        "rollout/length": (2 + 7 + 5) / 2,
        "rollout/truncated_frac": 0.5,
        "rollout/version_lag": 3.0,
        "answers/student_frac": 2 / 3,
        "answers/length_others": 4.0,
    }


def test_a_table_has_a_line_a_trajectory(tmp_path):
    completions(tmp_path).log([trajectory([("ab", 0), ("c", 1)])], 1, *NO_TEACHER)
    (row,) = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert len(row["response"]) == 3
    assert row["length"] == 1


@pytest.mark.parametrize("settings", [{"kl_discount": 1.0}, {"kl_discount": 0.5, "kl_from": "next"},
                                      {"kl_discount": 1.0, "kl_length_norm": True}])  # fmt: skip
def test_returns_skip_context(settings):
    """To the end of the trajectory, over its learnt tokens."""
    how = c.PolicyConfig(kl_coef=1.0, **settings)
    rollouts = [tiny.masked(r, 1) for r in tiny.rollouts(count=5)]
    (batch,) = pack(rollouts, micro_batch_size=5, length_multiple=1, device=torch.device("cpu"))
    logp_T = torch.linspace(-4, -1, len(batch.targets_T))
    found = advantages.from_teachers(logp_T, batch.behaviour_logp_T, batch.sequence_T, how)
    at, wanted = 0, []
    for rollout in rollouts:
        x = [float(logp_T[at + i]) - b for i, b in enumerate(rollout.logps)]
        at += len(x)
        values = [sum(how.kl_discount**k * x[t + k] for k in range(len(x) - t)) for t in range(len(x))]
        if how.kl_length_norm:
            values = [v / (len(x) - t) for t, v in enumerate(values)]
        wanted += [*values[1:], 0.0] if how.kl_from == "next" else values
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=1e-5)
