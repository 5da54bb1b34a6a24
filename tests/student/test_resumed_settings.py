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


def restored(parallel, config, rollouts, run_dir):
    """Whether random numbers and the next step after a restore are those of the student that went on."""
    import torch

    from megatron_opd.student.checkpoint import Checkpoints
    from megatron_opd.student.student import Student

    student, objective, pack = steps.build(parallel, config, VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    student.step(batches, objective)
    torch.manual_seed(100 + parallel.rank)
    torch.rand(parallel.rank)
    Checkpoints(run_dir, parallel, keep_last=1).save(student, {"step": 1})
    drawn = torch.rand(3)
    metrics = student.step(batches, objective)
    torch.manual_seed(0)
    other = Student(config, parallel)
    Checkpoints(run_dir, parallel, keep_last=1).restore(other)
    again = torch.rand(3)
    same = [torch.equal(drawn, again), other.step(batches, objective) == metrics]
    weights = zip(student.gpt.parameters(), other.gpt.parameters(), strict=True)
    return [*same, all(torch.equal(a, b) for a, b in weights)], drawn.tolist()


@pytest.mark.parametrize("layout", [{"data": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_every_rank_goes_on_with_its_own_random_numbers_and_bitwise(ranks, tmp_path, layout):
    model = tiny.save(tiny.build("qwen3"), tmp_path / "model")
    teacher = tiny.save(tiny.build("qwen3", seed=1), tmp_path / "teacher")  # its own teacher has no gradient for Adam
    config = tiny.config(model, [{"name": "t", "model": teacher, "dtype": "fp32"}], optim={"lr": 1e-2})
    found = ranks.run(2, restored, config, tiny.rollouts(count=4, vocab_size=VOCAB_SIZE), str(tmp_path), **layout)
    assert [same for same, _ in found] == [[True] * 3] * 2
    assert found[0][1] != found[1][1]  # otherwise one's would do for both
