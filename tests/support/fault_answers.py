"""A handler answers one request to the fault server: properly, then with the fault put in.

Runs in a thread for each connection.
"""

from __future__ import annotations

import fcntl
import hashlib
import html
import re
import socket
import sys
import termios
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from support.faults import Fault

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Contents(Protocol):
    """The files that are served."""

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Returns a file and the name of its content; None for an unknown path."""

    def names(self) -> list[str]:
        """Returns the name of every file."""

    def replace(self, name: str, data: bytes) -> None:
        """Puts other bytes under a name."""


class _Mapped:
    def __init__(self, files: Mapping[str, bytes]) -> None:
        self._files: dict[str, tuple[bytes, str]] = {}
        for name, data in files.items():
            self.replace(name, data)

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Returns bytes and their digest."""
        return self._files.get(name)

    def names(self) -> list[str]:
        """Returns every name, sorted."""
        return sorted(self._files)

    def replace(self, name: str, data: bytes) -> None:
        """Puts other bytes under a name."""
        self._files[name] = data, hashlib.md5(data, usedforsecurity=False).hexdigest()


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Returns a file of the folder, and none outside."""
        path = (self._folder / name).resolve()
        if self._folder not in path.parents or not path.is_file():
            return None
        data = path.read_bytes()
        return data, f"{path.stat().st_mtime_ns:016x}{len(data):016x}"

    def names(self) -> list[str]:
        """Returns every name, sorted."""
        files = (path for path in self._folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self._folder).as_posix() for path in files)

    def replace(self, name: str, data: bytes) -> None:
        """Refuses: the files are not ours."""
        del data
        raise ValueError(f"a folder is served: write to its file {name!r} instead")


def contents_of(contents: str | Path | Mapping[str, bytes]) -> Contents:
    """Returns the files of a folder or a mapping."""
    if isinstance(contents, str | Path):
        return _Folder(Path(contents))
    return _Mapped(contents)


def _num_unsent(connection: socket.socket) -> int:
    """Returns how many bytes the client has not confirmed."""
    answer = bytearray(4)
    fcntl.ioctl(connection, termios.TIOCOUTQ, answer)
    return int.from_bytes(answer, sys.byteorder)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        """Answers a GET."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answers a HEAD."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        name = unquote(parts.path).lstrip("/")
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        start = int(asked.group(1)) if asked else None
        end = int(asked.group(2)) + 1 if asked and asked.group(2) else None
        headers = {key.lower(): value for key, value in self.headers.items()}
        server = self.server.faults
        fault = server.note(self.command, name, parts.query, (start, end), headers)
        found = server.contents.get(name)
        if fault is not None and self._was_refused(fault):
            return
        if found is None:
            self._send_page(name)
            return
        data, digest = found
        etag = self._etag(digest, fault)
        if etag and headers.get("if-match", etag) != etag:
            self._send(412, {"ETag": etag}, b"")
            return
        if start is None or (fault is not None and fault.kind == "ignore_range"):
            self._send(200, {"ETag": etag}, data, fault)
        elif start >= len(data):
            self._send(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
        else:
            end = min(end or len(data), len(data))
            content_range = f"bytes {start}-{end - 1}/{len(data)}"
            known = {"ETag": etag, "Content-Range": content_range, "Accept-Ranges": "bytes"}
            self._send(206, known, data[start:end], fault)

    def _was_refused(self, fault: Fault) -> bool:
        """Whether the fault was an answer of its own."""
        if fault.kind == "refuse":
            self._reset()
        elif fault.kind == "status":
            self._send(fault.status, {"Retry-After": fault.retry_after}, fault.body)
        elif fault.kind == "wrong":
            self._send(200, {"Content-Type": "text/html"}, fault.body)
        elif fault.kind == "redirect":
            self._send(302, {"Location": fault.location}, b"")
        else:
            return False
        return True

    def _send_page(self, name: str) -> None:
        """Sends links to the files and folders below a name, or 404."""
        prefix = f"{name.rstrip('/')}/" if name else ""
        below = [each[len(prefix) :] for each in self.server.faults.contents.names()
                 if each.startswith(prefix)]  # fmt: skip
        entries = sorted(
            {part + slash for part, slash, _ in (each.partition("/") for each in below)}
        )
        if not entries:
            self._send(404, {}, b"no such file")
            return
        links = "".join(
            f'<a href="{html.escape(each)}">{html.escape(each)}</a>\n' for each in entries
        )
        self._send(200, {"Content-Type": "text/html"}, links.encode())

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, fault: Fault | None = None
    ) -> None:
        """Sends head and body, the body with the fault in it."""
        kind = fault.kind if fault is not None else ""
        short = min(fault.after_bytes, len(body)) if fault is not None else 0
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(short if kind == "lie" else len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if kind == "reset":
            self._write(body[:short])
            self._reset()
        elif kind == "stall":
            self._write(body[:short])
            self.close_connection = True
            self._wait_for_goodbye()
        elif kind == "truncate":
            self._write(body[:short])
            self.close_connection = True
        elif kind == "lie":
            self._write(body[:short])
        elif kind == "trickle" and fault is not None:
            for first in range(0, len(body), fault.piece_bytes):
                self._write(body[first : first + fault.piece_bytes])
                if self.server.faults.closing.wait(fault.pause_s):
                    return
        else:
            self._write(body)

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def _reset(self) -> None:
        self.close_connection = True
        deadline = time.monotonic() + 1
        # Otherwise the bytes written would be thrown away with the connection.
        while _num_unsent(self.connection) and time.monotonic() < deadline:
            if self.server.faults.closing.wait(0.001):
                break
        self.server.resets.add(self.connection)

    def _wait_for_goodbye(self) -> None:
        """Returns when the client hangs up, or the server closes."""
        while self.connection.recv(1024):
            pass

    def _etag(self, digest: str, fault: Fault | None) -> str:
        """Returns the ETag of a file; another one if the fault says so."""
        if fault is not None and fault.kind == "new_etag":
            digest = digest[::-1]
        shape = {"strong": '"{}"', "weak": 'W/"{}"', "none": ""}[self.server.faults.etags]
        return shape.format(digest)
