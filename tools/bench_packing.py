#!/usr/bin/env python3
"""What packing saves: the time of a teacher's scoring and of the student's step, padded and in rows, side by side.

One rank, a random student, a random teacher of the same size, and answers whose lengths are drawn from an exponential
distribution, cut at --longest. The two ways take turns in one process, so that both see the same machine; a ratio is
one way's time over the other's in the same round. Both do the same step, which is checked by their losses.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import tool
import torch

from megatron_opd import config as c
from megatron_opd.core.arguments import Parser
from megatron_opd.core.types import Prompt, Rollout
from megatron_opd.student import token_logps

_PROMPT = 16
"""Tokens of a prompt."""
_MODELS = ("student", "teacher")
WAYS = {"padded": False, "packed": True}


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, what in (
        ("hidden", 256, "hidden size of both models"),
        ("layers", 4, "layers of both models"),
        ("vocab", 2048, "size of the vocabulary"),
        ("answers", 32, "answers of a step"),
        ("micro-batch-size", 8, "answers of a micro-batch"),
        ("mean", 64, "mean length of the answers, before they are cut"),
        ("longest", 256, "longest answer"),
        ("rounds", 5, "timed steps of either way, after one that is not"),
    ):
        parser.add_argument(f"--{name}", type=tool.positive, default=default, help=f"{what} (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(_MODELS):
            _save_model(f"{folder}/{name}", arguments, seed)
        found = _measure(folder, arguments)
    for what in ("scoring", "step"):
        ratios = [one / other for one, other in zip(*(found[way][what] for way in WAYS), strict=True)]
        times = ", ".join(f"{way} {1000 * median(found[way][what]):,.0f} ms" for way in WAYS)
        print(f"{what}: {times}; padded / packed {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    print(", ".join(f"padding {way} {found[way]['padding']:.0%}" for way in WAYS))
    losses = [found[way]["loss"] for way in WAYS]
    if abs(losses[0] - losses[1]) > 1e-5 * abs(losses[0]):
        raise ValueError(f"the two ways do not have one loss: {losses}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"arguments": vars(arguments), **found}))
    return 0


def _save_model(folder: str, arguments: argparse.Namespace, seed: int) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    made = Qwen3Config(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden,
        head_dim=arguments.hidden // 4, num_hidden_layers=arguments.layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=_PROMPT + arguments.longest,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(made, dtype=torch.float32).save_pretrained(folder)


def _rollouts(arguments: argparse.Namespace) -> list[Rollout]:
    draw = random.Random(0)
    made = []
    for i in range(arguments.answers):
        size = min(int(draw.expovariate(1 / arguments.mean)) + 1, arguments.longest)
        prompt, response = (tuple(draw.randrange(arguments.vocab) for _ in range(n)) for n in (_PROMPT, size))
        made.append(
            Rollout(
                prompt=Prompt(source="a", index=i, text="", token_ids=prompt),
                sample=0,
                token_ids=response,
                learnt=(True,) * len(response),
                logps=(0.0,) * size,
                finish="stop",
                versions=(0,) * size,
            )
        )
    return made


def _measure(folder: str, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By way: seconds of each round, the share of padding, and the loss."""
    parallel = token_logps.start_megatron(c.ParallelConfig())
    from megatron_opd.core.batching import pack
    from megatron_opd.student import groups
    from megatron_opd.student.student import Student
    from megatron_opd.teachers import build_teachers
    from megatron_opd.trainer import step_metrics
    from megatron_opd.trainer.build_objective import build_objective
    from megatron_opd.trainer.experience import packing_settings

    base = c.Config(
        run=c.RunConfig(dir=folder),
        student=c.StudentConfig(model=f"{folder}/{_MODELS[0]}"),
        teachers=[c.TeacherConfig(name="teacher", model=f"{folder}/{_MODELS[1]}")],
        data=c.DataConfig(train=[]),
        optim=c.OptimConfig(lr=0.0),  # every round is the same step
        train=c.TrainConfig(steps=1 + arguments.rounds, micro_batch_size=arguments.micro_batch_size),
    )
    configs = {way: replace(base, train=replace(base.train, packing=is_on)) for way, is_on in WAYS.items()}
    student, rollouts = Student(base, parallel), _rollouts(arguments)
    vocab = student.vocab_shard(arguments.vocab)
    teachers = {way: build_teachers(config, parallel, vocab) for way, config in configs.items()}
    found: dict[str, dict[str, Any]] = {way: {"scoring": [], "step": []} for way in WAYS}
    for number in range(1 + arguments.rounds):
        for way, config in configs.items():
            started = time.perf_counter()
            told = [teachers[way][0].score(rollouts)]
            scored = time.perf_counter()
            how = packing_settings(config.train, config.precision.fp8, config.parallel, parallel)
            batches = pack(rollouts, **how, scores=told, weights=[[1.0]] * len(rollouts))
            metrics = student.step(batches, build_objective(config, vocab, teachers[way]))
            if number:
                found[way]["scoring"].append(scored - started)
                found[way]["step"].append(time.perf_counter() - scored)
            found[way] |= {"loss": metrics["loss"]}
            found[way] |= {"padding": step_metrics.of_batches(batches, parallel)["batch/padding"]}
    groups.stop()
    return found


if __name__ == "__main__":
    sys.exit(main())
