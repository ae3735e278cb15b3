"""The fault server serves properly when it is not told otherwise, and leaves nothing open.

pytest tests/storage/test_fault_server.py
"""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support.fault_server import FaultServer
from support.faults import Fault
from support.remote import nothing_survives  # noqa: F401

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Returns status, body and headers of one request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with OPENER.open(urllib.request.Request(url, headers=named, method=method)) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def test_files_ranges_and_conditions_are_served() -> None:
    with FaultServer({"a/b.tar": b"0123456789"}) as server:
        url = server.url("a/b.tar")
        status, body, headers = ask(url)
        assert (status, body) == (200, b"0123456789")
        etag = headers["ETag"]
        status, body, headers = ask(url, Range="bytes=2-4", If_Match=etag)
        assert (status, body, headers["Content-Range"]) == (206, b"234", "bytes 2-4/10")
        assert ask(url, Range="bytes=8-")[1] == b"89"
        assert ask(url, Range="bytes=10-12")[0] == 416
        assert ask(url, If_Match='"other"')[0] == 412
        status, body, headers = ask(url, method="HEAD")
        assert (status, body, headers["Content-Length"]) == (200, b"", "10")
        assert ask(server.url("none"))[0] == 404
        assert b'href="b.tar"' in ask(server.url("a/"))[1]
        server.replace("a/b.tar", b"new")
        assert ask(url)[2]["ETag"] != etag
        first = server.requests[1]
        assert (first.method, first.path, first.start, first.end) == ("GET", "a/b.tar", 2, 5)
        assert first.headers["if-match"] == etag and first.fault == ""


def test_a_folder_is_served_and_nothing_outside(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    with FaultServer(tmp_path / "shards") as server:
        assert ask(server.url("a.tar"))[1] == b"inside"
        assert ask(f"{server.address}/%2e%2e/secret")[0] == 404
        assert ask(f"{server.address}/{tmp_path}/secret")[0] == 404
        with pytest.raises(ValueError, match="a folder is served"):
            server.replace("a.tar", b"")


def test_faults_strike_when_they_are_due() -> None:
    faults = (
        Fault("status", path="a*", nth=2, status=503, retry_after="7"),
        Fault("wrong", path="a*", first=3),
        Fault("status", path="b*", status=404),
    )
    with FaultServer({"a.tar": b"a", "b.tar": b"b", "c.tar": b"c"}, faults) as server:
        answers = [ask(server.url("a.tar")) for _ in range(4)]
        assert [answer[0] for answer in answers] == [200, 503, 200, 200]
        assert answers[1][2]["Retry-After"] == "7"
        assert [answer[1] == b"a" for answer in answers] == [False, False, False, True]
        assert ask(server.url("b.tar"))[0] == 404 and ask(server.url("c.tar"))[1] == b"c"
        assert [request.fault for request in server.requests] == [
            *("wrong", "status", "wrong", ""),
            *("status", ""),
        ]


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("refuse", (http.client.RemoteDisconnected, ConnectionError)),
        ("reset", (http.client.IncompleteRead, ConnectionError)),
        ("truncate", http.client.IncompleteRead),
    ],
)
def test_broken_answers_are_broken(kind: str, raised: type[Exception]) -> None:
    with FaultServer({"a.tar": bytes(100_000)}) as server:
        server.add(Fault(kind, after_bytes=50_000))  # type: ignore[arg-type]
        connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=5)
        with pytest.raises(raised):
            connection.request("GET", "/a.tar")
            answer = connection.getresponse()
            try:
                answer.read()
            finally:
                answer.close()
        connection.close()


def test_a_server_that_is_down_refuses_and_comes_back_at_the_same_address() -> None:
    with FaultServer({"a.tar": b"a"}) as server:
        with server.down(), pytest.raises(urllib.error.URLError, match="refused"):
            ask(server.url("a.tar"))
        assert ask(server.url("a.tar"))[1] == b"a"


def test_closing_ends_clients_that_wait() -> None:
    server = FaultServer({"a.tar": bytes(10)}, (Fault("stall", after_bytes=3),))
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=5)
    connection.request("GET", "/a.tar")
    answer = connection.getresponse()
    assert answer.read(3) == bytes(3)
    server.close()
    server.close()
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    answer.close()
    connection.close()
