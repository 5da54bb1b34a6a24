"""TRL's DistillationTrainer on the same folder: run by `bench_vs_trl.py` in TRL's environment as `of_trl.py FOLDER`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import transformers.models.qwen3.modeling_qwen3  # noqa: F401  what is imported counts before
from datasets import Dataset
from figures import Figures
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class Timed(DistillationTrainer):
    """Adds the seconds of sampling to what it does."""

    generate_s = 0.0

    def _generate_single_turn(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        answers = super()._generate_single_turn(*args, **kwargs)
        self.generate_s = time.perf_counter() - started
        lengths = {len(ids) for ids in answers}
        assert lengths == {self.args.max_completion_length}, lengths
        return answers


class Steps(TrainerCallback):
    """Tells the figures of every step."""

    def __init__(self, figures: Figures) -> None:
        self.figures, self.trainer = figures, None

    def on_train_begin(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        self.figures.begin()

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if logs and "loss" in logs:
            self.figures.step(float(logs["loss"]), self.trainer.generate_s)


def main(folder: str) -> None:
    """Prints the figures."""
    torch.set_num_threads(1)
    figures = Figures(folder)
    settings, here = figures.settings, Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(here / "student", padding_side="left")
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(here / name, dtype=torch.float32) for name in ("student", "teacher")
    )
    steps = Steps(figures)
    trainer = Timed(
        model=student,
        teacher_model=teacher,
        processing_class=tokenizer,
        train_dataset=Dataset.from_json(str(here / "prompts.jsonl"), cache_dir=str(here / "cache")),
        callbacks=[steps],
        args=DistillationConfig(
            output_dir=str(here / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=1.0,
            max_steps=settings["steps"] + settings["warmup"], per_device_train_batch_size=settings["batch"],
            gradient_accumulation_steps=1, max_completion_length=settings["response"], temperature=1.0,
            generation_kwargs={"min_new_tokens": settings["response"]}, learning_rate=settings["lr"],
            lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        ),
    )  # fmt: skip
    steps.trainer = trainer
    trainer.train()
    figures.tell()


if __name__ == "__main__":
    main(sys.argv[1])
