"""Writes and reads the JSON files that describe a reference cache.

`build.json` is written first: it names the reference, the views and the source. One `NNNNN.json`
per shard appears when the shard is done, and `manifest.json`, which joins them all, when every
shard is. The bytes of each depend on the embedded data alone: it does not matter which process
writes them, or how often. Pure functions but for reading and writing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from jest_stream.errors import CacheDamagedError, ReferenceMismatchError
from jest_stream.reference_cache.fingerprints import ViewFingerprint, view_difference
from jest_stream.storage import Storage, redacted

VERSION = 2  # of the format; files of any other are refused
BEGUN, COMPLETE = "build.json", "manifest.json"
RECORD = re.compile(r"\d{5,}\.json")
"""Matches the names of the records of finished shards."""
_MAX_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Header:
    """The reference, views and source that a cache was built of."""

    version: int
    """Version of the format."""
    model: str
    """Class name of the reference, for messages."""
    weights: str
    """Fingerprint of the reference's weights."""
    transform: ViewFingerprint
    tokenizer: ViewFingerprint
    image_key: str
    """Members that hold the image; "a function" where the user passed one."""
    text_key: str
    logit_scale: float
    """Multiplier, already exponentiated."""
    logit_bias: float | None
    """Offset; None for a model without one."""
    autocast_dtype: str | None
    micro_batch_size: int
    """Examples per forward pass; embeddings of other sizes are rounded differently."""
    source: str
    """Fingerprint of the source."""
    num_shards: int
    part_size: int | None
    """Examples per file of a source without shards; None where a shard is a file."""

    @property
    def build(self) -> str:
        """Hash of the fields that must be exactly the same to go on with a build."""
        # Three fields are missing: views are compared with some tolerance (`view_difference`), and
        # the model's name, which serves messages, not at all.
        about = (
            *(self.version, self.weights, self.image_key, self.text_key, self.logit_scale),
            *(self.logit_bias, self.autocast_dtype, self.micro_batch_size, self.source),
            *(self.num_shards, self.part_size),
        )
        return hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """One Arrow file."""

    file: str
    num_examples: int
    num_bytes: int
    dimension: int


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard of the source, and the files with its embeddings."""

    name: str
    """The source's name for the shard; of a local file without its folder."""
    num_bytes: int | None
    """Length of the shard when it was embedded; None for one that is no file."""
    version: str
    """ETag or the like; "" if unknown."""
    num_read: int
    """Examples in the shard, unusable ones too."""
    skipped: Mapping[str, int]
    """Examples that were left out, by reason."""
    parts: tuple[PartRecord, ...]
    index: str | None = None
    """File that finds keys among several parts."""

    @property
    def num_examples(self) -> int:
        """The number of cached examples."""
        return sum(part.num_examples for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete cache."""

    header: Header
    shards: tuple[ShardRecord, ...]

    @property
    def num_examples(self) -> int:
        """The number of cached examples."""
        return sum(shard.num_examples for shard in self.shards)

    @property
    def dimension(self) -> int:
        """Embedding dimension; 0 without embeddings."""
        return next((part.dimension for shard in self.shards for part in shard.parts), 0)


def short_name(name: str) -> str:
    """Returns the name of a shard without the folder that it lies in."""
    return name.rpartition("/")[2] or name


def record_file(shard: int) -> str:
    """Returns the name of the file whose presence says that a shard is done."""
    return f"{shard:05d}.json"


def part_file(shard: int, part: int, part_size: int | None) -> str:
    """Returns the name of an Arrow file, without its suffix."""
    return f"{shard:05d}" if part_size is None else f"{shard:05d}-{part:05d}"


def dump(content: Header | ShardRecord) -> bytes:
    """Returns the bytes of `build.json`, or of a shard's file."""
    return (json.dumps(asdict(content), sort_keys=True, indent=1) + "\n").encode()


def dump_manifest(manifest: Manifest) -> bytes:
    """Returns the bytes of `manifest.json`: one line per shard."""
    lines = ",\n".join(json.dumps(asdict(shard), sort_keys=True) for shard in manifest.shards)
    about = {
        **asdict(manifest.header),
        "dimension": manifest.dimension,
        "num_examples": manifest.num_examples,
    }
    head = json.dumps(about, sort_keys=True, indent=1)
    # The head ends in "\n}", in place of which the list of shards follows.
    return f'{head[:-2]},\n "shards": [\n{lines}\n]}}\n'.encode()


def write_whole(storage: Storage, url: str, data: bytes) -> None:
    """Writes a small file, whole or not at all."""
    file = storage.create(url)
    try:
        file.write(data)
    except BaseException:
        file.abort()
        raise
    file.commit()


def read_json(storage: Storage, url: str) -> dict[str, Any]:
    """Returns the object in a JSON file of a cache.

    Raises:
      CacheDamagedError: if it is cut or no JSON object.
      ReferenceMismatchError: if a later release wrote it.
      ShardUnavailableError: if it cannot be read.
    """
    with storage.open(url) as file:
        data = file.read(_MAX_BYTES)
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, RecursionError) as error:
        raise damaged(url, f"is no whole JSON object ({error})", offset=len(data)) from error
    # Only headers and manifests have weights; the version of a shard's record is its ETag.
    version = content.get("version", VERSION)
    if "weights" in content and version != VERSION:
        raise ReferenceMismatchError(
            f"{redacted(url)!r} has format version {version!r}, this release reads {VERSION}. Use "
            "the release that built the cache, or build it anew."
        )
    return content


def parse_header(content: Mapping[str, Any], url: str) -> Header:
    """Returns the header in a JSON object; `CacheDamagedError` if it is none."""
    try:
        return Header(**{field.name: content[field.name] for field in fields(Header)})
    except KeyError as error:
        raise damaged(url, f"lacks {error}") from error


def parse_record(content: Mapping[str, Any], url: str) -> ShardRecord:
    """Returns the shard in a JSON object; `CacheDamagedError` if it is none."""
    try:
        parts = tuple(
            PartRecord(**{field.name: part[field.name] for field in fields(PartRecord)})
            for part in content["parts"]
        )
        names = [field.name for field in fields(ShardRecord) if field.name != "parts"]
        record = ShardRecord(parts=parts, **{name: content[name] for name in names})
        # A manifest may come from strangers: its files are never looked for elsewhere.
        files = [part.file for part in parts] + ([record.index] if record.index else [])
        if any("/" in file or file.startswith(".") for file in files):
            raise ValueError("it names a file outside of the cache")
        return record
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(url, f"does not describe a shard ({error})") from error


def parse_manifest(content: Mapping[str, Any], url: str) -> Manifest:
    """Returns the manifest in a JSON object; `CacheDamagedError` if it is none."""
    header = parse_header(content, url)
    listed = content.get("shards")
    if not isinstance(listed, list) or len(listed) != header.num_shards:
        found = len(listed) if isinstance(listed, list) else "no"
        raise damaged(url, f"lists {found} shards, and promises {header.num_shards}")
    return Manifest(header=header, shards=tuple(parse_record(shard, url) for shard in listed))


def damaged(url: str, problem: str, *, offset: int = 0) -> CacheDamagedError:
    """Returns the error for a file of a cache that is not whole."""
    return CacheDamagedError(
        f"{redacted(url)!r} of the reference cache {problem}. It was cut or overwritten: delete it "
        f"with manifest.json and, of a shard, the .json of that number; building again makes the "
        f"missing files, and nothing else.",
        shard=redacted(url),
        offset=offset,
    )


def header_difference(before: Header, now: Header) -> str:
    """Returns in words how two builds differ; empty if one continues the other."""
    # There are three cases: 1. the model's name is for messages only; 2. views are compared with
    # a tolerance, by their outputs; 3. everything else must be equal.
    for field in fields(Header):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if field.name == "model":
            continue
        if field.name in ("transform", "tokenizer"):
            if difference := view_difference(old, new):
                return f"another {field.name}: {difference}"
        elif old != new:
            return f"{field.name} was {old!r}, is {new!r}"
    return ""
