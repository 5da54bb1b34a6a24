"""Where a model's weights come from: a Hugging Face directory, or a Megatron (torch_dist) checkpoint.

A checkpoint made by the converter carries the config and the tokenizer of its model, so either kind of directory can be
named as `student.model` or `teachers.N.model`. A run's own checkpoints do not: megatron-to-hf makes a model of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import CheckpointException

from megatron_opd.core.parallel import Parallel
from megatron_opd.models.architecture import Architecture
from megatron_opd.models.lora_checkpoint import has_adapters
from megatron_opd.models.torch_dist_dir import Region, TorchDistDir, is_torch_dist
from megatron_opd.student import listed_loading, weights


def load(model: GPTModel, arch: Architecture, model_dir: str | Path, parallel: Parallel) -> None:
    """Fill this rank's part of the model. Collective. Raises ValueError for weights that do not fit the model."""
    if is_torch_dist(model_dir):
        _load_torch_dist(model, arch, model_dir, parallel)
    else:
        weights.load(model, arch, model_dir, parallel)


def load_head_rows(model_dir: str | Path, arch: Architecture, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a model's output head, [stop - start, D]; rows beyond its vocabulary are 0."""
    if not is_torch_dist(model_dir):
        return weights.load_head_rows(model_dir, arch, start, stop)
    name = "embedding.word_embeddings.weight" if arch.tied_embeddings else "output_layer.weight"
    checkpoint = TorchDistDir(model_dir)
    whole = checkpoint.shape(name)
    first, last = (min(i, arch.vocab_size) for i in (start, stop))
    rows = checkpoint.read(Region(name, whole, (first, 0), (last - first, whole[1])))
    return torch.cat([rows, rows.new_zeros(stop - start - len(rows), whole[1])])


def _load_torch_dist(model: GPTModel, arch: Architecture, model_dir: str | Path, parallel: Parallel) -> None:
    if has_adapters(TorchDistDir(model_dir)):
        raise ValueError(f"{model_dir} has LoRA adapters beside its weights; merge them with megatron-to-hf first")
    # Layers without Transformer Engine have empty extra states, which a converted checkpoint does not hold.
    wanted = {name: part for name, part in model.sharded_state_dict().items() if not name.endswith("_extra_state")}
    try:
        loaded = listed_loading.load({"model": wanted}, model_dir)
    except (KeyError, RuntimeError, CheckpointingException) as error:
        raise ValueError(f"{model_dir} does not fit its config.json: {str(error).splitlines()[0]}") from None
    except CheckpointException as error:  # torch's own, and not even an Exception: a file is damaged
        causes = [cause for _, (cause, _) in sorted(error.failures.items())]
        reason = str(causes[0]).splitlines()[0] if causes else "another rank failed"
        raise ValueError(f"{model_dir} cannot be read: {reason}") from None
    left_out = model.load_state_dict(loaded["model"], strict=False).missing_keys
    assert all(name.endswith("_extra_state") for name in left_out), left_out
    zero_padding(model, arch, parallel)


@torch.no_grad()
def zero_padding(model: GPTModel, arch: Architecture, parallel: Parallel) -> None:
    """Set the vocabulary's padding rows to 0: a checkpoint has none, and 0 x (uninitialised NaN) is NaN."""
    for name, parameter in model.named_parameters():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            first = parallel.tensor_rank * parameter.shape[0]
            parameter[max(arch.vocab_size - first, 0) :] = 0
