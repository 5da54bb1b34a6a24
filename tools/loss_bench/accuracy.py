"""Error of value and gradient against the dense float64 formula, and the collectives, on 1, 2 and 4 shards.

Ranks are processes over gloo (or the one GPU); every rank makes the same random logits and keeps its columns.
"""

from __future__ import annotations

import datetime
import itertools
import math
import tempfile
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import distillation_loss

TOKENS, COLUMNS, SIZE = 128, 4096, 4001
GRID = list(
    itertools.product(
        (0.0, 0.1, 0.5, 0.9, 1.0), ("logits", "probs"), (1, 2, 4), (0.5, 1.0, 2.0), ("float32", "bfloat16")
    )
)
_TIMEOUT_S = 300


def dense(student: torch.Tensor, teachers: list[torch.Tensor], setting: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, gradient), float64: the formula as one would write it."""
    beta, ensemble, num_teachers, temperature, _ = setting
    z = student.double().requires_grad_()
    logq = torch.log_softmax(z[:, :SIZE] / temperature, -1)
    scaled = [t.double()[:, :SIZE] / temperature for t in teachers]
    if ensemble == "logits":
        logp = torch.log_softmax(sum(scaled) / num_teachers, -1)
    else:
        logp = torch.logsumexp(torch.stack([torch.log_softmax(t, -1) for t in scaled]), 0) - math.log(num_teachers)
    if beta == 0:
        loss = (logp.exp() * (logp - logq)).sum(-1).mean()
    elif beta == 1:
        loss = (logq.exp() * (logq - logp)).sum(-1).mean()
    else:
        logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
        p_side, q_side = logp.exp() * (logp - logm), logq.exp() * (logq - logm)
        loss = (beta * p_side + (1 - beta) * q_side).sum(-1).mean()
    loss.backward()
    return loss.detach(), z.grad


def worst(device: str, shards: int) -> dict[str, Any]:
    """Largest errors over the grid by type, and collectives of the forward and of the backward pass by kind of loss."""
    if shards == 1:
        return _rank(0, 1, None, device)
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        mp.start_processes(_rank_and_save, (shards, store, device), shards, start_method="spawn")
        return torch.load(f"{store}.result")


def _rank_and_save(rank: int, shards: int, store: str, device: str) -> None:
    timeout = datetime.timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=shards, timeout=timeout)
    torch.set_num_threads(1)
    found = _rank(rank, shards, dist.group.WORLD, device)
    if rank == 0:
        torch.save(found, f"{store}.result")
    dist.destroy_process_group()


def _rank(rank: int, shards: int, group: Any, device: str) -> dict[str, Any]:
    counted: Counter[str] = Counter()
    for name in ("all_reduce", "all_gather_into_tensor", "all_gather"):
        _count(name, counted)
    errors = {"float32": 0.0, "bfloat16": 0.0, "over rounding": 0.0, "loss": 0.0}
    collectives: dict[str, tuple[int, int]] = {}
    share = COLUMNS // shards
    here = slice(rank * share, (rank + 1) * share)
    vocab = VocabShard(here.start, here.stop, SIZE, group)
    for number, setting in enumerate(GRID):
        beta, ensemble, num_teachers, temperature, dtype = setting
        generator = torch.Generator().manual_seed(number)
        made = 1.5 * torch.randn(1 + num_teachers, TOKENS, COLUMNS, generator=generator)
        student, *teachers = made.to(device, getattr(torch, dtype))
        logits = student[:, here].clone().requires_grad_()
        counted.clear()
        loss = distillation_loss(
            logits, [t[:, here] for t in teachers], beta=beta, ensemble=ensemble, temperature=temperature, vocab=vocab
        )
        forward = counted.total()
        loss.backward()
        kind = "JSD or probabilities" if 0 < beta < 1 or (ensemble == "probs" and num_teachers > 1) else "KL"
        known = collectives.setdefault(kind, (forward, counted.total() - forward))
        collectives[kind] = (max(known[0], forward), max(known[1], counted.total() - forward))
        expected, gradient = dense(student, teachers, setting)
        squares = (logits.grad.double() - gradient[:, here]).square().sum()
        if group is not None:
            dist.all_reduce(squares, group=group)
        error = float(squares.sqrt() / gradient.norm())
        errors[dtype] = max(errors[dtype], error)
        if dtype == "bfloat16":
            rounding = float((gradient.bfloat16().double() - gradient).norm() / gradient.norm())
            errors["over rounding"] = max(errors["over rounding"], error / rounding)
        errors["loss"] = max(errors["loss"], abs(float(loss.detach()) / float(expected) - 1))
    return {"errors": errors, "collectives": collectives}


def _count(name: str, into: Counter[str]) -> None:
    real = getattr(dist, name)
    if getattr(real, "counts", None) is not None:
        real = real.counts

    def call(*args: Any, **kwargs: Any) -> Any:
        into[name] += 1
        return real(*args, **kwargs)

    call.counts = real  # type: ignore[attr-defined]
    setattr(dist, name, call)
