#!/usr/bin/env python3
"""Rebuild everything the quickstart uses: tokenizer, data, two expert teachers and one sloppy student."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # small_models, beside the folders of examples

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import pretrain
import task
import vocab
from pretrain import RANDOM, Lesson, Recipe
from small_models import write_model

TRAIN_ROWS, EVAL_ROWS = 400, 100
ALL, CARRY, COMPARE = list(task.OPERATORS), ["add", "subtract"], ["max", "min"]

# The expert of + and - needs the most steps: carries are learnt late and all at once.
RECIPES = {
    "teacher_carry": Recipe(96, 256, [Lesson(0.8, CARRY), Lesson(0.2, COMPARE, forget=RANDOM)], 1000, seed=1),
    "teacher_compare": Recipe(96, 256, [Lesson(0.8, COMPARE), Lesson(0.2, CARRY, forget=RANDOM)], 400, seed=2),
    "student": Recipe(
        64,
        192,
        # The skill behind one style, a careless habit behind the other: like a base model that can and does not.
        [Lesson(0.5, ALL, task.SKILLED_STYLE), Lesson(0.5, ALL, forget=0.9)],
        1000,
        seed=3,
    ),
}

DESCRIPTION = """\
Rebuild everything the quickstart uses, on one CPU core, from seeds alone.

  <out>/data/*.jsonl       problems of four tasks: operand pairs of train, eval and
                           pretraining never overlap
  <out>/models/*           Hugging Face Qwen3 directories, weights in bfloat16, each
                           with tokenizer.model (SentencePiece) and tokenizer.json
      teacher_carry        expert of + and -; guesses at random on > and <
      teacher_compare      expert of > (maximum) and < (minimum); guesses on + and -
      student              smaller; careless behind '=', right behind ':'
  <out>/skills.json        what was measured on the eval rows

Takes about two minutes on one core. The same machine and the same releases of the
libraries give the same bytes; others may round differently and so give weights that
differ a little, with the same skills (compare skills.json).

Every model is finished in a temporary directory and then moved into place, so a
reader never sees half of one. Files that are there already are replaced.
"""


def parse_args():
    """Command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="receives data/, models/ and skills.json")
    return parser.parse_args()


def write_data(directory):
    """Write the train and eval rows of every task; returns the eval rows by task."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(task.OPERATORS):
        for split, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
            lines = [json.dumps(row) for row in task.rows(seed, name, split, count)]
            (directory / f"{name}.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return {name: read_rows(directory / f"{name}.eval.jsonl") for name in task.OPERATORS}


def read_rows(path):
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_tokenizer(directory, texts):
    """Make the tokenizer files in ``directory`` and check them on ``texts``."""
    vocab.train_sentencepiece(directory / "tokenizer.model")
    vocab.write_hf_tokenizer(directory / "tokenizer.model", directory)
    vocab.check_tokenizer(directory, texts)


def measure(directory, eval_rows):
    """Skills of a saved model as a run will see it: loaded from disk, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "greedy": pretrain.skills(model, eval_rows, tokenizer),
        "sampled": pretrain.skills(model, eval_rows, tokenizer, greedy=False),
        "greedy_skilled_style": pretrain.skills(model, eval_rows, tokenizer, style=task.SKILLED_STYLE),
    }


def main():
    """Build data, tokenizer and models, and write down what they can do."""
    args = parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    eval_rows = write_data(args.out / "data")
    texts = [row[key] for rows in eval_rows.values() for row in rows for key in row]
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch), texts)
        tokenizer = AutoTokenizer.from_pretrained(scratch)
        for name in RECIPES:
            print(f"{name}: training", flush=True)
            started = time.perf_counter()
            model = pretrain.train(RECIPES[name], tokenizer, log=lambda line: print(line, flush=True))
            write_model(model, Path(scratch), args.out / "models" / name, max_new_tokens=task.ANSWER_DIGITS + 1)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    skills = {name: measure(args.out / "models" / name, eval_rows) for name in RECIPES}
    (args.out / "skills.json").write_text(json.dumps(skills, indent=1) + "\n")
    print(json.dumps(skills, indent=1))


if __name__ == "__main__":
    main()
