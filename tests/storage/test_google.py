"""`gs://` reads through gcsfs's addresses, here those of a server on loopback.

pytest tests/storage/test_google.py
"""

from __future__ import annotations

import json
import threading
import traceback
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.fault_server import FaultServer
from support.faults import Fault
from support.remote import noise, nothing_survives  # noqa: F401

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import ShardUnavailableError
from jest_stream.storage.storage import Storage

pytest.importorskip("gcsfs")

DATA = noise(900_000)  # one block: token look-ups have one thread
OBJECT = "download/storage/v1/b/bucket/o/folder/a.tar"


def make_storage(server: FaultServer) -> Storage:
    """A storage that takes the server for Google's."""
    options = {"gs": {"endpoint_url": server.address, "token": "anon"}}
    return Storage(StorageConfig(retry_timeout_s=3, options=options))


def test_objects_are_read_by_ranges_and_resumed() -> None:
    with FaultServer({OBJECT: DATA}, (Fault("truncate", nth=3, after_bytes=90_000),)) as server:
        storage = make_storage(server)
        assert storage.info("gs://bucket/folder/a.tar").num_bytes == len(DATA)
        with storage.open("gs://bucket/folder/a.tar") as file:
            file.seek(5)
            assert file.read() == DATA[5:]
        assert storage.take_counts()["storage_retries"] == 1
        storage.close()
        assert {request.query for request in server.requests} == {"alt=media"}


class _Uploads(BaseHTTPRequestHandler):
    """Takes an upload as Google's JSON interface does: the object is the second part."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        uploads: list[tuple[str, bytes]] = self.server.uploads  # type: ignore[attr-defined]
        if uploads and uploads[-1][0] == "busy":
            uploads.clear()
            self.send_error(503)
            return
        uploads.append((self.path, body))
        answer = json.dumps({"name": "a", "size": "0", "generation": "1"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_objects_are_written_whole_and_again_where_that_helps() -> None:
    server = HTTPServer(("127.0.0.1", 0), _Uploads)
    server.uploads = [("busy", b"")]  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        options = {"gs": {"endpoint_url": address, "token": "anon"}}
        storage = Storage(StorageConfig(retry_timeout_s=60, options=options))
        file = storage.create("gs://bucket/folder/a")
        file.write(b"the whole object")
        file.commit()
        storage.close()
        ((path, body),) = server.uploads  # type: ignore[attr-defined]
        assert path.startswith("/upload/storage/v1/b/bucket/o?") and b"folder/a" in body
        assert b"\nthe whole object\n" in body
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_token_is_not_shown_when_it_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    token = "a" * 9 + "NotToBeShown"
    storage = Storage(StorageConfig(retry_timeout_s=0.5, options={"gs": {"token": token}}))
    with pytest.raises(ShardUnavailableError, match=r"gs://bucket/a\.tar.*gave up after") as raised:
        storage.info("gs://bucket/a.tar")
    assert "NotToBeShown" not in "".join(traceback.format_exception(raised.value))
    storage.close()


def test_a_missing_object_is_named_with_a_hint() -> None:
    with FaultServer({OBJECT: DATA}) as server:
        storage = make_storage(server)
        with pytest.raises(ShardUnavailableError, match=r"gs://bucket/b.tar.*'anon'") as raised:
            storage.info("gs://bucket/b.tar")
        assert raised.value.attempts == 1
        storage.close()
