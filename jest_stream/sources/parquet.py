"""Parquet files: rows by number, so that resuming reads the row group it stopped in, no other.

In: addresses of Parquet files with a column of images and one of texts. Out: examples, the offset
behind each being the number of its row. The columns of metadata of a row group are fetched whole,
since they are small; the images are streamed page by page. No threads, ours or Arrow's; one open
file per reader.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from jest_stream.config import StorageConfig
from jest_stream.errors import (
    BadExampleError,
    ConfigError,
    JESTError,
    ShardError,
    ShardTruncatedError,
    UnsafeDataError,
)
from jest_stream.sources.columns import Columns, columns_of, example_of, unreadable_text
from jest_stream.storage import Storage, redacted
from jest_stream.types import Example, ObjectInfo

_MAGIC = b"PAR1"
_BATCH_ROWS = 32  # decoded at a time: of 1 MB images, 32 MB for each lane
_PAGE_BUFFER_BYTES = 1 << 20
_MAX_METADATA_BYTES = 1 << 30  # of a row group's columns beside the images
_MAX_EXPANSION = 1000  # times that they may unpack to, beyond a size that never hurts
_HARMLESS_BYTES = 64 << 20


class ParquetFile(NamedTuple):
    """One shard."""

    url: str
    """Path or address."""
    info: ObjectInfo | None
    """What it is known to be; None to ask where it lies."""
    key: str
    """What the keys of its examples begin with."""


class ParquetSource:
    """Parquet files with a column of images and one of texts, each file a shard.

    Args:
      files: the shards.
      image_key: column of the images; None to find it by the schema of the first file.
      text_key: column of the texts, likewise.
      storage: how remote files are read.
      max_example_bytes: most bytes of an image.

    Raises:
      ConfigError: if pyarrow is missing, or the columns cannot be told.
      ShardError: if the first file cannot be read.
    """

    def __init__(
        self,
        files: Sequence[ParquetFile],
        *,
        image_key: str | None = None,
        text_key: str | None = None,
        storage: StorageConfig | None = None,
        max_example_bytes: int = 256 << 20,
    ) -> None:
        self._files = list(files)
        self._storage = Storage(storage or StorageConfig())
        self._max_example_bytes = max_example_bytes
        self._num_examples: list[int] | None = None
        try:
            with self._opened(0) as (file, reader):
                del file
                self._columns = columns_of(
                    reader.schema_arrow, image_key, text_key, f"parquet file {self.shard_name(0)!r}"
                )
        except BaseException:
            self._storage.close()  # the error, as long as somebody holds it, holds this
            raise

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return len(self._files)

    @property
    def fingerprint(self) -> str:
        """The names of the files and the columns that are read."""
        names = ",".join(file.key for file in self._files)
        return f"{names}|{self._columns.image}|{self._columns.text}"

    @property
    def columns(self) -> Columns:
        """What is read of each file."""
        return self._columns

    @property
    def num_examples(self) -> Sequence[int]:
        """Rows of each file; the first access reads the footers of all of them."""
        if self._num_examples is None:
            counts = []
            for shard in range(self.num_shards):
                with self._opened(shard) as (_, reader):
                    counts.append(int(reader.metadata.num_rows))
            self._num_examples = counts
        return self._num_examples

    def shard_name(self, shard: int) -> str:
        """Returns the path or address of a file, without secrets."""
        return redacted(self._files[shard].url)

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples from row `offset` on: see `types.Source`.

        Raises:
          ShardTruncatedError: if the file was cut off.
          ShardError: if it is no Parquet file, damaged, or has not the columns of the first.
          ShardUnavailableError: if it cannot be opened.
          UnsafeDataError: for an image larger than `max_example_bytes`, or what unpacks to far
            more than it takes.
        """
        del index  # the row says it all
        name, prefix = self.shard_name(shard), self._files[shard].key
        with self._opened(shard) as (file, reader):
            self._check_columns(reader, name)
            rows = _rows(file, reader, self._columns, offset, name)
            while True:
                with _arrow_errors(file, name):
                    step = next(rows, None)
                if step is None:
                    return
                row, values = step
                key = f"{prefix}/{row}"
                if isinstance(values, UnicodeDecodeError):
                    yield unreadable_text(key, name, values), row + 1
                    continue
                example = example_of(values, self._columns, key=key, shard=name)
                if isinstance(example, dict):
                    self._check_size(example, name, row)
                yield example, row + 1

    def take_counts(self) -> dict[str, int]:
        """Returns what storage counted in this process since the last call."""
        return self._storage.take_counts()

    def close(self) -> None:
        """Closes what this process has open, connections too; reading opens it anew."""
        self._storage.close()

    def __repr__(self) -> str:
        return f"<ParquetSource {self.num_shards} files | {self.shard_name(0)} ...>"

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[BinaryIO, Any]]:
        """Opens a file and reads its footer."""
        name = self.shard_name(shard)
        parquet = _pyarrow_parquet()
        with self._storage.open(self._files[shard].url, self._files[shard].info) as file:
            with _arrow_errors(file, name):
                reader = parquet.ParquetFile(file, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
            yield file, reader

    def _check_columns(self, reader: Any, name: str) -> None:
        leaves = {reader.schema.column(i).path for i in range(len(reader.schema))}
        for leaf in (self._columns.image_leaf, self._columns.text):
            if leaf not in leaves:
                raise ShardError(
                    f"parquet file {name!r} has no column {leaf!r}, which the first file "
                    f"{self.shard_name(0)!r} has; it has {', '.join(sorted(leaves))[:500]}. Write "
                    "it again, or take it out of the source.",
                    shard=name,
                )

    def _check_size(self, example: Example, name: str, row: int) -> None:
        image = example.get("image")
        if isinstance(image, bytes) and len(image) > self._max_example_bytes:
            raise UnsafeDataError(
                f"the image in row {row} of parquet file {name!r} holds {len(image):,} bytes, the "
                f"limit is {self._max_example_bytes:,}. Do not trust this file."
            )


def _rows(
    file: BinaryIO, reader: Any, columns: Columns, start: int, name: str
) -> Iterator[tuple[int, dict[str, Any] | UnicodeDecodeError]]:
    """Yields the number and the values of each row from `start` on."""
    metadata = reader.metadata
    # Unbuffered: fetches the chunk of each column at once, in one place of the file.
    small = _pyarrow_parquet().ParquetFile(file, metadata=metadata, pre_buffer=False)
    present = set(reader.schema_arrow.names)
    others = [column for column in columns.metadata if column in present]
    first = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if start < first + num_rows:
            _check_expansion(metadata.row_group(group), columns, name)
            count = 0
            images = _values(reader, group, [columns.image_leaf])
            texts = _values(small, group, others)
            for image, values in zip(images, texts, strict=True):
                row, count = first + count, count + 1
                if row < start:
                    continue
                if isinstance(values, UnicodeDecodeError):
                    yield row, values
                else:
                    yield row, image | values
            if count != num_rows:
                raise ShardError(
                    f"parquet file {name!r} holds {count:,} rows in row group {group}, its footer "
                    f"says {num_rows:,}. Write it again, or take it out of the source.",
                    shard=name,
                    offset=first + count,
                )
        first += num_rows


def _values(reader: Any, group: int, columns: list[str]) -> Iterator[Any]:
    """Yields the values of each row of a row group, as a dict by column."""
    for batch in reader.iter_batches(
        _BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False
    ):
        yield from rows_of(batch)


def rows_of(batch: Any) -> Iterator[Any]:
    """Yields each row of an Arrow batch or table as a dict, or the error that its text is."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # raised before the first row: find which one it is
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _check_expansion(group: Any, columns: Columns, name: str) -> None:
    """Refuses a row group that says itself that it unpacks to what memory cannot hold."""
    packed = unpacked = metadata_bytes = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == columns.image_leaf:
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        elif any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in columns.metadata):
            metadata_bytes += column.total_uncompressed_size
    if metadata_bytes > _MAX_METADATA_BYTES:
        raise UnsafeDataError(
            f"parquet file {name!r} holds {metadata_bytes:,} bytes of metadata in one row group, "
            f"the limit is {_MAX_METADATA_BYTES:,}. Write it with smaller row groups."
        )
    if unpacked > _HARMLESS_BYTES and unpacked > _MAX_EXPANSION * packed:
        raise UnsafeDataError(
            f"parquet file {name!r} unpacks {packed:,} bytes of {columns.image_leaf!r} to "
            f"{unpacked:,}, as no images do. Do not trust this file."
        )


@contextmanager
def _arrow_errors(file: BinaryIO, name: str) -> Iterator[None]:
    """Turns what Arrow says of a bad file into a `ShardError` that names it."""
    arrow = importlib.import_module("pyarrow")
    try:
        yield
    except JESTError:
        raise
    except (arrow.ArrowException, OSError, EOFError, ValueError) as error:
        if isinstance(error, arrow.ArrowMemoryError):
            raise
        raise _damaged(file, name, error) from error


def _damaged(file: BinaryIO, name: str, error: Exception) -> ShardError:
    """Returns what a file is that cannot be read: cut off, damaged, or another format."""
    file.seek(0)
    head = file.read(len(_MAGIC))
    num_bytes = file.seek(0, 2)
    file.seek(max(0, num_bytes - len(_MAGIC)))
    tail = file.read(len(_MAGIC))
    if head == _MAGIC and tail != _MAGIC or num_bytes < 3 * len(_MAGIC):
        return ShardTruncatedError(
            f"parquet file {name!r} ends at byte {num_bytes:,} without its footer: it was cut off. "
            "Write or fetch it again, or take it out of the source.",
            shard=name,
            offset=num_bytes,
        )
    what = "is damaged" if head == _MAGIC else "is no parquet file"
    reason = " ".join(redacted(str(error)).split())[:300]
    return ShardError(
        f"parquet file {name!r} {what} ({type(error).__name__}: {reason}). Write or fetch it "
        "again, or take it out of the source.",
        shard=name,
    )


def _pyarrow_parquet() -> Any:
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            f"reading parquet files needs the package pyarrow, which cannot be imported ({error}). "
            "Install it: pip install pyarrow"
        ) from error
