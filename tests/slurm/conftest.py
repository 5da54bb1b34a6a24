"""The cluster of the session, and runs on this machine that jobs are compared with."""

import pytest
from slurm.cluster import Cluster, install


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Four virtual nodes; skips, with the reason, where there can be none."""
    if reason := install():
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("slurm"), nodes=4)
    yield made
    made.close()
