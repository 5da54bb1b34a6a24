"""Counting right answers, by source and over all of them."""

from types import SimpleNamespace

import pytest

from megatron_opd.evaluate import accuracies, count_right, greedy
from megatron_opd.types import Prompt, Rollout

WORDS = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


def answered(source, answer, said):
    prompt = Prompt(source=source, index=0, text="?", token_ids=(1,), answer=answer)
    ids, zeros = tuple(map(ord, said)), (0,) * len(said)
    return Rollout(prompt=prompt, sample=0, response_ids=ids, logps=zeros, finish="stop", versions=zeros)


def test_an_answer_is_right_when_it_is_the_reference():
    rollouts = [
        answered("a", "12", "12"),
        answered("a", "12", " 12\n"),
        answered("a", " 12 ", "12"),
        answered("a", "12", "123"),
        answered("a", "12", ""),
        answered("b", "", ""),
    ]
    assert count_right(rollouts, WORDS) == {"a": (3, 5), "b": (1, 1)}


def test_accuracies_weigh_answers_not_sources_or_replicas():
    parts = [{"a": (1, 2), "b": (0, 1)}, {}, {"a": (3, 3)}]
    assert accuracies(parts, "x") == pytest.approx({"x/a": 4 / 5, "x/b": 0.0, "x/all": 4 / 6})
    assert accuracies([], "x") == {}


def test_greedy_is_at_temperature_0_and_asks_for_nothing_when_there_is_nothing():
    asked = []
    engine = SimpleNamespace(generate=lambda prompts, sampling: asked.append((prompts, sampling)) or prompts)
    assert greedy(engine, [], max_new_tokens=3) == []
    assert greedy(engine, ["p"], max_new_tokens=3) == ["p"]
    ((_, sampling),) = asked
    assert (sampling.temperature, sampling.max_new_tokens, sampling.samples_per_prompt) == (0.0, 3, 1)
