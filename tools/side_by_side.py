#!/usr/bin/env python3
"""Answers of the teachers, the student before and the student after a run, to the same held-out prompts side by side.

Prompts are the first ones of the sources of data.eval, in turn; answers are greedy, by the engine within the trainer,
one model in memory at a time. They are printed, and written to <run.dir>/answers.md.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain, islice, zip_longest
from pathlib import Path

import tool
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_opd.config import Config
from megatron_opd.config.file import load
from megatron_opd.core.arguments import Parser, add_config
from megatron_opd.core.run_dir import HF_EXPORT
from megatron_opd.core.types import Prompt, Sampling
from megatron_opd.models import hub
from megatron_opd.models.tokenizer import load_tokenizer

_EXAMPLES = """\
examples:
  python tools/side_by_side.py examples/llm/quickstart.yaml
  python tools/side_by_side.py run.yaml run.dir=runs/mine --prompts 5 --tokens 200
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = Parser(
        description=(__doc__ or "").strip(), epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config(parser)
    parser.add_argument("--prompts", type=tool.positive, default=3, metavar="N", help="how many (default: 3)")
    parser.add_argument("--tokens", type=tool.positive, metavar="N", help="longest answer (rollout.max_new_tokens)")
    return tool.run(_show, parser.parse_args(argv))


def _show(arguments: argparse.Namespace) -> int:
    from megatron_opd.trainer.preflight import read_inputs

    config = load(arguments.config, arguments.overrides)
    config = config.with_models(hub.directories(dict.fromkeys(config.model_settings, "weights"), config.model_settings))
    models = models_of(config)
    inputs = read_inputs(config)
    prompts = in_turn([list(islice(source, arguments.prompts)) for _, source in inputs.eval], arguments.prompts)
    if not prompts:
        raise ValueError("data.eval is empty: add a source of prompts")
    how = Sampling(max_new_tokens=arguments.tokens or config.rollout.max_new_tokens, temperature=0.0)
    ids = {"eos_ids": inputs.eos_ids, "vocab_size": inputs.vocab_size}
    answers = {name: answers_of(model, prompts, how, **ids) for name, model in models.items()}
    console = Console()
    for i, prompt in enumerate(prompts):
        console.print(_table(prompt, {name: said[i] for name, said in answers.items()}))
    out = Path(config.run.dir) / "answers.md"
    out.write_text(as_markdown(prompts, answers), encoding="utf-8")
    print(f"answers: {out}")
    return 0


def models_of(config: Config) -> dict[str, str]:
    """The models by what they are called here. Raises ValueError where the run has not ended."""
    after = Path(config.run.dir) / HF_EXPORT
    if not after.is_dir():
        raise ValueError(f"there is no student in {after}: the run has not ended, or train.export is off")
    teachers = {teacher.name: teacher.model for teacher in config.teachers}
    return {**teachers, "student before": config.student.model, "student after": str(after)}


def in_turn(sources: list[list[Prompt]], count: int) -> list[Prompt]:
    """The first of each source, then the second of each, until there are `count`."""
    return [prompt for prompt in chain(*zip_longest(*sources)) if prompt is not None][:count]


def answers_of(
    model: str, prompts: list[Prompt], how: Sampling, *, eos_ids: tuple[int, ...], vocab_size: int
) -> list[str]:
    """A model's answer to each prompt."""
    from megatron_opd.rollout.embedded_engine import LocalEngine

    tokenizer = load_tokenizer(model)
    said = LocalEngine(model, eos_ids=eos_ids, vocab_size=vocab_size).generate(prompts, how)
    return [tokenizer.decode(rollout.token_ids) + (" …" if rollout.finish == "length" else "") for rollout in said]


def as_markdown(prompts: list[Prompt], answers: dict[str, list[str]]) -> str:
    """All of it, a heading for each prompt."""
    parts = ["# Answers side by side"]
    for i, prompt in enumerate(prompts):
        parts += [f"## {prompt.source}, row {prompt.index + 1}", _quoted(prompt.text)]
        parts += chain.from_iterable((f"**{name}**", _quoted(said[i])) for name, said in answers.items())
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines() or [""])


def _table(prompt: Prompt, answers: dict[str, str]) -> Table:
    table = Table(title=Text(prompt.text), title_justify="left", title_style="bold")
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, answers.values()))
    return table


if __name__ == "__main__":
    sys.exit(main())
