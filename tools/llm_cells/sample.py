"""The teacher's samples: run by `llm_results.py` as `sample.py FOLDER`, a process of its own.

It answers prompts of data.train at temperature 1. A prompt is kept where the answer is as long as it may be, and where
the trainer reads the very tokens back from its text: so all methods learn from nearly equally many tokens, and those
that learn from samples learn from what was sampled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.config.file import load
from megatron_opd.core.types import Rollout, Sampling
from megatron_opd.core.whole_file import write_whole
from megatron_opd.models.tokenizer import load_tokenizer
from megatron_opd.prompts.files import read_rows
from megatron_opd.rollout.embedded_engine import LocalEngine
from megatron_opd.trainer.preflight import Inputs, read_inputs

_SEED = 7


def main(folder: str) -> None:
    """Writes a file for each source, and prints how many prompts were asked and kept, on one line."""
    asked = json.loads((Path(folder) / "sample.json").read_text())
    config = load(asked["config"], asked["overrides"])
    inputs = read_inputs(config)
    answers = _sampled(config, inputs)
    rows = _rows(config, answers)
    paths = [Path(folder) / f"{source.name}.jsonl" for source in config.data.train]
    for path, its in zip(paths, rows, strict=True):
        _write(path, its)
    read_back = [f"data.train.{i}.{what}" for i, path in enumerate(paths) for what in (f"path={path}", "rows=0")]
    seen = read_inputs(load(asked["config"], [*asked["overrides"], *read_back, "answers.lmbda=0"])).train
    kept = {}
    for path, its, said, (source, prompts) in zip(paths, rows, answers, seen, strict=True):
        same = [row for row, answer, prompt in zip(its, said, prompts, strict=True) if _is(answer, prompt.answer_ids)]
        _write(path, same)
        kept[source.name] = len(same)
    print(json.dumps({"asked": sum(len(prompts) for _, prompts in inputs.train), "kept": kept}), flush=True)


def _sampled(config: Config, inputs: Inputs) -> list[list[Rollout]]:
    """By source, the teacher's answers that do not end."""
    engine = LocalEngine(config.teachers[0].model, eos_ids=inputs.eos_ids, vocab_size=inputs.vocab_size)
    how = Sampling(max_new_tokens=config.rollout.max_new_tokens, temperature=1.0, seed=_SEED)
    every = [engine.generate(list(prompts), how) for _, prompts in inputs.train]
    return [[answer for answer in answers if answer.finish == "length"] for answers in every]


def _rows(config: Config, answers: list[list[Rollout]]) -> list[list[dict[str, str]]]:
    """By source, the prompts of these answers with the answers' texts."""
    tokenizer = load_tokenizer(config.student.model)
    found = []
    for source, its in zip(config.data.train, answers, strict=True):
        prompts = {row.index: row.fields[source.prompt_field] for row in read_rows(source)}
        found.append([{"prompt": prompts[a.prompt.index], "answer": tokenizer.decode(a.token_ids)} for a in its])
    return found


def _is(answer: Rollout, ids: tuple[int, ...]) -> bool:
    return answer.token_ids == ids


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    write_whole(path, "".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1])
