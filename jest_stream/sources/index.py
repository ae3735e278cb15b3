"""Counts the examples of shards and writes the manifest that `manifest` reads.

In: a `TarSource`. Out: a JSON file on this disk. Runs in the calling thread; reads each shard once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from jest_stream.errors import ConfigError
from jest_stream.sources.manifest import has_scheme, is_manifest
from jest_stream.sources.tar import TarSource
from jest_stream.storage import Storage, redacted


def write_manifest(source: TarSource, path: str | os.PathLike[str]) -> None:
    """Counts the examples of every shard and writes a manifest that promises them.

    Walks the headers of all shards; local data is passed over, remote shards are read once. Later
    `TarSource(path)` knows the numbers, and notices a shard that holds less.

    Args:
      source: the shards to count.
      path: a local file, replaced in one step. Shards beneath its folder are named relative to it:
        both can be moved together. Upload it beside the shards to read it from there.

    Raises:
      ShardError: for a shard that cannot be read to its end: nothing is written then.
      ConfigError: for an address with a query, which may hold a signature, and where the disk does
        not take the file.
    """
    target = Path(path)
    if not is_manifest(str(target)) or has_scheme(str(path)):
        raise ConfigError(f"path {str(path)!r} is no local .json file; pass one, to upload later.")
    folder = target.parent.resolve()
    shards = []
    for shard in range(source.num_shards):
        entry = source.count(shard)
        url = entry.url
        # There are three cases: 1. a local shard beneath the manifest's folder: relative to it. 2.
        # One elsewhere: its whole path. 3. A remote shard: its address.
        if not has_scheme(url):
            whole = Path(url).resolve()
            url = whole.relative_to(folder).as_posix() if folder in whole.parents else str(whole)
        elif "?" in url:
            raise ConfigError(
                f"shard {redacted(url)!r} has a query in its address, perhaps a signature that "
                "should not be written to a file. Count shards by an address without one."
            )
        shards.append(
            {"url": url, "num_examples": entry.num_examples, "num_bytes": entry.num_bytes}
        )
    lines = ",\n".join(json.dumps(shard) for shard in shards)
    file = Storage().create(str(target))
    file.write(f'{{"shards": [\n{lines}\n]}}\n'.encode())
    file.commit()
