"""The scripts that build the examples' models share this: a small model, where it is saved, and pairs of numbers."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

# Pairs are split by a hash of the unordered pair, so no split can leak into another.
_BUCKETS = 97
_SPLITS = {"eval": range(0, 8), "train": range(8, 16), "pretrain": range(16, _BUCKETS)}


def in_split(a, b, split):
    """Which of the pairs belong to ``split``; symmetric, since an operation on (b, a) is that on (a, b)."""
    bucket = (np.minimum(a, b) * 7919 + np.maximum(a, b) * 104729) % _BUCKETS
    buckets = _SPLITS[split]
    return (bucket >= buckets.start) & (bucket < buckets.stop)


def new_model(tokenizer, *, vocab_size, hidden, ffn, head_dim, context, seed):
    """A small Qwen3 with weights scaled by fan-in: the usual 0.02 learns far slower at this size."""
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=context,
        # A small base: with so few positions, 10,000 would leave most frequencies unused.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    residual = (2 * config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = weight.shape[1] ** -0.5 * (residual if into_residual else 1.0)
            torch.nn.init.normal_(weight, 0.0, 0.5 if "embed_tokens" in name else std)
    return model


def write_model(model, tokenizer_directory, target, **generation):
    """Save weights in bfloat16 with the tokenizer, then move the finished directory to ``target``.

    ``generation``: what generation_config.json has besides the ends of a response.
    """
    ends = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    model.generation_config = GenerationConfig(**ends, **generation, do_sample=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        finished = Path(scratch) / target.name
        shutil.copytree(tokenizer_directory, finished)
        model.to(torch.bfloat16).save_pretrained(finished)
        for path, mode in ((finished, 0o755), *((file, 0o644) for file in finished.iterdir())):
            path.chmod(mode)  # temporary directories are private, the result is not
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        finished.rename(target)
