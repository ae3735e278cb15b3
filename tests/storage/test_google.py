"""`gs://` reads through gcsfs's addresses, here those of a server on loopback.

pytest tests/storage/test_google.py
"""

from __future__ import annotations

import pytest
from remote import noise, nothing_survives  # noqa: F401

from jest_stream.errors import ShardUnavailableError
from jest_stream.storage import Storage, StorageConfig
from jest_stream.testing import Fault, FaultServer

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


def test_a_missing_object_is_named_with_a_hint() -> None:
    with FaultServer({OBJECT: DATA}) as server:
        storage = make_storage(server)
        with pytest.raises(ShardUnavailableError, match=r"gs://bucket/b.tar.*'anon'") as raised:
            storage.info("gs://bucket/b.tar")
        assert raised.value.attempts == 1
        storage.close()
