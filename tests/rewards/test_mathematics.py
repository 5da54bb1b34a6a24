"""Mathematics: what math-verify and the `####` convention read."""

import threading
import time
from fractions import Fraction

import pytest

from megatron_opd.core.types import Prompt
from megatron_opd.rewards import build_reward
from megatron_opd.rewards.gsm8k import final_number
from megatron_opd.rewards.mathematics import AnswerReader


def graded(reference, text):
    prompt = Prompt(source="s", index=0, text="", token_ids=(), answer=reference)
    reward = build_reward("math")
    reward.check(prompt)
    return reward.grade([(prompt, text)])[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"#### Step 3: multiply \boxed{11}", 11), ("#### 2. Add them\nIt is 7.", 7), ("#### - 8", -8),
        ("#### 2.5e2", 250), ("4e-1", Fraction(2, 5)), ("#### 3 1/4 cups", Fraction(13, 4)), ("#### **18**", 18),
        ("#### Answer: 5 of 6", 5), (r"\boxed{40\text{ cm}^2}", 40), (r"\boxed{3\frac{1}{4}}", Fraction(13, 4)),
        (r"\boxed{-\frac{5}{8}}", Fraction(-5, 8)), (r"\boxed{2.5\times 10^2}", 250), (r"\boxed{15\%}", 15),
        (r"\boxed{\$1,200}", 1200), (r"\boxed{6,000\,\mathrm{cm}^3}", 6000), (r"\boxed{30^\circ}", 30),
        ("#### 36 = 3*12 eggs", 36), ("#### 36 = 3 × 12 eggs", 36), ("#### 8 = 2 x 4", 8), ("#### 20 = 4 x $5", 20),
        ("#### 3*12 = 36 eggs", 36), ("#### 50 = 1/2 of 100", 50), ("#### 7 * 2 apples", 14),
        ("#### 20 / 4 = 5 a day", 5),
        ("#### 12 - 3 left", None), ("#### 10-12", None), ("#### 15 - 20 minutes", None), ("#### 2024-05-06", None),
        ("#### 6:30", None), ("#### 12 - 3 = 9 left", 9), ("#### 100-year", 100), ("#### 5 +/- 1", 5),
        ("#### 3^4", 81), ("#### 7 + 6 = 13", 13), ("#### 2.500.000", 2_500_000), ("#### 9\u202f500 km", 9500),
        (r"\boxed{\mathbf{31}}", 31), (r"\boxed{\text{31}}", 31), (r"\boxed{8\ \text{hours}}", 8),
        (r"\boxed{8 \text{ hours}}", 8), (r"\boxed{about 8}", 8), ("#### 6 or 7", 6), ("#### 6 - six apples", 6),
        ("#### 4\nno, \\boxed{5}", 5), ("\\boxed{5}\n#### 4", 4), (r"\boxed{3\cdot 4}", 12), ("x = - 12", -12),
    ],
)  # fmt: skip
def test_final_numbers(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{4 \text{ or } 9}", r"\boxed{4 or 9}", r"\boxed{4, 9}", r"\boxed{4 \text{ and } 9 \text{ apples}}",
        r"\boxed{4 to 9}", r"\boxed{4 9}", r"#### 8 and \boxed{4; 9}", r"\boxed{4\text{ h }9\text{ min}}",
    ],
)  # fmt: skip
def test_several_numbers_in_a_box_are_none_of_them(text):
    """Else a model learns to say them all."""
    assert final_number(text) not in (4, 8, 9, 13, 36, 49)


@pytest.mark.parametrize(
    "text", [r"\boxed{0.\overline{6}}", r"\boxed{0.\dot{6}}", "#### 9 - 6", "#### 6:30", "#### 2*6"]
)
def test_a_piece_of_an_expression_is_not_its_value(text):
    assert final_number(text) not in (2, 6, 9, 30)


@pytest.mark.parametrize(
    ("reference", "text", "right"),
    [
        (r"\frac{3}{8}", r"\boxed{0.375}", 1), ("2500", r"\boxed{2.5e3}", 1), ("[0,4)", r"\boxed{[0, 4)}", 1),
        ("[0,4)", r"\boxed{(0,4)}", 0), (r"3\frac{1}{4}", r"\boxed{13/4}", 1), ("-9", r"\boxed{- 9}", 1),
        ("7/3", r"\boxed{2 1/3}", 1), ("12,345", r"\boxed{12{,}345}", 1), ("40", r"\boxed{40\text{ m}^3}", 1),
        (r"15\%", r"\boxed{15}", 1), ("x^2-1", r"$$\boxed{(x-1)(x+1)}$$", 1), (r"\{3,4\}", r"\boxed{4, 3}", 1),
        (r"So $x=3$ and \boxed{3}", r"\boxed{3}", 1), ("(3,-2)", r"\boxed{(-2,3)}", 0), ("6", "It is six", 0),
        ("6", "", 0),
    ],
)  # fmt: skip
def test_equal_mathematics(reference, text, right):
    assert graded(reference, text) == right


def test_it_does_not_hang_and_goes_on_afterwards_in_threads():
    reader, found = AnswerReader(answer_s=5.0), []
    assert reader.ask("is_right", reference="3", text=r"\boxed{3}") is True
    reader.answer_s = 0.0
    assert reader.ask("is_right", reference="3", text=r"\boxed{9^{9^{9^{9}}}}") is None
    reader.answer_s = 60.0
    ask = lambda i: found.append(reader.ask("number", text=str(i)) == f"{i}/1")  # noqa: E731
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == [True] * 5
    begin = time.monotonic()
    assert graded("3", r"\boxed{7^{7^{7^{7^{7}}}}}") == 0
    assert time.monotonic() - begin < 120


@pytest.mark.parametrize("reference", ["", "?!"])
def test_a_reference_without_mathematics_is_refused(reference):
    with pytest.raises(ValueError, match="math"):
        graded(reference, "1")
