#!/usr/bin/env python3
"""Rebuild everything the example with tools uses: tokenizer, data, a teacher that calls a calculator, and a student."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # small_models, beside the folders of examples

import lessons
import pieces
import products
import torch
from lessons import Lesson, Recipe
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from small_models import write_model

ROWS = {"train": 400, "eval": 200}
# Both also learn to answer at once where they have no tool. It cannot be learnt at this size, and they guess.
WITHOUT_TOOL = Lesson(0.2, has_tool=False, calls=False)
RECIPES = {
    "teacher": Recipe([Lesson(0.8), WITHOUT_TOOL], steps=400, seed=1),
    # Reads what the tool says well enough, when somebody has called it; seldom calls it, and then mostly wrongly.
    "student": Recipe(
        [
            Lesson(0.3, calls=False),
            Lesson(0.2, slip=0.2, broken=0.6),
            Lesson(0.35, learns_call=False, slip=0.05),
            Lesson(0.15, has_tool=False, calls=False),
        ],
        steps=600,
        seed=2,
    ),
}

DESCRIPTION = """\
Rebuild everything the example with tools uses, on one CPU core, from seeds alone.

  <out>/data/*.jsonl     products of three-digit numbers; the pairs of train, eval and
                         the models' own pretraining never overlap
  <out>/models/*         Hugging Face Qwen3 directories, weights in bfloat16
      teacher            calls the calculator and copies what it says
      student            guesses; seldom calls, and then often wrongly
  <out>/skills.json      what was measured on the eval rows

Takes a minute on one core. The same machine and the same releases of the libraries
give the same bytes; others may round differently and so give weights that differ a
little, with the same skills (compare skills.json).

Every model is finished in a temporary directory and then moved into place, so a
reader never sees half of one. Files that are there already are replaced.
"""


def parse_args():
    """Command line."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="receives data/, models/ and skills.json")
    return parser.parse_args()


def write_data(directory):
    """Write the rows of train and eval; returns those of eval."""
    directory.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(ROWS.items()):
        lines = [json.dumps(row) for row in products.rows(seed, split, count)]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return [json.loads(line) for line in (directory / "eval.jsonl").read_text().splitlines()]


def measure(directory, rows):
    """Skills of a saved model as a run will see it: loaded from disk, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "greedy": lessons.skill(model, rows, tokenizer),
        "sampled": lessons.skill(model, rows, tokenizer, greedy=False),
        "greedy_without_tool": lessons.skill(model, rows, tokenizer, has_tool=False),
    }


def main():
    """Build data, tokenizer and models, and write down what they can do."""
    args = parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows = write_data(args.out / "data")
    with tempfile.TemporaryDirectory() as scratch:
        pieces.write_tokenizer(Path(scratch))
        pieces.check_tokenizer(scratch, [products.example(has_tool) for has_tool in (True, False)])
        tokenizer = AutoTokenizer.from_pretrained(scratch)
        for name, recipe in RECIPES.items():
            print(f"{name}: training", flush=True)
            started = time.perf_counter()
            model = lessons.train(recipe, tokenizer, log=lambda line: print(line, flush=True))
            write_model(model, Path(scratch), args.out / "models" / name)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    skills = {name: measure(args.out / "models" / name, rows) for name in RECIPES}
    (args.out / "skills.json").write_text(json.dumps(skills, indent=1) + "\n")
    print(json.dumps(skills, indent=1))


if __name__ == "__main__":
    main()
