"""One trajectory in two cuts: the teacher's tokens of the student's text, and the spans where both cuts meet.

A span is the shortest run of student tokens and of teacher tokens that cover the same bytes. Bytes, not characters or
decoded strings: a character may be cut in the middle by one tokenizer and not by the other.

Learnt tokens and what something else wrote in between are cut apart: the teacher's tokenizer gets the text of each
unbroken run alone. So a span has learnt tokens only, a token of the teacher is learnt or context and never both, and no
learnt token loses its span to a neighbour that is context. It is how a conversation is tokenized, whose turns end in
special tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TypeAlias

from megatron_opd.loss.crosstok.pieces import Pieces
from megatron_opd.models.tokenizer import Tokenizer

Span: TypeAlias = tuple[int, int, int, int]
"""Student tokens [first, stop) and teacher tokens [first, stop), both counted among the learnt ones of a trajectory."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What follows a prompt, in a teacher's tokens, up to the last learnt one."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    """Whether each of `ids` says learnt text."""
    spans: tuple[Span, ...]
    """In order."""


@dataclass(frozen=True, slots=True)
class Translator:
    """From the student's tokens to a teacher's."""

    student: Tokenizer
    student_pieces: Pieces
    teacher: Tokenizer
    teacher_pieces: Pieces

    def translate(self, ids: Sequence[int], learnt: Sequence[bool]) -> Translation:
        """The teacher's tokens of a trajectory's; `learnt` says which of the student's are.

        Where a run of learnt tokens ends in the student's end-of-sequence token, that is a span of its own, whatever
        either calls it. Other special tokens have no bytes: learnt ones join the next span, and the teacher does not
        see those of the context. What is not UTF-8, as the end of a cut answer may not be, what the teacher's tokenizer
        says differently, and all that follows either belong to no span.
        """
        theirs: list[int] = []
        their_learnt: list[bool] = []
        spans: list[Span] = []
        at = s = t = 0  # tokens so far; learnt tokens so far, of the student and of the teacher
        for is_learnt, run in groupby(learnt):
            length = len(list(run))
            said, found, is_whole = self._run(ids[at : at + length])
            at += length
            theirs += said
            their_learnt += [is_learnt] * len(said)
            if is_learnt:
                spans += [(first + s, stop + s, their_first + t, last + t) for first, stop, their_first, last in found]
                s, t = s + length, t + len(said)
            if not is_whole:
                break
        end = max((i + 1 for i, is_learnt in enumerate(their_learnt) if is_learnt), default=0)
        return Translation(tuple(theirs[:end]), tuple(their_learnt[:end]), tuple(spans))

    def _run(self, ids: Sequence[int]) -> tuple[list[int], list[Span], bool]:
        """(the teacher's tokens, the spans, whether they say all of it) of tokens that follow each other."""
        ended = bool(ids) and ids[-1] in self.student.eos_ids
        body = list(ids[:-1] if ended else ids)
        pieces = [self.student_pieces.of_id[i] or b"" for i in body]
        written = b"".join(pieces)
        text = _utf8_prefix(written)
        theirs, their_ends = self._encode(text)
        if text and not theirs:
            return [], [], False
        spans = spans_of(list(accumulate(len(piece) for piece in pieces)), their_ends)
        is_whole = len(text.encode()) == len(written)
        if ended and is_whole:
            spans.append((len(body), len(body) + 1, len(theirs), len(theirs) + 1))
            theirs.append(self.teacher.eos_id)
        return theirs, spans, is_whole

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
