"""A wheel is enough: built, installed outside the clone, and used from a folder that has nothing of it.

The interpreter is that of the tests, so what the package depends on is there; the package itself is the installed one.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

from megatron_opd.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
NAMES = [module.__name__.rpartition(".")[2].replace("_", "-") for modules in COMMANDS.values() for module in modules]
TIMEOUT_S = 600
_HELP = """
import sys
from megatron_opd.__main__ import main
for name in sys.argv[1:]:
    try:
        main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, name
heavy = {"torch", "numpy", "pydantic", "transformers", "rich", "yaml"} & set(sys.modules)
assert not heavy, heavy
"""
"""All of --help in one process, which imports nothing that is slow."""
_COMMANDS = """
import contextlib, io, json, sys
from megatron_opd.__main__ import main
found = []
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command)
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
"""Commands in one process, which imports torch once."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where a user is: a folder of their own."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def user(installed, home):
    """Runs Python with the installed package alone, in the user's folder; returns the finished process."""

    def run(*arguments, code=0):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, env=installed, cwd=home, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def said(user, home):
    """What commands of the installed package print, run one after the other."""
    tiny.save(tiny.build("qwen3", num_hidden_layers=3), home / "model")
    commands = {
        "list": ["example"],
        "example": ["example", "quickstart"],
        "check": ["check", "examples/quickstart.yaml", "parallel.tensor=1", "parallel.pipeline=1"],
        "servers": ["check", "examples/quickstart.yaml", "rollout.engine=sglang"],
        "prune": ["prune", "model", "small", "--drop", "1"],
        "convert": ["convert", "hf-to-megatron", "--hf", "small", "--out", "megatron"],
        "inspect": ["inspect", "megatron", "--json"],
        "verify": ["verify", "small", "megatron"],
        "back": ["convert", "megatron-to-hf", "--checkpoint", "megatron", "--out", "back"],
        "fp8": ["check-fp8", "examples/quickstart.yaml", "--emulate"],
        "again": ["example", "examples/quickstart.yaml"],
        "logprobs": ["compare-logprobs", "--hf", "examples/quickstart/models/student", "--text", "12+34="],
    }
    found = json.loads(user("-c", _COMMANDS, json.dumps([*commands.values()])).stdout)
    return {name: tuple(one) for name, one in zip(commands, found, strict=True)}


def test_the_package_is_the_installed_one(user, site):
    said = user("-c", "import megatron_opd; print(megatron_opd.__file__)").stdout.strip()
    assert said == str(site / "megatron_opd/__init__.py")
    scripts = [path.read_text() for path in site.glob("megatron_opd-*.dist-info/entry_points.txt")]
    assert scripts == ["[console_scripts]\nmegatron-opd = megatron_opd.__main__:main\n"]


def test_every_command_has_help_and_it_is_light(user):
    out = user("-c", _HELP, *NAMES).stdout
    assert [name for name in NAMES if f"usage: megatron-opd {name} " not in out] == []


def test_an_example_is_written_and_checked(said, home):
    code, out, _ = said["list"]
    assert code == 0
    assert {"quickstart", "cluster/gkd", "llm/quickstart"} <= {line.split()[0] for line in out.splitlines()}
    assert (home / "examples/quickstart.yaml").read_bytes() == (ROOT / "examples/quickstart.yaml").read_bytes()
    assert said["example"][0] == said["check"][0] == 0
    assert "trainer: 1 rank of" in said["check"][1]
    assert "examples/quickstart.yaml: 0 files written below examples/; " in said["again"][1]


def test_models_are_made_smaller_converted_and_compared(said, home):
    assert [said[name][0] for name in ("prune", "convert", "inspect", "verify", "back")] == [0] * 5
    facts = json.loads(said["inspect"][1])
    assert (facts["format"], facts["layers"], facts["problems"]) == ("torch_dist (Megatron)", 2, [])
    assert "the models are the same" in said["verify"][1]
    assert (home / "back/model.safetensors").read_bytes() == (home / "small/model.safetensors").read_bytes()

    code, out, _ = said["logprobs"]
    assert (code, out.split(":")[0]) == (0, "transformers - megatron")


def test_errors_advise_commands_that_are_here(said):
    code, out, _ = said["servers"]
    assert code == 0
    assert ".venv-sglang/bin/python does not exist; `megatron-opd install-sglang` installs SGLang" in out
    code, _, err = said["fp8"]
    assert (code, err.count("-m megatron_opd check-fp8 …")) == (1, 1)


def test_the_installer_of_sglang_is_in_it(user, home):
    """It refuses an interpreter that SGLang does not run on."""
    wrong = home / "python"
    wrong.write_text("#!/bin/sh\nexit 1\n")
    wrong.chmod(0o755)
    refused = user("-m", "megatron_opd", "install-sglang", "there", "--python", wrong, code=1)
    assert "error: SGLang 0.5.23 needs Python 3.10 to 3.12, and" in refused.stderr
    assert not (home / "there").exists()


@pytest.mark.slow
def test_the_example_trains(user, home):
    run = ("-m", "megatron_opd")
    user(*run, "example", "quickstart")
    small = ["parallel.tensor=1", "parallel.pipeline=1", "run.dir=run", "train.steps=2", "optim.warmup_steps=1"]
    user(*run, "train", "examples/quickstart.yaml", *small, "train.eval_every=0", "train.eval_teachers=false")
    rows = [json.loads(line) for line in (home / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert yaml.safe_load((home / "run/config.yaml").read_text())["train"]["steps"] == 2
    assert (home / "run/hf/model.safetensors").is_file()
    user(*run, "report", "run")
