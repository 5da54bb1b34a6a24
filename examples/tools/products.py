"""The task of the example with tools: products of two three-digit numbers, and how one answers them with a calculator.

    <|im_start|>system
    tools: calculator<|im_end|>
    <|im_start|>user
    123*456<|im_end|>
    <|im_start|>assistant
    <tool_call>
    {"name": "calculator", "arguments": {"expression": "123*456"}}
    </tool_call><|im_end|>
    <|im_start|>tool
    56088<|im_end|>
    <|im_start|>assistant
    56088<|im_end|>

Without a tool there is no system message, and the answer is the product at once, which a tiny model does not know.
"""

import numpy as np
from pieces import CALL, CALL_END, END, EXPRESSION, EXPRESSION_END, START

from small_models import in_split

TOOLS = [{"type": "function", "function": {"name": "calculator"}}]
SYSTEM = f"{START}system\ntools: calculator{END}\n"
REPLY = f"{END}\n{START}assistant\n"


def sample(rng, count, split):
    """Pairs ``[count, 2]`` of numbers from 100 to 999 that the hash assigns to ``split``."""
    pairs = rng.integers(100, 1000, (count, 2))
    while (wrong := ~in_split(*pairs.T, split)).any():
        pairs[wrong] = rng.integers(100, 1000, (wrong.sum(), 2))
    return pairs


def rows(seed, split, count):
    """``count`` distinct rows ``{"prompt", "answer"}`` of a split."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        found.update((f"{a}*{b}", str(a * b)) for a, b in sample(rng, count, split).tolist())
    return [{"prompt": prompt, "answer": answer} for prompt, answer in list(found.items())[:count]]


def prompt(question, has_tool):
    """The text that a model gets, as the chat template writes it."""
    return f"{SYSTEM if has_tool else ''}{START}user\n{question}{REPLY}"


def call(expression):
    """A turn that calls the calculator, without its end."""
    return f"{CALL}\n{EXPRESSION}{expression}{EXPRESSION_END}\n{CALL_END}"


def told(answer):
    """The text behind a call: its end of turn, the tool's message, and the place of the next turn."""
    return f"{END}\n{START}tool\n{answer}{REPLY}"


def example(has_tool=True):
    """(messages, tools, text) of a whole conversation, to compare the chat template with."""
    question, answer = "123*456", "56088"
    arguments = {"expression": question}
    messages = [{"role": "user", "content": question}]
    text = prompt(question, has_tool)
    if has_tool:
        function = {"name": "calculator", "arguments": arguments}
        messages.append(
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        )
        messages.append({"role": "tool", "name": "calculator", "content": answer})
        text += call(question) + told(answer)
    messages.append({"role": "assistant", "content": answer})
    return messages, TOOLS if has_tool else None, f"{text}{answer}{END}\n"
