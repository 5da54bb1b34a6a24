"""The scripts in slurm/, really submitted, at the size of the quickstart: they end where a run on this machine ends."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from e2e.program import MODELS, PATIENCE_S, checkpoints, environment, exported, opd, rows
from servers.standin_model import VOCAB_SIZE

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1500)]
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
# The script's own teachers, in the trainer instead of on servers.
THREE_TEACHERS = [
    f"teachers.{i}.{setting}"
    for i, name in enumerate(("carry", "compare", "carry"))
    for setting in (f"model={MODELS / f'teacher_{name}'}", "backend=megatron", "carrier=hidden", "servers={}")
] + ["teachers.1.on_failure=fail", "teachers.2.on_failure=fail"]


def local(run_dir, config, *overrides):
    """The same run on this machine, without Slurm."""
    done = opd("train", config, *SMALL, *overrides, f"run.dir={run_dir}", timeout=3 * PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small run of slurm/opd_70b_to_8b.sh, uninterrupted and without Slurm."""
    config = "examples/cluster/opd_70b_to_8b.yaml"
    return local(tmp_path_factory.mktemp("local") / "run", config, *ONE_TEACHER)


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a script in small, a rank a node; its run is in <tmp_path>/run."""

    def start(script, *overrides, nodes=2, options=(), **env):
        where = [f"--nodes={nodes}", f"--output={tmp_path}/job.out", *options]
        given = [*SMALL, *overrides, f"run.dir={tmp_path}/run"] if script.startswith("opd_") else overrides
        return cluster.submit(ROOT / "slurm" / script, *given, options=where, OPD_RANKS_PER_NODE="1", **env)

    return start


def assert_same(run_dir, other):
    assert rows(run_dir) == rows(other)
    assert exported(run_dir) == exported(other)


def test_one_teacher(submit, tmp_path, whole):
    code, said = submit("opd_70b_to_8b.sh", *ONE_TEACHER).end()
    assert code == 0, said
    assert_same(tmp_path / "run", whole)
    (logs,) = (tmp_path / "run/logs").glob("job-*.0")
    assert {log.name for log in logs.iterdir()} == {"trainer.0-0.log", "trainer.0-1.log", "trainer.0.srun"}


def test_a_warning_requeues_and_the_job_goes_on(submit, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER)
    job.wait_for("step 3/", tmp_path / "run/train.log")
    job.signal("USR1")
    job.wait_for_requeue()
    step = int(checkpoints(tmp_path / "run")[-1].removeprefix("step_"))
    assert 3 <= step < 8
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, step + 1))  # none is done again
    code, said = job.end()
    assert code == 0, said
    assert "the run has saved and made room; requeueing" in said
    assert f"resuming after step {step}" in (tmp_path / "run/train.log").read_text()
    assert_same(tmp_path / "run", whole)


def test_a_killed_rank_restarts_within_the_job(submit, cluster, tmp_path, whole):
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER)
    job.wait_for("step 3/", tmp_path / "run/train.log")
    cluster.rank(1, job).kill()
    code, said = job.end()
    assert code == 0, said
    assert "starting the ranks again" in said
    assert job.shown()["Restarts"] == "0"
    assert_same(tmp_path / "run", whole)


def test_a_killed_node_requeues(submit, cluster, tmp_path, whole):
    # Without GPUs: Slurm 22.05 forgets those of a requeued job when one of its nodes goes down.
    job = submit("opd_70b_to_8b.sh", *ONE_TEACHER, options=["--gpus-per-node=0"], OPD_GPUS_PER_NODE="0")
    job.wait_for("step 3/", tmp_path / "run/train.log")
    cluster.kill_node("n2")
    try:
        job.wait_for_requeue()
        code, said = job.end()
        assert code == 0, said
        assert len(job.nodes()) == 2
        assert "n2" not in job.nodes()
        assert_same(tmp_path / "run", whole)
    finally:
        cluster.start_node("n2")


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


def test_benchmarks_over_more_and_more_nodes(submit, tmp_path):
    program = f"python {ROOT}/tests/slurm/sum_of_ranks.py"
    result = f"{tmp_path}/{{nodes}}-{{ranks}}.txt"
    job = submit("bench_multinode.sh", result, nodes=3, TOOL=program, OPD_LOGS=str(tmp_path / "logs"))
    code, said = job.end()
    assert code == 0, said
    found = {path.name: path.read_text() for path in tmp_path.glob("*-*.txt")}
    assert found == {"1-1.txt": "n1: 0", "2-2.txt": "n1 n2: 1", "3-3.txt": "n1 n2 n3: 3"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with the vocabulary of the stand-in server."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny.save(tiny.build("qwen3", vocab_size=VOCAB_SIZE, max_position_embeddings=64), directory)
    for file in MODELS.joinpath("student").iterdir():
        if "token" in file.name:
            shutil.copy(file, directory)
    return directory


def test_servers_on_nodes_of_their_own(submit, tmp_path, model):
    """Student and teacher behind servers; SGLang's place takes the stand-in, started by `megatron-opd serve`."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/slurm/standin_server.py "$@"\n')
    python.chmod(0o755)
    # Two nodes of this cluster are one host, so their servers must not ask for the same port.
    rollout, teacher = (f"servers: {{python: {python}, port: {port}}}" for port in (33000, 34000))
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
    command += ["examples/cluster/opd_70b_to_8b.yaml", *SMALL, *ONE_TEACHER, f"run.dir={tmp_path}/run"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(**cluster_of), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert os.access(tmp_path / "run/job.sh", os.R_OK)
    code, said = cluster.job(done.stdout.split()[-1]).end()
    assert code == 0, said
    assert_same(tmp_path / "run", whole)
