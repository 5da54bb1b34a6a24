"""Graders of answers, by name: how good is a response to its prompt, from 0 to 1.

`exact`, `gsm8k`, `code`, `ifeval`, or `module:function` of the user's own. Each is in a module of its own, imported
when it is asked for. Evaluation uses them, and so can anything else that has prompts and responses.
"""

from __future__ import annotations

import difflib

from megatron_opd.config import RewardsConfig
from megatron_opd.rewards.base import Reward

NAMES = ("exact", "gsm8k", "code", "ifeval")


def problem_with(name: str) -> str | None:
    """Why there cannot be a reward of this name, as far as the name tells."""
    module, colon, function = name.partition(":")
    if name in NAMES or (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        return None
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"there is no reward '{name}'; known: {', '.join(NAMES)}, or a function of yours as module:function{hint}"


def build_reward(name: str, settings: RewardsConfig | None = None) -> Reward:
    """The reward of this name. Raises ValueError when there is none, or when it cannot work on this machine."""
    problem = problem_with(name)
    if problem:
        raise ValueError(problem)
    if name == "exact":
        from megatron_opd.rewards import exact

        return exact.REWARD
    if name == "gsm8k":
        from megatron_opd.rewards import gsm8k

        return gsm8k.REWARD
    if name == "code":
        from megatron_opd.rewards import code

        return code.build(settings or RewardsConfig())
    if name == "ifeval":
        from megatron_opd.rewards import ifeval

        return ifeval.build(settings or RewardsConfig())
    from megatron_opd.rewards import function

    return function.build(name)
