"""`hf://` reads one commit, by signed addresses, and shows the token to nobody but the Hub.

pytest tests/storage/test_hub.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from huggingface_hub.utils import close_session
from support import hub_server
from support.fault_server import FaultServer
from support.faults import Fault
from support.hub_server import HubServer
from support.remote import AT_ONCE, noise, nothing_survives  # noqa: F401

from jest_stream.config.storage import StorageConfig
from jest_stream.errors import ConfigError, ShardUnavailableError
from jest_stream.storage.storage import Storage
from jest_stream.types import ObjectInfo

TOKEN = "hf_notToBeShownAnywhere"
DATA = noise(3_000_000)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def storage(hub: HubServer) -> Iterator[Storage]:
    options = {"hf": {"endpoint": hub.url, "token": TOKEN}}
    storage = Storage(StorageConfig(retry_timeout_s=3, options=options))
    yield storage
    storage.close()


def test_addresses_are_pinned_to_the_commit_of_the_moment(hub: HubServer, storage: Storage) -> None:
    first = hub.put("acme/pairs", {"data/0.tar": DATA, "data/1.tar": b"1", "x.txt": b"x"})
    pattern = "hf://datasets/acme/pairs/data/*.tar"
    urls = storage.expand(pattern)
    assert urls == [f"hf://datasets/acme/pairs@{first}/data/{k}.tar" for k in (0, 1)]
    assert storage.expand("hf://datasets/acme/pairs@main/data/{0,1}.tar") == urls
    second = hub.put("acme/pairs", {"data/0.tar": DATA[::-1]})
    assert second != first
    assert storage.info(urls[0]) == ObjectInfo(len(DATA), first)
    with storage.open(urls[0]) as file:
        assert file.read() == DATA, "what was pinned is read, though the branch has moved"


def test_the_token_goes_to_the_hub_and_not_where_it_redirects(
    hub: HubServer, storage: Storage
) -> None:
    hub.put("acme/secret", {"a.tar": DATA}, token=TOKEN)
    (url,) = storage.expand("hf://datasets/acme/secret/a.tar")
    with storage.open(url) as file:
        assert file.read() == DATA
    content = [request for request in hub.requests if request.path.startswith("/content/")]
    others = [request for request in hub.requests if not request.path.startswith("/content/")]
    assert content and not any(request.token for request in content)
    assert others and {request.token for request in others} == {TOKEN}
    resolved = [request for request in others if "/resolve/" in request.path]
    assert len(resolved) < len(content), "the signed address is used again"


def test_a_signed_address_that_expires_is_renewed(hub: HubServer, storage: Storage) -> None:
    hub.put("acme/pairs", {"a.tar": DATA})
    (url,) = storage.expand("hf://datasets/acme/pairs/a.tar")
    info = storage.info(url)
    hub.fail(hub_server.Fault(match="^/content/", status=403, times=1))
    with storage.open(url, info) as file:
        assert file.read() == DATA
    assert storage.take_counts()["storage_retries"] == 1


def test_a_body_that_breaks_off_is_resumed(hub: HubServer, storage: Storage) -> None:
    hub.put("acme/pairs", {"a.tar": DATA})
    (url,) = storage.expand("hf://datasets/acme/pairs/a.tar")
    info = storage.info(url)
    hub.fail(hub_server.Fault(match="^/content/", cut=100_000, times=2))
    with storage.open(url, info) as file:
        assert file.read() == DATA
    counts = storage.take_counts()
    assert counts["storage_retries"] == 2 and counts["storage_bytes"] == len(DATA)


def test_what_is_private_or_missing_is_named_without_the_token(
    hub: HubServer, storage: Storage
) -> None:
    hub.put("acme/secret", {"a.tar": DATA}, token="hf_another")
    commit = hub.put("acme/pairs", {"a.tar": DATA})
    missing = f"hf://datasets/acme/pairs@{commit}/b.tar"
    for url in ("hf://datasets/acme/secret/a.tar", "hf://datasets/acme/none/a.tar", missing):
        with pytest.raises(ShardUnavailableError, match="HF_TOKEN") as raised:
            storage.info(storage.expand(url)[0])
        assert raised.value.attempts == 1 and TOKEN not in str(raised.value)


def test_a_hub_that_is_busy_is_asked_again(hub: HubServer, storage: Storage) -> None:
    commit = hub.put("acme/pairs", {"a.tar": DATA})
    hub.fail(hub_server.Fault(match="^/api/", status=503, times=1))
    assert storage.expand("hf://datasets/acme/pairs/a.tar") == [
        f"hf://datasets/acme/pairs@{commit}/a.tar"
    ]


def test_a_glob_reads_a_listing_of_many_pages_to_its_end() -> None:
    names = [f"a/{k}.tar" for k in range(5)]
    names += ["a/b/c/5.tar", "a b/6#.tar", "7.tar", "a/x.txt"]
    with HubServer(page_size=2) as hub:
        commit = hub.put("acme/many", {name: name.encode() for name in names}, token=TOKEN)
        options = {"hf": {"endpoint": hub.url, "token": TOKEN}}
        storage = Storage(replace(AT_ONCE, options=options))
        for pattern, matched in {
            "a/*.tar": names[:5],
            "a/**/*.tar": names[:6],
            "**/*.tar": names[:8],
            "a b/*#.tar": names[6:7],
            "[0-9].tar": names[7:8],
        }.items():
            urls = storage.expand(f"hf://datasets/acme/many/{pattern}")
            assert urls == sorted(f"hf://datasets/acme/many@{commit}/{name}" for name in matched)
            (name,) = [name for name in matched if urls[0].endswith(f"/{name}")]
            assert storage.listed(urls[0]) == ObjectInfo(len(name), commit)
        with pytest.raises(ConfigError, match="matches nothing"):
            storage.expand("hf://datasets/acme/many/no/such/folder/*.tar")
        storage.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("stall", path="*/tree/*", after_bytes=5), r"gave up after .*Timeout"),
        (Fault("trickle", path="*/tree/*", pause_s=0.1, piece_bytes=1), "has not ended after 2 s"),
    ],
)
def test_a_listing_that_does_not_end_is_given_up(
    fault: Fault, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jest_stream.storage.storage.MAX_SEGMENT_BYTES", 0)  # waits are shorter
    commit = "a" * 40
    contents = {
        "api/datasets/org/name": json.dumps({"id": "org/name", "sha": commit}).encode(),
        f"api/datasets/org/name/tree/{commit}": b"[" + b" " * 10_000 + b"]",
    }
    with FaultServer(contents, (fault,)) as server:
        config = replace(AT_ONCE, options={"hf": {"endpoint": server.address}})
        storage = Storage(config)
        with pytest.raises(ShardUnavailableError, match=said):
            storage.expand("hf://datasets/org/name/*.tar")
        storage.close()
    close_session()
