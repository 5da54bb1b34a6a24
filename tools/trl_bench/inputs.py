"""Models, tokenizer, prompts and settings that both trainers read from one folder."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

_SPECIAL = {"pad": "<pad>", "eos": "<eos>"}


def make(folder: Path, arguments: argparse.Namespace) -> None:
    """Write student, teacher, prompts.jsonl and settings.json."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = _tokenizer(arguments.vocab)
    for name, hidden in (("student", arguments.hidden), ("teacher", 2 * arguments.hidden)):
        torch.manual_seed(hidden)
        config = Qwen3Config(
            vocab_size=arguments.vocab, hidden_size=hidden, intermediate_size=3 * hidden, head_dim=hidden // 4,
            num_hidden_layers=arguments.layers, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
            eos_token_id=1, tie_word_embeddings=False, max_position_embeddings=arguments.prompt + arguments.response,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # distributions with something to learn: a random head's are almost uniform
            model.get_output_embeddings().weight.mul_(3.0)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    words = random.Random(0)
    rows = [
        {"prompt": " ".join(f"w{words.randrange(2, arguments.vocab)}" for _ in range(arguments.prompt))}
        for _ in range(arguments.batch * (arguments.steps + arguments.warmup))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("batch", "prompt", "response", "steps", "warmup")
    settings = {name: getattr(arguments, name) for name in names} | {"lr": 1e-7}
    (folder / "settings.json").write_text(json.dumps(settings))


def _tokenizer(size: int):  # type: ignore[no-untyped-def]
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL.values(), *(f"w{i}" for i in range(2, size))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=_SPECIAL["pad"]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{kind}_token": word for kind, word in _SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)
