"""Caches by a tiny reference: shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models import TinyTwoTower, to_tensor, tokenize

from jest_stream import ReferenceCache

NUM_SHARDS, PER_SHARD = 5, 12
"""Of the fixture `shards`."""


def build(source: Any, path: Any, *, seed: int = 2, **options: Any) -> ReferenceCache:
    """Builds a cache of what `TinyTwoTower(seed)` gives."""
    views = {"transform": to_tensor, "tokenizer": tokenize}
    return ReferenceCache.build(source, TinyTwoTower(seed), path, **{**views, **options})


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a cache, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
