"""Mixtures of teachers that tell hidden states, lists, or the sampled token: loss, gradient and metrics against dense
float64 formulas token by token, at every tensor-parallel size; then one real step on four ranks."""

import copy
from dataclasses import dataclass

import oracle
import pytest
import steps
import tiny
import torch
from test_objective import means_of

from megatron_opd.config import LossConfig, TeacherConfig
from megatron_opd.core.batching import pack
from megatron_opd.core.scores import Hidden, Sampled, TopK
from megatron_opd.core.types import MicroBatch
from megatron_opd.core.vocab import VocabShard
from megatron_opd.loss.distillation import Distillation
from megatron_opd.loss.objective import Objective

NUM_TOKENS, COLUMNS, SIZE, WIDTH = 17, 48, 35, 8
"""At TP=4 a shard has 12 columns, and the last one is padding only."""
UPSTREAM = 1.5
CAP = 1.2
TOP_K = (5, 9, 4)
MIXTURES = {  # carriers of the teachers by kind of loss
    "distribution": [("topk",), ("topk", "topk"), ("hidden", "topk"), ("topk", "hidden", "hidden")],
    "sampled": [("sampled",), ("topk",), ("hidden",), ("sampled", "sampled"), ("sampled", "hidden", "topk")],
}
CASES = [("distribution", c, beta) for c in MIXTURES["distribution"] for beta in (0.0, 0.3, 1.0)]
CASES += [("sampled", c, 1.0) for c in MIXTURES["sampled"]]


@dataclass(frozen=True)
class Case:
    """One mixture at NUM_TOKENS tokens. Every combination of asked teachers occurs."""

    kind: str
    carriers: tuple[str, ...]
    beta: float
    logits: torch.Tensor
    heads: list[torch.Tensor]
    batch: MicroBatch

    @property
    def config(self):
        how = "probs" if len(self.carriers) > 1 else "logits"
        return LossConfig(kind=self.kind, beta=self.beta, ensemble=how, chunk_tokens=4, importance_cap=CAP)

    @property
    def teachers(self):
        return tuple(
            TeacherConfig(name=f"t{n}", model="", carrier=carrier, top_k=TOP_K[n])
            for n, carrier in enumerate(self.carriers)
        )


def weights_of(num_teachers, generator):
    """[T, N]: which teachers are asked counts through all combinations."""
    weights = torch.rand(NUM_TOKENS, num_teachers, generator=generator) + 0.1
    for t in range(NUM_TOKENS):
        subset = 1 + t % (2**num_teachers - 1)
        weights[t] *= torch.tensor([float(subset >> n & 1) for n in range(num_teachers)])
    return weights / weights.sum(-1, keepdim=True)


def as_list(logp, targets, k):
    """The K likeliest, the sampled token always among them; then a duplicate and two ids that are none."""
    top = logp.topk(k, dim=-1)
    ids, values = top.indices.clone(), top.values.float()
    missing = (ids != targets[:, None]).all(-1)
    ids[missing, -1] = targets[missing]
    values[missing, -1] = logp.gather(-1, targets[:, None])[missing, 0].float()
    junk = torch.tensor([[-1, SIZE + 2]]).expand(len(ids), 2)
    return TopK(torch.cat([ids, ids[:, :1], junk], -1), torch.cat([values, values[:, :1] - 1, 0 * junk], -1))


def tell(carrier, hidden, logp, targets, k):
    if carrier == "hidden":
        return Hidden(hidden)
    if carrier == "topk":
        return as_list(logp, targets, k)
    return Sampled(logp.gather(-1, targets[:, None])[:, 0].float())


def silent(score, asked):
    """Zeros at the tokens that a teacher was not asked about."""
    blank = [x * asked.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype) for x in vars_of(score)]
    return type(score)(*blank)


def vars_of(score):
    return [getattr(score, name) for name in type(score).__slots__]


def made(index):
    kind, carriers, beta = CASES[index]
    generator = torch.Generator().manual_seed(index)
    logits = 3 * torch.randn(NUM_TOKENS, COLUMNS, generator=generator)
    logits[3] *= 6  # a student that is nearly certain
    logits[:, SIZE:] = 60.0
    targets = torch.randint(0, SIZE, (NUM_TOKENS,), generator=generator)
    weights = weights_of(len(carriers), generator)
    heads, told = [], []
    for n, carrier in enumerate(carriers):
        hidden = torch.randn(NUM_TOKENS, WIDTH, generator=generator)
        head = torch.randn(COLUMNS, WIDTH, generator=generator)
        logp = oracle.log_softmax(hidden.double() @ head.double().T, SIZE)
        heads.append(head if carrier == "hidden" else None)
        told.append(silent(tell(carrier, hidden, logp, targets, TOP_K[n]), weights[:, n] > 0))
    logq = oracle.log_softmax(logits, SIZE).gather(-1, targets[:, None])[:, 0]
    behaviour = (logq + 0.5 * torch.randn(NUM_TOKENS, generator=generator)).float()
    batch = tiny.micro_batch(targets, behaviour, weights, tuple(told))
    return Case(kind, carriers, beta, logits, heads, batch)


def term_here(case, parallel):
    """(the term on this rank's columns, which these are)."""
    share = COLUMNS // parallel.tensor_size
    here = slice(parallel.tensor_rank * share, (parallel.tensor_rank + 1) * share)
    vocab = VocabShard(here.start, here.stop, SIZE, parallel.tensor_group if parallel.tensor_size > 1 else None)
    heads = tuple(None if head is None else head[here] for head in case.heads)
    return Distillation(case.config, 1.0, vocab, case.teachers, heads), here


def on_shard(parallel, index):
    """(loss, gradient of UPSTREAM x loss, metrics) of this rank's columns."""
    case = made(index)
    term, here = term_here(case, parallel)
    objective = Objective(term)
    mine = case.logits[:, here].clone().requires_grad_()
    loss, _, metrics = objective(case.batch, mine)
    (UPSTREAM * loss).backward()
    return loss.item(), mine.grad, means_of(objective, metrics)


def all_cases(parallel):
    return [on_shard(parallel, index) for index in range(len(CASES))]


@pytest.fixture(scope="module", params=[1, 2, 4], ids="tp{}".format)
def computed(request, ranks):
    return ranks.run(request.param, all_cases)


# The same, dense and token by token.


def known_at(score, t):
    """{id: log-probability} of a list, the first one where an id is there twice."""
    pairs = zip(score.ids_RK[t].tolist(), score.logp_RK[t].tolist(), strict=True)
    known = {}
    for i, x in pairs:
        known.setdefault(i, x)
    return known


def sampled_at(case, n, t):
    score, y = case.batch.teachers[n], int(case.batch.targets_T[t])
    if case.carriers[n] == "hidden":
        return exact_at(case, n, t)[y]
    x = known_at(score, t)[y] if case.carriers[n] == "topk" else float(score.logp_R[t])
    return torch.tensor(x, dtype=torch.float64)


def exact_at(case, n, t):
    z = case.batch.teachers[n].hidden_RD[t].double() @ case.heads[n].double().T
    return oracle.log_softmax(z, SIZE)


def compared_at(case, student, asked, t):
    """(student, each asked teacher) of one token over what all of them are known on; None if that is nothing."""
    carriers = [case.carriers[n] for n in asked]
    if "sampled" in carriers:
        return None
    if "topk" not in carriers:
        return student, [exact_at(case, n, t) for n in asked]
    lists = [known_at(case.batch.teachers[n], t) for n in asked if case.carriers[n] == "topk"]
    ids = sorted({i for known in lists for i in known if 0 <= i < SIZE})
    over = [
        oracle.over_listed(exact_at(case, n, t), ids)
        if case.carriers[n] == "hidden"
        else oracle.list_over_listed(known_at(case.batch.teachers[n], t), ids, SIZE)
        for n in asked
    ]
    return oracle.over_listed(student, ids), over


def expected(case):
    """(loss [T], gradient of UPSTREAM x its sum, {metric: values})."""
    collected = {}

    def collect(name, value):
        collected.setdefault(name, []).append(float(value))

    def loss(z, *, collecting):
        logq, values = oracle.log_softmax(z, SIZE), []
        for t in range(NUM_TOKENS):
            asked = [n for n in range(len(case.carriers)) if case.batch.weights_TN[t, n] > 0]
            weights = [case.batch.weights_TN[t, n].double() for n in asked]
            q, y = logq[t], int(case.batch.targets_T[t])
            at_y = torch.log(sum(w * sampled_at(case, n, t).exp() for n, w in zip(asked, weights, strict=True)))
            k1 = (q[y] - at_y).detach()
            ratio = torch.exp((q[y] - case.batch.behaviour_logp_T[t].double()).detach())
            compared = compared_at(case, q, asked, t)
            if compared is not None:
                mine, target = compared[0], oracle.mean_probs(compared[1], weights)
            if case.kind == "distribution":
                values.append(oracle.divergence(mine, target, case.beta))
            else:
                values.append(torch.clamp(ratio, max=CAP) * k1 * (1 + q[y] - q[y].detach()))
            if collecting:
                collect("kl/ensemble", k1 if compared is None else oracle.kl(mine, target))
                collect("logprob/student", q[y])
                collect("logprob/teacher", at_y)
                if case.kind == "sampled":
                    collect("importance/mean", torch.clamp(ratio, max=CAP))
                    collect("importance/capped_frac", ratio > CAP)
                for n in asked:
                    collect_teacher(case, n, t, q, collect)
        return torch.stack(values)

    with torch.no_grad():
        loss(case.logits, collecting=True)
    value, gradient = oracle.grad(lambda z: loss(z, collecting=False), case.logits)
    return value, UPSTREAM * gradient, collected


def collect_teacher(case, n, t, q, collect):
    """One teacher against the student on everything that it told."""
    if case.carriers[n] == "sampled":
        collect(f"kl/t{n}", q[case.batch.targets_T[t]] - sampled_at(case, n, t))
    elif case.carriers[n] == "hidden":
        collect(f"kl/t{n}", oracle.kl(q, exact_at(case, n, t)))
    else:
        known = known_at(case.batch.teachers[n], t)
        ids = sorted(i for i in known if 0 <= i < SIZE)
        theirs = oracle.list_over_listed(known, ids, SIZE)
        collect(f"kl/t{n}", oracle.kl(oracle.over_listed(q, ids), theirs))
        collect(f"topk/t{n}/mass_outside", theirs[-1].exp())
        likeliest = set(q.topk(TOP_K[n]).indices.tolist())
        collect(f"topk/t{n}/overlap", len(likeliest & set(ids)) / len(ids))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{k}-{'+'.join(c)}-{b}" for k, c, b in CASES])
def test_loss_gradient_and_metrics_equal_the_dense_formula(computed, index):
    case = made(index)
    loss, gradient, metrics = expected(case)
    shards = [answers[index] for answers in computed]
    for value, _, means in shards:  # the same on every shard
        assert value == pytest.approx(float(loss.sum()), rel=1e-5)
        assert {*metrics, "loss", "mismatch/kl"} == {*means}
        found = {name: means[name] for name in metrics}
        assert found == pytest.approx({name: sum(xs) / len(xs) for name, xs in metrics.items()}, rel=1e-5, abs=1e-6)
        assert means["loss"] == pytest.approx(float(loss.mean()), rel=1e-5)
    whole = torch.cat([shard[1] for shard in shards], dim=-1)
    torch.testing.assert_close(whole.double(), gradient, atol=2e-5, rtol=1e-5)
    assert (whole[:, SIZE:] == 0).all()
    assert gradient[:, :SIZE].abs().amax(-1).min() > 0  # every token learns


# A real step: the student and one exact teacher in Megatron, another teacher's lists from elsewhere.

VOCAB_SIZE = 90
WEIGHTS = ({"weight": 0.4, "sources": {"b": 1.0}}, {"weight": 0.6, "sources": {"b": 0.0}})
"""Source a is taught by both, source b by the lists alone."""


def train(parallel, config, rollouts, lists, num_steps):
    from megatron_opd.student.student import Student
    from megatron_opd.teachers.megatron_teacher import MegatronTeacher

    student = Student(config, parallel)
    vocab = student.vocab_shard(VOCAB_SIZE)
    exact = MegatronTeacher(config.teachers[1], parallel, vocab, micro_batch_size=config.train.micro_batch_size)
    objective = Objective(Distillation(config.loss, 1.0, vocab, tuple(config.teachers), (None, exact.head_LD)))
    weights = [config.teacher_weights(r.prompt.source) for r in rollouts]
    asked = [r for r, w in zip(rollouts, weights, strict=True) if w[1]]
    scores = iter(exact.score(asked))
    batches = pack(
        rollouts,
        micro_batch_size=config.train.micro_batch_size,
        length_multiple=1,
        device=torch.device("cpu"),
        scores=[lists, [next(scores) if w[1] else None for w in weights]],
        weights=weights,
    )
    metrics = [student.step(batches, objective) for _ in range(num_steps)]
    return metrics, {name: tensor.clone() for name, tensor in student.export()}


class Reference(steps.Reference):
    """Two teachers by transformers in float64, of which the first is seen through its lists."""

    def loss(self, rollout):
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        rows = slice(start - 1, ids.shape[1] - 1)
        student = self.logp(self.student, ids, rows)
        with torch.no_grad():
            lister, exact = (self.logp(teacher, ids, rows) for teacher in self.teachers)
        weights = self.config.teacher_weights(rollout.prompt.source)
        score = list_of(lister, rollout, self.config.teachers[0].top_k)
        values = []
        for t in range(len(rollout.token_ids)):
            known = known_at(score, t)
            listed = sorted(known)
            over = [oracle.list_over_listed(known, listed, VOCAB_SIZE), oracle.over_listed(exact[t], listed)]
            target = oracle.mean_probs(over, weights)
            values.append(oracle.divergence(oracle.over_listed(student[t], listed), target, self.config.loss.beta))
        return torch.stack(values)


def list_of(logp, rollout, k):
    score = as_list(logp, torch.tensor(rollout.token_ids), k)
    return TopK(score.ids_RK[:, :k], score.logp_RK[:, :k])


def test_a_step_on_four_ranks_is_transformers_and_torch(ranks, tmp_path):
    models = [tiny.build("qwen3"), tiny.build("llama", seed=1), tiny.build("qwen3_tied", seed=2, vocab_size=VOCAB_SIZE)]
    paths = [tiny.save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    made_config = tiny.config(
        paths[0],
        [
            {"name": "lister", "model": paths[1], "backend": "sglang", "carrier": "topk", "top_k": 7, **WEIGHTS[0]},
            {"name": "exact", "model": paths[2], **WEIGHTS[1]},
        ],
        loss={"beta": 0.6, "ensemble": "probs", "chunk_tokens": 5},
        optim={"lr": 2e-2, "clip_grad": 0.2, "eps": 1e-2},
        train={"steps": 6, "micro_batch_size": 2},
    )
    rollouts = tiny.rollouts(count=4, vocab_size=VOCAB_SIZE)
    reference = Reference(made_config, copy.deepcopy(models[0]), models[1:], VOCAB_SIZE)
    lists = []
    for rollout in rollouts:
        start = len(rollout.prompt.token_ids)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logp = reference.logp(reference.teachers[0], ids, slice(start - 1, ids.shape[1] - 1))
        lists.append(list_of(logp, rollout, 7))
    answers = ranks.run(4, train, made_config, rollouts, lists, 2, tensor=2, pipeline=2)
    wanted = [reference.step(rollouts, number) for number in (1, 2)]
    for metrics, _ in answers:
        for found, want in zip(metrics, wanted, strict=True):
            assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-5)
            assert found["topk/lister/mass_outside"] > 0.01
    for name, parameter in reference.student.named_parameters():
        torch.testing.assert_close(answers[0][1][name].double(), parameter.data, atol=1e-5, rtol=0, msg=name)
        assert (parameter.data - dict(models[0].named_parameters())[name]).abs().max() > 1e-4  # and it did move
