"""In-process teachers: hidden states times head rows are transformers' logits at the responses, on every layout."""

import pairwise
import pytest
import tiny
import torch

from megatron_opd.config import TeacherConfig
from megatron_opd.core.vocab import VocabShard

STUDENT_COLUMNS = 96
"""The student's padded vocabulary, along which heads are cut."""
TEACHERS = {  # family, what differs from the student's sizes
    "larger": ("llama", {"hidden_size": 48, "vocab_size": 101, "num_hidden_layers": 4}),
    "smaller, tied": ("qwen3_tied", {"hidden_size": 24, "vocab_size": 70}),
    "biases": ("qwen2", {"tie_word_embeddings": False}),
    "mixture": ("qwen3_moe", {"vocab_size": 93}),
}
LAYOUTS = {**pairwise.LAYOUTS, "tp2pp2sp": {"tensor": 2, "pipeline": 2, "sequence": True}}


def score(parallel, model_dir, rollouts, micro_batch_size, dtype):
    """([hidden [R, D] or None by rollout], this rank's head rows or None)."""
    from megatron_opd.teachers.megatron_teacher import MegatronTeacher

    share = STUDENT_COLUMNS // parallel.tensor_size
    start = parallel.tensor_rank * share
    vocab = VocabShard(start, start + share, STUDENT_COLUMNS)
    config = TeacherConfig(name="t", model=model_dir, dtype=dtype)
    teacher = MegatronTeacher(config, parallel, vocab, micro_batch_size=micro_batch_size)
    assert teacher.score([]) == []
    scores = teacher.score(rollouts)
    again = teacher.score(rollouts[::-1])[::-1]  # scoring leaves nothing behind
    for one, other in zip(scores, again, strict=True):
        assert one.hidden_RD is other.hidden_RD is None or torch.allclose(one.hidden_RD, other.hidden_RD, atol=1e-4)
    assert not any(x.hidden_RD.requires_grad for x in scores if x.hidden_RD is not None)
    return [x.hidden_RD for x in scores], teacher.head_LD


@torch.no_grad()
def logits_at_responses(model, rollout):
    start = len(rollout.prompt.token_ids)
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    return model(ids).logits[0, start - 1 : -1]


def assert_scores(ranks, model, model_dir, *, micro_batch_size=2, dtype="fp32", layout, atol=2e-5):
    rollouts = tiny.rollouts(count=5, vocab_size=70)
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    answers = ranks.run(size, score, str(model_dir), rollouts, micro_batch_size, dtype, **layout)
    tensor_size = layout.get("tensor", 1)
    for hidden, head in answers[:-tensor_size]:  # earlier stages hold nothing dense
        assert head is None
        assert hidden == [None] * 5
    last = answers[-tensor_size:]
    head = torch.cat([head for _, head in last])
    assert head.shape == (STUDENT_COLUMNS, model.config.hidden_size)
    known = min(model.config.vocab_size, STUDENT_COLUMNS)
    assert (head[known:] == 0).all()
    for hidden, _ in last:  # every rank of the last stage has every row
        for rollout, rows in zip(rollouts, hidden, strict=True):
            expected = logits_at_responses(model, rollout)[:, :known]
            torch.testing.assert_close((rows @ head.T)[:, :known].float(), expected.float(), atol=atol, rtol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "layout"), pairwise.thin(pairwise.product(["larger", "smaller, tied", "biases"], LAYOUTS))
)
def test_scores_are_the_teachers_logits(ranks, tmp_path, teacher, layout):
    family, changes = TEACHERS[teacher]
    model = tiny.build(family, **changes)
    assert_scores(ranks, model, tiny.save(model, tmp_path / "t"), layout=layout)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 8])
def test_any_micro_batch_size(ranks, tmp_path, micro_batch_size):
    model = tiny.build("qwen3")
    layout = LAYOUTS["tp2pp2sp"] if micro_batch_size == 3 else LAYOUTS["pp2"]
    assert_scores(ranks, model, tiny.save(model, tmp_path / "t"), layout=layout, micro_batch_size=micro_batch_size)


def test_mixture_of_experts(ranks, tmp_path):
    family, changes = TEACHERS["mixture"]
    model = tiny.build(family, **changes)
    layout = {"tensor": 2, "expert": 2, "sequence": True}
    assert_scores(ranks, model, tiny.save(model, tmp_path / "t"), layout=layout)


def test_half_precision(ranks, tmp_path):
    model = tiny.build("llama").bfloat16()
    assert_scores(ranks, model, tiny.save(model, tmp_path / "t"), layout=LAYOUTS["tp2"], dtype="bf16", atol=0.15)
