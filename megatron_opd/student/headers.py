"""Whether a Hugging Face directory has the tensors that its config.json promises. Reads headers, no weights."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.student.architecture import Architecture
from megatron_opd.student.safetensors_dir import TensorDir
from megatron_opd.student.torch_dist_dir import is_torch_dist
from megatron_opd.student.weight_map import all_rules, hf_shapes

_IGNORABLE = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of tensor names that hold no weights: buffers that old versions of transformers saved."""


def check_tensors(model_dir: str | Path, arch: Architecture, *, at_most: int = 3) -> list[str]:
    """What is wrong with the tensors of a directory: missing, too many, of another shape, in a file cut short."""
    if is_torch_dist(model_dir):
        return []  # loading compares these
    with TensorDir(model_dir) as tensors:
        found = {name for name in tensors.names() if not name.endswith(_IGNORABLE)}
        if arch.tied_embeddings:
            found.discard("lm_head.weight")  # some writers save the tied head a second time
        expected = hf_shapes(all_rules(arch))
        wrong = [f"tensor '{name}' is missing" for name in sorted(set(expected) - found)]
        wrong += [f"tensor '{name}' has no place by its config.json" for name in sorted(found - set(expected))]
        for name in sorted(set(expected) & found):
            shape = tuple(tensors.shape(name))
            if shape != expected[name]:
                wrong.append(f"'{name}' has shape {list(shape)}, but config.json says {list(expected[name])}")
    problems = [f"{model_dir}: {problem}" for problem in wrong[:at_most]]
    return problems + ([f"{model_dir}: and {len(wrong) - at_most} more like these"] if len(wrong) > at_most else [])
