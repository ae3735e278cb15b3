"""This process uses a `DiskCache` as it is told: `python cache_child.py FOLDER LIMIT`.

Reads one JSON object per line: `{"url", "size", "pause"}`. Answers with lines: `ready`, then for
each object `half` when half of a download is written (with "pause", it goes on at the next line),
and `opened` with the counts, or `failed` with the error. Files stay open until the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Neither the package nor the room is imported whole: both import torch, which takes each of
    # a dozen processes seconds.
    for name in ("jest_stream", "jest_stream.storage"):
        package = types.ModuleType(name)
        package.__path__ = [str(Path(__file__).parents[2].joinpath(*name.split(".")))]
        sys.modules[name] = package

from jest_stream.errors import JESTError  # noqa: E402
from jest_stream.storage.disk_cache import DiskCache  # noqa: E402


def content_of(url: str, size: int) -> bytes:
    """Returns the bytes that a shard of this address and length has."""
    return (hashlib.sha256(url.encode()).digest() * (size // 32 + 1))[:size]


def main() -> None:
    assert "torch" not in sys.modules, "an import of the ground layer is not lazy"
    folder, limit = sys.argv[1:3]
    if os.environ.get("AS_NOBODY"):
        os.setuid(65534)
    if limit_bytes := os.environ.get("FILE_LIMIT"):
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    files = []
    try:
        cache = DiskCache(folder, limit_bytes=int(limit), stall_s=20)
        print("ready", flush=True)
        for line in sys.stdin:
            files.append(use(cache, **json.loads(line)))
    except JESTError as error:
        print("failed", type(error).__name__, error, flush=True)


def use(cache: DiskCache, url: str, size: int, pause: bool = False) -> Any:
    """Opens a shard, downloading it in two halves if need be."""

    def download() -> Generator[bytes, None, None]:
        data = content_of(url, size)
        yield data[: size // 2]
        print("half", flush=True)
        if pause:
            sys.stdin.readline()
        yield data[size // 2 :]

    file = cache.open(url, size, "v1", download)
    assert file is None or file.read() == content_of(url, size)
    print("opened", json.dumps(cache.take_counts()), flush=True)
    return file


if __name__ == "__main__":
    main()
