"""Supervised training and measurement of the quickstart's models (plain PyTorch and transformers)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

import task
from vocab import VOCAB_SIZE

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


def new_model(recipe, tokenizer):
    """A small Qwen3 with weights scaled by fan-in: the usual 0.02 learns far slower at this size."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.ffn,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=recipe.hidden // 4,
        max_position_embeddings=64,
        # A small base: with positions 0..18, 10,000 would leave most frequencies unused.
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        use_cache=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(config)
    residual = (2 * config.num_hidden_layers) ** -0.5
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = weight.shape[1] ** -0.5 * (residual if into_residual else 1.0)
            torch.nn.init.normal_(weight, 0.0, 0.5 if "embed_tokens" in name else std)
    return model


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
    model, rng = new_model(recipe, tokenizer), np.random.default_rng(recipe.seed)
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
