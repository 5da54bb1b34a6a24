"""An answer on the console: what people read, and nothing that a terminal obeys."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch

from megatron_opd import config as c
from megatron_opd.core.batching import pack
from megatron_opd.core.scores import Sampled
from megatron_opd.core.types import EpisodeLog
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.trainer import shown_answer
from megatron_opd.trainer.completions import Completions

PLACE = {"is_main": True, "is_last_stage": True, "data_rank": 0}


def rollout(**changes):
    made = replace(tiny.rollout((1, 2), (3, 4), source="gsm8k", index=7), logps=(-0.5, -1.0), **changes)
    return replace(made, prompt=replace(made.prompt, text="How many?"))


def test_prompt_answer_reward_and_distances():
    told = {"math": -4.5, "code": None}
    assert shown_answer.lines(rollout(reward=0.5), "Nine.\nOr ten.", told) == [
        "answer to gsm8k, row 8  reward 0.5  2 tokens  logprob a token: student -0.75  math -2.25 (kl 1.5)",
        "  prompt: How many?",
        "  answer: Nine.⏎Or ten.",
    ]


def test_an_answer_that_was_cut_and_one_of_somebody_else():
    assert shown_answer.lines(rollout(finish="length"), "", {})[0].endswith(
        "2 tokens, cut  logprob a token: student -0.75"
    )
    assert (
        shown_answer.lines(rollout(origin="teacher"), "", {})[0] == "answer to gsm8k, row 8  by the teacher  2 tokens"
    )


@pytest.mark.parametrize(
    "letter",
    ["\x1b", "\x9b", "\x00", "\x07", "\x08", "\x7f", "\u202e", "\u2066", "\ud800", "\ue000", "\u200b", "\U000e0041"],
)
def test_nothing_that_a_terminal_obeys(letter):
    shown = shown_answer.printable(f"a{letter}[31mb", 99)
    assert shown == "a\N{REPLACEMENT CHARACTER}[31mb"
    shown.encode()


def test_letters_of_all_languages_stay():
    assert shown_answer.printable("Grüße 中文 عربي 🙂 ∑ₙ", 99) == "Grüße 中文 عربي 🙂 ∑ₙ"
    assert shown_answer.printable("a\tb\r\nc", 99) == "a b⏎⏎c"


def test_long_texts_are_cut_an_answer_at_its_end_a_prompt_in_its_middle():
    assert shown_answer.printable("x" * 10, 10) == "x" * 10
    assert shown_answer.printable("abcdefghijk", 4) == "abcd …"
    assert shown_answer.printable("abcdefghijk", 4, keep_end=True) == "ab … jk"
    assert max(map(len, shown_answer.lines(rollout(), "y" * 9999, {}))) < 700


def shown_at(every, steps, rollouts, parallel=None):
    said = []
    tracker = SimpleNamespace(message=said.append)
    place = parallel or SimpleNamespace(
        **PLACE, gather_world=lambda value: [value], gather_leaders=lambda value: [value]
    )
    tokenizer = SimpleNamespace(decode=lambda ids: "-".join(map(str, ids)))
    table = Completions(c.LogConfig(answer_every=every), "unused", place, tokenizer, tracker)
    teachers = (c.TeacherConfig(name="t", model="", carrier="sampled"),)
    scores = [[Sampled(torch.tensor([-1.0] * r.num_learnt)) for r in rollouts]]
    batches = pack(rollouts, micro_batch_size=8, length_multiple=1, device=torch.device("cpu"), scores=scores,
                   weights=[[1.0]] * len(rollouts))  # fmt: skip
    distillation = Distillation(c.LossConfig(kind="sampled"), 1.0, VocabShard.whole(9), teachers, (None,))
    for step in range(1, steps + 1):
        said.append(step)
        table.log(rollouts, step, batches, distillation)
    return said


def test_the_first_step_and_every_so_many_behind_it():
    said = shown_at(3, 7, [rollout()])
    shown = [said[i - 1] for i, line in enumerate(said) if str(line).startswith("answer to")]
    assert shown == [1, 4, 7]
    assert shown_at(0, 7, [rollout()]) == [1, 2, 3, 4, 5, 6, 7]


def test_the_students_own_answer_with_its_own_numbers():
    short = {"token_ids": (5,), "learnt": (True,), "logps": (0.0,), "versions": (0,)}
    said = shown_at(1, 1, [replace(rollout(), origin="dataset", **short), rollout()])
    assert said[1:] == [
        "answer to gsm8k, row 8  2 tokens  logprob a token: student -0.75  t -1 (kl 0.25)",
        "  prompt: How many?",
        "  answer: 3-4",
    ]


def test_other_ranks_take_part_and_say_nothing():
    place = SimpleNamespace(**{**PLACE, "is_main": False}, gather_world=lambda value: [value])
    assert shown_at(1, 1, [rollout()], place) == [1]


def test_an_episode_is_shown_turn_by_turn():
    log = EpisodeLog(turns=2, calls=1, ended="answered")
    said = [("policy", "<call>\n"), ("environment", "\n42\x1b"), ("policy", "It is 42.")]
    first, prompt, *turns = shown_answer.lines(rollout(log=log), "all of it", {}, said=said, trajectories=2)
    assert "  2 turns, 1 call, ended: answered  the first of 2 trajectories  logprob" in first
    assert prompt == "  prompt: How many?"
    assert turns == ["  policy: <call>", "  environment: 42\N{REPLACEMENT CHARACTER}", "  policy: It is 42."]
    *_, last = shown_answer.lines(rollout(log=log), "", {}, said=said * 5)
    assert last == "  … and 3 more"
    assert shown_answer.lines(rollout(log=log), "42", {}, said=[("policy", "42")])[-1] == "  answer: 42"
