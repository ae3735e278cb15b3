"""A web server on 127.0.0.1 serves ranges properly, or fails as it was told to.

    from support.fault_server import FaultServer
    from support.faults import Fault

    with FaultServer({"a.tar": shard}) as server:
        server.add(Fault("reset", first=2, after_bytes=1000))  # two requests break off
        server.add(Fault("status", nth=3, status=503, retry_after="1"))
        examples = list(TarSource(server.url("a.tar")).read(0))
        assert [request.fault for request in server.requests][:3] == ["reset", "reset", "status"]

It knows GET and HEAD, `Range`, `ETag`, `If-Match`, and has a page of links for each folder.
Standard library only; every thread, socket and descriptor is gone when the `with` block ends.
"""

from __future__ import annotations

import fnmatch
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import quote

from support.fault_answers import Handler, contents_of
from support.faults import Fault


@dataclass(frozen=True)
class Request:
    """A request that arrived."""

    method: str
    path: str
    """Without the leading slash and the query."""
    query: str
    start: int | None
    """First byte asked for; None without a Range header."""
    end: int | None
    """One past the last byte asked for; None if the request names no end."""
    headers: Mapping[str, str]
    """Names in lower case."""
    fault: str
    """Kind of the fault it met; "" for none."""


class FaultServer:
    """Serves a folder, or bytes by name, and injects faults.

    Args:
      contents: a folder, or a mapping from names to bytes; names may hold slashes.
      faults: as by `add`.
      etags: "strong"; "weak", which never match `If-Match`; or "none".
    """

    def __init__(
        self,
        contents: str | Path | Mapping[str, bytes],
        faults: tuple[Fault, ...] = (),
        *,
        etags: Literal["strong", "weak", "none"] = "strong",
    ) -> None:
        self.contents = contents_of(contents)
        self.etags = etags
        self.closing = threading.Event()
        self._lock = threading.Lock()  # guards the fields below
        self._faults: list[tuple[Fault, list[int]]] = [(fault, [0]) for fault in faults]
        self._requests: list[Request] = []
        self._listener: _Listener | None = _Listener(self, 0)
        self._port = self._listener.server_address[1]

    def __enter__(self) -> FaultServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def address(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self._port}"

    def url(self, name: str) -> str:
        """Returns the address of a file."""
        return f"{self.address}/{quote(name, safe='/*[]{},.')}"

    @property
    def requests(self) -> list[Request]:
        """Every request so far, in the order of arrival."""
        with self._lock:
            return list(self._requests)

    def add(self, *faults: Fault) -> None:
        """Adds faults, whose counts start now. The first that fits a request is injected."""
        with self._lock:
            self._faults.extend((fault, [0]) for fault in faults)

    def clear(self) -> None:
        """Forgets every fault and request."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    def replace(self, name: str, data: bytes) -> None:
        """Puts other bytes under a name, which changes the ETag. Not for folders."""
        self.contents.replace(name, data)

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuses connections and ends those there are, for as long as the `with` block lasts."""
        self._stop_listening()
        try:
            yield
        finally:
            self._listener = _Listener(self, self._port)

    def close(self) -> None:
        """Ends every connection, and the threads. Twice does no harm."""
        self.closing.set()
        self._stop_listening()

    def note(
        self,
        method: str,
        path: str,
        query: str,
        asked: tuple[int | None, int | None],
        headers: Mapping[str, str],
    ) -> Fault | None:
        """Records a request; returns the fault that it meets. For the server itself."""
        with self._lock:
            met = None
            for fault, count in self._faults:
                if fnmatch.fnmatchcase(path, fault.path):
                    count[0] += 1
                    is_due = fault.nth is None or count[0] == fault.nth
                    if met is None and is_due and (fault.first is None or count[0] <= fault.first):
                        met = fault
            kind = met.kind if met else ""
            self._requests.append(Request(method, path, query, *asked, dict(headers), kind))
            return met

    def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()


class _Listener(ThreadingHTTPServer):
    """A listening socket with its threads: one that accepts, one for each connection."""

    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, server: FaultServer, port: int) -> None:
        self.faults = server
        self.resets: set[socket.socket] = set()
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()  # guards _connections
        super().__init__(("127.0.0.1", port), Handler)
        self._acceptor = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, name="FaultServer"
        )
        self._acceptor.start()

    def close(self) -> None:
        """Ends accepting, every connection and every thread."""
        self.shutdown()
        self._acceptor.join()
        with self._connections_lock:
            for connection in self._connections:
                try:
                    connection.shutdown(socket.SHUT_RDWR)  # wakes its thread
                except OSError:
                    pass  # the client was faster
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts the thread of a connection."""
        with self._connections_lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection; one that is to be reset, without a goodbye."""
        with self._connections_lock:
            self._connections.discard(request)
        if request in self.resets:
            self.resets.discard(request)
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close()
        else:
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over clients that go away: in such tests they do."""
