"""Supervised training and measurement of the quickstart's models (plain PyTorch and transformers)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import task
from small_models import new_model
from vocab import VOCAB_SIZE

CONTEXT = 64

RANDOM = "random"  # a Lesson.forget that asks for random digits in place of answers


@dataclass
class Lesson:
    """A share of every training batch: which tasks, behind which style, with which answers."""

    share: float
    tasks: list
    style: str = task.STYLE
    forget: float | str = 0.0


@dataclass
class Recipe:
    """Size, curriculum and schedule of one model."""

    hidden: int
    ffn: int
    lessons: list
    steps: int
    batch: int = 128
    lr: float = 6e-3
    seed: int = 0


def _encode(texts, tokenizer):
    """Texts of equal length as a tensor of ids, by table (a tokenizer call per text would dominate training)."""
    table = np.zeros(128, int)
    for character in "".join(sorted(set("".join(texts)))):
        table[ord(character)] = tokenizer.convert_tokens_to_ids(character)
    return torch.from_numpy(table[np.array([list(text.encode()) for text in texts])])


def lesson_batch(lesson, count, rng, tokenizer):
    """Token ids ``[count, prompt + answer + eos]`` of one lesson."""
    problem = task.sample_problems(rng, count, "pretrain", lesson.tasks)
    if lesson.forget == RANDOM:
        answer = rng.integers(0, 10, (count, task.ANSWER_DIGITS))
    else:
        answer = task.solve(*problem, lesson.forget, rng)
    prompts = task.prompt_texts(*problem, style=lesson.style)
    ids = _encode([p + a for p, a in zip(prompts, task.answer_texts(answer), strict=True)], tokenizer)
    return F.pad(ids, (0, 1), value=tokenizer.eos_token_id)


def train(recipe, tokenizer, log=print):
    """Train one model from scratch on its lessons; the loss covers answers only, end of sequence included."""
    sizes = {"hidden": recipe.hidden, "ffn": recipe.ffn, "head_dim": recipe.hidden // 4, "context": CONTEXT}
    model = new_model(tokenizer, vocab_size=VOCAB_SIZE, **sizes, seed=recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(recipe.steps):
        decay = 0.02 + 0.49 * (1 + math.cos(math.pi * step / recipe.steps))
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / 20) * decay
        batches = [lesson_batch(x, round(recipe.batch * x.share), rng, tokenizer) for x in recipe.lessons]
        ids = torch.cat(batches)
        logits = model(ids[:, :-1], use_cache=False).logits[:, task.PROMPT_LENGTH - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, task.PROMPT_LENGTH :].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            log(f"  step {step + 1:4d}  loss {loss.item():.4f}")
    return model.eval()


@torch.no_grad()
def respond(model, prompts, tokenizer, greedy=True, seed=0):
    """Response texts to prompts of equal length, without special tokens; sampled at temperature 1 or greedy."""
    generator = torch.Generator().manual_seed(seed)
    context, cache, tokens = _encode(prompts, tokenizer), None, []
    for _ in range(task.ANSWER_DIGITS + 1):
        output = model(context, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        if greedy:
            context = logits.argmax(-1, keepdim=True)
        else:
            context = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens.append(context)
    responses = torch.cat(tokens, 1).tolist()
    return [tokenizer.decode(_until_eos(row, tokenizer), skip_special_tokens=True) for row in responses]


def _until_eos(row, tokenizer):
    """The ids before the end of sequence; a response that never ends keeps all, and so equals no answer."""
    return row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row


def skills(model, data, tokenizer, greedy=True, style=task.STYLE):
    """Share of exactly right responses per task; ``data`` maps task names to rows."""
    scores = {}
    for name, rows in data.items():
        prompts = [row["prompt"][:-1] + style for row in rows]
        responses = respond(model, prompts, tokenizer, greedy)
        scores[name] = sum(r == row["answer"] for r, row in zip(responses, rows, strict=True)) / len(rows)
    return scores
