"""A Hugging Face Hub on 127.0.0.1 has datasets, commits, access rights, and faults on order.

`HubServer()` is a context manager. `put(repository, files)` makes a commit and moves `main` to it;
older commits stay. Files are served as the Hub does: small ones itself, large ones by a redirect to
a signed address on another host name. `requests` lists the requests so far.

Reach it in process by `StorageConfig(options={"hf": {"endpoint": server.url}})`; `datasets` and
huggingface_hub by `server.environment(home)`, set before they are imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

from huggingface_hub.utils import close_session

_API = re.compile(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/(.*))?)?")
_RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LARGE_BYTES = 4096  # such files lie on the content server


class Request(NamedTuple):
    """One request that arrived."""

    method: str
    path: str
    range: str
    token: str


@dataclass
class Fault:
    """A fault to serve: its kind, how often, and to which requests."""

    match: str
    """Regular expression, searched in the path."""
    times: int = 1
    status: int = 0
    """Answer with this status..."""
    retry_after: str = ""
    """...and this header."""
    cut: int = -1
    """Or close the connection after this many bytes of the body."""
    is_reset: bool = False
    """Whether a cut is a reset instead of an end."""
    short: int = -1
    """Or serve a file that ends here, as if it were whole."""
    method: str = "GET"


@dataclass
class Repository:
    """Commits by id, the revisions that point at them, and who may read."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    token: str = ""
    """Needed to read; "" for a public repository."""
    is_gated: bool = False
    """Whether everybody sees that it is there, but needs the token for its files."""


class HubServer:
    """Serves repositories until it is closed. Owns a thread and a socket.

    Args:
      page_size: files on each page of a listing.
    """

    def __init__(self, *, page_size: int = 1000) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.page_size = page_size
        self._faults: list[Fault] = []
        self._lock = threading.Lock()  # guards _faults and requests
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def content_url(self) -> str:
        """Where large files lie: another host, by name."""
        return f"http://localhost:{self._server.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """Returns the variables that lead the real clients here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        }

    def put(
        self,
        repository: str,
        files: Mapping[str, bytes],
        *,
        revision: str = "main",
        token: str = "",
        is_gated: bool = False,
    ) -> str:
        """Makes a commit of these files, points the revision at it, and returns its id."""
        held = self.repositories.setdefault(repository, Repository())
        held.token, held.is_gated = token, is_gated
        digest = hashlib.sha1(repository.encode())
        for path, data in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(data).digest())
        commit = digest.hexdigest()
        held.commits[commit] = dict(files)
        held.revisions[revision] = commit
        return commit

    def fail(self, *faults: Fault) -> None:
        """Replaces the faults that are in force."""
        with self._lock:
            self._faults = list(faults)

    def take_fault(self, method: str, path: str, num_bytes: int = -1) -> Fault | None:
        """Returns the first fault that this request meets, and counts it.

        A status strikes before the file is looked up (`num_bytes=-1`), a cut only a longer body.
        """
        with self._lock:
            for fault in self._faults:
                is_early = fault.status > 0
                if (
                    is_early == (num_bytes < 0)
                    and fault.times > 0
                    and fault.method == method
                    and re.search(fault.match, path)
                    and (is_early or num_bytes > max(fault.cut, fault.short))
                ):
                    fault.times -= 1
                    return fault
        return None

    def note(self, request: Request) -> None:
        """Remembers a request."""
        with self._lock:
            self.requests.append(request)

    def close(self) -> None:
        """Stops serving; ends the session that huggingface_hub keeps for the process."""
        close_session()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    hub: HubServer
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up early; that is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Answers a request."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        hub = self.server.hub
        hub.note(Request(self.command, path, self.headers.get("Range") or "", token))
        fault = hub.take_fault(self.command, path)
        if fault is not None:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self._json({"error": "on order"}, fault.status, extra)
        if path.startswith("/content/"):
            return self._content(path, query)
        api, resolve = _API.fullmatch(path), _RESOLVE.fullmatch(path)
        found = api or resolve
        repository = hub.repositories.get(found.group(1)) if found else None
        if found is None or repository is None:
            return self._refuse(401 if not token else 404, "RepoNotFound")
        if repository.token and token != repository.token:
            if not repository.is_gated:
                return self._refuse(401, "RepoNotFound")
            if resolve:
                return self._refuse(403 if token else 401, "GatedRepo")
        if resolve:
            return self._resolve(found.group(1), repository, resolve.group(2), resolve.group(3))
        assert api is not None
        return self._api(api.group(1), repository, api.group(2), api.group(3) or "", query, body)

    do_HEAD = do_POST = do_GET

    def _api(
        self,
        name: str,
        repository: Repository,
        kind: str | None,
        rest: str,
        query: dict[str, list[str]],
        body: bytes,
    ) -> None:
        if kind == "refs":
            heads = [
                {"name": head, "ref": f"refs/heads/{head}", "targetCommit": commit}
                for head, commit in repository.revisions.items()
            ]
            return self._json({"branches": heads, "tags": [], "converts": []})
        revision, _, folder = rest.partition("/")
        if kind == "revision":
            revision, folder = rest, ""
        commit = self._commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if kind == "tree":
            is_recursive = query.get("recursive", ["false"])[0].lower() == "true"
            return self._tree(files, folder.strip("/"), is_recursive, query)
        if kind == "paths-info":
            form = parse_qs(body.decode())
            wanted = form.get("paths") or json.loads(body or b"{}").get("paths", [])
            return self._json([_entry(path, files[path]) for path in wanted if path in files])
        return self._json(
            {
                "_id": commit[:24],
                "id": name,
                "author": name.partition("/")[0],
                "sha": commit,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "private": bool(repository.token) and not repository.is_gated,
                "gated": "manual" if repository.is_gated else False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": {},
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def _tree(
        self,
        files: dict[str, bytes],
        folder: str,
        is_recursive: bool,
        query: dict[str, list[str]],
    ) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(files) if path.startswith(prefix)]
        if prefix and not inside:
            return self._refuse(404, "EntryNotFound")
        folders = {
            prefix + "/".join(parts[:depth])
            for parts in (path.removeprefix(prefix).split("/") for path in inside)
            for depth in range(1, len(parts))
        }
        paths = sorted(folders | set(inside))
        if not is_recursive:
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        start, size = int(query.get("cursor", ["0"])[0]), self.server.hub.page_size
        headers = {}
        if start + size < len(paths):
            tail = f"recursive={is_recursive}&cursor={start + size}"
            here = self.path.partition("?")[0]
            headers["Link"] = f'<{self.server.hub.url}{here}?{tail}>; rel="next"'
        page = paths[start : start + size]
        self._json([_entry(path, files.get(path)) for path in page], 200, headers)

    def _resolve(self, name: str, repository: Repository, revision: str, path: str) -> None:
        commit = self._commit(repository, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        data = repository.commits[commit].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound")
        head = {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'}
        if len(data) < _LARGE_BYTES:
            return self._file(data, head)
        address = f"{self.server.hub.content_url}/content/{name}/{commit}/{quote(path)}"
        linked = {
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{_oid(data)}"',
            "Location": f"{address}?X-Amz-Signature=abcdef0123456789",
        }
        return self._json({}, 302, {**head, **linked})

    def _content(self, path: str, query: dict[str, list[str]]) -> None:
        if "X-Amz-Signature" not in query or "Authorization" in self.headers:
            return self._json({"error": "signed addresses only, and no tokens"}, 403)
        organization, name, commit, inside = path.removeprefix("/content/").split("/", 3)
        data = self.server.hub.repositories[f"{organization}/{name}"].commits[commit][inside]
        return self._file(data, {"ETag": f'"{_oid(data)}"'})

    def _file(self, data: bytes, headers: Mapping[str, str]) -> None:
        fault = self.server.hub.take_fault(self.command, unquote(self.path), len(data))
        if fault is not None and fault.short >= 0:
            data, fault = data[: fault.short], None
        first, last, status = 0, len(data) - 1, 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted and (wanted[1] or wanted[2]):
            first = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
            last = min(int(wanted[2]) if wanted[1] and wanted[2] else last, last)
            status = 206
            if first >= len(data):
                return self._json({}, 416, {"Content-Range": f"bytes */{len(data)}"})
        body = data[first : last + 1]
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.cut >= 0:
            self.wfile.write(body[: fault.cut])
            self.wfile.flush()
            self.close_connection = True
            if fault.is_reset:
                linger = (1).to_bytes(4, "little") + bytes(4)  # on, 0 s: close sends RST
                self.connection.setsockopt(1, 13, linger)  # SOL_SOCKET, SO_LINGER
            else:
                self.connection.shutdown(2)
            return
        self.wfile.write(body)

    def _json(
        self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _commit(self, repository: Repository, revision: str) -> str | None:
        revision = revision or "main"
        commit = repository.revisions.get(revision, revision)
        return commit if commit in repository.commits else None


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {"type": "directory", "oid": _oid(path.encode()), "size": 0, "path": path}
    entry: dict[str, Any] = {"type": "file", "oid": _oid(data), "size": len(data), "path": path}
    if len(data) >= _LARGE_BYTES:
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return entry


def tar_of(examples: Iterable[Mapping[str, Any]]) -> bytes:
    """Returns a tar of examples as `shards.make_example` makes them."""
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for example in examples:
            for name, data in example.items():
                if not name.startswith("__"):
                    info = tarfile.TarInfo(f"{example['__key__']}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(
    examples: Iterable[Mapping[str, Any]], *, rows_per_group: int = 8, declares_image: bool = True
) -> bytes:
    """Returns a Parquet file of such examples: `image` as the Hub stores it, `text` and `index`."""
    import pyarrow
    from pyarrow import parquet

    listed = list(examples)
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": example["jpg"], "path": None} for example in listed]
    table = pyarrow.table(
        {
            "image": pyarrow.array(images, image_type),
            "text": pyarrow.array([e["txt"].decode() for e in listed], pyarrow.string()),
            "index": pyarrow.array([int(e["__key__"]) for e in listed], pyarrow.int64()),
        }
    )
    if declares_image:
        features = {
            "image": {"_type": "Image"},
            "text": {"dtype": "string", "_type": "Value"},
            "index": {"dtype": "int64", "_type": "Value"},
        }
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, row_group_size=rows_per_group)
    return buffer.getvalue()
