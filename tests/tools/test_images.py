"""The Dockerfiles, read: no image can be built in these tests. `make test-images` runs the CPU one's steps."""

import json
import re
import subprocess
from pathlib import Path

import image_steps
import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ["docker/Dockerfile", "docker/Dockerfile.cpu"]
KNOWN = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}


def steps_of(file):
    return image_steps.parse((ROOT / file).read_text())


def stages(file):
    """[(name, name of its base, its instructions)] in order, and the defaults of the arguments before the first."""
    found, first = [], {}
    for step in steps_of(file):
        if step.name == "FROM":
            base, *alias = step.value.split()
            found.append((alias[-1] if alias else base, base, []))
        elif found:
            found[-1][2].append(step)
        else:
            assert step.name == "ARG", step
            name, _, default = step.value.partition("=")
            first[name] = default
    return found, first


def arguments(file):
    return dict(step.value.split("=", 1) for step in steps_of(file) if step.name == "ARG")


@pytest.mark.parametrize("file", FILES)
def test_bases_have_a_tag_and_instructions_are_known(file):
    found, first = stages(file)
    names = [name for name, _, _ in found]
    for place, (_, base, steps) in enumerate(found):
        assert {step.name for step in steps} <= KNOWN
        if base in names[:place]:
            continue
        image = re.sub(r"\$\{(\w+)\}", lambda m: first[m[1]], base)
        assert re.fullmatch(r"[\w./-]+:[\w.-]+", image), image
        assert not image.endswith(":latest")


@pytest.mark.parametrize("file", FILES)
def test_nobody_is_root_at_run_time(file):
    found, _ = stages(file)
    users = [step.value for step in found[-1][2] if step.name == "USER"]
    assert users == ["1000"]  # a number: a cluster can tell that it is not root's
    commands = [step.value for step in found[-1][2] if step.name == "CMD"]
    assert len(commands) == 1
    assert all(isinstance(word, str) for word in json.loads(commands[0]))


@pytest.mark.parametrize("file", FILES)
def test_what_is_copied_is_there(file):
    names = image_steps.tracked()
    found, _ = stages(file)
    before = []
    for stage, _, steps in found:
        for step in (step for step in steps if step.name == "COPY"):
            *sources, _ = step.value.split()
            origin = [option.removeprefix("--from=") for option in step.options if option.startswith("--from=")]
            assert set(origin) <= set(before), step
            assert any(option.startswith("--chown=") for option in step.options), step
            for source in [] if origin else sources:
                assert source == "." or source in names or any(n.startswith(f"{source}/") for n in names), source
        before.append(stage)


@pytest.mark.parametrize("file", FILES)
def test_commands_are_shell_and_leave_no_lists(file):
    for step in steps_of(file):
        if step.name != "RUN":
            continue
        done = subprocess.run(["bash", "-n", "-c", step.value], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (step, done.stderr)
        if "apt-get install" in step.value:
            assert "--no-install-recommends" in step.value
            assert step.value.endswith("rm -rf /var/lib/apt/lists/*")
        assert "sudo" not in step.value


def test_versions_are_those_of_the_stacks():
    newest = (ROOT / "constraints-newest.txt").read_text().splitlines()
    assert arguments("docker/Dockerfile")["TORCH"] in newest
    assert arguments("docker/Dockerfile.cpu")["TORCH"] in (ROOT / "constraints.txt").read_text().splitlines()
    requirements = (ROOT / "megatron_opd/sglang/requirements_cpu.txt").read_text().splitlines()
    assert arguments("docker/Dockerfile")["SGLANG"] in requirements


def test_the_context_has_no_environment_and_no_history():
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert {".git", ".venv", ".venv-*", "runs", ".carry", "**/__pycache__"} <= set(ignored)
    made = (line.strip("/\n") for line in (ROOT / ".gitignore").open())
    # What git ignores is made here; a pattern without a path is written with ** there.
    for name in made:
        options = {name, f"**/{name}", re.sub(r"^(\.venv-).*", r"\1*", name)}
        assert options & set(ignored), f".gitignore has {name}: .dockerignore should"


def test_the_steps_of_the_user_are_run_in_a_folder(tmp_path, capfd):
    page = (
        "ARG BASE=a:1\nFROM ${BASE}\nRUN touch root\nUSER 1000\nWORKDIR /home/x\nARG WHAT=no\nENV A=1 \\\n    B=2\n"
        "COPY --chown=1:1 setup.py README.md ./\nCOPY megatron_opd/__init__.py megatron_opd/\nCOPY docker images\n"
        "# a remark\nRUN test -f setup.py \\\n && test -f megatron_opd/__init__.py \\\n"
        ' && test -f images/Dockerfile.cpu && echo "$A$B$WHAT" >said\nCMD ["cp", "said", "again"]\n'
    )
    steps = image_steps.parse(page)
    assert image_steps.build(steps, tmp_path, given={"WHAT": "yes"}, has_command=True) == 0
    assert (tmp_path / "home/x/again").read_text() == "12yes\n"
    assert "left out, since root does it: touch root" in capfd.readouterr().out
    assert not list(tmp_path.rglob("root"))
    failing = image_steps.parse("FROM a:1\nUSER 1\nRUN exit 7\nRUN touch late\n")
    assert image_steps.build(failing, tmp_path, given={}, has_command=True) == 7
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize("text", ["FROM", "RUN a \\\n", "RUN cat <<E\nE\n"])
def test_what_is_not_understood_is_refused(text):
    with pytest.raises(ValueError, match="line 1"):
        image_steps.parse(text)
