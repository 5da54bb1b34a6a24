"""What is wrong about the terms of the loss: distillation, policy gradient, rewards, and updates from one batch."""

from __future__ import annotations

from megatron_opd.config import Config

_K1 = (
    "loss.estimator: k1 is refused: the gradient of log q(y) - log p(y) is that of log q(y), whatever the teachers say;"
    " policy_gradient has the same value and the gradient that is meant, k2 the same gradient"
)


def check_method(config: Config) -> list[str]:
    """Every such problem."""
    return [*_check_clipping(config), *_check_distillation(config), *_check_rewards(config), *_check_updates(config)]


def _check_clipping(config: Config) -> list[str]:
    policy, problems = config.policy, []
    if policy.dual_clip and policy.dual_clip <= 1:
        problems.append(f"policy.dual_clip must be above 1, or 0 for none, not {policy.dual_clip}")
    if policy.dual_clip and policy.loss != "ppo":
        problems.append(f"policy.dual_clip needs policy.loss: ppo, not {policy.loss}")
    return problems


def _check_distillation(config: Config) -> list[str]:
    loss, problems = config.loss, []
    if loss.estimator == "k1":
        problems.append(_K1)
    elif loss.estimator != "policy_gradient" and loss.kind != "sampled":
        problems.append(f"loss.estimator: {loss.estimator} needs loss.kind: sampled, not {loss.kind}")
    if loss.anneal and loss.weight_min > loss.weight:
        problems.append(f"loss.weight_min ({loss.weight_min}) must not be above loss.weight ({loss.weight})")
    if loss.anneal and not loss.weight:
        problems.append("loss.anneal has no effect without a loss.weight to begin with")
    if loss.weight_min and not loss.anneal:
        problems.append("loss.weight_min has no effect without loss.anneal")
    if not (loss.weight or config.has_policy_gradient):
        problems.append("nothing is trained: give loss.weight, policy.kl_coef, or rl.weight a value above 0")
    if config.policy.kl_from == "next" and config.policy.kl_coef and not config.policy.kl_discount:
        problems.append("policy.kl_from: next needs policy.kl_discount above 0: with 0 there is nothing after a token")
    return problems


def _check_rewards(config: Config) -> list[str]:
    rl, problems = config.rl, []
    if rl.weight and rl.baseline == "group" and config.rollout.samples_per_prompt < 2:
        problems.append(
            "rl.baseline: group compares the answers to one prompt, so rollout.samples_per_prompt must be at least 2,"
            f" not {config.rollout.samples_per_prompt}"
        )
    if rl.distill_on != "all" and not config.loss.weight:
        problems.append(f"rl.distill_on: {rl.distill_on} has no effect without loss.weight")
    return problems


def _check_updates(config: Config) -> list[str]:
    train = config.train
    per_replica = config.rollout.prompts_per_step // config.parallel.data * config.rollout.samples_per_prompt
    micro_batches = per_replica // train.micro_batch_size
    if micro_batches % train.minibatches == 0:
        return []
    return [
        f"train.minibatches ({train.minibatches}) must divide the {micro_batches} micro-batches of a replica"
        " (rollout.prompts_per_step x rollout.samples_per_prompt / parallel.data / train.micro_batch_size)"
    ]
