"""The cluster of the session, and runs on this machine that jobs are compared with."""

import os

import pytest
from slurm.cluster import ROOT, Cluster, install
from slurm.small import CONFIG, ONE_TEACHER, SMALL, local


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Four virtual nodes; skips, with the reason, where there can be none."""
    if reason := install():
        pytest.skip(reason)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")  # each has a cluster
    made = Cluster(tmp_path_factory.mktemp("slurm"), nodes=4, number=int(worker.removeprefix("gw")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small run of slurm/opd_70b_to_8b.sh, uninterrupted and without Slurm."""
    return local(tmp_path_factory.mktemp("local") / "run", CONFIG, *ONE_TEACHER)


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a script in small, a rank a node; its run is in <tmp_path>/run."""

    def start(script, *overrides, nodes=2, options=(), **env):
        where = [f"--nodes={nodes}", f"--output={tmp_path}/job.out", *options]
        given = [*SMALL, *overrides, f"run.dir={tmp_path}/run"] if script.startswith("opd_") else overrides
        return cluster.submit(ROOT / "slurm" / script, *given, options=where, OPD_RANKS_PER_NODE="1", **env)

    return start
