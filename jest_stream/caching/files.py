"""Arrow files of embeddings: written row by row, read without copying.

Columns: `key` (string), `image` and `text` (fixed-size lists of D float16); record batches of fixed
size, no compression. Any Arrow reader takes them: `pyarrow.ipc.open_file(path).read_all()`. What a
file holds depends on the rows alone, not on when they came. No threads.

Shapes: n: rows of a record batch, D: embedding dimension.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jest_stream.caching.manifest import damaged
from jest_stream.errors import ConfigError
from jest_stream.storage import NewFile

ROWS_PER_BATCH = 8192
"""Of a record batch. A reader has the keys of one at a time in memory."""


class Batch(NamedTuple):
    """One record batch."""

    keys: list[str]
    image: Tensor
    """`[n, D]` float16, unit norm; the mapped file itself."""
    text: Tensor
    """`[n, D]` likewise."""


class EmbeddingsWriter:
    """Writes one Arrow file.

    Args:
      file: where to; committed or aborted with this.
      dimension: D.
    """

    def __init__(self, file: NewFile, dimension: int) -> None:
        arrow = arrow_or_error()
        self._arrow = arrow
        self._file = file
        self.dimension = dimension
        """D."""
        self._schema = arrow.schema(
            [
                arrow.field("key", arrow.string(), nullable=False),
                arrow.field("image", arrow.list_(arrow.float16(), dimension), nullable=False),
                arrow.field("text", arrow.list_(arrow.float16(), dimension), nullable=False),
            ]
        )
        self._sink = arrow.PythonFile(_Sink(file), mode="w")
        self._writer = arrow.ipc.new_file(self._sink, self._schema)
        self._keys: list[str] = []
        self._rows: list[tuple[Tensor, Tensor]] = []
        self.num_examples = 0
        """Rows so far."""

    def add(self, keys: Sequence[str], image: Tensor, text: Tensor) -> None:
        """Adds rows: `[n, D]` float16 on the CPU."""
        self._keys += keys
        self._rows.append((image, text))
        self.num_examples += len(keys)
        while len(self._keys) >= ROWS_PER_BATCH:
            self._write(ROWS_PER_BATCH)

    def commit(self) -> int:
        """Puts the file into its place; returns its length in bytes."""
        try:
            if self._keys:
                self._write(len(self._keys))
            self._writer.close()
            num_bytes = self._file.num_bytes
        except BaseException:
            self.abort()
            raise
        self._file.commit()
        return num_bytes

    def abort(self) -> None:
        """Drops what was written."""
        self._file.abort()

    def _write(self, num_rows: int) -> None:
        arrow = self._arrow
        towers = [torch.cat(column) for column in zip(*self._rows, strict=True)]
        columns = [arrow.array(self._keys[:num_rows], arrow.string())]
        for rows, name in zip(towers, ("image", "text"), strict=True):
            flat = arrow.array(rows[:num_rows].contiguous().numpy().ravel())
            kind = self._schema.field(name).type
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, type=kind))
        self._writer.write_batch(arrow.record_batch(columns, schema=self._schema))
        self._keys = self._keys[num_rows:]
        self._rows = [(towers[0][num_rows:], towers[1][num_rows:])]


class EmbeddingsFile:
    """One Arrow file, mapped.

    Args:
      data: its bytes, as `Storage.mapped` returns them.
      url: what to call it in messages.
      num_examples: rows that it must have.
      dimension: D that it must have.

    Raises:
      CacheDamagedError: if it is anything else.
    """

    def __init__(self, data: Any, url: str, *, num_examples: int, dimension: int) -> None:
        arrow = arrow_or_error()
        self._data = data
        self._url = url
        self._dimension = dimension
        try:
            buffer = arrow.py_buffer(data)
            self._base: int = buffer.address
            self._reader = arrow.ipc.open_file(arrow.BufferReader(buffer))
            wanted = arrow.list_(arrow.float16(), dimension)
            names, kinds = self._reader.schema.names, self._reader.schema.types
            if names != ["key", "image", "text"] or kinds != [arrow.string(), wanted, wanted]:
                raise damaged(url, f"has the columns {self._reader.schema.to_string()!r}")
            batches = [
                self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)
            ]
        except (arrow.ArrowException, OSError) as error:
            raise damaged(url, f"is no whole Arrow file: {error}", offset=len(data)) from error
        self.starts: list[int] = [0, *np.cumsum(batches).tolist()]
        """Row with which each record batch begins; then the number of rows."""
        if self.starts[-1] != num_examples:
            raise damaged(url, f"has {self.starts[-1]:,} rows, the manifest says {num_examples:,}")

    def batch(self, number: int) -> Batch:
        """Returns one record batch; its rows are the mapped file.

        Raises:
          CacheDamagedError: if its bytes cannot be what was written.
        """
        arrow = arrow_or_error()
        try:
            found = self._reader.get_batch(number)
            found.column(0).validate(full=True)
            keys: list[str] = found.column(0).to_pylist()
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(self._url, f"is damaged in record batch {number}: {error}") from error
        return Batch(keys, self._tower(found.column(1)), self._tower(found.column(2)))

    def _tower(self, column: Any) -> Tensor:
        num_values = len(column) * self._dimension
        start = column.values.buffers()[1].address - self._base
        if column.null_count or not 0 <= start <= len(self._data) - 2 * num_values:
            raise damaged(self._url, "has a column that leads out of it")
        rows = np.frombuffer(self._data, np.float16, num_values, start)
        return torch.from_numpy(rows).view(len(column), self._dimension)


def key_hashes(keys: Iterable[str]) -> Any:
    """Returns `[n]` uint64, by which keys are looked up; the same everywhere and always."""
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(b"".join(digests), np.uint64)


class KeyIndex:
    """Finds keys among many: their hashes, sorted, and where each is.

    Args:
      hashes: `[n]` uint64, sorted.
      parts: `[n]` int32, the part of each.
      rows: `[n]` int32, its row there.
    """

    def __init__(self, hashes: Any, parts: Any, rows: Any) -> None:
        self._hashes, self._parts, self._rows = hashes, parts, rows

    def places(self, key: str) -> list[tuple[int, int]]:
        """Returns part and row of every key of that hash: nearly always one or none."""
        wanted = key_hashes([key])[0]
        first = int(np.searchsorted(self._hashes, wanted))
        found = []
        while first < len(self._hashes) and self._hashes[first] == wanted:
            found.append((int(self._parts[first]), int(self._rows[first])))
            first += 1
        return found


def sorted_index(hashes: Any, parts: Any, rows: Any) -> tuple[Any, Any, Any]:
    """Returns the three columns of an index, sorted by hash."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], parts[order].astype(np.int32), rows[order].astype(np.int32)


def write_index(file: NewFile, columns: tuple[Any, Any, Any]) -> None:
    """Writes the columns of an index as an Arrow file: `hash`, `part`, `row`."""
    arrow = arrow_or_error()
    batch = arrow.record_batch([arrow.array(c) for c in columns], names=["hash", "part", "row"])
    try:
        with arrow.ipc.new_file(arrow.PythonFile(_Sink(file), mode="w"), batch.schema) as writer:
            writer.write_batch(batch)
    except BaseException:
        file.abort()
        raise
    file.commit()


def read_index(data: Any, url: str) -> KeyIndex:
    """Returns an index whose columns are the mapped file."""
    arrow = arrow_or_error()
    try:
        batch = arrow.ipc.open_file(arrow.BufferReader(arrow.py_buffer(data))).get_batch(0)
        if batch.schema.names != ["hash", "part", "row"]:
            raise damaged(url, f"has the columns {batch.schema.names}")
        hashes, parts, rows = (column.to_numpy() for column in batch.columns)
    except (arrow.ArrowException, OSError) as error:
        raise damaged(url, f"is no whole Arrow file: {error}", offset=len(data)) from error
    return KeyIndex(hashes, parts, rows)


def arrow_or_error() -> Any:
    """Returns the package pyarrow; `ConfigError` with what to install where it is missing."""
    try:
        importlib.import_module("pyarrow.ipc")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ConfigError(
            f"a reference cache needs the package pyarrow ({error}). Install it: "
            'pip install "jest_stream[cache]"'
        ) from error


class _Sink:
    """A new file, as Arrow writes to one; closing it leaves the file to its owner."""

    closed = False

    def __init__(self, file: NewFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        return self._file.write(data)

    def tell(self) -> int:
        """Returns how much was written."""
        return self._file.num_bytes

    def flush(self) -> None:
        """Does nothing: the file is flushed when it is committed."""

    def close(self) -> None:
        """Does nothing."""
