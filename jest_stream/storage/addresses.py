"""Expands the addresses that the user wrote, in order, and refuses the unsafe ones by name.

In: brace patterns, globs, lists, `~`, `file://`, remote addresses. Out: local paths and remote
addresses, one for each shard. A scheme is either local, remote or refused. This module starts no
program and connects to nothing: the caller brings the function that lists a remote glob.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Sequence
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand

from jest_stream.config import SCHEMES
from jest_stream.errors import ConfigError, UnsafeDataError
from jest_stream.storage.redaction import redacted

MAX_SHARDS = 1_000_000
"""Most shards one source may name; `{0..999999999}` is refused before it is expanded."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_GLOB = re.compile(r"[*?\[]")
_SIGNATURE = re.compile(r"[?&](?:x-(?:amz|goog)-signature|signature|sig)=", re.IGNORECASE)


def expand(
    urls: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    list_remote: Callable[[str], list[str]],
) -> list[str]:
    """Returns the local paths and remote addresses that `urls` names, in the order written.

    Args:
      urls: a path, a `file://` or remote address, a brace pattern (`{000..123}`, `{a,b}`), a glob,
        or a list of these. `~` is the home folder. The matches of a glob are sorted.
      list_remote: returns the shards of a remote address: itself, pinned to a version where its
        store can do so, or its matches, sorted.

    Raises:
      ConfigError: if nothing matches, and for a pattern that cannot be expanded.
      UnsafeDataError: for `pipe:`, chained (`::`) and unknown addresses, and for patterns of more
        than `MAX_SHARDS` shards.
    """
    listed = [urls] if isinstance(urls, (str, os.PathLike)) else urls
    wrong = [url for url in listed if not isinstance(url, (str, os.PathLike))]
    if wrong:
        raise ConfigError(
            f"source lists a {type(wrong[0]).__name__} ({_short(str(wrong[0]))}) among paths; list "
            "paths and addresses of shards only."
        )
    patterns = [os.fspath(url) for url in listed]
    if not patterns:
        raise ConfigError("source names no shards: got an empty list; pass at least one path.")
    # Counted first: `braceexpand` makes every number of a range before it yields the first string.
    # It is called as it is, not through `webdataset.shardlists.expand_urls`: that also splits at
    # "::" and puts environment variables in, which the count and the checks would not see.
    # The count is a sum over patterns: 1,000 of 10,000 shards each are refused like one of 10**7.
    count = 0
    for pattern in patterns:
        count += _num_expansions(pattern)
        if count > MAX_SHARDS:
            raise UnsafeDataError(
                f"source {_short(pattern)} names {count:,} shards or more, the limit is "
                f"{MAX_SHARDS:,}. Correct the pattern, or use larger shards."
            )
    # All are checked before the first is listed.
    checked = [
        (check_address(url), pattern) for pattern in patterns for url in braceexpand(pattern)
    ]
    paths: list[str] = []
    for url, pattern in checked:
        if scheme_of(url):
            paths.extend(list_remote(url))
        else:
            paths.extend(_match(url, pattern))
    return paths


def scheme_of(url: str) -> str:
    """Returns the remote scheme of a checked address; "" for a local path."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator and scheme in SCHEMES else ""


def store_of(url: str) -> str:
    """Returns the kind of store that a remote address needs: http and https share one."""
    scheme = scheme_of(url)
    return "http" if scheme == "https" else scheme


def without_signature(url: str) -> str:
    """Returns a remote address without its query, if that is a signature.

    Stores that sign addresses name an object by its path. Any other query may tell objects apart.
    """
    return url.partition("?")[0] if _SIGNATURE.search(url) else url


def check_address(url: str) -> str:
    """Returns a local path, or a remote address with its scheme in lower case.

    Raises:
      ConfigError: for a remote address without a host, bucket or repository.
      UnsafeDataError: for every scheme that is not on the list, chains and control characters.
    """
    # There are four cases: 1. A chain of addresses.
    if "::" in url:
        raise UnsafeDataError(
            f"source {_short(url)} chains addresses with '::', which can reach anything; "
            "pass shards as a list of plain paths."
        )
    # 2. A local path. A scheme has two letters or more: "c:x.tar" is a path.
    found = _SCHEME.match(url)
    if not found:
        return os.path.expanduser(url)
    scheme, rest = found.group(1).lower(), url[found.end() :]
    # 3. A local path in the form of an address: its %20 are spaces.
    if scheme == "file":
        if rest.startswith("//"):
            host, slash, rest = rest[2:].partition("/")
            if host not in ("", "localhost"):
                raise ConfigError(
                    f"source {_short(url)} names the host {host!r}; a file address has three "
                    f"slashes: file:///path/shard.tar."
                )
            rest = slash + rest
        return unquote(rest)
    # 4. A remote address.
    if scheme in SCHEMES:
        if not rest.startswith("//") or not rest[2:].partition("/")[0]:
            raise ConfigError(
                f"source {_short(url)} names no host, bucket or repository; an address is written "
                f"{scheme}://NAME/path/shard.tar."
            )
        try:
            urlsplit(url)
        except ValueError as error:
            raise ConfigError(f"source {_short(url)} is no address: {error}.") from None
        if any(ord(character) < 32 for character in rest):
            raise UnsafeDataError(f"source {_short(url)} holds a control character.")
        return f"{scheme}:{rest}"
    raise UnsafeDataError(
        f"source {_short(url)} has the scheme {scheme!r}, which is not on the list of schemes that "
        f"are read (file, {', '.join(SCHEMES)}): it could run a program. A file whose name "
        "holds a colon is written ./NAME."
    )


def is_remote_glob(url: str) -> bool:
    """Returns whether a remote address is a pattern; the "?" of an http query makes none."""
    scheme, path = scheme_of(url), url
    # Of a web address only the path counts, without host and query: "?" and "[" are usual there.
    if scheme in ("http", "https"):
        return bool(re.search(r"[*\[]", url.partition("?")[0].partition("//")[2].partition("/")[2]))
    if scheme == "s3":
        path = url.partition("?versionId=")[0]
    return bool(_GLOB.search(path))


def is_folder(url: str) -> bool:
    """Returns whether a remote address can only be a bucket, a repository or a folder."""
    scheme, path = scheme_of(url), url.partition("://")[2]
    if scheme in ("http", "https"):
        return False  # there, anything may be a file
    # The slashes of a name that ends before any file: "bucket", "org/name", "datasets/org/name".
    is_typed = path.startswith(("datasets/", "spaces/", "models/"))
    num_slashes = 0 if scheme != "hf" else 2 if is_typed else 1
    return path.endswith("/") or path.count("/") == num_slashes


def _match(path: str, pattern: str) -> list[str]:
    """Returns the files of a path or glob, sorted; a path that exists is never a glob."""
    if not path:
        raise ConfigError("source is an empty path; pass the path of a tar shard.")
    # A name such as "data[1].tar" holds the signs of a glob. It is one only if no such file exists.
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
    """Returns the number of strings that a brace pattern expands to, without making them."""
    try:
        return _count(pattern)
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"source {_short(pattern)} has unbalanced or too deeply nested braces; "
            "write a literal brace as \\{."
        ) from error


def _count(pattern: str) -> int:
    """Counts as `braceexpand` expands: a product over groups, a sum over alternatives.

    `{a,b{0..9}}/{0..4}.tar`: (1 + 10) * 5 = 55.
    """
    total, depth, start = 1, 0, 0
    commas: list[int] = []
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1  # the next character is a literal
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
    """Returns the number of strings for the braces at `start` and `end` and their `commas`."""
    edges = [start, *commas, end]
    parts = [pattern[a + 1 : b] for a, b in zip(edges, edges[1:], strict=False)]
    # There are three kinds: 1. alternatives "{a,b}", or a single one: a sum. 2. Letters, such as
    # "{a..e..2}". 3. Numbers: "{0..9..4}" are 0, 4, 8: ceil(10 / 4) = 3.
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
    text = redacted(text)
    return repr(text if len(text) <= 120 else text[:117] + "...")
