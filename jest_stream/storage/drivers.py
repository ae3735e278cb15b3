"""Sends range requests to stores and lists them, by a driver for each kind of store.

In: an address and a range. Out: a `RangeResponse`. Connections are fsspec's. Its file objects are
not used: they hide the head of the response, which tells that an object was replaced, that a server
sent something else, and how long it asks to wait.
Every `async` function runs on fsspec's loop, the others may block and run in the caller's thread.
Retries of fsspec, botocore and aiohttp are off.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

from jest_stream.config import StorageConfig
from jest_stream.errors import ConfigError
from jest_stream.storage.redaction import redacted
from jest_stream.storage.responses import RangeResponse
from jest_stream.types import ObjectInfo

_CHUNK_BYTES = 256 * 1024


class Driver(Protocol):
    """Sends requests to one kind of store. Holds the answers that most stores share."""

    async def connect(self) -> None:
        """Makes the client, if there is none."""

    async def request(self, url: str, start: int, end: int, version: str) -> RangeResponse:
        """Asks for the bytes from `start` to `end` (exclusive), if the object has that version."""

    def version_of(self, url: str, response: RangeResponse) -> str:
        """Returns the object's version by a response, such as its ETag; "" if it names none."""
        del url
        return response.headers.get("etag", "")

    async def matches(self, pattern: str) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the files that match a pattern, with length and version if listed."""

    def pinned(self, url: str) -> str:
        """Returns the address of this very content, where a store can name it. Blocks."""
        return url

    async def put(self, url: str, path: str) -> None:
        """Makes a local file the object of that address, all of it or none."""

    async def close(self) -> None:
        """Closes every connection."""


class WebRangeResponse:
    """A response read with aiohttp."""

    def __init__(self, response: Any) -> None:
        self._response = response
        self.redirected_to = str(response.url) if response.history else ""
        self.status: int = response.status
        self.headers: Mapping[str, str] = {
            name.lower(): value for name, value in response.headers.items()
        }

    async def read(self) -> bytes:
        """Returns the next bytes; b"" at the end."""
        data: bytes = await self._response.content.readany()
        return data

    async def close(self) -> None:
        """Closes the connection, unless the body has been read to its end."""
        self._response.close()


class WebDriver(Driver):
    """Reads `http://` and `https://`."""

    def __init__(self, config: StorageConfig) -> None:
        self._files = web_files(config, dict(config.options.get("http", {})))
        self._connecting = asyncio.Lock()

    async def connect(self) -> None:
        """Makes the session, if there is none."""
        async with self._connecting:
            session = await self._files.set_session()
            # aiohttp would repeat requests by itself, uncounted. No public setting turns that off.
            session._retry_connection = False

    async def request(self, url: str, start: int, end: int, version: str) -> RangeResponse:
        """Asks for a range; `If-Match` only for a strong ETag, since a weak one never matches."""
        condition = {"If-Match": version} if version.startswith('"') else {}
        return await self._get(url, byte_range(start, end) | condition)

    async def matches(self, pattern: str) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the matching links on the page of the folder: the web has no other listing."""
        found = await self._files._glob(pattern, detail=True)
        return [(name, None) for name, info in found.items() if info["type"] == "file"]

    async def put(self, url: str, path: str) -> None:
        """Raises: web servers are only read."""
        raise ConfigError(f"cannot write {redacted(url)!r}: web servers are only read.")

    async def close(self) -> None:
        """Closes the session and its sockets."""
        async with self._connecting:
            if self._files._session is not None:
                await self._files._session.close()
                self._files._session = None

    async def _get(self, url: str, headers: Mapping[str, str]) -> WebRangeResponse:
        await self.connect()
        session = self._files._session
        options = dict(self._files.kwargs)
        own = options.pop("headers", {})
        # "identity": aiohttp would ask for gzip, and offsets in packed bytes mean nothing.
        response = await session.get(
            self._files.encode_url(url),
            headers={**own, "Accept-Encoding": "identity", **headers},
            **options,
        )
        return WebRangeResponse(response)


class GoogleDriver(WebDriver):
    """Reads `gs://`: gcsfs gives addresses and credentials, aiohttp reads the objects."""

    def __init__(self, config: StorageConfig) -> None:
        # The class of gcsfs.core: the default one asks about buckets by gRPC, on threads that stay.
        gcsfs: Any = importlib.import_module("gcsfs.core")
        options = {
            "requests_timeout": config.stall_timeout_s,
            "use_listings_cache": False,
            **config.options.get("gs", {}),
        }
        # No cache of listings: it would lack the files that other processes write meanwhile.
        self._buckets = gcsfs.GCSFileSystem(skip_instance_cache=True, **options)
        self._files = web_files(config, {"client_kwargs": {"trust_env": True}})
        self._connecting = asyncio.Lock()

    async def request(self, url: str, start: int, end: int, version: str) -> RangeResponse:
        """Asks for a range of that generation."""
        condition = {"ifGenerationMatch": version} if version else {}
        address = self._buckets.url(url)
        for name, value in self._buckets._get_params(condition).items():
            address += f"&{name}={value}"
        loop = asyncio.get_running_loop()  # a token may have to be refreshed, which blocks
        headers = await loop.run_in_executor(None, self._buckets._get_headers, {})
        return await self._get(address, headers | byte_range(start, end))

    def version_of(self, url: str, response: RangeResponse) -> str:
        """Returns the generation."""
        del url
        return response.headers.get("x-goog-generation", "")

    async def matches(self, pattern: str) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the objects that match."""
        found = await self._buckets._glob(pattern, detail=True)
        return [
            (f"gs://{name}", ObjectInfo(int(info["size"]), str(info.get("generation", ""))))
            for name, info in found.items()
            if info["type"] == "file"
        ]

    async def put(self, url: str, path: str) -> None:
        """Uploads a file; a resumable upload becomes the object with its last part."""
        await self._buckets._put_file(path, url)

    async def close(self) -> None:
        """Closes both sessions and their sockets."""
        await super().close()
        session, self._buckets._session = self._buckets._session, None
        if session is not None:
            await session.close()


class S3RangeResponse:
    """A response read with aiobotocore."""

    def __init__(self, response: Mapping[str, Any]) -> None:
        meta = response["ResponseMetadata"]
        self._body = response["Body"]
        self.status: int = meta["HTTPStatusCode"]
        self.headers: Mapping[str, str] = meta["HTTPHeaders"]

    async def read(self) -> bytes:
        """Returns the next bytes; b"" at the end."""
        data: bytes = await self._body.read(_CHUNK_BYTES)
        return data

    async def close(self) -> None:
        """Closes the connection, unless the body has been read to its end."""
        if inspect.isawaitable(closed := self._body.close()):
            await closed


class S3Driver(Driver):
    """Reads `s3://`, by s3fs."""

    def __init__(self, config: StorageConfig) -> None:
        s3fs: Any = importlib.import_module("s3fs")
        options = dict(config.options.get("s3", {}))
        client: dict[str, Any] = {
            "connect_timeout": config.connect_timeout_s,
            "read_timeout": config.stall_timeout_s,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "max_pool_connections": 64,
        }
        botocore: Any = importlib.import_module("botocore.config")
        if "response_checksum_validation" in botocore.Config.OPTION_DEFAULTS:
            # Some servers send the whole object's checksum with a range.
            client["response_checksum_validation"] = "when_required"
        client.update(options.pop("config_kwargs", {}))
        self._files = s3fs.S3FileSystem(
            config_kwargs=client,
            skip_instance_cache=True,
            **{"use_listings_cache": False, **options},
        )
        self._files.retries = 1
        self._connecting = asyncio.Lock()

    async def connect(self) -> None:
        """Makes the client, if there is none; looks for credentials."""
        async with self._connecting:
            await self._files.set_session()

    async def request(self, url: str, start: int, end: int, version: str) -> RangeResponse:
        """Asks for a range of the object with that ETag."""
        await self.connect()
        address, _, version_id = url.partition("?versionId=")
        bucket, key, _ = self._files.split_path(address)
        optional = {"IfMatch": version, "VersionId": version_id}
        response = await self._files._call_s3(
            "get_object",
            Bucket=bucket,
            Key=key,
            Range=byte_range(start, end)["Range"],
            **{name: value for name, value in optional.items() if value},
        )
        return S3RangeResponse(response)

    async def matches(self, pattern: str) -> list[tuple[str, ObjectInfo | None]]:
        """Returns the objects that match."""
        found = await self._files._glob(pattern, detail=True)
        return [
            (f"s3://{name}", ObjectInfo(int(info["size"]), info.get("ETag", "")))
            for name, info in found.items()
            if info["type"] == "file"
        ]

    async def put(self, url: str, path: str) -> None:
        """Uploads a file; a large one in parts, which become the object together."""
        await self.connect()
        await self._files._put_file(path, url)

    async def close(self) -> None:
        """Closes the client and its sockets."""
        async with self._connecting:
            # s3fs has no public way to close a client: its context manager does.
            if self._files._s3 is not None:
                self._files._s3 = None
                await self._files._s3creator.__aexit__(None, None, None)


def web_files(config: StorageConfig, options: dict[str, Any]) -> Any:
    """Returns fsspec's web filesystem with our time limits."""
    from aiohttp import ClientTimeout
    from fsspec.implementations.http import HTTPFileSystem

    limits = ClientTimeout(
        total=None, sock_connect=config.connect_timeout_s, sock_read=config.stall_timeout_s
    )
    client = {"timeout": limits, "read_bufsize": _CHUNK_BYTES, **options.pop("client_kwargs", {})}
    return HTTPFileSystem(client_kwargs=client, skip_instance_cache=True, **options)


def byte_range(start: int, end: int) -> dict[str, str]:
    """Returns the header that asks for the bytes from `start` to `end` (exclusive)."""
    return {"Range": f"bytes={start}-{end - 1}"}
