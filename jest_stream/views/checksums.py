"""Tells by checksums whether an example changed since a reference embedded it.

Names and lengths of shards that agree say little: a tar keeps its length when its captions are
written anew. Pure functions.
"""

from __future__ import annotations

import zlib
from typing import Any

from jest_stream.errors import CachedShardChangedError
from jest_stream.types import REFERENCE_ROW, Example
from jest_stream.views.decode import title_of

UNKNOWN = 0
"""Checksum of an image that was decoded elsewhere: another decoder may give other pixels."""


def checksums(image: Any, text: Any) -> tuple[int, int]:
    """Returns the CRC-32 of an image as it was read and of a text; `UNKNOWN` for other values."""
    return _checksum(image), _checksum(text)


def require_same(example: Example, found: tuple[int, int]) -> None:
    """Raises `CachedShardChangedError` if a cached example had another image or text."""
    cached = example[REFERENCE_ROW][2][example[REFERENCE_ROW][-1]].tolist()
    # An unknown checksum on either side proves nothing: the example passes.
    names = [
        name
        for name, before, now in zip(("image", "text"), cached, found, strict=True)
        if UNKNOWN not in (before, now) and before != now
    ]
    if names:
        raise CachedShardChangedError(
            f"the {' and the '.join(names)} of {title_of(example)} changed since the reference "
            f"embedded it, or image_key and text_key mean another member now, so its cached "
            f"embeddings are of something else. Build a cache of the data as they are.",
            shard=example.get("__shard__", ""),
        )


def _checksum(value: Any) -> int:
    if isinstance(value, str):
        value = value.encode("utf-8", "surrogatepass")
    # A checksum of 0 would be taken for `UNKNOWN`; 1 stands for it.
    return zlib.crc32(value) or 1 if isinstance(value, bytes) else UNKNOWN
