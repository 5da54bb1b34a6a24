"""What a run leaves in the temporary directory when it is killed: nothing."""

import os
import signal
import subprocess
import sys

import pytest
from program import ROOT, environment, started

IMPORTS = """
import os, signal, sys
sys.path.insert(0, "tests")
from megatron_opd.core import compiler_cache
compiler_cache.keep_out_of_temporary()
import warm_image
warm_image.import_what_a_rank_does()
print(any(name.partition(".")[0] == "wandb" for name in sys.modules), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_imports_of_a_rank(tmp_path):
    """Weights & Biases makes two directories when it is imported, and torch's compiler one."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS],
        cwd=ROOT,
        env=environment(TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "False\n"), done.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "victims", ["everybody", *(pytest.param(one, marks=pytest.mark.slow) for one in ("launcher", "a rank"))]
)
def test_a_run_that_is_killed(tmp_path, victims):
    """Between two steps, after an evaluation and a save."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    several = ["parallel.tensor=2", "train.steps=1000", "train.save_every=2", "train.eval_every=2"]
    with started(tmp_path / "run", *several, env={"TMPDIR": str(temporary)}) as run:
        run.wait_for_step(3)
        if victims == "everybody":
            run.kill_everyone()
        else:
            (run.process if victims == "launcher" else run.ranks()[1]).kill()
            run.end(timeout=600)
    assert os.listdir(temporary) == []


@pytest.mark.slow
def test_a_run_with_wandb_leaves_what_it_needs_in_its_own_directory(tmp_path):
    """The path of the directory is too long for sockets."""
    pytest.importorskip("wandb")
    temporary, run_dir = tmp_path / "tmp", tmp_path / "long" / ("x" * 120)
    temporary.mkdir()
    settings = {"env": {"TMPDIR": str(temporary)}}
    with started(run_dir, "train.steps=1000", "train.save_every=1", "log.wandb=offline", **settings) as run:
        run.wait_for_step(3)
        assert [path.is_socket() for path in run_dir.glob("wandb/tmp/wandb-*/socket")] == [True]
        run.kill_everyone()
    assert os.listdir(temporary) == []
    with started(run_dir, "train.steps=4", "log.wandb=offline", **settings) as run:
        code, printed = run.end(timeout=600)
        assert code == 0, printed
    assert os.listdir(temporary) == []
    assert [str(path) for path in run_dir.glob("wandb/tmp/*sock*")] == []
    assert len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == 2
