"""A plain answer: an episode of one turn, to which nobody answers. Every engine makes its rollouts of it here."""

from __future__ import annotations

from megatron_opd.core.protocols import DrawTurn, OnFinished, TurnAsked, TurnDrawn
from megatron_opd.core.types import Prompt, Rollout, Sampling


def asked(prompt: Prompt, sample: int, sampling: Sampling) -> TurnAsked:
    """The one turn that is to be drawn."""
    return TurnAsked(prompt=prompt, sample=sample, turn=0, ids=prompt.token_ids, max_new_tokens=sampling.max_new_tokens)


def rollout(turn: TurnAsked, drawn: TurnDrawn) -> Rollout:
    """The rollout of its tokens, all of which are learnt."""
    return Rollout(
        prompt=turn.prompt,
        sample=turn.sample,
        token_ids=drawn.ids,
        learnt=(True,) * len(drawn.ids),
        logps=drawn.logps,
        finish=drawn.finish,
        versions=drawn.versions,
    )


async def play(
    prompt: Prompt, sample: int, sampling: Sampling, on_finished: OnFinished, draw: DrawTurn
) -> list[Rollout]:
    """The answer as a talk, among episodes of several turns."""
    turn = asked(prompt, sample, sampling)
    answer = rollout(turn, await draw(turn))
    on_finished(answer)
    return [answer]
