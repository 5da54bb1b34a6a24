"""The cross-entropy of held-out reference answers equals that of transformers in float64 on every layout."""

import copy
from dataclasses import replace

import oracle
import pytest
import steps
import test_step_invariance as invariance
import tiny
import torch
from test_answer_logps import LAYOUTS

from megatron_opd import config as c


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    made = invariance.model("qwen3", (("vocab_size", 93),))
    return made, tiny.save(made, tmp_path_factory.mktemp("models") / "student")


def prompts(source, count):
    """With answers but for every third one."""
    made = tiny.rollouts(count=count, vocab_size=invariance.VOCAB_SIZE, sources=(source,), seed=count)
    return [replace(r.prompt, answer_ids=r.token_ids if i % 3 else ()) for i, r in enumerate(made)]


SOURCES = [
    (c.SourceConfig(name=name, path=""), prompts(name, count))
    for name, count in (("many", 8), ("one", 2), ("none", 1))  # "one": fewer than replicas; "none": no answer at all
]


def config(directory, **train):
    return tiny.config(
        directory, [], student={"vocab_multiple": 4}, loss={"temperature": 2.0}, rollout={"temperature": 0.7},
        train={"steps": 1, "micro_batch_size": 2, **train},
    )  # fmt: skip


def wanted(model):
    """Sums of -log q at temperature 1 and numbers of tokens, by source."""
    model = copy.deepcopy(model).double()
    found = {}
    for source, asked in SOURCES:
        for prompt in asked:
            start, ids = len(prompt.token_ids), torch.tensor([[*prompt.token_ids, *prompt.answer_ids]])
            with torch.no_grad():
                logp = oracle.log_softmax(model(ids).logits[0, start - 1 : -1], invariance.VOCAB_SIZE, 1.0)
            total, tokens = found.get(source.name, (0.0, 0))
            total -= logp.gather(-1, ids[0, start:, None]).sum().item()
            found[source.name] = total, tokens + len(prompt.answer_ids)
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_it_is_the_mean_over_all_tokens_of_all_replicas(ranks, student, layout):
    model, directory = student
    sums = {name: found for name, found in wanted(model).items() if found[1]}
    assert sums.keys() == {"many", "one"}
    expected = {f"eval/nll/{name}": total / tokens for name, (total, tokens) in sums.items()}
    expected["eval/nll/all"] = sum(total for total, _ in sums.values()) / sum(tokens for _, tokens in sums.values())
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    settings = config(directory, eval_nll=True)
    for found in ranks.run(size, steps.reference_nll, settings, SOURCES, invariance.VOCAB_SIZE, **layout):
        assert found == pytest.approx(expected, rel=1e-5)


def test_it_is_off_by_default(ranks, student):
    assert ranks.run(1, steps.reference_nll, config(student[1]), SOURCES, invariance.VOCAB_SIZE) == [{}]
