"""Distillation, policy gradient and rewards together through the real step: the same update in every layout, and that
of transformers and plain torch in float64 with advantages by loops."""

import copy
import math
from dataclasses import replace
from functools import cache
from statistics import fmean, stdev

import oracle
import pytest
import steps
import tiny
import torch
from test_step_invariance import OPTIM, STUDENTS, TEACHERS, VOCAB_SIZE, WEIGHTS, model, rollouts, saved

from megatron_opd import config as c

NUM_STEPS = 2
REWARDS = (1.0, 0.0, 0.25, 0.5, 0.0, 0.0, 0.0, 0.75)
"""Two answers to a prompt, two places apart: 1 and 0.25, 0 and 0.5, 0 and 0, 0 and 0.75."""
METHODS = {
    "hybrid": {
        "loss": {"beta": 0.5, "weight": 0.5, "anneal": 0.2, "aggregation": "seq-mean-token-mean", "chunk_tokens": 5},
        "policy": {"kl_coef": 0.3, "kl_discount": 1.0, "kl_from": "next", "kl_length_norm": True, "kl_clip": 4.0,
                   "kl_whiten": True, "loss": "importance", "importance_cap": 2.0, "aggregation": "seq-mean-token-sum"},
        "rl": {"weight": 0.8, "distill_on": "unsolved"},
        "rollout": {"temperature": 0.9},
    },
    "kdrl": {
        "loss": {"kind": "sampled", "estimator": "k2", "weight": 0.1, "aggregation": "sum"},
        "policy": {"loss": "ppo", "clip_low": 0.9, "clip_high": 0.5},
        "rl": {"weight": 1.0, "normalise": False, "distill_on": "wrong"},
    },
}  # fmt: skip
TRAIN = {"steps": 6, "micro_batch_size": 2, "measure_after": True}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    made = {"student": model("qwen3", tuple(STUDENTS["qwen3"].items()))}
    made |= {f"t{n}": model(family, tuple(changes.items())) for n, (family, changes) in enumerate(TEACHERS)}
    return {name: tiny.save(m, root / name) for name, m in made.items()}


def graded():
    """Eight rollouts; of each four, the first and third answer one prompt, and the second and fourth."""
    made = rollouts()
    for i in (2, 3, 6, 7):
        made[i] = replace(made[i], prompt=made[i - 2].prompt)
    return [replace(r, reward=reward) for r, reward in zip(made, REWARDS, strict=True)]


def config(paths, method, optim=None, **train):
    made = tiny.config(
        paths["student"],
        [{"name": f"t{n}", "model": paths[f"t{n}"], **w} for n, w in enumerate(WEIGHTS)],
        student={"vocab_multiple": 4},
        optim={**OPTIM, **(optim or {})},
        train={**TRAIN, **train},
        **METHODS[method],
    )
    sources = [c.SourceConfig(name=name, path="") for name in ("a", "b")]
    return replace(made, data=c.DataConfig(train=sources))


@pytest.fixture(scope="module")
def alone(ranks, paths):
    """One process's results by (method, mini-batches), each computed once."""

    @cache
    def compute(method, minibatches=1):
        made = config(paths, method, minibatches=minibatches)
        return ranks.run(1, steps.train_shaped, made, graded(), VOCAB_SIZE, NUM_STEPS)[0]

    return compute


LAYOUTS = {
    "tp2": ({"tensor": 2}, {}),
    "pp2": ({"pipeline": 2}, {}),
    "dp2": ({"data": 2}, {}),
    "dp2 one rollout at a time": ({"data": 2}, {"micro_batch_size": 1}),
    "tp2pp2": ({"tensor": 2, "pipeline": 2}, {}),
    "dp2tp2": ({"tensor": 2, "data": 2}, {}),
    "four at a time": ({"tensor": 1}, {"micro_batch_size": 4}),
}
CASES = [pytest.param("hybrid", 1, *case, id=f"hybrid-{name}") for name, case in LAYOUTS.items()]
CASES += [pytest.param("kdrl", 1, *LAYOUTS[name], id=f"kdrl-{name}") for name in ("dp2", "tp2pp2")]
CASES += [pytest.param("hybrid", 2, *LAYOUTS[name], id=f"two updates-{name}") for name in ("dp2", "tp2pp2")]


@pytest.mark.parametrize(("method", "minibatches", "layout", "settings"), CASES)
def test_layouts_do_not_change_the_step(ranks, alone, paths, method, minibatches, layout, settings):
    size = layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("data", 1)
    made = config(paths, method, minibatches=minibatches, **settings)
    answers = ranks.run(size, steps.train_shaped, made, graded(), VOCAB_SIZE, NUM_STEPS, **layout)
    wanted, wanted_weights = alone(method, minibatches)
    for metrics, weights in answers:
        assert metrics == answers[0][0]  # every rank knows the same numbers
        for mine, theirs in zip(metrics, wanted, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=5e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, wanted_weights[name], atol=4e-6, rtol=0, msg=name)


class Reference(steps.Reference):
    """Everything about a step from its definitions, a trajectory at a time."""

    def prepare(self, made, number):
        """What depends on all answers: kept by position."""
        method, policy = self.config, self.config.policy
        self.episodes = []
        for r in made:
            if r.part == 0:
                self.episodes.append([])
            self.episodes[-1].append(r)
        self.tokens = sum(sum(r.learnt) for r in made)
        self.distill_weight = max(method.loss.weight - method.loss.anneal * (number - 1), 0.0)
        self.advantages, self.distilled = [], []
        for r in made:
            group = [e[0].reward for e in self.episodes if e[0].prompt.group == r.prompt.group]
            scale = stdev(group) or 1.0 if method.rl.normalise else 1.0
            reward = method.rl.weight * (r.reward - fmean(group)) / scale
            self.advantages.append(torch.full((sum(r.learnt),), reward, dtype=torch.float64))
            self.distilled.append(r.reward < 1 if method.rl.distill_on == "wrong" else max(group) < 1)
        if policy.kl_coef:
            x = [self.long_horizon(r) for r in made]
            every = torch.cat(x)
            spread = ((every - every.mean()) ** 2).mean().sqrt()
            self.advantages = [
                a + policy.kl_coef * (v - every.mean()) / spread for a, v in zip(self.advantages, x, strict=True)
            ]

    def long_horizon(self, rollout):
        """Of each learnt token, the mean over those after it of the clipped log p - log μ; 0 at the last."""
        clip = self.config.policy.kl_clip
        x = [max(-clip, min(clip, v)) for v in (self.told(rollout)[1] - torch.tensor(rollout.logps)).tolist()]
        after = [fmean(x[t + 1 :]) if t + 1 < len(x) else 0.0 for t in range(len(x))]
        return torch.tensor(after, dtype=torch.float64)

    def told(self, rollout):
        """(combined teachers [R, V], their log-probabilities of the learnt tokens [R]), float64."""
        target = self.target(rollout)
        return target, self.sampled(target, rollout)

    def sampled(self, logp, rollout):
        return logp.gather(-1, torch.tensor(steps.learnt(rollout))[:, None])[:, 0]

    def share(self, how, rollout):
        """What makes a sum over tokens, divided by their number, the aggregation."""
        [its] = [episode for episode in self.episodes if any(r is rollout for r in episode)]
        length, count = sum(sum(r.learnt) for r in its), len(self.episodes)
        over = {"seq-mean-token-mean": count * length, "seq-mean-token-sum": count, "sum": 1}
        return self.tokens / over.get(how, self.tokens)

    def loss(self, rollout):
        method, policy = self.config, self.config.policy
        i = next(i for i, r in enumerate(self.made) if r is rollout)
        ids, rows = steps.place(rollout)
        target, p = self.told(rollout)
        behaviour = torch.tensor(rollout.logps, dtype=torch.float64)
        student = self.logp(self.student, ids, rows)
        q = self.sampled(student, rollout)
        if method.loss.kind == "sampled":
            distance = torch.exp(q.detach() - behaviour).clamp(max=method.loss.importance_cap) * (q - p) ** 2 / 2
        else:
            distance = oracle.divergence(student, target, method.loss.beta)
        distill = self.distill_weight * self.distilled[i] * self.share(method.loss.aggregation, rollout) * distance
        tempered = oracle.log_softmax(self.student(ids).logits[0, rows], self.vocab_size, method.rollout.temperature)
        logq, advantage = self.sampled(tempered, rollout), self.advantages[i]
        ratio = torch.exp(logq - behaviour)
        if policy.loss == "ppo":
            clipped = ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high)
            gained = torch.minimum(ratio * advantage, clipped * advantage)
        else:
            weight = ratio.detach().clamp(max=policy.importance_cap)
            gained = weight * advantage * (1 + logq - logq.detach())
        return distill - self.share(policy.aggregation, rollout) * gained

    def step(self, made, number):
        self.made = made
        self.prepare(made, number)
        return super().step(made, number)


@pytest.mark.parametrize("method", METHODS)
def test_one_process_is_transformers_and_torch(alone, paths, method, tmp_path):
    metrics, weights = alone(method)
    teachers = [copy.deepcopy(model(family, tuple(changes.items()))) for family, changes in TEACHERS]
    mine = copy.deepcopy(model("qwen3", tuple(STUDENTS["qwen3"].items())))
    reference = Reference(config(paths, method), mine, teachers, VOCAB_SIZE)
    for number, found in enumerate(metrics, start=1):
        expected = reference.step(graded(), number)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5)
    for name, tensor in saved(reference.student, tmp_path / "m").items():
        torch.testing.assert_close(weights[name].double(), tensor, atol=1e-5, rtol=0, msg=name)
    assert metrics[0]["reward/mean"] == fmean(REWARDS)
    assert metrics[0]["reward/mixed_groups"] == 0.75
    assert metrics[0]["advantage/mean"] == pytest.approx(float(torch.cat(reference.advantages).mean()), abs=1e-5)
    assert metrics[0]["advantage/std"] == pytest.approx(float(torch.cat(reference.advantages).std(correction=0)))
    assert metrics[0]["after/kl/ensemble"] == pytest.approx(metrics[1]["kl/ensemble"])  # the same answers again


EQUAL = ((0, 0, 1, 2), (0.5, 0.0, 0.25)), ((0, 1, 1, 2), (0.0, 1.0, 0.0))
"""By replica, the episodes of its trajectories, and the episodes' rewards."""
UNEQUAL = ((0, 0, 1, 2), (0.5, 0.0, 0.25)), ((0, 1, 1, 2, 2), (0.0, 1.0, 0.0))


def of_replicas(orders=EQUAL):
    """By replica, trajectories of three episodes of one prompt. A further one begins with a prompt that was written
    anew, and reads what the one before learns as context. In the second replica it is in the next micro-batch."""
    made = rollouts()
    found = []
    for d, (order, rewards) in enumerate(orders):
        mine, masks = [made[4 * d]] * len(order), [(1, 1, 0, 0), (0, 0, 1, 0, 1), (0, 1, 1, 1), (1, 0, 0, 1)]
        masks.append((0, 0, 1, 1))
        for i, (episode, mask) in enumerate(zip(order, masks, strict=False)):
            first = mine[0].prompt
            part = int(order[:i].count(episode))
            before = mine[i - 1].token_ids[:2] if part else ()
            prompt = replace(first, token_ids=(7, *first.token_ids[1:], 9) if part else first.token_ids)
            ids = (*before, *range(20 + 5 * i, 20 + 5 * i + len(mask) - len(before)))
            size = sum(mask)
            mine[i] = replace(
                mine[i], prompt=prompt, sample=episode, part=part, token_ids=ids, learnt=tuple(map(bool, mask)),
                logps=tuple(-0.5 - 0.3 * t - i for t in range(size)), versions=(0,) * size, reward=rewards[episode],
            )  # fmt: skip
        found.append(mine)
    return found


@pytest.mark.parametrize(
    ("method", "layout"),
    [("hybrid", {"tensor": 1}), ("hybrid", {"data": 2}), ("kdrl", {"data": 2, "tensor": 2}), ("kdrl", {"context": 2})],
    ids=str,
)
def test_episodes_of_several_trajectories(ranks, paths, method, layout, tmp_path):
    """They share a reward, a place in the group, and a weight in means over answers."""
    assert_the_references(ranks, paths, config(paths, method), of_replicas(), layout, tmp_path / "m")


UNEQUAL_CASES = {
    "dp2": ("hybrid", {"data": 2}, {}),
    "pp2": ("kdrl", {"pipeline": 2}, {"packing": True}),
    "dp2pp2": ("hybrid", {"data": 2, "pipeline": 2}, {"packing": True}),
}


@pytest.mark.parametrize(("method", "layout", "settings"), UNEQUAL_CASES.values(), ids=UNEQUAL_CASES.keys())
def test_replicas_with_different_numbers_of_trajectories(ranks, paths, method, layout, settings, tmp_path):
    """One has two micro-batches, the other three, of which the last is smaller: stages need packing then."""
    made = config(paths, method, **settings)
    assert_the_references(ranks, paths, made, of_replicas(UNEQUAL), layout, tmp_path / "m")


def test_two_updates_of_replicas_with_different_numbers_of_trajectories(ranks, paths):
    by_replica = of_replicas(UNEQUAL)
    answers = ranks.run(2, train_each, config(paths, "hybrid", minibatches=2), by_replica, VOCAB_SIZE, 1, data=2)
    assert answers[0][0] == answers[1][0]
    assert answers[0][0][0]["num_tokens"] == sum(sum(r.learnt) for mine in by_replica for r in mine)


def train_each(parallel, config, by_replica, *arguments):
    """As `train_shaped`, where each replica has trajectories of its own."""
    mine = by_replica[parallel.data_rank]
    return steps.train_shaped(parallel, config, [r for r in mine for _ in range(parallel.data_size)], *arguments)


def assert_the_references(ranks, paths, made, by_replica, layout, folder):
    """The steps on a layout are those of the reference with the trajectories of all replicas."""
    whole = [r for mine in by_replica for r in mine]
    size = math.prod(layout.values())
    mine = by_replica if "data" in layout else [whole]
    answers = ranks.run(size, train_each, made, mine, VOCAB_SIZE, NUM_STEPS, **layout)
    teachers = [copy.deepcopy(model(family, tuple(changes.items()))) for family, changes in TEACHERS]
    mine = copy.deepcopy(model("qwen3", tuple(STUDENTS["qwen3"].items())))
    reference = Reference(made, mine, teachers, VOCAB_SIZE)
    for number in (1, 2):
        expected = reference.step(whole, number)
        for metrics, _ in answers:
            found = metrics[number - 1]
            # The loss is a small difference of terms near 0.1, in float32.
            assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-7)
            assert found["reward/mean"] == pytest.approx(1.75 / 6)  # of episodes, not of trajectories
            assert found["advantage/mean"] == pytest.approx(float(torch.cat(reference.advantages).mean()), abs=1e-5)
    for name, tensor in saved(reference.student, folder).items():
        torch.testing.assert_close(answers[0][1][name].double(), tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("epochs", [1, 2])
def test_updates_of_a_step_are_steps(ranks, paths, epochs):
    """A step of two mini-batches, or of two epochs, is that many steps on the same answers."""
    plain = {**METHODS, "plain": {"loss": {"beta": 1.0}}}
    made = graded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "plain", plain["plain"])
        several = config(paths, "plain", minibatches=2, epochs=epochs, measure_after=False, steps=2)
        one = config(paths, "plain", measure_after=False, steps=4 * epochs)
    found, weights = ranks.run(1, steps.train_shaped, several, made, VOCAB_SIZE, 2)[0]
    parts = [made[:4], made[4:]] * epochs * 2
    wanted, wanted_weights = ranks.run(1, one_by_one, one, parts, VOCAB_SIZE)[0]
    assert found[-1]["lr"] == wanted[-1]["lr"]
    assert found[-1]["num_tokens"] == sum(m["num_tokens"] for m in wanted[-2:])
    for name, tensor in weights.items():
        assert torch.equal(tensor, wanted_weights[name])


def one_by_one(parallel, config, parts, vocab_size):
    """Steps on different rollouts, padded to one length as those of a batch are."""
    student, objective, pack = steps.build(parallel, config, vocab_size)
    every = pack([r for part in parts[:2] for r in part])
    halves = [every[: len(every) // 2], every[len(every) // 2 :]]
    metrics = [student.step(halves[i % 2], objective) for i in range(len(parts))]
    return metrics, {name: tensor.clone() for name, tensor in student.export()}


def shaped_beside_answers_of_others(parallel, config, rollouts, vocab_size):
    """Per rollout the weights of (distill, sft, policy), and the metrics; every other rollout is not the student's."""
    from megatron_opd.trainer.shaping import Shaping

    _, objective, pack = steps.build(parallel, config, vocab_size)
    batches = []
    for i, batch in enumerate(pack(rollouts)):
        own = torch.full(batch.targets_T.shape, rollouts[i].origin == "student")
        batches.append(replace(batch, on_policy_T=own).weighing(sft=0.5 * (~own).float()))
    parts, metrics = Shaping(config, parallel, objective.distillation)(rollouts, [batches], 0)
    return [tuple(map(b.weight, ("distill", "sft", "policy"))) for part in parts for b in part], metrics


def test_answers_of_others_have_no_advantage_and_their_share_of_the_cross_entropy(ranks, paths):
    others = [replace(r, origin="dataset", reward=None) if i % 2 else r for i, r in enumerate(graded())]
    made = config(paths, "hybrid", micro_batch_size=1)
    found, metrics = ranks.run(1, shaped_beside_answers_of_others, made, others, VOCAB_SIZE)[0]
    tokens = sum(len(r.token_ids) for r in others)
    for r, (distill, sft, advantage) in zip(others, found, strict=True):
        share = tokens / len(others) / len(r.token_ids)
        if r.origin == "student":
            assert (sft == 0).all()
            assert advantage.abs().max() > 0
        else:
            torch.testing.assert_close(sft, torch.full_like(sft, 0.5 * share))
            torch.testing.assert_close(distill, torch.full_like(distill, 0.5 * share))  # no reward, so no mask
            assert (advantage == 0).all()
    assert metrics["reward/mean"] == fmean(REWARDS[::2])
    assert metrics["reward/mixed_groups"] == 0.5  # 1 and 0.25, 0 and 0
