"""The methods whose results are compared on a real model, as what they set in a config."""

from __future__ import annotations

from dataclasses import dataclass

_ALL_WEIGHTS = (2e-4, 4e-4, 8e-4)
_ADAPTERS = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True, slots=True)
class Method:
    """One line of the table."""

    name: str
    label: str
    settings: tuple[str, ...]
    lrs: tuple[float, ...] = _ALL_WEIGHTS
    """Learning rates to try, in increasing order."""
    learns_samples: bool = False
    """From answers that the teacher sampled, so what those cost is part of its cost."""


_OFF_POLICY = "answers.lmbda=0"

FIRST = (
    Method("reverse_kl", "reverse KL, on-policy", ("loss.beta=1",)),
    Method("off_policy", "forward KL on teacher samples", (_OFF_POLICY, "loss.beta=0"), learns_samples=True),
    Method(
        "sft",
        "SFT on teacher samples",
        (_OFF_POLICY, "answers.sft_alpha=1", "answers.distill_alpha=0"),
        learns_samples=True,
    ),
)
THEN = (
    Method("forward_kl", "forward KL, on-policy", ("loss.beta=0",)),
    Method("jsd", "JSD(0.5), on-policy", ("loss.beta=0.5",)),
    Method("sampled", "sampled token, on-policy", ("loss.weight=0", "policy.kl_coef=1")),
    Method("lora", "reverse KL, on-policy, LoRA", ("loss.beta=1", "lora.rank=16"), _ADAPTERS),
)
METHODS = {method.name: method for method in (*FIRST, *THEN)}
