"""Answers sampled by SGLang servers.

A prompt's samples are requests of their own, with one server as long as it works (it computes their prefix once). What
an answer is does not depend on which server gave it, or on how often it was interrupted: an aborted request goes on
from its tokens (`partial`) or from its start, a failed one starts again elsewhere, and the sampled tokens keep the
log-probabilities and weight versions that they were sampled with.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

from megatron_opd.core.event_loop import Loop
from megatron_opd.core.named_weights import NamedWeights
from megatron_opd.core.protocols import OnFinished, Talk, TurnAsked, TurnDrawn
from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.rollout import plain_answer
from megatron_opd.sglang.client import Client
from megatron_opd.sglang.errors import BadAnswer, Down
from megatron_opd.sglang.pool import Pool, ServerGroup
from megatron_opd.sglang.wire import Draw, Drawn

_T = TypeVar("_T")

MAX_ABORTS = 64
"""Aborts in a row of one answer, without a token that is kept, after which its server is taken for broken."""
MAX_BANNED = 4096
"""Ids of the model's vocabulary beyond the run's: each is an entry of every request."""


class WeightSync(Protocol):
    """How new weights reach servers."""

    def push(self, clients: Sequence[Client], weights: NamedWeights, version: int) -> Mapping[str, Exception]:
        """Give them to all, on the caller's thread, and run `weights` to its end whatever happens: other ranks take
        part in it. Returns the urls of those that failed, and why. Raises Down when all did."""

    def release(self, clients: Sequence[Client]) -> Mapping[str, Exception]:
        """Have all of them give their GPU memory back, until the next push. Returns the urls of those that failed, and
        why."""

    async def give(self, client: Client) -> None:
        """Return when this server, which was away, has the weights of the last push. Raises an error when not."""

    def close(self) -> None:
        """Clean up."""


class SGLangEngine:
    """A RolloutEngine over the servers of `pool`. `generate` may be called from several threads."""

    def __init__(
        self,
        pool: Pool,
        loop: Loop,
        sync: WeightSync | None,
        *,
        eos_ids: tuple[int, ...],
        vocab_size: int,
        partial: bool = False,
        lag: int = 0,
    ) -> None:
        """`sync` None: the servers have the weights that they start with for good, and all versions are 0.

        Only ids below `vocab_size` are sampled, whatever the vocabulary of the servers' model. `lag`: versions that
        a server may be behind when a request reaches it, where somebody else's engine pushes the weights."""
        self.pool, self.loop, self.sync, self.partial = pool, loop, sync, partial
        self.eos_ids = eos_ids
        own = min(client.limits.vocab_size for client in pool.clients)
        if own - vocab_size > MAX_BANNED:
            raise ValueError(
                f"student.model has {own} entries in its vocabulary, but the run uses only the {vocab_size} that all"
                f" models have: rollout.engine sglang cannot rule out more than {MAX_BANNED}; use teachers whose"
                " vocabulary is at least as large"
            )
        self.banned_ids = tuple(range(vocab_size, own))
        self.lag, self.oldest = lag, 0
        """`oldest` is the version of the oldest weights that a new request may meet."""
        self._counts: Counter[str] = Counter()

    def generate(
        self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished | None = None
    ) -> list[Rollout]:
        """All samples of all prompts, prompt-major. Log-probabilities are the sampler's, after temperature, top-p and
        top-k; greedy (temperature 0) reports those of temperature 1. `on_finished` is called on the loop's thread.

        Raises Down when no server is left, Refused when one says that a request is wrong.
        """
        return self.loop.run(self._all(prompts, sampling, on_finished or (lambda _: None)))

    def converse(self, talks: Sequence[Talk], sampling: Sampling) -> list[list[Rollout]]:
        """Play episodes; none waits for another one's turn. Raises as `generate` does."""
        return self.loop.run(self._converse(talks, sampling))

    def load(self, weights: NamedWeights, version: int) -> None:
        """Push the weights to the servers; those that fail get no work until they have them.

        Raises Down when none took them. `weights` is always run to its end: other ranks take part in it.
        """
        assert self.sync is not None, "these servers keep their weights"
        clients = self.pool.clients  # one that is down may have come back
        failed = self.sync.push(clients, weights, version)
        self.oldest = version - self.lag
        self.loop.run(self._settle({client: failed.get(client.url) for client in clients}))

    def release(self) -> None:
        """The servers give their GPU memory back, until `load`. Nobody may be generating, on any replica. Those that
        fail get no work until they have new weights."""
        assert self.sync is not None, "these servers keep their weights"
        failed = self.sync.release(self.pool.clients)
        self.loop.run(self._evict(failed))

    def metrics(self) -> dict[str, float]:
        """Counters since the last call, as `rollout/…`."""
        counts, self._counts = self._counts, Counter()
        return {f"rollout/{name}": float(value) for name, value in (*self.pool.metrics().items(), *counts.items())}

    def close(self) -> None:
        """Drop the connections; generation under way fails."""
        if self.sync is not None:
            self.sync.close()
        self.loop.run(self.pool.close(), timeout_s=30.0)
        self.loop.close()

    async def _all(self, prompts: list[Prompt], sampling: Sampling, on_finished: OnFinished) -> list[Rollout]:
        talks = [
            partial(plain_answer.play, prompt, sample, sampling, on_finished)
            for prompt in prompts
            for sample in range(sampling.samples_per_prompt)
        ]
        return [answer for (answer,) in await self._converse(talks, sampling)]

    async def _converse(self, talks: Sequence[Talk], sampling: Sampling) -> list[list[Rollout]]:
        """An episode's turns go to one server, and so do the episodes of one prompt: it has their tokens already."""
        groups: defaultdict[tuple[str, int, int], ServerGroup] = defaultdict(ServerGroup)

        async def draw(asked: TurnAsked) -> TurnDrawn:
            drawn = await self._finish(self._request(asked, sampling), groups[asked.prompt.group])
            return TurnDrawn(ids=drawn.ids, logps=drawn.logps, versions=drawn.versions, finish=drawn.finish)

        return await _all_or_none([talk(draw) for talk in talks])

    def _request(self, asked: TurnAsked, sampling: Sampling) -> Draw:
        return Draw(
            rid="",  # the pool's
            ids=asked.ids,
            max_new_tokens=asked.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            stop_ids=self.eos_ids,
            banned_ids=self.banned_ids,
            seed=sampling.seed_of(asked.prompt, asked.sample, asked.turn),
            is_fixed=self.sync is None,
        )

    async def _finish(self, draw: Draw, group: ServerGroup) -> Drawn:
        """Ask until the answer has an end."""
        got = Drawn((), (), (), "abort")
        aborts = 0
        while got.finish == "abort":
            rest = replace(draw, ids=draw.ids + got.ids, max_new_tokens=draw.max_new_tokens - len(got.ids))
            more = await self._draw(rest, group, aborts)
            aborts = aborts + 1 if self._is_in_vain(more) else 0
            if more.finish == "abort":
                self._counts["aborts"] += 1
                if not self.partial:
                    continue
                self._counts["tokens_kept"] += len(more.ids)
            ids = got.ids + more.ids
            got = Drawn(ids, got.logps + more.logps, got.versions + more.versions, _end(draw, ids, more.finish))
        return got

    def _is_in_vain(self, drawn: Drawn) -> bool:
        return drawn.finish == "abort" and not (self.partial and drawn.ids)

    async def _draw(self, draw: Draw, group: ServerGroup, aborts: int) -> Drawn:
        """Ask once more, after so many aborts that got the answer no further."""

        async def work(client: Client, rid: str) -> Drawn:
            oldest = self.oldest  # new weights may arrive while it waits, older ones may not come back
            drawn = await client.generate(replace(draw, rid=rid))
            if drawn.versions and min(drawn.versions) < oldest:
                raise BadAnswer(
                    f"{client.url}: sampled with weights {min(drawn.versions)}, which {oldest} has replaced"
                )
            if aborts >= MAX_ABORTS and self._is_in_vain(drawn):
                raise Down(f"{client.url}: an answer was aborted {aborts + 1} times in a row and got no further")
            return drawn

        return await self.pool.run(work, group=group, tokens=len(draw.ids) + draw.max_new_tokens)

    async def _settle(self, outcomes: Mapping[Client, Exception | None]) -> None:
        for client, error in outcomes.items():
            if error is not None:
                self.pool.evict(client, error)
        await asyncio.gather(*(self.pool.take_back(client) for client, error in outcomes.items() if error is None))

    async def _evict(self, failed: Mapping[str, Exception]) -> None:
        for client in self.pool.clients:
            if client.url in failed:
                self.pool.evict(client, failed[client.url])


async def _all_or_none(work: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """The results, in order. The first failure, or an interrupt, ends all of it."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _end(draw: Draw, ids: tuple[int, ...], finish: str) -> Literal["stop", "length", "abort"]:
    """How an answer with these ids ended: an abort may come just when there is nothing left to do."""
    if ids and ids[-1] in draw.stop_ids:
        return "stop"
    return "length" if len(ids) == draw.max_new_tokens else finish
