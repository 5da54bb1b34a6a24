"""Small tokenizers of the kinds that published models have, trained on a few lines."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "the quick brown fox jumps over the lazy dog; the lazy dog sleeps",
    "a naïve café costs 5 € — 漢字 and emoji 🙂 are bytes too",
    "def add(a, b):\n    return a + b\n",
    "12+34=46; 1200 - 34 = 1166",
] * 4


def byte_level(path, *, vocab_size=330, lines=TEXT, eos="<|end|>"):
    """As GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return written(tokenizer, path, eos)


def sentencepiece(path, *, vocab_size=400, lines=TEXT, eos="</s>", prepend=True):
    """As Llama 2 and Mistral have it: a space in front, and bytes where there is no piece."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    spaced = [line.replace(" ", "▁") for line in lines]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None, fuse_unk=False))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[eos, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(spaced, trainer)
    known = json.loads(tokenizer.to_str())
    known["added_tokens"] = [t for t in known["added_tokens"] if t["content"] == eos]
    tokenizer = Tokenizer.from_str(json.dumps(known))
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return written(tokenizer, path, eos)


def written(tokenizer, path, eos):
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos})
    )
    return path
