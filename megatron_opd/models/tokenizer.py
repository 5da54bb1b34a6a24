"""The tokenizer of a model directory, and the proof that a teacher's is the student's.

Token ids travel between all parts, text never does; so teachers must agree with the student on what an id means.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A Hugging Face tokenizer, reduced to what a run needs."""

    hf: Any
    eos_ids: tuple[int, ...]
    """Every id that ends a response: the model's own first, then the others of tokenizer and generation_config.json."""

    @property
    def eos_id(self) -> int:
        """The model's own of these: the tokenizer's, where it has one, else the first that generation_config.json
        names."""
        return self.hf.eos_token_id if self.hf.eos_token_id in self.eos_ids else self.eos_ids[0]

    def __len__(self) -> int:
        return len(self.hf)

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, with the special tokens that the tokenizer puts in front (a BOS, where it has one)."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores; without special tokens for texts that have them already.

        What the tokenizer puts behind a text (an end of sequence) is left out, since the text goes on; so is what it
        puts in front of one that begins with it already.
        """
        if not texts:
            return []
        # How long a text may be is for us to say.
        found = self.hf(list(texts), verbose=False, add_special_tokens=False)["input_ids"]
        front = self._front() if add_special_tokens else []
        return [[*front[: len(front) - _overlap(front, one)], *one] for one in found]

    def _front(self) -> list[int]:
        """The special tokens that the tokenizer puts in front of a text."""
        bare, framed = (
            list(self.hf("a", verbose=False, add_special_tokens=added)["input_ids"]) for added in (False, True)
        )
        starts = (i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare)
        return framed[: next(starts, 0)] if bare else []

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of tokens, special ones included."""
        return str(self.hf.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, without special tokens."""
        return str(self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    """Load from a local directory. Raises ValueError when there is none, or none that ends a response."""
    from transformers import AutoTokenizer

    # Said explicitly, or the tokenizers library warns of deadlocks whenever a server is started after `encode_all`.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        hf = AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        said = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        raise ValueError(f"{model_dir}: its tokenizer cannot be loaded: {said}") from None
    # Without any file transformers makes an empty tokenizer up, from the kind of model alone.
    if not any((Path(model_dir) / name).is_file() for name in hf.vocab_files_names.values()):
        raise ValueError(f"{model_dir} has no tokenizer: none of {', '.join(hf.vocab_files_names.values())} is there")
    named = [i for i in [hf.eos_token_id, *_also_named(Path(model_dir), hf)] if i is not None]
    eos_ids = tuple(dict.fromkeys([*named[:1], *sorted(named)]))
    if not eos_ids:
        raise ValueError(f"{model_dir}: neither tokenizer nor generation_config.json names an end-of-sequence token")
    return Tokenizer(hf, eos_ids)


def _overlap(front: list[int], ids: Sequence[int]) -> int:
    """How many of the last of `front` the ids begin with."""
    return next((n for n in range(len(front), 0, -1) if front[-n:] == list(ids[:n])), 0)


def _also_named(model_dir: Path, hf: Any) -> list[int | None]:
    """The ends of a response by generation_config.json, which may name one or several."""
    path = model_dir / "generation_config.json"
    if not path.is_file():
        return []
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    ids = named if isinstance(named, list) else [named]
    if not all(type(i) is int or named is None for i in ids):
        raise ValueError(f"{path}: eos_token_id must be the id of a token, or a list of them, not {named!r}")
    largest = max(hf.get_vocab().values(), default=-1)
    if unknown := [i for i in ids if i is not None and not 0 <= i <= largest]:
        raise ValueError(
            f"{path}: eos_token_id must be the id of a token, from 0 to {largest}, not {unknown[0]}; take it out"
        )
    return ids


def foreign_ends(student: Tokenizer, teacher: Tokenizer) -> str | None:
    """Why one of two models of the same tokenizer goes on behind the other's own end of a response; None where none
    does. `difference` refuses pairs without any end in common."""
    said = [
        f"{whose} own end of a response, {of.hf.convert_ids_to_tokens(of.eos_id)!r} ({of.eos_id}), does not end"
        f" one of the {other}, {to.eos_ids}"
        for whose, of, other, to in (
            ("its", teacher, "student", student),
            ("the student's", student, "teacher", teacher),
        )
        if of.eos_id not in to.eos_ids
    ]
    return "; ".join(said) or None


def difference(student: Tokenizer, teacher: Tokenizer) -> str | None:
    """Why ids of the student's tokenizer do not mean the same to the teacher's, or None when they do."""
    ours, theirs = student.hf.get_vocab(), teacher.hf.get_vocab()
    clashes = sorted((i, token) for token, i in ours.items() if theirs.get(token) != i)
    if clashes:
        i, token = clashes[0]
        return f"{len(clashes)} of {len(ours)} tokens have another id, first {token!r} ({i}, there {theirs.get(token)})"
    if not set(student.eos_ids) & set(teacher.eos_ids):
        return f"they end a response with different tokens ({student.eos_ids} and {teacher.eos_ids})"
    return None
