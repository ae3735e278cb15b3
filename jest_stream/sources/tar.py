"""Tar shards: an archive that ends early is an error, never a shorter shard.

In: addresses of tar files in the webdataset convention (members `KEY.EXTENSION`, those of one
example side by side), or of a manifest that lists them. Out: examples, still encoded, each with the
byte offset behind it, from any such offset on. What there is to read is settled once, where the
source is made; workers are sent the result. No threads; one open file per reader.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from jest_stream.config import StorageConfig
from jest_stream.errors import BadExampleError, ShardError, UnsafeDataError
from jest_stream.sources.archive import Member, Members
from jest_stream.sources.manifest import Listed, is_manifest, read_manifest
from jest_stream.storage import Storage, redacted, scheme_of
from jest_stream.types import Example, ObjectInfo

_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


class TarSource:
    """Tar shards on local disk, in an object store, on a web server or on the Hub; as written.

    Every local shard must exist when the source is made, and the first remote one; the others are
    checked when they are opened. A shard whose length or version differs from what was seen first
    is an error. A key that comes again within a shard is a bad example; a reader that starts at an
    offset knows only the keys behind it.

    A manifest (an address that ends in `.json`: webdataset's sizes, a wids index, or what
    `jest_stream.sources.manifest.write_manifest` writes) says how many examples and bytes there
    are: a shard that holds another number is an error too.

    Args:
      urls: paths, brace or glob patterns, `file://`, `s3://`, `gs://`, `http(s)://` or `hf://`
        addresses, of shards or manifests; or a list of these.
      storage: how remote shards are read.
      max_example_bytes: most bytes that the members of one example may hold.

    Raises:
      ConfigError: if nothing matches, an address cannot be read, or a shard is larger than the
        cache.
      UnsafeDataError: for an address outside the allow-list.
      ShardUnavailableError: for a shard that does not exist.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        storage: StorageConfig | None = None,
        max_example_bytes: int = 256 << 20,
    ) -> None:
        self._storage = Storage(storage or StorageConfig())
        self._max_example_bytes = max_example_bytes
        self._shards: list[Listed] = []
        # What was seen of each shard first, in this process or in the one that sent it here.
        self._seen: dict[int, ObjectInfo] = {}
        try:
            self._list(urls)
            self._fingerprint = self._named_by()
            if 0 not in self._seen:  # a wrong name, bucket or password is noticed before training
                self._seen[0] = self._storage.info(self._shards[0].url)
            for shard, info in self._seen.items():
                self._storage.check_fits(self._shards[shard].url, info)
        except BaseException:
            self._storage.close()  # the error, as long as somebody holds it, holds this
            raise

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self._shards)

    @property
    def num_examples(self) -> Sequence[int] | None:
        """Examples of each shard, as the manifest says; None if it does not say so of all."""
        counts = [shard.num_examples for shard in self._shards if shard.num_examples is not None]
        return counts if len(counts) == len(self._shards) else None

    @property
    def fingerprint(self) -> str:
        """Names and sizes of the shards, in order; the folder they lie in does not count.

        Of remote shards without a known size the whole address counts, without its query.
        """
        return self._fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the address of a shard, without secrets."""
        url = self._shards[shard].url
        return redacted(url) if scheme_of(url) else url

    def shard_content(self, shard: int) -> tuple[int, str]:
        """Returns the length of a shard and its ETag or the like, as they were seen first."""
        return self._info(shard)

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples that start at `offset` or behind it: see `types.Source`.

        Raises:
          ShardTruncatedError: where the shard ends before its end-of-archive marker.
          ShardChangedError: if it is not the object that was seen first.
          ShardError: where it is not a tar archive, or holds another number of examples or bytes
            than its manifest promises.
          ShardUnavailableError: if it cannot be opened.
          UnsafeDataError: for an example larger than `max_example_bytes`.
        """
        name, promised = self.shard_name(shard), self._shards[shard].num_examples
        with self._storage.open(self._shards[shard].url, self._info(shard)) as file:
            members = Members(file, name, offset)
            for example, behind in _group(members, name, self._max_example_bytes):
                index += 1
                if promised is not None and index > promised:
                    raise _other_number(name, promised, f"more than {promised:,}", members.position)
                yield example, behind
            if promised is not None and index < promised:
                raise _other_number(name, promised, f"{index:,}", members.position)
            members.check_tail(is_counted=promised is not None)

    def count(self, shard: int) -> Listed:
        """Returns what a shard holds, from its headers; it must be whole.

        Raises:
          ShardError: as `read`.
        """
        name, promised = self.shard_name(shard), self._shards[shard].num_examples
        info = self._info(shard)
        with self._storage.open(self._shards[shard].url, info) as file:
            members = Members(file, name, 0)
            num_examples, last = 0, None
            for member in members:
                parts = _split(member.name)
                if member.kind != tarfile.DIRTYPE and parts and parts[0] != last:
                    num_examples, last = num_examples + 1, parts[0]
            if promised is not None and num_examples != promised:
                raise _other_number(name, promised, f"{num_examples:,}", members.position)
            members.check_tail(is_counted=promised is not None)
        return Listed(self._shards[shard].url, num_examples, info.num_bytes)

    def take_counts(self) -> dict[str, int]:
        """Returns what storage counted in this process since the last call: bytes, retries, ..."""
        return self._storage.take_counts()

    def close(self) -> None:
        """Closes what this process has open, connections too; reading opens it anew."""
        self._storage.close()

    def __repr__(self) -> str:
        return f"<TarSource {self.num_shards} shards | {self.shard_name(0)} ...>"

    def _info(self, shard: int) -> ObjectInfo:
        """Returns what was seen of a shard first; looks now if it has not been seen."""
        listed = self._shards[shard]
        info = self._seen.get(shard)
        if info is None:
            info = self._seen[shard] = self._storage.info(listed.url)
        if listed.num_bytes not in (None, info.num_bytes):
            raise ShardError(
                f"shard {self.shard_name(shard)!r} has {info.num_bytes:,} bytes, its manifest "
                f"promises {listed.num_bytes:,}: it was cut off or replaced. Fetch it again, or "
                "make the manifest anew.",
                shard=self.shard_name(shard),
                offset=min(info.num_bytes, listed.num_bytes or 0),
            )
        return info

    def _list(self, urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        for url in self._storage.expand(urls):
            if is_manifest(url):
                self._shards += read_manifest(self._storage, url)
            else:
                if (info := self._storage.listed(url)) is not None:
                    self._seen[len(self._shards)] = info
                self._shards.append(Listed(url))
        for shard, (url, _, _) in enumerate(self._shards):
            if not scheme_of(url):
                self._seen[shard] = self._storage.info(url)

    def _named_by(self) -> str:
        """Returns the fingerprint of what is known before any remote shard is asked for."""
        digest = hashlib.blake2b(digest_size=16)
        for shard, (url, _, num_bytes) in enumerate(self._shards):
            if shard in self._seen:
                num_bytes = self._seen[shard].num_bytes
            if not scheme_of(url):
                name = os.path.basename(url)
            else:
                parts = urlsplit(url)
                name = posixpath.basename(parts.path)
                if num_bytes is None:
                    name = f"{parts.scheme}://{parts.hostname}{parts.path}"
            digest.update(f"{name}\0{num_bytes}\n".encode())
        return digest.hexdigest()


def _group(
    members: Members, shard: str, max_bytes: int
) -> Iterator[tuple[Example | BadExampleError, int]]:
    """Joins members side by side that share a key."""
    example: Example = {}
    problem: BadExampleError | None = None
    num_bytes = 0
    seen: set[str] = set()
    for member in members:
        if member.kind == tarfile.DIRTYPE or not (parts := _split(member.name)):
            continue
        key, extension = parts
        if key != example.get("__key__"):
            if example:
                yield problem or example, member.offset
            example = {"__key__": key, "__shard__": shard}
            problem, num_bytes = _check_key(key, shard, seen), 0
            seen.add(key)
        if problem is None:
            problem = _check_member(member, extension, example)
        if problem is None:
            num_bytes += member.size
            if num_bytes > max_bytes:
                raise UnsafeDataError(
                    f"example {key!r} of shard {shard!r} holds {num_bytes:,} bytes or more, the "
                    f"limit is {max_bytes:,} (member {member.name!r} at byte {member.offset}). If "
                    "that is right, pass TarSource(..., max_example_bytes=...)."
                )
            example[extension] = members.data(member)
    if example:
        yield problem or example, members.position


def _split(name: str) -> tuple[str, str] | None:
    """Returns key and extension of a member; None if it belongs to no example.

    As webdataset does: `a/b.seg.PNG` is `seg.png` of `a/b`; names without an extension, dotfiles
    and `__metadata__` are passed over, and so is what macOS adds.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return None
    if name.startswith("__"):
        first = name.partition("/")[0]
        if first == "__MACOSX" or first.endswith("__"):
            return None
    return folder + slash + stem, extension.lower()


def _check_key(key: str, shard: str, seen: set[str]) -> BadExampleError | None:
    if key in seen:
        return BadExampleError(
            f"example {key!r} comes again in shard {shard!r}: examples are told apart by their "
            "key. Give each its own.",
            key=key,
            shard=shard,
            reason="duplicate_key",
        )
    if not key.isascii() and any("\ud800" <= character <= "\udfff" for character in key):
        printable = key.encode("utf-8", "backslashreplace").decode()
        return BadExampleError(
            f"example {printable!r} of shard {shard!r} has a name that is not UTF-8; rename it.",
            key=printable,
            shard=shard,
            reason="unreadable_key",
        )
    return None


def _check_member(member: Member, extension: str, example: Example) -> BadExampleError | None:
    key, shard = example["__key__"], example["__shard__"]
    if extension in example:
        return BadExampleError(
            f"example {key!r} of shard {shard!r} has two members {extension!r}; which one is meant "
            "cannot be told. Remove one.",
            key=key,
            shard=shard,
            reason="duplicate_member",
        )
    if member.kind not in _REGULAR:
        return BadExampleError(
            f"member {member.name!r} of shard {shard!r} is a link or a device, not a file; its "
            "bytes are not there. Pack with tar --dereference --hard-dereference.",
            key=key,
            shard=shard,
            reason="unsupported_member",
        )
    return None


def _other_number(name: str, promised: int, found: str, offset: int) -> ShardError:
    return ShardError(
        f"shard {name!r} holds {found} examples, its manifest promises {promised:,}. Fetch it "
        "again, or make the manifest anew.",
        shard=name,
        offset=offset,
    )
