"""The runs of the scripts at the size of the quickstart, and the same on this machine without Slurm."""

from pathlib import Path

from program import MODELS, PATIENCE_S, exported, opd, rows

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "examples/quickstart/data"
SOURCES = "[{name: math, path: %(data)s/add.train.jsonl}, {name: code, path: %(data)s/max.train.jsonl},"
SOURCES += " {name: chat, path: %(data)s/subtract.train.jsonl}]"
SMALL = [
    *("parallel.tensor=2", "parallel.data=1", f"student={{model: {MODELS / 'student'}}}"),
    *("rollout={prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 8}", "data.chat_template=none"),
    *(f"data.train={SOURCES % {'data': DATA}}", "data.eval=[]", "optim={lr: 1.0e-3}", "run.timeout_s=300"),
    *("train={steps: 8, micro_batch_size: 2, save_every: 2}", "run.max_restarts=1"),
]
ONE_TEACHER = [f"teachers=[{{name: carry, model: {MODELS / 'teacher_carry'}}}]"]
CONFIG = "examples/cluster/opd_70b_to_8b.yaml"


def local(run_dir, config, *overrides):
    """The same run on this machine, without Slurm."""
    done = opd("train", config, *SMALL, *overrides, f"run.dir={run_dir}", timeout=3 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return run_dir


def assert_same(run_dir, other):
    assert rows(run_dir) == rows(other)
    assert exported(run_dir) == exported(other)
