"""Reads the reference embeddings of a source, on local disk or in an object store.

Opens the files that `build` made: checks the manifest, hands out the rows of a shard, and joins
them to the examples of a source. Files are opened by the process that reads them, when it does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.config import (
    DEFAULT_IMAGE_KEY,
    DEFAULT_TEXT_KEY,
    Key,
    Limits,
    StorageConfig,
    Transform,
)
from jest_stream.errors import ConfigError, IncompleteCacheError, ShardChangedError
from jest_stream.reference_cache.build import Build
from jest_stream.reference_cache.expectations import Expected, require_expected, require_keys
from jest_stream.reference_cache.files import EmbeddingsFile
from jest_stream.reference_cache.index import KeyIndex, read_index
from jest_stream.reference_cache.join import JoinedSource
from jest_stream.reference_cache.manifest import (
    BEGUN,
    COMPLETE,
    RECORD,
    Manifest,
    ShardRecord,
    damaged,
    parse_header,
    parse_manifest,
    read_json,
)
from jest_stream.reference_cache.rows import ShardRows
from jest_stream.reference_cache.settings import BuildSettings, share_of_work
from jest_stream.scoring import load_reference
from jest_stream.sources import is_source, open_source
from jest_stream.storage import Storage, folder_address, redacted, scheme_of
from jest_stream.types import Embeddings, ObjectInfo, Source


class ReferenceCache:
    """Holds the embeddings that a reference gave of every example of a source.

    `JESTDataset(reference=cache)` scores with them instead of running a reference. Each shard has
    one Arrow file with `key`, `image` and `text` (float16) and checksums of the embedded image and
    text, read in step with the shard: memory does not grow with the data. Local files are mapped;
    of a remote cache one file per open shard is held in memory, or mapped from
    `StorageConfig(cache_folder=...)`.

    `build` makes one. Its arguments, beside those that `JESTDataset` has too:

    - `reference`, the frozen module: taken over, put into eval mode and moved to `device`. Or its
      name, such as `"open_clip:ViT-B-32/laion2b_s34b_b79k"`, which brings its views.
    - `path`: a folder, or an `s3://` or `gs://` address. One that holds a cache of another
      reference, view or source is refused.
    - `transform` and `tokenizer`: the reference's own views; deterministic.
    - `text_key`: the text that will be scored, not another caption.
    - `micro_batch_size`: examples per forward pass, never of two shards; `autocast_dtype`: embed
      under autocast.
    - `on_bad_example="skip"` leaves out and counts examples that cannot be read. An example that
      is not in the cache cannot be scored: training raises, or counts it as `skipped/not_cached`
      under its own `on_bad_example="skip"`.
    - `part_size`: examples per file of a source without shards.
    - `rank` and `world_size`: this process embeds the shards i with i % world_size == rank.
      Default: `RANK` and `WORLD_SIZE`, as torchrun sets them, else all shards.
    - `show_progress`: a bar on a terminal, lines elsewhere, on standard error.

    Args:
      path: the folder, or its address.
      storage: how a remote one is read.
      expect: the reference that the cache must be of, a module or a name; or a dict with some of
        `"reference"`, `"transform"` and `"tokenizer"`, each the thing itself or its entry in
        `fingerprints`.

    Raises:
      IncompleteCacheError: if building it has not come to its end.
      ReferenceMismatchError: if it is of something else than expected; names the difference.
      CacheDamagedError: if its manifest is not whole.
      ShardUnavailableError: if it cannot be reached.
    """

    def __init__(
        self,
        path: Any,
        *,
        storage: StorageConfig | None = None,
        expect: Expected | None = None,
    ) -> None:
        self._folder = folder_address(path)
        self._storage = Storage(storage)
        self._manifest: Manifest | None = _read_manifest(self._storage, self._folder)
        if expect is not None:
            self.check(expect)

    @classmethod
    def build(
        cls,
        source: Any,
        reference: nn.Module | str | os.PathLike[str],
        path: Any,
        *,
        transform: Transform | None = None,
        tokenizer: Transform | None = None,
        image_key: Key = DEFAULT_IMAGE_KEY,
        text_key: Key = DEFAULT_TEXT_KEY,
        num_workers: int = 0,
        micro_batch_size: int = 256,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        storage: StorageConfig | None = None,
        limits: Limits | None = None,
        on_bad_example: Literal["raise", "skip"] = "raise",
        max_bad_fraction: float = 0.01,
        part_size: int = 65_536,
        rank: int | None = None,
        world_size: int | None = None,
        timeout_s: float = 120.0,
        show_progress: bool = False,
    ) -> ReferenceCache:
        """Returns the cache of a source, after embedding the shards that it lacks.

        Each shard becomes a file that appears whole or not at all: a build that was killed goes on
        where it was. On one kind of machine, with as many threads, the files are the same byte for
        byte, however many processes shared the work (shard i belongs to rank i mod W). Ranks do
        not wait for each other: the one that finds all shards done writes the manifest, and before
        that the cache is an `IncompleteCacheError`. The class explains the arguments.

        Raises:
          ConfigError: for arguments that cannot work, such as a view that draws at random.
          ReferenceMismatchError: if the folder holds a cache of something else; names the
            difference.
        """
        folder = folder_address(path)
        if isinstance(reference, str | os.PathLike):
            named = load_reference(reference)
            reference = named.module
            transform, tokenizer = transform or named.transform, tokenizer or named.tokenizer
        rank, world_size = share_of_work(rank, world_size)
        settings = BuildSettings(
            transform=transform,
            tokenizer=tokenizer,
            image_key=image_key,
            text_key=text_key,
            num_workers=num_workers,
            micro_batch_size=micro_batch_size,
            autocast_dtype=autocast_dtype,
            device=device,
            storage=storage,
            limits=limits or Limits(),
            on_bad_example=on_bad_example,
            max_bad_fraction=max_bad_fraction,
            part_size=part_size,
            rank=rank,
            world_size=world_size,
            timeout_s=timeout_s,
            show_progress=show_progress,
        )
        opened = open_source(source, storage=storage if _is_address(source) else None)
        try:
            Build(folder, opened, reference, settings).run()
        finally:
            if not is_source(source):
                opened.close()
        # Not `cls(path)`, which raises while other ranks still build.
        cache = cls.__new__(cls)
        cache._folder, cache._storage, cache._manifest = folder, Storage(storage), None
        return cache

    @property
    def manifest(self) -> Manifest:
        """The manifest; an `IncompleteCacheError` while other ranks still build."""
        if self._manifest is None:
            self._manifest = _read_manifest(self._storage, self._folder)
        return self._manifest

    @property
    def path(self) -> str:
        """Address of the cache, without secrets."""
        return redacted(self._folder)

    @property
    def source(self) -> str:
        """Fingerprint of the source that was cached."""
        return self.manifest.header.source

    @property
    def is_by_key(self) -> bool:
        """Tells whether its source has no shards, so that examples are matched by key alone."""
        return self.manifest.header.part_size is not None

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """The records of the shards, in the order of the source."""
        return self.manifest.shards

    @property
    def num_examples(self) -> int:
        """Number of cached examples."""
        return self.manifest.num_examples

    @property
    def dimension(self) -> int:
        """Embedding dimension."""
        return self.manifest.dimension

    @property
    def has_bias(self) -> bool:
        """Tells whether the reference has a logit bias, as those made for the sigmoid loss do."""
        return self.manifest.header.logit_bias is not None

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of the reference and its views; `expect=` takes them."""
        header = self.manifest.header
        return {
            "reference": header.weights,
            "transform": header.transform,
            "tokenizer": header.tokenizer,
        }

    def check(self, expect: Expected) -> None:
        """Raises `ReferenceMismatchError` unless the cache is as expected; see `expect`."""
        require_expected(self.manifest.header, expect, self.path)

    def check_keys(self, image_key: Key, text_key: Key) -> None:
        """Raises `ReferenceMismatchError` if surely other members were cached."""
        require_keys(self.manifest.header, image_key, text_key, self.path)

    def join(self, source: Source) -> JoinedSource:
        """Returns the source with each example's reference embeddings beside it.

        Raises:
          ReferenceMismatchError: if a shard of it is not in the cache.
        """
        return JoinedSource(source, self)

    def embeddings(self, image: Tensor, text: Tensor) -> Embeddings:
        """Returns cached rows as the reference gave them, but for rounding to float16.

        Args:
          image: `[B, D]` float16.
          text: `[B, D]` float16.
        """
        header = self.manifest.header
        return Embeddings(
            # float16 has 11 bits: rows of unit norm leave it by up to 2**-11 of their length.
            image=F.normalize(image.float(), dim=-1),
            text=F.normalize(text.float(), dim=-1),
            logit_scale=header.logit_scale,
            logit_bias=header.logit_bias or 0.0,
        )

    def open_shard(self, shard: int, *, first: int = 0) -> ShardRows:
        """Returns a reader of the embeddings of a shard's examples.

        Args:
          shard: its number.
          first: examples of the shard that come before the first one to be taken.
        """
        record = self.shards[shard]
        return ShardRows(
            [part.num_examples for part in record.parts],
            partial(self._open_part, shard),
            None if record.index is None else partial(self._open_index, record.index),
            first,
        )

    def take_counts(self) -> dict[str, int]:
        """Returns storage's counts in this process since the last call."""
        return self._storage.take_counts()

    def close(self) -> None:
        """Closes the connections of this process. It can be used again."""
        self._storage.close()

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def summary(self) -> str:
        """Returns the contents in one line."""
        records = self.shards
        num_bytes = sum(part.num_bytes for record in records for part in record.parts)
        left_out = sum(record.num_read - record.num_examples for record in records)
        return (
            f"{self.path}: {len(records):,} shards, {self.num_examples:,} examples of "
            f"{self.dimension} dimensions, {left_out:,} left out, {num_bytes / 2**20:,.1f} MiB"
        )

    def __repr__(self) -> str:
        if self._manifest is None:
            return f"<ReferenceCache {self.path} | not opened yet>"
        header = self._manifest.header
        return (
            f"<ReferenceCache {self.path} | {self.num_examples:,} examples of {header.num_shards} "
            f"shards | {header.model}, {self.dimension} dimensions>"
        )

    def _open_part(self, shard: int, number: int) -> EmbeddingsFile:
        part = self.shards[shard].parts[number]
        url = f"{self._folder}/{part.file}"
        info = self._storage.info(url)
        if info.num_bytes != part.num_bytes:
            raise damaged(
                url,
                f"has {info.num_bytes:,} bytes, the manifest says {part.num_bytes:,}",
                offset=min(info.num_bytes, part.num_bytes),
            )
        data = self._mapped(url, info)
        return EmbeddingsFile(data, redacted(url), part, self.manifest.header.build)

    def _open_index(self, file: str) -> KeyIndex:
        url = f"{self._folder}/{file}"
        return read_index(self._mapped(url, self._storage.info(url)), redacted(url))

    def _mapped(self, url: str, info: ObjectInfo) -> Any:
        try:
            return self._storage.mapped(url, info)
        except ShardChangedError as error:
            raise damaged(url, f"was overwritten while it was read ({error})") from error


def _read_manifest(storage: Storage, folder: str) -> Manifest:
    url = f"{folder}/{COMPLETE}"
    # Of these addresses a listing tells whether a build has begun. A web server has none: there a
    # missing manifest is reported by the request for it.
    if scheme_of(folder) in ("", "s3", "gs"):
        names = storage.names_in(folder)
        if COMPLETE not in names and BEGUN in names:
            raise _incomplete(storage, folder, names)
        if COMPLETE not in names:
            raise ConfigError(
                f"there is no reference cache in {redacted(folder)!r}: it has no {COMPLETE}. Build "
                f"one with jest-stream cache SOURCE --reference NAME --out {redacted(folder)}"
            )
    return parse_manifest(read_json(storage, url), url)


def _incomplete(storage: Storage, folder: str, names: Sequence[str]) -> IncompleteCacheError:
    begun = f"{folder}/{BEGUN}"
    num_shards = parse_header(read_json(storage, begun), begun).num_shards
    num_done = sum(RECORD.fullmatch(name) is not None for name in names)
    return IncompleteCacheError(
        f"the reference cache {redacted(folder)!r} is not complete: {num_done} of {num_shards} "
        f"shards are done. If it is not being built right now, start the same build again: it "
        f"goes on where it stopped.",
        num_done=num_done,
        num_shards=num_shards,
    )


def _is_address(source: Any) -> bool:
    """Tells whether a source is read by `storage`."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return isinstance(first, str | os.PathLike)
