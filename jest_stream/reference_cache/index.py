"""Finds the part and row of a key by an index of the shard. Pure functions but for the files.

A shard in several parts brings its index as an Arrow file with the columns `hash`, `part` and
`row`, sorted by hash and mapped. For one part it is made of the keys, where it is needed at all.

Shapes: n: keys of the shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jest_stream.reference_cache.files import ArrowSink
from jest_stream.reference_cache.manifest import damaged
from jest_stream.storage import NewFile

_COLUMNS = ["hash", "part", "row"]


def key_hashes(keys: Iterable[str]) -> Any:
    """Returns `[n]` uint64, by which keys are looked up; the same in every process."""
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(b"".join(digests), np.uint64)


class KeyIndex(NamedTuple):
    """Finds keys by their hashes."""

    hashes: Any
    """`[n]` uint64, sorted."""
    parts: Any
    """`[n]` int32, the part of each key."""
    rows: Any
    """`[n]` int32, its row in that part."""

    def places(self, key: str) -> list[tuple[int, int]]:
        """Returns part and row of every key with the hash of `key`: nearly always one or none."""
        wanted = key_hashes([key])[0]
        first = int(np.searchsorted(self.hashes, wanted, side="left"))
        stop = int(np.searchsorted(self.hashes, wanted, side="right"))
        parts, rows = self.parts[first:stop].tolist(), self.rows[first:stop].tolist()
        return list(zip(parts, rows, strict=True))


def make_index(hashes: Sequence[Any]) -> KeyIndex:
    """Returns the index of a shard, of the hashes of the keys in each of its parts."""
    # Parts of 2 and 3 keys: parts is [0, 0, 1, 1, 1], rows is [0, 1, 0, 1, 2].
    found = np.concatenate([key_hashes([]), *hashes])  # also of no parts
    sizes = [len(part) for part in hashes]
    parts = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    rows = np.concatenate([np.arange(size, dtype=np.int32) for size in (0, *sizes)])
    order = np.argsort(found, kind="stable")
    return KeyIndex(found[order], parts[order], rows[order])


def write_index(file: NewFile, index: KeyIndex) -> None:
    """Writes an index as an Arrow file."""
    import pyarrow.ipc

    batch = pyarrow.record_batch([pyarrow.array(column) for column in index], names=_COLUMNS)
    sink = pyarrow.PythonFile(ArrowSink(file), mode="w")
    try:
        with pyarrow.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
    except BaseException:
        file.abort()
        raise
    file.commit()


def read_index(data: Any, url: str) -> KeyIndex:
    """Returns an index whose columns are the mapped file."""
    import pyarrow.ipc

    try:
        batch = pyarrow.ipc.open_file(pyarrow.BufferReader(pyarrow.py_buffer(data))).get_batch(0)
        if batch.schema.names != _COLUMNS:
            raise damaged(url, f"has the columns {batch.schema.names}")
        hashes, parts, rows = (column.to_numpy() for column in batch.columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise damaged(url, f"is no whole Arrow file: {error}", offset=len(data)) from error
    return KeyIndex(hashes, parts, rows)
