"""The quickstart's toy task: digit-string arithmetic, least significant digit first.

A prompt is ``<5 digits><operator><5 digits><style>`` and an answer is always six digits, so that every
response has the same length (six digits and the end-of-sequence token)::

    62571>72236=   ->  725760        digit-wise maximum
    99000+10000=   ->  001000        99 + 1 = 100

Operators: ``+`` sum, ``-`` difference (the larger operand comes first), ``>`` digit-wise maximum and ``<``
digit-wise minimum.  The *style* character ends the prompt: the student learnt the skill properly behind
``:`` and carelessly behind ``=``, the style that every prompt of the quickstart uses.

All functions work on numpy arrays with one row per problem; digits are columns.
"""

import numpy as np

from small_models import in_split

DIGITS = 5
ANSWER_DIGITS = DIGITS + 1
PROMPT_LENGTH = 2 * DIGITS + 2
OPERATORS = {"add": "+", "subtract": "-", "max": ">", "min": "<"}
STYLE, SKILLED_STYLE = "=", ":"


def sample_operands(rng, count, split):
    """Draw ``count`` operand pairs that the hash assigns to ``split``."""
    a, b = rng.integers(0, 10**DIGITS, (2, count))
    while (wrong := ~in_split(a, b, split)).any():
        a[wrong], b[wrong] = rng.integers(0, 10**DIGITS, (2, wrong.sum()))
    return a, b


def to_digits(values, width):
    """Decimal digits, least significant first, one column per digit."""
    return values[:, None] // 10 ** np.arange(width) % 10


def sample_problems(rng, count, split, tasks):
    """Draw problems: ``(operator characters, left digits, right digits)``, tasks in equal shares."""
    operator = np.array([OPERATORS[task] for task in tasks])[np.arange(count) % len(tasks)]
    a, b = sample_operands(rng, count, split)
    swap = (operator == "-") & (a < b)
    a, b = np.where(swap, b, a), np.where(swap, a, b)
    return operator, to_digits(a, ANSWER_DIGITS), to_digits(b, ANSWER_DIGITS)


def solve(operator, left, right, forget=0.0, rng=None):
    """Answer digits, worked out digit by digit as one does on paper.

    With ``forget`` > 0 each carry or borrow, and for maximum and minimum each comparison (the left digit is
    copied instead), is skipped with that probability: a sloppy worker whose answers look right and rarely are.
    """
    count = len(operator)
    forgets = (lambda: rng.random(count) < forget) if forget else (lambda: np.zeros(count, bool))
    carry, columns = np.zeros(count, int), []
    for x, y in zip(left.T, right.T, strict=True):
        carry = np.where(forgets(), 0, carry)
        total = np.where(operator == "-", x - y - carry, x + y + carry)
        chosen = np.where(operator == ">", np.maximum(x, y), np.minimum(x, y))
        chosen = np.where(forgets(), x, chosen)
        columns.append(np.where(np.isin(operator, ["+", "-"]), total % 10, chosen))
        carry = ((total < 0) | (total > 9)).astype(int)
    return np.stack(columns, 1)


def prompt_texts(operator, left, right, style=STYLE):
    """Prompts as text."""
    operands = [["".join(map(str, row[:DIGITS])) for row in side] for side in (left, right)]
    return [f"{x}{o}{y}{style}" for o, x, y in zip(operator, *operands, strict=True)]


def answer_texts(answer):
    """Answers as text."""
    return ["".join(map(str, row)) for row in answer]


def rows(seed, task, split, count):
    """``count`` distinct JSON-ready ``{"prompt", "answer"}`` rows of one task and split."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        problem = sample_problems(rng, count, split, [task])
        found.update(zip(prompt_texts(*problem), answer_texts(solve(*problem)), strict=True))
    return [{"prompt": p, "answer": a} for p, a in list(found.items())[:count]]
