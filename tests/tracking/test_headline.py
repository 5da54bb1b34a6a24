"""Metrics in the one line of a step: whoever computes them says which, under which word."""

import pytest

from megatron_opd import config as c
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective
from megatron_opd.tracking.headline import Headline
from megatron_opd.trainer import step_metrics
from megatron_opd.trainer.build_objective import sampled_terms


def test_a_metric_that_the_row_lacks_is_not_there():
    assert Headline("kl/ensemble", "kl").texts({"loss": 1.0}) == []
    assert Headline("kl/ensemble", "kl", "{:.2f}").texts({"kl/ensemble": 0.126, "kl/other": 1.0}) == ["kl 0.13"]


def test_a_star_is_every_metric_that_begins_like_this():
    row = {"eval/agreement/math": 0.5, "eval/kl/ensemble": 1.0, "eval/agreement/all": 0.25}
    assert Headline("eval/agreement/*", "agrees (*)").texts(row) == ["agrees (math) 0.5", "agrees (all) 0.25"]
    assert Headline("eval/*/all", "of all: *").texts(row) == ["of all: agreement 0.25"]


def objective(*carriers, rl=0.0, sft=0.0):
    teachers = tuple(c.TeacherConfig(name=f"t{i}", model="", carrier=carrier) for i, carrier in enumerate(carriers))
    heads = (None,) * len(carriers)
    distillation = Distillation(c.LossConfig(), 1.0, VocabShard.whole(9), teachers, heads)
    others = sft > 0
    terms = sampled_terms(c.RLConfig(weight=rl), c.PolicyConfig(), c.AnswersConfig(sft_alpha=sft), others)
    return Objective(distillation, terms, others)


@pytest.mark.parametrize(
    ("carriers", "label"),
    [(["hidden"], "kl"), (["hidden", "topk"], "kl(top-k)"), (["topk"], "kl(top-k)"), (["sampled", "topk"], "kl(k1)")],
)
def test_a_divergence_is_called_what_it_is(carriers, label):
    """The least detailed teacher decides what is known."""
    assert objective(*carriers).headlines() == [Headline("kl/ensemble", label), Headline("eval/kl/ensemble", label)]


def test_every_term_shows_its_own():
    assert [h.metric for h in objective(rl=1.0).headlines()] == ["policy/clip_frac", "entropy"]
    assert [h.metric for h in objective(sft=0.5).headlines()] == ["sft/nll", "entropy"]
    names = {h.metric for h in objective("hidden", rl=1.0, sft=1.0).headlines()}
    declared = set(objective("hidden", rl=1.0, sft=1.0).metric_names())
    assert {name.removeprefix("eval/") for name in names} <= declared


def test_a_loss_of_0_stands_beside_its_reason():
    shown = step_metrics.headlines(c.RLConfig(weight=1.0))
    row = {"reward/mean": 0.0, "reward/mixed_groups": 0.0, "rollout/length": 31.25}
    assert [text for h in shown for text in h.texts(row)] == ["reward 0.000", "mixed groups 0", "length 31.2"]
    assert "reward/mixed_groups" not in [h.metric for h in step_metrics.headlines(c.RLConfig())]
