"""What tells that an example is still what a reference embedded: checksums of its image and text.

Two names or two lengths that agree say little: captions that were written anew leave a tar as long
as it was. Pure functions.
"""

from __future__ import annotations

import zlib
from typing import Any

from jest_stream.errors import CachedShardChangedError
from jest_stream.types import REFERENCE_ROW, Example

UNKNOWN = 0
"""Of what was decoded elsewhere: another version of a decoder may give other pixels."""


def checksums(image: Any, text: Any) -> tuple[int, int]:
    """Returns the CRC-32 of an image as it was read and of a text; `UNKNOWN` for other values."""
    return _checksum(image), _checksum(text)


def require_same(example: Example, found: tuple[int, int]) -> None:
    """Raises `CachedShardChangedError` if a cached example had another image or text."""
    cached = example[REFERENCE_ROW][2][example[REFERENCE_ROW][-1]].tolist()
    names = [
        name
        for name, before, now in zip(("image", "text"), cached, found, strict=True)
        if UNKNOWN not in (before, now) and before != now
    ]
    if names:
        shard = example.get("__shard__", "")
        place = f" of shard {shard!r}" if shard else ""
        raise CachedShardChangedError(
            f"the {' and the '.join(names)} of example {example['__key__']!r}{place} changed since "
            f"the reference embedded it, or image_key and text_key mean another member now, so its "
            f"cached embeddings are of something else. Build a cache of the data as they are.",
            shard=shard,
        )


def _checksum(value: Any) -> int:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    return zlib.crc32(value) or 1 if isinstance(value, bytes) else UNKNOWN
