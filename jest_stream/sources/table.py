"""Reads a map-style `datasets.Dataset`: rows by position, in contiguous parts.

In: a dataset, in memory or mapped from disk. Out: examples with undecoded images; the offset after
each is the number of the next row within its part. Rows are read as they are stored. No threads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from jest_stream.errors import BadExampleError, ConfigError
from jest_stream.sources.fields import example_of, fields_of
from jest_stream.sources.parquet import rows_of
from jest_stream.types import Example, Source

_BATCH_ROWS = 32  # read at a time
_ROWS_PER_PART = 256  # neighbours are often alike: short parts mix better
_MIN_PARTS, _MAX_PARTS = 64, 4096


class TableSource(Source):
    """Reads the rows of a `datasets.Dataset`, in up to 4,096 contiguous parts, each a shard.

    Args:
      dataset: the dataset; its order, selection and columns count, its output format does not.
      image_key: column of the images; None to find it.
      text_key: column of the texts, likewise.

    Raises:
      ConfigError: if the columns cannot be told, there is no row, or the dataset transforms its
        rows when they are read.
    """

    def __init__(self, dataset: Any, *, image_key: str | None, text_key: str | None) -> None:
        if dataset.format["type"] == "custom":
            raise ConfigError(
                "the dataset has a transform of its own (set_transform), which would not be run: "
                "rows are read as they are stored. Pass dataset.with_format(None), and transform= "
                "to JESTDataset; or IterableSource(dataset), which runs it."
            )
        if len(dataset) == 0:
            raise ConfigError("the dataset has no rows.")
        self._dataset = dataset.with_format("arrow")
        self._fields = fields_of(dataset.features.arrow_schema, image_key, text_key, "the dataset")
        # 1,000 rows are 64 parts of 15 or 16 rows, 100,000 are 390 of 256 or 257, and more than
        # 1,048,576 are 4,096 longer ones.
        num_rows = len(dataset)
        num_parts = min(max(num_rows // _ROWS_PER_PART, _MIN_PARTS), _MAX_PARTS, num_rows)
        self._bounds = [part * num_rows // num_parts for part in range(num_parts + 1)]
        self._fingerprint = self._named_by()

    @property
    def num_shards(self) -> int:
        """Number of parts."""
        return len(self._bounds) - 1

    @property
    def num_examples(self) -> Sequence[int]:
        """Rows of each part."""
        return [end - start for start, end in zip(self._bounds[:-1], self._bounds[1:], strict=True)]

    @property
    def fingerprint(self) -> str:
        """The number of rows, the columns, and the first, middle and last row."""
        return self._fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the rows of a part."""
        return f"dataset[{self._bounds[shard]}:{self._bounds[shard + 1]}]"

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples from row `offset` of the part on: see `types.Source`."""
        del index
        start, end = self._bounds[shard], self._bounds[shard + 1]
        name = self.shard_name(shard)
        dataset = self._dataset.select_columns(list(self._fields.columns))
        row = start + offset
        while row < end:
            for values in rows_of(dataset[row : min(row + _BATCH_ROWS, end)]):
                example = example_of(
                    values, self._fields, key=str(row), shard=name, opens_paths=True
                )
                row += 1
                yield example, row - start

    def __repr__(self) -> str:
        return f"<TableSource {self._bounds[-1]} rows in {self.num_shards} parts>"

    def _named_by(self) -> str:
        """Returns the fingerprint. `Dataset._fingerprint` depends on when files were written."""
        digest = hashlib.blake2b(digest_size=16)
        # Checkpoints and caches hold fingerprints: the text stays that of the first release, when
        # the class was called Columns.
        columns = repr(self._fields).replace("Fields(", "Columns(", 1)
        digest.update(f"{self._bounds[-1]}|{self._dataset.features}|{columns}".encode())
        for row in {0, self._bounds[-1] // 2, self._bounds[-1] - 1}:
            for name in self._fields.columns:
                digest.update(repr(self._dataset[row : row + 1][name].to_pylist()).encode())
        return digest.hexdigest()
