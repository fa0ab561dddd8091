"""One Slurm for all tests that want it, and the run that theirs are compared with."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.exit_codes import FINISHED
from tests.cluster.mini_slurm import mini_slurm
from tests.cluster.submitted import MAX_STEPS, Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    runs = folder / "runs of a user"  # a path that wants quotes
    runs.mkdir()
    root = str(Path(__file__).parents[2])
    with mini_slurm(folder / "daemons") as variables:
        around = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        yield Cluster(variables=around, folder=runs, cache=cache)


@pytest.fixture(scope="session")
def whole(cluster: Cluster) -> Path:
    """The folder of a run on two processes of this machine, without Slurm."""
    done = cluster.train("name=whole", f"max_steps={MAX_STEPS}", "launch.processes=2")
    assert done.returncode == FINISHED, done.stderr
    return cluster.folder / "whole"
