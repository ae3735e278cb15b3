"""`hf://` reads one commit, by signed addresses, and shows the token to nobody but the Hub.

pytest tests/storage/test_hub.py
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub_server import Fault, HubServer
from remote import noise, nothing_survives  # noqa: F401

from jest_stream.errors import ShardUnavailableError
from jest_stream.storage import ObjectInfo, Storage, StorageConfig

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
    hub.fail(Fault(match="^/content/", status=403, times=1))
    with storage.open(url, info) as file:
        assert file.read() == DATA
    assert storage.take_counts()["storage_retries"] == 1


def test_a_body_that_breaks_off_is_resumed(hub: HubServer, storage: Storage) -> None:
    hub.put("acme/pairs", {"a.tar": DATA})
    (url,) = storage.expand("hf://datasets/acme/pairs/a.tar")
    info = storage.info(url)
    hub.fail(Fault(match="^/content/", cut=100_000, times=2))
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
    hub.fail(Fault(match="^/api/", status=503, times=1))
    assert storage.expand("hf://datasets/acme/pairs/a.tar") == [
        f"hf://datasets/acme/pairs@{commit}/a.tar"
    ]
