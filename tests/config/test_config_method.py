"""Settings of the terms of the loss, and of updates: what is refused, and in which words."""

import pytest
from test_config import MINIMAL, problems_of, tree_with

from megatron_opd.config import file as cfg

PAIRS = {"samples_per_prompt": 2}


def with_sections(**sections):
    return {**MINIMAL, **sections}


@pytest.mark.parametrize(
    "setting",
    ["loss.weight", "loss.anneal", "loss.weight_min", "rl.weight", "policy.kl_coef", "policy.kl_clip",
     "policy.clip_high", "policy.clip_low", "policy.kl_discount", "policy.importance_cap", "policy.dual_clip",
     "train.minibatches", "train.epochs"],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(setting):
    problems = problems_of(tree_with(**{setting.replace(".", "__"): -1}))
    assert any(problem.startswith(f"{setting} must") for problem in problems)


@pytest.mark.parametrize(
    ("tree", "fragments"),
    [
        (with_sections(loss={"kind": "sampled", "estimator": "k1"}),
         ["loss.estimator: k1 is refused", "whatever the teachers say", "policy_gradient", "k2"]),
        (with_sections(loss={"estimator": "k2"}), ["loss.estimator: k2 needs loss.kind: sampled, not distribution"]),
        (with_sections(loss={"weight": 0.1, "anneal": 0.1, "weight_min": 0.5}), ["loss.weight_min (0.5)", "(0.1)"]),
        (with_sections(loss={"weight_min": 0.5}), ["loss.weight_min has no effect without loss.anneal"]),
        (with_sections(loss={"weight": 0}), ["nothing is trained", "loss.weight", "policy.kl_coef", "rl.weight"]),
        (with_sections(loss={"weight": 0, "anneal": 0.1}, policy={"kl_coef": 1}), ["loss.anneal has no effect"]),
        (with_sections(policy={"kl_coef": 1, "kl_from": "next"}), ["policy.kl_from: next needs policy.kl_discount"]),
        (with_sections(policy={"dual_clip": 0.5, "loss": "ppo"}), ["policy.dual_clip must be above 1"]),
        (with_sections(policy={"dual_clip": 3}), ["policy.dual_clip needs policy.loss: ppo, not importance"]),
        (with_sections(rl={"weight": 1}), ["rl.baseline: group", "rollout.samples_per_prompt must be at least 2"]),
        (with_sections(rl={"weight": 1, "distill_on": "wrong"}, rollout=PAIRS, loss={"weight": 0}),
         ["rl.distill_on: wrong has no effect without loss.weight"]),
        (tree_with(train__minibatches=4), ["train.minibatches (4)", "2 micro-batches"]),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(tree, fragments):
    text = " ".join(problems_of(tree))
    assert [f for f in fragments if f not in text] == []


@pytest.mark.parametrize(
    "sections",
    [
        {"loss": {"weight": 0}, "rl": {"weight": 1}, "rollout": PAIRS},
        {"loss": {"weight": 0}, "rl": {"weight": 1}, "rollout": PAIRS, "teachers": []},
        {"loss": {"weight": 0}, "policy": {"kl_coef": 1, "loss": "cispo"}},
        {"rl": {"weight": 1, "baseline": "none"}},
        {"rl": {"distill_on": "wrong"}},
    ],
    ids=str,
)
def test_compositions_that_are_meant_are_allowed(sections):
    cfg.from_dict(with_sections(**sections))


@pytest.mark.parametrize(
    ("settings", "is_graded", "has_policy_gradient"),
    [({}, False, False), ({"rl": {"weight": 1}}, True, True), ({"rl": {"distill_on": "wrong"}}, True, False),
     ({"policy": {"kl_coef": 1}}, False, True)],
)  # fmt: skip
def test_what_is_needed_follows_from_the_weights(settings, is_graded, has_policy_gradient):
    config = cfg.from_dict(with_sections(rollout=PAIRS, **settings))
    assert (config.is_graded, config.has_policy_gradient) == (is_graded, has_policy_gradient)
