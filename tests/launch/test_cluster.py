"""Which process goes to which node and GPU, and the text of the Slurm job; submitting it is tests/slurm's."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_opd.__main__ import main
from megatron_opd.config.file import load
from megatron_opd.launch.local import plan
from megatron_opd.launch.slurm import script, submit
from megatron_opd.launch.slurm.layout import idle_gpus, num_nodes, place

ROOT = Path(__file__).resolve().parents[2]
IN_PROCESS = "examples/cluster/opd_70b_to_8b.yaml"
MULTI = "examples/cluster/opd_multi_teacher.yaml"
SERVED = ["teachers.0.backend=sglang", "teachers.0.carrier=topk", "teachers.0.offload=false",
          "teachers.0.servers={tensor: 8, count: 1, port: 31000}"]  # fmt: skip
QUICKSTART = "examples/quickstart.yaml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MEGATRON_OPD_API_KEY", "secret")


def placed(path, *overrides, **how):
    """(config, steps) of a config on nodes of 8 GPUs."""
    config = load(path, overrides)
    given = [path, *overrides]
    return config, place(plan(config, given), given, **{"gpus_per_node": 8, **how})


@pytest.mark.parametrize(
    ("given", "nodes"), [([IN_PROCESS], 3), ([IN_PROCESS, *SERVED], 4), ([MULTI], 4)], ids=["in-process", "served", "3"]
)
def test_the_jobs_of_the_scripts(given, nodes):
    config, steps = placed(*given, nodes=nodes)
    gpus = [(node, gpu) for step in steps for node in step.nodes for gpu in step.gpus]
    assert sorted(gpus) == [(node, gpu) for node in range(nodes) for gpu in range(8)]  # every one, and once
    ports = [(step.nodes, port) for step in steps for port in step.ports]
    assert len(set(ports)) == len(ports)
    for process in plan(config, given):  # no role is left out, no server of any
        mine = [step for step in steps if step.name.startswith(process.served.name if process.served else "trainer")]
        assert sum(len(step.nodes) * len(step.gpus) for step in mine) == process.ranks
    assert all(len(step.nodes) * len(step.gpus) == step.tasks for step in steps[-1:])
    header = Path(f"slurm/{Path(given[0]).stem}.sh").read_text()
    assert f"--nodes={nodes}" in header


IN_FP8 = "'precision.fp8.teachers=[llama-70b]'"


@pytest.mark.parametrize(
    ("said", "layout", "nodes"),
    [
        (IN_FP8, [], 3),
        (f"{IN_FP8} precision.fp8.resident=true teachers.0.offload=false", [], 3),
        ("'teachers.0.servers.args=[--quantization, fp8]'", SERVED, 4),
    ],
    ids=["products", "weights too", "servers"],
)
def test_the_scripts_ways_into_fp8(said, layout, nodes):
    assert f"opd_70b_to_8b.sh {said}" in Path("slurm/opd_70b_to_8b.sh").read_text()
    config, steps = placed(IN_PROCESS, *layout, *shlex.split(said))
    assert num_nodes(steps) == nodes
    (teacher,) = config.teachers
    assert config.precision.fp8.teachers == ([] if layout else [teacher.name])
    served = [p.served.name for p in plan(config, []) if p.command[-2:] == ("--quantization", "fp8")]
    assert served == ([f"teacher-{teacher.name}"] if layout else [])


def test_what_a_servers_step_runs_is_a_valid_config_of_its_share():
    _, steps = placed(IN_PROCESS, "rollout.servers.count=12", "rollout.servers.args=[]")
    first, second, trainer = steps
    assert (trainer.name, trainer.nodes, trainer.tasks) == ("trainer", (0, 1), 16)
    assert [(s.name, s.nodes, s.gpus, s.ports) for s in (first, second)] == [
        ("rollout-0", (2,), tuple(range(8)), tuple(range(30000, 30008))),
        ("rollout-1", (3,), (0, 1, 2, 3), tuple(range(30000, 30004))),
    ]
    at = second.command.index("serve")
    assert second.command[at + 1 : at + 4] == ("--only", "rollout", IN_PROCESS)
    theirs = load(IN_PROCESS, second.command[at + 4 :]).rollout.servers
    assert (theirs.count, theirs.gpus, theirs.host, theirs.args) == (4, [0, 1, 2, 3], "0.0.0.0", [])
    assert idle_gpus(steps, 8) == {3: [4, 5, 6, 7]}
    assert "warning: node 3 has idle GPUs: 4-7" in script.describe(steps, 8)


def test_a_small_run_shares_one_node():
    _, steps = placed(IN_PROCESS, "parallel.tensor=4", "parallel.data=1", "rollout.servers.count=4", nodes=1)
    rollout, trainer = steps
    assert (rollout.nodes, rollout.gpus, trainer.gpus) == ((0,), (4, 5, 6, 7), (0, 1, 2, 3))


BESIDE = ["rollout.servers.colocated=true", "rollout.max_staleness=0",
          "rollout.servers.args=[--mem-fraction-static, '0.4']"]  # fmt: skip


def test_colocated_servers_take_the_trainers_gpus():
    given = [*BESIDE, "rollout.sync=disk", "rollout.servers.count=8", "rollout.servers.tensor=2"]
    _, steps = placed(IN_PROCESS, *given, nodes=2)  # of 3 with nodes of their own
    *rollout, trainer = steps
    assert [(s.nodes, s.gpus, s.ports) for s in rollout] == [
        ((node,), tuple(range(8)), tuple(range(30000, 30004))) for node in (0, 1)
    ]
    assert (trainer.nodes, trainer.gpus) == ((0, 1), tuple(range(8)))
    assert idle_gpus(steps, 8) == {}
    said = script.describe(steps, 8)
    assert said[0] == "rollout-0: 1 task on node 0, GPUs 0-7 of the trainer, ports 30000-30003"
    assert "of the trainer" not in said[-1]
    at = rollout[1].command.index("serve")
    theirs = load(IN_PROCESS, rollout[1].command[at + 4 :]).rollout.servers
    assert (theirs.count, theirs.gpus, theirs.colocated) == (4, list(range(8)), True)


def test_servers_of_both_kinds_on_one_node_listen_on_different_ports():
    given = [*BESIDE, "rollout.sync=tensor", "parallel.tensor=4", "parallel.data=1", "rollout.servers.count=2"]
    teacher = ["teachers.0.backend=sglang", "teachers.0.carrier=topk", "teachers.0.offload=false",
               "teachers.0.servers={tensor: 4, count: 1, port: 30001}"]  # fmt: skip
    _, steps = placed(IN_PROCESS, *given, *teacher, nodes=1)
    by_name = {step.name: step for step in steps}
    assert by_name["trainer"].gpus == (0, 1, 2, 3)
    assert by_name["rollout-0"].gpus == (0, 1)
    (served,) = [step for name, step in by_name.items() if name.startswith("teacher")]
    assert served.gpus == (4, 5, 6, 7)
    assert not set(served.ports) & set(by_name["rollout-0"].ports)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.sync=tensor", "rollout.servers.count=16"], "reaches servers on the machine of rank 0 only"),
        (
            ["rollout.sync=disk", "rollout.servers.count=5", "rollout.servers.tensor=3"],
            r"do not fit on the trainer's 2",
        ),
    ],
)
def test_colocated_servers_that_do_not_fit(overrides, problem):
    with pytest.raises(ValueError, match=problem):
        placed(IN_PROCESS, *BESIDE, *overrides)


def test_servers_beside_the_trainer_that_no_handle_reaches():
    """Their own GPUs are on other nodes than rank 0."""
    with pytest.raises(ValueError, match="machine of rank 0 only, but these are on other nodes too"):
        placed(IN_PROCESS, "rollout.sync=tensor")


@pytest.mark.parametrize(
    ("overrides", "how", "problem"),
    [
        (["rollout.servers.tensor=16"], {}, r"rollout\.servers\.tensor \(16\) is more than the 8 GPUs of a node"),
        (["parallel.data=3"], {"gpus_per_node": 16}, r"trainer's 24 ranks .* do not fill nodes of 16"),
        ([], {"nodes": 2}, r"takes 3 node\(s\) of 8 GPUs, not 2; ask for as many"),
        ([], {"nodes": 5}, r"takes 3 node\(s\) of 8 GPUs, not 5; ask for fewer"),
    ],
)
def test_what_does_not_fit(overrides, how, problem):
    overrides = [*overrides, "rollout.prompts_per_step=240"]
    with pytest.raises(ValueError, match=problem):
        placed(IN_PROCESS, *overrides, **how)


def test_the_steps_as_the_job_reads_them():
    config, steps = placed(MULTI, "run.max_restarts=5")
    first, *rest = [line.split("\t") for line in script.table(config.run, steps).splitlines()]
    assert first == ["run", str(ROOT / "runs/opd_multi_teacher"), "5"]
    for (kind, name, nodes, tasks, servers, run), step in zip(rest, steps, strict=True):
        assert (kind, name, int(tasks), int(servers)) == ("step", step.name, step.tasks, len(step.ports))
        assert tuple(map(int, nodes.split(","))) == step.nodes
        assert tuple(shlex.split(run)) == step.command


def options(text):
    """(name, value) of the header's options; sbatch takes one word a line and refuses more."""
    lines = [shlex.split(line) for line in re.findall("^#SBATCH (.*)$", text, re.MULTILINE)]
    assert all(len(words) == 1 for words in lines)
    return [tuple(word.removeprefix("--").partition("=")[::2]) for (word,) in lines]


@pytest.mark.parametrize(
    ("run_dir", "name", "output"),
    [(".", ROOT.name, f"{ROOT.name}-%j.out"), ("runs/50% 'x'", "50% 'x'", "50%% 'x'-%j.out")],
)
def test_the_header_whatever_the_directory_is_called(run_dir, name, output):
    given = [QUICKSTART, f"run.dir={run_dir}"]
    config, steps = placed(*given)
    text = script.script(config.run, given, steps, gpus_per_node=8, sbatch=["--comment=my job"])
    assert {"job-name": name, "output": output, "comment": "my job"}.items() <= dict(options(text)).items()


@pytest.mark.parametrize("setup", ["export A=b", "export A=b;", "export A=b  # mine", "echo hello\nexport A=b\n"])
def test_a_step_runs_its_setup_first(tmp_path, setup):
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$0.said"\nexec "${@: -3}"\n')
    (tmp_path / "srun").chmod(0o755)
    code = f"source {script.SUPERVISOR}; OPD_NODES=(n1); opd_start 0; wait"
    run_dir = tmp_path / "50%"
    run_dir.mkdir()
    given = {"OPD_SETUP": setup, "OPD_LOGS": str(run_dir), "PATH": f"{tmp_path}:/usr/bin:/bin", "OPD_TRAINER": "1"}
    steps = "OPD_NAMES=(a) OPD_ON=(0) OPD_TASKS=(1) OPD_COMMANDS=('bash -c \"echo \\$A\"') OPD_STARTED=(0);"
    done = subprocess.run(["bash", "-c", steps + code], env=given, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["b"], done.stderr + (run_dir / "a.0.srun").read_text()
    assert f"--output={tmp_path}/50%%/a.0-%t.log" in (tmp_path / "srun.said").read_text().splitlines()


@pytest.mark.parametrize(
    "option", ["--gpus-per-node=8", "--nodes=2", "--sbatch=--partition=h100", "--setup=:", "--steps"]
)
def test_options_of_a_job_start_nothing_here(option, capsys):
    assert main(["launch", option, "--dry-run", QUICKSTART]) == 1
    assert f"{option.partition('=')[0]} requires --slurm" in capsys.readouterr().err


def test_the_script_of_a_config():
    given = [QUICKSTART, "run.dir=runs/it is mine"]
    config, steps = placed(*given, gpus_per_node=2)
    how = {"sbatch": ["--partition=h100"], "setup": "module load cuda"}
    text = script.script(config.run, given, steps, gpus_per_node=2, **how)
    header = options(text)
    assert {"job-name": "it is mine", "output": "it is mine-%j.out"}.items() <= dict(header).items()
    assert {"nodes": str(num_nodes(steps)), "gpus-per-node": "2", "partition": "h100"}.items() <= dict(header).items()
    assert {"requeue", "signal"} <= dict(header).keys()
    assert text.index("#SBATCH") < text.index("OPD_SETUP='module load cuda'") < text.index("opd_run()")
    last = shlex.split(text.splitlines()[-1])
    assert last == ["opd_run", *given, "$@"]
    assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "gpus_per_node", "taken"),
    [
        (["parallel.tensor=1", "parallel.pipeline=1"], 8, 1),
        (["parallel.tensor=2", "parallel.pipeline=1"], 8, 2),
        (["parallel.tensor=2", "parallel.pipeline=1", *SERVED, "loss.ensemble=probs"], 16, 10),
        (["parallel.tensor=2", "parallel.pipeline=4", "rollout.prompts_per_step=64"], 8, 8),
        (["parallel.tensor=2", "parallel.pipeline=4", *SERVED, "loss.ensemble=probs"], 8, 8),
    ],
)
def test_a_job_asks_for_the_gpus_that_it_uses(overrides, gpus_per_node, taken):
    """A part of one node leaves the rest to others; what the script places then is what was placed before."""
    given = [QUICKSTART, *overrides]
    config, steps = placed(*given, gpus_per_node=gpus_per_node)
    text = script.script(config.run, given, steps, gpus_per_node=gpus_per_node)
    header = dict(options(text))
    assert header["gpus-per-node"] == str(taken)
    assert ("exclusive" in header, "mem" in header) == ((taken == gpus_per_node,) * 2)
    assert re.search(r"^OPD_GPUS_PER_NODE=(\d+)$", text, re.MULTILINE)[1] == str(taken)
    assert placed(*given, gpus_per_node=taken)[1] == steps
    shared = f"the job takes {taken} of the node's {gpus_per_node} GPUs, and "
    assert (shared in text) == (taken < gpus_per_node)


def test_the_command_prints_writes_and_submits(tmp_path, monkeypatch, capsys):
    submitted = []

    def run(call, **_):
        submitted.append((call, Path(call[1]).read_text()))
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(submit.subprocess, "run", run)
    given = ["launch", "--slurm", "--gpus-per-node", "4", QUICKSTART, f"run.dir={tmp_path}/run"]
    assert main([*given, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not submitted
    assert not (tmp_path / "run").exists()
    assert main(given) == 0
    assert submitted == [(["sbatch", f"{tmp_path}/run/job.sh"], printed)]
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(given) == 1
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert main([*given, "--gpus-per-node", "0"]) == 1
    assert "--gpus-per-node must be at least 1" in capsys.readouterr().err


def test_settings_of_a_cluster_are_checked_without_its_models(capsys):
    assert main(["check", "--settings-only", MULTI]) == 0
    printed = capsys.readouterr().out
    assert "models, tokenizers and data were not looked at" in printed
    assert "trainer: 8 ranks" in printed
    assert main(["check", "--settings-only", MULTI, "loss.ensemble=logits"]) == 1
    assert "needs loss.ensemble: probs" in capsys.readouterr().err
