"""Reads repositories of the Hugging Face Hub, and objects of `datasets`.

In: `"hf://datasets/org/name"`, a `datasets.IterableDataset` or a `datasets.Dataset`. Out: examples
as every source gives them, undecoded. Chooses the reader, in the training process: ours for the
tars and Parquet files of a repository, which notices damage and seeks; that of `datasets` for its
own objects.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.sources.hub import HubFiles, find_files, parse_repository
from jest_stream.sources.parquet import ParquetFile, ParquetSource
from jest_stream.sources.stream import StreamSource
from jest_stream.sources.table import TableSource
from jest_stream.sources.tar import TarSource
from jest_stream.types import Source, WrappedSource


class HuggingFaceSource(WrappedSource):
    """Reads image-text pairs of the Hugging Face Hub, or of a dataset of the `datasets` library.

    A repository of tars (webdataset) or Parquet files is resolved once, where the source is made:
    the revision becomes a commit, the files of the split are listed, and workers are sent the
    result. From then on it is read like any shards: strictly (a file that was cut is an error) and
    resumed exactly, tars by byte offset, Parquet files by row. Nothing of a repository is executed.

    An object of `datasets` is read by `datasets`, and resumes as exactly as that allows:

    - A `Dataset` is read by row, and resumes exactly.
    - An `IterableDataset` resumes at the position within each of its shards, by passing over the
      examples before (`datasets` reads them again). That is exact as long as the dataset gives the
      same examples in the same order every time: not with a random `map` or an unseeded
      `interleave_datasets`. After `take`, `skip`, `repeat` or `interleave_datasets` it is one
      shard, since its shards alone would give other examples. Its files are trusted: `datasets`
      takes a tar that was cut between two members for a shorter one, and opens some members
      itself: npy and npz without objects, pth by `torch.load` of weights only. Pass the
      repository's name instead where you can.
    - A dataset after `.shuffle()` is refused: its buffer is in no checkpoint. Shards are shuffled
      and mixed here. So is one after `split_dataset_by_node`: lanes are dealt to ranks here.

    Examples hold `image` (the file's bytes), `text`, and the columns that are numbers, strings, or
    lists or structs of these, under their own names; of tars, all members. Null values are left
    out, so that a null caption is a bad example.

    Args:
      dataset_or_name: `"hf://datasets/org/name"`, perhaps with `@revision`; or `"org/name"`; or a
        `datasets.IterableDataset` or `datasets.Dataset`.
      split: of a repository.
      config: configuration of a repository that has several.
      revision: branch, tag or commit of a repository. Name a commit to be able to resume after the
        branch has moved.
      token: for a private or gated repository. Default: that of the environment (`HF_TOKEN`, or
        `hf auth login`), which never leaves the processes that read.
      image_key: column of the images; of tables only. Default: the column that is declared to hold
        images, or the only one that can.
      text_key: column of the texts, likewise. A column within a struct is written `"meta.caption"`.
      storage: how a repository is read; `StorageConfig(options={"hf": {"endpoint": ...}})` for a
        Hub of your own.

    Raises:
      ConfigError: if there is no such repository, revision, configuration, split or column, it may
        not be read, it needs a script, or the dataset has no order; with a remedy.
      ShardUnavailableError: if the Hub cannot be reached.
    """

    def __init__(
        self,
        dataset_or_name: Any,
        *,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        image_key: str | None = None,
        text_key: str | None = None,
        storage: StorageConfig | None = None,
    ) -> None:
        # An object of `datasets` is read by `datasets`; a name means a repository, listed now.
        keys: dict[str, str | None] = {"image_key": image_key, "text_key": text_key}
        self._files: HubFiles | None = None
        if not isinstance(dataset_or_name, str | os.PathLike):
            super().__init__(_source_of(dataset_or_name, keys))
            return
        if (found := parse_repository(address := str(dataset_or_name))) is None:
            raise ConfigError(
                f"{address!r} is no repository of datasets: it is written hf://datasets/org/name, "
                "or hf://datasets/org/name@revision. Single tars are read by TarSource."
            )
        name, written_revision = found
        if revision and written_revision and revision != written_revision:
            raise ConfigError(
                f"revision={revision!r} contradicts the address, which says {written_revision!r}. "
                "Name it once."
            )
        storage = storage or StorageConfig()
        if token is not None:
            hub = {**storage.options.get("hf", {}), "token": token}
            storage = replace(storage, options={**storage.options, "hf": hub})
        self._files = find_files(
            name,
            split=split,
            config=config,
            revision=revision or written_revision,
            storage=storage,
        )
        super().__init__(_reader_of(self._files, keys, storage))

    @property
    def commit(self) -> str | None:
        """The commit that a repository is read at; None for an object."""
        return None if self._files is None else self._files.commit

    @property
    def fingerprint(self) -> str:
        """Of a repository: names, lengths and ids of the files, and the columns; not the commit."""
        # A repository's own digest holds the object ids of the files, which name their content. Of
        # Parquet files the columns count too: another column makes other examples of one file.
        if self._files is None:
            return self._source.fingerprint
        if self._files.kind == "tar":
            return self._files.digest
        return f"{self._files.digest}|{self._source.fingerprint.partition('|')[2]}"

    def shard_content(self, shard: int) -> tuple[int, str] | None:
        """Returns the length of a file of a repository; None of an object, which has none."""
        if self._files is None:
            return None
        # Not the commit: it moves with every change of the repository, to other files too.
        return self._files.infos[shard].num_bytes, ""

    def __repr__(self) -> str:
        if self._files is None:
            return f"<HuggingFaceSource {self.num_shards} shards | {self.shard_name(0)} ...>"
        where = f"{self._files.repository}@{self._files.commit[:12]}"
        return f"<HuggingFaceSource {where} | {self.num_shards} {self._files.kind} files>"


def is_dataset(source: Any) -> bool:
    """Returns whether an object is a `Dataset` or `IterableDataset` of `datasets`."""
    datasets = sys.modules.get("datasets")  # where it is not imported, there is no object of it
    return datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset)


def is_repository(source: Any) -> bool:
    """Returns whether an address names a repository of datasets, not files within one."""
    return (
        isinstance(source, str)
        and source.lower().startswith("hf://datasets/")
        and parse_repository(source) is not None
    )


def _reader_of(
    files: HubFiles, keys: Mapping[str, str | None], storage: StorageConfig
) -> TarSource | ParquetSource:
    """Returns the source that reads the files of a repository."""
    if files.kind == "tar":
        if given := [f"{name}={key!r}" for name, key in keys.items() if key is not None]:
            raise ConfigError(
                f"{', '.join(given)} name columns of tables, but this repository holds tars. Pass "
                "them to JESTDataset, where they name members."
            )
        return TarSource(files.urls, storage=storage)
    shards = [
        ParquetFile(url, info, path.rpartition(".")[0])
        for url, info, path in zip(files.urls, files.infos, files.paths, strict=True)
    ]
    return ParquetSource(
        shards, image_key=keys["image_key"], text_key=keys["text_key"], storage=storage
    )


def _source_of(dataset: Any, keys: Mapping[str, str | None]) -> Source:
    datasets = sys.modules.get("datasets")
    if isinstance(dataset, Mapping) and dataset and all(map(is_dataset, dataset.values())):
        raise ConfigError(
            f"the dataset has the splits {', '.join(map(str, dataset))}: pass one of them, such as "
            f"dataset[{next(iter(dataset))!r}]."
        )
    if datasets is None or not is_dataset(dataset):
        raise ConfigError(
            f"HuggingFaceSource takes 'hf://datasets/org/name', a datasets.IterableDataset or a "
            f"datasets.Dataset, got a {type(dataset).__name__}."
        )
    if isinstance(dataset, datasets.IterableDataset):
        return StreamSource(dataset, image_key=keys["image_key"], text_key=keys["text_key"])
    return TableSource(dataset, image_key=keys["image_key"], text_key=keys["text_key"])
