"""Dense float64 formulas in plain torch, written without any code of megatron_opd: what the tests compare with."""

import torch


def log_softmax(logits, size, temperature=1.0):
    """Over the first `size` columns only."""
    z = logits.double()[..., :size] / temperature
    return (
        z
        - torch.log(torch.exp(z - z.max(-1, keepdim=True).values).sum(-1, keepdim=True))
        - z.max(-1, keepdim=True).values
    )


def ensemble(logps, weights, how):
    """N log-probabilities [T, V] and weights [T, N] -> one [T, V]; "probs": arithmetic, "logits": geometric mean."""
    weights = weights.double()
    if how == "probs":
        return torch.log(sum(weights[:, n, None] * torch.exp(logp) for n, logp in enumerate(logps)))
    mean = torch.zeros_like(logps[0])
    for n, logp in enumerate(logps):
        mean = mean + torch.where(weights[:, n, None] > 0, weights[:, n, None] * logp, torch.zeros_like(logp))
    return log_softmax(mean, mean.shape[-1])


def kl(a, b):
    """Sum of a (log a - log b), where 0 log 0 is 0."""
    terms = torch.exp(a) * (a - b)
    return torch.where(torch.exp(a) > 0, terms, torch.zeros_like(terms)).sum(-1)


def divergence(student, target, beta):
    """Nats a token between log-probabilities [T, V]: forward KL, generalized JSD, reverse KL."""
    if beta == 0:
        return kl(target, student)
    if beta == 1:
        return kl(student, target)
    mixture = torch.log(beta * torch.exp(target) + (1 - beta) * torch.exp(student))
    return beta * kl(target, mixture) + (1 - beta) * kl(student, mixture)


def grad(function, x):
    """(value, d value.sum() / dx) at a float64 copy of x."""
    x = x.detach().double().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


REST_FLOOR = 1e-6


def over_listed(logp, ids):
    """Log-probabilities [V] of one token -> of the different ids, and of all others together."""
    others = torch.ones(len(logp), dtype=torch.bool)
    others[ids] = False
    rest = [torch.log(torch.exp(logp[others]).sum())] if others.any() else []
    return torch.stack([*(logp[i] for i in ids), *rest])


def list_over_listed(known, ids, size):
    """The same of a teacher's {id: log-probability} for one token; its rest is what is left of 1."""
    known = {i: x for i, x in known.items() if 0 <= i < size}
    minus_infinity = torch.tensor(-torch.inf, dtype=torch.float64)
    listed = [torch.tensor(known[i], dtype=torch.float64) if i in known else minus_infinity for i in ids]
    if len(ids) == size:
        return torch.stack(listed)
    mass = sum(torch.tensor(x, dtype=torch.float64).exp() for x in known.values())
    return torch.stack([*listed, torch.clamp(1 - mass, min=REST_FLOOR).log()])


def mean_probs(logps, weights):
    """N log-probabilities [O] -> one, normalised."""
    mean = torch.log(sum(float(w) * torch.exp(logp) for w, logp in zip(weights, logps, strict=True)))
    return mean - torch.logsumexp(mean, -1)
