"""The step on hidden states and the head's shard gives every parameter the gradient that the logits give it, and makes
no logits but a chunk's."""

from dataclasses import dataclass

import pairwise
import pytest
import steps
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

VOCAB_SIZE, CHUNK = 90, 3
ERROR = {"fp32": 2e-6, "bf16": 2e-2}
"""Relative to the norm of a parameter's gradient; in bfloat16 the logits' gradient is rounded in one form only."""
TEACHERS = {"t0": ("llama", {"hidden_size": 48, "vocab_size": 101}), "t1": ("qwen3_tied", {"hidden_size": 24})}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"untied": ("qwen3", {"vocab_size": 101}), "tied": ("qwen2", {"vocab_size": 107}), **TEACHERS}
    return {name: tiny.save(tiny.build(family, **sizes), root / name) for name, (family, sizes) in made.items()}


def config(paths, student, dtype, teacher_dtype=None):
    return tiny.config(
        paths[student],
        [{"name": name, "model": paths[name], "dtype": teacher_dtype or dtype} for name in TEACHERS],
        student={"dtype": dtype, "vocab_multiple": 4},
        loss={"beta": 0.4, "ensemble": "probs", "chunk_tokens": CHUNK},
        optim={"distributed": False},
        train={"steps": 1, "micro_batch_size": 2},
    )


@dataclass
class OfLogits:
    """An objective that wants logits."""

    objective: object
    takes_hidden = False

    def __call__(self, batch, student):
        assert isinstance(student, torch.Tensor)
        return self.objective(batch, student)


class Widest(TorchDispatchMode):
    """The most rows of any tensor that is made with so many columns, which no layer but the head has."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (self.columns,) and not func.is_view:
            self.rows = max(self.rows, out.numel() // self.columns)
        return out


def gradients(parallel, made, rollouts):
    """(loss sums, gradient of every parameter, most rows of logits) of the hidden-state form and of the logits form."""
    from megatron_opd.student import pipeline

    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    vocab = student.vocab_shard(VOCAB_SIZE)
    found = []
    for form in (objective, OfLogits(objective)):
        student.model.train()
        student.model.zero_grad_buffer()
        with Widest(vocab.stop - vocab.start) as widest:
            results = pipeline.train(student.model, batches, student._at_rows(form))
        grads = {name: p.main_grad.clone() for name, p in student.gpt.named_parameters()}
        sums = torch.stack([one[name] for one in results for name in sorted(one)]) if results else None
        found.append((sums, grads, widest.rows))
    return found


LAYOUTS = [
    {"tensor": 1},
    {"tensor": 2},
    {"tensor": 2, "sequence": True},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence": True},
    {"data": 2},
]
CASES = [(student, "fp32", layout) for student in ("untied", "tied") for layout in LAYOUTS]
CASES += [("untied", "bf16", LAYOUTS[0]), ("untied", "bf16", LAYOUTS[2]), ("tied", "bf16", LAYOUTS[4])]


@pytest.mark.parametrize(("student", "dtype", "layout"), pairwise.thin(CASES), ids=str)
def test_every_gradient_is_that_of_the_logits(ranks, paths, student, dtype, layout):
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    seen = 0
    for hidden, logits in ranks.run(size, gradients, config(paths, student, dtype), rollouts, **layout):
        assert hidden[1].keys() == logits[1].keys()
        for name, expected in logits[1].items():
            error = float((hidden[1][name] - expected).norm() / expected.norm())
            assert expected.norm() > 0
            assert error <= ERROR[dtype], (name, error)
        if logits[0] is not None:
            torch.testing.assert_close(hidden[0], logits[0], rtol=ERROR[dtype], atol=10 * ERROR[dtype])
            assert 0 < hidden[2] <= CHUNK  # the head meets a chunk of response tokens at a time
            assert logits[2] > 2 * CHUNK  # and this would have seen more
            seen += 1
    assert seen == size // layout.get("pipeline", 1)


def test_models_of_different_precision(ranks, paths):
    """A student in bfloat16 under teachers in float32 loses what bfloat16 loses, and no more."""
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    mixed = ranks.run(1, gradients, config(paths, "untied", "bf16", "fp32"), rollouts)[0]
    full = ranks.run(1, gradients, config(paths, "untied", "fp32"), rollouts)[0]
    for name, expected in full[0][1].items():
        assert float((mixed[0][1][name] - expected).norm() / expected.norm()) <= 0.1, name
