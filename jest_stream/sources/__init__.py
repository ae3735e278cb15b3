"""Where examples come from: shards, dealt to lanes, read here or in worker processes.

`open_source` turns what the user passes into a `Source`; `lanes` deals its shards; `workers` reads
lanes block by block. `decode` makes values of what is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.sources.huggingface import HuggingFaceSource, is_dataset, is_repository
from jest_stream.sources.index import write_manifest
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.lanes import lane_shards, num_lanes, shard_order
from jest_stream.sources.reader import Block, BlockReader
from jest_stream.sources.tar import TarSource
from jest_stream.types import Source

__all__ = [
    "Block",
    "BlockReader",
    "HuggingFaceSource",
    "IterableSource",
    "TarSource",
    "is_dataset",
    "is_repository",
    "lane_shards",
    "num_lanes",
    "open_source",
    "shard_order",
    "write_manifest",
]


def open_source(source: Any, *, storage: StorageConfig | None = None) -> Source:
    """Returns the source that `source` stands for.

    Args:
      source: addresses of tar shards or of manifests (paths, patterns, `s3://`, `https://`, ...),
        alone or in a list; `"hf://datasets/org/name"`; a dataset of `datasets`; a `Source`, which
        is returned as it is; or any iterable of examples or `(image, text)` pairs.
      storage: how addresses are read; of no use for anything else.

    Raises:
      ConfigError: for anything else, with what to pass instead.
      UnsafeDataError: for an address outside the allow-list.
      ShardUnavailableError: for a shard that does not exist.
    """
    if is_repository(source):
        return HuggingFaceSource(source, storage=storage)
    if isinstance(source, (str, os.PathLike)) or _is_list_of_paths(source):
        return TarSource(source, storage=storage)
    if storage is not None:
        raise ConfigError(
            f"storage=... says how addresses are read, but source is a {type(source).__name__}. "
            "Pass storage to the source itself, where it takes one, or leave it out."
        )
    if all(hasattr(source, name) for name in ("num_shards", "fingerprint", "shard_name", "read")):
        opened: Source = source
        return opened
    if is_dataset(source) or (
        isinstance(source, Mapping) and any(map(is_dataset, source.values()))
    ):
        return HuggingFaceSource(source)
    if isinstance(source, DataLoader):
        raise ConfigError(
            "source is a DataLoader, which yields batches: examples could not be chosen one by "
            "one. Pass its dataset, and num_workers=... to JESTDataset."
        )
    if isinstance(source, (bytes, bytearray, Mapping, Tensor, nn.Module)):
        raise ConfigError(
            f"source is a {type(source).__name__}, which holds no examples. Pass paths of tar "
            "shards, or an iterable of dicts or of (image, text) pairs."
        )
    return IterableSource(source)


def _is_list_of_paths(source: Any) -> bool:
    if not isinstance(source, (list, tuple)):
        return False
    if not source:
        raise ConfigError("source is empty: pass paths of tar shards, or examples.")
    return isinstance(source[0], (str, os.PathLike))
