"""The benchmarks of whole steps in their smallest form, and the arithmetic of their comparisons."""

import argparse
import json
import re
import sys
from pathlib import Path

import program
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_step  # noqa: E402
import bench_vs_trl  # noqa: E402
import plan_memory  # noqa: E402
from step_bench import show  # noqa: E402
from trl_bench import inputs  # noqa: E402

LITTLE = ["rollout.prompts_per_step=4", "rollout.samples_per_prompt=1", "train.micro_batch_size=2"]


def found(name, rates, **more):
    """A result as the file has it."""
    return {"name": name, "tokens_per_s": rates, "about": {"commit": "abc"}, **more}


@pytest.mark.slow
def test_steps_are_measured_on_ranks_of_their_own_and_added_to_the_file(tmp_path):
    out = tmp_path / "steps.json"
    out.write_text(json.dumps({"cases": [found("older", [1.0], ranks=1, stages=[{"step": 1.0}])]}))
    few = ["--warmup", 1, "--steps", 1, "--repeats", 2]
    files = ["--json", out, "--plot", tmp_path / "steps.png"]
    case = [ROOT / program.CONFIG, *LITTLE, "--layouts", "2x1x1", "--teachers", 3]
    done = program.tool("tools/bench_step.py", *case, *few, *files)
    assert done.returncode == 0, done.stderr
    older, case = json.loads(out.read_text())["cases"]
    assert older["name"] == "older"
    assert case["name"] == "2x1x1, 3 hidden"
    assert len(case["tokens_per_s"]) == len(case["stages"]) == 2
    for stages, seconds in zip(case["stages"], case["step_s"], strict=True):
        assert 0 < sum(stages.values()) < seconds
    assert case["hidden"] == [pytest.approx(0.0, abs=0.05)] * 2  # nothing is sampled ahead
    assert case["bytes"]["allreduce"] > 2 * 4 * 64  # activations at least
    assert case["peak_bytes"] > 1e7
    assert (tmp_path / "steps.png").stat().st_size > 1000
    assert "2x1x1, 3 hidden" in done.stdout


@pytest.mark.slow
def test_both_ways_of_packing_do_one_step(tmp_path):
    """Which the tool itself sees to; two rounds of each, and less padding in one."""
    out = tmp_path / "packing.json"
    small = {"hidden": 32, "layers": 1, "vocab": 64, "answers": 4, "micro-batch-size": 2, "mean": 6, "longest": 20}
    sizes = [str(word) for name, size in small.items() for word in (f"--{name}", size)]
    done = program.tool("tools/bench_packing.py", *sizes, "--rounds", 2, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["packed"]["padding"] == 0 < found["padded"]["padding"]
    assert all(len(found[way][what]) == 2 for way in ("padded", "packed") for what in ("scoring", "step"))
    assert found["padded"]["loss"] > 0
    assert "padded / packed" in done.stdout


def count(parallel):
    """Bytes that this rank gives to collectives of known sizes."""
    import torch
    import torch.distributed as dist
    from step_bench.traffic import Traffic

    with Traffic() as traffic:
        dist.all_reduce(torch.ones(10))
        dist.all_gather_into_tensor(torch.empty(2 * 6), torch.ones(6))
        dist.reduce_scatter_tensor(torch.empty(4), torch.ones(8))
        dist.broadcast(torch.ones(3, dtype=torch.float64), 0)
        if parallel.rank == 0:
            dist.send(torch.ones(5), 1)
        else:
            dist.recv(torch.empty(5), 0)
        dist.barrier()
    return dict(traffic.bytes)


def test_collectives_are_counted_by_what_a_rank_gives(ranks):
    first, second = ranks.run(2, count)
    common = {"allreduce": 40, "allgather_base": 24, "reduce_scatter_base": 32, "broadcast": 24}
    assert first == {**common, "send": 20}
    assert second == common


def test_dry_run_starts_nothing_and_weak_scaling_grows_the_batch(capsys):
    assert bench_step.main(["--dry-run", "--scaling", "weak", "--layouts", "1x1x1", "1x1x4"]) == 0
    shown = capsys.readouterr().out
    assert "1x1x4, 2 hidden, weak" in shown
    assert "128" in shown  # 4 times the quickstart's 32 prompts


@pytest.mark.parametrize("how", [["--layouts", "1x1x2x3"], ["parallel={context: 3, data: 2}"]])
def test_a_layout_may_have_context_parallelism(capsys, how):
    assert bench_step.main(["--dry-run", "rollout.prompts_per_step=8", "train.micro_batch_size=4", *how]) == 0
    assert re.search(r"1x1x2x3, 2 hidden\D+6\D", capsys.readouterr().out)


def test_a_run_is_not_continued():
    (case,) = bench_step.cases.of(bench_step._parser().parse_args([str(program.CONFIG), "run.dir=runs/mine"]))
    assert case.config().run.dir == "runs/mine/bench"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layouts", "2x2"], "TENSORxPIPELINExDATA"),
        (["--layouts", "1x1x3"], "rollout.prompts_per_step"),
        (["optim.rate=1"], "optim.rate"),
    ],
)
def test_impossible_cases_are_refused_before_anything_starts(capsys, arguments, said):
    assert bench_step.main([*arguments, "--dry-run"]) == 1
    assert said in capsys.readouterr().err


def test_compare_tells_a_difference_from_noise(tmp_path, capsys):
    before = [found("a", [100.0, 102.0]), found("b", [10.0, 14.0]), found("c", [5.0, 6.0]), found("gone", [1.0])]
    after = [found("a", [120.0, 121.0]), found("b", [13.0, 15.0]), found("c", [3.0, 4.0])]
    for name, cases in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps({"cases": cases}))
    assert bench_step.main(["--compare", str(tmp_path / "before"), str(tmp_path / "after")]) == 0
    shown = capsys.readouterr().out
    for name, verdict in (("a", "faster"), ("b", "within the noise"), ("c", "slower")):
        assert any(f"│ {name} " in line and verdict in line for line in shown.splitlines())
    assert "in one file only: gone" in shown
    assert show.spread([90.0, 100.0, 120.0]) == pytest.approx(0.3)
    (tmp_path / "other").write_text("[]")
    assert bench_step.main(["--compare", str(tmp_path / "other"), str(tmp_path / "after")]) == 1


@pytest.mark.slow
def test_the_loop_over_stages_that_only_take_time():
    """On a busy machine no figure is sure, but who samples ahead is a version behind."""
    done = program.tool("tools/bench_overlap.py", "--generate", 0.05, "--train", 0.05, "--steps", 3, "--at-most", 1000)
    assert done.returncode == 0, done.stderr
    lags = [line.split("|")[4].strip() for line in done.stdout.splitlines() if line.startswith(("| 0", "| 1", "| 2"))]
    assert lags == ["0.00", "1.00", "2.00"]


@pytest.mark.slow
def test_our_side_of_the_comparison_with_trl(tmp_path):
    """TRL's needs an environment of its own; both sides read the same folder and print the same figures."""
    sizes = {"vocab": 64, "hidden": 32, "layers": 1, "batch": 2, "prompt": 4, "response": 3, "steps": 2, "warmup": 1}
    inputs.make(tmp_path, argparse.Namespace(**sizes))
    done = program.tool("tools/trl_bench/of_ours.py", tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told["losses"]) == 3
    assert len(told["step_s"]) == 2
    assert told["samples_per_s"] == pytest.approx(2 * 2 / sum(told["step_s"]))
    assert 0 < told["samples_per_cpu_s"] < 1e5
    assert told["peak_mb"] > 0


def test_a_python_without_trl_is_said(capsys):
    little = ["--vocab", "64", "--hidden", "32", "--layers", "1", "--batch", "2", "--response", "2"]
    assert bench_vs_trl.main([*little, "--rounds", "1", "--python", "/bin/false"]) == 1
    assert "TRL failed" in capsys.readouterr().err


def test_plan_memory_is_the_check(capsys):
    assert plan_memory.main([str(ROOT / program.CONFIG), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"]["stages"]
