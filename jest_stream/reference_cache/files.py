"""Writes Arrow files of embeddings row by row, and reads them without copying.

Columns: `key` (string), `image` and `text` (fixed-size lists of D float16), `image_crc32` and
`text_crc32` (uint32), the checksums of the embedded image and text; record batches of fixed size,
no compression. Any Arrow reader takes them: `pyarrow.ipc.open_file(path).read_all()`. The bytes of
a file depend on its rows alone, not on how they were grouped when they came. Its metadata name the
`build` that it belongs to. No threads.

Shapes: n: rows of a record batch, D: embedding dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from jest_stream.reference_cache.manifest import PartRecord, damaged
from jest_stream.storage import NewFile

ROWS_PER_BATCH = 8192
"""Rows of a record batch. A reader holds the keys of one at a time."""


class RecordBatch(NamedTuple):
    """The columns of one record batch."""

    keys: list[str]
    image: Tensor
    """`[n, D]` float16, unit norm; the mapped file itself."""
    text: Tensor
    """`[n, D]` float16 likewise."""
    checksums: Tensor
    """`[n, 2]` int64: of the image and of the text; see `views.score`."""


class EmbeddingsWriter:
    """Writes one Arrow file.

    Args:
      file: the file to fill; committed or aborted with this.
      dimension: D.
      build: names the build that the file belongs to; see `Header.build`.
    """

    def __init__(self, file: NewFile, dimension: int, build: str) -> None:
        import pyarrow.ipc

        self._file = file
        self.dimension = dimension
        self._schema = _schema(dimension).with_metadata({"build": build})
        self._sink = pyarrow.PythonFile(ArrowSink(file), mode="w")
        self._writer = pyarrow.ipc.new_file(self._sink, self._schema)
        self._keys: list[str] = []  # of rows that wait for a full record batch
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []  # their columns, as they came
        self.num_examples = 0
        """Rows so far."""

    def add(self, keys: Sequence[str], image: Tensor, text: Tensor, checksums: Tensor) -> None:
        """Adds rows: `[n, D]` float16 on the CPU, `[n, 2]` int64."""
        self._keys += keys
        self._rows.append((image, text, checksums))
        self.num_examples += len(keys)
        # Always full batches, so that the bytes do not depend on how rows came: 10,000 rows write
        # 8,192, and 1,808 wait.
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
        """Drops the file."""
        self._file.abort()

    def _write(self, num_rows: int) -> None:
        import pyarrow

        image, text, checksums = (torch.cat(column) for column in zip(*self._rows, strict=True))
        columns = [pyarrow.array(self._keys[:num_rows], pyarrow.string())]
        for rows in (image, text):
            flat = pyarrow.array(rows[:num_rows].contiguous().numpy().ravel())
            kind = self._schema.field("image").type
            columns.append(pyarrow.FixedSizeListArray.from_arrays(flat, type=kind))
        columns += [
            pyarrow.array(column, pyarrow.uint32()) for column in checksums[:num_rows].T.numpy()
        ]
        self._writer.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self._keys = self._keys[num_rows:]
        self._rows = [(image[num_rows:], text[num_rows:], checksums[num_rows:])]


class EmbeddingsFile:
    """Reads one Arrow file, which is mapped.

    Args:
      data: its bytes, as `Storage.mapped` returns them.
      url: its name in messages.
      part: the number of rows and the dimension that it must have.
      build: the build that it must belong to.

    Raises:
      CacheDamagedError: if it is anything else.
    """

    def __init__(self, data: Any, url: str, part: PartRecord, build: str) -> None:
        import pyarrow.ipc

        self._data, self._url, self._dimension = data, url, part.dimension
        try:
            buffer = pyarrow.py_buffer(data)
            self._base: int = buffer.address
            self._reader = pyarrow.ipc.open_file(pyarrow.BufferReader(buffer))
            if not self._reader.schema.equals(_schema(part.dimension)):
                raise damaged(url, f"has the columns {self._reader.schema.to_string()!r}")
            if (self._reader.schema.metadata or {}).get(b"build") != build.encode():
                raise damaged(url, "is a file of another cache")
            batches = [
                self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)
            ]
        except (pyarrow.ArrowException, OSError) as error:
            raise damaged(url, f"is no whole Arrow file: {error}", offset=len(data)) from error
        self.starts: list[int] = [0, *np.cumsum(batches).tolist()]
        """Row with which each record batch begins; then the number of rows."""
        if self.starts[-1] != part.num_examples:
            raise damaged(
                url, f"has {self.starts[-1]:,} rows, the manifest says {part.num_examples:,}"
            )

    @property
    def num_batches(self) -> int:
        """Number of record batches."""
        return len(self.starts) - 1

    def keys(self) -> list[str]:
        """Returns the keys of all rows."""
        return [key for number in range(self.num_batches) for key in self.batch(number).keys]

    def batch(self, number: int) -> RecordBatch:
        """Returns one record batch; its rows are the mapped file.

        Raises:
          CacheDamagedError: if its bytes were changed since they were written.
        """
        import pyarrow

        try:
            found = self._reader.get_batch(number)
            # Of strings Arrow checks offsets and UTF-8 only when asked; wrong ones lead elsewhere.
            found.column(0).validate(full=True)
            if any(column.null_count for column in found.columns):
                raise damaged(self._url, "has rows without values")
            keys: list[str] = found.column(0).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise damaged(self._url, f"is damaged in record batch {number}: {error}") from error
        crcs = [self._values(found.column(at), np.uint32, len(keys)) for at in (3, 4)]
        checksums = torch.from_numpy(np.stack(crcs, axis=1).astype(np.int64))
        return RecordBatch(
            keys, self._tower(found.column(1)), self._tower(found.column(2)), checksums
        )

    def _tower(self, column: Any) -> Tensor:
        num_values = len(column) * self._dimension
        rows = self._values(column.values, np.float16, num_values)
        return torch.from_numpy(rows).view(len(column), self._dimension)

    def _values(self, array: Any, kind: type[np.generic], num_values: int) -> Any:
        """Returns numbers as they lie in the file."""
        # Arrow believes the offsets that a file names. Here they are checked: a view of numpy that
        # leads out of the mapping would end the process.
        start = array.buffers()[1].address - self._base
        num_bytes = num_values * np.dtype(kind).itemsize
        if array.null_count or not 0 <= start <= len(self._data) - num_bytes:
            raise damaged(self._url, "has a column that leads out of it")
        return np.frombuffer(self._data, kind, num_values, start)


def _schema(dimension: int) -> Any:
    import pyarrow

    rows = pyarrow.list_(pyarrow.float16(), dimension)
    kinds = {"key": pyarrow.string(), "image": rows, "text": rows}
    kinds |= dict.fromkeys(("image_crc32", "text_crc32"), pyarrow.uint32())
    return pyarrow.schema(
        [pyarrow.field(name, kind, nullable=False) for name, kind in kinds.items()]
    )


class ArrowSink:
    """Lets Arrow write to a new file; closing it leaves the file to its owner."""

    closed = False

    def __init__(self, file: NewFile) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        return self._file.write(data)

    def tell(self) -> int:
        """Returns the number of bytes written."""
        return self._file.num_bytes

    def flush(self) -> None:
        """Does nothing: the file is flushed when it is committed."""

    def close(self) -> None:
        """Does nothing."""
