"""Sandboxes of Slurm for tests; every test in this folder is marked ``slurm``, ``system`` and ``distributed``."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, PlainUser, missing_programs

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.system)
            item.add_marker(pytest.mark.distributed)


def need_slurm(accounting: bool = False) -> None:
    if missing := missing_programs(accounting):
        pytest.skip(missing)


@contextmanager
def running(prefix: str, plain_user: bool = False, accounting: bool = False, **options: int) -> Iterator[Cluster]:
    """A cluster in a temporary folder of a short name: a socket's path may hold 107 bytes only."""
    need_slurm(accounting)
    folder = Path(tempfile.mkdtemp(prefix=prefix)).resolve()
    user = PlainUser(folder) if plain_user and os.getuid() == 0 else None
    cluster = Cluster(folder / "sandbox", user)
    try:
        cluster.start(accounting=accounting, **options)
        yield cluster
    finally:
        cluster.stop()
        if user is not None:
            user.close()
        shutil.rmtree(folder)


def one_test(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster for one test: its jobs are cancelled after it, and what it has killed comes back."""
    before = cluster.queue()
    yield cluster
    cluster.clean(keep=before)


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """3 nodes of 4 CPUs without accounting, for all tests of this process. Tests take ``cluster``; fixtures that live
    longer than a test take this."""
    with running("slurm_", slurmd_timeout=10) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster, for one test."""
    yield from one_test(session_cluster)


@pytest.fixture
def cluster_with_accounting() -> Iterator[Cluster]:
    """A cluster of its own with a database behind it, so that sacct answers. Takes about 5 seconds."""
    with running("slurm_", accounting=True, slurmd_timeout=10) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def session_plain_user_cluster() -> Iterator[Cluster]:
    """Daemons and commands of a user who is not root, in a folder with a space in its name."""
    with running("slurm user ", plain_user=True, slurmd_timeout=10) as cluster:
        yield cluster


@pytest.fixture
def plain_user_cluster(session_plain_user_cluster: Cluster) -> Iterator[Cluster]:
    """The plain user's cluster, for one test. Runs belong below ``plain_user_cluster.folder``."""
    yield from one_test(session_plain_user_cluster)
