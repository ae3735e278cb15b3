"""Embeds one shard into the cache: slices of rows in, Arrow files and the shard's record out.

Rows are embedded in micro-batches that begin with the shard (or with the part). The content of a
file depends therefore neither on where an earlier build was interrupted, nor on the processes that
share the work. Runs in the building process; no threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.reference_cache.files import EmbeddingsWriter
from jest_stream.reference_cache.index import key_hashes, make_index, write_index
from jest_stream.reference_cache.manifest import (
    Header,
    PartRecord,
    ShardRecord,
    dump,
    part_file,
    record_file,
    write_whole,
)
from jest_stream.reference_cache.reading import ShardSlice
from jest_stream.storage import Storage
from jest_stream.types import Embeddings
from jest_stream.views import Columns

Embed = Callable[[Columns], Embeddings]


@dataclass(frozen=True, kw_only=True)
class FinishedParts:
    """The finished parts of a shard, by an earlier build or by this one."""

    parts: tuple[PartRecord, ...] = ()
    num_read: int = 0
    """Examples of the shard up to the end of the last part, unusable ones too."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Examples left out among them, by reason."""
    hashes: tuple[Any, ...] = ()
    """Per part `[n]` uint64: the hashes of its keys."""


class ShardWork:
    """Embeds one shard. Owns the file that is being written.

    Args:
      shard: its number.
      name: its name in the cache.
      header: of the build: sizes of micro-batches and parts.
      folder: folder of the cache.
      storage: writes the files.
      embed: makes embeddings of columns.
      begun: the parts that an earlier build finished.
    """

    def __init__(
        self,
        shard: int,
        name: str,
        *,
        header: Header,
        folder: str,
        storage: Storage,
        embed: Embed,
        begun: FinishedParts,
    ) -> None:
        self._shard, self._name, self._header = shard, name, header
        self._folder, self._storage, self._embed = folder, storage, embed
        self._begun = begun
        self._skipped = begun.skipped
        self._columns: list[Columns] = []  # rows that wait for a micro-batch
        # Per waiting row: the examples of the shard up to it, and those left out among them. A
        # part ends with any row, and its record must not count examples that follow it.
        self._read: list[tuple[int, Mapping[str, int]]] = []
        self._writer: EmbeddingsWriter | None = None
        self._hashes: list[Any] = []  # of the keys in the part at hand

    def add(self, rows: ShardSlice) -> int:
        """Takes rows; returns how many were embedded by that."""
        # A slice may end within a micro-batch, and a micro-batch within a part: with slices of 64
        # and micro-batches of 256, the fourth slice embeds 256 rows, the others none.
        for position, num_read in enumerate(rows.num_read):
            for reason in (why for at, why in rows.skipped if at == position):
                # A new dict: rows that came before keep the counts of their time.
                self._skipped = {**self._skipped, reason: self._skipped.get(reason, 0) + 1}
            if not rows.is_end:
                self._read.append((num_read, self._skipped))
        if not rows.is_end:
            self._columns.append(rows.columns)
        num_embedded = 0
        while self._read and len(self._read) >= self._next_size():
            num_embedded += self._embed_next()
        return num_embedded

    def finish(self, num_read: int, content: tuple[int, str] | None) -> tuple[ShardRecord, int]:
        """Writes the rest and the shard's record; returns it and how many rows were embedded.

        Args:
          num_read: examples in the shard.
          content: its length and version; None for a shard that is no file.
        """
        num_embedded = 0
        while self._read:  # the last micro-batch may be a short one
            num_embedded += self._embed_next()
        if self._writer is not None:
            self._end_part(num_read, self._skipped)
        num_bytes, version = content or (None, "")
        record = ShardRecord(
            name=self._name,
            num_bytes=num_bytes,
            version=version,
            num_read=num_read,
            skipped=dict(sorted(self._skipped.items())),
            parts=self._begun.parts,
            index=self._write_index(),
        )
        # Last of all, since it says that the shard is done.
        write_whole(self._storage, f"{self._folder}/{record_file(self._shard)}", dump(record))
        return record, num_embedded

    def abort(self) -> None:
        """Drops the file that is being written."""
        if self._writer is not None:
            self._writer.abort()

    @property
    def _part_name(self) -> str:
        return part_file(self._shard, len(self._begun.parts), self._header.part_size)

    def _next_size(self) -> int:
        """Returns the rows of the next micro-batch, which never reaches into the next part.

        With parts of 10 and micro-batches of 4 they are 4, 4, 2, 4, 4, 2, ...
        """
        size, part_size = self._header.micro_batch_size, self._header.part_size
        done = 0 if self._writer is None else self._writer.num_examples
        return size if part_size is None else min(size, part_size - done)

    def _embed_next(self) -> int:
        size = min(self._next_size(), len(self._read))
        columns = _joined(self._columns)
        rows = {name: column[:size] for name, column in columns.items()}
        self._columns = [{name: column[size:] for name, column in columns.items()}]
        found = self._embed(rows)
        image, text = (self._half(tower) for tower in (found.image, found.text))
        if self._writer is None:  # only now is the dimension known
            file = self._storage.create(f"{self._folder}/{self._part_name}.arrow")
            self._writer = EmbeddingsWriter(file, image.shape[1], self._header.build)
        self._writer.add(rows["key"], image, text, rows["checksums"])
        self._hashes.append(key_hashes(rows["key"]))
        num_read, skipped = self._read[size - 1]
        del self._read[:size]
        if self._writer.num_examples == self._header.part_size:
            self._end_part(num_read, skipped)
        return size

    def _half(self, rows: Tensor) -> Tensor:
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(
                f"the reference gave NaN or infinity for an example of shard {self._name!r}. "
                f"Check its weights, and the autocast dtype."
            )
        return rows.half().cpu()

    def _end_part(self, num_read: int, skipped: Mapping[str, int]) -> None:
        assert self._writer is not None
        name, writer, self._writer = self._part_name, self._writer, None
        part = PartRecord(
            file=f"{name}.arrow",
            num_examples=writer.num_examples,
            num_bytes=writer.commit(),
            dimension=writer.dimension,
        )
        hashes, self._hashes = np.concatenate(self._hashes), []
        self._begun = FinishedParts(
            parts=(*self._begun.parts, part),
            num_read=num_read,
            skipped=skipped,
            hashes=(*self._begun.hashes, hashes),
        )
        if self._header.part_size is not None:
            # A later build goes on from here, should this one be stopped. The Arrow file was first:
            # a record without its file would be damage.
            partial = ShardRecord(
                name=self._name,
                num_bytes=None,
                version="",
                num_read=num_read,
                skipped=dict(sorted(skipped.items())),
                parts=(part,),
            )
            write_whole(self._storage, f"{self._folder}/{name}.json", dump(partial))

    def _write_index(self) -> str | None:
        """Refuses keys that come twice; writes the place of each key, if there are several parts.

        Two keys with one hash of 64 bits are taken for equal: among 100 million different keys
        that happens with a probability of 3 in 10,000.
        """
        index = make_index(self._begun.hashes)
        if twice := np.flatnonzero(index.hashes[1:] == index.hashes[:-1]).tolist():
            at = ", ".join(str(row) for row in index.rows[twice[0] : twice[0] + 2].tolist())
            raise ConfigError(
                f"{len(twice):,} keys of shard {self._name!r} come twice (rows {at} of its file "
                f"among them). Embeddings are found by key: give each example its own __key__."
            )
        if len(self._begun.parts) < 2:
            return None
        name = f"{self._shard:05d}.index.arrow"
        write_index(self._storage.create(f"{self._folder}/{name}"), index)
        return name


def _joined(parts: list[Columns]) -> Columns:
    if len(parts) == 1:
        return parts[0]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(column, Tensor)
        else [item for part in parts for item in part[name]]
        for name, column in parts[0].items()
    }
