"""Fixtures of all tests of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.cache_builds import NUM_SHARDS, PER_SHARD, build
from support.remote import start_loop
from support.shards import write_shards


@pytest.fixture(scope="session", autouse=True)
def _threads_of_fsspec() -> None:
    """Starts the threads that fsspec keeps in every process that uses it: they are no leaks."""
    start_loop()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("shards")
    return write_shards(folder, num_shards=NUM_SHARDS, examples_per_shard=PER_SHARD)


@pytest.fixture
def folder(tmp_path: Path, shards: list[str]) -> Path:
    """A cache of the shards, for one test to spoil."""
    build(shards, tmp_path / "cache")
    return tmp_path / "cache"
