"""Names in a torch_dist checkpoint: layers, and experts within a layer, are stacked along leading axes.

Norms in front of a matrix are filed under the matrix, as Transformer Engine fuses the two, so that a checkpoint does
not depend on which of the two layer implementations wrote it. Tests compare this with
Megatron's own answer (`tests/models/test_checkpoint_dirs.py`).
"""

from __future__ import annotations

import re

from megatron_opd.models.architecture import Architecture
from megatron_opd.models.torch_dist_dir import Region
from megatron_opd.models.weight_map import fused_name

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


def is_optimizer(key: str) -> bool:
    """Whether a tensor of a run's checkpoint belongs to the optimizer, not to the model."""
    return _OPTIMIZER.match(key) is not None


def is_vocab(key: str) -> bool:
    """Whether the rows of a tensor are the entries of the vocabulary, and then padding."""
    return key in ("embedding.word_embeddings.weight", "output_layer.weight")


def region(name: str, shape: tuple[int, ...], arch: Architecture) -> Region:
    """Where a whole parameter (layers and experts counted from the model's first) lies in a checkpoint."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return Region(name, shape, (0,) * len(shape), shape)
    index, rest = int(layer[1]), layer[2]
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        key, stack, at = f"decoder.layers.{fused_name(rest, arch)}", (arch.num_layers,), (index,)
    else:
        key = f"decoder.layers.mlp.experts.experts.{expert[2]}"
        stack, at = (arch.num_layers, arch.num_experts), (index, int(expert[1]))
    return Region(key, (*stack, *shape), (*at, *(0,) * len(shape)), (*(1,) * len(stack), *shape))
