"""A session: cells of Python that run one after the other in one namespace, as in a notebook.

What a cell prints, and the value of its last expression, is the reply. The code shares this process with what replies
for it, so a reply is the code's own word; whoever reads it takes it for a text and nothing more.
"""

from __future__ import annotations

import ast
import os
import random
import sys
import types
from typing import Any, BinaryIO, NoReturn

import loops
from messages import receive, send

NAME = "<cell>"
_MAX_WORDS = 1000


class Printed:
    """A text that is written piece by piece, of which the middle is left out when it is long."""

    encoding = "utf-8"

    def __init__(self, characters: int) -> None:
        self._half = characters // 2
        self._begin, self._end, self._left_out = "", "", 0

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"what is written must be a text, not {type(text).__name__}")
        room = self._half - len(self._begin)
        self._begin += text[:room]
        rest = self._end + text[room:]
        self._end = rest[-self._half :]
        self._left_out += len(rest) - len(self._end)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def isatty(self) -> bool:
        return False

    def text(self) -> str:
        gap = f"\n[{self._left_out} characters are left out]\n" if self._left_out else ""
        return self._begin + gap + self._end


def serve(requests: BinaryIO, replies: BinaryIO, *, characters: int) -> NoReturn:
    """Run cells until there are none; of each output no more than so many characters are kept."""
    random.seed(0)  # an episode that is played again sees the same numbers
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        while True:
            asked = receive(requests)
            output = Printed(characters)
            sys.stdout = sys.stderr = output  # type: ignore[assignment]
            has_failed = _run(asked["code"], module.__dict__, output)
            send(replies, {"number": asked["number"], "text": output.text(), "failed": has_failed})
    except BaseException:
        os._exit(1)


def _run(code: str, namespace: dict[str, Any], output: Printed) -> bool:
    """Run a cell; True when it raised something."""
    try:
        loops.prepare(code)
        tree = ast.parse(code, NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NAME, "exec", dont_inherit=True), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), NAME, "eval", dont_inherit=True), namespace)
            if value is not None:
                _on_a_new_line(output, repr(value))
    except BaseException as error:
        _on_a_new_line(output, _described(error))
        return True
    return False


def _on_a_new_line(output: Printed, text: str) -> None:
    so_far = output.text()
    output.write(f"\n{text}" if so_far and not so_far.endswith("\n") else text)


def _described(error: BaseException) -> str:
    """Where it was raised, its kind and its text, which its own __str__ may make of anything."""
    line, place = 0, error.__traceback__
    while place is not None:
        if place.tb_frame.f_code.co_filename == NAME:
            line = place.tb_lineno
        place = place.tb_next
    try:
        words = str(error)[:_MAX_WORDS]
    except BaseException:
        words = "an exception that cannot be printed"
    kind = type(error).__name__
    where = f" in line {line}" if line else ""
    return f"{kind}{where}: {words}" if words else f"{kind}{where}"
