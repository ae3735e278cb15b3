"""Reads tar shards: an archive that ends early is an error, never a shorter shard.

In: addresses of tar files in the webdataset convention (members `KEY.EXTENSION`, those of one
example side by side), or of a manifest that lists them. Out: examples, still encoded, each with the
byte offset of the next one; reading starts at any such offset. The list of shards is settled once,
where the source is made; workers are sent the result. No threads; one open file per reader.
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
from jest_stream.sources.manifest import ShardEntry, is_manifest, read_manifest
from jest_stream.sources.stored import StoredSource
from jest_stream.storage import scheme_of
from jest_stream.types import Example, ObjectInfo

_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


class TarSource(StoredSource):
    """Reads tar shards on local disk, in an object store, on a web server or on the Hub.

    Every local shard must exist when the source is made, and the first remote one; the others are
    checked when they are opened. A shard must keep the length and version that were seen first. A
    key that comes again within a shard is a bad example; a reader that starts at an offset knows
    only the keys from there on.

    A manifest (an address that ends in `.json`: webdataset's sizes, a wids index, or a file of
    `write_manifest`) promises numbers of examples and bytes: a shard that holds another number is
    an error too.

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
        super().__init__(storage)
        self._max_example_bytes = max_example_bytes
        self._files: list[ShardEntry] = []
        # Length and version of each shard when it was first seen, here or in the process that
        # sent this source here.
        self._seen: dict[int, ObjectInfo] = {}
        with self._closed_on_error():
            self._list(urls)
            self._fingerprint = self._named_by()
            if 0 not in self._seen:  # a wrong name, bucket or password is noticed before training
                self._seen[0] = self._storage.info(self._files[0].url)
            for shard, info in self._seen.items():
                self._storage.check_fits(self._files[shard].url, info)

    @property
    def num_examples(self) -> Sequence[int] | None:
        """Examples of each shard by the manifest; None unless it says so of all."""
        counts = [file.num_examples for file in self._files if file.num_examples is not None]
        return counts if len(counts) == len(self._files) else None

    @property
    def fingerprint(self) -> str:
        """Names and sizes of the shards, in order; the folder they lie in does not count.

        Of remote shards without a known size the whole address counts, without its query.
        """
        return self._fingerprint

    def shard_content(self, shard: int) -> tuple[int, str]:
        """Returns the length of a shard and its ETag or the like, as they were seen first."""
        return self._info(shard)

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples that start at `offset` or after it; see `types.Source`.

        Raises:
          ShardTruncatedError: where the shard ends before its end-of-archive marker.
          ShardChangedError: if it is not the object that was seen first.
          ShardError: where it is not a tar archive, or holds another number of examples or bytes
            than its manifest promises.
          ShardUnavailableError: if it cannot be opened.
          UnsafeDataError: for an example larger than `max_example_bytes`.
        """
        name, promised = self.shard_name(shard), self._files[shard].num_examples
        with self._storage.open(self._files[shard].url, self._info(shard)) as file:
            members = Members(file, name, offset)
            for example, next_offset in _examples(members, name, self._max_example_bytes):
                index += 1
                # One example too many is reported at once: a shard that was replaced by a larger
                # one is not read to its end first.
                if promised is not None and index > promised:
                    raise _other_number(name, promised, f"more than {promised:,}", members.position)
                yield example, next_offset
            if promised is not None and index < promised:
                raise _other_number(name, promised, f"{index:,}", members.position)
            members.check_tail(is_counted=promised is not None)

    def count(self, shard: int) -> ShardEntry:
        """Returns the numbers of examples and bytes of a shard, by its headers; it must be whole.

        Raises:
          ShardError: as `read`.
        """
        name, promised = self.shard_name(shard), self._files[shard].num_examples
        info = self._info(shard)
        with self._storage.open(self._files[shard].url, info) as file:
            members = Members(file, name, 0)
            num_examples, last_key = 0, None
            for member in members:
                if (parts := _key_and_extension(member)) and parts[0] != last_key:
                    num_examples, last_key = num_examples + 1, parts[0]
            if promised is not None and num_examples != promised:
                raise _other_number(name, promised, f"{num_examples:,}", members.position)
            members.check_tail(is_counted=promised is not None)
        return ShardEntry(self._files[shard].url, num_examples, info.num_bytes)

    def _info(self, shard: int) -> ObjectInfo:
        """Returns length and version of a shard as first seen; looks now if it was not."""
        entry = self._files[shard]
        # First seen, not now: a shard that is replaced during a run must be noticed.
        info = self._seen.get(shard)
        if info is None:
            info = self._seen[shard] = self._storage.info(entry.url)
        if entry.num_bytes not in (None, info.num_bytes):
            raise ShardError(
                f"shard {self.shard_name(shard)!r} has {info.num_bytes:,} bytes, its manifest "
                f"promises {entry.num_bytes:,}: it was cut off or replaced. Fetch it again, or "
                "make the manifest anew.",
                shard=self.shard_name(shard),
                offset=min(info.num_bytes, entry.num_bytes or 0),
            )
        return info

    def _list(self, urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> None:
        for url in self._storage.expand(urls):
            if is_manifest(url):
                self._files += read_manifest(self._storage, url)
            else:
                if (info := self._storage.listed(url)) is not None:
                    self._seen[len(self._files)] = info
                self._files.append(ShardEntry(url))
        # Local shards cost a stat each. Remote ones cost a request each, and thousands would
        # delay the start: they are asked about when they are opened.
        for shard, entry in enumerate(self._files):
            if not scheme_of(entry.url):
                self._seen[shard] = self._storage.info(entry.url)

    def _named_by(self) -> str:
        """Returns the fingerprint, of the facts known before any remote shard is asked for."""
        lines = []
        for shard, (url, _, num_bytes) in enumerate(self._files):
            if shard in self._seen:
                num_bytes = self._seen[shard].num_bytes
            # The name is as short as can tell two lists apart:
            # 1. A local shard: file name and size. The list may move to another folder.
            # 2. A remote shard of known size: likewise, e.g. to another bucket.
            # 3. A remote shard of unknown size: the address. A name such as 00000.tar alone says
            #    nothing.
            if not scheme_of(url):
                name = os.path.basename(url)
            else:
                parts = urlsplit(url)
                name = posixpath.basename(parts.path)
                if num_bytes is None:
                    name = f"{parts.scheme}://{parts.hostname}{parts.path}"
            lines.append(f"{name}\0{num_bytes}\n")
        return hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()


def _examples(
    members: Members, shard: str, max_bytes: int
) -> Iterator[tuple[Example | BadExampleError, int]]:
    """Joins members side by side that share a key; yields each example and the next one's offset.

    Of an example with two faults the first is reported; its other members are passed over unread.
    """
    example: Example = {}
    problem: BadExampleError | None = None
    num_bytes = 0
    seen: set[str] = set()
    for member in members:
        if not (parts := _key_and_extension(member)):
            continue
        key, extension = parts
        if key != example.get("__key__"):
            # An example is complete once another key begins, and reading goes on at the header of
            # that member: members a.jpg at byte 0, a.txt at 1024 and b.jpg at 2048 yield (a, 2048).
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


def _key_and_extension(member: Member) -> tuple[str, str] | None:
    """Returns key and extension of a member; None if it belongs to no example.

    >>> _key_and_extension(Member("a/b.seg.PNG", 0, tarfile.REGTYPE, 0))
    ('a/b', 'seg.png')
    """
    # Imported here: `import jest_stream` must not import webdataset.
    from webdataset.tariterators import base_plus_ext

    if member.kind == tarfile.DIRTYPE:
        return None
    key, extension = base_plus_ext(member.name)
    # No example has 1. a name without an extension, 2. a dotfile, which webdataset takes for the
    # extension of its folder ("a/.b" for "b" of "a/").
    if key is None or key.endswith("/"):
        return None
    # 3. the metadata of webdataset (`__name__`) and of macOS.
    if member.name.startswith("__"):
        first = member.name.partition("/")[0]
        if first == "__MACOSX" or first.endswith("__"):
            return None
    return key, extension.lower()


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
