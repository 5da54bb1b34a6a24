"""The tool calculator: arithmetic, written as people write it. It knows numbers and operators, and no names at all.

Integers are exact, up to a limit on their size. Other results have twelve digits.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from megatron_opd.core.environment import Schema
from megatron_opd.rollout.environments.tool import Outcome, ToolKind

SCHEMA: Schema = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "description": "Numbers, parentheses and the operators + - * / // % and ^ or ** for powers.",
                }
            },
            "required": ["expression"],
        },
    },
}
MAX_CHARACTERS = 1000
MAX_BITS = 4096
"""Size of the largest integer; one of 1,233 digits."""
_ALLOWED = re.compile(r"[0-9.eE_+\-*/%() ]*")
_OTHER_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "\n": " ", "\t": " "})
_DIGITS = 12


class CannotCompute(ValueError):
    """The expression has no value here; the text says why."""


class Calculator:
    """The calculator of an episode; it keeps nothing."""

    async def call(self, arguments: Mapping[str, Any], timeout_s: float) -> Outcome:
        """The value of `expression`."""
        try:
            return Outcome(text=compute(arguments["expression"]))
        except CannotCompute as error:
            return Outcome(text=f"Error: {error}", failure="error")

    async def close(self) -> None:
        """It holds nothing."""


KIND = ToolKind(schema=SCHEMA, make=Calculator)


def compute(expression: str) -> str:
    """The value of an expression. Raises CannotCompute; takes milliseconds, whatever the text."""
    source = expression.translate(_OTHER_SIGNS).strip()
    if len(source) > MAX_CHARACTERS:
        raise CannotCompute(f"the expression is longer than {MAX_CHARACTERS} characters")
    if not _ALLOWED.fullmatch(source):
        raise CannotCompute("an expression has only numbers, parentheses and the operators + - * / // % ^")
    try:
        return _shown(_value(ast.parse(source, mode="eval").body))
    except ZeroDivisionError:
        raise CannotCompute("division by zero") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, CannotCompute):
            raise
        raise CannotCompute("this is not an arithmetic expression") from None
    except OverflowError:
        raise CannotCompute("the result is too large") from None


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _within_limits(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        return _within_limits(_applied(node.op, _value(node.left), _value(node.right)))
    raise CannotCompute("an expression has only numbers, parentheses and the operators + - * / // % ^")


def _applied(operator: ast.operator, left: int | float, right: int | float) -> Any:
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            is_whole = isinstance(left, int) and isinstance(right, int) and left % right == 0
            return left // right if is_whole else left / right
        case ast.FloorDiv():
            return left // right
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
    raise CannotCompute("an expression has only numbers, parentheses and the operators + - * / // % ^")


def _power(base: int | float, exponent: int | float) -> Any:
    """Nothing is computed that would be too large."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        if exponent * (abs(base).bit_length() - 1) > MAX_BITS:
            raise OverflowError
        if exponent < 0:
            return float(base) ** exponent
    return base**exponent


def _within_limits(value: Any) -> int | float:
    if isinstance(value, complex):
        raise CannotCompute("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise OverflowError
    if isinstance(value, float) and not math.isfinite(value):
        raise OverflowError
    return value


def _shown(value: int | float) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 10**_DIGITS:
        value = int(value)
    return str(value) if isinstance(value, int) else f"{value:.{_DIGITS}g}"
