"""The lines of a run, on the console as in its log: phases in their order, numbers, an answer, the time to go."""

import re
from pathlib import Path

from program import SMALL, rows, train

EVALUATED = f"data.eval=[{{name: add, path: {Path(__file__).with_name('few.jsonl')}}}]"
IN_ORDER = [
    r"checking the settings of examples/quickstart\.yaml, its models and its data",
    r"starting 1 rank; this takes some seconds",
    r"importing torch and Megatron",
    r"reading the models' configs, tokenizers and prompts",
    r"loading the student examples/quickstart/models/student",
    r"loading teacher carry .*",
    r"loading teacher compare .*",
    r"starting who answers: rollout\.engine local",
    r"looking for a checkpoint to continue from",
    r"handing the weights to the engine",
    r"evaluating after step 0 \(\d+ answers\)",
    r"comparing the answers with the teachers' distributions",
    r"step 0/2  eval  add \d\.\d{3}  all \d\.\d{3}  kl [\d.]+",
    r"step 1: sampling \(8 answers\)",
    r"step 1: scoring by the teachers",
    r"step 1: updating the student \(4 micro-batches\)",
    r"answer to \w+, row \d+  reward [01]  \d+ tokens.*student -[\d.]+  carry -.* \(kl .*\)  compare -.* \(kl .*\)",
    r"  prompt: .+",
    r"  answer: .*",
    r"step 1/2  loss [\d.]+  grad [\d.]+  kl [\d.]+  reward \d\.\d{3}  length [\d.]+  tok/s \d+  eta \d+:\d\d",
    r"saving after step 1",
    r"saved .*step_00000001",
    r"step 2/2  loss .*  eta 0:00",
    r"evaluating after step 2 \(\d+ answers\)",
    r"saving after step 2",
    r"exporting the student as a Hugging Face directory",
    r"exported .*hf",
    r"done; .*",
]


def test_every_phase_has_a_line_with_its_time_in_order(tmp_path):
    """`train` imports the modules itself: lines before that come first also in a fork that has them."""
    steps = ["train.steps=2", "train.save_every=1", "train.eval_every=2"]
    done = train(tmp_path / "run", *steps, EVALUATED, launched=True)
    assert done.returncode == 0, done.stderr
    logged = (tmp_path / "run/train.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in logged)
    texts = [line[21:] for line in logged]
    places = [next((i for i, text in enumerate(texts) if re.fullmatch(line, text)), line) for line in IN_ORDER]
    assert places == sorted(places, key=lambda at: (isinstance(at, str), at)), "\n".join(texts)
    assert not [line for line in places if isinstance(line, str)], "\n".join(texts)
    assert not any("step 2: " in text for text in texts), "only a long phase of a later step has a line"
    console = [line[10:] for line in done.stderr.splitlines() if re.match(r"\d\d:\d\d:\d\d  ", line)]
    assert console == texts
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    (first, _) = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert 0 <= first["reward/mean"] <= 1
    assert any("rollout.prompts_per_step=4" in setting for setting in SMALL), "8 answers are 4 x 2"
