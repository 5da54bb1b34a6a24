"""Supervised training and measurement of the example's models (plain PyTorch and transformers)."""

import math
from dataclasses import dataclass

import numpy as np
import products
import torch
import torch.nn.functional as F
from pieces import CONTEXT, END, EXPRESSION_END, VOCAB_SIZE

from small_models import new_model

IGNORED = -100


@dataclass
class Lesson:
    """How a share of the conversations goes."""

    share: float
    has_tool: bool = True
    calls: bool = True
    """Whether the tool is called; otherwise the answer comes at once."""
    learns_call: bool = True
    """Whether the call is learnt; otherwise somebody else made it, and only the answer is."""
    slip: float = 0.0
    """How often a digit that is copied becomes a random one."""
    broken: float = 0.0
    """How often a call is not closed, and so is no JSON; such a conversation ends there."""


@dataclass
class Recipe:
    """Curriculum, size and schedule of one model."""

    lessons: list
    hidden: int = 32
    ffn: int = 64
    steps: int = 300
    batch: int = 128
    lr: float = 8e-3
    seed: int = 0


def _slipped(text, slip, rng):
    return "".join(str(rng.integers(10)) if c.isdigit() and rng.random() < slip else c for c in text)


def conversation(lesson, pair, rng):
    """(text, whether the model says it) of the parts of a conversation."""
    a, b = map(int, pair)
    question = f"{a}*{b}"
    if not lesson.calls:
        return [(products.prompt(question, lesson.has_tool), False), (f"{a * b}{END}", True)]
    left, right = (_slipped(str(x), lesson.slip, rng) for x in (a, b))
    call, answer = products.call(f"{left}*{right}"), str(int(left) * int(right))
    parts = [(products.prompt(question, lesson.has_tool), False)]
    if rng.random() < lesson.broken:
        return [*parts, (call.replace(EXPRESSION_END, "") + END, True)]
    between = products.told(answer)
    # The end of the turn is the model's, what follows it is not.
    parts.append((call + END, lesson.learns_call))
    return [*parts, (between[len(END) :], False), (_slipped(answer, lesson.slip, rng) + END, True)]


def batch(lessons, count, rng, tokenizer):
    """(ids, labels) [count, longest], padded at the right; labels are IGNORED where the model does not speak."""
    each = [round(count * lesson.share) for lesson in lessons]
    talks = [
        conversation(lesson, pair, rng)
        for lesson, number in zip(lessons, each, strict=True)
        for pair in products.sample(rng, number, "pretrain")
    ]
    flat = iter(tokenizer([text for talk in talks for text, _ in talk])["input_ids"])
    ids, labels = [], []
    for talk in talks:
        parts = [(next(flat), own) for _, own in talk]
        ids.append(torch.tensor([i for part, _ in parts for i in part]))
        labels.append(torch.tensor([i if own else IGNORED for part, own in parts for i in part]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, True, tokenizer.pad_token_id), pad(labels, True, IGNORED)


def train(recipe, tokenizer, log=print):
    """Train one model from scratch on its lessons; the loss covers what the model says, ends of turns included."""
    sizes = {"hidden": recipe.hidden, "ffn": recipe.ffn, "head_dim": 16, "context": CONTEXT}
    model = new_model(tokenizer, vocab_size=VOCAB_SIZE, **sizes, seed=recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.steps):
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / 20) * decay
        ids, labels = batch(recipe.lessons, recipe.batch, rng, tokenizer)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(f"  step {step + 1:4d}  loss {loss.item():.4f}")
    return model.eval()


@torch.no_grad()
def _turn(model, contexts, tokenizer, greedy, generator):
    """The model's words behind texts, until it ends its turn (24 tokens at most), special tokens left out."""
    found = tokenizer(contexts, return_tensors="pt", padding=True)
    ids, mask = found["input_ids"], found["attention_mask"]
    start = ids.shape[1]
    for _ in range(24):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1].float()
        chosen = logits.argmax(-1, True) if greedy else torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids, mask = torch.cat([ids, chosen], 1), F.pad(mask, (0, 1), value=1)
        if (ids[:, start:] == tokenizer.eos_token_id).any(1).all():
            break
    return [text.split(END)[0] for text in tokenizer.batch_decode(ids[:, start:])]


def skill(model, data, tokenizer, has_tool=True, greedy=True):
    """Shares of ``data`` (rows) that the model calls the tool for, calls it rightly for, and answers rightly."""
    generator = torch.Generator().manual_seed(0)
    contexts = [products.prompt(row["prompt"], has_tool) for row in data]
    said = _turn(model, contexts, tokenizer, greedy, generator)
    calls = [text == products.call(expression_of(text)) and has_tool for text in said]
    right = [text == products.call(row["prompt"]) for text, row in zip(said, data, strict=True)]
    again = [i for i, called in enumerate(calls) if called]
    follow = [contexts[i] + said[i] + products.told(_calculated(expression_of(said[i]))) for i in again]
    answers = _turn(model, follow, tokenizer, greedy, generator) if again else []
    for i, answer in zip(again, answers, strict=True):
        said[i] = answer
    solved = [text == row["answer"] for text, row in zip(said, data, strict=True)]
    return {"calls": sum(calls) / len(data), "right_calls": sum(right) / len(data), "right": sum(solved) / len(data)}


def expression_of(text):
    """The digits and stars that a call is about; an empty text where it is none."""
    return "".join(c for c in text if c in "0123456789*")


def _calculated(expression):
    left, _, right = expression.partition("*")
    return str(int(left) * int(right)) if left and right.isdigit() else "error"
