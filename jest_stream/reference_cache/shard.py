"""One shard on its way into the cache: rows in, Arrow files and the shard's record out.

Rows are embedded in micro-batches that begin with the shard (or the part), so that what a file
holds depends neither on when the build was interrupted nor on who else works on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jest_stream.errors import ConfigError, NonFiniteError
from jest_stream.reference_cache.files import (
    EmbeddingsWriter,
    key_hashes,
    sorted_index,
    write_index,
)
from jest_stream.reference_cache.manifest import PartRecord, ShardRecord, dump_record
from jest_stream.reference_cache.reading import Group
from jest_stream.storage import Storage
from jest_stream.types import Embeddings
from jest_stream.views import Columns

Embed = Callable[[Columns], Embeddings]


def record_file(shard: int) -> str:
    """Returns the name of the file that says a shard is done."""
    return f"{shard:05d}.json"


def part_file(shard: int, part: int, part_size: int | None) -> str:
    """Returns the name of an Arrow file, without its suffix."""
    return f"{shard:05d}" if part_size is None else f"{shard:05d}-{part:05d}"


@dataclass(frozen=True, kw_only=True)
class ShardProgress:
    """How much of a shard is in finished parts."""

    parts: tuple[PartRecord, ...] = ()
    num_read: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    hashes: tuple[Any, ...] = ()
    """Of the keys in each part."""


class ShardWork:
    """Embeds one shard. Owns the file that is being written.

    Args:
      shard: its number.
      name: what to call it.
      folder: of the cache.
      storage: that writes it.
      embed: makes embeddings of columns.
      micro_batch_size: rows per pass.
      part_size: rows per file; None for one file.
      begun: what is finished of it.
      build: that it is part of; see `Header.build`.
    """

    def __init__(
        self,
        shard: int,
        name: str,
        *,
        folder: str,
        storage: Storage,
        embed: Embed,
        micro_batch_size: int,
        part_size: int | None,
        begun: ShardProgress,
        build: str,
    ) -> None:
        self._shard, self._name = shard, name
        self._folder, self._storage = folder, storage
        self._embed = embed
        self._micro_batch_size, self._part_size = micro_batch_size, part_size
        self._begun = begun
        self._build = build
        self._skipped = dict(begun.skipped)
        self._columns: list[Columns] = []  # rows that wait for a micro-batch,
        self._read: list[tuple[int, dict[str, int]]] = []  # and what was read with each
        self._writer: EmbeddingsWriter | None = None
        self._hashes: list[Any] = []  # of the part at hand

    def add(self, group: Group) -> int:
        """Takes rows; returns how many were embedded by that."""
        before = 0
        for position in range(len(group.num_read)):
            if reasons := [reason for at, reason in group.skipped if at == position]:
                self._skipped = dict(self._skipped)
                for reason in reasons:
                    self._skipped[reason] = self._skipped.get(reason, 0) + 1
            if not group.is_end:
                self._read.append((group.num_read[position], self._skipped))
        if not group.is_end:
            self._columns.append(group.columns)
        while self._read and len(self._read) >= self._next_size():
            before += self._embed_next()
        return before

    def finish(self, num_read: int, content: tuple[int, str] | None) -> tuple[ShardRecord, int]:
        """Writes what is left, and the shard's record; returns it and how many were embedded.

        Args:
          num_read: examples that the shard holds.
          content: its length and version.
        """
        num_embedded = 0
        while self._read:
            num_embedded += self._embed_next()
        if self._writer is not None:
            self._end_part(num_read, self._skipped)
        progress = self._begun
        record = ShardRecord(
            name=self._name,
            num_bytes=None if content is None else content[0],
            version="" if content is None else content[1],
            num_read=num_read,
            skipped=dict(sorted(self._skipped.items())),
            parts=progress.parts,
            index=self._write_index(progress),
        )
        self._write(record_file(self._shard), dump_record(record))
        return record, num_embedded

    def abort(self) -> None:
        """Drops the file that is being written."""
        if self._writer is not None:
            self._writer.abort()

    def _next_size(self) -> int:
        """Rows of the next micro-batch: it ends with the part."""
        done = 0 if self._writer is None else self._writer.num_examples
        left = self._micro_batch_size if self._part_size is None else self._part_size - done
        return min(self._micro_batch_size, left)

    def _embed_next(self) -> int:
        size = min(self._next_size(), len(self._read))
        columns = joined(self._columns)
        rows = {name: column[:size] for name, column in columns.items()}
        self._columns = [{name: column[size:] for name, column in columns.items()}]
        found = self._embed(rows)
        image, text = (self._half(tower) for tower in (found.image, found.text))
        if self._writer is None:
            name = part_file(self._shard, len(self._begun.parts), self._part_size)
            file = self._storage.create(f"{self._folder}/{name}.arrow")
            self._writer = EmbeddingsWriter(file, image.shape[1], self._build)
        self._writer.add(rows["key"], image, text, rows["checksums"])
        self._hashes.append(key_hashes(rows["key"]))
        num_read, skipped = self._read[size - 1]
        del self._read[:size]
        if self._writer.num_examples == self._part_size:
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
        writer, self._writer = self._writer, None
        name = part_file(self._shard, len(self._begun.parts), self._part_size)
        dimension = writer.dimension
        part = PartRecord(
            file=f"{name}.arrow",
            num_examples=writer.num_examples,
            num_bytes=writer.commit(),
            dimension=dimension,
        )
        hashes, self._hashes = np.concatenate(self._hashes), []
        self._begun = ShardProgress(
            parts=(*self._begun.parts, part),
            num_read=num_read,
            skipped=skipped,
            hashes=(*self._begun.hashes, hashes),
        )
        if self._part_size is not None:
            partial = ShardRecord(
                name=self._name,
                num_bytes=None,
                version="",
                num_read=num_read,
                skipped=dict(sorted(skipped.items())),
                parts=(part,),
            )
            self._write(f"{name}.json", dump_record(partial))

    def _write_index(self, progress: ShardProgress) -> str | None:
        """Refuses keys that come twice; writes where each key is, if there are several parts."""
        hashes = np.concatenate([key_hashes([]), *progress.hashes])
        sizes = [part.num_examples for part in progress.parts]
        parts = np.repeat(np.arange(len(sizes)), sizes)
        rows = np.concatenate([np.zeros(0, int), *(np.arange(size) for size in sizes)])
        columns = sorted_index(hashes, parts, rows)
        if twice := np.flatnonzero(columns[0][1:] == columns[0][:-1]).tolist():
            at = ", ".join(str(int(columns[2][i + k])) for i in twice[:1] for k in (0, 1))
            raise ConfigError(
                f"{len(twice):,} keys of shard {self._name!r} come twice (rows {at} of its file "
                f"among them). Embeddings are found by key: give each example its own __key__."
            )
        if len(sizes) < 2:
            return None
        name = f"{self._shard:05d}.index.arrow"
        write_index(self._storage.create(f"{self._folder}/{name}"), columns)
        return name

    def _write(self, name: str, data: bytes) -> None:
        write_whole(self._storage, f"{self._folder}/{name}", data)


def write_whole(storage: Storage, url: str, data: bytes) -> None:
    """Writes a small file, whole or not at all."""
    file = storage.create(url)
    try:
        file.write(data)
    except BaseException:
        file.abort()
        raise
    file.commit()


def joined(parts: list[Columns]) -> Columns:
    """Returns the rows of several columns in one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return {
        name: torch.cat([part[name] for part in parts])
        if isinstance(first[name], Tensor)
        else [item for part in parts for item in part[name]]
        for name in first
    }
