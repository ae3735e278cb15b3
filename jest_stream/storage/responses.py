"""Validates HTTP responses to range requests: status, range, length, version.

In: the head of a response, and the range and object that were asked for. Out: the number of bytes
of its body that belong to the object, or an `AttemptFailed`. All four must agree: a server that
sends another page under status 200 must never end up in the middle of a shard. Pure functions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from jest_stream.storage.failures import AttemptFailed, failure_of_status
from jest_stream.types import ObjectInfo

_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)")


class RangeResponse(Protocol):
    """A response of which the head has arrived."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, names in lower case."""

    async def read(self) -> bytes:
        """Returns the next bytes of the body, waiting for at least one; b"" at its end."""

    async def close(self) -> None:
        """Gives the connection back, or closes it if there is more to come."""


def num_bytes_to_read(
    response: RangeResponse, start: int, end: int, expected: ObjectInfo, version: str
) -> int:
    """Returns how many bytes of the body are the object's from `start` on.

    Args:
      response: the response to a request for the bytes from `start` to `end` (exclusive).
      start: first byte asked for.
      end: one past the last.
      expected: length and version of the object when the source was made.
      version: the object's version by the response; "" if it names none.

    Raises:
      AttemptFailed: if the response does not fit the request.
    """
    _check_status_and_encoding(response)
    # There are two cases:
    # 1. No Content-Range: the body is the whole object, or no part of it at all.
    found = _content_range(response)
    length = _content_length(response)
    if found is None:
        return _check_whole(response, start, end, expected, version, length)
    # 2. Content-Range "bytes FIRST-LAST/TOTAL", LAST inclusive. Asked for 100-199 of 150 bytes, a
    #    server answers "bytes 100-149/150": fewer bytes are fine, the rest is asked for next.
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


def info_of(response: RangeResponse, version: str) -> ObjectInfo:
    """Returns length and version of an object, by the response to a request for its first byte.

    Raises:
      AttemptFailed: if it is an error, or does not say how long the object is.
    """
    # There are three cases: 1. 416: it has no first byte, so it is empty. 2. 206: Content-Range
    # names the total. 3. 200, of a server that ignores ranges: the body is the whole object.
    if response.status == 416:
        return ObjectInfo(0, version)
    _check_status_and_encoding(response)
    found = _content_range(response)
    total = found[2] if found else _content_length(response) if response.status == 200 else None
    if total is None:
        raise AttemptFailed(
            "never",
            "the server does not say how long the object is (no Content-Range, no Content-Length)",
            status=response.status,
        )
    return ObjectInfo(total, version)


def _check_status_and_encoding(response: RangeResponse) -> None:
    if response.status not in (200, 206):
        raise failure_of_status(response.status, response.headers)
    if (encoding := response.headers.get("content-encoding", "identity")) not in ("", "identity"):
        raise AttemptFailed(
            "never",
            f"the server compresses the transfer (Content-Encoding: {encoding}), so that offsets "
            "mean nothing; have it serve the file as it is",
            status=response.status,
        )


def _check_whole(
    response: RangeResponse,
    start: int,
    end: int,
    expected: ObjectInfo,
    version: str,
    length: int | None,
) -> int:
    """Validates a response without a Content-Range: only the whole object, if all was asked for."""
    # There are four cases: 1. a part, of unknown place. 2. Another length: another page. 3. The
    # whole object, as asked for. 4. The whole object for a part of it: reading on through all that
    # comes before would read a shard of 1 GB once for each segment.
    kind = response.headers.get("content-type", "unknown type")
    if response.status == 206:
        raise AttemptFailed("again", f"the server sent a part without a Content-Range ({kind})")
    if length is not None and length != expected.num_bytes:
        # Often the page of a proxy or of a login; a later attempt may reach the store.
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
    # Some web servers give no ETag: then only the length can tell that an object was replaced.
    if expected.version and version and version != expected.version:
        raise AttemptFailed(
            "changed", f"its version (ETag) is {version} now, it was {expected.version}"
        )


def _content_range(response: RangeResponse) -> tuple[int, int, int | None] | None:
    """Returns first byte, last byte and total of a Content-Range; None without one."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", "").strip())
    if not found or found.group(1) is None:
        return None
    total = found.group(3)
    return int(found.group(1)), int(found.group(2)), None if total == "*" else int(total)


def _content_length(response: RangeResponse) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else None
