"""Arrow files of embeddings: written row by row, read without copying.

Columns: `key` (string), `image` and `text` (fixed-size lists of D float16), `image_crc32` and
`text_crc32` (uint32) of what was embedded; record batches of fixed size, no compression. Any Arrow
reader takes them: `pyarrow.ipc.open_file(path).read_all()`. What a file holds depends on the rows
alone, not on when they came. Its metadata name the `build` that it belongs to. No threads.

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

from jest_stream.errors import ConfigError
from jest_stream.reference_cache.manifest import damaged
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
    checksums: Tensor
    """`[n, 2]` int64: of the image and of the text; see `views.checksums`."""


class EmbeddingsWriter:
    """Writes one Arrow file.

    Args:
      file: where to; committed or aborted with this.
      dimension: D.
      build: that it is of; see `Header.build`.
    """

    def __init__(self, file: NewFile, dimension: int, build: str) -> None:
        arrow = arrow_or_error()
        self._arrow = arrow
        self._file = file
        self.dimension = dimension
        """D."""
        self._schema = _schema(dimension).with_metadata({"build": build})
        self._sink = arrow.PythonFile(_Sink(file), mode="w")
        self._writer = arrow.ipc.new_file(self._sink, self._schema)
        self._keys: list[str] = []
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_examples = 0
        """Rows so far."""

    def add(self, keys: Sequence[str], image: Tensor, text: Tensor, checksums: Tensor) -> None:
        """Adds rows: `[n, D]` float16 on the CPU, `[n, 2]` int64."""
        self._keys += keys
        self._rows.append((image, text, checksums))
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
        image, text, checksums = (torch.cat(column) for column in zip(*self._rows, strict=True))
        columns = [arrow.array(self._keys[:num_rows], arrow.string())]
        for rows in (image, text):
            flat = arrow.array(rows[:num_rows].contiguous().numpy().ravel())
            kind = self._schema.field("image").type
            columns.append(arrow.FixedSizeListArray.from_arrays(flat, type=kind))
        columns += [
            arrow.array(column, arrow.uint32()) for column in checksums[:num_rows].T.numpy()
        ]
        self._writer.write_batch(arrow.record_batch(columns, schema=self._schema))
        self._keys = self._keys[num_rows:]
        self._rows = [(image[num_rows:], text[num_rows:], checksums[num_rows:])]


class EmbeddingsFile:
    """One Arrow file, mapped.

    Args:
      data: its bytes, as `Storage.mapped` returns them.
      url: what to call it in messages.
      num_examples: rows that it must have.
      dimension: D that it must have.
      build: that it must be of.

    Raises:
      CacheDamagedError: if it is anything else.
    """

    def __init__(
        self, data: Any, url: str, *, num_examples: int, dimension: int, build: str
    ) -> None:
        arrow = arrow_or_error()
        self._data = data
        self._url = url
        self._dimension = dimension
        try:
            buffer = arrow.py_buffer(data)
            self._base: int = buffer.address
            self._reader = arrow.ipc.open_file(arrow.BufferReader(buffer))
            if not self._reader.schema.equals(_schema(dimension)):
                raise damaged(url, f"has the columns {self._reader.schema.to_string()!r}")
            if (self._reader.schema.metadata or {}).get(b"build") != build.encode():
                raise damaged(url, "is a file of another cache")
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
            if any(column.null_count for column in found.columns):
                raise damaged(self._url, "has rows without values")
            keys: list[str] = found.column(0).to_pylist()
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(self._url, f"is damaged in record batch {number}: {error}") from error
        crcs = [self._values(found.column(at), np.uint32, len(keys)) for at in (3, 4)]
        checksums = torch.from_numpy(np.stack(crcs, axis=1).astype(np.int64))
        return Batch(keys, self._tower(found.column(1)), self._tower(found.column(2)), checksums)

    def _tower(self, column: Any) -> Tensor:
        num_values = len(column) * self._dimension
        rows = self._values(column.values, np.float16, num_values)
        return torch.from_numpy(rows).view(len(column), self._dimension)

    def _values(self, array: Any, kind: type[np.generic], num_values: int) -> Any:
        """Returns numbers as they lie in the file."""
        start = array.buffers()[1].address - self._base
        num_bytes = num_values * np.dtype(kind).itemsize
        if array.null_count or not 0 <= start <= len(self._data) - num_bytes:
            raise damaged(self._url, "has a column that leads out of it")
        return np.frombuffer(self._data, kind, num_values, start)


def _schema(dimension: int) -> Any:
    arrow = arrow_or_error()
    rows = arrow.list_(arrow.float16(), dimension)
    kinds = {"key": arrow.string(), "image": rows, "text": rows}
    kinds |= dict.fromkeys(("image_crc32", "text_crc32"), arrow.uint32())
    return arrow.schema([arrow.field(name, kind, nullable=False) for name, kind in kinds.items()])


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
