"""The planner's host memory of a rank against what a run's rank has: within a quarter, where activations take half."""

import json

import program
import pytest

from megatron_opd.config.file import load
from megatron_opd.planner import host
from megatron_opd.planner.job import build

CONFIG = "examples/quickstart.yaml"
LARGE_STEPS = [
    "parallel.tensor=1",
    "parallel.pipeline=1",
    "rollout.prompts_per_step=512",
    "train.micro_batch_size=1024",
    "data.max_prompt_tokens=13",  # as long as the prompts are
    "data.eval=[]",
    "train.steps=3",
    "train.eval_every=0",
    "train.save_every=0",
    "optim.warmup_steps=0",
]


@pytest.mark.slow
def test_a_rank_has_the_host_memory_that_was_planned(tmp_path):
    done = program.opd("train", CONFIG, f"run.dir={tmp_path}/run", *LARGE_STEPS)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    measured = 1e9 * max(json.loads(line)["memory/rss"] for line in lines)
    planned = host.machine(build(load(CONFIG, LARGE_STEPS)), on_gpu=False).rank
    assert planned.parts["activations"] > 0.3 * planned.total
    assert measured == pytest.approx(planned.total, rel=0.25)
