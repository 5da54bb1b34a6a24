"""Context parallelism: parts of sequences on several ranks, and the same numbers as with whole ones."""

import pytest
import steps
import test_fp8 as fp8
import test_lora_step as lora
import test_shaped_step as shaped
import test_skipped as skipped
import test_step_invariance as invariance
import test_teachers as teachers
import tiny
import torch
from test_step_invariance import alone, paths  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

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


class Watching(TorchDispatchMode):
    """As a profiler or a counter of collectives does, which attention must not mind."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


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
    with Watching():
        out = attention(leaves["query"], leaves["key"], leaves["value"], None)
    out.backward(made["upstream"][mine].to(dtype))
    found = {"out": out.detach(), **{name: x.grad for name, x in leaves.items()}}
    return {name: _in_place(x, mine, len(made["query"])) for name, x in found.items()}


def _in_place(mine, at, length):
    whole = mine.new_zeros(length, *mine.shape[1:])
    whole[at] = mine
    return whole


def tiny_arch():
    from megatron_opd.models.architecture import Architecture

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


FAST = ("cp2", "cp2tp2sp", "cp2pp2 full recompute", "cp2dp2")
CASES = [pytest.param(*case, id=name, marks=() if name in FAST else pytest.mark.slow) for name, case in LAYOUTS.items()]


@pytest.mark.parametrize(("student", "loss", "layout", "settings"), CASES)
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


def test_an_answer_of_one_token_leaves_ranks_without_any(ranks, paths):  # noqa: F811
    """Their backward passes still take part in the others'."""
    short = [tiny.rollout(range(1, 20), [3], index=i) for i in range(2)]
    for loss in ("reverse", "jsd"):
        made = invariance.config(paths, "qwen3", loss)
        [whole] = ranks.run(1, steps.train, made, short, VOCAB_SIZE, 2, tensor=1)
        for found in ranks.run(4, steps.train, made, short, VOCAB_SIZE, 2, context=4):
            # Two tokens average out less of float32's rounding than eight answers do.
            invariance.assert_same((*found[:2], found[2] or whole[2]), whole, rel=1e-5, atol=5e-6)


@pytest.mark.parametrize("method", ["hybrid", "kdrl"])
def test_policy_gradient_and_rewards(ranks, tmp_path, method):
    """Advantages and shares in means are of whole answers; each rank has its tokens' part of the terms."""
    made = {"student": invariance.model("qwen3", tuple(invariance.STUDENTS["qwen3"].items()))}
    made |= {f"t{n}": invariance.model(f, tuple(c.items())) for n, (f, c) in enumerate(invariance.TEACHERS)}
    config = shaped.config({name: tiny.save(m, tmp_path / name) for name, m in made.items()}, method)
    given = config, shaped.graded(), VOCAB_SIZE, shaped.NUM_STEPS
    [(wanted, weights)] = ranks.run(1, steps.train_shaped, *given, tensor=1)
    for metrics, exported in ranks.run(4, steps.train_shaped, *given, context=2, data=2):
        for mine, theirs in zip(metrics, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=5e-6)
        for name, tensor in exported.items():
            torch.testing.assert_close(tensor, weights[name], atol=4e-6, rtol=0, msg=name)


def test_adapters(ranks, tmp_path):
    folders = {"qwen3": lora.model("qwen3"), "teacher": lora.teacher()}
    made = lora.config({name: tiny.save(m, tmp_path / name) for name, m in folders.items()}, "qwen3", ())
    [whole] = ranks.run(1, adapted, made, tensor=1)
    found = ranks.run(4, adapted, made, context=2, tensor=2, sequence=True)
    for metrics, _ in found:
        for mine, theirs in zip(metrics, whole[0], strict=True):
            assert mine == pytest.approx(theirs, rel=2e-5)
    assert found[0][1].keys() == whole[1].keys()
    for name, tensor in whole[1].items():
        torch.testing.assert_close(found[0][1][name], tensor, atol=1e-5, rtol=0, msg=name)


def adapted(parallel, config):
    student, objective, pack = steps.build(parallel, config, lora.VOCAB_SIZE)
    metrics = [student.step(pack(lora.rollouts()), objective) for _ in range(lora.NUM_STEPS)]
    return metrics, {name: tensor.clone() for name, tensor in student.export_adapters()}


@pytest.mark.parametrize("layout", [{"context": 2}, {"context": 2, "pipeline": 2}], ids=["cp2", "cp2pp2"])
def test_a_bad_token_has_its_place_in_the_whole_sequence(ranks, tmp_path, layout):
    folders = {"qwen3": tiny.build("qwen3"), "llama": tiny.build("llama", hidden_size=48)}
    made = skipped.config({name: tiny.save(m, tmp_path / name) for name, m in folders.items()})
    rollouts = tiny.rollouts(count=8, vocab_size=skipped.VOCAB_SIZE)
    for told, unchanged, is_same, (row, length) in ranks.run(size(layout), skipped.bad_loss, made, rollouts, **layout):
        assert unchanged
        assert is_same
        place = f"replica 0, micro-batch 1, row {row // length}, position {row % length + 1} "
        assert place + "(not finite: what teacher 'bad' told)" in told[1][1]


# Teachers, and what else is told by token --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"context": 2, "pipeline": 2}, {"context": 2, "tensor": 2, "sequence": True}])
def test_scores_are_whole_on_every_rank(ranks, tmp_path, layout):
    model = tiny.build("llama", hidden_size=48, vocab_size=101, num_hidden_layers=4)
    rollouts = tiny.rollouts(count=5, vocab_size=70)
    answers = ranks.run(4, teachers.score, tiny.save(model, tmp_path / "t"), rollouts, 2, "fp32", **layout)
    if "pipeline" in layout:  # the first stages hold nothing dense
        assert [hidden for hidden, _ in answers[:2]] == [[None] * 5] * 2
        answers = answers[2:]
    tensor = layout.get("tensor", 1)
    for at in range(0, len(answers), tensor):
        head = torch.cat([head for _, head in answers[at : at + tensor]])
        for hidden, _ in answers[at : at + tensor]:
            for rollout, rows in zip(rollouts, hidden, strict=True):
                expected = teachers.logits_at_responses(model, rollout)
                torch.testing.assert_close((rows @ head.T), expected[:, : len(head)], atol=2e-5, rtol=1e-5)


def whole_answers(parallel, config, rollouts):
    """The student's logits at the response tokens, and the teachers' log-probabilities of answers."""
    student, _, pack = steps.build(parallel, config, VOCAB_SIZE)
    return [student.logits(b) for b in pack(rollouts)], steps.told(parallel, config, rollouts, VOCAB_SIZE, 3)


def test_what_is_told_by_token_is_whole(ranks, paths):  # noqa: F811
    given = invariance.config(paths, "qwen3"), invariance.rollouts()
    [(logits, told)] = ranks.run(1, whole_answers, *given, tensor=1)
    for found, theirs in ranks.run(2, whole_answers, *given, context=2):
        for mine, expected in zip(found, logits, strict=True):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)
        for mine, expected in zip(theirs, told, strict=True):
            assert mine == {name: x if x is None else pytest.approx(x, rel=1e-5) for name, x in expected.items()}


def test_fp8_is_measured_over_all_parts(ranks, tmp_path):
    """Blocks of a row do not depend on how sequences are split."""
    models = {"student": tiny.build("qwen3", vocab_size=96, **fp8.SIZES)}
    models["teacher"] = tiny.build("qwen3", seed=1, **fp8.SIZES)
    folders = {name: tiny.save(m, tmp_path / name) for name, m in models.items()}
    how = {"student": "full", "teachers": ["t"], "heads": ["all"], "recipe": "blockwise"}
    one, noises = fp8.measured(ranks, folders, **how)
    other, others = fp8.measured(ranks, folders, layout={"context": 2}, **how)
    assert other.num_tokens == one.num_tokens
    assert other.signal == pytest.approx(one.signal, rel=1e-4)
    for name, noise in noises.items():
        assert others[name].kl == pytest.approx(noise.kl, rel=0.02)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def save_and_go_on(parallel, config, rollouts, run_dir):
    """Saves after a step; the metrics and weights of the next."""
    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    student.step(pack(rollouts[parallel.data_rank :: parallel.data_size]), objective)
    Checkpoints(run_dir, parallel, keep_last=1).save(student, {"step": 1})
    return _one_more(parallel, student, objective, pack, rollouts)


def restore_and_go_on(parallel, config, rollouts, run_dir):
    from megatron_opd.student.checkpoint import Checkpoints

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    assert Checkpoints(run_dir, parallel, keep_last=1).restore(student)["step"] == 1
    return _one_more(parallel, student, objective, pack, rollouts)


def _one_more(parallel, student, objective, pack, rollouts):
    metrics = student.step(pack(rollouts[parallel.data_rank :: parallel.data_size]), objective)
    return [metrics], {}, {name: tensor.clone() for name, tensor in student.export()}


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"context": 2}, {"tensor": 1}),
        ({"tensor": 1}, {"context": 2}),
        pytest.param({"context": 2, "data": 2}, {"context": 2, "data": 2}, marks=pytest.mark.slow),
        pytest.param({"context": 2, "data": 2}, {"data": 4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_checkpoints_load_at_another_context(ranks, paths, tmp_path, first, then):  # noqa: F811
    given = invariance.config(paths, "qwen3", micro_batch_size=1), invariance.rollouts(), str(tmp_path)
    saved = ranks.run(size(first), save_and_go_on, *given, **first)
    restored = ranks.run(size(then), restore_and_go_on, *given, **then)
    invariance.assert_same(restored[0], saved[0])
    if first == then:
        assert restored[0][0] == saved[0][0]
        assert all(torch.equal(tensor, saved[0][2][name]) for name, tensor in restored[0][2].items())
