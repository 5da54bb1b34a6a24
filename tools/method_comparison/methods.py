"""The methods that are compared, as what they set in a config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Method:
    """One line of a table."""

    name: str
    label: str
    settings: tuple[str, ...]
    tables: tuple[str, ...] = ("methods",)
    """methods, teachers: where it is shown."""
    only: tuple[str, ...] = ()
    """Teachers by name, where not all are there."""


_ROUTED = ("teachers.0.sources={max: 0, min: 0}", "teachers.1.sources={add: 0, subtract: 0}")
_REINFORCE = ("rl.weight=1", "policy.loss=ppo", "policy.aggregation=seq-mean-token-mean")

METHODS = {
    method.name: method
    for method in (
        Method("grpo", "GRPO", (*_ROUTED, "loss.weight=0", *_REINFORCE)),
        Method("sampled", "OPD, sampled token", (*_ROUTED, "loss.weight=0", "policy.kl_coef=1")),
        Method("reverse_kl", "OPD, reverse KL, routed", (*_ROUTED, "loss.beta=1"), ("methods", "teachers")),
        Method("forward_kl", "OPD, forward KL", (*_ROUTED, "loss.beta=0")),
        Method("jsd", "OPD, JSD(0.5)", (*_ROUTED, "loss.beta=0.5")),
        Method("hybrid", "GRPO + k2 to teacher", (*_ROUTED, *_REINFORCE, "loss.kind=sampled", "loss.estimator=k2")),
        Method(
            "seqkd",
            "SFT on teacher samples",
            (*_ROUTED, "answers.lmbda=0", "answers.seq_kd=true", "answers.sft_alpha=1", "answers.distill_alpha=0"),
        ),
        Method("logits", "logit average", ("loss.ensemble=logits",), ("teachers",)),
        Method("probs", "probability average", ("loss.ensemble=probs",), ("teachers",)),
        Method("carry", "carry alone (+, -)", (), ("teachers",), only=("carry",)),
        Method("compare", "compare alone (max, min)", (), ("teachers",), only=("compare",)),
    )
}
