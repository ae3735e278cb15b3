"""Tar shards: an archive that ends early is an error, never a shorter shard.

In: paths of tar files in the webdataset convention (members `KEY.EXTENSION`, those of one example
side by side). Out: examples, still encoded, each with the byte offset behind it, from any such
offset on. No threads; one open file per reader.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from collections.abc import Iterator, Sequence

from jest_stream import storage
from jest_stream.errors import BadExampleError, ConfigError, UnsafeDataError
from jest_stream.sources.archive import Member, Members
from jest_stream.types import Example

_REGULAR = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE}


class TarSource:
    """Local tar shards, in the order written.

    Every shard must exist when the source is made. A key that comes again within a shard is a bad
    example; a reader that starts at an offset knows only the keys behind it.

    Args:
      urls: paths, brace or glob patterns, `file://` addresses, or a list of these.
      max_example_bytes: most bytes that the members of one example may hold.

    Raises:
      ConfigError: if nothing matches, or an address cannot be read.
      UnsafeDataError: for an address outside the allow-list.
      ShardUnavailableError: for a shard that does not exist.
    """

    def __init__(
        self,
        urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        max_example_bytes: int = 256 << 20,
    ) -> None:
        self._paths = storage.expand(urls)
        self._max_example_bytes = max_example_bytes
        digest = hashlib.blake2b(digest_size=16)
        for path in self._paths:
            digest.update(f"{os.path.basename(path)}\0{_size_of(path)}\n".encode())
        self._fingerprint = digest.hexdigest()

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self._paths)

    @property
    def fingerprint(self) -> str:
        """Names and sizes of the shards, in order; the folder they lie in does not count."""
        return self._fingerprint

    def shard_name(self, shard: int) -> str:
        """Returns the path of a shard."""
        return self._paths[shard]

    def read(
        self, shard: int, *, offset: int = 0, index: int = 0
    ) -> Iterator[tuple[Example | BadExampleError, int]]:
        """Yields the examples that start at `offset` or behind it: see `types.Source`.

        Raises:
          ShardTruncatedError: where the shard ends before its end-of-archive marker.
          ShardError: where it is not a tar archive.
          ShardUnavailableError: if it cannot be opened.
          UnsafeDataError: for an example larger than `max_example_bytes`.
        """
        del index  # the offset says it all
        path = self._paths[shard]
        with storage.open_local(path) as file:
            members = Members(file, path, offset)
            yield from _group(members, path, self._max_example_bytes)
            members.check_tail()

    def __repr__(self) -> str:
        return f"<TarSource {self.num_shards} shards | {self._paths[0]} ...>"


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


def _size_of(path: str) -> int:
    """Returns the size of a shard that exists."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise storage.unavailable(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(
            f"source {path!r} is a folder, not a tar shard; "
            f"pass a pattern: {os.path.join(path, '*.tar')!r}."
        )
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"source {path!r} is no regular file; copy the shard to disk first.")
    return status.st_size
