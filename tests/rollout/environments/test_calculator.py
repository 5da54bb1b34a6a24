"""The calculator: right, exact where it can be, and quick to refuse everything else."""

import contextlib
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.rollout.environments.calculator import MAX_CHARACTERS, CannotCompute, compute


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("347 * 268", "92996"), ("12/4", "3"), ("7/2", "3.5"), ("0.1 + 0.2", "0.3"), ("-7 // 2", "-4"),
        ("7 % -3", "-2"), ("2^10", "1024"), ("2**-3", "0.125"), ("-2^2", "-4"), ("(1+2)*3", "9"),
        ("3 × 4 ÷ 2 − 1", "5"), ("1e5", "100000"), ("2**0.5", "1.41421356237"), ("10**20", "1" + "0" * 20),
        ("10**20 / 10**18", "100"), ("1_000 + 1", "1001"), ("-0.0", "0"), ("1/3", "0.333333333333"),
        ("1.5e300*2", "3e+300"), (" 1\n+\t1 ", "2"), ("1**(2**4000)", "1"),
    ],
)  # fmt: skip
def test_values(expression, value):
    assert compute(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("9**9**9", "too large"), ("9.0**9**9", "too large"), ("1e999", "too large"), ("10**400 / 3", "too large"),
        ("10**400 * 1.0", "too large"), ("2**4096 * 2", "too large"), ("1e308 * 10", "too large"),
        ("1/0", "division by zero"), ("1 % 0", "division by zero"), ("0 ** -1", "division by zero"),
        ("(-8)**0.5", "not a real number"), ("1j", "only numbers"), ("x + 1", "only numbers"),
        ("1 < 2", "only numbers"),
        ("__import__('os')", "only numbers"), ("'a' * 3", "only numbers"), ("[1]", "only numbers"),
        ("1,000", "only numbers"),
        ("True", "only numbers"), ("~1", "only numbers"), ("2 @ 3", "only numbers"), ("e", "only numbers"),
        ("...", "only numbers"), ("", "not an arithmetic"), ("1 +", "not an arithmetic"), ("1 2", "not an arithmetic"),
        ("0777", "not an arithmetic"), ("(" * 900, "not an arithmetic"), ("1" * 1001, f"longer than {MAX_CHARACTERS}"),
        ("1\0", "only numbers"), ("1(2)", "only numbers"),
    ],
)  # fmt: skip
def test_what_has_no_value_says_why(expression, why):
    with pytest.raises(CannotCompute, match=why):
        compute(expression)


@given(st.text(alphabet="0123456789.eE_+-*/%() ^", max_size=60))
def test_any_expression_has_a_value_or_a_reason(expression):
    with contextlib.suppress(CannotCompute):
        value = compute(expression)
        assert value.lstrip("-").isdigit() or math.isfinite(float(value))


@given(st.recursive(st.integers(-99, 99), lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner), max_leaves=8))
def test_integers_are_exact(tree):
    def written(node):
        return f"({written(node[0])}{node[1]}{written(node[2])})" if isinstance(node, tuple) else f"({node})"

    def value(node):
        if not isinstance(node, tuple):
            return Fraction(node)
        left, right = value(node[0]), value(node[2])
        return {"+": left + right, "-": left - right, "*": left * right}[node[1]]

    assert compute(written(tree)) == str(value(tree))
