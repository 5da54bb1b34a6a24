"""The losses whose kernels are compiled: those of the table, and all that the trainer can ask for."""

from __future__ import annotations

from itertools import product

from kernel_code.launches import Case

TABLE = {
    "KL": Case(),
    "KL, 4 teachers": Case(teachers=4),
    "JSD": Case("jsd"),
    "JSD, 4 teachers' probabilities": Case("jsd", "probs", 4),
}
_KINDS, _TEACHERS = ("forward", "reverse", "jsd"), (1, 2, 4)
_ODD, _UNEVEN = 50_257, 151_669
"""A vocabulary of odd size without padding, and one in padded rows."""


def every() -> list[Case]:
    """Kinds, averages, numbers of teachers and types, with and without a sampler of another temperature; rows of every
    alignment; tokens left out."""
    losses = [(kind, "logits", n) for kind, n in product(_KINDS, _TEACHERS)]
    losses += [(kind, "probs", n) for kind, n in product(_KINDS, _TEACHERS[1:])]
    cases = [Case(*loss, dtype=dtype) for dtype, loss in product(("bf16", "fp16", "fp32"), losses)]
    cases += [Case(*loss, sampler=True) for loss in losses]
    cases += [Case("jsd", how, n, width=_UNEVEN, stride=151_680) for how, n in (("logits", 1), ("probs", 4))]
    cases += [Case("jsd", how, n, width=_ODD) for how, n in (("logits", 1), ("probs", 4))]
    cases += [Case("jsd", width=_UNEVEN, stride=151_672)]  # a multiple of 8 only, which Triton does not see
    return [*cases, Case("jsd", indexed=True, by_teacher=False), Case("jsd", teachers=4, by_teacher=False)]


def few() -> list[Case]:
    """One of everything, for another kind of GPU."""
    odd = Case("jsd", width=_ODD)
    return [*TABLE.values(), Case("forward"), Case("jsd", "probs", 2, dtype="fp32"), odd]
