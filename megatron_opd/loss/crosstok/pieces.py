"""Which bytes of a text every token stands for, so that two tokenizers' cuts of one text can be laid side by side.

Knows the decoders that published tokenizers have: byte-level (GPT-2, Llama 3, Qwen), SentencePiece's (`▁` for a space,
`<0x0A>` for a byte), and plain text. Another one is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_opd.models.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class Pieces:
    """The bytes of each token of a tokenizer; None for special tokens, which stand for no text."""

    of_id: tuple[bytes | None, ...]

    def ids(self) -> dict[bytes, int]:
        """The first id of each piece of text."""
        found: dict[bytes, int] = {}
        for i, piece in enumerate(self.of_id):
            if piece:
                found.setdefault(piece, i)
        return found


def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """Raises ValueError for a tokenizer whose decoder is none of those above."""
    hf = tokenizer.hf
    to_bytes = _decoder(hf)
    special = set(hf.all_special_ids) | {i for i, added in hf.added_tokens_decoder.items() if added.special}
    plain = {i for i in hf.added_tokens_decoder if i not in special}  # whose text is in no alphabet of bytes
    pieces: list[bytes | None] = [None] * (max(hf.get_vocab().values()) + 1)
    for token, i in hf.get_vocab().items():
        if i not in special:
            pieces[i] = token.encode() if i in plain else to_bytes(token)
    return Pieces(tuple(pieces))


def _decoder(hf: Any) -> Any:
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("a tokenizer without tokenizer.json cannot be aligned with another one")
    kinds = set(_kinds(json.loads(backend.to_str()).get("decoder")))
    if "ByteLevel" in kinds:
        alphabet = {char: byte for byte, char in _byte_level_alphabet()}
        return lambda token: bytes(alphabet[char] for char in token) if set(token) <= set(alphabet) else token.encode()
    if kinds & {"Metaspace", "ByteFallback", "Replace"}:
        return _sentencepiece_bytes
    if kinds <= {"Fuse"}:
        return str.encode
    raise ValueError(f"a tokenizer with the decoder {', '.join(sorted(kinds))} cannot be aligned with another one")


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _kinds(inner)
    else:
        yield decoder["type"]


def _sentencepiece_bytes(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()


def _byte_level_alphabet() -> Iterator[tuple[int, str]]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others come after the first 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from ((byte, chr(byte)) for byte in printable)
    others = [byte for byte in range(256) if byte not in printable]
    yield from ((byte, chr(256 + n)) for n, byte in enumerate(others))
