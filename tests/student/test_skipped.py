"""A step whose loss or gradient is not finite is left out on every rank, says why, and is as if it had never been."""

import copy

import pytest
import steps
import tiny
import torch

VOCAB_SIZE = 90
MIXED = {"tensor": 2, "expert": 2, "sequence": True}
LAYOUTS = [{"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"tensor": 2, "data": 2}]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"qwen3": {}, "qwen3_moe": {"norm_topk_prob": True}, "llama": {"hidden_size": 48}}
    return {family: tiny.save(tiny.build(family, **sizes), root / family) for family, sizes in made.items()}


def config(paths, student="qwen3", **settings):
    return tiny.config(
        paths[student],
        [{"name": "good", "model": paths["qwen3"]}, {"name": "bad", "model": paths["llama"]}],
        student={"dtype": settings.pop("dtype", "fp32")},
        optim={"lr": 1e-2, "warmup_steps": 3, "distributed": settings.pop("distributed", True)},
        train={"steps": 8, "micro_batch_size": 2, **settings},
    )


def state(student):
    """Everything that a step changes, bit for bit."""
    parts = [student.optimizer.state_dict(), student.scheduler.state_dict()]
    return copy.deepcopy([*(p.detach() for p in student.gpt.parameters()), *_leaves(parts)])


def _leaves(x):
    if isinstance(x, dict):
        return [leaf for key in x for leaf in _leaves(x[key])]
    return [leaf for part in x for leaf in _leaves(part)] if isinstance(x, list | tuple) else [x]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def spoilt(batches, parallel):
    """The last replica's second micro-batch with a NaN in what teacher "bad" told about its fourth token."""
    made = copy.deepcopy(batches)
    hidden_TD = getattr(made[1].teachers[1], "hidden_RD", None)
    if parallel.data_rank == parallel.data_size - 1 and hidden_TD is not None:
        hidden_TD[3, 1] = float("nan")
    return made


def bad_loss(parallel, made, rollouts):
    """(metrics and reasons of three steps, whether the bad one changed nothing, final state with and without it)."""
    finals = []
    for has_bad_step in (True, False):
        student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
        batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
        told = [(student.step(batches, objective), student.skipped)]
        if has_bad_step:
            before = state(student)
            told.append((student.step(spoilt(batches, parallel), objective), student.skipped))
            unchanged = same(before, state(student))
        told.append((student.step(batches, objective), student.skipped))
        finals.append(state(student))
        if has_bad_step:
            answer = told, unchanged
    token = batches[1].predicted_at_T[3].item(), batches[1].tokens_BS.shape[1]
    return *answer, same(*finals), token


CASES = [pytest.param("qwen3", layout, {}, id=str(layout)) for layout in LAYOUTS]
CASES += [
    pytest.param("qwen3_moe", MIXED, {}, id="experts"),
    pytest.param("qwen3", {"data": 2}, {"distributed": False}, id="plain optimizer"),
    pytest.param("qwen3", {"tensor": 2}, {"dtype": "bf16"}, id="bf16"),
]


@pytest.mark.parametrize(("student", "layout", "settings"), CASES)
def test_a_step_with_a_bad_token_has_never_been(ranks, paths, student, layout, settings):
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    answers = ranks.run(size, bad_loss, config(paths, student, **settings), rollouts, **layout)
    for told, unchanged, is_same, _ in answers:
        assert told == answers[0][0]  # all ranks decide alike and know the same
        assert unchanged
        assert is_same
    (first, bad, last), _, _, (row, length) = answers[-1][0], *answers[-1][1:]
    assert [m["step/skipped"] for m, _ in (first, bad, last)] == [0, 1, 0]
    assert "loss" not in bad[0]
    assert bad[0]["kl/good"] == pytest.approx(last[0]["kl/good"], rel=1)  # what is finite is still told
    assert bad[0]["lr"] == last[0]["lr"]  # the schedule did not advance
    replica = layout.get("data", 1) - 1
    place = f"replica {replica}, micro-batch 1, row {row // length}, position {row % length + 1} "
    assert place in bad[1]
    assert "(not finite: what teacher 'bad' told)" in bad[1]
    assert first[1] is None
    assert last[1] is None


def bad_gradient(parallel, made, rollouts):
    """The same for an infinite gradient of one rank's last norm, with a loss that is finite."""
    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    batches = pack(rollouts[parallel.data_rank :: parallel.data_size])
    before = state(student)
    if parallel.rank == parallel.world_size - 1:
        student.gpt.decoder.layers[-1].mlp.linear_fc2.weight.register_hook(lambda grad: grad * float("inf"))
    metrics = student.step(batches, objective)
    return metrics, student.skipped, same(before, state(student))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_gradient_that_is_not_finite(ranks, paths, layout):
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    rollouts = tiny.rollouts(count=8, vocab_size=VOCAB_SIZE)
    answers = ranks.run(size, bad_gradient, config(paths), rollouts, **layout)
    for metrics, why, unchanged in answers:
        assert (metrics, why) == answers[0][:2]
        assert unchanged
        assert metrics["step/skipped"] == 1
        assert metrics["loss"] > 0
        assert "grad_norm" not in metrics
        assert "mlp.linear_fc2.weight" in why


def until_the_end(parallel, made, rollouts):
    """Steps until the run would end, and its error."""
    student, objective, pack = steps.build(parallel, made, VOCAB_SIZE)
    good = pack(rollouts)
    bad, count = spoilt(good, parallel), 0
    for batches in (bad, bad, good, bad, bad, bad, bad):
        try:
            student.step(batches, objective)
        except FloatingPointError as error:
            return count, str(error)
        count += 1
    return count, None


def test_too_many_in_a_row_end_the_run(ranks, paths):
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    answers = ranks.run(2, until_the_end, config(paths, max_skipped=2), rollouts)
    assert answers[0] == answers[1]
    count, error = answers[0]
    assert count == 5  # those before the good step are forgotten
    assert error.startswith("the loss is nan")
    assert "train.max_skipped" in error
