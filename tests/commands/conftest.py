"""An installed wheel, and a user who has nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "megatron_opd", "examples")
TIMEOUT_S = 600


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """A folder with the installed wheel. It is built from a copy, because setuptools leaves folders in the sources."""
    sources, site = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("site")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    wheels = sources / "wheels"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(sources)]
    subprocess.run(build, check=True, timeout=TIMEOUT_S)
    (wheel,) = wheels.iterdir()
    install = [*pip, "install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=TIMEOUT_S)
    return site


@pytest.fixture(scope="session")
def installed(site):
    """The environment of a program that finds the installed package alone, with `megatron-opd` on its path."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    path = f"{site / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**kept, "PYTHONPATH": str(site), "PATH": path, "OMP_NUM_THREADS": "1"}
