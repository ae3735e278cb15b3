"""Opens the source that the user's argument stands for.

The kinds are told apart here, once, in the training process; no data is read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.sources.huggingface import HuggingFaceSource, is_dataset, is_repository
from jest_stream.sources.iterable import IterableSource
from jest_stream.sources.tar import TarSource
from jest_stream.types import Source, WrappedSource

_REQUIRED = ("num_shards", "fingerprint", "shard_name", "read")


def open_source(source: Any, *, storage: StorageConfig | None = None) -> Source:
    """Returns the source that `source` stands for.

    Args:
      source: addresses of tar shards or of manifests (paths, patterns, `s3://`, `https://`, ...),
        alone or in a list; `"hf://datasets/org/name"`; a dataset of `datasets`; a `Source`, which
        is returned as it is; an object with the members of one, which is wrapped; or any iterable
        of examples or `(image, text)` pairs.
      storage: how addresses are read; of no use for anything else.

    Raises:
      ConfigError: for anything else, with the argument to pass instead.
      UnsafeDataError: for an address outside the allow-list.
      ShardUnavailableError: for a shard that does not exist.
    """
    # The order matters: a repository is also a string, a `Dataset` is also iterable, and a
    # `DataLoader` too. Anything that is left is taken for an iterable of examples.
    if is_repository(source):
        return HuggingFaceSource(source, storage=storage)
    if isinstance(source, (str, os.PathLike)) or _is_list_of_paths(source):
        return TarSource(source, storage=storage)
    if storage is not None:
        raise ConfigError(
            f"storage=... says how addresses are read, but source is a {type(source).__name__}. "
            "Pass storage to the source itself, where it takes one, or leave it out."
        )
    if isinstance(source, Source):
        return source
    if is_source(source):
        return _ForeignSource(source)
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


def is_source(value: Any) -> bool:
    """Returns whether an object is a source already: the user made it, and the user closes it."""
    return isinstance(value, Source) or all(hasattr(value, name) for name in _REQUIRED)


class _ForeignSource(WrappedSource):
    """Makes a source of an object that has its members but not its class; some may be absent."""

    _source: Any

    @property
    def num_examples(self) -> Sequence[int] | None:
        """Examples of each shard, if the object says so."""
        return getattr(self._source, "num_examples", None)

    def shard_content(self, shard: int) -> tuple[int, str] | None:
        """Returns the object's answer, or None."""
        return self._source.shard_content(shard) if self._has("shard_content") else None

    def take_counts(self) -> dict[str, int]:
        """Returns the object's counts since the last call, or none."""
        return self._source.take_counts() if self._has("take_counts") else {}

    def close(self) -> None:
        """Closes the object, if it can be closed."""
        if self._has("close"):
            self._source.close()

    def __repr__(self) -> str:
        return repr(self._source)

    def _has(self, name: str) -> bool:
        return hasattr(self._source, name)


def _is_list_of_paths(source: Any) -> bool:
    if not isinstance(source, (list, tuple)):
        return False
    if not source:
        raise ConfigError("source is empty: pass paths of tar shards, or examples.")
    return isinstance(source[0], (str, os.PathLike))
