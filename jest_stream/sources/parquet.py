"""Reads Parquet files row by row; resuming reads the row group it stopped in and no earlier one.

In: addresses of Parquet files with a column of images and one of texts. Out: examples; the offset
after each is the number of the next row. Runs where lanes are read. No threads, ours or Arrow's;
one open file per reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from jest_stream.config import StorageConfig
from jest_stream.errors import (
    BadExampleError,
    JESTError,
    ShardError,
    ShardTruncatedError,
    UnsafeDataError,
)
from jest_stream.sources.fields import Fields, example_of, fields_of
from jest_stream.sources.stored import StoredSource
from jest_stream.storage import redacted
from jest_stream.types import Example, ObjectInfo

_MAGIC = b"PAR1"
_BATCH_ROWS = 32  # decoded at a time: of 1 MB images, 32 MB for each lane
_PAGE_BUFFER_BYTES = 1 << 20
_MAX_METADATA_BYTES = 1 << 30  # of a row group's columns beside the images
_MAX_EXPANSION = 1000  # times that they may unpack to, beyond a size that never hurts
_HARMLESS_BYTES = 64 << 20


class ParquetFile(NamedTuple):
    """A Parquet file, read as one shard."""

    url: str
    """Path or address."""
    info: ObjectInfo | None
    """Its length and version; None to ask the store."""
    key: str
    """Beginning of the keys of its examples."""


class ParquetSource(StoredSource):
    """Reads Parquet files with a column of images and one of texts, each file as a shard.

    Args:
      files: the shards.
      image_key: column of the images; None to find it by the schema of the first file.
      text_key: column of the texts, likewise.
      storage: how remote files are read.
      max_example_bytes: most bytes of an image.

    Raises:
      ConfigError: if the columns cannot be told.
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
        super().__init__(storage)
        self._files: list[ParquetFile] = list(files)
        self._max_example_bytes = max_example_bytes
        self._num_examples: list[int] | None = None
        with self._closed_on_error(), self._opened(0) as (_, reader):
            title = f"parquet file {self.shard_name(0)!r}"
            self._fields = fields_of(reader.schema_arrow, image_key, text_key, title)

    @property
    def fingerprint(self) -> str:
        """The names of the files and the columns that are read."""
        names = ",".join(file.key for file in self._files)
        return f"{names}|{self._fields.image}|{self._fields.text}"

    @property
    def fields(self) -> Fields:
        """The columns that are read of each file."""
        return self._fields

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

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples from row `offset` on: see `types.Source`.

        Raises:
          ShardTruncatedError: if the file was cut off.
          ShardError: if it is no Parquet file, damaged, or has not the columns of the first.
          ShardUnavailableError: if it cannot be opened.
          UnsafeDataError: for an image larger than `max_example_bytes`, or a row group that
            unpacks to far more bytes than it takes.
        """
        del index  # the offset is the number of the row
        name, prefix = self.shard_name(shard), self._files[shard].key
        with self._opened(shard) as (file, reader):
            self._check_columns(reader, name)
            rows = _rows(file, reader, self._fields, offset, name)
            while True:
                with _arrow_errors(file, name):
                    step = next(rows, None)
                if step is None:
                    return
                row, values = step
                key = f"{prefix}/{row}"
                example = example_of(values, self._fields, key=key, shard=name)
                if isinstance(example, dict):
                    self._check_size(example, name, row)
                yield example, row + 1

    @contextmanager
    def _opened(self, shard: int) -> Iterator[tuple[BinaryIO, Any]]:
        """Opens a file and reads its footer."""
        from pyarrow import parquet

        name = self.shard_name(shard)
        with self._storage.open(self._files[shard].url, self._files[shard].info) as file:
            with _arrow_errors(file, name):
                reader = parquet.ParquetFile(file, buffer_size=_PAGE_BUFFER_BYTES, pre_buffer=False)
            yield file, reader

    def _check_columns(self, reader: Any, name: str) -> None:
        leaves = {reader.schema.column(i).path for i in range(len(reader.schema))}
        for leaf in (self._fields.image_leaf, self._fields.text):
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
    file: BinaryIO, reader: Any, fields: Fields, start: int, name: str
) -> Iterator[tuple[int, dict[str, Any] | UnicodeDecodeError]]:
    """Yields the number and the values of each row from `start` on."""
    from pyarrow import parquet

    metadata = reader.metadata
    # Two readers of one file, since columns differ in size:
    # 1. Images are large: `reader` is buffered and fetches them page by page.
    # 2. Texts and metadata are small: `small` fetches the whole chunk of each column at once.
    small = parquet.ParquetFile(file, metadata=metadata, pre_buffer=False)
    present = set(reader.schema_arrow.names)
    others = [column for column in fields.metadata if column in present]
    # Row groups before `start` are not fetched. With groups of 8 rows and start=19, groups 0 and 1
    # (rows 0 to 15) are passed over, and group 2 gives rows 19 to 23.
    first = 0
    for group in range(metadata.num_row_groups):
        num_rows = metadata.row_group(group).num_rows
        if start < first + num_rows:
            _check_expansion(metadata.row_group(group), fields, name)
            count = 0
            images = _values(reader, group, [fields.image_leaf])
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
    except UnicodeDecodeError:  # raised before the first row: find the rows that are to blame
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _check_expansion(group: Any, fields: Fields, name: str) -> None:
    """Refuses a row group that by its own footer unpacks to more than memory can hold."""
    # A page of one repeated byte packs to next to nothing: a small file could fill the memory.
    # The footer tells before a page is unpacked.
    packed = unpacked = metadata_bytes = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema == fields.image_leaf:
            packed, unpacked = column.total_compressed_size, column.total_uncompressed_size
        elif any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in fields.metadata):
            metadata_bytes += column.total_uncompressed_size
    if metadata_bytes > _MAX_METADATA_BYTES:
        raise UnsafeDataError(
            f"parquet file {name!r} holds {metadata_bytes:,} bytes of metadata in one row group, "
            f"the limit is {_MAX_METADATA_BYTES:,}. Write it with smaller row groups."
        )
    if unpacked > _HARMLESS_BYTES and unpacked > _MAX_EXPANSION * packed:
        raise UnsafeDataError(
            f"parquet file {name!r} unpacks {packed:,} bytes of {fields.image_leaf!r} to "
            f"{unpacked:,}, as no images do. Do not trust this file."
        )


@contextmanager
def _arrow_errors(file: BinaryIO, name: str) -> Iterator[None]:
    """Turns Arrow's error about a bad file into a `ShardError` that names the file."""
    import pyarrow

    try:
        yield
    except JESTError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError, ValueError) as error:
        if isinstance(error, pyarrow.ArrowMemoryError):
            raise  # no fault of the file
        raise _damaged(file, name, error) from error


def _damaged(file: BinaryIO, name: str, error: Exception) -> ShardError:
    """Returns the error of an unreadable file: it was cut off, is damaged, or no Parquet file."""
    file.seek(0)
    head = file.read(len(_MAGIC))
    num_bytes = file.seek(0, 2)
    file.seek(max(0, num_bytes - len(_MAGIC)))
    tail = file.read(len(_MAGIC))
    # A Parquet file begins and ends with "PAR1". There are three cases: 1. it lacks the second, or
    # is too short for two and a footer: cut off. 2. It has both: damaged within. 3. It lacks the
    # first: another format.
    if head == _MAGIC and tail != _MAGIC or num_bytes < 3 * len(_MAGIC):
        return ShardTruncatedError(
            f"parquet file {name!r} ends at byte {num_bytes:,} without its footer: it was cut off. "
            "Write or fetch it again, or take it out of the source.",
            shard=name,
            offset=num_bytes,
        )
    fault = "is damaged" if head == _MAGIC else "is no parquet file"
    reason = " ".join(redacted(str(error)).split())[:300]
    return ShardError(
        f"parquet file {name!r} {fault} ({type(error).__name__}: {reason}). Write or fetch it "
        "again, or take it out of the source.",
        shard=name,
    )
