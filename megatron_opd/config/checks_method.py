"""Problems of the loss terms: distillation, policy gradient, rewards, and updates from one batch."""

from __future__ import annotations

from megatron_opd.config import LossConfig, ParallelConfig, PolicyConfig, RLConfig, RolloutConfig, TrainConfig
from megatron_opd.config.policy import has_policy_gradient


def check_method(loss: LossConfig, policy: PolicyConfig, rl: RLConfig, rollout: RolloutConfig) -> list[str]:
    """Every such problem of the terms."""
    return [*_check_clipping(policy), *_check_distillation(loss, policy, rl), *_check_rewards(rl, loss, rollout)]


def _check_clipping(policy: PolicyConfig) -> list[str]:
    problems = []
    if policy.dual_clip and policy.dual_clip <= 1:
        problems.append(f"policy.dual_clip must be above 1, or 0 for none, not {policy.dual_clip}")
    if policy.dual_clip and policy.loss != "ppo":
        problems.append(f"policy.dual_clip needs policy.loss: ppo, not {policy.loss}")
    return problems


def _check_distillation(loss: LossConfig, policy: PolicyConfig, rl: RLConfig) -> list[str]:
    problems = []
    if loss.estimator != "policy_gradient" and loss.kind != "sampled":
        problems.append(f"loss.estimator: {loss.estimator} needs loss.kind: sampled, not {loss.kind}")
    if loss.anneal and loss.weight_min > loss.weight:
        problems.append(f"loss.weight_min ({loss.weight_min}) must not be above loss.weight ({loss.weight})")
    if loss.anneal and not loss.weight:
        problems.append("loss.anneal has no effect while loss.weight is 0")
    if loss.weight_min and not loss.anneal:
        problems.append("loss.weight_min has no effect without loss.anneal")
    if not (loss.weight or has_policy_gradient(policy, rl)):
        problems.append("nothing is trained: give loss.weight, policy.kl_coef, or rl.weight a value above 0")
    if policy.kl_from == "next" and policy.kl_coef and not policy.kl_discount:
        problems.append("policy.kl_from: next needs policy.kl_discount above 0: with 0 no later token counts")
    return problems


def _check_rewards(rl: RLConfig, loss: LossConfig, rollout: RolloutConfig) -> list[str]:
    problems = []
    if rl.weight and rl.baseline == "group" and rollout.samples_per_prompt < 2:
        problems.append(
            "rl.baseline: group compares the answers to one prompt, so rollout.samples_per_prompt must be at least 2,"
            f" not {rollout.samples_per_prompt}"
        )
    if rl.distill_on != "all" and not loss.weight:
        problems.append(f"rl.distill_on: {rl.distill_on} has no effect without loss.weight")
    return problems


def check_minibatches(train: TrainConfig, rollout: RolloutConfig, parallel: ParallelConfig) -> list[str]:
    """Problems of several updates from one batch."""
    per_replica = rollout.prompts_per_step // parallel.data * rollout.samples_per_prompt
    micro_batches = per_replica // train.micro_batch_size
    if micro_batches % train.minibatches == 0:
        return []
    return [
        f"train.minibatches ({train.minibatches}) must divide the {micro_batches} micro-batches of a replica"
        " (rollout.prompts_per_step x rollout.samples_per_prompt / parallel.data / train.micro_batch_size)"
    ]
