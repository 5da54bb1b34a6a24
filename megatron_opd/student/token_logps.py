"""The same token ids through Megatron and through transformers: whole logits, or log-probabilities of the tokens.

For the tools that compare conversions and engines. Sequences are lists of at least two ids; row or entry s of an
answer is about token s + 1 given the tokens before it. Shape letters: S sequence, V vocabulary, L columns of a shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_opd.config import ParallelConfig, RunConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.parallel import Parallel
from megatron_opd.core.types import MicroBatch, Prompt, Rollout
from megatron_opd.core.vocab import VocabShard

Ids = Sequence[Sequence[int]]


def start_megatron(layout: ParallelConfig, *, timeout_s: float = 1800.0) -> Parallel:
    """Process groups for `by_megatron`, in one process or under torchrun. Ends with `groups.stop()`."""
    from megatron_opd.student import cpu

    cpu.enable()
    from megatron_opd.student import groups

    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    return groups.start(layout, RunConfig(dir="", timeout_s=timeout_s))


def logps_by_megatron(model_dir: str | Path, ids: Ids, parallel: Parallel, dtype: torch.dtype) -> list[torch.Tensor]:
    """Log-probability of every token but the first, [S - 1] each in fp32; [] on all but the last stage. Collective."""

    def logps(batch: MicroBatch, logits_SL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
        return vocab.gather(vocab.log_softmax(logits_SL), batch.targets_T[:, None])[:, 0].cpu()

    return _by_megatron(model_dir, ids, parallel, dtype, logps)


def logits_by_megatron(
    model_dir: str | Path, ids: Ids, parallel: Parallel, dtype: torch.dtype, *, like: str | Path | None = None
) -> list[torch.Tensor]:
    """[S - 1, V] each in fp32, without padding columns, on one rank only; `like` is where the config.json is."""
    assert parallel.world_size == 1

    def logits(_: MicroBatch, logits_SL: torch.Tensor, vocab: VocabShard) -> torch.Tensor:
        return logits_SL[:, : vocab.size].float().cpu()

    return _by_megatron(model_dir, ids, parallel, dtype, logits, like=like)


def _by_megatron(
    model_dir: str | Path,
    ids: Ids,
    parallel: Parallel,
    dtype: torch.dtype,
    collect: Callable[[MicroBatch, torch.Tensor, VocabShard], torch.Tensor],
    *,
    like: str | Path | None = None,
) -> list[torch.Tensor]:
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import groups, pipeline, source
    from megatron_opd.student.model import build_gpt, transformer_config

    assert parallel.context_size == 1  # no tool asks for more
    arch = read_architecture(like or model_dir, vocab_multiple=parallel.tensor_size)
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=dtype), parallel)
    source.load(model, arch, model_dir, parallel)
    columns = arch.padded_vocab_size // parallel.tensor_size
    first = parallel.tensor_rank * columns
    group = parallel.tensor_group if parallel.tensor_size > 1 else None
    vocab = VocabShard(first, first + columns, arch.vocab_size, group)
    batches = pack(
        [_as_rollout(i, sequence) for i, sequence in enumerate(ids)],
        micro_batch_size=1,
        length_multiple=parallel.length_multiple,
        device=groups.device(),
    )
    return pipeline.forward(
        model.eval(),
        batches,
        lambda batch, logits_BSL: collect(batch, logits_BSL.flatten(0, 1)[batch.predicted_at_T], vocab),
    )


def _as_rollout(index: int, ids: Sequence[int]) -> Rollout:
    """One token of prompt; all the others are asked about."""
    prompt = Prompt(source="", index=index, text="", token_ids=(ids[0],))
    rest = tuple(ids[1:])
    zeros = (0,) * len(rest)
    learnt = (True,) * len(rest)
    return Rollout(prompt=prompt, sample=0, token_ids=rest, learnt=learnt, logps=zeros, finish="length", versions=zeros)


def logps_by_transformers(model_dir: str | Path, ids: Ids, dtype: torch.dtype) -> list[torch.Tensor]:
    """Like `logps_by_megatron`, in this process alone."""
    return _by_transformers(
        model_dir,
        ids,
        dtype,
        lambda logits_SV, next_S: torch.log_softmax(logits_SV, dim=-1).gather(1, next_S[:, None])[:, 0],
    )


def logits_by_transformers(model_dir: str | Path, ids: Ids, dtype: torch.dtype) -> list[torch.Tensor]:
    """Like `logits_by_megatron`, in this process alone."""
    return _by_transformers(model_dir, ids, dtype, lambda logits_SV, _: logits_SV)


@torch.no_grad()
def _by_transformers(
    model_dir: str | Path, ids: Ids, dtype: torch.dtype, collect: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{model_dir} cannot be loaded by transformers: {str(error).splitlines()[0]}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).eval()
    answers = []
    for sequence in ids:
        tokens_S = torch.tensor(sequence, device=device)
        logits_SV = model(tokens_S[None]).logits[0, :-1].float()
        answers.append(collect(logits_SV, tokens_S[1:]).cpu())
    return answers
