"""A checkpoint continues under the optimizer's settings of now: what it was saved with does not come back."""

import pytest
import steps
import tiny

VOCAB_SIZE = 90
SAVED = {"lr": 1e-2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
CHANGED = {"lr": 2e-3, "min_lr": 1e-3, "schedule": "linear", "beta1": 0.5, "eps": 1e-3, "weight_decay": 0.1}


def resumed(parallel, saved, changed, rollouts, run_dir):
    """What the optimizer has before and after two steps of `saved` are restored for `changed`, and the next lr."""
    from megatron_opd.student.checkpoint import Checkpoints
    from megatron_opd.student.student import Student

    student, objective, pack = steps.build(parallel, saved, VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    for _ in range(2):
        student.step(batches, objective)
    Checkpoints(run_dir, parallel, keep_last=1).save(student, {"step": 2})
    other = Student(changed, parallel)
    fresh = settings(other)
    Checkpoints(run_dir, parallel, keep_last=1).restore(other)
    return fresh, settings(other), other.step(batches, objective)["lr"], other.scheduler.num_steps


def settings(student):
    names = ("max_lr", "min_lr", "betas", "eps")
    return [{name: group[name] for name in names} for group in student.optimizer.param_groups]


@pytest.mark.parametrize(
    ("family", "distributed", "layout"),
    [
        ("qwen3", True, {"data": 2}),
        ("qwen3", False, {"data": 2}),
        ("qwen3_moe", True, {"tensor": 2, "expert": 2, "sequence": True}),  # two optimizers in one
    ],
)
def test_what_was_changed_counts(ranks, tmp_path, family, distributed, layout):
    model = tiny.save(tiny.build(family), tmp_path / "model")
    saved, changed = (
        tiny.config(model, [{"name": "t", "model": model}], optim={**optim, "distributed": distributed})
        for optim in (SAVED, CHANGED)
    )
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    for fresh, now, lr, num_steps in ranks.run(2, resumed, saved, changed, rollouts, str(tmp_path), **layout):
        assert now == fresh
        assert lr == pytest.approx(steps.learning_rate(changed.optim, 3, changed.train.steps))
        assert num_steps == 3  # the schedule goes on where it was
