"""One response in two cuts: the teacher's tokens of the student's text, and the spans where both cuts meet.

A span is the shortest run of student tokens and of teacher tokens that cover the same bytes. Bytes, not characters or
decoded strings: a character may be cut in the middle by one tokenizer and not by the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

from megatron_opd.loss.crosstok.pieces import Pieces
from megatron_opd.models.tokenizer import Tokenizer

Span: TypeAlias = tuple[int, int, int, int]
"""Student tokens [first, stop) and teacher tokens [first, stop) of a response."""


@dataclass(frozen=True, slots=True)
class Translator:
    """From the student's tokens to a teacher's."""

    student: Tokenizer
    student_pieces: Pieces
    teacher: Tokenizer
    teacher_pieces: Pieces

    def response(self, ids: Sequence[int]) -> tuple[list[int], list[Span]]:
        """The teacher's tokens of a response, and the spans, in order; both empty where its tokenizer changes the text.

        The end of the response is a span of its own where the student sampled one, whatever either calls it. Special
        tokens in the middle have no bytes and join the next span; what is not UTF-8, as the end of a cut response may
        not be, and all that follows it belong to no span.
        """
        ended = bool(ids) and ids[-1] in self.student.eos_ids
        body = list(ids[:-1] if ended else ids)
        pieces = [self.student_pieces.of_id[i] or b"" for i in body]
        written = b"".join(pieces)
        text = _utf8_prefix(written)
        theirs, their_ends = self._encode(text)
        if text and not theirs:
            return [], []
        spans = spans_of(list(accumulate(len(piece) for piece in pieces)), their_ends)
        if ended and len(text.encode()) == len(written):
            spans.append((len(body), len(body) + 1, len(theirs), len(theirs) + 1))
            theirs.append(self.teacher.eos_ids[0])
        return theirs, spans

    def _encode(self, text: str) -> tuple[list[int], list[int]]:
        """The teacher's tokens of a text, and where each ends in it in bytes; nothing if they say something else."""
        [ids] = self.teacher.encode_all([text], add_special_tokens=False)
        pieces = [self.teacher_pieces.of_id[i] or b"" for i in ids]
        said, asked = b"".join(pieces), text.encode()
        # A SentencePiece tokenizer may put a space in front of what it takes for the beginning of a text.
        extra = len(said) - len(asked)
        if said not in (asked, b" " + asked):
            return [], []
        return ids, [end - extra for end in accumulate(len(piece) for piece in pieces)]


def _utf8_prefix(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        return text[: error.start].decode("utf-8")


def spans_of(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Span]:
    """The spans of two cuts, given where each token ends in bytes; what follows the last common end is left out.

    Tokens without bytes join the span that follows them.
    """
    spans: list[Span] = []
    s = t = first_s = first_t = 0
    while s < len(student_ends) and t < len(teacher_ends):
        if student_ends[s] == teacher_ends[t]:
            spans.append((first_s, s + 1, first_t, t + 1))
            s, t = s + 1, t + 1
            first_s, first_t = s, t
        elif student_ends[s] < teacher_ends[t]:
            s += 1
        else:
            t += 1
    return spans
