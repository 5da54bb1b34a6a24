"""The scripts in slurm/, really submitted, at the size of the quickstart: they end where a run on this machine ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from program import MODELS, PATIENCE_S, environment, rows
from slurm.small import CONFIG, ONE_TEACHER, ROOT, SMALL, assert_same, local
from standin_model import VOCAB_SIZE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
# The script's own teachers, in the trainer instead of on servers.
THREE_TEACHERS = [
    f"teachers.{i}.{setting}"
    for i, name in enumerate(("carry", "compare", "carry"))
    for setting in (f"model={MODELS / f'teacher_{name}'}", "backend=megatron", "carrier=hidden", "servers={}")
] + ["teachers.1.on_failure=fail", "teachers.2.on_failure=fail"]


def test_one_teacher(submit, tmp_path, whole):
    code, said = submit("opd_70b_to_8b.sh", *ONE_TEACHER).end()
    assert code == 0, said
    assert_same(tmp_path / "run", whole)
    (logs,) = (tmp_path / "run/logs").glob("job-*.0")
    assert {log.name for log in logs.iterdir()} == {"trainer.0-0.log", "trainer.0-1.log", "trainer.0.srun"}


def test_three_teachers(submit, tmp_path):
    code, said = submit("opd_multi_teacher.sh", *THREE_TEACHERS).end()
    assert code == 0, said
    config = "examples/cluster/opd_multi_teacher.yaml"
    assert_same(tmp_path / "run", local(tmp_path / "local", config, *THREE_TEACHERS))
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert all(row[f"kl/{name}"] > 0 for row in trained for name in ("general", "ensemble"))


def test_the_exit_code_is_the_trainers(submit, tmp_path):
    code, said = submit("opd_70b_to_8b.sh", *ONE_TEACHER, "student.model=no/such", "run.max_restarts=0").end()
    assert code == 1, said
    assert "the job ends with exit code 1" in said


def test_settings_that_do_not_fit_the_job(submit, tmp_path):
    code, said = submit("opd_70b_to_8b.sh", *ONE_TEACHER, "parallel.tensor=1", "parallel.sequence=false").end()
    assert code == 1, said
    assert "error: this run takes 1 node(s) of 1 GPUs, not 2; ask for fewer" in said


def test_a_program_over_more_and_more_nodes(submit, tmp_path):
    program = f"python {ROOT}/tests/slurm/sum_of_ranks.py"
    result = f"{tmp_path}/{{nodes}}-{{ranks}}.txt"
    job = submit("bench_multinode.sh", result, nodes=3, TOOL=program, OPD_LOGS=str(tmp_path / "logs"))
    code, said = job.end()
    assert code == 0, said
    found = {path.name: path.read_text() for path in tmp_path.glob("*-*.txt")}
    assert found == {"1-1.txt": "n1: 0", "2-2.txt": "n1 n2: 1", "3-3.txt": "n1 n2 n3: 3"}


def test_the_step_benchmark_over_two_and_four_nodes(submit, tmp_path):
    """The script's own program, tools/bench_step.py; its results go into one file."""
    found = tmp_path / "found.json"
    config = ["examples/quickstart.yaml", "parallel.pipeline=1", "parallel.tensor=1", "parallel.data={ranks}"]
    small = ["rollout={prompts_per_step: 8, samples_per_prompt: 1, max_new_tokens: 8}", "train.micro_batch_size=2"]
    how = ["--warmup", "1", "--steps", "1", "--repeats", "2", "--json", found]
    job = submit("bench_multinode.sh", *config, *small, *how, nodes=4, OPD_LOGS=str(tmp_path / "logs"))
    code, said = job.end()
    assert code == 0, said + "".join(log.read_text() for log in (tmp_path / "logs").iterdir())
    cases = json.loads(found.read_text())["cases"]
    assert [(case["ranks"], len(case["tokens_per_s"])) for case in cases] == [(1, 2), (2, 2), (4, 2)]
    assert all(rate > 0 for case in cases for rate in case["tokens_per_s"])
    sent = [sum(case["bytes"].values()) for case in cases]
    assert sent[0] < sent[1] < sent[2]  # gradients of more replicas
    for case in cases:
        table = (tmp_path / f"logs/bench-{case['ranks']}-0.log").read_text()
        assert "medians of the repeats" in table
        assert case["name"] in table


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with the vocabulary of the stand-in server."""
    return tiny.save_with_tokenizer(MODELS / "student", tmp_path_factory.mktemp("models"), vocab_size=VOCAB_SIZE)


def test_servers_on_nodes_of_their_own(submit, tmp_path, model):
    """Student and teacher behind servers; SGLang's place takes the stand-in, started by `megatron-opd serve`."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/standin_server.py "$@"\n')
    python.chmod(0o755)
    # Two nodes of this cluster are one host, so their servers must not ask for the same port.
    rollout, teacher = (f"servers: {{python: {python}, port: {port}}}" for port in (31000, 32000))
    job = submit(
        "opd_70b_to_8b.sh",
        f"student={{model: {model}}}",
        f"teachers=[{{name: big, model: {model}, backend: sglang, carrier: topk, top_k: 8, {teacher}}}]",
        f"rollout={{engine: sglang, sync: disk, prompts_per_step: 4, max_new_tokens: 8, {rollout}}}",
        *("train={steps: 3, micro_batch_size: 2}", "parallel={}", "data.max_prompt_tokens=40"),
        nodes=3,
    )
    code, said = job.end()
    assert code == 0, said
    trained = [row for row in rows(tmp_path / "run") if "loss" in row]
    assert [row["rollout/requests"] for row in trained] == [4, 4, 4]
    assert all(row["teacher/big/requests"] == 4 for row in trained)
    assert "all 2 server(s) are ready" in said
    assert not list((tmp_path / "run/servers").iterdir())  # they have ended, and said so
    logs = {log.name for log in (tmp_path / "run/logs").glob("job-*.0/*.log")}
    assert logs == {"trainer.0-0.log", "rollout-0.0-0.log", "teacher-big-0.0-0.log"}


def test_launch_submits_what_it_renders(cluster, tmp_path, whole):
    cluster_of = {name: value for name, value in cluster.environment.items() if name.startswith("SLURM")}
    setup = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={ROOT}"
    command = [sys.executable, "-m", "megatron_opd", "launch", "--slurm", "--gpus-per-node", "2", "--setup", setup]
    command += [f"--sbatch=--output={tmp_path}/job.out", "--sbatch=--time=20"]
    command += [CONFIG, *SMALL, *ONE_TEACHER, f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**cluster_of), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert os.access(tmp_path / "run/job.sh", os.R_OK)
    code, said = cluster.job(done.stdout.split()[-1]).end()
    assert code == 0, said
    assert_same(tmp_path / "run", whole)
