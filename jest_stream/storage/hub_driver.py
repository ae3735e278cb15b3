"""Reads `hf://`, the repositories of the Hugging Face Hub, pinned to a commit.

A branch moves while it is read; a commit does not. So addresses are rewritten once, before the
first read: `hf://datasets/org/name/x.tar` becomes `hf://datasets/org/name@COMMIT/x.tar`. Async
methods run on fsspec's loop, `pinned` in the caller's thread.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.storage.drivers import WebDriver, WebRangeResponse, byte_range, web_files
from jest_stream.storage.failures import AttemptFailed, failure_of_status
from jest_stream.storage.redaction import redacted
from jest_stream.storage.responses import RangeResponse
from jest_stream.types import ObjectInfo

_TYPES = {"datasets": "dataset", "spaces": "space", "models": "model"}
_ADDRESS = re.compile(
    r"hf://(?:(datasets|spaces|models)/|(?!(?:datasets|spaces|models)/))([^/@]+/[^/@]+)(?:@([^/].*?))?(?:/(.*))?"
)
_REFERENCE = re.compile(r"(refs/(?:convert|pr)/[^/]+)(?:/(.*))?")
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="?next"?')
_MAX_PAGE_BYTES = 64 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubPath(NamedTuple):
    """A file or pattern in a repository."""

    kind: str
    """`dataset`, `model` or `space`."""
    repository: str
    """`org/name`."""
    revision: str
    """A branch, tag or commit; "" for the default branch."""
    path: str
    """Within the repository."""

    @property
    def url(self) -> str:
        """The address, its revision quoted."""
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        return f"hf://{prefix}{self.repository}{revision}/{self.path}"


def parse(url: str) -> HubPath:
    """Returns the parts of an `hf://` address.

    Raises:
      ConfigError: if it is none.
    """
    if url.startswith("hf://buckets/"):
        raise ConfigError(
            f"{redacted(url)!r} is a bucket; read are repositories: hf://datasets/org/name/..."
        )
    found = _ADDRESS.fullmatch(url)
    if not found:
        raise ConfigError(
            f"{redacted(url)!r} is no address of a repository; it is written "
            "hf://datasets/org/name/path, or hf://datasets/org/name@revision/path."
        )
    kind, repository, revision, path = (part or "" for part in found.groups())
    # Revisions hold no slash unless it is quoted, but for these: of "@refs/convert/parquet/x.tar"
    # the expression took "refs" for the revision and the rest for the path.
    if revision == "refs" and (reference := _REFERENCE.fullmatch(f"refs/{path}")):
        revision, path = reference.group(1), reference.group(2) or ""
    return HubPath(_TYPES.get(kind, "model"), repository, unquote(revision), path)


class HubDriver(WebDriver):
    """Reads files of repositories over HTTP, at addresses that huggingface_hub gives.

    The Hub redirects to a signed address, which is kept and used until it is refused: one request
    to the Hub for each file, not for each range. The token goes to the Hub only.
    """

    def __init__(self, config: StorageConfig) -> None:
        from huggingface_hub import HfApi

        options = config.options.get("hf", {})
        self._api = HfApi(endpoint=options.get("endpoint") or None, token=options.get("token"))
        self._endpoint = self._api.endpoint.rstrip("/")
        self._timeout_s = config.connect_timeout_s + config.stall_timeout_s
        self._files = web_files(config, {"client_kwargs": {"trust_env": True}})
        self._connecting = asyncio.Lock()
        self._commits: dict[tuple[str, str, str], str] = {}
        self._signed: dict[str, str] = {}
        self._refused: set[str] = set()

    async def request(self, url: str, start: int, end: int, version: str) -> RangeResponse:
        """Asks for a range of the file at that commit, which needs no condition."""
        del version
        answer = await self._ask(url, byte_range(start, end))
        # There are three cases: 1. any answer but a refusal. 2. A signed address is refused for the
        # first time: it has expired, and the Hub is asked for another. 3. The Hub refuses, or a
        # fresh signed address is refused too: that is final.
        if answer.status not in (401, 403, 404, 410):
            self._refused.discard(url)
        elif answer.redirected_to and url not in self._refused:
            await answer.close()
            self._signed.pop(url, None)
            self._refused.add(url)
            raise AttemptFailed("again", "the signed address of the file has expired")
        return answer

    def version_of(self, url: str, answer: RangeResponse) -> str:
        """Returns the commit, since the address names it."""
        del answer
        revision = parse(url).revision
        return revision if _COMMIT.fullmatch(revision) else ""

    async def matches(self, pattern: str) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the files of the commit that match."""
        # HfApi.list_repo_tree is not used: it has no time limit, waits for ever on a server that
        # falls silent, and tries again by itself. One page after the other is read here instead,
        # within the limit that all listings have.
        from fsspec.utils import glob_translate

        wanted = parse(pattern)
        expression = re.compile(glob_translate(wanted.path))
        # Only the folder before the first wildcard is listed, and below it only if the pattern
        # goes deeper: "data/train/*.tar" lists "data/train", "data/*/0.tar" all of "data".
        folder = re.split(r"[^/]*[*?\[]", wanted.path, maxsplit=1)[0].rstrip("/")
        is_deep = "/" in wanted.path[len(folder) :].lstrip("/") or "**" in wanted.path
        url: str | None = (
            f"{self._endpoint}/api/{wanted.kind}s/{wanted.repository}/tree/{wanted.revision}"
            f"{quote(f'/{folder}' if folder else '')}?recursive={str(is_deep).lower()}"
        )
        found: list[tuple[str, ObjectInfo | None]] = []
        while url is not None:
            entries, url = await self._page(url)
            for entry in entries:
                if entry["type"] == "file" and expression.match(entry["path"]):
                    name = wanted._replace(path=entry["path"]).url
                    found.append((name, ObjectInfo(int(entry["size"]), wanted.revision)))
        return found

    def pinned(self, url: str) -> str:
        """Returns the address with the commit in place of the branch or tag."""
        file = parse(url)
        if _COMMIT.fullmatch(file.revision):
            return url
        key = file[:3]
        if key not in self._commits:
            info = self._api.repo_info(
                file.repository,
                repo_type=file.kind,
                revision=file.revision or None,
                timeout=self._timeout_s,
            )
            self._commits[key] = str(info.sha)
        return file._replace(revision=self._commits[key]).url

    async def _page(self, url: str) -> tuple[list[dict[str, Any]], str | None]:
        """Returns one page of a listing, and the address of the next."""
        answer = await self._get(url, self._headers())
        try:
            if answer.status == 404:
                return [], None  # no such folder; that there is a repository is known
            if answer.status != 200:
                raise failure_of_status(answer.status, answer.headers)
            data = bytearray()
            while part := await answer.read():
                data += part
                if len(data) > _MAX_PAGE_BYTES:
                    raise AttemptFailed("never", f"a page of the listing exceeds {_MAX_PAGE_BYTES}")
        finally:
            await answer.close()
        # The next page may be asked for with the token, so it must be a page of the Hub itself.
        following = _NEXT.search(answer.headers.get("link", ""))
        if following and not following.group(1).startswith(f"{self._endpoint}/"):
            raise AttemptFailed("never", "the listing goes on at another server, without the token")
        return json.loads(data), following.group(1) if following else None

    async def _ask(self, url: str, asked: Mapping[str, str]) -> WebRangeResponse:
        """Returns the answer of the Hub, or that of the signed address it gave before."""
        signed = self._signed.get(url)
        if signed is not None:
            answer = await self._get(signed, asked)
            answer.redirected_to = signed
            return answer
        from huggingface_hub import hf_hub_url

        file = parse(url)
        address = hf_hub_url(
            file.repository,
            file.path,
            repo_type=file.kind,
            revision=file.revision or None,
            endpoint=self._endpoint,
        )
        answer = await self._get(address, {**self._headers(), **asked})
        if answer.redirected_to and answer.status in (200, 206):
            self._signed[url] = answer.redirected_to
        return answer

    def _headers(self) -> dict[str, str]:
        """Returns the headers of a request to the Hub, with the token."""
        utils: Any = importlib.import_module("huggingface_hub.utils")
        headers: dict[str, str] = utils.build_hf_headers(token=self._api.token)
        return headers
