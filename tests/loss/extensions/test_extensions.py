"""What a divergence, a carrier, a term and a metric of somebody else's do in the losses and in the training step, at
tensor-parallel sizes 1 and 2, against float64 autograd."""

import copy
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from unittest.mock import patch

import extensions
import oracle
import pytest
import steps
import test_objective as one
import tiny
import torch
from test_terms import POLICY

from megatron_opd.config import LossConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss import distillation_loss, linear_distillation_loss
from megatron_opd.loss.fused import LossSpec, backends
from megatron_opd.loss.sampled_tokens import Entropy, PolicyGradient

TOUCHES = {
    "divergence": ["loss/divergences.py"],
    "carrier": ["core/scores.py", "config/models.py", "teachers/<its scorer>.py"],
    "term": ["loss/sampled_tokens.py", "config/method.py", "trainer/build_objective.py"],
    "metric": ["loss/sampled_tokens.py", "trainer/build_objective.py"],
}
"""Files of the package to edit or add for each, as tools/house.py counts them."""
T, COLUMNS, SIZE, BETA, TAU = one.NUM_TOKENS, one.COLUMNS, one.SIZE, 0.3, 0.8
DENSE = {
    "alpha": lambda q, p, beta: (1 - torch.exp(beta * p + (1 - beta) * q).sum(-1)) / (beta * (1 - beta)),
    "total_variation": lambda q, p, beta: 0.5 * (q.exp() - p.exp()).abs().sum(-1),
}
CASES = list(product(DENSE, ("logits", "probs")))


def factors():
    """Hidden states and head of a student whose last columns are padding."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(T, 8, generator=generator), torch.randn(COLUMNS, 8, generator=generator)


def all_forms(parallel):
    """By case: (loss, gradients) of the training step's objective on logits and on hidden states, and of the public
    losses, each of this rank's columns."""
    return [forms(parallel, *case) for case in CASES]


def forms(parallel, name, how):
    hidden, heads, batch = one.teachers_and_batch()
    config = LossConfig(divergence=name, beta=BETA, ensemble=how, temperature=TAU, chunk_tokens=4)
    objective = one.objective_on(parallel, heads, config)
    vocab, heads = objective.distillation.vocab, objective.distillation.heads
    here = slice(vocab.start, vocab.stop)
    with extensions.installed():
        step = one.loss_gradient_metrics(objective, batch, one.student_logits())
        h, w = factors()
        h, w = h.requires_grad_(), w[here].clone().requires_grad_()
        w.main_grad = torch.zeros(w.shape)
        student = one.FactoredLogits(h, w, one.UPSTREAM)
        loss, _, _ = objective(batch, student)
        (one.UPSTREAM * loss).backward()
        of_hidden = loss.item(), h.grad, w.main_grad
        settings = {"divergence": name, "beta": BETA, "ensemble": how, "temperature": TAU, "vocab": vocab}
        settings["weights"] = batch.weights_TN
        mine = one.student_logits()[:, here].clone().requires_grad_()
        teachers = list(zip(hidden, heads, strict=True))
        public = distillation_loss(mine, [x @ head.T for x, head in teachers], reduction="none", **settings)
        (one.UPSTREAM * public.sum()).backward()
        h, w = (x.detach().clone().requires_grad_() for x in (h, w))
        linear = linear_distillation_loss(h, w, teachers, chunk_tokens=4, reduction="none", **settings)
        (one.UPSTREAM * linear.sum()).backward()
    return step, of_hidden, (public.detach(), mine.grad), (linear.detach(), h.grad, w.grad)


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, all_forms)


@pytest.mark.parametrize("index", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_a_new_divergence_needs_its_formula_alone(computed, index):
    name, how = CASES[index]
    hidden, heads, batch = one.teachers_and_batch()
    teachers = [oracle.log_softmax(h.double() @ w.double().T, SIZE, TAU) for h, w in zip(hidden, heads, strict=True)]
    target = oracle.ensemble(teachers, batch.weights_TN, how)

    def loss(z):
        return one.UPSTREAM * DENSE[name](oracle.log_softmax(z, SIZE, TAU), target, BETA)

    value, gradient = oracle.grad(loss, one.student_logits())
    h, w = factors()
    of_hidden, gradient_z = oracle.grad(loss, h.double() @ w.double().T)
    for shard in (answers[index] for answers in computed):
        (step, *_, means), (hidden_loss, *_), (public, _), (linear, *_) = shard
        assert step == pytest.approx(float(value.sum()) / one.UPSTREAM, rel=1e-5)
        assert means["kl/small"] > 0
        assert hidden_loss == pytest.approx(float(of_hidden.sum()) / one.UPSTREAM, rel=1e-5)
        torch.testing.assert_close(public.double() * one.UPSTREAM, value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(linear.double() * one.UPSTREAM, of_hidden, rtol=1e-5, atol=1e-6)
    shards = [answers[index] for answers in computed]
    for whole in (torch.cat([s[0][1] for s in shards], -1), torch.cat([s[2][1] for s in shards], -1)):
        torch.testing.assert_close(whole.double(), gradient, **one.TOLERANCE)
        assert (whole[:, SIZE:] == 0).all()
    for form in (1, 3):
        torch.testing.assert_close(sum(s[form][1] for s in shards).double(), gradient_z @ w.double(), **one.TOLERANCE)
        made = torch.cat([s[form][2] for s in shards])
        torch.testing.assert_close(made.double(), gradient_z.T @ h.double(), **one.TOLERANCE)


def test_backends_say_what_they_support():
    spec = LossSpec(BETA, TAU, "logits", 2, divergence="alpha")
    x = [torch.zeros(1)]
    assert backends.choose(x, spec=spec).name == "readable"
    assert backends.choose(x).name in ("native", "torch")
    for name in ("native", "triton", "torch"):
        with pytest.raises(ValueError, match="with the divergence 'alpha'; use backend='auto'"):
            backends.choose(x, name, spec)
    with pytest.raises(ValueError, match="divergence must be one of gkd, not 'alpha'"):
        distillation_loss(torch.zeros(1, 3), [torch.zeros(1, 3)], divergence="alpha")


def step_with(parallel, config, rollouts):
    with extensions.installed():
        return steps.train(parallel, config, rollouts, 90, 2)


def test_a_real_step_learns_by_a_new_divergence(ranks, tmp_path):
    """At TP=2, against transformers and AdamW in float64."""
    models = [tiny.build("qwen3"), tiny.build("llama", seed=1)]
    paths = [tiny.save(model, tmp_path / str(n)) for n, model in enumerate(models)]
    config = tiny.config(
        paths[0],
        [{"name": "t", "model": paths[1]}],
        loss={"divergence": "alpha", "beta": BETA, "chunk_tokens": 5},
        optim={"lr": 2e-2, "clip_grad": 0.2, "eps": 1e-2},
        train={"steps": 6, "micro_batch_size": 2},
    )
    rollouts = tiny.rollouts(count=4, vocab_size=90)
    reference = steps.Reference(config, copy.deepcopy(models[0]), models[1:], 90)
    answers = ranks.run(2, step_with, config, rollouts, tensor=2)
    for number, found in enumerate(answers[0][0], start=1):
        with patch.object(oracle, "divergence", DENSE["alpha"]):
            expected = reference.step(rollouts, number)
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def rounded_case():
    """(micro-batch of a rounded teacher, the same of its numbers as hidden states, heads)."""
    hidden, heads, batch = one.teachers_and_batch()
    score = extensions.Rounded.of(hidden[1])
    batch = replace(batch, weights_TN=torch.ones(T, 1), teachers=(score,))
    return batch, replace(batch, teachers=(one.Hidden(score.hidden()),)), heads[1:]


@pytest.mark.parametrize("kind", ["distribution", "sampled"])
def test_a_new_carrier_is_its_class(kind):
    batch, plain, heads = rounded_case()
    objective = one.alone(LossConfig(kind=kind, chunk_tokens=4), heads)
    teacher = SimpleNamespace(name="small", carrier="rounded", top_k=0)
    with extensions.installed():
        named = replace(objective, distillation=replace(objective.distillation, teachers=(teacher,)))
        assert named.takes_hidden == objective.takes_hidden
        found = one.loss_gradient_metrics(named, batch, one.student_logits())
        logps = named.distillation.each_teachers_logp(batch)
    expected = one.loss_gradient_metrics(objective, plain, one.student_logits())
    assert (found[0], found[3]) == (expected[0], expected[3])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(logps, objective.distillation.each_teachers_logp(plain))


def test_a_new_carrier_is_packed_as_it_says():
    rollouts = tiny.rollouts(count=3, vocab_size=20)
    told = [extensions.Rounded.of(torch.randn(r.num_learnt, 4)) for r in rollouts]
    [batch] = pack(
        rollouts,
        micro_batch_size=3,
        length_multiple=1,
        device=torch.device("cpu"),
        scores=[[told[0], None, told[2]]],
        weights=[[1.0], [0.0], [1.0]],
    )
    assert isinstance(batch, MicroBatch)
    [score] = batch.teachers
    counts = [r.num_learnt for r in rollouts]
    first, middle, last = score.values_RD.split(counts)
    assert torch.equal(first, told[0].values_RD)
    assert not middle.any()
    assert torch.equal(last, told[2].values_RD)


COEFFICIENT = 0.2


def with_terms(parallel):
    _, heads, batch = one.teachers_and_batch()
    batch = replace(batch, on_policy_T=torch.arange(T) != 4).weighing(policy=torch.linspace(-1, 1, T))
    objective = one.objective_on(parallel, heads, LossConfig(chunk_tokens=4))
    terms = Entropy(), extensions.Surprise(), extensions.EntropyBonus(COEFFICIENT), PolicyGradient(POLICY)
    return one.loss_gradient_metrics(replace(objective, sampled=terms), batch, one.student_logits())


@pytest.mark.parametrize("tensor_size", [1, 2])
def test_a_new_term_and_a_new_metric_are_items_of_a_list(ranks, tensor_size):
    answers = ranks.run(tensor_size, with_terms)
    distilled, of_distilled, _ = one.expected(1.0, "logits", 1.0)
    ids, own = one.teachers_and_batch()[2].targets_T[:, None], torch.arange(T) != 4
    behaviour = one.teachers_and_batch()[2].behaviour_logp_T.double()

    def others(z):
        logp = oracle.log_softmax(z, SIZE)
        said = logp.gather(-1, ids)[:, 0]
        ratio = torch.exp(said.detach() - behaviour).clamp(max=POLICY.importance_cap)
        policy = -ratio * torch.linspace(-1, 1, T).double() * (1 + said - said.detach())
        return one.UPSTREAM * (policy + COEFFICIENT * (logp.exp() * logp).sum(-1) * own)

    value, gradient = oracle.grad(others, one.student_logits())
    logp = oracle.log_softmax(one.student_logits(), SIZE)
    entropy = -(logp.exp() * logp).sum(-1)
    for loss, _, _, means in answers:
        assert loss == pytest.approx(float(distilled + value.sum() / one.UPSTREAM), rel=1e-5)
        assert means["loss/entropy"] == pytest.approx(-COEFFICIENT * float((entropy * own).mean()), rel=1e-5)
        assert means["entropy"] == pytest.approx(float(entropy.mean()), rel=1e-5)
        surprised = logp.gather(-1, ids)[:, 0].exp() < 0.01
        assert means["surprise"] == pytest.approx(float(surprised.double().mean()))
    whole = torch.cat([answer[1] for answer in answers], dim=-1)
    torch.testing.assert_close(whole.double(), gradient + of_distilled, atol=5e-5, rtol=1e-5)


def test_a_metric_that_was_not_declared_is_noticed():
    """Ranks add up by the declared names, so another one would be lost, or meet another rank's."""
    from megatron_opd.loss.metrics import means, rows, sums

    found = sums({"a": torch.ones(2), "b": torch.tensor([])})
    assert means(["b", "a", "c"], rows(["b", "a", "c"], [found, found], torch.device("cpu"))) == {"a": 1.0}
    with pytest.raises(ValueError, match="metrics b are not among metric_names"):
        rows(["a"], [found], torch.device("cpu"))


def test_the_training_step_has_the_bits_of_the_public_loss():
    """One core: on hidden states and on logits, with weights of 1/T where T is a power of two."""
    hidden, heads, batch = one.teachers_and_batch()
    size = 8
    batch = replace(
        batch,
        **{name: getattr(batch, name)[:size] for name in ("targets_T", "behaviour_logp_T", "on_policy_T")},
        weights_TN=torch.ones(size, 1),
        teachers=(one.Hidden(hidden[1][:size]),),
        weights_T={"distill": torch.full((size,), 1 / size)},
    )
    for beta, temperature in product((0.0, 0.5, 1.0), (1.0, 0.7)):
        config = LossConfig(beta=beta, temperature=temperature, chunk_tokens=3)
        objective = one.alone(config, heads[1:], temperature)
        term = objective.distillation
        vocab: VocabShard = term.vocab
        settings = {"beta": beta, "temperature": temperature, "vocab": vocab, "chunk_tokens": 3}
        both = []
        for public in (False, True):
            h, w = (x.clone().requires_grad_() for x in factors())
            h = h[:size].detach().requires_grad_()
            w.main_grad = torch.zeros(w.shape)
            if public:
                pairs = [(hidden[1][:size], term.heads[0])]
                loss = linear_distillation_loss(h, w, pairs, upstream=2.0, **settings)
            else:
                loss = objective(batch, one.FactoredLogits(h, w, 2.0))[0]
            (2 * loss).backward()
            both.append((loss.detach(), h.grad, w.main_grad))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), (beta, temperature)
        both = []
        for public in (False, True):
            z = one.student_logits()[:size].requires_grad_()
            if public:
                teacher = torch.cat([x @ term.heads[0].T for x in hidden[1][:size].split(3)])
                loss = distillation_loss(z, [teacher], **settings)
            else:
                loss = objective(batch, z)[0]
            loss.backward()
            both.append((loss.detach(), z.grad))
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True)), (beta, temperature)
