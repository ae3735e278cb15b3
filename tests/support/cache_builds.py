"""The tests of reference caches share these caches, made by a tiny reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jest_stream import JESTDataset, ReferenceCache
from support.models import TinyTwoTower, to_tensor, tokenize

NUM_SHARDS, PER_SHARD = 5, 12
"""Of the fixture `shards`."""


def build(source: Any, path: Any, *, seed: int = 2, **options: Any) -> ReferenceCache:
    """Builds a cache of the embeddings of `TinyTwoTower(seed)`."""
    views = {"transform": to_tensor, "tokenizer": tokenize}
    return ReferenceCache.build(source, TinyTwoTower(seed), path, **{**views, **options})


def cached_dataset(source: Any, reference: Any, **options: Any) -> JESTDataset:
    """Batches of 4, scored with a cache."""
    usual = {"transform": to_tensor, "tokenizer": tokenize, "batch_size": 4}
    models = {"learner": TinyTwoTower(1), "reference": reference}
    return JESTDataset(source, **{**models, **usual, **options})


def train_from(source: Any, reference: Any, num_steps: int = 6, **options: Any) -> JESTDataset:
    """Takes some batches; returns the dataset, closed."""
    with cached_dataset(source, reference, **options) as dataset:
        for _, _batch in zip(range(num_steps), dataset, strict=False):
            pass
    return dataset


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a cache, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
