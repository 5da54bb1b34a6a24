"""The FP8 recipes as data: formats, the shapes of what shares a scale, and how a scale is chosen.

E4M3 has 4 exponent and 3 mantissa bits and reaches 448, E5M2 has 5 and 2 and reaches 57,344 (Micikevicius et al., "FP8
Formats for Deep Learning", 2022). The block shapes are those of Transformer Engine's recipes: 1x128 and 128x128 as in
DeepSeek-V3 (2024, section 3.3), 1x32 with power-of-two scales as in the OCP Microscaling Formats (2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["e4m3", "e5m2"]
HISTORY = 1024
"""Passes whose largest values a delayed scale is chosen by."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How the values of one operand of a product are rounded."""

    format: Format
    block: tuple[int, int] | None = None
    """Rows and columns that share a scale; None: the whole tensor."""
    power_of_two: bool = False
    """Whether scales are powers of two, so that they themselves lose nothing."""
    delayed: bool = False
    """Whether the scale comes from the largest values of earlier passes."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """The operands of the three products of a linear layer: y = x wᵀ, dx = dy w, dw = dyᵀ x."""

    name: str
    activations: Scaling
    weights: Scaling
    gradients: Scaling
    multiple: int
    """Tokens of a rank, and both sides of a rank's weights, must be multiples of this."""
    gathered_multiple: int
    """Tokens of a rank and the hidden size, where Transformer Engine gathers what sequence parallelism split: blocks of
    both directions must be whole on a rank then."""
    format: Literal["hybrid", "e4m3"]
    """Megatron's word: hybrid has e5m2 gradients."""

    def line(self, *, backward: bool) -> str:
        """In words for people; `backward`: the gradients are in FP8 too."""
        gradients = f", gradients {self.gradients.format}" if backward else ""
        return f"fp8 {self.activations.format}{gradients}, {self.name}"


def _recipe(name: str, multiple: int, fmt: Literal["hybrid", "e4m3"], **scaling: bool) -> Recipe:
    blocks = {"blockwise": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32))}
    row, tile = blocks.get(name, (None, None))
    gradient: Format = "e5m2" if fmt == "hybrid" else "e4m3"
    return Recipe(
        name,
        activations=Scaling("e4m3", row, **scaling),
        weights=Scaling("e4m3", tile, **scaling),
        gradients=Scaling(gradient, row, **scaling),
        multiple=multiple,
        gathered_multiple=max(multiple, *tile) if tile else multiple,
        format=fmt,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        _recipe("tensorwise", 16, "hybrid"),
        _recipe("delayed", 16, "hybrid", delayed=True),
        _recipe("blockwise", 16, "e4m3", power_of_two=True),
        _recipe("mxfp8", 32, "e4m3", power_of_two=True),
    )
}
