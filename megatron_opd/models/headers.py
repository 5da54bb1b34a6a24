"""Whether a model directory, of either kind, has the tensors that its config.json promises. Reads headers, no weights.

Tells what is missing, left over, of another shape, and which files are absent or cut short. One tensor may be there
twice, the output head of tied embeddings; of it alone the values are compared, because a head of its own would be lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path

import torch

from megatron_opd.models import hub
from megatron_opd.models.architecture import Architecture, quantised
from megatron_opd.models.checkpoint_keys import is_optimizer, is_vocab, region
from megatron_opd.models.lora_checkpoint import open_checkpoint
from megatron_opd.models.safetensors_dir import TensorDir
from megatron_opd.models.torch_dist_dir import is_torch_dist
from megatron_opd.models.weight_map import all_rules, hf_shapes

_IGNORABLE = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of tensor names that hold no weights: buffers that old versions of transformers saved."""

_QUANTISED = (
    ".qweight",
    ".qzeros",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".SCB",
    ".scales",
)
"""Ends of the names that tensors of quantised weights have."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 1024
"""Of embedding and head that are in memory at a time."""

Shape = tuple[int, ...]


def check_tensors(model_dir: str | Path, arch: Architecture, *, at_most: int = 3) -> list[str]:
    """What is wrong with the tensors of a directory, a line each; after `at_most` only how many more there are.

    Raises ValueError when not even the headers can be read.
    """
    if hub.lacks_weights(model_dir):
        return []  # they are still to be downloaded, whole
    if is_torch_dist(model_dir):
        wrong = _wrong_in_checkpoint(model_dir, arch)
    else:
        method = quantised(model_dir) or _quantised_tensor(model_dir)
        wrong = [_is_quantised(method)] if method else _wrong_in_hf(model_dir, arch)
    problems = [f"{model_dir}: {problem}" for problem in wrong[:at_most]]
    return problems + ([f"{model_dir}: and {len(wrong) - at_most} more like these"] if len(wrong) > at_most else [])


def _is_quantised(method: str) -> str:
    return (
        f"the checkpoint is quantised ({method}), and weights are read in fp32, bf16 or fp16 only; name the model that"
        " it was made from, or write its weights out in bf16 first. A teacher can stay quantised behind servers"
        " (teachers.N.backend: sglang)"
    )


def _quantised_tensor(model_dir: str | Path) -> str | None:
    with TensorDir(model_dir) as tensors:
        return next((f"tensor {name}" for name in sorted(tensors.names()) if name.endswith(_QUANTISED)), None)


def weight_names(tensors: TensorDir, arch: Architecture) -> set[str]:
    """The tensors of a Hugging Face directory that are weights of the model."""
    names = {name for name in tensors.names() if not name.endswith(_IGNORABLE)}
    if arch.tied_embeddings:
        names.discard(_HEAD)  # some writers save the tied head a second time
    return names


def _wrong_in_hf(model_dir: str | Path, arch: Architecture) -> list[str]:
    expected = hf_shapes(all_rules(arch))
    with TensorDir(model_dir) as tensors:
        found = weight_names(tensors, arch)
        wrong = _missing_or_left_over(set(expected), found)
        shapes = {name: tuple(tensors.shape(name)) for name in sorted(set(expected) & found)}
        if arch.tied_embeddings and {_EMBEDDING, _HEAD} <= set(tensors.names()) and not _same(tensors):
            wrong.append(
                f"'{_HEAD}' is not '{_EMBEDDING}', but config.json ties them; set tie_word_embeddings to false"
            )
    return wrong + _wrong_shapes(shapes, expected)


def _same(tensors: TensorDir) -> bool:
    """Whether the output head is the embedding once more; as much of both is read as differs from the start."""
    shape = tensors.shape(_EMBEDDING)
    if tensors.shape(_HEAD) != shape:
        return False
    rows = range(0, shape[0], _ROWS)
    return all(torch.equal(*(tensors.read(x, slice(i, i + _ROWS)).float() for x in (_EMBEDDING, _HEAD))) for i in rows)


def _wrong_in_checkpoint(model_dir: str | Path, arch: Architecture) -> list[str]:
    checkpoint = open_checkpoint(model_dir)
    regions = [region(name, rule.shape, arch) for name, rule in all_rules(arch).items()]
    expected = {r.key: r.whole for r in regions}
    found = {key for key in checkpoint.tensors if not is_optimizer(key)}
    shapes = {key: checkpoint.shape(key) for key in sorted(set(expected) & found)}
    for key, shape in shapes.items():
        if is_vocab(key) and shape[0] >= arch.vocab_size:  # padded as whoever wrote it liked
            expected[key] = (shape[0], *expected[key][1:])
    wrong = _missing_or_left_over(set(expected), found) + _wrong_shapes(shapes, expected)
    return checkpoint.damage() + wrong


def _missing_or_left_over(expected: Set[str], found: Set[str]) -> list[str]:
    missing = [f"tensor '{name}' is missing" for name in sorted(expected - found)]
    return missing + [
        f"tensor '{name}' does not belong to the model of its config.json" for name in sorted(found - expected)
    ]


def _wrong_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    return [
        f"'{name}' has shape {list(shape)}, but config.json says {list(expected[name])}"
        for name, shape in found.items()
        if shape != expected[name]
    ]
