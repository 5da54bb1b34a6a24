"""Context parallelism: parts of sequences on several ranks, and the same numbers as with whole ones."""

import copy
from functools import cache
from types import SimpleNamespace

import pytest
import steps
import test_shaped_step as shaped
import test_step_invariance as invariance
import test_teachers as teachers
import tiny
import torch
from test_step_invariance import alone, paths  # noqa: F401

VOCAB_SIZE, NUM_STEPS = invariance.VOCAB_SIZE, invariance.NUM_STEPS


def size(layout):
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1) * layout.get("data", 1)


def place(parallel):
    p = parallel
    return {
        "place": (p.tensor_rank, p.context_rank, p.data_rank, p.pipeline_rank),
        "leads": p.is_leader,
        "counts": p.counts_whole,
        "shared": p.share(lambda: f"from {p.rank}"),
        "leaders": p.gather_leaders(p.rank),
    }


def test_the_grid(ranks):
    by_rank = ranks.run(4, place, context=2, data=2)
    assert [a["place"] for a in by_rank] == [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 1, 1, 0)]
    assert [a["leads"] for a in by_rank] == [True, False, True, False]
    assert [a["shared"] for a in by_rank] == ["from 0", "from 0", "from 2", "from 2"]
    by_rank = ranks.run(4, place, context=2, pipeline=2)
    assert [a["place"] for a in by_rank] == [(0, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1), (0, 1, 0, 1)]
    assert [a["leads"] for a in by_rank] == [True, False, False, False]
    assert [a["counts"] for a in by_rank] == [False, False, True, False]
    assert {a["shared"] for a in by_rank} == {"from 0"}


# Attention alone ---------------------------------------------------------------------------------------------------


def attend(parallel, made, dtype):
    """This rank's part of the output, and of the gradients of queries, keys and values, put back in their places."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_opd.student import context
    from megatron_opd.student.model import transformer_config
    from megatron_opd.student.spec import CausalAttention

    arch = tiny_arch()
    config = transformer_config(arch, parallel, dtype=dtype)
    groups = ProcessGroupCollection(cp=parallel.context_group)
    attention = CausalAttention(config=config, pg_collection=groups)
    split = context.split_of(parallel)
    mine = slice(None) if split is None else split.positions(len(made["query"]))
    leaves = {name: x[mine].to(dtype).requires_grad_() for name, x in made.items() if name != "upstream"}
    out = attention(leaves["query"], leaves["key"], leaves["value"], None)
    out.backward(made["upstream"][mine].to(dtype))
    found = {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}
    return {name: _in_place(x, mine, len(made["query"])) for name, x in found.items()}


def _in_place(mine, at, length):
    whole = mine.new_zeros(length, *mine.shape[1:])
    whole[at] = mine
    return whole


def tiny_arch():
    from megatron_opd.student.architecture import Architecture

    return Architecture(
        family="llama", num_layers=1, hidden_size=32, ffn_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
        vocab_size=8, padded_vocab_size=8, max_positions=64, norm_eps=1e-5, rope_base=1e4, rope_factor=None,
        qkv_bias=False, qk_norm=False, tied_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("context", "dtype", "atol"), [(2, torch.float32, 1e-6), (4, torch.float32, 1e-6), (2, torch.bfloat16, 0.03)]
)
def test_attention_is_that_of_whole_sequences(ranks, context, dtype, atol):
    draw = torch.Generator().manual_seed(0)
    shapes = {"query": (24, 2, 4, 8), "key": (24, 2, 2, 8), "value": (24, 2, 2, 8), "upstream": (24, 2, 32)}
    made = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    parts = ranks.run(context, attend, made, dtype, context=context)
    [whole] = ranks.run(1, attend, made, torch.float32, tensor=1)
    for name, expected in whole.items():
        assert not any((a * b).any() for a in (parts[0][name],) for b in (p[name] for p in parts[1:]))
        torch.testing.assert_close(sum(p[name].float() for p in parts), expected, atol=atol, rtol=1e-5)


# A real step -------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "cp2": ("qwen3", "reverse", {"context": 2}, {}),
    "cp2 one rollout at a time": ("qwen3", "reverse", {"context": 2}, {"micro_batch_size": 1}),
    "cp2 plain optimizer": ("qwen3", "reverse", {"context": 2}, {"distributed": False}),
    "cp4": ("qwen3", "reverse", {"context": 4}, {}),
    "cp2tp2sp": ("qwen3", "reverse", {"context": 2, "tensor": 2, "sequence": True}, {}),
    "cp2pp2 full recompute": ("qwen3", "reverse", {"context": 2, "pipeline": 2}, {"recompute": "full"}),
    "cp2dp2": ("qwen3", "reverse", {"context": 2, "data": 2}, {}),
    "cp2tp2 selective recompute": ("qwen3", "reverse", {"context": 2, "tensor": 2}, {"recompute": "selective"}),
    "tied cp2pp2": ("qwen2", "forward", {"context": 2, "pipeline": 2}, {}),
    "moe cp2": ("qwen3_moe", "reverse", {"context": 2}, {}),
    "moe cp2tp2ep2sp": ("qwen3_moe", "reverse", {"context": 2, "tensor": 2, "expert": 2, "sequence": True}, {}),
}


@pytest.mark.parametrize(("student", "loss", "layout", "settings"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_step_is_that_of_whole_sequences(ranks, alone, paths, student, loss, layout, settings):  # noqa: F811
    made = invariance.config(paths, student, loss, **settings)
    answers = ranks.run(size(layout), steps.train, made, invariance.rollouts(), VOCAB_SIZE, NUM_STEPS, **layout)
    invariance.assert_same(answers[0], alone(student, loss))
    for metrics, evaluation, weights in answers[1:]:
        assert (metrics, evaluation) == answers[0][:2]  # every rank knows the same numbers
        for name, tensor in weights.items():  # and replicas stay bitwise equal
            assert torch.equal(tensor, answers[0][2][name])
    leaders = [rank for rank, (_, _, weights) in enumerate(answers) if weights]
    assert len(leaders) == layout.get("data", 1)  # others export nothing
