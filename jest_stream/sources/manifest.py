"""Reads manifests: JSON files that name the shards, with the examples and bytes of each.

In: the address of a manifest, written by webdataset, wids or `write_manifest`. Out: shards in the
order written, with the numbers promised of each. A remote manifest names shards beside it or other
remote addresses: it cannot point a reader at the files of this machine. No threads.

Three forms are read:

    {"00000.tar": 1000, "00001.tar": 980}                                webdataset's sizes.json
    {"wids_version": 1, "shardlist": [{"url": "00000.tar", "nsamples": 1000, "filesize": 10240}]}
    {"shards": [{"url": "00000.tar", "num_examples": 1000, "num_bytes": 10240}]}

The counts of the last two may be left out. Addresses are relative to the manifest's folder.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from jest_stream.config import SCHEMES
from jest_stream.errors import ConfigError, UnsafeDataError
from jest_stream.storage import MAX_SHARDS, Storage, redacted

MAX_MANIFEST_BYTES = 64 << 20
"""Most bytes of a manifest; a JSON of this size takes about ten times as much memory."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")  # two letters at least: C:\x.tar is a path
# Halves of characters that no name of a file holds; others stand for bytes that are not UTF-8.
_NO_NAME = re.compile(r"[\ud800-\udc7f\udd00-\udfff]")
_FORMS = (
    'Known forms: {"NAME.tar": number of examples, ...}; a wids index with "shardlist"; '
    '{"shards": [{"url": ..., "num_examples": ..., "num_bytes": ...}]}.'
)


class ShardEntry(NamedTuple):
    """One shard, and the numbers promised of it."""

    url: str
    num_examples: int | None = None
    num_bytes: int | None = None


def has_scheme(url: str) -> bool:
    """Returns whether an address begins with a scheme, known or not; else it is a local path."""
    return _SCHEME.match(url) is not None


def is_manifest(url: str) -> bool:
    """Returns whether an address names a manifest: its path ends in `.json`."""
    path = urlsplit(url).path if has_scheme(url) else url
    return path.lower().endswith(".json")


def read_manifest(storage: Storage, url: str) -> list[ShardEntry]:
    """Returns the shards that a manifest names.

    Raises:
      ConfigError: if it is no manifest, or an entry cannot be meant.
      UnsafeDataError: if it is too large, or names an address that a manifest may not.
      ShardUnavailableError: if it cannot be read.
    """
    shown = redacted(url)
    with storage.open(url) as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise UnsafeDataError(
            f"manifest {shown!r} is larger than {MAX_MANIFEST_BYTES:,} bytes. Is it a manifest? "
            "If so, split it and pass the parts as a list."
        )
    try:
        content = json.loads(data, object_pairs_hook=lambda pairs: _distinct(pairs, shown))
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # also for a number of 5,000 digits
        reason = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"manifest {shown!r} is not JSON: {reason}. {_FORMS}") from error
    entries = list(_entries(content, shown))
    if not entries:
        raise ConfigError(f"manifest {shown!r} names no shards. {_FORMS}")
    if len(entries) > MAX_SHARDS:
        raise UnsafeDataError(
            f"manifest {shown!r} names {len(entries):,} shards, the limit is {MAX_SHARDS:,}. "
            "Use larger shards."
        )
    # Addresses are relative to the manifest, or to the "base" of a wids index, which is itself
    # relative to the manifest.
    base = content.get("base", "") if "shardlist" in content else ""
    folder = _resolved(_text(base, "base", shown), url, shown) if base else url
    where = folder + "/" if base else url
    # `expand` checks them like the user's own; braces in a name must not make a pattern.
    urls = [_escaped(_resolved(entry.url, where, shown)) for entry in entries]
    found = storage.expand(urls)
    if len(found) != len(entries):
        raise ConfigError(f"manifest {shown!r} names patterns; each entry names one shard.")
    return [entry._replace(url=url) for entry, url in zip(entries, found, strict=True)]


def _distinct(pairs: list[tuple[str, Any]], shown: str) -> dict[str, Any]:
    """Returns the object of these names and values; two counts of one shard are refused."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ConfigError(f"manifest {shown!r} gives {twice[:80]!r} twice. Keep one.")
    return found


def _entries(content: Any, shown: str) -> Iterable[ShardEntry]:
    """Yields the entries of any known form, addresses as they are written."""
    if not isinstance(content, dict):
        raise ConfigError(f"manifest {shown!r} holds a {type(content).__name__}. {_FORMS}")
    for key, examples_name, bytes_name in (
        ("shardlist", "nsamples", "filesize"),
        ("shards", "num_examples", "num_bytes"),
    ):
        shards = content.get(key)
        if not isinstance(shards, list):
            continue
        for shard in shards:
            if not isinstance(shard, dict):
                raise ConfigError(f"manifest {shown!r} holds {str(shard)[:80]!r} as a shard.")
            yield ShardEntry(
                _text(shard.get("url"), "url", shown),
                _count(shard.get(examples_name), examples_name, shown),
                _count(shard.get(bytes_name), bytes_name, shown),
            )
        return
    if "wids_version" in content or "datasets" in content:
        raise ConfigError(
            f"manifest {shown!r} joins several datasets, which is not read. Pass the index of "
            'each, with its "shardlist", in a list.'
        )
    for name, count in content.items():
        if count is None:
            raise ConfigError(f"manifest {shown!r} gives no count of {name[:80]!r}. {_FORMS}")
        yield ShardEntry(_text(name, "url", shown), _count(count, name, shown))


def _text(value: Any, name: str, shown: str) -> str:
    if not isinstance(value, str) or not value or _NO_NAME.search(value):
        raise ConfigError(f"manifest {shown!r} has {str(value)[:80]!r} where a {name} should be.")
    return value


def _count(value: Any, name: str, shown: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(
            f"manifest {shown!r} has {str(value)[:80]!r} as {name[:80]!r}, which is no count. "
            f"{_FORMS}"
        )
    return value


def _resolved(url: str, manifest: str, shown: str) -> str:
    """Returns the address that an entry means, or refuses it.

    `manifest` is the address that relative entries are relative to, `shown` the one for errors.
    """
    # There are four cases:
    # 1. An address with a scheme of the allow-list: as it is, also in a local manifest.
    # 2. Any other scheme, or a chain (`zip://x::s3://y`): refused.
    # 3. A path in a local manifest: relative to its folder. It lies on this machine, and may name
    #    any file of it.
    # 4. A path in a remote manifest: it must stay within the bucket or host.
    #    `../other/0.tar` in s3://bucket/data/index.json is s3://bucket/other/0.tar.
    entry = f"manifest {shown!r} names {redacted(url)[:120]!r}"
    if re.search(r"[{}*\\\0]", url):
        raise ConfigError(f"{entry}: an entry names one shard, not a pattern.")
    if "::" in url:
        raise UnsafeDataError(f"{entry}, a chained address, which can reach anything.")
    found = _SCHEME.match(url)
    if found:
        if found.group(1).lower() not in SCHEMES:
            raise UnsafeDataError(
                f"{entry}: within a manifest only paths relative to it and the schemes "
                f"{', '.join(SCHEMES)} are read. Name shards on this disk by their paths."
            )
        return url
    if not has_scheme(manifest):
        return os.path.join(os.path.dirname(manifest), url)
    if url.startswith(("/", "~")):
        raise UnsafeDataError(
            f"{entry}, a file of this machine; a remote manifest may name only shards beside it "
            "and remote addresses."
        )
    root, _, path = manifest.partition("?")[0].partition("://")
    place, _, path = path.partition("/")
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(path), url))
    if joined.startswith("../"):
        raise UnsafeDataError(f"{entry}, which leads out of {root}://{place}.")
    return f"{root}://{place}/{joined}"


def _escaped(url: str) -> str:
    """Returns the address as a brace pattern that stands for itself alone."""
    return re.sub(r"([\\{}])", r"\\\1", url)
