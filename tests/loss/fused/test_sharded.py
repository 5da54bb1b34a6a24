"""The loss on real tensor-parallel ranks: value, gradient and collectives, against the dense float64 formula."""

from dataclasses import replace
from unittest.mock import patch

import cases
import pytest
import torch
import torch.distributed as dist
from cases import LOSS_ERROR, Case

from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.fused import api, chunks, exchange

UNEVEN = (48, 35)
"""Columns and real ones: at TP=4 the last shard has padding only."""
LINEAR = [Case(beta, how, n, 0.8) for beta in (0.0, 0.5, 1.0) for how in ("logits", "probs") for n in (1, 3)]


def shard_of(parallel, columns, size):
    share = columns // parallel.tensor_size
    start = parallel.tensor_rank * share
    return VocabShard(start, start + share, size, parallel.tensor_group if parallel.tensor_size > 1 else None)


class Collectives:
    """Counts torch's collectives in the meantime."""

    def __enter__(self):
        self.count = 0
        self.real = {n: getattr(dist, n) for n in ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")}
        for name, function in self.real.items():
            setattr(dist, name, self._counted(function))
        return self

    def __exit__(self, *_):
        for name, function in self.real.items():
            setattr(dist, name, function)

    def _counted(self, function):
        def call(*args, **kwargs):
            self.count += 1
            return function(*args, **kwargs)

        return call


def of_logits(vocab, case, shape, backend, reduction="mean"):
    """(loss, gradient of these columns, collectives forward, and backward)."""
    columns, size = shape
    student, teachers, weights, mask = cases.logits(case, columns=columns, size=size)
    here = slice(vocab.start, vocab.stop)
    leaf = student[:, here].clone().requires_grad_()
    settings = {"weights": weights, "mask": mask, "vocab": vocab, "backend": backend, "reduction": reduction}
    logits = leaf * 1
    with Collectives() as forward:
        loss = api.distillation_loss(logits, [t[:, here] for t in teachers], **settings, **case.settings)
        loss = loss.sum() / mask.sum() if loss.dim() else loss
    with Collectives() as backward:
        loss.backward()
    return loss.detach(), leaf.grad, forward.count, backward.count


def of_hidden(vocab, case, chunk_tokens, reduction):
    """(loss, this shard's part of the gradient of hidden states, gradient of its rows of the head, collectives)."""
    (h, head), teachers, weights, mask = cases.hidden(case)
    here = slice(vocab.start, vocab.stop)
    h, head = h.requires_grad_(), head[here].clone().requires_grad_()
    pairs = [(x, w[here].contiguous()) for x, w in teachers]
    with Collectives() as forward:
        loss = api.linear_distillation_loss(
            h, head, pairs, weights=weights, mask=mask, vocab=vocab, chunk_tokens=chunk_tokens, reduction=reduction,
            **case.settings,
        )  # fmt: skip
        loss = loss.sum() / mask.sum() if loss.dim() else loss
    with Collectives() as backward:
        loss.backward()
    return loss.detach(), h.grad, head.grad, forward.count, backward.count


def few(parallel, all_cases):
    found = {}
    for backend, step in {"native": 1, "torch": 4, "readable": 13}.items():
        for shape in ((cases.COLUMNS, cases.SIZE), UNEVEN):
            vocab = shard_of(parallel, *shape)
            for case in all_cases[::step]:
                found[backend, shape, case] = of_logits(vocab, case, shape, backend)
    return found


def check(computed):
    for (backend, shape, case), first in computed[0].items():
        answers = [shard[backend, shape, case] for shard in computed]
        expected, _, gradient = cases.dense(case, *cases.logits(case, columns=shape[0], size=shape[1]), size=shape[1])
        whole = torch.cat([answer[1] for answer in answers], dim=-1)
        assert all(answer[0] == first[0] for answer in answers)
        assert first[0].item() == pytest.approx(expected.item(), rel=LOSS_ERROR), (backend, case)
        assert cases.relative(whole, gradient) <= cases.allowed_error(gradient, case.dtype), (backend, shape, case)
        assert (whole[:, shape[1] :] == 0).all()
        several = case.ensemble == "probs" and case.num_teachers > 1
        exchanges = 2 if 0 < case.beta < 1 or several else 1
        if backend != "readable":  # whose formulas exchange what they need
            assert first[2:] == ((exchanges, 0) if len(computed) > 1 else (0, 0)), (backend, case)


@pytest.mark.parametrize("tensor", [2, 4])
def test_logits(ranks, tensor):
    check(ranks.run(tensor, few, cases.FEW))


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_logits_full_grid(ranks, tensor):
    check(ranks.run(tensor, few, cases.FULL))


def by_token(parallel):
    vocab = shard_of(parallel, cases.COLUMNS, cases.SIZE)
    return {case: of_logits(vocab, case, (cases.COLUMNS, cases.SIZE), "native", "none") for case in LINEAR}


def test_logits_by_token(ranks):
    computed = ranks.run(2, by_token)
    check([{("native", (cases.COLUMNS, cases.SIZE), case): x for case, x in shard.items()} for shard in computed])


def hidden_states(parallel):
    vocab = shard_of(parallel, cases.COLUMNS, cases.SIZE)
    return {
        (case, chunk_tokens, reduction): of_hidden(vocab, case, chunk_tokens, reduction)
        for case in LINEAR
        for chunk_tokens in (0, 3)
        for reduction in ("mean", "none")
    }


@pytest.mark.parametrize("tensor", [2, 4])
def test_hidden_states(ranks, tensor):
    """Exchanges are one, or two, a chunk; the shards' parts of the hidden states' gradient sum to it."""
    computed = ranks.run(tensor, hidden_states)
    for key, first in computed[0].items():
        case, chunk_tokens, _ = key
        (h, head), teachers, weights, mask = cases.hidden(case)
        z = [x @ w.T for x, w in ((h, head), *teachers)]
        expected, _, gradient = cases.dense(case, z[0], z[1:], weights, mask)
        assert first[0].item() == pytest.approx(expected.item(), rel=LOSS_ERROR), key
        part, rows = sum(shard[key][1] for shard in computed), torch.cat([shard[key][2] for shard in computed])
        assert cases.relative(part, gradient @ head.double()) <= 2e-6, key
        assert cases.relative(rows, gradient.T @ h.nan_to_num(0).double()) <= 2e-6, key
        num_chunks = -(-int(mask.sum()) // chunk_tokens) if chunk_tokens else 1
        exchanges = 2 if 0 < case.beta < 1 or (case.ensemble == "probs" and case.num_teachers > 1) else 1
        assert first[3:] == (num_chunks * exchanges, 0), key


def bad_token(parallel):
    """What every rank says when one shard has a NaN."""
    case = replace(LINEAR[0], dtype=torch.float32)
    vocab = shard_of(parallel, *UNEVEN)
    student, teachers, weights, _ = cases.logits(case, columns=UNEVEN[0], size=UNEVEN[1])
    here = slice(vocab.start, vocab.stop)
    student[4, 1] = float("nan")
    try:
        api.distillation_loss(student[:, here], [t[:, here] for t in teachers], weights=weights, vocab=vocab)
    except api.NonFiniteLogits as error:
        return error.tokens
    return None


def test_every_rank_learns_of_a_bad_token(ranks):
    assert ranks.run(2, bad_token) == [[4], [4]]


def order_of_events(parallel, beta):
    """Over three chunks: p a product of logits, g a gather is sent, a a sum is, w one of them is waited for."""
    vocab, events = shard_of(parallel, cases.COLUMNS, cases.SIZE), []
    case = Case(beta, "logits", 1, 1.0)
    (h, head), teachers, _, _ = cases.hidden(case)
    here = slice(vocab.start, vocab.stop)
    pairs = [(x, w[here].contiguous()) for x, w in teachers]

    def noted(letter, function):
        def call(*args):
            events.append(letter)
            return function(*args)

        return call

    with (
        patch.object(chunks, "logits", noted("p", chunks.logits)),
        patch.object(exchange, "gather", noted("g", exchange.gather)),
        patch.object(exchange, "add", noted("a", exchange.add)),
        patch.object(exchange.Pending, "wait", noted("w", exchange.Pending.wait)),
    ):
        api.linear_distillation_loss(h, head[here].contiguous(), pairs, vocab=vocab, chunk_tokens=3, beta=beta)
    return "".join(events)


def test_an_exchange_travels_during_the_next_products(ranks):
    """A chunk's gather during the products of the next, and its sums during the statistics of the next."""
    assert ranks.run(2, order_of_events, 1.0) == ["ppg" + 2 * "ppwg" + "w"] * 2
    assert ranks.run(2, order_of_events, 0.5) == ["ppg" + 2 * "ppwagw" + "waw"] * 2
