"""Random logits, hidden states and heads; the loss and its gradient by the dense float64 formula; and the grids."""

from dataclasses import dataclass
from itertools import product

import oracle
import torch

COLUMNS, SIZE = 1248, 1201
"""At TP=4 a shard has 312 columns; alone, a row is several of the kernels' blocks. The last columns are padding."""
GRADIENT_ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.2e-3, torch.float64: 1e-12}
"""Relative to the norm of the gradient. That of bfloat16 is the rounding of the gradient itself (`allowed_error`)."""
LOSS_ERROR = 1e-5


@dataclass(frozen=True)
class Case:
    beta: float
    ensemble: str
    num_teachers: int
    temperature: float
    dtype: torch.dtype = torch.float32

    @property
    def settings(self):
        return {"beta": self.beta, "temperature": self.temperature, "ensemble": self.ensemble}


BETAS, ENSEMBLES, TEACHERS, TEMPERATURES = (0.0, 0.1, 0.5, 0.9, 1.0), ("logits", "probs"), (1, 2, 4), (0.5, 1.0, 2.0)
DTYPES = (torch.float32, torch.bfloat16)
FULL = [Case(*values) for values in product(BETAS, ENSEMBLES, TEACHERS, TEMPERATURES, DTYPES)]
FEW = [Case(*values) for values in product((0.0, 0.1, 0.5, 1.0), ENSEMBLES, (1, 4), (0.5, 2.0), (torch.float32,))]
FEW += [Case(beta, how, 2, 1.0, dtype) for beta in BETAS for how in ENSEMBLES for dtype in DTYPES]


def logits(case, num_tokens=6, columns=COLUMNS, size=SIZE, seed=0):
    """(student, teachers, weights [T, N], mask): one row nearly certain, one shifted, padding that must not be seen, a
    token that one teacher alone is asked about, where the others hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(1 + case.num_teachers, num_tokens, columns, generator=generator)
    z[:, 0] *= 3
    z[0, 1] += 40.0
    z[..., size:] = 77.0
    weights = torch.rand(num_tokens, case.num_teachers, generator=generator) + 0.05
    weights[2] = torch.eye(case.num_teachers)[0]
    z[2:, 2] = float("nan")
    mask = torch.ones(num_tokens, dtype=torch.bool)
    mask[3] = False
    weights /= weights.sum(-1, keepdim=True)
    return z[0].to(case.dtype), [x.to(case.dtype) for x in z[1:]], weights, mask


def dense(case, student, teachers, weights, mask, size=SIZE):
    """(mean loss, loss by token, gradient of the mean), float64."""
    student = student.double()
    filled = [t.double().nan_to_num(0.0) for t in teachers]
    target = oracle.ensemble([oracle.log_softmax(t, size, case.temperature) for t in filled], weights, case.ensemble)
    counts = mask.double() / mask.sum()
    by_token, _ = oracle.grad(lambda z: _divergence(z, target, case, size), student)
    loss, gradient = oracle.grad(lambda z: (_divergence(z, target, case, size) * counts).sum(), student)
    return loss, by_token, gradient


def _divergence(z, target, case, size):
    return oracle.divergence(oracle.log_softmax(z, size, case.temperature), target, case.beta)


def hidden(case, num_tokens=9, columns=COLUMNS, size=64, seed=0):
    """(student's hidden states and head, teachers' pairs, weights, mask); hidden sizes differ."""
    generator = torch.Generator().manual_seed(seed)

    def made(rows, size):
        return torch.randn(rows, size, generator=generator).mul_(1.4 / size**0.25).to(case.dtype)

    models = [(made(num_tokens, size + 8 * n), made(columns, size + 8 * n)) for n in range(1 + case.num_teachers)]
    weights = torch.rand(num_tokens, case.num_teachers, generator=generator) + 0.05
    weights[2] = torch.eye(case.num_teachers)[0]
    for h, _ in models[2:]:
        h[2] = float("nan")
    mask = torch.rand(num_tokens, generator=generator) > 0.3
    mask[2] = True
    return models[0], models[1:], weights / weights.sum(-1, keepdim=True), mask


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def allowed_error(gradient, dtype, backend=None):
    """Of a gradient in `dtype`: rounding a few large values costs more than rounding many of all sizes."""
    if dtype != torch.bfloat16:
        return GRADIENT_ERROR[dtype]
    rounding = relative(gradient.to(dtype), gradient)
    truncates = backend == "triton" and not torch.cuda.is_available()  # what Triton's interpreter does; a GPU rounds
    return max(GRADIENT_ERROR[dtype], 1.02 * rounding) * (3 if truncates else 1)
