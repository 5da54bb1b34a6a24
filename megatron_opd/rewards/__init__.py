"""Graders of answers, by name: how good is a response to its prompt, from 0 to 1.

`exact`, `gsm8k`, `math`, `code`, `ifeval`, `environment`, `none`, or `module:function` of the user's own. Each is in a
module of its own, imported when it is asked for. Evaluation uses them, and so can anything else that has prompts and
responses. None of them sees a model's thinking. `environment` alone looks at how an episode went, and at no text.
"""

from __future__ import annotations

from megatron_opd.config import RewardsConfig
from megatron_opd.config.data import problem_with_reward
from megatron_opd.rewards.base import Reward
from megatron_opd.rewards.thinking import KNOWN, Markers, without_thinking


def build_reward(name: str, settings: RewardsConfig | None = None, markers: Markers = KNOWN[0]) -> Reward:
    """The reward of this name, of what follows the thinking between `markers`.

    Raises ValueError when there is none, or when it cannot work on this machine.
    """
    return without_thinking(_build(name, settings or RewardsConfig()), markers)


def _build(name: str, settings: RewardsConfig) -> Reward:
    problem = problem_with_reward(name)
    if problem:
        raise ValueError(problem)
    if name == "exact":
        from megatron_opd.rewards import exact

        return exact.REWARD
    if name == "gsm8k":
        from megatron_opd.rewards import gsm8k

        return gsm8k.REWARD
    if name == "math":
        from megatron_opd.rewards import mathematics

        return mathematics.build()
    if name == "code":
        from megatron_opd.rewards import code

        return code.build(settings)
    if name == "ifeval":
        from megatron_opd.rewards import ifeval

        return ifeval.build(settings)
    if name == "environment":
        from megatron_opd.rewards import of_environment

        return of_environment.REWARD
    if name == "none":
        from megatron_opd.rewards import ungraded

        return ungraded.REWARD
    from megatron_opd.rewards import function

    return function.build(name)
