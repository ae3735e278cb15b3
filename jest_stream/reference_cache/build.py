"""Embeds a source into a cache, shard by shard, by any number of processes.

In: a source, a reference and the settings of the build. Out: the missing files of the cache.
No process waits for another or knows of it. A shard is done when its record exists; records and
files are put into place whole, and hold the same bytes whichever process writes them. The process
that then finds all records joins them in the manifest. Runs in the calling thread; only the reader
owns processes.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from jest_stream.errors import ReferenceMismatchError
from jest_stream.reference_cache import fingerprints
from jest_stream.reference_cache.files import EmbeddingsFile
from jest_stream.reference_cache.index import key_hashes
from jest_stream.reference_cache.manifest import (
    BEGUN,
    COMPLETE,
    VERSION,
    Header,
    Manifest,
    ShardRecord,
    dump,
    dump_manifest,
    header_difference,
    parse_header,
    parse_record,
    part_file,
    read_json,
    record_file,
    short_name,
    write_whole,
)
from jest_stream.reference_cache.progress import BuildProgress
from jest_stream.reference_cache.reading import read_slices
from jest_stream.reference_cache.settings import BuildSettings
from jest_stream.reference_cache.shard import FinishedParts, ShardWork
from jest_stream.scoring import ReferenceModel, two_tower
from jest_stream.sources import IterableSource
from jest_stream.storage import Storage, redacted
from jest_stream.types import Embeddings, Source
from jest_stream.views import Columns, ScoreView, tensors_of


def make_header(source: Source, reference: nn.Module, settings: BuildSettings) -> Header:
    """Returns the header of a build: it names the reference, its views and the source.

    Raises:
      ConfigError: for a module that cannot embed, and for views that draw at random.
    """
    module = two_tower(reference, role="reference").module
    scale, bias = module.logit_scale, getattr(module, "logit_bias", None)
    assert isinstance(scale, Tensor)
    dtype, keys = settings.autocast_dtype, (settings.image_key, settings.text_key)
    image_key, text_key = ("a function" if callable(key) else key for key in keys)
    return Header(
        version=VERSION,
        model=type(module).__name__,
        weights=fingerprints.weights_fingerprint(module),
        transform=fingerprints.transform_fingerprint(settings.transform),
        tokenizer=fingerprints.tokenizer_fingerprint(settings.tokenizer),
        image_key=image_key,
        text_key=text_key,
        # On the CPU, so that all devices find the same number.
        logit_scale=float(scale.detach().float().cpu().exp()),
        logit_bias=None if bias is None else float(bias.detach().float().cpu()),
        autocast_dtype=None if dtype is None else str(dtype),
        micro_batch_size=int(settings.micro_batch_size),
        source=source.fingerprint,
        num_shards=source.num_shards,
        part_size=int(settings.part_size) if isinstance(source, IterableSource) else None,
    )


class Build:
    """Builds one process's share of a cache.

    Args:
      folder: folder of the cache.
      source: the source to embed.
      reference: embeds it.
      settings: of the build.
    """

    def __init__(
        self, folder: str, source: Source, reference: nn.Module, settings: BuildSettings
    ) -> None:
        self._folder, self._source = folder, source
        self._reference, self._settings = reference, settings
        self._header = make_header(source, reference, settings)
        self._storage = Storage(settings.storage)
        self._works: dict[int, ShardWork] = {}  # by shard: one per lane of the reader at a time
        self._records: dict[str, ShardRecord] = {}  # by file: those that this process wrote

    def run(self) -> None:
        """Embeds this rank's shards that are not done, and writes the manifest if all are."""
        try:
            names = self._begin()
            if COMPLETE in names:
                return
            # Ranks need not agree on anything: 7 shards and 3 ranks are (0, 3, 6), (1, 4), (2, 5).
            own = range(self._settings.rank, self._header.num_shards, self._settings.world_size)
            if todo := [shard for shard in own if record_file(shard) not in names]:
                self._embed(todo, names)
            self._complete()
        finally:
            for work in self._works.values():
                work.abort()
            self._storage.close()

    def _begin(self) -> set[str]:
        """Claims the folder for this build, or finds that it is; returns the names in it."""
        self._storage.remove_unfinished(self._folder)
        names = set(self._storage.names_in(self._folder))
        # There are three cases: 1. the cache is complete, 2. a build has begun, perhaps that of
        # another rank, 3. the folder is free.
        found = next((name for name in (COMPLETE, BEGUN) if name in names), None)
        if found is None:
            write_whole(self._storage, f"{self._folder}/{BEGUN}", dump(self._header))
        else:
            self._adopt(found)
        return names

    def _adopt(self, file: str) -> None:
        """Takes over the header in a file; raises if it is that of another build."""
        url = f"{self._folder}/{file}"
        before = parse_header(read_json(self._storage, url), url)
        if difference := header_difference(before, self._header):
            raise ReferenceMismatchError(
                f"{redacted(self._folder)!r} holds a reference cache of something else: "
                f"{difference}. Choose another folder, or delete that one."
            )
        self._header = before

    def _embed(self, todo: list[int], names: set[str]) -> None:
        """Embeds some shards.

        Args:
          todo: their numbers, at least one.
          names: of the files in the folder.
        """
        model = ReferenceModel(self._reference, device=self._settings.device)
        is_in_parts = self._header.part_size is not None
        begun = {shard: self._begun(shard, names) for shard in todo} if is_in_parts else {}
        counts = self._source.num_examples
        num_examples = None if counts is None else sum(counts[shard] for shard in todo)
        # Only a source of one shard is cached in parts.
        start = begun[todo[0]].num_read if is_in_parts else 0
        slices = read_slices(
            self._source, todo, start=start, view=self._view(), settings=self._settings
        )
        is_shown = self._settings.show_progress
        with BuildProgress(len(todo), num_examples, is_shown=is_shown) as progress:
            for rows in slices:
                shard = rows.shard
                if shard not in self._works:
                    self._works[shard] = ShardWork(
                        shard,
                        self._name(shard),
                        header=self._header,
                        folder=self._folder,
                        storage=self._storage,
                        embed=partial(_embedded, model, self._settings),
                        begun=begun.get(shard, FinishedParts()),
                    )
                work = self._works[shard]
                progress.add(work.add(rows))
                if rows.is_end:
                    record, num_embedded = work.finish(
                        rows.num_read[0], self._source.shard_content(shard)
                    )
                    self._records[record_file(shard)] = record
                    progress.add(num_embedded, num_shards=1)
                    del self._works[shard]

    def _view(self) -> ScoreView:
        settings = self._settings
        return ScoreView(
            keys=(settings.image_key, settings.text_key),
            learner=(settings.transform, settings.tokenizer),
            reference=(None, None),
            keep_image=False,
            limits=settings.limits,
            for_cache=True,
        )

    def _name(self, shard: int) -> str:
        """Returns the shard's name in the cache: without its folder on this machine."""
        name = self._source.shard_name(shard)
        return name if "://" in name else short_name(name)

    def _begun(self, shard: int, names: set[str]) -> FinishedParts:
        """Returns the finished parts of a shard that is cached in parts."""
        finished = FinishedParts()
        part_size = self._header.part_size
        while (name := part_file(shard, len(finished.parts), part_size)) + ".json" in names:
            record = self._read_record(f"{name}.json")
            (part,) = record.parts
            # The file is opened for its keys: one that comes twice, in two parts, must be noticed.
            data = self._storage.mapped(f"{self._folder}/{part.file}")
            file = EmbeddingsFile(data, part.file, part, self._header.build)
            finished = FinishedParts(
                parts=(*finished.parts, part),
                num_read=record.num_read,
                skipped=record.skipped,
                hashes=(*finished.hashes, key_hashes(file.keys())),
            )
        return finished

    def _complete(self) -> None:
        """Writes the manifest, if all shards are done."""
        # Listed anew: other ranks have finished shards meanwhile. The last to come here finds all.
        names = set(self._storage.names_in(self._folder))
        files = [record_file(shard) for shard in range(self._header.num_shards)]
        if not names.issuperset(files):
            return
        records = tuple(self._records.get(file) or self._read_record(file) for file in files)
        # Two builds may have found the folder empty at once; the header of one of them is left.
        self._adopt(BEGUN)
        sizes = {part.dimension for record in records for part in record.parts}
        assert len(sizes) < 2, f"one reference gave embeddings of {sizes} dimensions"
        manifest = Manifest(header=self._header, shards=records)
        write_whole(self._storage, f"{self._folder}/{COMPLETE}", dump_manifest(manifest))

    def _read_record(self, file: str) -> ShardRecord:
        url = f"{self._folder}/{file}"
        return parse_record(read_json(self._storage, url), url)


def _embedded(model: ReferenceModel, settings: BuildSettings, columns: Columns) -> Embeddings:
    return model.embed(
        tensors_of(columns, "image", "the reference"),
        tensors_of(columns, "text", "the reference"),
        autocast_dtype=settings.autocast_dtype,
    )
