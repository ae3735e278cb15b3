"""These settings hold for every test."""

import gc
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.s3_server import s3  # noqa: F401  a fixture
from support.shards import write_shards

# The tests' matrices are tiny: a second thread only waits for the first.
torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Has the garbage collector pass over what was imported, which took it a tenth of the time."""
    del session
    gc.collect()
    gc.freeze()


def shape_of(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of `write_shards` that a module gives as `SHARDS`."""
    usual = {"num_shards": 4, "examples_per_shard": 16}
    return {**usual, **getattr(request.module, "SHARDS", {})}


@pytest.fixture(scope="module")
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tar shards that the tests of a module only read: four of 16 examples, or as `SHARDS` says."""
    return write_shards(tmp_path_factory.mktemp("shards"), **shape_of(request))


@pytest.fixture
def own_shards(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The same in a test's own folder, which it may change."""
    return write_shards(tmp_path, **shape_of(request))
