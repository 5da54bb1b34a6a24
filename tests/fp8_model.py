"""A model of transformers whose layers multiply as servers in FP8 do, from the fidelity gate's rounding."""

import copy

from megatron_opd.precision.quantize import rounded
from megatron_opd.precision.recipes import RECIPES
from megatron_opd.sglang.weights.fp8_weights import is_matrix


def in_fp8(model):
    """A copy in float32 with rounded matrices, and rounded activations before them."""
    recipe, other = RECIPES["blockwise"], copy.deepcopy(model).float()
    for name, module in other.named_modules():
        if is_matrix(f"{name}.weight"):
            module.weight.data = rounded(module.weight.data, recipe.weights)
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], recipe.activations),))
    return other
