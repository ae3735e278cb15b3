"""Manifests of shards that were counted here: `write_manifest`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from jest_stream.errors import ConfigError
from jest_stream.sources.manifest import _SCHEME, is_manifest
from jest_stream.sources.tar import TarSource
from jest_stream.storage import redacted


def write_manifest(source: TarSource, path: str | os.PathLike[str]) -> None:
    """Counts the examples of every shard and writes a manifest that promises them.

    Walks the headers of all shards; local data is passed over, remote shards are read once. Later
    `TarSource(path)` knows how much there is, and notices when a shard holds less.

    Args:
      source: the shards to count.
      path: a local file, replaced in one step. Shards beneath its folder are named relative to it,
        so that both can be moved together; upload it beside the shards to read it from there.

    Raises:
      ShardError: for a shard that cannot be read to its end: nothing is written then.
      ConfigError: for an address with a query, which may hold a signature.
    """
    target = Path(path)
    if not is_manifest(str(target)) or _SCHEME.match(str(path)):
        raise ConfigError(f"path {str(path)!r} is no local .json file; pass one, to upload later.")
    folder = target.parent.resolve()
    shards = []
    for shard in range(source.num_shards):
        listed = source.count(shard)
        url = listed.url
        if not _SCHEME.match(url):
            whole = Path(url).resolve()
            url = whole.relative_to(folder).as_posix() if folder in whole.parents else str(whole)
        elif "?" in url:
            raise ConfigError(
                f"shard {redacted(url)!r} has a query in its address, perhaps a signature that "
                "should not be written to a file. Count shards by an address without one."
            )
        shards.append(
            {"url": url, "num_examples": listed.num_examples, "num_bytes": listed.num_bytes}
        )
    lines = ",\n".join(json.dumps(entry) for entry in shards)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(f'{{"shards": [\n{lines}\n]}}\n')
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
