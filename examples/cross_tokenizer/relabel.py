#!/usr/bin/env python3
"""Make teachers with another tokenizer out of the quickstart's: the same skill, other ids, other special tokens.

    python examples/cross_tokenizer/relabel.py --out runs/cross_tokenizer

writes runs/cross_tokenizer/teacher_carry and teacher_compare, for examples/gold.yaml. The tokenizer is byte-level with
its characters in another order and its own end token, so nothing about ids carries over from the student; embedding and
output head are reordered to fit. Real pairs of families also cut words differently: tests/loss/test_crosstok.py.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "quickstart" / "models"
CHARACTERS = "=:<>-+9876543210"
END, PAD = "<|end|>", "<|pad|>"
VOCAB_SIZE = 24


def vocabulary() -> dict[str, int]:
    """Token to id: characters, unused entries, and the special tokens last."""
    tokens = [*CHARACTERS, *(f"<|unused{i}|>" for i in range(VOCAB_SIZE - len(CHARACTERS) - 2)), PAD, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(directory: Path) -> None:
    """Hugging Face files of a byte-level tokenizer without merges."""
    known = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=[]))
    tokenizer.add_special_tokens([token for token in known if token not in CHARACTERS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def relabelled(rows_VD: torch.Tensor, old: dict[str, int], old_end: int) -> torch.Tensor:
    """Rows of an embedding or head in the order of the new vocabulary; what is new is 0."""
    new_VD = rows_VD.new_zeros(VOCAB_SIZE, rows_VD.shape[1])
    for token, i in vocabulary().items():
        if token in CHARACTERS or token == END:
            new_VD[i] = rows_VD[old_end if token == END else old[token]]
    return new_VD


def relabel(source: Path, out: Path) -> None:
    """Write the model of `source` with the other tokenizer to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    old = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = relabelled(weights[name], old, config["eos_token_id"])
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    known = vocabulary()
    config |= {"vocab_size": VOCAB_SIZE, "eos_token_id": known[END], "pad_token_id": known[PAD]}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the new models")
    options = parser.parse_args(arguments)
    for name in ("teacher_carry", "teacher_compare"):
        relabel(MODELS / name, options.out / name)
        print(f"wrote {options.out / name}")


if __name__ == "__main__":
    main()
