"""The stacks: which versions belong to one, and that setup.py asks for those."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_opd.core import stacks

SETUP_PY = Path(__file__).resolve().parents[2] / "setup.py"
SETUP = SETUP_PY.read_text()


@pytest.mark.parametrize(
    ("version", "stack"),
    [
        ("0.16.1", stacks.OLDEST),
        ("0.16.9", stacks.OLDEST),
        ("0.16.1+abc", stacks.OLDEST),
        ("0.19.2", stacks.NEWEST),
        ("0.19.11", stacks.NEWEST),
    ],
)
def test_a_version_is_of_a_stack(version, stack):
    assert stacks.of(version) is stack


@pytest.mark.parametrize("version", ["0.16.0", "0.17.0", "0.18.2", "0.19.0", "0.19.2rc1", "0.20.0", "1.0"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(ValueError, match=re.escape(f"megatron-core {version} is none of those")) as caught:
        stacks.of(version)
    for first, last in [stack.megatron for stack in stacks.STACKS]:
        assert f"{first} or later, below {last}" in str(caught.value)


def test_without_megatron(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(ValueError, match=r"megatron-core is not installed; install 0\.16\.1 or later"):
        stacks.here()


@pytest.mark.parametrize("stack", stacks.STACKS, ids=lambda stack: stack.name)
def test_setup_asks_for_the_versions_of_a_stack(stack):
    plain, gpu = (re.search(rf"^{stack.name.upper()}{end} = \[(.+)\]$", SETUP, re.MULTILINE)[1] for end in ("", "_GPU"))
    assert "megatron-core>={},<{}".format(*stack.megatron) in plain
    assert "transformer-engine[core-cu13,pytorch]>={},<{}".format(*stack.transformer_engine) in gpu
    assert f"*{stack.name.upper()}," in gpu
    assert not re.search(r'"apex', SETUP)


@pytest.mark.parametrize("version", ["0.16.0", "0.17.1", "0.18.2", "0.20.0", "0.16.1", "0.16.4", "0.19.2", "0.19.5"])
def test_an_installation_without_extras_gets_one_of_the_stacks(version):
    requirement = re.search(r'"megatron-core(.+)",$', SETUP.split("install_requires")[1], re.MULTILINE)[1]
    allowed = SpecifierSet(requirement).contains(version)
    assert allowed == any(_is_of(version, stack) for stack in stacks.STACKS)


def _is_of(version, stack):
    try:
        return stacks.of(version) is stack
    except ValueError:
        return False


def pinned(name):
    lines = (SETUP_PY.parent / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_constraints_of_the_stacks_differ_in_what_makes_them():
    old, new = pinned("constraints.txt"), pinned("constraints-newest.txt")
    for stack, versions in ((stacks.OLDEST, old), (stacks.NEWEST, new)):
        assert stacks.of(versions["megatron-core"]) is stack
        first, last = stack.transformer_engine
        assert all(v in SpecifierSet(f">={first},<{last}") for n, v in versions.items() if "transformer-engine" in n)
    differing = {name for name in {*old, *new} if old.get(name) != new.get(name)}
    engine = {"transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"}
    assert differing == {"megatron-core", "torch", "triton", "nvidia-nccl-cu13", *engine}
