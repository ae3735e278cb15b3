"""What a server answered to a range request, and whether it is what was asked for.

A range is only believed if status, Content-Range, length and version all say so: a server that
sends something else under status 200 must never end up in the middle of a shard. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from jest_stream.storage.failures import AttemptFailed, failure_of_status
from jest_stream.types import ObjectInfo

_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Answer(Protocol):
    """An answer of which the head has arrived."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Its headers, names in lower case."""

    async def read(self) -> bytes:
        """Returns what has arrived of the body, waiting for at least a byte; b"" at its end."""

    async def close(self) -> None:
        """Gives the connection back, or closes it if there is more to come."""


def num_bytes_to_read(
    answer: Answer, start: int, end: int, expected: ObjectInfo, version: str
) -> int:
    """Returns how many bytes of the body are the object's from `start` on.

    Args:
      answer: to a request for the bytes from `start` to `end` (exclusive).
      start: first byte asked for.
      end: behind the last.
      expected: what the object is.
      version: what the answer says of the object's version; "" if nothing.

    Raises:
      AttemptFailed: if the answer is not what was asked for.
    """
    _check_status_and_encoding(answer)
    found = _content_range(answer)
    length = _content_length(answer)
    if found is None:
        return _check_whole(answer, start, end, expected, version, length)
    first, last, total = found
    _check_version(expected, version)
    if total is not None and total != expected.num_bytes:
        raise AttemptFailed("changed", f"it has {total:,} bytes now, it had {expected.num_bytes:,}")
    if first != start or last < first:
        raise AttemptFailed(
            "again", f"the server sent bytes {first}-{last}, asked for were {start}-{end - 1}"
        )
    if length is not None and length != last - first + 1:
        raise AttemptFailed(
            "again", f"the server announced bytes {first}-{last}, but a body of {length} bytes"
        )
    return min(last + 1, end) - start


def info_of(answer: Answer, version: str) -> ObjectInfo:
    """Returns what the answer to a request for the first byte says of the object.

    Raises:
      AttemptFailed: if it is an error, or does not say how long the object is.
    """
    if answer.status == 416:  # no first byte: the object is empty
        return ObjectInfo(0, version)
    _check_status_and_encoding(answer)
    found = _content_range(answer)
    total = found[2] if found else _content_length(answer) if answer.status == 200 else None
    if total is None:
        raise AttemptFailed(
            "never",
            "the server does not say how long the object is (no Content-Range, no Content-Length)",
            status=answer.status,
        )
    return ObjectInfo(total, version)


def _check_status_and_encoding(answer: Answer) -> None:
    if answer.status not in (200, 206):
        raise failure_of_status(answer.status, answer.headers)
    if (encoding := answer.headers.get("content-encoding", "identity")) not in ("", "identity"):
        raise AttemptFailed(
            "never",
            f"the server compresses the transfer (Content-Encoding: {encoding}), so that offsets "
            "mean nothing; have it serve the file as it is",
            status=answer.status,
        )


def _check_whole(
    answer: Answer, start: int, end: int, expected: ObjectInfo, version: str, length: int | None
) -> int:
    """Judges an answer that is not a range, though one was asked for."""
    kind = answer.headers.get("content-type", "unknown type")
    if answer.status == 206:
        raise AttemptFailed("again", f"the server sent a part without saying which ({kind})")
    if length is not None and length != expected.num_bytes:
        raise AttemptFailed(
            "again",
            f"the server answered bytes {start}-{end - 1} with status 200 and {length:,} bytes of "
            f"{kind}, which is not the shard ({expected.num_bytes:,} bytes)",
        )
    _check_version(expected, version)
    if start == 0 and end == expected.num_bytes:
        return end
    raise AttemptFailed(
        "never",
        "the server ignores range requests (status 200 with the whole object instead of 206), so "
        "that nothing could be resumed. Serve the shards with a server that knows ranges, such as "
        "nginx or an object store",
        status=200,
    )


def _check_version(expected: ObjectInfo, version: str) -> None:
    if expected.version and version and version != expected.version:
        raise AttemptFailed(
            "changed", f"its version (ETag) is {version} now, it was {expected.version}"
        )


def _content_range(answer: Answer) -> tuple[int, int, int | None] | None:
    """Returns first byte, last byte and total of a Content-Range; None if there is none."""
    found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", "").strip())
    if not found or found.group(1) is None:
        return None
    total = found.group(3)
    return int(found.group(1)), int(found.group(2)), None if total == "*" else int(total)


def _content_length(answer: Answer) -> int | None:
    value = answer.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else None
