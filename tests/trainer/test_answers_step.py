"""Answers of several hands and prompts of teachers' own, through the real step on every layout: what one process of
transformers and plain torch makes of them."""

import copy
from dataclasses import replace

import oracle
import pytest
import steps
import test_step_invariance as invariance
import test_teachers
import tiny
import torch

from megatron_opd import config as c

VOCAB_SIZE, NUM_STEPS = invariance.VOCAB_SIZE, 2
ANSWERS = {
    "GKD": {"lmbda": 0.5, "sft_alpha": 0.4, "distill_alpha": 0.7},
    "SeqKD": {"lmbda": 0.5, "seq_kd": True, "sft_alpha": 1.0, "distill_alpha": 0.0},
    "SFT": {"lmbda": 0.0, "sft_alpha": 0.5},
}
LAYOUTS = {
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "dp2": {"data": 2},
    "tp2pp2sp": {"tensor": 2, "pipeline": 2, "sequence": True},
    "dp2tp2": {"data": 2, "tensor": 2},
}


def rollouts(method):
    """Whose origins make whole micro-batches and replicas of one kind and others mixed; teachers see other prompts."""
    made = invariance.rollouts()
    if method == "SFT":
        return [replace(r, origin="dataset") for r in made]
    origins = ["dataset", "dataset", "student", "dataset", "student", "student", "dataset", "student"]
    seen = [replace(r, origin=o) for r, o in zip(made, origins, strict=True)]
    return [privileged(r) if i % 3 else r for i, r in enumerate(seen)]


def privileged(rollout):
    """Teacher t1 sees a longer prompt than the student, teacher t0 the student's."""
    longer = (8, 9, *rollout.prompt.token_ids, 7)
    return replace(rollout, prompt=replace(rollout.prompt, teacher_ids={"t1": longer}))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"qwen3": invariance.model("qwen3", (("vocab_size", 93),))}
    made |= {f"t{n}": invariance.model(f, tuple(ch.items())) for n, (f, ch) in enumerate(invariance.TEACHERS)}
    return {name: tiny.save(m, root / name) for name, m in made.items()}


def config(paths, method):
    made = replace(invariance.config(paths, "qwen3"), answers=c.AnswersConfig(**ANSWERS[method]))
    return made if method != "SFT" else replace(made, teachers=[])


class Reference(steps.Reference):
    """The loss with the weights of others' answers, and every teacher behind the prompt that it sees."""

    def loss(self, rollout):
        answers, is_ours = self.config.answers, rollout.origin == "student"
        student = self.logp(self.student, *steps.place(rollout))
        said = student.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        entropy = torch.zeros_like(said) if is_ours else -answers.sft_alpha * said
        weight = 1.0 if is_ours else answers.distill_alpha
        return entropy + (weight * self.apart(rollout, student) if self.teachers and weight else 0.0)

    def apart(self, rollout, student):
        return oracle.divergence(student, self.target(rollout), self.config.loss.beta)


@pytest.fixture(scope="module", params=ANSWERS)
def alone(request, ranks, paths):
    """(method, what one process finds)."""
    made = config(paths, request.param)
    return request.param, ranks.run(1, steps.train, made, rollouts(request.param), VOCAB_SIZE, NUM_STEPS)[0]


def test_one_process_is_transformers_and_torch(alone, paths):
    method, (metrics, _, weights) = alone
    made = config(paths, method)
    teachers = [copy.deepcopy(invariance.model(f, tuple(ch.items()))) for f, ch in invariance.TEACHERS]
    student = copy.deepcopy(invariance.model("qwen3", (("vocab_size", 93),)))
    reference = Reference(made, student, teachers[: len(made.teachers)], VOCAB_SIZE)
    for number, found in enumerate(metrics, start=1):
        expected = reference.step(rollouts(method), number)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    for name, parameter in reference.student.named_parameters():
        torch.testing.assert_close(weights[name].double(), parameter.data, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts_do_not_change_the_step(ranks, alone, paths, layout):
    method, expected = alone
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    found = ranks.run(size, steps.train, config(paths, method), rollouts(method), VOCAB_SIZE, NUM_STEPS, **layout)
    invariance.assert_same(found[0], expected)


@pytest.mark.parametrize("layout", test_teachers.LAYOUTS.values(), ids=test_teachers.LAYOUTS.keys())
def test_a_teachers_rows_follow_its_own_prompt(ranks, paths, layout):
    """Hidden states times head rows are transformers' logits at the response behind the prompt that the teacher sees,
    longer or shorter than the student's, and with rollouts beside that it sees as the student does."""
    own = tiny.rollouts(count=5)
    seen = [(4,), None, (9, 8, 7, 6, 5, 4, 3, 2, 1, 2, 3, 4), (5, 5), None]
    views = [{} if ids is None else {"t": ids} for ids in seen]
    asked = [replace(r, prompt=replace(r.prompt, teacher_ids=v)) for r, v in zip(own, views, strict=True)]
    behind = [
        r if ids is None else replace(r, prompt=replace(r.prompt, token_ids=ids))
        for r, ids in zip(own, seen, strict=True)
    ]
    size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    answers = ranks.run(size, test_teachers.score, paths["t0"], asked, 2, "fp32", **layout)
    last = answers[-layout.get("tensor", 1) :]
    model = invariance.model("llama", tuple(invariance.TEACHERS[0][1].items()))
    head = torch.cat([head for _, head in last])
    for hidden, _ in last:
        for rollout, rows in zip(behind, hidden, strict=True):
            expected = test_teachers.logits_at_responses(model, rollout)[:, : test_teachers.STUDENT_COLUMNS]
            torch.testing.assert_close(rows @ head.T, expected, atol=2e-4, rtol=1e-5)
