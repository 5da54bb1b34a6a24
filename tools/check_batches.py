#!/usr/bin/env python3
"""Whether the embedded engine's answers depend on how many it decodes together, with a real model in float32.

Every batch size draws the same answers to the same prompts. Their tokens must be the same, and their log-probabilities
too but for the last bits: the bound is 1e-5 nats. The exit code is 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from itertools import chain

import tool
from rich.console import Console
from rich.table import Table

from megatron_opd.config import DataConfig
from megatron_opd.core.types import Prompt, Rollout, Sampling
from megatron_opd.models.architecture import read_limits
from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.prompts.chat import build_encoder
from megatron_opd.rollout import decoding
from megatron_opd.rollout.embedded_engine import LocalEngine

_BOUND = 1e-5
"""Nats."""
_EXAMPLES = """\
examples:
  python tools/check_batches.py models/SmolLM2-135M-Instruct
  python tools/check_batches.py models/SmolLM2-135M-Instruct --answers 200 --response 8 --batches 1 64
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The answers of a batch size beside those of the first one."""

    batch: int
    seconds: float
    """CPU seconds."""
    others: int
    """Answers with other tokens."""
    worst: float
    """Largest difference of log-probabilities of the same tokens, in nats."""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tool.add_model_and_prompts(parser)
    parser.add_argument("--answers", type=tool.positive, default=1000, metavar="N", help="in all (%(default)s)")
    parser.add_argument("--samples", type=tool.positive, default=5, metavar="N", help="of a prompt (%(default)s)")
    parser.add_argument("--response", type=tool.positive, default=32, metavar="TOKENS", help="at most (%(default)s)")
    parser.add_argument("--batches", type=tool.positive, nargs="+", default=[1, 16, 64], metavar="N", help="(1 16 64)")
    return tool.run(_run, parser.parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    tokenizer = load_tokenizer(arguments.model)
    vocab_size, _ = read_limits(arguments.model)
    engine = LocalEngine(arguments.model, eos_ids=tokenizer.eos_ids, vocab_size=vocab_size)
    encoder = build_encoder(DataConfig(train=[], chat_template="tokenizer"), tokenizer)
    rows = [json.loads(line)["prompt"] for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    wanted = rows[: -(-arguments.answers // arguments.samples)]
    ids = encoder.encode([encoder.render(text) for text in wanted])
    prompts = [Prompt(source="all", index=i, text=text, token_ids=tuple(ids[i])) for i, text in enumerate(wanted)]
    sampling = Sampling(max_new_tokens=arguments.response, samples_per_prompt=arguments.samples, temperature=1.0)
    found, first = list[Found](), list[Rollout]()
    for batch in arguments.batches:
        decoding.MAX_ROWS = batch
        started = time.process_time()
        answers = engine.generate(prompts, sampling)
        first = first or answers
        found.append(_compared(first, answers, batch, time.process_time() - started))
        print(f"batch {batch}: {found[-1].seconds:.0f} s", file=sys.stderr, flush=True)
    _show(found, len(first), arguments.response)
    return 0 if all(one.others == 0 and one.worst <= _BOUND for one in found) else 1


def _compared(first: list[Rollout], answers: list[Rollout], batch: int, seconds: float) -> Found:
    pairs = [(a, b) for a, b in zip(first, answers, strict=True) if a.token_ids == b.token_ids]
    logps = chain.from_iterable(zip(a.logps, b.logps, strict=True) for a, b in pairs)
    worst = max((abs(x - y) for x, y in logps), default=0.0)
    return Found(batch=batch, seconds=seconds, others=len(answers) - len(pairs), worst=worst)


def _show(found: list[Found], answers: int, response: int) -> None:
    title = f"{answers} answers of up to {response} tokens, float32, beside those of batch {found[0].batch}"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in ("decoded together", "CPU seconds", "answers with other tokens", "largest difference, nats"):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(str(one.batch), f"{one.seconds:.0f}", str(one.others), f"{one.worst:.1e}")
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(main())
