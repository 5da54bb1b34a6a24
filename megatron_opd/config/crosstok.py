"""Teachers with a tokenizer of their own."""

from __future__ import annotations

from typing import Literal

from megatron_opd.config.section import Fraction, section


@section
class CrossTokenizerConfig:
    """How teachers with `tokenizer: own` are compared with the student, span by span of the same bytes (GOLD, ULD)."""

    merge: Literal["first", "last"] = "first"
    """Token of a longer span whose distribution is compared, while the others give a factor: the first (GOLD's
    observed), or the last (GOLD's bayesian)."""
    hybrid: bool = True
    """Compare the tokens that both vocabularies have by loss.beta's divergence, and the others as sorted probabilities;
    false: compare all as sorted probabilities (plain ULD)."""
    adaptive: bool = True
    """Weigh the matched tokens by their share in the teacher's vocabulary (hybrid)."""
    matched_weight: Fraction = 1.0
    """Weight of the matched tokens without adaptive; the other tokens have the rest to 1."""
