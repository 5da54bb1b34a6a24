"""A teacher behind SGLang servers: it scores exactly the student's tokens, in the form that its carrier says.

Only the replica's leader talks to servers. `submit` starts a request at once, so scoring overlaps with the sampling of
other answers; `score` waits for all and shares what came with the replica's other ranks.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future

import torch

from megatron_opd.config import TeacherConfig
from megatron_opd.core.event_loop import Loop
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.scores import Head, Hidden, TeacherScore
from megatron_opd.core.types import Rollout
from megatron_opd.precision.overflow import check_fp16
from megatron_opd.sglang.errors import RETRIED
from megatron_opd.sglang.pool import Pool, ServerGroup
from megatron_opd.sglang.wire import Ask


class SGLangTeacher:
    """A TeacherScorer over the servers of `pool`, which only leaders have."""

    offloaded, foreigner = None, None  # its weights are on the servers, its tokenizer is the student's

    def __init__(
        self,
        config: TeacherConfig,
        parallel: Parallel,
        pool: Pool | None,
        loop: Loop | None,
        *,
        head_LD: Head | None = None,
    ) -> None:
        """`loop` is this teacher's own. `head_LD`: this rank's rows of the output head, for the carrier hidden on the
        last pipeline stage."""
        self.name, self.config, self.parallel = config.name, config, parallel
        self.head_LD = head_LD
        self._pool, self._loop = pool, loop
        self._started: dict[Rollout, Future[TeacherScore]] = {}
        self._counts: Counter[str] = Counter()

    def submit(self, rollout: Rollout) -> None:
        """Start scoring; on the leader, from any thread. Errors show in `score`."""
        if self._loop is not None and rollout not in self._started:
            self._started[rollout] = self._loop.start(self._ask(rollout))

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore | None]:
        """One score a rollout, in order, on every rank of the replica. Collective.

        Where no server answered: None under `on_failure: renormalise`, else it raises Down. Hidden states are left out
        on ranks that do not compute the loss.
        """
        if not rollouts:
            return []
        scores = self.parallel.share(lambda: self._collect(rollouts))
        if self.config.carrier != "hidden":
            return scores
        if not self.parallel.is_last_stage:
            return [None if score is None else Hidden(None) for score in scores]
        return [None if score is None else self._as_head(score) for score in scores]

    def metrics(self) -> dict[str, float]:
        """Counters since the last call, as `teacher/<name>/…`; nothing on ranks that do not talk to servers."""
        if self._pool is None:
            return {}
        counts, self._counts = self._counts, Counter()
        counted = {**self._pool.metrics(), **{name: float(value) for name, value in counts.items()}}
        return {f"teacher/{self.name}/{name}": value for name, value in counted.items()}

    def close(self) -> None:
        """Drop the connections; scoring under way fails."""
        if self._pool is not None and self._loop is not None:
            self._loop.run(self._pool.close(), timeout_s=30.0)
            self._loop.close()

    def _collect(self, rollouts: list[Rollout]) -> list[TeacherScore | None]:
        for rollout in rollouts:
            self.submit(rollout)
        futures = [self._started[rollout] for rollout in rollouts]
        for rollout in rollouts:  # one may be there twice: it is asked about once
            self._started.pop(rollout, None)
        scores: list[TeacherScore | None] = []
        try:
            for future in futures:
                scores.append(self._result(future))
        finally:  # of the first failure; those that are done do not mind
            for future in futures:
                future.cancel()
        return scores

    def _result(self, future: Future[TeacherScore]) -> TeacherScore | None:
        try:
            return future.result()  # every request has a time-out
        except RETRIED:
            if self.config.on_failure == "fail":
                raise
            self._counts["unscored"] += 1
            return None

    async def _ask(self, rollout: Rollout) -> TeacherScore:
        assert self._pool is not None
        prompt_ids = rollout.prompt.seen_by(self.name).token_ids
        # Servers tell about every token from a first one on: ask from the first learnt one to the last.
        learnt_at = [i for i, is_learnt in enumerate(rollout.learnt) if is_learnt] or [0]
        within = slice(learnt_at[0], learnt_at[-1] + 1)
        ids = prompt_ids + rollout.token_ids[: within.stop]
        first, carrier, top_k = len(prompt_ids) + within.start, self.config.carrier, self.config.top_k
        score = await self._pool.run(
            lambda client, rid: client.score(Ask(rid=rid, ids=ids, first=first, carrier=carrier, top_k=top_k)),
            group=ServerGroup(),
            tokens=len(ids),
        )
        keep = rollout.learnt[within]
        return score if all(keep) else score.at(torch.tensor(keep))

    def _as_head(self, score: TeacherScore) -> Hidden:
        assert isinstance(score, Hidden)
        assert score.hidden_RD is not None
        assert self.head_LD is not None
        if score.hidden_RD.shape[1] != self.head_LD.shape[1]:
            raise ValueError(
                f"teacher '{self.name}': its servers give hidden states of {score.hidden_RD.shape[1]} numbers, but"
                f" teachers.model {self.config.model} has {self.head_LD.shape[1]}: do they serve another model?"
            )
        hidden_RD = score.hidden_RD.to(self.head_LD.dtype)
        check_fp16(hidden_RD, score.hidden_RD, f"teacher '{self.name}': what its servers tell")
        return Hidden(hidden_RD.to(self.head_LD.device))
