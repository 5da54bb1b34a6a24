"""Teachers with a tokenizer of their own."""

from __future__ import annotations

from typing import Literal

from megatron_opd.config.section import Fraction, section


@section
class CrossTokenizerConfig:
    """How teachers with `tokenizer: own` are compared with the student, span by span of the same bytes (GOLD, ULD)."""

    merge: Literal["first", "last"] = "first"
    """Which token of a span of several has its distribution compared, the others giving a factor: the first (GOLD's
    observed), or the last (its bayesian)."""
    hybrid: bool = True
    """Tokens that both vocabularies have are compared by loss.beta's divergence, the others as sorted probabilities;
    false: all are compared as sorted probabilities (plain ULD)."""
    adaptive: bool = True
    """Weigh the part of the matched tokens by their share in the teacher's vocabulary (hybrid)."""
    matched_weight: Fraction = 1.0
    """Weight of the part of the matched tokens where it is not adaptive; the other part has the rest to 1."""
