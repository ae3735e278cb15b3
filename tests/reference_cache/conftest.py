"""These fixtures are shared by all tests of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cache_builds import build
from support.remote import start_loop


@pytest.fixture(scope="session", autouse=True)
def _threads_of_fsspec() -> None:
    """Starts the threads that fsspec keeps in every process that uses it: they are no leaks."""
    start_loop()


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A cache of the shards (the test's own, where it asks for them), for one test to spoil."""
    name = "own_shards" if "own_shards" in request.fixturenames else "shards"
    build(request.getfixturevalue(name), tmp_path / "cache")
    return tmp_path / "cache"
