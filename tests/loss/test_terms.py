"""The terms of the loss on sampled tokens, and their sum with the distillation: value and gradient against dense
float64 formulas, at tensor-parallel sizes 1 and 2."""

import math
from dataclasses import replace

import oracle
import pytest
import torch
from test_objective import (
    COLUMNS,
    NUM_TOKENS,
    SIZE,
    UPSTREAM,
    alone,
    expected,
    loss_gradient_metrics,
    objective_on,
    student_logits,
    teachers_and_batch,
)

from megatron_opd.config import LossConfig, PolicyConfig
from megatron_opd.core.scores import Hidden
from megatron_opd.loss import estimators, sampled_reverse_kl
from megatron_opd.loss.policy_gradient import policy_gradient
from megatron_opd.loss.sampled_tokens import CrossEntropy, Entropy, PolicyGradient

RATIOS = torch.tensor([0.1, 0.75, 0.9, 1.0, 1.1, 1.3, 4.0, 50.0], dtype=torch.float64)


def coefficients(how, advantage):
    """d loss / d log q at every ratio, from the definitions, a case at a time."""
    found = []
    for ratio in RATIOS.tolist():
        clipped = min(max(ratio, 1 - how.clip_low), 1 + how.clip_high)
        if how.loss == "importance":
            found.append(-min(ratio, how.importance_cap) * advantage)
        elif how.loss == "cispo":
            found.append(-clipped * advantage)
        else:
            is_cut = ratio > 1 + how.clip_high if advantage > 0 else ratio < 1 - how.clip_low
            is_cut |= bool(how.dual_clip) and advantage < 0 and ratio > how.dual_clip
            found.append(0.0 if is_cut else -ratio * advantage)
    return torch.tensor(found, dtype=torch.float64)


def value(how, advantage):
    """The loss at every ratio."""
    clipped = RATIOS.clamp(1 - how.clip_low, 1 + how.clip_high)
    if how.loss == "importance":
        return -RATIOS.clamp(max=how.importance_cap) * advantage
    if how.loss == "cispo":
        return -clipped * advantage
    objective = [min(r * advantage, c * advantage) for r, c in zip(RATIOS.tolist(), clipped.tolist(), strict=True)]
    if how.dual_clip and advantage < 0:
        objective = [max(o, how.dual_clip * advantage) for o in objective]
    return -torch.tensor(objective, dtype=torch.float64)


@pytest.mark.parametrize("advantage", [1.7, -0.6, 0.0])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "importance", "importance_cap": 3.0},
        {"loss": "cispo", "clip_low": 0.15, "clip_high": 0.28},
        {"loss": "ppo", "clip_low": 0.15, "clip_high": 0.28},
        {"loss": "ppo", "dual_clip": 3.0},
    ],
    ids=str,
)
def test_policy_gradient_is_its_definition(settings, advantage):
    how = PolicyConfig(**settings)
    behaviour = torch.full_like(RATIOS, -1.3)
    logp = (behaviour + RATIOS.log()).requires_grad_()
    loss, ratio, cut = policy_gradient(logp, behaviour, torch.full_like(RATIOS, advantage), how)
    torch.testing.assert_close(loss.detach(), value(how, advantage))
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    torch.testing.assert_close(gradient, coefficients(how, advantage))
    torch.testing.assert_close(ratio, RATIOS)
    if advantage:  # what is cut is what differs from the plain -r A
        torch.testing.assert_close(cut, (value(how, advantage) + RATIOS * advantage).abs() > 1e-12)


def test_ratio_without_bound_stays_a_number():
    logp, behaviour = torch.tensor([-0.1, -0.1]), torch.tensor([-500.0, -500.0])
    loss, _, _ = policy_gradient(logp, behaviour, torch.tensor([0.0, -1.0]), PolicyConfig(loss="ppo"))
    assert loss[0] == 0
    assert loss.isfinite().all()


def enumerated(loss):
    """Σ_y q(y) ∇ loss(y) over a vocabulary of nine, with respect to the logits; and both log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    z, z_teacher = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    target = torch.log_softmax(z_teacher, -1)
    z.requires_grad_()
    student = torch.log_softmax(z, -1)
    (gradient,) = torch.autograd.grad((student.detach().exp() * loss(student, target)).sum(), z)
    return gradient, z.detach(), target


def of_kl(z, target, *, is_reverse):
    z = z.clone().requires_grad_()
    student = torch.log_softmax(z, -1)
    a, b = (student, target) if is_reverse else (target, student)
    return torch.autograd.grad((a.exp() * (a - b)).sum(), z)[0]


def test_mean_gradients_of_the_estimators():
    one = torch.ones(9, dtype=torch.float64)
    found, z, target = enumerated(lambda q, p: estimators.k2(q, p, one))
    torch.testing.assert_close(found, of_kl(z, target, is_reverse=True))
    found, z, target = enumerated(lambda q, p: estimators.k3(q, p, one))
    torch.testing.assert_close(found, of_kl(z, target, is_reverse=False))
    found, *_ = enumerated(lambda q, p: q - p)  # k1, why it is refused
    torch.testing.assert_close(found, torch.zeros_like(found))


def test_k2_has_the_gradient_of_the_policy_gradient_token_by_token():
    _, z, target = enumerated(lambda q, p: q)
    weight = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for i in range(9):
        gradients = []
        for loss in (estimators.k2, sampled_reverse_kl):
            student = torch.log_softmax(x := z.clone().requires_grad_(), -1)
            gradients.append(torch.autograd.grad(loss(student, target, weight)[i], x)[0])
        torch.testing.assert_close(*gradients)


TAU, SAMPLING = 0.8, 1.3
POLICY = PolicyConfig(loss="importance", importance_cap=1.5)
SAMPLED = PolicyGradient(POLICY), CrossEntropy(), Entropy()
LOSSES = {
    "distribution": LossConfig(beta=0.5, temperature=TAU, chunk_tokens=4),
    "k2": LossConfig(kind="sampled", estimator="k2", temperature=TAU, chunk_tokens=4, importance_cap=1.2),
    "k3": LossConfig(kind="sampled", estimator="k3", temperature=TAU, chunk_tokens=3, importance_cap=1.2),
    "not trained": LossConfig(weight=0.0, temperature=TAU, chunk_tokens=4),
}
UNASKED = [2, 6]


def everything(loss):
    """(heads, micro-batch): weights, advantages and cross-entropy; tokens without a teacher, tokens of others, and a
    padding token (0) that is also what is sampled."""
    _, heads, batch = teachers_and_batch(SAMPLING)
    generator = torch.Generator().manual_seed(3)
    weights, distill = batch.weights_TN.clone(), torch.rand(NUM_TOKENS, generator=generator) + 0.2
    weights[UNASKED], distill[UNASKED] = 0.0, 0.0
    distill[7] = 0.0  # masked, though a teacher was asked
    own = torch.ones(NUM_TOKENS, dtype=torch.bool)
    own[5:7] = False
    targets = batch.targets_T.clone()
    targets[0] = 0
    logp = oracle.log_softmax(student_logits(), SIZE, SAMPLING).gather(-1, targets[:, None])[:, 0].float()
    batch = replace(
        batch,
        targets_T=targets,
        behaviour_logp_T=logp - torch.randn(NUM_TOKENS, generator=generator) / 2,
        weights_TN=weights,
        on_policy_T=own,
    )
    policy = torch.randn(NUM_TOKENS, generator=generator) * own
    return heads, batch.weighing(distill=distill, policy=policy, sft=(~own).float() * 0.7)


def summed(parallel):
    """By case, on a rank's columns; with the padding's columns in it, whose gradient must be 0."""
    answers = {}
    for name, config in LOSSES.items():
        heads, batch = everything(config)
        objective = objective_on(parallel, heads, config, SAMPLING)
        objective = replace(objective, sampled=SAMPLED, has_answers_of_others=True)
        answers[name] = loss_gradient_metrics(objective, batch, student_logits())
    return answers


@pytest.fixture(scope="module", params=[1, 2], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, summed)


def dense(name):
    """(loss by token [T] and its parts, gradient of UPSTREAM x loss) in float64."""
    config = LOSSES[name]
    _, batch = everything(config)
    hidden, heads, _ = teachers_and_batch()
    asked = [t for t in range(NUM_TOKENS) if t not in UNASKED]
    teachers = [oracle.log_softmax(h.double() @ w.double().T, SIZE, TAU) for h, w in zip(hidden, heads, strict=True)]
    target = oracle.ensemble([t[asked] for t in teachers], batch.weights_TN[asked], config.ensemble)
    ids, behaviour = batch.targets_T[:, None], batch.behaviour_logp_T.double()

    def at_tokens(z, temperature):
        return oracle.log_softmax(z, SIZE, temperature).gather(-1, ids)[:, 0]

    def parts(z):
        student = oracle.log_softmax(z, SIZE, TAU)[asked]
        q, p = at_tokens(z, TAU)[asked], target.gather(-1, ids[asked])[:, 0]
        weight = torch.exp(q.detach() - behaviour[asked]).clamp(max=config.importance_cap)
        at_asked = {
            "distribution": lambda: oracle.divergence(student, target, config.beta),
            "k2": lambda: weight * (q - p) ** 2 / 2,
            "k3": lambda: weight * (torch.exp(p - q) - 1 - p + q),
            "not trained": lambda: 0 * q,
        }[name]()
        distill = torch.zeros(NUM_TOKENS, dtype=torch.float64).index_put(
            (torch.tensor(asked),), batch.weight("distill").double()[asked] * at_asked
        )
        logq = at_tokens(z, SAMPLING)
        ratio = torch.exp(logq.detach() - behaviour).clamp(max=POLICY.importance_cap)
        policy = -ratio * batch.weight("policy").double() * (1 + logq - logq.detach())
        return distill, policy, -batch.weight("sft").double() * at_tokens(z, 1.0)

    loss, gradient = oracle.grad(lambda z: UPSTREAM * sum(parts(z)), student_logits())
    return loss / UPSTREAM, [x.detach() for x in parts(student_logits().double())], gradient


@pytest.mark.parametrize("name", LOSSES)
def test_sum_of_terms_equals_the_dense_formula(computed, name):
    _, batch = everything(LOSSES[name])
    loss_T, parts, gradient = dense(name)
    own, total = batch.on_policy_T, float(loss_T.sum())
    for loss, _, num_tokens, means in [answers[name] for answers in computed]:
        assert loss == pytest.approx(total, rel=1e-5)
        assert num_tokens.item() == NUM_TOKENS
        wanted = {f"loss/{n}": float(x.mean()) for n, x in zip(("distill", "policy", "sft"), parts, strict=True)}
        wanted |= {"loss/on_policy": float(loss_T[own].mean()), "loss/off_policy": float(loss_T[~own].mean())}
        for metric, number in {"loss": total / NUM_TOKENS, **wanted}.items():
            assert means[metric] == pytest.approx(number, rel=1e-5, abs=1e-7), metric
        assert sum(means[f"loss/{n}"] for n in ("distill", "policy", "sft")) == pytest.approx(means["loss"], rel=1e-6)
    whole = torch.cat([answers[name][1] for answers in computed], dim=-1)
    torch.testing.assert_close(whole.double(), gradient, atol=5e-5, rtol=1e-5)
    assert (whole[:, SIZE:] == 0).all()


def test_metrics_beside_the_loss(computed):
    _, batch = everything(None)
    logits = student_logits().double()
    logp = oracle.log_softmax(logits, SIZE, SAMPLING)
    own = batch.on_policy_T
    log_ratio = logp.gather(-1, batch.targets_T[:, None])[:, 0] - batch.behaviour_logp_T.double()
    nll = -oracle.log_softmax(logits, SIZE).gather(-1, batch.targets_T[:, None])[:, 0]
    asked_own = own.clone()
    asked_own[UNASKED] = False
    wanted = {
        "policy/ratio": log_ratio.exp()[own].mean(),
        "policy/clip_frac": (log_ratio > math.log(POLICY.importance_cap))[own].double().mean(),
        "sft/nll": nll[~own].mean(),
        "entropy": -(logp.exp() * logp).sum(-1).mean(),
        "mismatch/kl": (log_ratio.exp() - 1 - log_ratio)[asked_own].mean(),
    }
    for answers in computed:
        for name, number in wanted.items():
            for case in LOSSES:
                assert answers[case][3][name] == pytest.approx(float(number), rel=1e-4), (case, name)


def test_micro_batch_without_any_teacher():
    heads, batch = everything(LOSSES["distribution"])
    batch = replace(batch, weights_TN=0 * batch.weights_TN, teachers=(None, None)).weighing(
        distill=torch.zeros(NUM_TOKENS)
    )
    objective = alone(LOSSES["distribution"], heads, SAMPLING)
    loss, gradient, _, means = loss_gradient_metrics(objective, batch, student_logits())
    assert loss == 0
    assert (gradient == 0).all()
    assert means["kl/ensemble"] is None
    assert means["loss"] == 0
    objective = replace(objective, sampled=SAMPLED, has_answers_of_others=True)
    loss, _, _, means = loss_gradient_metrics(objective, batch, student_logits())
    _, policy, sft = dense("distribution")[1]
    assert loss == pytest.approx(float((policy + sft).sum()), rel=1e-5)
    assert means["kl/ensemble"] is None


@pytest.mark.parametrize("kind", ["distribution", "sampled"])
def test_what_the_objective_has_no_term_for_changes_no_bit(kind):
    _, heads, batch = teachers_and_batch()
    config = LossConfig(kind=kind, chunk_tokens=4)
    plain = loss_gradient_metrics(alone(config, heads), batch, student_logits())
    more = batch.weighing(policy=torch.randn(NUM_TOKENS), sft=torch.ones(NUM_TOKENS))
    weighted = loss_gradient_metrics(alone(config, heads), more, student_logits())
    assert (plain[0], plain[3]) == (weighted[0], weighted[3])
    assert torch.equal(plain[1], weighted[1])


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_distillation_weight_scales_gradient_and_loss_but_no_other_metric(weight):
    _, heads, batch = teachers_and_batch()
    batch = batch.weighing(distill=torch.full((NUM_TOKENS,), weight))
    loss, gradient, _, means = loss_gradient_metrics(alone(LossConfig(beta=1.0), heads), batch, student_logits())
    wanted, wanted_gradient, wanted_means = expected(1.0, "logits", 1.0)
    assert loss == pytest.approx(weight * float(wanted), rel=1e-5)
    torch.testing.assert_close(gradient.double(), weight * wanted_gradient, atol=1e-4, rtol=1e-5)
    assert means["kl/ensemble"] == pytest.approx(float(wanted_means["kl/ensemble"]), rel=1e-5)


@pytest.mark.parametrize("estimator", ["policy_gradient", "k2", "k3"])
def test_student_that_is_the_teacher_learns_nothing_from_sampled_tokens(estimator):
    hidden, heads, batch = teachers_and_batch()
    rows = heads[1].shape[0]
    batch = replace(batch, weights_TN=torch.ones(NUM_TOKENS, 1), teachers=(Hidden(hidden[1]),))
    logits = torch.nn.functional.pad(hidden[1] @ heads[1].T, (0, COLUMNS - rows))
    config = LossConfig(kind="sampled", estimator=estimator)
    loss, gradient, _, _ = loss_gradient_metrics(alone(config, heads[1:]), batch, logits)
    assert loss == pytest.approx(0, abs=1e-5)
    assert gradient.abs().max() <= 2e-6


def test_teachers_logp_is_the_dense_ensemble_at_the_sampled_tokens():
    hidden, heads, batch = teachers_and_batch()
    weights = batch.weights_TN.clone()
    weights[UNASKED] = 0.0
    batch = replace(batch, weights_TN=weights)
    config = LossConfig(ensemble="probs", temperature=TAU, chunk_tokens=3)
    found = alone(config, heads).distillation.teachers_logp(batch)
    asked = [t for t in range(NUM_TOKENS) if t not in UNASKED]
    teachers = [oracle.log_softmax(h.double() @ w.double().T, SIZE, TAU) for h, w in zip(hidden, heads, strict=True)]
    target = oracle.ensemble([t[asked] for t in teachers], weights[asked], "probs")
    wanted = torch.zeros(NUM_TOKENS, dtype=torch.float64)
    wanted[asked] = target.gather(-1, batch.targets_T[asked, None])[:, 0]
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lead", [1e-2, -1e-2, 1e-3, -1e-3])
def test_k3_of_models_that_nearly_agree_is_not_lost_in_rounding(lead):
    found = estimators.k3(torch.zeros(1), torch.tensor([lead]), torch.ones(1)).item()
    assert found == pytest.approx(math.exp(lead) - 1 - lead, rel=2e-3)
