"""Trajectories in which something else wrote some tokens: the step is that of the dense formula in float64 on the
learnt tokens alone, on every layout and for every carrier of teachers that share the student's tokenizer."""

import copy
from dataclasses import replace

import oracle
import pytest
import steps
import test_step_invariance as invariance
import tiny
import torch
from test_carriers import as_list, known_at
from test_step_invariance import VOCAB_SIZE, paths  # noqa: F401

from megatron_opd.core.batching import pack
from megatron_opd.core.scores import Sampled, TopK

NUM_STEPS, TOP_K = 2, 7
MASKS = {
    "begins with context": (0, 0, 1, 1, 1),
    "ends with context": (1, 1, 1, 0, 0),
    "one learnt token": (0, 0, 1, 0),
    "learnt behind context": (1, 1, 0, 0, 1, 1),
    "all learnt": (1, 1, 1),
    "in turns": (1, 0, 1, 0, 1, 0, 1),
    "long context": (1, *[0] * 12, 1, 1),
    "learnt at both ends": (1, 0, 0, 0, 1),
}


def trajectories(sources=("a", "b")):
    """One of each mask; teacher t1 sees a longer prompt of every third one."""
    made = []
    for i, mask in enumerate(MASKS.values()):
        prompt = tuple(3 + (5 * i + t) % 80 for t in range(2 + i % 4))
        ids = tuple((11 * i + 7 * t) % VOCAB_SIZE for t in range(len(mask)))
        one = tiny.rollout(prompt, ids, learnt=mask, source=sources[i % 2], index=i)
        seen = {"t1": (8, *prompt, 9, 9)} if i % 3 == 0 else {}
        made.append(replace(one, prompt=replace(one.prompt, teacher_ids=seen)))
    return made


class Reference(steps.Reference):
    """With the metrics that every carrier has."""

    @torch.no_grad()
    def metrics(self, rollouts):
        student, mismatch = [], []
        for rollout in rollouts:
            (ids, rows), tokens = steps.place(rollout), torch.tensor(steps.learnt(rollout))[:, None]
            logits = self.student(ids).logits[0, rows]
            student.append(self.logp(self.student, ids, rows).gather(-1, tokens)[:, 0])
            lag = oracle.log_softmax(logits, self.vocab_size).gather(-1, tokens)[:, 0] - torch.tensor(rollout.logps)
            mismatch.append(lag.exp() - 1 - lag)
        return {"logprob/student": torch.cat(student).mean().item(), "mismatch/kl": torch.cat(mismatch).mean().item()}


def assert_same(answers, reference, rollouts):
    """The ranks' (metrics by step, …, weights) are the reference's."""
    for number in range(1, NUM_STEPS + 1):
        expected = reference.metrics(rollouts)
        expected |= reference.step(rollouts, number)
        for metrics, *_ in answers:
            found = metrics[number - 1]
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5), number
    assert expected["num_tokens"] == sum(sum(mask) for mask in MASKS.values())
    for name, parameter in reference.student.named_parameters():
        torch.testing.assert_close(answers[0][-1][name].double(), parameter.data, atol=1e-5, rtol=0, msg=name)


def model(family, changes):
    return copy.deepcopy(invariance.model(family, tuple(changes.items())))


CASES = {
    "alone": ("reverse", {"tensor": 1}, False),
    "tp2": ("jsd", {"tensor": 2}, False),
    "pp2": ("forward", {"pipeline": 2}, False),
    "cp2": ("jsd_logits", {"context": 2}, False),
    "packed": ("jsd", {"tensor": 1}, True),
    "packed tp2pp2": ("reverse", {"tensor": 2, "pipeline": 2, "sequence": True}, True),
}


@pytest.mark.parametrize(("loss", "layout", "packing"), CASES.values(), ids=CASES.keys())
def test_hidden_states(ranks, paths, loss, layout, packing):  # noqa: F811
    made = invariance.config(paths, "qwen3", loss, train={"packing": packing})
    answers = ranks.run(size(layout), steps.train, made, trajectories(), VOCAB_SIZE, NUM_STEPS, **layout)
    teachers = [model(family, changes) for family, changes in invariance.TEACHERS]
    reference = Reference(made, model("qwen3", invariance.STUDENTS["qwen3"]), teachers, VOCAB_SIZE)
    assert_same(answers, reference, trajectories())


def size(layout):
    return layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)


def train_on(parallel, config, rollouts, scores, vocab_size=VOCAB_SIZE):
    """A student whose one teacher said `scores` of the rollouts."""
    from megatron_opd.loss.distillation import Distillation
    from megatron_opd.loss.objective import Objective
    from megatron_opd.student.student import Student
    from megatron_opd.trainer.experience import packing_settings

    student = Student(config, parallel)
    term = Distillation(config.loss, 1.0, student.vocab_shard(vocab_size), tuple(config.teachers), (None,))
    settings = packing_settings(config.train, config.precision.fp8, config.parallel, parallel)
    weights = [[1.0]] * len(rollouts)
    batches = pack(rollouts, **settings, scores=[scores], weights=weights)
    metrics = [student.step(batches, Objective(term)) for _ in range(NUM_STEPS)]
    return metrics, {name: tensor.clone() for name, tensor in student.export()}


class Told(Reference):
    """The teacher is seen through what it told of each learnt token."""

    def score(self, rollout):
        tokens = torch.tensor(steps.learnt(rollout))
        with torch.no_grad():
            logp = self.logp(self.teachers[0], *steps.place(rollout))
        if self.config.loss.kind == "sampled":
            return Sampled(logp.gather(-1, tokens[:, None])[:, 0].float())
        lists = as_list(logp, tokens, TOP_K)
        return TopK(lists.ids_RK[:, :TOP_K], lists.logp_RK[:, :TOP_K])

    def loss(self, rollout):
        score, student = self.score(rollout), self.logp(self.student, *steps.place(rollout))
        if self.config.loss.kind == "sampled":
            q = student.gather(-1, torch.tensor(steps.learnt(rollout))[:, None])[:, 0]
            ratio = torch.exp(q.detach() - torch.tensor(rollout.logps)).clamp(max=self.config.loss.importance_cap)
            return ratio * (q - score.logp_R.double()) ** 2 / 2
        values = []
        for t, logq in enumerate(student):
            known = known_at(score, t)
            listed = sorted(known)
            target = oracle.list_over_listed(known, listed, self.vocab_size)
            values.append(oracle.divergence(oracle.over_listed(logq, listed), target, self.config.loss.beta))
        return torch.stack(values)


TOLD = {
    "topk tp2": ("topk", {"tensor": 2}, False),
    "topk cp2": ("topk", {"context": 2}, False),
    "topk packed pp2": ("topk", {"pipeline": 2}, True),
    "sampled pp2": ("sampled", {"pipeline": 2}, False),
    "sampled cp2tp2": ("sampled", {"context": 2, "tensor": 2, "sequence": True}, False),
    "sampled packed tp2": ("sampled", {"tensor": 2}, True),
}


@pytest.mark.parametrize(("carrier", "layout", "packing"), TOLD.values(), ids=TOLD.keys())
def test_lists_and_sampled_tokens(ranks, paths, carrier, layout, packing):  # noqa: F811
    loss = {"kind": "sampled", "estimator": "k2"} if carrier == "sampled" else {"beta": 0.6}
    made = tiny.config(
        paths["qwen3"],
        [{"name": "told", "model": "", "backend": "sglang", "carrier": carrier, "top_k": TOP_K}],
        student={"vocab_multiple": 4},
        loss={**loss, "chunk_tokens": 5},
        optim=invariance.OPTIM,
        train={"steps": 6, "micro_batch_size": 2, "packing": packing},
    )
    rollouts = trajectories()
    student, teacher = model("qwen3", invariance.STUDENTS["qwen3"]), model(*invariance.TEACHERS[0])
    reference = Told(made, student, [teacher], VOCAB_SIZE)
    scores = [reference.score(rollout) for rollout in rollouts]
    answers = ranks.run(size(layout), train_on, made, rollouts, scores, **layout)
    assert_same(answers, reference, rollouts)
