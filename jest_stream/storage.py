"""Which addresses are read, and how they are opened: the only door to files.

In: what the user wrote (brace patterns, globs, lists, `~`, `file://`). Out: plain local paths, in
order, and binary files to read them. A scheme is either local, planned or refused; nothing here
ever starts a program. No state; called in the training process and in workers.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from typing import BinaryIO
from urllib.parse import unquote

from braceexpand import braceexpand

from jest_stream.errors import ConfigError, ShardUnavailableError, UnsafeDataError

MAX_SHARDS = 1_000_000
"""Most shards one source may name; `{0..999999999}` is refused before it is expanded."""

_REMOTE_SCHEMES = ("s3", "gs", "http", "https", "hf")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_GLOB = re.compile(r"[*?\[]")

# Headers and small members come from the buffer, large members go round it. 64 lanes: 16 MiB.
_BUFFER_BYTES = 256 * 1024


def expand(urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Returns the local paths that `urls` names, in the order written; globs are sorted.

    Args:
      urls: a path, a `file://` address, a brace pattern (`{000..123}`, `{a,b}`), a glob, or a
        list of these. `~` is the home folder.

    Raises:
      ConfigError: if nothing matches, for a pattern that cannot be expanded, and for addresses
        that are not read yet (`s3://`, `gs://`, `http(s)://`, `hf://`).
      UnsafeDataError: for `pipe:`, chained (`::`) and unknown addresses, and for patterns of more
        than `MAX_SHARDS` shards.
    """
    listed = [urls] if isinstance(urls, (str, os.PathLike)) else urls
    patterns = [os.fspath(url) for url in listed]
    if not patterns:
        raise ConfigError("source names no shards: got an empty list; pass at least one path.")
    count = 0
    for pattern in patterns:
        count += _num_expansions(pattern)
        if count > MAX_SHARDS:
            raise UnsafeDataError(
                f"source {_short(pattern)} names {count:,} shards or more, the limit is "
                f"{MAX_SHARDS:,}. Correct the pattern, or use larger shards."
            )
    paths: list[str] = []
    for pattern in patterns:
        for url in braceexpand(pattern):
            paths.extend(_match(_local_path(url), pattern))
    return paths


def open_local(path: str) -> BinaryIO:
    """Returns the file, opened for reading bytes, buffered and seekable.

    Raises:
      ShardUnavailableError: if it cannot be opened.
    """
    try:
        return open(path, "rb", buffering=_BUFFER_BYTES)
    except OSError as error:
        raise unavailable(path, error) from error


def unavailable(path: str, error: OSError) -> ShardUnavailableError:
    """Returns the error that names a shard which cannot be opened, and why."""
    return ShardUnavailableError(
        f"cannot open shard {path!r}: {error.strerror or error}. Training would go on without its "
        "examples; restore it or take it out of the source.",
        shard=path,
    )


def _local_path(url: str) -> str:
    """Returns the path that an address means, or refuses the address."""
    if "::" in url:
        raise UnsafeDataError(
            f"source {_short(url)} chains addresses with '::', which can reach anything; "
            "pass shards as a list of plain paths."
        )
    found = _SCHEME.match(url)
    if not found:
        return os.path.expanduser(url)
    scheme = found.group(1).lower()
    if scheme == "file":
        rest = url[found.end() :]
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            if host not in ("", "localhost"):
                raise ConfigError(
                    f"source {_short(url)} names the host {host!r}; a file address has three "
                    f"slashes: file:///path/shard.tar."
                )
            rest = slash + rest
        return unquote(rest)
    if scheme in _REMOTE_SCHEMES:
        raise ConfigError(
            f"source {scheme}://... cannot be read yet: supported today are tar shards on local "
            "disk (paths and file:// addresses). Copy the shards, or mount the bucket, and pass "
            "the local path."
        )
    raise UnsafeDataError(
        f"source {_short(url)} has the scheme {scheme!r}, which is not on the list of schemes that "
        "are read (file): it could run a program. Pass a local path; a file whose name "
        "holds a colon is written ./NAME."
    )


def _match(path: str, pattern: str) -> list[str]:
    """Returns the files that a path or glob stands for; a path that exists is never a glob."""
    if not path:
        raise ConfigError("source is an empty path; pass the path of a tar shard.")
    if not _GLOB.search(path) or os.path.exists(path):
        return [path]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise ConfigError(
            f"source {_short(pattern)} matches no file: nothing is called {path!r}. Check the "
            f"folder (the current one is {os.getcwd()!r}) and the pattern."
        )
    return matches


def _num_expansions(pattern: str) -> int:
    """Returns how many strings a brace pattern stands for, without making them."""
    try:
        return _count(pattern)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"source {_short(pattern)} has unbalanced or too deeply nested braces; "
            "write a literal brace as \\{."
        ) from error


def _count(pattern: str) -> int:
    """Counts as `braceexpand` expands: a product over groups, a sum over alternatives."""
    total, depth, start = 1, 0, 0
    commas: list[int] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
            if depth == 1:
                start, commas = position, []
        elif character == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                total *= _count_group(pattern, start, commas, position)
        elif character == "," and depth == 1:
            commas.append(position)
        position += 1
    if depth:
        raise ValueError("unbalanced")
    return total


def _count_group(pattern: str, start: int, commas: list[int], end: int) -> int:
    """Returns how many strings the braces from `start` to `end` stand for."""
    edges = [start, *commas, end]
    parts = [pattern[a + 1 : b] for a, b in zip(edges, edges[1:], strict=False)]
    found = _RANGE.fullmatch(parts[0]) if len(parts) == 1 else None
    if not found:
        return sum(_count(part) for part in parts)
    first, last, step, first_letter, last_letter, letter_step = found.groups()
    if first is None:
        distance = abs(ord(last_letter) - ord(first_letter))  # at least as many as are made
        return distance // max(int(letter_step or 1), 1) + 1
    return math.ceil((abs(int(last) - int(first)) + 1) / max(int(step or 1), 1))


def _short(text: str) -> str:
    """Returns the text as a message shows it."""
    return repr(text if len(text) <= 120 else text[:117] + "...")
