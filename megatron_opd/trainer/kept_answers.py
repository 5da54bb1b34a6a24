"""Answers of teachers as JSON keeps them, several turns and trajectories included."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_opd.config.section import Count, section
from megatron_opd.core.types import EpisodeLog, Prompt, Rollout


@section
class KeptAnswer:
    """A trajectory of a teacher."""

    prompt: Count
    """Number of the prompt among those that were asked."""
    part: Count = 0
    """Number of the trajectory in its episode."""
    prompt_ids: list[Count] = dataclasses.field(default_factory=list)
    """Tokens of a further trajectory's prompt; of the first one they are the prompt's own."""
    tokens: list[Count]
    context: list[Count] = dataclasses.field(default_factory=list)
    """Positions of the tokens that an environment wrote."""
    rewards: list[float] = dataclasses.field(default_factory=list)
    """The environment's reward of each turn."""
    ended: str = ""
    """Why the episode ended; empty for a plain answer."""


def kept(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[KeptAnswer]:
    """Rollouts to these prompts, to be written."""
    at = {prompt.group: i for i, prompt in enumerate(prompts)}
    return [
        KeptAnswer(
            prompt=at[rollout.prompt.group],
            part=rollout.part,
            prompt_ids=list(rollout.prompt.token_ids) if rollout.part else [],
            tokens=list(rollout.token_ids),
            context=[i for i, is_learnt in enumerate(rollout.learnt) if not is_learnt],
            rewards=list(rollout.log.rewards),
            ended=rollout.log.ended,
        )
        for rollout in rollouts
    ]


def rollout_of(answer: KeptAnswer, prompts: Sequence[Prompt]) -> Rollout:
    """The teacher's rollout that was written."""
    prompt, context = prompts[answer.prompt], set(answer.context)
    learnt = tuple(i not in context for i in range(len(answer.tokens)))
    return Rollout(
        prompt=dataclasses.replace(prompt, token_ids=tuple(answer.prompt_ids)) if answer.part else prompt,
        sample=0,
        part=answer.part,
        token_ids=tuple(answer.tokens),
        learnt=learnt,
        logps=(0.0,) * sum(learnt),
        finish="stop",
        versions=(0,) * sum(learnt),
        origin="teacher",
        log=EpisodeLog(rewards=tuple(answer.rewards), ended=answer.ended),
    )
