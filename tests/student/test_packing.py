"""Packed sequences: what models see of them, attention within each of them, and logits as if each was alone.

That whole steps do not notice is in `test_step_invariance.py`.
"""

import random

import pytest
import steps
import tiny
import torch

from megatron_opd.core.batching import pack

CPU = torch.device("cpu")


def unequal(count, draw):
    """Rollouts between 2 and 60 tokens; ids are the padding's now and then."""
    made = []
    for i in range(count):
        ids = [[draw.randrange(4) for _ in range(draw.choice((1, 2, 30)))] for _ in range(2)]
        made.append(tiny.rollout(*ids, index=i, draw=draw))
    return made


def seen(parallel, cases):
    """What models see of the micro-batches of each (rollouts, settings of `pack`): plain lists, for every one."""
    from megatron_opd.student import packing

    made = []
    for rollouts, settings in cases:
        for batch in pack(rollouts, device=CPU, **settings):
            tokens, positions, described = packing.inputs(batch)
            made.append(
                {
                    "shape": batch.model_shape,
                    "tokens": tokens,
                    "positions": positions,
                    "rows": packing.rows(batch),
                    "targets": batch.targets_T,
                    "described": described.get("packed_seq_params"),
                }
            )
    return made


def where_starts_are(parallel):
    """The device of what tells where sequences begin, for layers of Megatron and of Transformer Engine, of a batch on
    another device than the host."""
    import dataclasses

    from megatron_opd.student import packing

    rollouts = [tiny.rollout((5, 0), (7, 0)), tiny.rollout((4,), (3, 2))]
    (batch,) = pack(rollouts, device=CPU, micro_batch_size=2, length_multiple=1, packing="shared")
    there = dataclasses.replace(batch, tokens_BS=batch.tokens_BS.to("meta"))
    found = [packing.inputs(there, of_engine=of_engine) for of_engine in (False, True)]
    assert {part.device.type for tokens, positions, _ in found for part in (tokens, positions)} == {"meta"}
    return [described["packed_seq_params"].cu_seqlens_q.device.type for _, _, described in found]


def test_megatron_s_rotary_embeddings_find_on_the_host_where_sequences_begin(ranks):
    assert ranks.run(1, where_starts_are) == [["cpu", "meta"]]


def test_a_row_is_the_sequences_behind_each_other(ranks):
    rollouts = [tiny.rollout((5, 0), (7, 0)), tiny.rollout((4,), (3, 2, 1, 9)), tiny.rollout((6,), (8,))]
    settings = {"micro_batch_size": 2, "length_multiple": 4, "packing": "shared"}
    first, last = ranks.run(1, seen, [(rollouts, settings)])[0]
    assert first["shape"] == last["shape"] == (1, 12)
    assert first["tokens"].tolist() == [[5, 0, 7, 0, 4, 3, 2, 1, 9, 0, 0, 0]]
    assert first["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2]]
    assert first["rows"].tolist() == [1, 2, 4, 5, 6, 7]
    assert first["described"].cu_seqlens_q.tolist() == [0, 4, 9, 12]
    assert first["described"].cu_seqlens_q.dtype == torch.int32
    assert first["described"].max_seqlen_kv == 5
    assert last["rows"].tolist() == [0]
    assert last["described"].lengths == (2,) * 6  # padding is cut into what positions there are
    own, alone = ranks.run(1, seen, [(rollouts, settings | {"packing": "own", "length_multiple": 1})])[0]
    assert (own["shape"], alone["shape"]) == ((1, 9), (1, 2))
    assert own["described"].lengths == (4, 5)


def test_rows_predict_the_response_wherever_sequences_lie(ranks):
    """Random lengths, micro-batches and multiples: the output behind each listed position is the next token's."""
    draw = random.Random(0)
    cases = [
        (
            [r if i % 2 else tiny.masked(r, i) for r in unequal(draw.randint(1, 7), draw)],
            {
                "micro_batch_size": draw.randint(1, 4),
                "length_multiple": draw.choice((1, 2, 16)),
                "packing": draw.choice(("none", "own", "shared")),
            },
        )
        for i in range(60)
    ]
    found = iter(ranks.run(1, seen, cases)[0])
    for rollouts, settings in cases:
        size = settings["micro_batch_size"]
        parts = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        batches = [next(found) for _ in parts]
        if settings["packing"] != "own":
            assert len({batch["shape"][1] for batch in batches}) == 1
        for part, batch in zip(parts, batches, strict=True):
            assert batch["tokens"].shape == batch["positions"].shape == batch["shape"]
            assert batch["shape"][1] % settings["length_multiple"] == 0
            rows, targets = batch["rows"], batch["targets"].tolist()
            assert batch["tokens"].flatten().roll(-1)[rows].tolist() == targets
            assert targets == [t for r in part for t in steps.learnt(r)]
            before = [position for r in part for position in steps.place(r)[1]]
            assert batch["positions"].flatten()[rows].tolist() == before
            if settings["packing"] != "none":
                lengths = batch["described"].lengths
                assert sum(lengths) == batch["shape"][1]
                assert max(lengths) == batch["described"].max_seqlen_q
                assert lengths[: len(part)] == tuple(len(r.prompt.token_ids) + len(r.token_ids) for r in part)


def attended(parallel, lengths):
    """(q, k, v, output [P, N * D], gradients of q, k and v) of packed sequences; the output's gradient is its sine."""
    from types import SimpleNamespace

    from megatron_opd.student.packing import Sequences
    from megatron_opd.student.spec import CausalAttention

    settings = SimpleNamespace(kv_channels=6, attention_dropout=0.0, context_parallel_size=1)
    attention = CausalAttention(settings, pg_collection=None)
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 6, requires_grad=True) for heads in (4, 2, 2))
    out = attention(q, k, v, None, packed_seq_params=Sequences(lengths=lengths)).flatten(1)
    out.backward(out.detach().sin())
    return [x.detach() for x in (q, k, v, out)], [x.grad for x in (q, k, v)]


def test_attention_is_that_of_each_sequence_alone(ranks):
    """Against the formula in float64, a sequence at a time."""
    lengths = (3, 1, 17, 8)
    (q, k, v, out), grads = ranks.run(1, attended, lengths)[0]
    for part in zip(*(x.split(lengths) for x in (q, k, v, out, *grads)), strict=True):
        mine = [x.double().requires_grad_() for x in part[:3]]
        q_NLD, k_NLD, v_NLD = (x.transpose(0, 1) for x in mine)
        k_NLD, v_NLD = (x.repeat_interleave(2, dim=0) for x in (k_NLD, v_NLD))
        scores = q_NLD @ k_NLD.transpose(1, 2) / 6**0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        expected = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v_NLD).transpose(0, 1).flatten(1)
        torch.testing.assert_close(part[3].double(), expected, atol=1e-6, rtol=0)
        expected.backward(expected.detach().sin())
        for found, wanted in zip(part[4:], mine, strict=True):
            torch.testing.assert_close(found.double(), wanted.grad, atol=2e-6, rtol=0)


def logits(parallel, model_dir, cases, packing):
    """By case, of rollouts: logits [T, L] of every micro-batch on the last stage, of one model."""
    from megatron_opd.models.architecture import read_architecture
    from megatron_opd.student import packing as packed
    from megatron_opd.student import pipeline, weights
    from megatron_opd.student.model import build_gpt, transformer_config

    arch = read_architecture(model_dir)
    model = build_gpt(arch, transformer_config(arch, parallel, dtype=torch.float32), parallel)
    weights.load(model, arch, model_dir, parallel)
    made = []
    for rollouts in cases:
        batches = pack(rollouts, micro_batch_size=2, length_multiple=4, device=CPU, packing=packing)
        take = lambda batch, output_BSL: output_BSL.flatten(0, 1)[packed.rows(batch)]  # noqa: E731
        made.append(pipeline.forward(model.eval(), batches, take))
    return made


LAYOUTS = {
    "tp1": ({"tensor": 1}, "own"),
    "tp2sp": ({"tensor": 2, "sequence": True}, "own"),
    "tp2pp2sp": ({"tensor": 2, "pipeline": 2, "sequence": True}, "shared"),
}


@pytest.mark.parametrize(("layout", "packing"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_transformers_and_sequences_do_not_see_each_other(ranks, tmp_path, family, layout, packing):
    """Far from the start too, where llama3's scaling of rotary embeddings shows."""
    model = tiny.build(family)
    directory = tiny.save(model, tmp_path / family)
    long = tiny.rollout([(7 * i) % 90 for i in range(396)], (5, 6, 7, 8))
    rollouts = [*tiny.rollouts(count=3), long, tiny.rollout((9,), (8,))]
    other = tiny.rollout([i % 5 for i in range(396)], (1, 2, 3, 4))
    changed = [*rollouts[:3], other, rollouts[4]]
    size = layout["tensor"] * layout.get("pipeline", 1)
    answers = ranks.run(size, logits, directory, [rollouts, changed], packing, **layout)
    last = answers[-layout["tensor"] :]
    found, again = (
        torch.cat([torch.cat(shards, -1) for shards in zip(*case, strict=True)]) for case in zip(*last, strict=True)
    )
    lengths = [len(r.token_ids) for r in rollouts]
    with torch.no_grad():
        for rollout, mine, after in zip(rollouts, found.split(lengths), again.split(lengths), strict=True):
            start = len(rollout.prompt.token_ids)
            ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
            torch.testing.assert_close(mine, model(ids).logits[0, start - 1 : -1], atol=2e-5, rtol=1e-5)
            assert torch.equal(mine, after) == (rollout is not long)
