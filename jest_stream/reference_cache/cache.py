"""`ReferenceCache`: the reference embeddings of a source, on local disk or in an object store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jest_stream.config import Limits, StorageConfig
from jest_stream.errors import ConfigError, IncompleteCacheError, ShardChangedError
from jest_stream.reference_cache.build import RECORD, build_into
from jest_stream.reference_cache.expectations import Expected, require_expected, require_keys
from jest_stream.reference_cache.files import EmbeddingsFile, KeyIndex, arrow_or_error, read_index
from jest_stream.reference_cache.join import JoinedSource
from jest_stream.reference_cache.manifest import (
    BEGUN,
    COMPLETE,
    Manifest,
    ShardRecord,
    damaged,
    parse_header,
    parse_manifest,
    read_json,
)
from jest_stream.reference_cache.reading import ReadSettings
from jest_stream.reference_cache.rows import ShardRows
from jest_stream.scoring import load_reference
from jest_stream.sources import is_source, open_source
from jest_stream.storage import Storage, folder_address, redacted, scheme_of
from jest_stream.types import Embeddings, ObjectInfo, Source
from jest_stream.views import Key, Transform

DEFAULT_IMAGE_KEY = "jpg;jpeg;png;webp;gif;image"
DEFAULT_TEXT_KEY = "txt;text"


class ReferenceCache:
    """The embeddings that a reference gave of every example of a source.

    `JESTDataset(reference=cache)` scores with them instead of running a reference. Per shard there
    is one Arrow file with `key`, `image` and `text` (float16) and checksums of what was embedded,
    read in step with the shard: memory does not grow with the data. Local files are mapped; of a
    remote cache one file per open shard is held in memory, or mapped from
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
    - `on_bad_example="skip"` leaves out and counts what cannot be read. What is not in the cache
      cannot be scored: training raises, or counts it as `skipped/not_cached` under its own
      `on_bad_example="skip"`.
    - `part_size`: examples per file of a source without shards.
    - `rank` and `world_size`: which part of the work is this process's. Default: `RANK` and
      `WORLD_SIZE`, as torchrun sets them, else everything.
    - `show_progress`: a bar on a terminal, lines elsewhere, on standard error.

    Args:
      path: the folder, or its address.
      storage: how a remote one is read.
      expect: what it must be of: the reference, a module or a name; or a dict with some of
        `"reference"`, `"transform"` and `"tokenizer"`, each of them or what `fingerprints` gives.

    Raises:
      IncompleteCacheError: if building it has not come to its end.
      ReferenceMismatchError: if it is of something else than expected; says of what.
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
        arrow_or_error()
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
        """Returns the cache of a source, after embedding what is not in it yet.

        Each shard becomes a file that appears whole or not at all: a build that was killed goes on
        where it was. On one kind of machine, with as many threads, the files are the same byte for
        byte, however many processes shared the work (shard i belongs to rank i mod W). Ranks do
        not wait: whoever finds all shards done writes the manifest, and before that the cache is
        an `IncompleteCacheError`. The class explains the arguments.

        Raises:
          ConfigError: for arguments that cannot work, such as a view that draws at random.
          ReferenceMismatchError: if the folder holds a cache of something else; says of what.
        """
        folder = folder_address(path)
        model, views = _with_views(reference, transform, tokenizer)
        opened = open_source(source, storage=storage if _is_address(source) else None)
        try:
            build_into(
                *(folder, opened, model),
                storage=storage,
                views=views,
                keys=(image_key, text_key),
                limits=limits,
                micro_batch_size=micro_batch_size,
                autocast_dtype=autocast_dtype,
                part_size=part_size,
                device=device,
                place=(rank, world_size),
                settings=ReadSettings(num_workers, on_bad_example, max_bad_fraction, timeout_s),
                show_progress=show_progress,
            )
        finally:
            if not is_source(source):
                opened.close()
        cache = cls.__new__(cls)
        cache._folder, cache._storage, cache._manifest = folder, Storage(storage), None
        return cache

    @property
    def manifest(self) -> Manifest:
        """What the cache says of itself; `IncompleteCacheError` while other ranks still build."""
        if self._manifest is None:
            self._manifest = _read_manifest(self._storage, self._folder)
        return self._manifest

    @property
    def path(self) -> str:
        """Where it lies, without secrets."""
        return redacted(self._folder)

    @property
    def source(self) -> str:
        """Fingerprint of the source that was cached."""
        return self.manifest.header.source

    @property
    def is_by_key(self) -> bool:
        """Whether it is of a source without shards, so that keys alone say what belongs."""
        return self.manifest.header.part_size is not None

    @property
    def shards(self) -> Sequence[ShardRecord]:
        """What is cached of each shard."""
        return self.manifest.shards

    @property
    def num_examples(self) -> int:
        """How many examples are cached."""
        return self.manifest.num_examples

    @property
    def dimension(self) -> int:
        """Of the embeddings."""
        return self.manifest.dimension

    @property
    def has_bias(self) -> bool:
        """Whether the reference has a logit bias, as those made for the sigmoid loss do."""
        return self.manifest.header.logit_bias is not None

    @property
    def fingerprints(self) -> dict[str, Any]:
        """What names the reference and its views; `expect=` takes it."""
        header = self.manifest.header
        return {
            "reference": header.weights,
            "transform": header.transform,
            "tokenizer": header.tokenizer,
        }

    def check(self, expect: Expected) -> None:
        """Raises `ReferenceMismatchError` unless the cache is of what is expected; see `expect`."""
        require_expected(self.manifest.header, expect, self.path)

    def check_keys(self, image_key: Key, text_key: Key) -> None:
        """Raises `ReferenceMismatchError` if the members that were cached are surely others."""
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
            image=F.normalize(image.float(), dim=-1),
            text=F.normalize(text.float(), dim=-1),
            logit_scale=header.logit_scale,
            logit_bias=header.logit_bias or 0.0,
        )

    def open_shard(self, shard: int, *, first: int = 0) -> ShardRows:
        """Returns what finds the embeddings of a shard's examples.

        Args:
          shard: which.
          first: examples of the shard that come before the first that is asked for.
        """
        record = self.shards[shard]
        return ShardRows(
            [part.num_examples for part in record.parts],
            partial(self._open_part, shard),
            None if record.index is None else partial(self._open_index, record.index),
            first,
        )

    def take_counts(self) -> dict[str, int]:
        """Returns what storage counted in this process since the last call."""
        return self._storage.take_counts()

    def close(self) -> None:
        """Closes the connections of this process. It can be used again."""
        self._storage.close()

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def summary(self) -> str:
        """Returns what is in it, in one line."""
        records = self.shards
        num_bytes = sum(part.num_bytes for record in records for part in record.parts)
        left_out = sum(record.num_read - record.num_examples for record in records)
        return (
            f"{self.path}: {len(records):,} shards, {self.num_examples:,} examples of "
            f"{self.dimension} dimensions, {left_out:,} left out, {num_bytes / 2**20:,.1f} MiB"
        )

    def __repr__(self) -> str:
        if self._manifest is None:
            return f"<ReferenceCache {self.path} | not looked into yet>"
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
        return EmbeddingsFile(
            data,
            redacted(url),
            num_examples=part.num_examples,
            dimension=part.dimension,
            build=self.manifest.header.build,
        )

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


def _with_views(
    reference: nn.Module | str | os.PathLike[str],
    transform: Transform | None,
    tokenizer: Transform | None,
) -> tuple[nn.Module, tuple[Transform | None, Transform | None]]:
    """Returns the reference and its views; one that was named brings them."""
    if not isinstance(reference, str | os.PathLike):
        return reference, (transform, tokenizer)
    named = load_reference(reference)
    return named.module, (transform or named.transform, tokenizer or named.tokenizer)


def _is_address(source: Any) -> bool:
    """Whether a source is read by `storage`."""
    first = source[0] if isinstance(source, list | tuple) and source else source
    return isinstance(first, str | os.PathLike)
