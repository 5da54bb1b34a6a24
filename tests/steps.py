"""One training step twice: by the code under test on its ranks, and by transformers and plain torch in float64."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import oracle
import torch


def build(parallel, config, vocab_size):
    """(student, objective, a function that turns rollouts into scored micro-batches) of a rank."""
    from megatron_opd.loss.distillation import Distillation
    from megatron_opd.loss.objective import Objective
    from megatron_opd.student.student import Student
    from megatron_opd.teachers import build_teachers
    from megatron_opd.trainer.build_objective import sampled_terms
    from megatron_opd.trainer.experience import Experience

    student = Student(config, parallel)
    vocab = student.vocab_shard(vocab_size)
    teachers = build_teachers(config, parallel, vocab)
    heads = tuple(t.head_LD for t in teachers)
    term = Distillation(config.loss, config.rollout.temperature, vocab, tuple(config.teachers), heads)
    is_mixed = config.answers.lmbda < 1
    objective = Objective(term, sampled_terms(config.rl, config.policy, config.answers, is_mixed), is_mixed)
    experience = Experience(config, parallel, teachers, None)
    return student, objective, lambda rollouts: experience.score(rollouts) if rollouts else []


def train(parallel, config, rollouts, vocab_size, num_steps):
    """What every rank does: ([metrics by step], evaluation after the last, exported weights on leaders)."""
    student, objective, pack = build(parallel, config, vocab_size)
    mine = rollouts[parallel.data_rank :: parallel.data_size]
    metrics = [student.step(pack(mine), objective) for _ in range(num_steps)]
    held_out = rollouts[:3] if parallel.data_rank == 0 else []  # a smaller last micro-batch; idle replicas
    evaluation = student.evaluate(pack(held_out), objective)
    return metrics, evaluation, {name: tensor.clone() for name, tensor in student.export()}


def told(parallel, config, rollouts, vocab_size, count):
    """What every rank knows of its replica's first `count` answers: by teacher, their log-probabilities."""
    from megatron_opd.trainer.completions import answer_logps

    _, objective, pack = build(parallel, config, vocab_size)
    return answer_logps(
        objective.distillation, pack(rollouts[parallel.data_rank :: parallel.data_size]), count, parallel
    )


def reference_nll(parallel, config, sources, vocab_size):
    """The cross-entropy of the prompts' answers, as a rank knows it."""
    from megatron_opd.student.student import Student
    from megatron_opd.trainer import reference_nll
    from megatron_opd.trainer.experience import packing_settings

    student = Student(config, parallel)
    packing = packing_settings(config.train, config.precision.fp8, config.parallel, parallel)
    settings = {"train": config.train, "loss": config.loss, "packing": packing}
    return reference_nll.nll(student, student.vocab_shard(vocab_size), sources, **settings)


def agreement_with_answers(parallel, config, answers, vocab_size):
    """The agreement with teachers' answers, as a rank knows it."""
    from megatron_opd.student.student import Student
    from megatron_opd.trainer.experience import packing_settings
    from megatron_opd.trainer.teacher_answers import forced_agreement

    student = Student(config, parallel)
    packing = packing_settings(config.train, config.precision.fp8, config.parallel, parallel)
    return forced_agreement(student, student.vocab_shard(vocab_size), answers, loss=config.loss, packing=packing)


def train_shaped(parallel, config, rollouts, vocab_size, num_steps):
    """The same with the weights and advantages of a step, and its updates: ([metrics by step], exported weights)."""
    from megatron_opd.trainer.build_objective import build_objective
    from megatron_opd.trainer.shaping import Shaping, is_shaped
    from megatron_opd.trainer.updates import split, update

    student, objective, pack = build(parallel, config, vocab_size)
    term = objective.distillation
    teachers = [SimpleNamespace(head_LD=head, foreigner=None) for head in term.heads]
    objective = build_objective(config, term.vocab, teachers)
    shaping = Shaping(config, parallel, objective.distillation)
    mine, metrics = rollouts[parallel.data_rank :: parallel.data_size], []
    for step in range(num_steps):
        parts, shaped = split(pack(mine), config.train.minibatches), {}
        if is_shaped(config.loss, config.policy, config.rl):
            parts, shaped = shaping(mine, parts, step)
        metrics.append({**update(student, parts, objective, config.train), **shaped})
    return metrics, {name: tensor.clone() for name, tensor in student.export()}


def step_on_nan(parallel, config, rollouts, vocab_size):
    """Whether a step whose teacher says NaN on the last rank raises here and leaves the weights alone."""
    student, objective, pack = build(parallel, config, vocab_size)
    before = [p.detach().clone() for p in student.gpt.parameters()]
    if parallel.rank == parallel.world_size - 1:
        objective.distillation.heads[0].fill_(float("nan"))
    try:
        student.step(pack(rollouts[parallel.data_rank :: parallel.data_size]), objective)
    except FloatingPointError:
        return all(torch.equal(a, b) for a, b in zip(before, student.gpt.parameters(), strict=True))
    return False


def learning_rate(optim, step, num_steps):
    """Of step `step` (from 1): lr * step / warmup at first, then the decay from the last warm-up step on."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    past = max(optim.warmup_steps - 1, 0)
    done = (step - 1 - past) / (num_steps - past)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[optim.schedule]
    return optim.min_lr + (optim.lr - optim.min_lr) * shape if optim.schedule != "constant" else optim.lr


def learnt(rollout):
    """The learnt tokens."""
    return [token for token, is_learnt in zip(rollout.token_ids, rollout.learnt, strict=True) if is_learnt]


def place(rollout, prompt=None):
    """(the whole sequence [1, S], the positions whose outputs predict the learnt tokens), behind another prompt too."""
    prompt = rollout.prompt.token_ids if prompt is None else prompt
    rows = [len(prompt) - 1 + i for i, is_learnt in enumerate(rollout.learnt) if is_learnt]
    return torch.tensor([[*prompt, *rollout.token_ids]]), rows


@dataclass
class Reference:
    """Dense, one process, float64, transformers' models and torch's AdamW."""

    config: object
    student: torch.nn.Module
    teachers: list
    vocab_size: int

    def __post_init__(self):
        self.student = self.student.double()
        self.teachers = [teacher.double() for teacher in self.teachers]
        decay, rest = [], []
        for parameter in self.student.parameters():  # vectors (norms, biases) are not decayed
            (rest if parameter.dim() == 1 else decay).append(parameter)
        optim = self.config.optim
        self.adam = torch.optim.AdamW(
            [{"params": decay}, {"params": rest, "weight_decay": 0.0}],
            lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, weight_decay=optim.weight_decay,
        )  # fmt: skip

    def step(self, rollouts, number):
        self.adam.zero_grad()
        total, count = 0.0, 0
        for rollout in rollouts:
            total, count = total + self.loss(rollout).sum(), count + sum(rollout.learnt)
        (total / count).backward()
        gradients = [p.grad for p in self.student.parameters()]
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        optim = self.config.optim
        if optim.clip_grad and norm > optim.clip_grad:
            for gradient in gradients:
                gradient *= optim.clip_grad / (norm + 1e-6)
        lr = learning_rate(optim, number, self.config.train.steps)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        return {"loss": total.item() / count, "grad_norm": norm, "lr": lr, "num_tokens": count}

    def loss(self, rollout):
        """Nats for each learnt token of one rollout: no padding, no batch."""
        return oracle.divergence(self.logp(self.student, *place(rollout)), self.target(rollout), self.config.loss.beta)

    def target(self, rollout):
        """The combined teachers at the learnt tokens, each behind the prompt that it sees, [R, V]."""
        raw = [t.sources.get(rollout.prompt.source, t.weight) for t in self.config.teachers]
        weights = torch.tensor([[w / sum(raw) for w in raw]] * sum(rollout.learnt), dtype=torch.float64)
        seen = [rollout.prompt.teacher_ids.get(t.name) for t in self.config.teachers]
        with torch.no_grad():
            told = [self.logp(t, *place(rollout, prompt)) for t, prompt in zip(self.teachers, seen, strict=True)]
        return oracle.ensemble(told, weights, self.config.loss.ensemble)

    def logp(self, model, ids, rows):
        return oracle.log_softmax(model(ids).logits[0, rows], self.vocab_size, self.config.loss.temperature)
