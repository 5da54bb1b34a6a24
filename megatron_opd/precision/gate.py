"""Whether FP8 is fine enough for what is to be learned: a decision about measured numbers.

The noise of FP8 on a distribution is KL(without FP8 || with FP8), in nats a token. It is held against the signal, the
student's reverse KL to the teachers: noise of a hundredth of the signal is little at first, and as large as what is
left to learn when the student has come a hundred times closer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_opd.config import Fp8Config


@dataclass(frozen=True, slots=True)
class Noise:
    """What FP8 does to one distribution, over the tokens measured."""

    name: str
    """student, ensemble, or a teacher's name."""
    kl: float
    """Mean, nats a token."""
    largest: float
    """Of a token."""
    top1: float
    """Share of tokens whose likeliest next token stays the same."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What FP8 does to a run."""

    signal: float
    """KL(student || teachers) without FP8: mean, nats a token."""
    noises: tuple[Noise, ...]
    gradient_error: float
    """‖g with FP8 - g‖ / ‖g‖ of the student's gradient."""
    num_tokens: int

    def ratio(self, noise: Noise) -> float:
        """Noise as a share of the signal; infinite where there is nothing to learn."""
        if noise.kl <= 0:
            return 0.0
        return noise.kl / self.signal if self.signal > 0 else math.inf

    def metrics(self) -> dict[str, float]:
        """By the names of docs/metrics.md."""
        made = {"fp8/gradient_error": self.gradient_error}
        for noise in self.noises:
            made |= {f"fp8/kl/{noise.name}": noise.kl, f"fp8/top1/{noise.name}": noise.top1}
            if self.signal > 0:
                made[f"fp8/ratio/{noise.name}"] = self.ratio(noise)
        return made

    def lines(self) -> list[str]:
        """For people."""
        made = [
            f"fp8: {noise.name}: KL {noise.kl:.3g} nats a token (at most {noise.largest:.3g}),"
            f" {self.ratio(noise):.2%} of the {self.signal:.3g} to be learned; top-1 agreement {noise.top1:.2%}"
            for noise in self.noises
        ]
        return [*made, f"fp8: relative error of the gradient {self.gradient_error:.3g}, on {self.num_tokens} tokens"]


def too_coarse(measured: Measured, fp8: Fp8Config) -> list[str]:
    """Every distribution that FP8 changes too much, naming what to set; also one whose noise is not a number."""
    problems = []
    for noise in measured.noises:
        ratio = measured.ratio(noise)
        if math.isfinite(noise.kl) and ratio <= fp8.max_kl_ratio:
            continue
        problems.append(
            f"FP8 changes {_who(noise.name)} by {noise.kl:.3g} nats a token, {ratio:.2%} of the"
            f" {measured.signal:.3g} to be learned, more than precision.fp8.max_kl_ratio={fp8.max_kl_ratio}: keep more"
            " layers out (first_layers_bf16, last_layers_bf16), set recipe=blockwise, or leave it out of precision.fp8"
        )
    return problems


def _who(name: str) -> str:
    return {"student": "the student", "ensemble": "the teachers' average"}.get(name, f"teacher '{name}'")
