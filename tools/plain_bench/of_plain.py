"""A loop that somebody would write by hand with transformers: run by `bench_vs_plain.py` as `of_plain.py FOLDER`.

Sampling is `generate` over prompts padded on the left; the teacher's logits and the student's are those of the answers
alone; reverse KL over the whole vocabulary, micro-batches, clipping, AdamW.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from stages import Stages
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: str) -> None:
    """Prints the figures."""
    stages = Stages(folder)
    settings = stages.settings
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"], padding_side="left")
    student, teacher = (AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings["lr"])
    rows = [json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]
    size = settings["batch"]
    for number in range(settings["steps"] + settings["warmup"]):
        texts = [row["prompt"] for row in rows[number * size : (number + 1) * size]]
        prompts = _tokenized(tokenizer, texts)
        stages.prompt_tokens += int(prompts["attention_mask"].sum())
        times = _step(student.eval(), teacher.eval(), optimizer, prompts, settings)
        stages.add(**times)
    stages.tell()


def _tokenized(tokenizer: Any, texts: list[str]) -> Any:
    chats = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
    )


def _step(student: Any, teacher: Any, optimizer: Any, prompts: Any, settings: dict[str, Any]) -> dict[str, float]:
    """CPU seconds by stage."""
    length = settings["response"]
    started = time.process_time()
    with torch.no_grad():
        ids_BS = student.generate(
            **prompts, max_new_tokens=length, min_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
    mask_BS = torch.cat([prompts["attention_mask"], torch.ones(len(ids_BS), length, dtype=torch.int64)], dim=1)
    sampled = time.process_time()
    if settings["generate_only"]:
        return {"generate": sampled - started}
    parts = list(zip(ids_BS.split(settings["micro"]), mask_BS.split(settings["micro"]), strict=True))
    with torch.no_grad():
        targets = [torch.log_softmax(_logits(teacher, *part, length), dim=-1) for part in parts]
    scored = time.process_time()
    for part, target in zip(parts, targets, strict=True):
        logp = torch.log_softmax(_logits(student, *part, length), dim=-1)
        kl = (logp.exp() * (logp - target)).sum(-1)
        (kl.sum() / (len(ids_BS) * length)).backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"generate": sampled - started, "score": scored - sampled, "step": time.process_time() - scored}


def _logits(model: Any, ids_BS: torch.Tensor, mask_BS: torch.Tensor, length: int) -> torch.Tensor:
    """Logits [B, R, V] from which the answers' tokens are predicted."""
    return model(input_ids=ids_BS, attention_mask=mask_BS, logits_to_keep=length + 1, use_cache=False).logits[:, :-1]


if __name__ == "__main__":
    main(sys.argv[1])
