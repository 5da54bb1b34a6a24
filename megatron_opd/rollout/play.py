"""One episode: the policy's turns, and what the environment says between them. The same for every engine.

    draw a turn ──► its calls ──► environment ──► the template's own difference ──► draw a turn …

What the policy sampled stays as the tokens that it sampled; what the environment says is context, which nobody learns.
Where the template rewrites earlier turns a further trajectory begins, whose prompt is the conversation so far.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_opd.core.environment import Environment, Reply, Turn
from megatron_opd.core.protocols import DrawTurn, OnFinished, TurnAsked, TurnDrawn
from megatron_opd.core.types import EpisodeLog, Prompt, Rollout, Sampling
from megatron_opd.prompts.conversation import Conversation, message_of
from megatron_opd.rollout.limited import EnvironmentThread, Trouble
from megatron_opd.rollout.replies import checked_reply
from megatron_opd.rollout.worlds import World, goes_on

_T = TypeVar("_T")


@dataclass(slots=True)
class Trajectory:
    """A trajectory in the making."""

    prompt: Prompt
    ids: list[int] = field(default_factory=list)
    learnt: list[bool] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str = "stop"

    @property
    def all_ids(self) -> tuple[int, ...]:
        """The prompt's tokens, and all behind them."""
        return (*self.prompt.token_ids, *self.ids)

    def say(self, drawn: TurnDrawn) -> None:
        """Add what the policy sampled."""
        self.ids += drawn.ids
        self.learnt += [True] * len(drawn.ids)
        self.logps += drawn.logps
        self.versions += drawn.versions
        self.finish = drawn.finish

    def hear(self, ids: tuple[int, ...]) -> None:
        """Add what the environment says."""
        self.ids += ids
        self.learnt += [False] * len(ids)


class Episode:
    """An episode under way."""

    def __init__(
        self, prompt: Prompt, sample: int, sampling: Sampling, world: World, thread: EnvironmentThread
    ) -> None:
        self.prompt, self.sample, self.sampling, self.world = prompt, sample, sampling, world
        self.talk = Conversation(world.encoder, prompt.messages)
        self.parts = [Trajectory(prompt)]
        self._thread = thread
        self._environments: list[Environment] = []
        self._is_over = False
        self._seconds_left = world.settings.episode_timeout_s
        self._turns = self._calls = 0
        self._failures: Counter[str] = Counter()
        self._info: dict[str, float] = {}
        self._rewards: list[float] = []
        self._trouble: Trouble | None = None

    async def play(self, draw: DrawTurn, on_finished: OnFinished) -> list[Rollout]:
        """Its trajectories, in order, of which `on_finished` is told at the end."""
        try:
            await self._within(self._start())
            ended = await self._turn(draw)
            while not ended:
                ended = await self._turn(draw)
        finally:
            await self._close()
        rollouts = self._rollouts(ended)
        for rollout in rollouts:
            on_finished(rollout)
        return rollouts

    async def _turn(self, draw: DrawTurn) -> str:
        """One turn of each; why the episode ends with it, or nothing."""
        part = self.parts[-1]
        left = self.world.room - len(part.all_ids)
        asked = TurnAsked(
            prompt=self.prompt,
            sample=self.sample,
            turn=self._turns,
            ids=part.all_ids,
            max_new_tokens=max(min(self.sampling.max_new_tokens, left), 1),
        )
        drawn = await draw(asked)
        part.say(drawn)
        self._turns += 1
        if drawn.finish == "length":
            return "length" if len(drawn.ids) == self.sampling.max_new_tokens else "context"
        return self._trouble.kind if self._trouble else await self._answered(drawn)

    async def _answered(self, drawn: TurnDrawn) -> str:
        """The environment's turn, as `_turn`."""
        turn = self.world.turn(self._turns - 1, drawn.ids)
        self._calls += len(turn.calls)
        answered = await self._within(_called(self._environments[0].answer, turn))
        if self._trouble is not None:
            self._rewards.append(0.0)
            return self._trouble.kind
        try:
            self._note(reply := checked_reply(answered))
            if reply.is_done:
                return "done"
            if not reply.messages:
                return "empty" if turn.calls else "answered"
            if self._turns == self.world.settings.max_turns:
                return "max_turns"
            return self._go_on(turn, drawn, reply)
        except ValueError as error:
            self._trouble = Trouble("failed", f"what it says cannot be used: {error}")
            return "failed"

    def _go_on(self, turn: Turn, drawn: TurnDrawn, reply: Reply) -> str:
        part, (shown, forged) = self.parts[-1], self.world.shown(reply.messages)
        message = message_of(turn, is_structured=self.world.calls.is_structured)
        more = self.talk.continued(message, drawn.ids, shown)
        if forged := forged + more.forged:
            self._info["forged_tokens"] = self._info.get("forged_tokens", 0.0) + forged
        if not more.ids:  # two turns would follow each other as one
            return "empty"
        if not goes_on(more, len(part.all_ids), self.world.room):
            return "context"
        if more.is_rewritten:
            self.parts.append(Trajectory(self.world.prompt_of(self.prompt, more.ids, self.talk)))
        else:
            part.hear(more.ids)
        return ""

    def _note(self, reply: Reply) -> None:
        self._rewards.append(reply.reward)
        self._failures.update(reply.failures)
        for name, value in reply.info.items():
            self._info[name] = self._info.get(name, 0.0) + value

    async def _start(self) -> None:
        environment = self.world.kind.make()
        self._environments.append(environment)
        if not self._is_over:
            return await environment.start(self.prompt)
        # It took so long to make that the episode has ended, and cancelled this.
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        for late in self._to_close():
            await late.close()

    async def _within(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """The result of the environment's work, within its time limits; None where it fails, which is the episode's
        trouble then."""
        began = time.monotonic()
        try:
            return await self._thread.run(work, min(self.world.settings.turn_timeout_s, max(self._seconds_left, 0.0)))
        except Trouble as trouble:
            self._trouble = trouble
            return None
        finally:
            self._seconds_left -= time.monotonic() - began

    async def _close(self) -> None:
        self._is_over = True
        for environment in self._to_close():
            try:
                await self._thread.run(_called(environment.close), self.world.settings.turn_timeout_s)
            except Trouble as trouble:
                self._failures["close"] += 1
                self._trouble = self._trouble or trouble

    def _to_close(self) -> Iterator[Environment]:
        """The environment, to whoever asks first."""
        with contextlib.suppress(IndexError):
            while True:
                yield self._environments.pop()

    def _rollouts(self, ended: str) -> list[Rollout]:
        log = EpisodeLog(
            turns=self._turns,
            calls=self._calls,
            failures=dict(self._failures),
            ended=ended,
            rewards=tuple(self._rewards),
            info=dict(self._info),
            why=self._trouble.why if self._trouble else "",
        )
        return [
            Rollout(
                prompt=part.prompt,
                sample=self.sample,
                part=number,
                token_ids=tuple(part.ids),
                learnt=tuple(part.learnt),
                logps=tuple(part.logps),
                finish=part.finish,
                versions=tuple(part.versions),
                log=log,
            )
            for number, part in enumerate(self.parts)
        ]


async def _called(method: Callable[..., Awaitable[_T]], *arguments: Any) -> _T:
    """A method's result. It is called where it is awaited, as it may raise before there is anything to wait for."""
    return await method(*arguments)
