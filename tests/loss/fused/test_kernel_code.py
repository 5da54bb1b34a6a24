"""The Triton kernels as ptxas makes them: every one that the trainer can ask for, within limits, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools/kernel_figures.py"
pytestmark = [pytest.mark.kernels, pytest.mark.slow, pytest.mark.timeout(3600)]
MOST_REGISTERS = {"stats": 128, "sums": 80, "gradient": 80, "scale": 80}
"""So that two, or three, programs of 256 threads share the 65,536 registers of a multiprocessor."""
GOAL_S = 4.5e-3
"""KL on logits, T=8,192, V=151,936, bf16, on an H100."""


def figures(folder, *arguments):
    """What the tool says, in a process that is not told to interpret kernels."""
    pytest.importorskip("triton")
    path = folder / "figures.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, TOOL, "--json", path, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())["kernels"]


@pytest.fixture(scope="module")
def on_sm_90(tmp_path_factory):
    return figures(tmp_path_factory.mktemp("sm_90"), "--every")


@pytest.fixture(scope="module")
def on_sm_100(tmp_path_factory):
    return figures(tmp_path_factory.mktemp("sm_100"), "--few", "--arch", "100")


@pytest.fixture(params=["on_sm_90", "on_sm_100"])
def kernels(request):
    return request.getfixturevalue(request.param)


def test_all_are_compiled(on_sm_90):
    """Of each kernel, of each type and of each number of teachers."""
    found = {(x["kernel"], x["case"]["dtype"], x["case"]["teachers"]) for x in on_sm_90}
    wanted = {(k, d, n) for k in ("stats", "sums", "gradient") for d in ("bf16", "fp16", "fp32") for n in (1, 2, 4)}
    assert found >= wanted
    assert {"scale"} <= {x["kernel"] for x in on_sm_90}


def test_registers_and_spills(kernels):
    """Nothing is spilled in the loop; a number or two of the row's end may be."""
    assert not [x for x in kernels if x["code"]["registers"] > MOST_REGISTERS[x["kernel"]]]
    assert not [x for x in kernels if x["code"]["spills"] or x["code"]["spilled_bytes"] > 16]


def test_no_thread_waits_for_another_before_the_end_of_a_row(kernels):
    assert not [x for x in kernels if x["code"]["barriers"]]


def test_values_travel_16_bytes_at_a_time(kernels):
    """Of each thread, whatever the width, and where rows begin at odd places too."""
    rows = [x for x in kernels if x["kernel"] != "scale"]
    assert not [x for x in rows if not x["code"]["has_loop"] or x["code"]["narrowest"] < 16]


def test_no_product_is_contracted_into_a_sum(kernels):
    """What two kernels compute alike is then rounded alike."""
    assert not [x for x in kernels if x["contracts"]]


def test_statistics_wait_for_memory_only(on_sm_90):
    """Their instructions take less time than their loads; those of another temperature too."""
    slow = [x for x in on_sm_90 if x["kernel"] == "stats" and x["floor"]["issue_s"] > x["floor"]["memory_s"]]
    assert not slow


def test_kl_reaches_its_goal(tmp_path):
    its = [x for x in figures(tmp_path) if x["case"]["kind"] == "reverse" and x["case"]["teachers"] == 1 and x["floor"]]
    assert [x["kernel"] for x in its] == ["stats", "gradient"]
    assert sum(x["floor"]["time_s"] for x in its) <= GOAL_S
