"""The stream of prompts: its mixture, its epochs, how it goes on from a saved state. Reading: test_preflight.py."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest

from megatron_opd.config import SourceConfig
from megatron_opd.data import PromptMix, read_prompts
from megatron_opd.rewards.exact import REWARD
from megatron_opd.types import Prompt


def source(name, size, weight=1.0):
    prompts = [Prompt(source=name, index=i, text=f"{name}{i}", token_ids=(i,), answer=None) for i in range(size)]
    return SourceConfig(name=name, path=f"{name}.jsonl", weight=weight), prompts


def texts(prompts):
    return [p.text for p in prompts]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 2, 4), (0.1, 0.7, 0.2), (5, 1, 1, 1), (1,)])
def test_every_prefix_follows_the_weights(weights):
    mix = PromptMix([source(f"s{i}", 7 + i, weight) for i, weight in enumerate(weights)], seed=1)
    given = Counter()
    for count in range(1, 201):
        (prompt,) = mix.next(1)
        given[prompt.source] += 1
        for i, weight in enumerate(weights):
            assert abs(given[f"s{i}"] - count * weight / sum(weights)) < 1


def test_epochs_are_different_permutations():
    mix = PromptMix([source("a", 20), source("b", 3)], seed=1)
    of_a = [p.index for p in mix.next(160) if p.source == "a"]
    epochs = [of_a[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_the_stream_depends_on_the_seed_alone():
    def stream(seed, *sizes):
        mix = PromptMix([source("a", 20), source("b", 9, weight=2)], seed=seed)
        return [text for size in sizes for text in texts(mix.next(size))]

    assert stream(1, 90) == stream(1, 30, 30, 30) == stream(1, 1, 89)
    assert stream(1, 90) != stream(2, 90)


@pytest.mark.parametrize("before", [0, 1, 19, 20, 21, 57])
def test_state_continues_exactly(before):
    sources = [source("a", 20), source("b", 9, weight=2)]
    whole, first, second = (PromptMix(sources, seed=1) for _ in range(3))
    expected = texts(whole.next(before + 60))
    first.next(before)
    second.load_state(first.state())
    assert texts(second.next(60)) == expected[before:]


def test_state_with_sources_that_came_and_went():
    mix = PromptMix([source("a", 5), source("b", 5)], seed=1)
    mix.load_state({"a": 4, "gone": 9})
    assert mix.state() == {"a": 4, "b": 0}
    assert [p.source for p in mix.next(4)] == ["b"] * 4  # until it has caught up


def test_order_within_a_source_does_not_depend_on_the_others():
    alone = texts(PromptMix([source("a", 20)], seed=1).next(20))
    together = PromptMix([source("z", 3), source("a", 20)], seed=1).next(40)
    assert [p.text for p in together if p.source == "a"] == alone


def test_reading_keeps_order_and_numbers_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one", "answer": "1", "more": [1]}\n\n{"prompt": "zwei ü"}')
    words = SimpleNamespace(encode=lambda text: list(text.encode()))
    prompts = read_prompts(
        SourceConfig(name="n", path=str(path)), words, limit=(9, "it"), reward=REWARD, is_graded=False
    )
    assert [(p.source, p.index, p.text, p.answer) for p in prompts] == [("n", 0, "one", "1"), ("n", 2, "zwei ü", None)]
    assert prompts[0].token_ids == tuple(b"one")
