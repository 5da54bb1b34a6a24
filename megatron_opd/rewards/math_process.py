"""The process that reads mathematics with math-verify: one JSON object a line in, one out. Started by `math_verify.py`.

It is a process of its own because algebra may take for ever, in a thread that nobody can stop.
"""

from __future__ import annotations

import json
import logging
import re
import resource
import sys
from decimal import Decimal
from typing import Any

import sympy
from math_verify import parse, verify

_MEMORY_BYTES = 4 * 2**30
_SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,2})(?![\w.])")
_MIXED = re.compile(r"(?<![\w./^\\])(\d{1,9})\s+(\d{1,9})\s?/\s?(\d{1,9})(?![\w/])")
_SPACED_MINUS = re.compile(r"([=:({\[]\s*)-\s+(?=[\d\\])")
_SENTENCE = re.compile(r"[A-Za-z]{2,} +[A-Za-z]{2,}")


def main() -> None:
    """Answer until there are no more questions."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say({"ready": True})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            said = _ANSWERS[asked.pop("what")](**asked)
        except Exception:  # of any kind: the text is a model's
            said = None
        _say({"said": said})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _is_right(reference: str, text: str) -> bool:
    """True if the text's final answer is the reference."""
    return bool(verify(_of_reference(reference), _parsed(text), timeout_seconds=None))


def _is_readable(reference: str) -> bool:
    """True if the reference holds mathematics, not only a word or a sentence."""
    return any(not isinstance(part, str) for part in _of_reference(reference))


def _number(text: str) -> str | None:
    """The value of an expression as a fraction "p/q"; None where it is no rational number."""
    for value in _parsed(rf"\boxed{{{text}}}"):
        if isinstance(value, sympy.Equality):
            value = value.rhs
        if isinstance(value, sympy.Expr) and value.is_number:
            value = value.doit()
            exact = sympy.Rational(str(value)) if isinstance(value, sympy.Float) else sympy.simplify(value)
            if isinstance(exact, sympy.Float):
                exact = sympy.Rational(str(exact))
            if isinstance(exact, sympy.Rational) and exact.is_finite:
                return f"{exact.p}/{exact.q}"
    return None


def _of_reference(reference: str) -> list[Any]:
    """A reference's parts: it may be a bare expression, or a solution that ends in one."""
    is_bare = not any(mark in reference for mark in (r"\boxed", "$", r"\(", r"\[")) and not _SENTENCE.search(
        re.sub(r"\\[a-z]+\{[^{}]*\}", "", reference)
    )
    return _parsed(rf"\boxed{{{reference.strip()}}}" if is_bare else reference)


def _parsed(text: str) -> list[Any]:
    text = text.replace("\N{MINUS SIGN}", "-").replace("\N{EN DASH}", "-")
    text = _SCIENTIFIC.sub(lambda found: format(Decimal(found[0]), "f"), text)
    text = _MIXED.sub(lambda found: f"{int(found[1]) * int(found[3]) + int(found[2])}/{found[3]}", text)
    text = _SPACED_MINUS.sub(r"\1-", text)
    return list(parse(text, parsing_timeout=None))


_ANSWERS = {"is_right": _is_right, "is_readable": _is_readable, "number": _number}

main()
