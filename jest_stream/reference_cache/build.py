"""Embeds a source into a cache: what is missing of it, shard by shard, by any number of processes.

No process waits for another or knows of it. A shard is done when its record is there; records and
files are put into place whole, and hold the same bytes whoever writes them. Whoever then finds all
records joins them in the manifest. Runs in the calling thread; only the reader owns processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import torch
from torch import nn

from jest_stream.config import Limits, StorageConfig, as_device, as_integer
from jest_stream.errors import ConfigError, ReferenceMismatchError
from jest_stream.reference_cache import fingerprints
from jest_stream.reference_cache.files import EmbeddingsFile, arrow_or_error, key_hashes
from jest_stream.reference_cache.manifest import (
    BEGUN,
    COMPLETE,
    VERSION,
    Header,
    Manifest,
    ShardRecord,
    dump_header,
    dump_manifest,
    header_difference,
    parse_header,
    parse_record,
    read_json,
)
from jest_stream.reference_cache.progress import ProgressLine
from jest_stream.reference_cache.reading import Group, ReadSettings, read_groups
from jest_stream.reference_cache.shard import (
    Embed,
    Progress,
    ShardWork,
    part_file,
    record_file,
    write_whole,
)
from jest_stream.scoring import ReferenceModel, two_tower
from jest_stream.sources import IterableSource
from jest_stream.storage import Storage, redacted
from jest_stream.types import Embeddings, Source
from jest_stream.views import Columns, Key, ScoreView, Transform, view_of

RECORD = re.compile(r"\d{5,}\.json")
"""Names of the records of finished shards."""


def make_header(
    source: Source,
    reference: nn.Module,
    *,
    views: tuple[Transform | None, Transform | None],
    keys: tuple[Key, Key],
    micro_batch_size: int,
    autocast_dtype: torch.dtype | None,
    part_size: int,
) -> Header:
    """Returns what names a build: its reference, views and source.

    Raises:
      ConfigError: for a module that cannot embed, and for views that draw at random.
    """
    tower = two_tower(reference, role="reference")
    scale, bias = tower.module.logit_scale, getattr(tower.module, "logit_bias", None)
    assert isinstance(scale, torch.Tensor)
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"autocast_dtype must be torch.bfloat16, torch.float16 or None, got {autocast_dtype}"
        )
    part_size = as_integer("part_size", part_size, 1)
    image_key, text_key = ("a function" if callable(key) else key for key in keys)
    return Header(
        version=VERSION,
        model=type(tower.module).__name__,
        weights=fingerprints.weights_fingerprint(tower.module),
        transform=fingerprints.transform_fingerprint(views[0]),
        tokenizer=fingerprints.tokenizer_fingerprint(views[1]),
        image_key=image_key,
        text_key=text_key,
        # On the CPU, so that all devices find the same number.
        logit_scale=float(scale.detach().float().cpu().exp()),
        logit_bias=None if bias is None else float(bias.detach().float().cpu()),
        autocast_dtype=None if autocast_dtype is None else str(autocast_dtype),
        micro_batch_size=as_integer("micro_batch_size", micro_batch_size, 1),
        source=source.fingerprint,
        num_shards=source.num_shards,
        part_size=part_size if isinstance(source, IterableSource) else None,
    )


def rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Returns which part of the work is this process's: as given, else as torchrun says."""
    if (rank is None) != (world_size is None):
        raise ConfigError(f"pass rank and world_size together, got {rank} and {world_size}")
    if rank is None:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rank, world_size = as_integer("rank", rank, 0), as_integer("world_size", world_size, 1)
    if rank >= world_size:
        raise ConfigError(f"rank must be below world_size={world_size}, got {rank}")
    return rank, world_size


def usable_device(device: torch.device | str | None) -> torch.device | None:
    """Returns what `device` names; `ConfigError` where nothing can be put on it."""
    found = as_device("device", device)
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise ConfigError(f"device={str(device)!r} cannot be used here: {error}") from error
    return found


def build_into(
    folder: str,
    source: Source,
    reference: nn.Module,
    *,
    storage: StorageConfig | None,
    views: tuple[Transform | None, Transform | None],
    keys: tuple[Key, Key],
    limits: Limits | None,
    micro_batch_size: int,
    autocast_dtype: torch.dtype | None,
    part_size: int,
    device: torch.device | str | None,
    place: tuple[int | None, int | None],
    settings: ReadSettings,
    show_progress: bool,
) -> None:
    """Does this process's part of building a cache; `ReferenceCache.build` explains all."""
    device = usable_device(device)
    header = make_header(
        source,
        reference,
        views=views,
        keys=keys,
        micro_batch_size=micro_batch_size,
        autocast_dtype=autocast_dtype,
        part_size=part_size,
    )
    work = Build(
        source,
        header,
        folder=folder,
        storage=Storage(storage),
        keys=keys,
        views=views,
        limits=limits or Limits(),
        place=place,
    )
    work.run(
        reference,
        device=device,
        autocast_dtype=autocast_dtype,
        settings=settings,
        show_progress=show_progress,
    )


class Build:
    """One process's part of building a cache.

    Args:
      source: what is embedded.
      header: what names the build.
      folder: of the cache.
      storage: that reads and writes it.
      keys: where an example's image and text are.
      views: transform and tokenizer.
      limits: the largest members that are decoded.
      place: rank and number of ranks; None: as torchrun says.
    """

    def __init__(
        self,
        source: Source,
        header: Header,
        *,
        folder: str,
        storage: Storage,
        keys: tuple[Key, Key],
        views: tuple[Transform | None, Transform | None],
        limits: Limits,
        place: tuple[int | None, int | None],
    ) -> None:
        arrow_or_error()  # now, not when the first shard is embedded
        self._source, self._header = source, header
        self._folder, self._storage = folder, storage
        self._rank, self._world_size = rank_and_world_size(*place)
        self._view = ScoreView(
            keys=keys,
            learner=views,
            reference=(None, None),
            keep_image=False,
            limits=limits,
            for_cache=True,
        )
        self._works: dict[int, ShardWork] = {}
        self._records: dict[str, ShardRecord] = {}  # that this process wrote, by file

    def run(
        self,
        reference: nn.Module,
        *,
        device: torch.device | str | None,
        autocast_dtype: torch.dtype | None,
        settings: ReadSettings,
        show_progress: bool,
    ) -> None:
        """Embeds this rank's shards that are not done, and joins the manifest if all are."""
        try:
            names = self._begin()
            own = range(self._rank, self._header.num_shards, self._world_size)
            todo = [] if COMPLETE in names else [s for s in own if record_file(s) not in names]
            if todo:
                model = ReferenceModel(reference, device=device)

                def _embed(columns: Columns) -> Embeddings:
                    return model.embed(
                        _tensors(columns, "image"),
                        _tensors(columns, "text"),
                        autocast_dtype=autocast_dtype,
                    )

                counts = self._source.num_examples
                total = None if counts is None else sum(counts[shard] for shard in todo)
                progress = ProgressLine(len(todo), total, is_shown=show_progress)
                with progress:
                    self._embed_all(todo, names, _embed, settings, progress)
            if COMPLETE not in names:
                self._complete()
        finally:
            for work in self._works.values():
                work.abort()
            self._storage.close()

    def _begin(self) -> set[str]:
        """Claims the folder for this build, or finds that it is; returns what is in it."""
        self._storage.remove_unfinished(self._folder)
        names = set(self._storage.names_in(self._folder))
        found = next((name for name in (COMPLETE, BEGUN) if name in names), None)
        if found is None:
            write_whole(self._storage, f"{self._folder}/{BEGUN}", dump_header(self._header))
        else:
            self._adopt(found)
        return names

    def _adopt(self, file: str) -> None:
        """Takes over what a file says the build is of; raises if that is something else."""
        url = f"{self._folder}/{file}"
        before = parse_header(read_json(self._storage, url), url)
        if difference := header_difference(before, self._header):
            raise ReferenceMismatchError(
                f"{redacted(self._folder)!r} holds a reference cache of something else: "
                f"{difference}. Choose another folder, or delete that one."
            )
        self._header = before

    def _embed_all(
        self,
        todo: Sequence[int],
        names: set[str],
        embed: Embed,
        settings: ReadSettings,
        progress: ProgressLine,
    ) -> None:
        part_size = self._header.part_size
        begun = {shard: self._begun(shard, names) for shard in todo} if part_size else {}
        start = begun[todo[0]].num_read if part_size else 0
        groups = read_groups(self._source, todo, start=start, view=self._view, settings=settings)
        for group in groups:
            shard = group.shard
            if shard not in self._works:
                self._works[shard] = ShardWork(
                    shard,
                    self._name(shard),
                    folder=self._folder,
                    storage=self._storage,
                    embed=embed,
                    micro_batch_size=self._header.micro_batch_size,
                    part_size=part_size,
                    begun=begun.get(shard, Progress()),
                    build=self._header.build,
                )
            self._take(group, progress)

    def _take(self, group: Group, progress: ProgressLine) -> None:
        work = self._works[group.shard]
        progress.add(work.add(group))
        if group.is_end:
            content = self._source.shard_content(group.shard)
            record, num_embedded = work.finish(group.num_read[0], content)
            self._records[record_file(group.shard)] = record
            progress.add(num_embedded)
            progress.end_shard()
            del self._works[group.shard]

    def _name(self, shard: int) -> str:
        """What a shard is called in the cache: without its folder on this machine."""
        name = self._source.shard_name(shard)
        return name if "://" in name else name.rpartition("/")[2] or name

    def _begun(self, shard: int, names: set[str]) -> Progress:
        """Returns what is finished of a shard that is cached in parts."""
        progress = Progress()
        part_size = self._header.part_size
        while (name := part_file(shard, len(progress.parts), part_size)) + ".json" in names:
            record = self._read_record(f"{name}.json")
            (part,) = record.parts
            data = self._storage.mapped(f"{self._folder}/{part.file}")
            file = EmbeddingsFile(
                data,
                part.file,
                num_examples=part.num_examples,
                dimension=part.dimension,
                build=self._header.build,
            )
            keys = [key for i in range(len(file.starts) - 1) for key in file.batch(i).keys]
            progress = Progress(
                parts=(*progress.parts, part),
                num_read=record.num_read,
                skipped=record.skipped,
                hashes=(*progress.hashes, key_hashes(keys)),
            )
        return progress

    def _complete(self) -> None:
        """Joins the records, if all are there."""
        names = set(self._storage.names_in(self._folder))
        files = [record_file(shard) for shard in range(self._header.num_shards)]
        if not names.issuperset(files):
            return
        records = tuple(self._records.get(file) or self._read_record(file) for file in files)
        self._adopt(BEGUN)  # two builds may have found the folder empty at once; one file is left
        manifest = Manifest(header=self._header, shards=records)
        sizes = {part.dimension for record in records for part in record.parts}
        assert len(sizes) < 2, f"one reference gave embeddings of {sizes} dimensions"
        write_whole(self._storage, f"{self._folder}/{COMPLETE}", dump_manifest(manifest))

    def _read_record(self, file: str) -> ShardRecord:
        url = f"{self._folder}/{file}"
        return parse_record(read_json(self._storage, url), url)


def _tensors(columns: Columns, name: str) -> dict[str, torch.Tensor] | torch.Tensor:
    view = view_of(columns, name)
    if isinstance(view, list):
        raise ConfigError(
            f"{name} of example {columns['key'][0]!r} is a {type(view[0]).__name__}, but the "
            f"reference takes tensors. Pass tokenizer=, a function that turns the text into one."
        )
    return view
